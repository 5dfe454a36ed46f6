"""An ONNX file in, the time of each of its kernels out, as ONNX Runtime's own profiler takes it.

Kernels carry the names ONNX Runtime gives them after its fusions; which layer one belongs to is export's to say.
Profiling costs time of its own: shares are of use, sums are not the latency.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict

import numpy as np

from ..errors import ModelError, first_line
from .feeds import Arrays, as_tuple
from .onnxruntime import CPU, by_name, ports, session_options
from .timing import make_batches

if TYPE_CHECKING:
    from onnxruntime import InferenceSession

RUNS = 30
_WARM_UP = 5


@dataclass(frozen=True, slots=True)
class KernelTime:
    """One kernel of one run; `us` has an entry per run, in microseconds."""

    name: str
    operation: str
    us: tuple[float, ...]

    @property
    def median_us(self) -> float:
        """Over the runs, in microseconds."""
        return float(np.median(self.us))


class TraceEvent(TypedDict, total=False):
    """What is read of an event of the profiler's trace; `cat` says of what, `dur` is in microseconds."""

    cat: str
    name: str
    dur: float
    args: dict[str, str]


def profile_kernels(path: Path | str, images: Arrays, *, batch: int = 1, threads: int = 0) -> list[KernelTime]:
    """Every kernel of `path` on ONNX Runtime's CPU provider, over `RUNS` runs after a warm-up, in their order.

    `images` [M, ...], or a tuple of all inputs', is a pool batches are drawn from. Raises ModelError when the file
    can't be loaded.
    """
    batches = make_batches(images, batch)
    with tempfile.TemporaryDirectory(prefix="compressor-") as folder:
        session = _session(Path(path), Path(folder) / "profile", threads)
        inputs = ports(session.get_inputs(), Path(path))
        for run in range(_WARM_UP + RUNS):
            session.run(None, by_name(inputs, as_tuple(batches[run % len(batches)])))
        events = json.loads(Path(session.end_profiling()).read_text())
    return _kernels(events)


def _session(path: Path, prefix: Path, threads: int) -> InferenceSession:
    import onnxruntime

    options = session_options(threads)
    options.enable_profiling = True
    options.profile_file_prefix = str(prefix)
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=[CPU])
    except Exception as error:
        raise ModelError(f"onnxruntime can't load {path}: {first_line(error, 300)}") from error


def _kernels(events: Sequence[TraceEvent]) -> list[KernelTime]:
    """The profiler's trace: one event `<kernel>_kernel_time` with a duration per kernel and run."""
    ending = "_kernel_time"
    times_us: dict[tuple[str, str], list[float]] = {}
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith(ending):
            name, operation = event["name"].removesuffix(ending), str(event["args"].get("op_name", ""))
            times_us.setdefault((name, operation), []).append(float(event["dur"]))
    return [KernelTime(name, operation, tuple(us[_WARM_UP:])) for (name, operation), us in times_us.items()]
