"""Two benchmarks: what both timed is compared, what differs between them is named, and nothing passes as something."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from compressor.benchmarking.comparison import compare_benchmarks, require_alike
from compressor.benchmarking.records import OFFLINE, SINGLE, ScenarioTiming
from compressor.errors import GateError

from .made import ENVIRONMENT, OPTIONS, measured, timing


def test_each_subject_is_compared_with_itself_earlier() -> None:
    faster = tuple(
        replace(timed, timing=replace(timed.timing, samples_ms=tuple(ms / 2 for ms in timed.timing.samples_ms)))
        for timed in measured().timings
    )
    changes = compare_benchmarks(measured(), measured(timings=faster))
    assert [(change.subject, change.scenario) for change in changes] == [
        (name, scenario) for scenario in (SINGLE, OFFLINE) for name in ("dense", "shipped", "shipped-int8")
    ]
    for change in changes:
        assert (change.speedup.ratio, change.speedup.low, change.speedup.high) == (2.0, 2.0, 2.0)
        assert change.before_ms == 2 * change.after_ms


def test_only_what_both_timed_on_one_runtime_in_one_scenario_is_compared() -> None:
    before = measured(timings=(ScenarioTiming(SINGLE, timing("dense", 4.0)), ScenarioTiming(OFFLINE, timing("a", 1.0))))
    after = measured(
        timings=(
            ScenarioTiming(SINGLE, timing("dense", 4.0)),
            ScenarioTiming(SINGLE, timing("dense", 4.0, "openvino")),
            ScenarioTiming(SINGLE, timing("a", 1.0)),
        )
    )
    assert [(change.subject, change.runtime) for change in compare_benchmarks(before, after)] == [
        ("dense", "onnxruntime")
    ]
    with pytest.raises(GateError, match="no subject, runtime and scenario in common"):
        compare_benchmarks(replace(before, timings=before.timings[1:]), replace(after, timings=after.timings[1:]))


@pytest.mark.parametrize(
    ("machine", "libraries", "words"),
    [
        ({"cpu": "another", "cores": "2"}, {"onnxruntime": "1.0"}, "cpu was a CPU and is another;"),
        ({"cpu": "a CPU"}, {"onnxruntime": "1.0"}, "cores was 2 and is absent;"),
        ({"cpu": "a CPU", "cores": "2"}, {"onnxruntime": "1.1"}, r"onnxruntime was 1\.0 and is 1\.1;"),
        ({"cpu": "a CPU", "cores": "2"}, {"onnxruntime": "1.0", "openvino": "2"}, "openvino was absent and is 2;"),
        ({"cpu": "a CPU", "cores": "2"}, {"onnxruntime": "1.0"}, "the environment was 0123456789abcdef and is other;"),
    ],
)
def test_another_machine_or_library_is_named(machine: Any, libraries: Any, words: str) -> None:
    moved = replace(ENVIRONMENT, machine=machine, libraries=libraries, fingerprint="other")
    with pytest.raises(GateError, match=words):
        require_alike(measured(), moved, OPTIONS)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"threads": 2}, "threads was 1 and is 2"),
        ({"cores": (0, 3)}, "cores was 0 and is 0,3"),
        ({"offline_batch": 64}, "offline_batch was 8 and is 64"),
        ({"rate_hz": 30.0}, r"rate_hz was 0\.0 and is 30\.0"),
        ({"seconds": 1.0}, r"seconds was 0\.0 and is 1\.0"),
        ({"runs": 9}, "runs was 4 and is 9"),
        ({"repeats": 3}, "repeats was 1 and is 3"),
    ],
)
def test_another_way_of_measuring_is_named(change: dict[str, Any], words: str) -> None:
    with pytest.raises(GateError, match=words):
        require_alike(measured(), ENVIRONMENT, replace(OPTIONS, **change))


def test_all_differences_are_named_at_once() -> None:
    moved = replace(ENVIRONMENT, machine={"cpu": "another", "cores": "4"}, fingerprint="other")
    with pytest.raises(
        GateError, match=r"cpu was .*; cores was 2 and is 4; threads was 1 and is 2; measure both again"
    ):
        require_alike(measured(), moved, replace(OPTIONS, threads=2))


def test_other_runtimes_and_a_busier_moment_are_no_difference() -> None:
    busy = replace(ENVIRONMENT, state={"load_average": "9 9 9"})
    later = measured(environment=busy, options=replace(OPTIONS, on=("onnxruntime",)))
    assert len(compare_benchmarks(measured(), later)) == len(later.timings)
