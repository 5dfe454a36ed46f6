"""Callables in, raw latency samples out: warmed up by time and until stable, subjects interleaved ABAB.

Every sample is kept and none is dropped as an outlier; statistics are derived from the record. A sample is the
wall-clock from handing over a batch to holding its result. Knows no runtime: a subject is anything callable.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import GateError, InputError
from .environment import Environment, read_environment
from .percentiles import describe, estimate

SCHEMA = "compressor.timing/1"
Images = NDArray[np.float32]
Subject = Callable[[Images], Any]

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
        return float(np.median(self.samples_ms))

    @property
    def images_per_s(self) -> float:
        return 1e3 * self.schedule.batch * len(self.samples_ms) / sum(self.samples_ms)


@dataclass(frozen=True, slots=True)
class Speedup:
    """How many times faster `fast` is than `slow` by medians, with a bootstrap 95 % interval over turns."""

    slow: str
    fast: str
    ratio: float
    low: float
    high: float


def time_interleaved(
    subjects: Mapping[str, Subject],
    images: Images,
    *,
    schedule: Schedule,
    runtimes: Mapping[str, str] | None = None,
) -> dict[str, Timing]:
    """Times subjects ABAB in this process; `images` [M, C, H, W] is a pool batches are drawn from in order.

    Loading and cold start are not seen here; `worker.time_files` measures files in processes of their own.
    """
    batches = make_batches(images, schedule.batch)
    environment = read_environment()
    warm = {name: warm_up(subject, batches, schedule) for name, subject in subjects.items()}
    taken: dict[str, list[tuple[int, float]]] = {name: [] for name in subjects}
    for turn in range(schedule.rounds):
        for name, subject in subjects.items():
            samples = take_turn(subject, batches, schedule)
            taken[name] += [(turn, sample) for sample in samples]
    return {
        name: Timing(
            name=name,
            runtime=(runtimes or {}).get(name, "python"),
            schedule=schedule,
            samples_ms=tuple(sample for _, sample in taken[name]),
            turns=tuple(turn for turn, _ in taken[name]),
            warmup_runs=warm[name][0],
            stable=warm[name][1],
            environment=environment,
        )
        for name in subjects
    }


def make_batches(images: Images, batch: int) -> list[Images]:
    """Batches that walk through the pool; offline and single-stream runs see the same ones in the same order."""
    if images.ndim != 4 or len(images) == 0:
        raise InputError(f"timing needs images [N, C, H, W], got shape {list(images.shape)}")
    images = np.ascontiguousarray(images)
    whole = len(images) // batch * batch  # views: a pool larger than the caches is not copied
    batches = [images[i : i + batch] for i in range(0, whole, batch)]
    if whole < len(images):
        batches.append(images[np.arange(whole, whole + batch) % len(images)])
    return batches


def warm_up(subject: Subject, batches: Sequence[Images], schedule: Schedule) -> tuple[int, bool]:
    """Runs until the time has passed and two windows agree; returns the runs and whether they did agree."""
    samples: list[float] = []
    start = time.perf_counter()
    while True:
        samples.append(_run_once(subject, batches[len(samples) % len(batches)]))
        elapsed = time.perf_counter() - start
        if elapsed >= schedule.warmup_s and _is_stable(samples):
            return len(samples), True
        if elapsed >= max(schedule.warmup_limit_s, schedule.warmup_s):
            return len(samples), False


def take_turn(subject: Subject, batches: Sequence[Images], schedule: Schedule) -> list[float]:
    """One turn's samples in ms, each a run on its own batch."""
    samples: list[float] = []
    seconds, limit_s = schedule.seconds / schedule.rounds, (schedule.limit_s or math.inf) / schedule.rounds
    runs = -(-schedule.runs // schedule.rounds)
    enough = max(runs, -(-schedule.enough // schedule.rounds)) if schedule.enough else math.inf
    start, elapsed = time.perf_counter(), 0.0
    while elapsed < seconds or (len(samples) < runs and (not samples or elapsed < limit_s)):
        if len(samples) >= enough and elapsed >= _ENOUGH_SHARE * seconds:
            break
        if schedule.rate_hz:
            _sleep_until(start + len(samples) / schedule.rate_hz)
        samples.append(_run_once(subject, batches[len(samples) % len(batches)]))
        elapsed = time.perf_counter() - start
    return samples


def _run_once(subject: Subject, batch: Images) -> float:
    start = time.perf_counter_ns()
    subject(batch)
    return (time.perf_counter_ns() - start) / 1e6


def _is_stable(samples: Sequence[float]) -> bool:
    if len(samples) < 2 * _WINDOW:
        return False
    before = float(np.median(samples[-2 * _WINDOW : -_WINDOW]))
    return abs(float(np.median(samples[-_WINDOW:])) - before) <= _STABLE * before


def _sleep_until(moment: float) -> None:
    left = moment - time.perf_counter()
    if left > 0:
        time.sleep(left)


def summarise(timing: Timing) -> dict[str, Any]:
    """Statistics for a report; a percentile without standing is the sentence that says so."""
    samples = np.asarray(timing.samples_ms)
    spread = float(samples.std() / samples.mean())
    return {
        "n": len(samples),
        "min_ms": float(samples.min()),
        "mean_ms": float(samples.mean()),
        "p50_ms": timing.p50_ms,
        **{f"p{p}": describe(timing.samples_ms, p / 100) for p in (90, 99)},
        **{f"p{p}_ms": estimate(timing.samples_ms, p / 100) for p in (90, 99)},
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
    if slow.schedule != fast.schedule or slow.runtime != fast.runtime:
        raise GateError(f"{slow.name!r} and {fast.name!r} were measured by different schedules or runtimes")
    generator = np.random.default_rng(seed)
    redrawn = [_redrawn_medians(timing, draws, generator) for timing in (slow, fast)]
    low, high = np.quantile(redrawn[0] / redrawn[1], (0.025, 0.975))
    return Speedup(slow.name, fast.name, slow.p50_ms / fast.p50_ms, float(low), float(high))


def _redrawn_medians(timing: Timing, draws: int, generator: np.random.Generator) -> NDArray[np.float64]:
    samples, turns = np.asarray(timing.samples_ms), np.asarray(timing.turns)
    parts = [samples[turns == turn] for turn in np.unique(turns)]
    chosen = generator.integers(len(parts), size=(draws, len(parts)))
    return np.array([np.median(np.concatenate([parts[i] for i in draw])) for draw in chosen])


def to_json(timing: Timing) -> dict[str, Any]:
    return {"schema": SCHEMA, **asdict(timing)}


def from_json(content: Mapping[str, Any]) -> Timing:
    """The inverse of `to_json`; raises InputError for another schema."""
    if content.get("schema") != SCHEMA:
        raise InputError(f"timing has schema {content.get('schema')!r}, expected {SCHEMA!r}")
    fields = {key: value for key, value in content.items() if key != "schema"}
    schedule = dict(fields.pop("schedule"))
    schedule["cores"] = tuple(schedule["cores"])
    tuples: dict[str, Any] = {key: tuple(fields.pop(key)) for key in ("samples_ms", "turns", "affinity")}
    environment = Environment(**fields.pop("environment"))
    return Timing(**fields, **tuples, schedule=Schedule(**schedule), environment=environment)
