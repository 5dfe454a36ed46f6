"""What a runtime's own module is given, and what it gives back: a file and options in, a callable network out.

Such a module knows this contract and its library, no other runtime and no table. It need not check that its library
is installed, name itself, or turn the library's errors into ours: `runtimes.open_model` does.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from .feeds import Array

Images = NDArray[np.float32]
Output = NDArray[np.number]  # of the type the network has, which may be float16 or whole numbers
Call = Callable[[tuple[Array, ...]], tuple[Array, ...]]
NUMBER_TYPES = (
    *("bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"),
    *("float16", "float32", "float64"),
)
"""What an input or output can hold, by numpy's names."""


@dataclass(frozen=True, slots=True)
class Port:
    """An input or output of a model. `shape` has -1 for free axes, `dtype` is numpy's name of its numbers' type."""

    name: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def fed_dtype(self) -> str:
        """The type of what it is given: half floats are the runtime's own affair."""
        return "float32" if self.dtype == "float16" else self.dtype

    def takes(self, shape: tuple[int, ...]) -> bool:
        """Whether an array of that shape fits."""
        if len(shape) != len(self.shape):
            return False
        return all(size in (-1, length) for size, length in zip(self.shape, shape, strict=True))


@dataclass(frozen=True, slots=True)
class OpenOptions:
    """How a file is to be run; 0 threads leaves the number to the runtime.

    `fused=False` asks for Q/DQ pairs as they are written, not as the integer kernels a runtime would make of them.
    """

    threads: int = 0
    fused: bool = True


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A file a runtime has loaded, its inputs and outputs in the file's order; `details` is what is said of a timing.

    `call` takes an array for each input, of its shape and type and in one block of memory, to one for each output,
    of the caller's own. Where an input is float16 it is given float32.
    """

    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    call: Call
    details: Mapping[str, str] = field(default_factory=dict)


Opener = Callable[[Path, OpenOptions], LoadedModel]
