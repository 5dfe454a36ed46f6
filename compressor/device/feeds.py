"""What a model file is given and what it answers: one array or several, each with the samples of a batch on axis 0.

Whatever takes images takes several inputs too by going through these functions; an array alone stays one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

Array: TypeAlias = NDArray[Any]  # of numbers, whose type is the model's to say
Arrays: TypeAlias = "Array | tuple[Array, ...]"


def as_tuple(arrays: Arrays) -> tuple[Array, ...]:
    """The arrays one by one, in their order."""
    return arrays if isinstance(arrays, tuple) else (arrays,)


def mapped(function: Callable[[Array], Array], arrays: Arrays) -> Arrays:
    """The function's result for each."""
    return tuple(map(function, arrays)) if isinstance(arrays, tuple) else function(arrays)


def count(arrays: Arrays) -> int:
    """How many samples there are."""
    return len(as_tuple(arrays)[0])


def cut(arrays: Arrays, start: int, stop: int) -> Arrays:
    """The samples from `start` to before `stop`; no copy."""
    return mapped(lambda array: array[start:stop], arrays)


def parted(arrays: Arrays, size: int) -> list[Arrays]:
    """At most `size` samples at a time: 5 in threes are 3 and 2."""
    return [cut(arrays, start, start + size) for start in range(0, count(arrays), size)]


def joined(batches: Sequence[Arrays]) -> Arrays:
    """The samples of all batches, one behind the other. Raises ValueError without any batch."""
    if not batches:
        raise ValueError("there is no batch to join")
    columns = zip(*map(as_tuple, batches), strict=True)  # [batches, inputs] to [inputs, batches]
    together = tuple(np.concatenate(column) for column in columns)
    return together if isinstance(batches[0], tuple) else together[0]


def has_rows(array: Array, samples: int) -> bool:
    """Whether there is a row of at least one number for each of that many samples."""
    return array.ndim >= 2 and len(array) == samples and array.size > 0


def sample_bytes(arrays: Arrays) -> int:
    """Bytes of one sample, all inputs together."""
    return sum(int(array[:1].nbytes) for array in as_tuple(arrays))


def unwrapped(arrays: tuple[Array, ...]) -> Arrays:
    """The array alone where there is but one."""
    return arrays[0] if len(arrays) == 1 else arrays
