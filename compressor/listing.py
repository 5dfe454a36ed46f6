"""Names that can be given, each with what it is: models, criteria, runtimes, targets; read where they stand.

Needs numpy alone: of a library that is not here it says so in place of its names. Libraries are imported by the list
that needs them, so that the others are there at once.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Mapping, Sequence

from .device.options import OneLineParser
from .device.runtimes import available, row_of, runtime_names
from .errors import InputError, did_you_mean
from .export.targets import TARGETS, synonyms_of

Rows = list[tuple[str, str]]

LISTS: Mapping[str, str] = {
    "models": "networks by name: the embedded ones, torchvision's and timm's classifiers (--model)",
    "criteria": "what scores the units (--criterion)",
    "runtimes": "what files and networks are run and timed on (--runtimes, --budget 'latency 0.5 on NAME')",
    "targets": "devices that engines are built for (--targets)",
}


def rows_of(what: str = "", words: str = "") -> Rows:
    """One list, or the lists there are; `words` leaves the rows that hold them, in whatever case.

    Raises InputError for a list that is not there, or where no row holds the words.
    """
    if not what:
        return list(LISTS.items())
    if what not in LISTS:
        raise InputError(f"there is no list of {what!r}; there are {', '.join(LISTS)}.{did_you_mean(what, [*LISTS])}")
    read: Mapping[str, Callable[[], Rows]] = {
        "models": models,
        "criteria": criteria,
        "runtimes": runtimes,
        "targets": targets,
    }
    rows = read[what]()
    chosen = [row for row in rows if words.lower() in " ".join(row).lower()]
    if not chosen:
        hint = did_you_mean(words, [name.rpartition(":")[2] for name, _ in rows])
        raise InputError(f"none of the {len(rows)} {what} has {words!r} in its line.{hint} Give a part of a name")
    return chosen


def models() -> Rows:
    """The embedded ones, then every model of torchvision, with what it is for, and of timm, where these are."""
    from .files import read_json
    from .recipe import EMBEDDED

    index = EMBEDDED / "index.json"  # comes with a checkout, not with a package
    embedded = read_json(index, "models/1")["models"] if index.is_file() else {}
    rows = [(name, f"embedded: {entry['architecture']}") for name, entry in embedded.items()]
    hub = ("transformers:NAME", "a model of Hugging Face's Hub, or a class with its configuration")
    return [*rows, *_of_torchvision(), *_of_timm(), hub]


def _of_torchvision() -> Rows:
    if importlib.util.find_spec("torchvision") is None:
        return [("torchvision:NAME", "not installed: pip install torchvision")]
    if importlib.util.find_spec("torch") is None:
        return [("torchvision:NAME", "torch is not installed")]
    from .inputs.torchvision_models import torchvision_names

    return [(f"torchvision:{name}", kind.replace("_", " ")) for name, kind in torchvision_names().items()]


def _of_timm() -> Rows:
    if importlib.util.find_spec("timm") is None:
        return [("timm:NAME", "not installed: pip install timm")]
    import timm

    return [(f"timm:{name}", "classification") for name in timm.list_models()]


def criteria() -> Rows:
    """Each with a sentence of how it scores."""
    from .criteria import CRITERIA

    return [(name, row.summary) for name, row in CRITERIA.items()]


def runtimes() -> Rows:
    """Each with why it can't run here, where it can't; those of files first, then PyTorch's."""
    reasons = available() | {name: _reason_of_network(name) for name in runtime_names("network")}
    return [(name, reason or "runs here") for name, reason in reasons.items()]


def _reason_of_network(name: str) -> str:
    library = row_of(name).library
    if importlib.util.find_spec(library) is None:
        return f"not installed: pip install {library}"
    from .delivery.networks import unavailable  # brings torch

    return unavailable(name)


def targets() -> Rows:
    """The devices that engines are built for, with the library that builds them and other words for them."""
    return [(name, _described(name)) for name in TARGETS]


def _described(target: str) -> str:
    """`Jetson Orin (tensorrt); also orin`."""
    libraries = ", ".join(TARGETS[target].libraries)
    description = f"{TARGETS[target].devices} ({libraries})"
    words = ", ".join(synonyms_of(target))
    if not words:
        return description
    return f"{description}; also {words}"


def print_lists(arguments: Sequence[str]) -> int:
    """`compressor list` where typer and rich are not installed: a line each; returns the exit code."""
    parser = OneLineParser(prog="compressor list", description="Lists names that can be given.")
    parser.add_argument("what", nargs="?", default="", metavar="WHAT", help=f"one of {', '.join(LISTS)}")
    parser.add_argument("words", nargs="?", default="", metavar="WORDS", help="leaves the rows that hold these")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args(arguments)
    rows = rows_of(options.what, options.words)
    if options.json:
        print(json.dumps(dict(rows)))
        return 0
    for name, description in rows:
        print(f"{name}: {description}" if description else name)
    return 0
