"""The profiler's trace, made up here: kernels in their order, without the warm-up, under ONNX Runtime's names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from numpy.typing import NDArray

from compressor.device.profiling import _WARM_UP, RUNS, KernelTime, _kernels, profile_kernels


def event(name: str, duration_us: float, category: str = "Node", operation: str = "Conv") -> dict[str, Any]:
    return {"cat": category, "name": name, "dur": duration_us, "args": {"op_name": operation}}


def trace() -> list[dict[str, Any]]:
    """A convolution of 1000 us while warming up and 10 us afterwards, and an addition of 3 us, in every run."""
    events = [event("session_initialization", 9e6, "Session")]
    for run in range(_WARM_UP + RUNS):
        conv_us = 1000.0 if run < _WARM_UP else 10.0
        events += [
            event("model_run", 2000.0, "Session"),
            event("conv_1_fence_before", 7.0),
            event("conv_1_kernel_time", conv_us),
            event("conv_1_fence_after", 7.0),
            event("add_kernel_time", 3.0, operation="Add"),
        ]
    return events


def test_only_kernels_are_kept_each_with_the_runs_behind_the_warm_up() -> None:
    conv, add = _kernels(trace())
    assert (conv.name, conv.operation, conv.us) == ("conv_1", "Conv", (10.0,) * RUNS)
    assert (add.name, add.operation, add.us) == ("add", "Add", (3.0,) * RUNS)


def test_kernels_of_one_name_and_two_operations_are_two() -> None:
    events = [event("x_kernel_time", 1.0, operation=operation) for operation in ("Conv", "Reorder") for _ in range(9)]
    assert [(kernel.operation, len(kernel.us)) for kernel in _kernels(events)] == [
        ("Conv", 9 - _WARM_UP),
        ("Reorder", 9 - _WARM_UP),
    ]


def test_a_kernel_without_an_operation_is_kept() -> None:
    events = [{"cat": "Node", "name": "x_kernel_time", "dur": 1, "args": {}}] * (_WARM_UP + 1)
    assert _kernels(events) == [KernelTime("x", "", (1.0,))]


def test_the_median_is_not_moved_by_one_slow_run() -> None:
    assert KernelTime("x", "Conv", (1.0, 2.0, 900.0)).median_us == pytest.approx(2.0)


def test_a_file_of_several_inputs_is_profiled(pair_file: Path, pair_inputs: tuple[NDArray[Any], ...]) -> None:
    kernels = profile_kernels(pair_file, pair_inputs, threads=1)
    assert {"Gather", "ArgMax"} <= {kernel.operation for kernel in kernels}
    assert {len(kernel.us) for kernel in kernels} == {RUNS}
