"""What a time that is taken here stands for, and whether now is a time to take one.

`python -m compressor.device.place RUNTIME` prints both as a JSON object, to who times here from afar.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from .environment import affinity, read_environment
from .isolation import leave_current_folder
from .runtimes import available, version_of

_HASHED_BYTES = 2**26  # some tens of milliseconds: longer than a scheduler's slice
_QUIET = 0.9  # share of the time that a thread computes: what a core without other work gives


def is_busy() -> bool:
    """Whether something else runs on this machine's cores: a thread on each gets less of it than it asks for.

    Long operations are then always cut into while short ones slip through, and a table of wall-clock times is
    wrong where it matters; such a table is made of one thread's processor time instead.
    """
    data = bytes(_HASHED_BYTES)

    def computing_share(_: int) -> float:
        wall, processor = time.perf_counter(), time.thread_time()
        hashlib.sha256(data).digest()  # lets go of the interpreter's lock
        return (time.thread_time() - processor) / (time.perf_counter() - wall)

    cores = len(affinity()) or os.cpu_count() or 1
    with ThreadPoolExecutor(cores) as pool:
        shares = list(pool.map(computing_share, range(4 * cores)))
    return float(np.mean(shares)) < _QUIET


def describe(runtime: str) -> dict[str, str]:
    """The machine's fingerprint, the runtime's version, and why it can't run here, empty where it can."""
    return {
        "fingerprint": read_environment().fingerprint,
        "version": version_of(runtime),
        "lacks": available().get(runtime, ""),
    }


if __name__ == "__main__":
    leave_current_folder()
    print(json.dumps({**describe(sys.argv[1]), "busy": is_busy()}))
