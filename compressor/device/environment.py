"""Where a measurement was taken: machine, libraries, clocks and threads, and a fingerprint of what must not differ.

Everything is read when asked, nothing at import. What can't be read here is an empty string, never a guess.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from . import cuda
from .runtimes import FILES, row_of, runtime_names, version_of

_GOVERNOR = Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")
_CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
_BOARD = Path("/proc/device-tree/model")  # ends with a zero byte, as the device tree's texts do
_SIZE_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30}


@dataclass(frozen=True, slots=True)
class Environment:
    """`state` may change between two runs (load, clocks); the fingerprint covers only `machine` and `libraries`."""

    machine: Mapping[str, str]
    libraries: Mapping[str, str]
    state: Mapping[str, str]
    fingerprint: str


def read_environment() -> Environment:
    """This machine as it is now; the fingerprint is 16 hexadecimal digits."""
    machine = {
        "system": platform.system(),
        "release": platform.release(),
        "architecture": platform.machine(),
        "board": _read(_BOARD).strip("\0"),
        "cpu": _cpu_name(),
        "cores": str(os.cpu_count() or 0),
        "gpu": "" if cuda.unavailable() else " ".join(cuda.device()),
    }
    libraries = {"python": platform.python_version(), "numpy": np.__version__}
    for name in runtime_names(*FILES):
        version = version_of(name)
        if version:
            libraries[row_of(name).library] = version
    state = {
        "governor": _read(_GOVERNOR),
        "load_average": _load_average(),
        "affinity": ",".join(map(str, affinity())),
    }
    stable = json.dumps([machine, libraries], sort_keys=True)
    return Environment(machine, libraries, state, hashlib.sha256(stable.encode()).hexdigest()[:16])


def cache_bytes() -> int:
    """The largest cache of core 0; 0 where the system does not say."""
    sizes = map(_read, _CACHES.glob("index*/size"))
    return max(map(_size_bytes, sizes), default=0)


def _size_bytes(size: str) -> int:
    """`32K` to 32768; 0 for a text of another form."""
    digits, unit = size[:-1], size[-1:]
    if unit not in _SIZE_UNITS or not digits.isdigit():
        return 0
    return int(digits) * _SIZE_UNITS[unit]


def affinity() -> tuple[int, ...]:
    """The cores this process may run on; empty where the system can't say."""
    if sys.platform == "linux":
        return tuple(sorted(os.sched_getaffinity(0)))
    return ()


def pin(cores: tuple[int, ...]) -> tuple[int, ...]:
    """Restricts this process to `cores` where the system can, and returns what holds afterwards."""
    if cores and sys.platform == "linux":
        os.sched_setaffinity(0, cores)
    return affinity()


def resident_bytes() -> int:
    """Peak resident memory of this process; -1 where the system can't say.

    Linux's getrusage passes a parent's peak on to its children, so the process's own status is asked first.
    """
    for line in _read(Path("/proc/self/status")).splitlines():
        if line.startswith("VmHWM:"):  # the high-water mark: `VmHWM:   123456 kB`
            return int(line.split()[1]) * 1024
    try:
        import resource
    except ImportError:
        return -1
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, the others KiB


def _cpu_name() -> str:
    for line in _read(Path("/proc/cpuinfo")).splitlines():
        if line.lower().startswith(("model name", "hardware")):  # x86, boards with Arm
            return line.split(":", 1)[1].strip()
    return platform.processor()


def _load_average() -> str:
    try:
        return " ".join(f"{average:.2f}" for average in os.getloadavg())
    except (OSError, AttributeError):  # Windows has none
        return ""


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""
