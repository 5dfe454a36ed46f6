"""What a bundle declares of each input and output: its name, the shape of one sample and a type; arrays held to it.

A declaration from elsewhere is data: it is held to limits before anything of its size is allocated.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..errors import InputError
from . import fields
from .feeds import Array, Arrays, as_tuple
from .openers import NUMBER_TYPES

MOST_SAMPLE_BYTES = 1 << 29  # of all inputs or all outputs of one sample
_MOST_LEAVES = 256
_MOST_NAME = 200
_MOST_SIDE = 1 << 30
_MOST_AXES = 7  # without the samples', of the eight that an array file may have
_FIELDS = ("name", "shape", "dtype")


@dataclass(frozen=True, slots=True)
class Leaf:
    """One input or output. `shape` is one sample's, without the batch axis; `dtype` is numpy's name of its type."""

    name: str
    shape: tuple[int, ...]
    dtype: str

    def __str__(self) -> str:
        axes = ", ".join(map(str, ("N", *self.shape)))
        return f"{self.dtype} [{axes}]"

    @property
    def sample_bytes(self) -> int:
        """Of one sample."""
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize

    def is_of(self, array: Array) -> bool:
        """Whether samples [N, ...] of an array have this shape and type."""
        return array.dtype == self.dtype and self._fits(array)

    def is_answered_by(self, array: Array) -> bool:
        """The same of a model's answer, whose numbers may be wider or narrower: half floats where floats are."""
        is_float, expects_float = array.dtype.kind == "f", np.dtype(self.dtype).kind == "f"
        return is_float == expects_float and self._fits(array)

    def _fits(self, array: Array) -> bool:
        """Whether an array is [N, *shape]; a single number has no samples, though its shape[1:] is () too."""
        return array.ndim > 0 and array.shape[1:] == self.shape


def names_of(leaves: Sequence[Leaf]) -> list[str]:
    """What they are called, in their order."""
    return [leaf.name for leaf in leaves]


def declared(names: Sequence[str], arrays: Arrays) -> tuple[Leaf, ...]:
    """What arrays [N, ...] of those names are; raises InputError where there are not as many names, or no samples."""
    several = as_tuple(arrays)
    if len(names) != len(several):
        raise InputError(f"there are {len(several)} arrays for the names {', '.join(names) or 'none'}; name each")
    leaves = []
    for name, array in zip(names, several, strict=True):
        if array.ndim == 0:
            raise InputError(f"{name!r} is a single number, expected one for each sample")
        leaves.append(Leaf(name, array.shape[1:], array.dtype.name))
    return tuple(leaves)


def read_leaves(content: fields.Object, key: str) -> tuple[Leaf, ...]:
    """The field's list of at least one declaration, each of another name; ValueError for what no array could be."""
    leaves = tuple(_leaf(entry, key) for entry in fields.entries(content, key, least=1, most=_MOST_LEAVES))
    if len(set(names_of(leaves))) < len(leaves):
        raise ValueError(f"two of its {key} have one name")
    sample_bytes = sum(leaf.sample_bytes for leaf in leaves)
    if sample_bytes > MOST_SAMPLE_BYTES:
        raise ValueError(f"its {key} take {sample_bytes} bytes a sample, at most {MOST_SAMPLE_BYTES} are read")
    return leaves


def _leaf(entry: object, key: str) -> Leaf:
    content = fields.record(entry, _FIELDS, f"an entry of {key}")
    name = fields.text(content, "name", most=_MOST_NAME)
    dtype = fields.text(content, "dtype", most=_MOST_NAME)
    if not name or not name.isprintable():
        raise ValueError(f"one of its {key} is called {fields.shown(name)}, expected a name")
    if dtype not in NUMBER_TYPES:
        raise ValueError(f"{fields.shown(name)} is of type {fields.shown(dtype)}, expected {', '.join(NUMBER_TYPES)}")
    sizes = fields.entries(content, "shape", most=_MOST_AXES)
    side = f"a side of {fields.shown(name)}"
    return Leaf(name, tuple(fields.as_whole(size, side, least=1, most=_MOST_SIDE) for size in sizes), dtype)
