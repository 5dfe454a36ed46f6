"""Callables in, raw latency samples out: warmed up by time and until stable, subjects interleaved ABAB.

Every sample is kept and none is dropped as an outlier; statistics are derived from the record. A sample is the
wall-clock from handing over a batch to holding its result. Knows no runtime: a subject is anything callable.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any, TypedDict

import numpy as np
from numpy.typing import NDArray

from ..errors import GateError, InputError
from .environment import Environment, read_environment
from .feeds import Arrays, as_tuple, count, cut, mapped, parted
from .percentiles import describe, estimate

SCHEMA = "compressor.timing/1"
Subject = Callable[[Any], object]  # takes a batch, one array or a tuple of several

_STABLE = 0.03  # two successive windows' medians within 3 %: the spread a quiet machine shows anyway
_WINDOW = 5
_ENOUGH_SHARE = 0.4  # of the time, so that turns of fast networks still span what a machine does now and then


@dataclass(frozen=True, slots=True)
class Schedule:
    """How to measure. Each subject gets `rounds` turns; a turn ends when both its time and its runs are met.

    Two fifths of the time are enough where `enough` runs were taken by then: 20,000 runs of 0.2 ms say nothing that
    8,000 do not. With `limit_s`, runs still missing are given up when a subject's turns have taken that long together.
    Batch 1 gives single-stream latency, a large batch back to back the offline throughput. `rate_hz` starts runs at a
    camera's rate instead (0: back to back); idle clocks then show as they would.
    """

    batch: int = 1
    rounds: int = 5
    seconds: float = 5.0
    runs: int = 64
    enough: int = 0
    limit_s: float = 0.0
    warmup_s: float = 0.5
    warmup_limit_s: float = 10.0
    rate_hz: float = 0.0
    threads: int = 0
    cores: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Timing:
    """Raw samples of one subject; `turns[i]` is the turn sample i belongs to. Times that don't apply are -1."""

    name: str
    runtime: str
    schedule: Schedule
    samples_ms: tuple[float, ...]
    turns: tuple[int, ...]
    warmup_runs: int
    stable: bool
    environment: Environment
    affinity: tuple[int, ...] = ()
    load_ms: float = -1.0
    first_run_ms: float = -1.0
    peak_bytes: int = -1
    details: Mapping[str, str] = field(default_factory=dict)

    @property
    def p50_ms(self) -> float:
        """The plain median of all samples."""
        return float(np.median(self.samples_ms))

    @property
    def images_per_s(self) -> float:
        """Of runs back to back: the time between them, as `rate_hz` leaves it, does not count."""
        return 1e3 * self.schedule.batch * len(self.samples_ms) / sum(self.samples_ms)


@dataclass(frozen=True, slots=True)
class Speedup:
    """How many times faster `fast` is than `slow` by medians, with a bootstrap 95 % interval over turns."""

    slow: str
    fast: str
    ratio: float
    low: float
    high: float


class Statistics(TypedDict):
    """What a report says of a timing; a percentile without standing is the sentence that says so, and None in ms."""

    n: int
    min_ms: float
    mean_ms: float
    p50_ms: float
    p90: str
    p99: str
    p90_ms: float | None
    p99_ms: float | None
    max_ms: float
    coefficient_of_variation: float
    images_per_s: float
    load_ms: float
    first_run_ms: float
    peak_bytes: int
    stable: bool


def time_interleaved(
    subjects: Mapping[str, Subject],
    images: Arrays,
    *,
    schedule: Schedule,
    runtimes: Mapping[str, str] | None = None,
) -> dict[str, Timing]:
    """Times subjects ABAB in this process; `images` [M, ...], or a tuple of all inputs', is a pool of batches in order.

    Loading and cold start are not seen here; `worker.time_files` measures files in processes of their own.
    """
    batches = make_batches(images, schedule.batch)
    environment = read_environment()
    warmups = {name: warm_up(subject, batches, schedule) for name, subject in subjects.items()}
    turn_takers = {name: partial(take_turn, subject, batches, schedule) for name, subject in subjects.items()}
    samples = alternate(turn_takers, schedule.rounds)

    timings = {}
    for name in subjects:
        warmup_runs, stable = warmups[name]
        timings[name] = Timing(
            name=name,
            runtime=(runtimes or {}).get(name, "python"),
            schedule=schedule,
            samples_ms=tuple(samples[name].ms),
            turns=tuple(samples[name].turns),
            warmup_runs=warmup_runs,
            stable=stable,
            environment=environment,
        )
    return timings


@dataclass(slots=True)
class Samples:
    """What one subject's turns took, and the round that each sample was taken in."""

    ms: list[float] = field(default_factory=list)
    turns: list[int] = field(default_factory=list)


def alternate(turn_takers: Mapping[str, Callable[[], list[float]]], rounds: int) -> dict[str, Samples]:
    """Every subject's samples of `rounds` turns each, ABAB; what takes a turn returns its samples in ms."""
    samples = {name: Samples() for name in turn_takers}
    for turn in range(rounds):
        for name, take in turn_takers.items():
            turn_ms = take()
            samples[name].ms += turn_ms
            samples[name].turns += [turn] * len(turn_ms)
    return samples


def make_batches(images: Arrays, batch: int) -> list[Arrays]:
    """Batches [batch, ...] that walk through the pool; offline and single-stream runs see them in the same order.

    The last one is filled up from the pool's start: of 5 images in twos they are 0 1, 2 3, 4 0. Raises InputError for
    none, or where inputs have them unequally many.
    """
    _require_samples(images)
    images = mapped(np.ascontiguousarray, images)
    total = count(images)
    whole = total // batch * batch
    batches = parted(cut(images, 0, whole), batch)  # views: a large pool is not copied
    if whole < total:
        rows = np.arange(whole, whole + batch) % total
        batches.append(mapped(lambda array: array[rows], images))
    return batches


def _require_samples(images: Arrays) -> None:
    arrays = as_tuple(images)
    counts = {array.shape[:1] for array in arrays}
    if len(counts) != 1 or counts <= {(), (0,)}:
        shapes = ", ".join(str(list(array.shape)) for array in arrays)
        raise InputError(f"timing needs images or other samples on the first axis, as many of each input; got {shapes}")


def warm_up(subject: Subject, batches: Sequence[Arrays], schedule: Schedule) -> tuple[int, bool]:
    """Runs until the time has passed and two windows agree; returns the runs and whether they did agree."""
    samples_ms: list[float] = []
    start = time.perf_counter()
    while True:
        samples_ms.append(_run_once_ms(subject, batches[len(samples_ms) % len(batches)]))
        elapsed_s = time.perf_counter() - start
        if elapsed_s >= schedule.warmup_s and _is_stable(samples_ms):
            return len(samples_ms), True
        if elapsed_s >= max(schedule.warmup_limit_s, schedule.warmup_s):
            return len(samples_ms), False


def take_turn(subject: Subject, batches: Sequence[Arrays], schedule: Schedule) -> list[float]:
    """One turn's samples in ms, each a run on its own batch."""
    samples_ms: list[float] = []
    seconds = schedule.seconds / schedule.rounds
    limit_s = (schedule.limit_s or math.inf) / schedule.rounds
    runs = _shared_out(schedule.runs, schedule.rounds)
    enough = max(runs, _shared_out(schedule.enough, schedule.rounds)) if schedule.enough else math.inf

    start, elapsed_s = time.perf_counter(), 0.0
    while elapsed_s < seconds or (len(samples_ms) < runs and (not samples_ms or elapsed_s < limit_s)):
        if len(samples_ms) >= enough and elapsed_s >= _ENOUGH_SHARE * seconds:
            break
        if schedule.rate_hz:
            _sleep_until(start + len(samples_ms) / schedule.rate_hz)
        samples_ms.append(_run_once_ms(subject, batches[len(samples_ms) % len(batches)]))
        elapsed_s = time.perf_counter() - start
    return samples_ms


def _shared_out(runs: int, rounds: int) -> int:
    """Runs of one turn, rounded up, so that all turns together have them: 64 over 5 turns are 13 each."""
    return -(-runs // rounds)


def _run_once_ms(subject: Subject, batch: Arrays) -> float:
    start_ns = time.perf_counter_ns()
    subject(batch)
    return (time.perf_counter_ns() - start_ns) / 1e6


def _is_stable(samples_ms: Sequence[float]) -> bool:
    if len(samples_ms) < 2 * _WINDOW:
        return False
    before = float(np.median(samples_ms[-2 * _WINDOW : -_WINDOW]))
    now = float(np.median(samples_ms[-_WINDOW:]))
    return abs(now - before) <= _STABLE * before


def _sleep_until(moment: float) -> None:
    left_s = moment - time.perf_counter()
    if left_s > 0:
        time.sleep(left_s)


def summarise(timing: Timing) -> Statistics:
    """The statistics of a timing's samples."""
    samples = np.asarray(timing.samples_ms)
    spread = float(samples.std() / samples.mean())
    return {
        "n": len(samples),
        "min_ms": float(samples.min()),
        "mean_ms": float(samples.mean()),
        "p50_ms": timing.p50_ms,
        "p90": describe(timing.samples_ms, 0.9),
        "p99": describe(timing.samples_ms, 0.99),
        "p90_ms": estimate(timing.samples_ms, 0.9),
        "p99_ms": estimate(timing.samples_ms, 0.99),
        "max_ms": float(samples.max()),
        "coefficient_of_variation": spread,
        "images_per_s": timing.images_per_s,
        "load_ms": timing.load_ms,
        "first_run_ms": timing.first_run_ms,
        "peak_bytes": timing.peak_bytes,
        "stable": timing.stable,
    }


def compare(slow: Timing, fast: Timing, *, draws: int = 500, seed: int = 0) -> Speedup:
    """Ratio of medians slow / fast; whole turns are redrawn, since samples within a turn hang together.

    Raises GateError when the two were not measured alike: on another machine, library or schedule.
    """
    if slow.environment.fingerprint != fast.environment.fingerprint:
        raise GateError(
            f"{slow.name!r} and {fast.name!r} were measured in different environments "
            f"({slow.environment.fingerprint}, {fast.environment.fingerprint}); measure both again in one run"
        )
    if (slow.schedule, slow.runtime) != (fast.schedule, fast.runtime):
        raise GateError(f"{slow.name!r} and {fast.name!r} were measured by different schedules or runtimes")

    generator = np.random.default_rng(seed)
    slow_medians = _redrawn_medians(slow, draws, generator)
    fast_medians = _redrawn_medians(fast, draws, generator)
    low, high = np.quantile(slow_medians / fast_medians, (0.025, 0.975))
    return Speedup(slow.name, fast.name, slow.p50_ms / fast.p50_ms, float(low), float(high))


def _redrawn_medians(timing: Timing, draws: int, generator: np.random.Generator) -> NDArray[np.float64]:
    """[draws] medians, each of as many turns as there are, drawn with replacement."""
    samples, turns = np.asarray(timing.samples_ms), np.asarray(timing.turns)
    samples_of_turns = [samples[turns == turn] for turn in np.unique(turns)]
    chosen_turns = generator.integers(len(samples_of_turns), size=(draws, len(samples_of_turns)))

    medians = []
    for chosen in chosen_turns:
        redrawn = np.concatenate([samples_of_turns[i] for i in chosen])
        medians.append(np.median(redrawn))
    return np.array(medians)


def to_json(timing: Timing) -> dict[str, object]:
    """The record as plain JSON values, its schema first; tuples stay tuples until they are written."""
    return {"schema": SCHEMA, **asdict(timing)}


def from_json(content: Mapping[str, Any]) -> Timing:
    """The inverse of `to_json`; raises InputError for another schema."""
    if content.get("schema") != SCHEMA:
        raise InputError(f"timing has schema {content.get('schema')!r}, expected {SCHEMA!r}")
    fields = dict(content)
    del fields["schema"]
    for key in ("samples_ms", "turns", "affinity"):
        fields[key] = tuple(fields[key])
    fields["schedule"] = schedule_from_json(fields["schedule"])
    fields["environment"] = Environment(**fields["environment"])
    return Timing(**fields)


def schedule_from_json(content: Mapping[str, Any]) -> Schedule:
    """The inverse of `asdict`; JSON knows lists only, and a schedule is compared with others."""
    return Schedule(**{**content, "cores": tuple(content["cores"])})
