"""Times of one layer over a lattice of widths, interpolated; and the file that keeps what was timed.

Between lattice points a width counts as the next step above it: half a block costs a whole one. Entries are
kept under a hash of the layer, its widths, the runtime and the machine, and written after each, so that a
measurement that was cut off goes on.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import FolderError
from ..files import Json, read_signed, signed, write_json
from ..records import FloatArray

SCHEMA = "latency-model/1"
_SHARES = (1.0, 0.5, 0.25, 0.125)


@dataclass(frozen=True, slots=True)
class Table:
    """`us[i][j]` is the time at `inputs[i]`, `outputs[j]`, both ascending; `steps` of the two axes."""

    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    steps: tuple[int, int]
    us: tuple[tuple[float, ...], ...]

    def at(self, inputs: int, outputs: int) -> float:
        """Microseconds at these widths: bilinear between points; beyond the lattice its nearest point."""
        i, fraction_i = _place(self.inputs, inputs, self.steps[0])
        j, fraction_j = _place(self.outputs, outputs, self.steps[1])
        next_i = min(i + 1, len(self.inputs) - 1)
        next_j = min(j + 1, len(self.outputs) - 1)
        low = (1 - fraction_j) * self.us[i][j] + fraction_j * self.us[i][next_j]
        high = (1 - fraction_j) * self.us[next_i][j] + fraction_j * self.us[next_i][next_j]
        return (1 - fraction_i) * low + fraction_i * high


def _place(levels: Sequence[int], width: int, step: int) -> tuple[int, float]:
    """The point below (or at) a width rounded up to its step, and how far it is to the next, 0 to 1.

    Of (16, 32, 64), 40 at a step of 16 counts as 48: half the way from the second to the third.
    """
    if len(levels) == 1:
        return 0, 0.0
    width = min(max(-(-width // step) * step, levels[0]), levels[-1])
    i = min(int(np.searchsorted(levels, width, side="right")) - 1, len(levels) - 2)
    return i, (width - levels[i]) / (levels[i + 1] - levels[i])


def levels(dense: int, least: int, step: int) -> tuple[int, ...]:
    """Widths worth timing from `least` to `dense`: halves, on the steps. (64, 7, 16) gives 16, 32, 64."""
    chosen = {dense}
    if least < dense:
        chosen = {max(least, int(dense * share)) for share in _SHARES}
    on_steps = {min(dense, -(-width // step) * step) for width in chosen}  # rounded up
    return tuple(sorted(on_steps))


def smoothed(us: FloatArray) -> FloatArray:
    """Noise taken out that would make a wider layer the faster one: midway between the envelopes along each axis.

    `us` is [inputs, outputs], widths ascending. 10, 14, 12 becomes 10, 13, 13.
    """
    for axis in (0, 1):
        above = np.maximum.accumulate(us, axis=axis)
        below = np.flip(np.minimum.accumulate(np.flip(us, axis), axis=axis), axis)
        us = (above + below) / 2
    return us


class Kept:
    """Entries on disk by key, in the run's file and, where one is given, in a file that runs share."""

    def __init__(self, path: Path | None, shared: Path | None = None) -> None:
        self.path, self.shared = path, shared
        self.entries: dict[str, Json] = {}
        self.measured = 0
        for file in (shared, path):  # the run's own last: they stand where both have an entry
            if file is not None:
                self.entries |= _entries(file)

    def get(self, key: str) -> Any:
        """The entry, as whoever put it there knows it, or None: no entry is None."""
        return self.entries.get(key)

    def put(self, key: str, value: Json) -> None:
        """Keeps an entry, in memory and on disk."""
        self.entries[key] = value
        self.measured += 1
        self.write()

    def write(self, **facts: object) -> None:
        """Both files; `facts` are what a person reads in the run's own."""
        if self.path is not None:
            write_json(self.path, signed({"schema": SCHEMA, **facts, "entries": self.entries}))
        if self.shared is not None:  # read again: other runs have written meanwhile
            write_json(self.shared, signed({"schema": SCHEMA, "entries": _entries(self.shared) | self.entries}))


def shared_place() -> Path | None:
    """Where runs share what was timed: a file in the folder that COMPRESSOR_CACHE names, if it does."""
    folder = os.environ.get("COMPRESSOR_CACHE")
    if not folder:
        return None
    return Path(folder) / "latency-model.json"


def _entries(path: Path) -> dict[str, Json]:
    """A file that is gone or damaged holds nothing: what it held is measured again."""
    try:
        entries: dict[str, Json] = read_signed(path, SCHEMA)["entries"]
    except (FolderError, KeyError):
        return {}
    return entries
