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
_MOST_AXES = 7  # without the samples', of the eight that an array file may have
_FIELDS = ("name", "shape", "dtype")


@dataclass(frozen=True, slots=True)
class Leaf:
    """One input or output. `shape` is one sample's, without the batch axis; `dtype` is numpy's name of its type."""

    name: str
    shape: tuple[int, ...]
    dtype: str

    def __str__(self) -> str:
        return f"{self.dtype} [{', '.join(map(str, ('N', *self.shape)))}]"

    @property
    def sample_bytes(self) -> int:
        """Of one sample."""
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize

    def is_of(self, array: Array) -> bool:
        """Whether samples [N, ...] of an array have this shape and type."""
        return array.ndim == len(self.shape) + 1 and array.shape[1:] == self.shape and array.dtype == self.dtype

    def is_answered_by(self, array: Array) -> bool:
        """The same of a model's answer, whose numbers may be wider or narrower: half floats where floats are."""
        is_alike = (array.dtype.kind == "f") == (np.dtype(self.dtype).kind == "f")
        return array.ndim == len(self.shape) + 1 and array.shape[1:] == self.shape and is_alike


def declared(names: Sequence[str], arrays: Arrays) -> tuple[Leaf, ...]:
    """What arrays [N, ...] of those names are; raises InputError where there are not as many names, or no samples."""
    several = as_tuple(arrays)
    if len(names) != len(several):
        raise InputError(f"there are {len(several)} arrays for the names {', '.join(names) or 'none'}; name each")
    without = [name for name, array in zip(names, several, strict=True) if array.ndim == 0]
    if without:
        raise InputError(f"{without[0]!r} is a single number, expected one for each sample")
    return tuple(Leaf(name, array.shape[1:], array.dtype.name) for name, array in zip(names, several, strict=True))


def read_leaves(content: fields.Object, key: str) -> tuple[Leaf, ...]:
    """The field's list of at least one declaration, each of another name; ValueError for what no array could be."""
    leaves = tuple(_leaf(entry, key) for entry in fields.entries(content, key, least=1, most=_MOST_LEAVES))
    names = [leaf.name for leaf in leaves]
    if len(set(names)) < len(names):
        raise ValueError(f"two of its {key} have one name")
    sample_bytes = sum(leaf.sample_bytes for leaf in leaves)
    if sample_bytes > MOST_SAMPLE_BYTES:
        raise ValueError(f"its {key} take {sample_bytes} bytes a sample, at most {MOST_SAMPLE_BYTES} are read")
    return leaves


def _leaf(entry: object, key: str) -> Leaf:
    content = fields.as_object(entry, f"an entry of {key}")
    fields.only(content, _FIELDS, f"an entry of {key}")
    name, dtype = (fields.text(content, field, most=_MOST_NAME) for field in ("name", "dtype"))
    if not name or not name.isprintable():
        raise ValueError(f"one of its {key} is called {fields.shown(name)}, expected a name")
    if dtype not in NUMBER_TYPES:
        raise ValueError(f"{fields.shown(name)} is of type {fields.shown(dtype)}, expected {', '.join(NUMBER_TYPES)}")
    sizes = fields.entries(content, "shape", most=_MOST_AXES)
    shape = tuple(fields.as_whole(size, f"a side of {fields.shown(name)}", least=1, most=1 << 30) for size in sizes)
    return Leaf(name, shape, dtype)
