"""What a stretch of work takes: seconds, and the most memory of this process and of its GPU.

A process of its own, such as one that times a file, is not part of it. A figure that can't be had is None: Linux
resets a process's peak on request; elsewhere the peak is known only where it rises above every earlier one.
"""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from .environment import resident_bytes

_RESET_PEAK = "5"  # proc(5), clear_refs: the peak starts again from what is resident now
_CLEAR_REFS = Path("/proc/self/clear_refs")


@dataclass(frozen=True, slots=True)
class Usage:
    """`peak_bytes` is resident memory; `gpu_peak_bytes` what PyTorch held on the GPU, None where it used none."""

    seconds: float
    peak_bytes: int | None = None
    gpu_peak_bytes: int | None = None

    def after(self, earlier: Usage) -> Usage:
        """Both stretches as one; of two peaks one of which is unknown, the larger is unknown too."""
        if self.peak_bytes is None or earlier.peak_bytes is None:
            peak_bytes = None
        else:
            peak_bytes = max(self.peak_bytes, earlier.peak_bytes)
        gpu_peaks = [peak for peak in (self.gpu_peak_bytes, earlier.gpu_peak_bytes) if peak is not None]
        return Usage(self.seconds + earlier.seconds, peak_bytes, max(gpu_peaks, default=None))


@dataclass(frozen=True, slots=True)
class Meter:
    """A stretch that has begun; one at a time, since the process has one peak."""

    start: float
    peak_before: int  # -1 where the peak was reset

    def read(self) -> Usage:
        """What it took so far."""
        seconds = time.perf_counter() - self.start
        peak_bytes = resident_bytes()  # -1 where it can't be had
        is_ours = peak_bytes > self.peak_before
        return Usage(seconds, peak_bytes if is_ours else None, _gpu_peak())


def begin() -> Meter:
    """Starts a stretch: its peaks, where they can be reset, begin from what is held now."""
    was_reset = _reset_peak()
    torch = _torch_on_gpu()
    if torch is not None:
        torch.cuda.reset_peak_memory_stats()
    return Meter(time.perf_counter(), -1 if was_reset else resident_bytes())


def _reset_peak() -> bool:
    try:
        _CLEAR_REFS.write_text(_RESET_PEAK)
    except OSError:  # not Linux, or a sandbox that forbids it
        return False
    return True


def _gpu_peak() -> int | None:
    torch = _torch_on_gpu()
    if torch is None:
        return None
    return int(torch.cuda.max_memory_allocated())


def _torch_on_gpu() -> ModuleType | None:
    """torch where somebody imported it and uses a GPU through it; this room does without."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return None
    return torch
