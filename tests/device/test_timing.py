"""Timing: percentiles against exact sums, schedules kept, turns interleaved, records to JSON and back."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from math import comb
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from compressor.device import timing
from compressor.device.environment import pin, read_environment, resident_bytes
from compressor.device.percentiles import allowed_overruns, describe, estimate, least_samples
from compressor.device.timing import (
    Schedule,
    Timing,
    compare,
    from_json,
    make_batches,
    summarise,
    time_interleaved,
    to_json,
)
from compressor.device.worker import time_files
from compressor.errors import EngineError, GateError, InputError, ModelError

QUICK = Schedule(rounds=3, seconds=0.0, runs=6, warmup_s=0.0, warmup_limit_s=0.2, threads=1)


def exact_overruns(n: int, percentile: Fraction) -> int:
    """The rule in rational arithmetic: the largest t with P(X <= t) <= 1 / 100."""
    tail, q = Fraction(0), 1 - percentile
    for t in range(n):
        tail += comb(n, t) * q**t * percentile ** (n - t)
        if tail > Fraction(1, 100):
            return max(t - 1, 0)
    return n - 1


@pytest.mark.parametrize("n", [10, 11, 63, 64, 129, 130, 300])
@pytest.mark.parametrize("percent", [50, 90, 95])
def test_overruns_are_those_of_exact_arithmetic(n: int, percent: int) -> None:
    assert allowed_overruns(n, percent / 100) == exact_overruns(n, Fraction(percent, 100))


def test_least_samples_are_loadgens() -> None:
    assert [least_samples(p) for p in (0.5, 0.9, 0.95, 0.99, 0.999)] == [11, 64, 130, 662, 6636]


def test_a_percentile_without_standing_is_no_number() -> None:
    samples = [float(i) for i in range(661)]
    assert estimate(samples, 0.99) is None
    assert describe(samples, 0.99) == "n too small (661 of 662)"
    assert estimate([*samples, 661.0], 0.99) == 661.0  # t = 1: nothing may be dropped


def test_a_percentile_drops_all_but_one_allowed_overrun() -> None:
    samples = [float(i) for i in np.random.default_rng(0).permutation(1000)]
    t = allowed_overruns(1000, 0.9)
    assert t > 1
    assert estimate(samples, 0.9) == 1000.0 - t


@pytest.fixture
def pool() -> NDArray[np.float32]:
    return np.arange(5, dtype=np.float32)[:, None, None, None] * np.ones((5, 1, 2, 2), np.float32)


def test_subjects_take_turns(pool: NDArray[np.float32]) -> None:
    calls: list[str] = []
    subjects: dict[str, Callable[[Any], Any]] = {name: lambda x, name=name: calls.append(name) for name in "ab"}
    timings = time_interleaved(subjects, pool, schedule=QUICK)
    order = "".join(calls[sum(t.warmup_runs for t in timings.values()) :])
    assert order == "aabb" * 3
    assert timings["a"].turns == (0, 0, 1, 1, 2, 2)
    assert len(timings["b"].samples_ms) == 6


def test_batches_walk_through_the_pool(pool: NDArray[np.float32]) -> None:
    firsts = [batch[:, 0, 0, 0].tolist() for batch in make_batches(pool, 2)]
    assert firsts == [[0, 1], [2, 3], [4, 0]]
    with pytest.raises(InputError, match="images"):
        make_batches(np.zeros((0, 1, 2, 2), np.float32), 1)


def test_batches_of_several_inputs_go_together() -> None:
    images, tokens = np.arange(5.0)[:, None], np.arange(5)
    batches = make_batches((images, tokens), 2)
    assert [batch[0][:, 0].tolist() for batch in batches] == [[0, 1], [2, 3], [4, 0]]
    assert [batch[1].tolist() for batch in batches] == [[0, 1], [2, 3], [4, 0]]
    for wrong in ((images, tokens[:4]), (images, np.float32(1)), (), (images[:0], tokens[:0])):
        with pytest.raises(InputError, match="as many of each input"):
            make_batches(wrong, 2)


class Clock:
    """Stands in for the time module: time passes only where a subject or a sleep says so."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def perf_counter(self) -> float:
        return self.now_s

    def perf_counter_ns(self) -> int:
        return round(self.now_s * 1e9)

    def sleep(self, seconds: float) -> None:
        self.now_s += seconds

    def taking(self, *durations_s: float) -> Callable[[Any], None]:
        """A subject whose runs take these times, the last one for ever after."""
        left = list(durations_s)
        return lambda batch: self.sleep(left.pop(0) if len(left) > 1 else left[0])


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(timing, "time", made)
    return made


def test_a_sample_is_the_time_to_the_result_and_none_is_dropped(clock: Clock, pool: NDArray[np.float32]) -> None:
    subject = clock.taking(*[0.001] * 50, 0.5, 0.002)
    taken = timing.take_turn(subject, make_batches(pool, 1), replace(QUICK, runs=156))
    assert taken == pytest.approx([1.0] * 50 + [500.0, 2.0])


def test_a_turn_lasts_until_both_time_and_runs_are_met(clock: Clock, pool: NDArray[np.float32]) -> None:
    batches = make_batches(pool, 1)
    by_time = timing.take_turn(clock.taking(0.125), batches, Schedule(rounds=2, seconds=2.0, runs=2))
    by_runs = timing.take_turn(clock.taking(0.125), batches, Schedule(rounds=2, seconds=0.0, runs=41))
    assert len(by_time) == 8
    assert len(by_runs) == 21


def test_a_fast_subject_ends_early_once_it_has_enough_runs(clock: Clock, pool: NDArray[np.float32]) -> None:
    batches, schedule = make_batches(pool, 1), Schedule(rounds=2, seconds=10.0, runs=2, enough=30)
    assert len(timing.take_turn(clock.taking(0.0625), batches, schedule)) == 32  # 2 s of the turn's 5 s
    assert len(timing.take_turn(clock.taking(0.25), batches, schedule)) == 15  # 8 runs in 2 s, so on to 30 / 2
    assert len(timing.take_turn(clock.taking(0.5), batches, schedule)) == 10  # never enough: all the time


def test_runs_of_a_slow_subject_are_given_up_at_the_limit(clock: Clock, pool: NDArray[np.float32]) -> None:
    batches, schedule = make_batches(pool, 1), Schedule(rounds=2, seconds=1.0, runs=64, limit_s=8.0)
    assert len(timing.take_turn(clock.taking(1.0), batches, schedule)) == 4
    assert len(timing.take_turn(clock.taking(9.0), batches, schedule)) == 1
    assert len(timing.take_turn(clock.taking(0.0625), batches, schedule)) == 32


def test_a_camera_rate_spaces_the_runs(clock: Clock, pool: NDArray[np.float32]) -> None:
    starts: list[float] = []

    def subject(batch: object) -> None:
        starts.append(clock.now_s - 100.0)
        clock.sleep(0.0625)

    taken = timing.take_turn(subject, make_batches(pool, 1), replace(QUICK, rounds=1, runs=4, rate_hz=8.0))
    assert starts == [0.0, 0.125, 0.25, 0.375]
    assert taken == pytest.approx([62.5] * 4)  # the waiting is nobody's latency


def test_warm_up_waits_until_it_is_stable(clock: Clock, pool: NDArray[np.float32]) -> None:
    subject = clock.taking(*[0.02] * 7, 0.004)
    runs, stable = timing.warm_up(subject, make_batches(pool, 1), replace(QUICK, warmup_limit_s=5.0))
    assert stable
    assert runs == 15  # two windows of five whose medians agree: both behind the seven slow ones but for two


def test_warm_up_lasts_its_time(clock: Clock, pool: NDArray[np.float32]) -> None:
    runs, stable = timing.warm_up(clock.taking(0.125), make_batches(pool, 1), replace(QUICK, warmup_s=4.0))
    assert stable
    assert runs == 32


def test_warm_up_ends_and_says_so_when_it_never_is(clock: Clock, pool: NDArray[np.float32]) -> None:
    subject = clock.taking(*[0.001 * 1.3**i for i in range(99)])
    _, stable = timing.warm_up(subject, make_batches(pool, 1), QUICK)
    assert not stable


def record(name: str, samples: list[float], turns: list[int], **changes: Any) -> Timing:
    made = Timing(name, "onnxruntime", QUICK, tuple(samples), tuple(turns), 3, True, read_environment())
    return replace(made, **changes)


def test_a_record_survives_json() -> None:
    made = record("a", [1.0, 2.5], [0, 1], affinity=(0, 1), load_ms=3.0, details={"providers": "CPU"})
    assert from_json(json.loads(json.dumps(to_json(made), allow_nan=False))) == made
    with pytest.raises(InputError, match="schema"):
        from_json({"schema": "other"})


def test_the_speedup_is_the_ratio_of_medians_with_an_interval_from_turns() -> None:
    slow = record("slow", [4.0, 4.0, 4.2, 4.2, 3.8, 3.8], [0, 0, 1, 1, 2, 2])
    fast = record("fast", [2.0, 2.0, 2.0, 2.0, 2.0, 90.0], [0, 0, 1, 1, 2, 2])
    found = compare(slow, fast)
    assert found.ratio == pytest.approx(2.0)
    assert found.low < 2.0 <= found.high  # the spoilt turn widens the interval, and no median moves


def test_unlike_measurements_are_not_compared() -> None:
    one = record("one", [1.0], [0])
    elsewhere = replace(one, environment=replace(one.environment, fingerprint="elsewhere"))
    with pytest.raises(GateError, match="different environments"):
        compare(one, elsewhere)
    with pytest.raises(GateError, match="schedules or runtimes"):
        compare(one, replace(one, schedule=replace(QUICK, threads=2)))


def test_the_fingerprint_ignores_what_may_change() -> None:
    first = read_environment()
    pin(first_core := (min(int(c) for c in first.state["affinity"].split(",")),))
    try:
        second = read_environment()
    finally:
        pin(tuple(int(c) for c in first.state["affinity"].split(",")))
    assert second.state["affinity"] == str(first_core[0])
    assert second.fingerprint == first.fingerprint


def test_files_are_timed_in_processes_of_their_own(model_file: Path, images: NDArray[np.float32]) -> None:
    core = int(read_environment().state["affinity"].split(",")[0])
    schedule = replace(QUICK, batch=2, cores=(core,))
    found = time_files({"dense": model_file, "pruned": model_file}, images, schedule=schedule)
    for made in found.values():
        assert len(made.samples_ms) == len(made.turns) == 6
        assert made.affinity == (core,)
        assert min(made.load_ms, made.first_run_ms, *made.samples_ms) > 0
        assert made.peak_bytes > 10_000_000
        assert summarise(made)["p99"] == "n too small (6 of 662)"
    assert compare(found["dense"], found["pruned"]).ratio > 0
    assert len(read_environment().state["affinity"].split(",")) >= 1


def test_a_file_of_several_inputs_is_timed(pair_file: Path, pair_inputs: tuple[NDArray[Any], ...]) -> None:
    found = time_files({"pair": pair_file}, pair_inputs, schedule=replace(QUICK, batch=2))["pair"]
    assert len(found.samples_ms) == 6
    assert min(found.samples_ms) > 0


def test_a_workers_error_is_its_own(tmp_path: Path, images: NDArray[np.float32]) -> None:
    with pytest.raises(ModelError, match="no model file"):
        time_files({"gone": tmp_path / "gone.onnx"}, images, schedule=QUICK)


def test_a_worker_that_dies_is_reported(tmp_path: Path) -> None:
    from compressor.device import child

    with (
        pytest.raises(EngineError, match=r"the test ended with code 1.*No module named"),
        child.start("compressor.device.no_such_module", name="the test") as ask,
    ):
        ask({"do": "open"})


def test_a_worker_that_hangs_is_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from compressor.device import child

    (tmp_path / "sleeper.py").write_text("import time\ntime.sleep(60)\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    start = time.monotonic()
    with (
        pytest.raises(EngineError, match="took longer than 1 s"),
        child.start("sleeper", name="the test", timeout_s=1.0) as ask,
    ):
        ask({"do": "open"})
    assert time.monotonic() - start < 20


def test_batches_walk_through_the_pool_without_copying_it() -> None:
    images = np.arange(7 * 3, dtype=np.float32).reshape(7, 3, 1, 1)
    batches = make_batches(images, 2)
    assert [b[:, 0, 0, 0].tolist() for b in batches] == [[0, 3], [6, 9], [12, 15], [18, 0]]
    assert all(np.shares_memory(b, images) for b in batches[:3])
    assert [len(b) for b in make_batches(images, 10)] == [10]


def test_a_childs_peak_memory_is_its_own() -> None:
    """A process inherits its parent's peak from the system; a runtime's memory is not that of what started it."""
    ballast = np.ones(3 * 10**8 // 8)
    code = "from compressor.device.environment import resident_bytes; print(resident_bytes())"
    found = int(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
    assert found == -1 or 10**6 < found < ballast.nbytes < resident_bytes()
