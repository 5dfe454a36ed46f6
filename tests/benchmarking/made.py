"""A benchmark's records of known numbers, for tests that measure nothing."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from compressor.benchmarking.records import (
    OFFLINE,
    SINGLE,
    ColdStart,
    Measured,
    Options,
    ScenarioTiming,
    SubjectRow,
)
from compressor.device.environment import Environment
from compressor.device.timing import Schedule, Timing
from compressor.records import Accuracy

ENVIRONMENT = Environment(
    machine={"cpu": "a CPU", "cores": "2"},
    libraries={"onnxruntime": "1.0"},
    state={"load_average": "0.10 0.20 0.30"},
    fingerprint="0123456789abcdef",
)
SCHEDULE = Schedule(rounds=2, seconds=0.0, runs=4, threads=1, cores=(0,))
OPTIONS = Options(seconds=0.0, runs=4, offline_batch=8, threads=1, cores=(0,), repeats=1)


def timing(name: str, ms: float, runtime: str = "onnxruntime", **changes: Any) -> Timing:
    """Four samples in two turns, all alike."""
    made = Timing(name, runtime, SCHEDULE, (ms,) * 4, (0, 0, 1, 1), 3, True, ENVIRONMENT, (0,), 5.0, 2.0, 10**7)
    return replace(made, **changes)


def subject(name: str, right: int | None, **changes: Any) -> SubjectRow:
    """Of 100 images, `right` of them; not counted where that is None."""
    place, _, own_name = name.rpartition("/")
    variant, _, precision = own_name.partition("-")
    accuracy = None if right is None else Accuracy(right, 100, 99)
    made = SubjectRow(name, place or "run", variant, precision or "fp32", f"{own_name}.onnx", 1000, accuracy=accuracy)
    return replace(made, **changes)


def measured(**changes: Any) -> Measured:
    """Dense at 4 ms and 90 %, shipped at 2 ms and 88 %, its int8 file at 1 ms and 80 %; batches at eight times that."""
    single_ms = {"dense": 4.0, "shipped": 2.0, "shipped-int8": 1.0}
    batched = replace(SCHEDULE, batch=8)
    timings = [ScenarioTiming(SINGLE, timing(name, ms)) for name, ms in single_ms.items()]
    timings += [ScenarioTiming(OFFLINE, timing(name, 8 * ms, schedule=batched)) for name, ms in single_ms.items()]
    made = Measured(
        title="run",
        environment=ENVIRONMENT,
        options=OPTIONS,
        subjects=(
            subject("dense", 90, macs=4000, parameters=300),
            subject("shipped", 88, macs=2000, parameters=150, budget="macs 0.5"),
            subject("shipped-int8", 80),
        ),
        timings=tuple(timings),
        cold=(ColdStart("dense", "onnxruntime", (5.0, 7.0, 6.0), (2.0, 2.0, 9.0), (10**7, 3 * 10**7, 2 * 10**7)),),
        not_run=(),
        pool_bytes=4_000_000,
        cache_bytes=1_000_000,
        seconds={"single-stream, onnxruntime": 1.5, "offline, onnxruntime": 2.0},
    )
    return replace(made, **changes)
