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

Images = NDArray[np.float32]
Output = NDArray[np.number]  # of the type the network has, which may be float16 or whole numbers


@dataclass(frozen=True, slots=True)
class OpenOptions:
    """How a file is to be run; 0 threads leaves the number to the runtime.

    `fused=False` asks for Q/DQ pairs as they are written, not as the integer kernels a runtime would make of them.
    """

    threads: int = 0
    fused: bool = True


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A file a runtime has loaded. `shape` is its input's, with -1 for free axes; `details` what is said of a timing.

    `call` takes images [N, C, H, W], float32 in one block of memory, to output 0 as an array of the caller's own.
    """

    shape: tuple[int, ...]
    call: Callable[[Images], Output]
    details: Mapping[str, str] = field(default_factory=dict)


Opener = Callable[[Path, OpenOptions], LoadedModel]
