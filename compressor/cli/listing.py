"""Names that can be given, each with what it is: models, criteria, runtimes, targets; read where they stand.

Libraries are imported by the list that needs them, so that the others are there at once.
"""

from __future__ import annotations

from ..device.runtimes import available
from ..export.targets import TARGETS

Rows = list[tuple[str, str]]


def models() -> Rows:
    """The embedded ones, then every classifier of torchvision and timm."""
    import timm
    from torchvision import models as library

    from ..files import read_json
    from ..inputs.models import EMBEDDED

    embedded = read_json(EMBEDDED / "index.json", "models/1")["models"]
    rows = [(name, f"embedded: {entry['architecture']}") for name, entry in embedded.items()]
    rows += [(f"torchvision:{name}", "") for name in library.list_models(module=library)]
    return rows + [(f"timm:{name}", "") for name in timm.list_models()]


def criteria() -> Rows:
    """Each with the first line of what says how it scores."""
    from ..relevance.criteria import CRITERIA

    return [(name, _first_line(criterion)) for name, criterion in CRITERIA.items()]


def _first_line(criterion: object) -> str:
    """Of the function that does a criterion's work, else of its class."""
    function = getattr(criterion, "prepare", None) or getattr(criterion, "weigh", None)
    described = function if function is not None else type(criterion)
    text = (described.__doc__ or "").strip()
    return text.splitlines()[0] if text else ""


def runtimes() -> Rows:
    """Each with why it can't run here, where it can't."""
    return [(name, reason or "runs here") for name, reason in available().items()]


def targets() -> Rows:
    """The devices that engines are built for."""
    return [(name, f"{target.devices} ({', '.join(target.libraries)})") for name, target in TARGETS.items()]
