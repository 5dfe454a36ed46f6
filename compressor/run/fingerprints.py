"""What a value stands for in a stage's key: its content, and of the code its sources. Nothing of where it lies.

Plain values, arrays and records stand for themselves; networks, images and units are registered here.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import fx

from ..files import content_hash, file_sha256
from ..inputs.checkpoints import state_hash
from ..inputs.images import Batches
from ..placement import code_of
from ..pruning import Structure

PACKAGE = Path(__file__).resolve().parents[1]
SHOWING = ("cli", "listing.py", "report", "benchmarking", "searching")  # change no result of a run


@dataclass(frozen=True, slots=True, eq=False)
class Known:
    """A value whose content is known by something shorter: the hash it was read with, the key of what made it."""

    value: Any
    stands_for: object


@functools.singledispatch
def fingerprint(value: object) -> object:
    """What `content_hash` can take in, the same for equal contents and only for those."""
    return value


@fingerprint.register
def _(value: Known) -> object:
    return value.stands_for


@fingerprint.register
def _(value: fx.GraphModule) -> object:
    return [code_of(value), state_hash(value)]


@fingerprint.register
def _(value: Structure) -> object:
    """Of a network that goes in too: its labels follow from that and what the check found."""
    return [list(value.tied), list(value.frozen)]


@fingerprint.register
def _(value: Batches) -> object:
    preprocessing = value.images.preprocessing
    return [value.images.content_hash(), value.batch_size, preprocessing and asdict(preprocessing)]


@fingerprint.register
def _(value: Path) -> object:
    """A file stands for its content."""
    return file_sha256(value)


@fingerprint.register(dict)
def _(value: Mapping[str, object]) -> object:
    return {name: fingerprint(entry) for name, entry in value.items()}


@fingerprint.register(list)
@fingerprint.register(tuple)
def _(value: list[object]) -> object:
    return [fingerprint(entry) for entry in value]


@functools.cache
def source_hash() -> str:
    """sha256 of the package's sources but those that only show: other code is another result."""
    files = sorted(path for path in PACKAGE.rglob("*.py") if path.relative_to(PACKAGE).parts[0] not in SHOWING)
    return content_hash([[path.relative_to(PACKAGE).as_posix(), file_sha256(path)] for path in files])
