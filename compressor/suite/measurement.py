"""Places in, `Measured` out: accuracy, cold starts and latency of every file and network, dense and shipped in turns.

Every subject has processes of its own, pinned; samples are drawn from a pool larger than the caches. What was
measured before an interruption is kept under `parts/` and taken from there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..delivery.gates import accuracy_of
from ..delivery.networks import WAYS, unavailable
from ..device.environment import affinity, cache_bytes, read_environment
from ..device.runtimes import RUNTIMES, available
from ..device.timing import Schedule, Timing, from_json, to_json
from ..device.worker import time_files
from ..errors import InputError, did_you_mean
from ..files import file_sha256, read_json, write_json
from ..records import Accuracy
from ..stages import Notify, Stages
from .network_worker import MODULE, VARIANTS
from .places import Place
from .records import CAMERA, OFFLINE, SINGLE, ColdStart, Measured, Options, ScenarioTiming, SubjectRow, cold_start

ROUNDS = 10
_WARM_UP_LIMIT_S = 2.0  # a machine that never settles must not cost minutes; that it did not is said
_POOL_LIMIT_BYTES = 2**28
_OFFLINE_RUNS = 24  # throughput is a mean; a percentile of it is not asked for
_PORTABLE = tuple(name for name in RUNTIMES if not name.startswith("tensorrt"))


@dataclass(frozen=True, slots=True)
class _Bench:
    """What all measurements of one benchmark share."""

    places: tuple[Place, ...]
    options: Options
    stages: Stages
    pool: NDArray[np.float32]


def measure(places: Sequence[Place], options: Options, out: Path, notify: Notify) -> Measured:
    """Measures everything that can be here; the rest is in `not_run` with its reason. `out` holds the parts."""
    bench = _Bench(tuple(places), options, Stages(out / "parts", notify), pool_of(places[0].images))
    wanted = options.on or (*_PORTABLE, *WAYS)
    reasons = {name: _reason(name) for name in wanted}
    here = [name for name, reason in reasons.items() if not reason]
    not_run = [f"{name}: {reason}" for name, reason in reasons.items() if reason]
    not_run += [line for place in places for line in place.lacks]
    subjects = [row for place in places for row in _subjects(bench, place)]
    cold, timings = [], []
    for runtime in here:
        files, module = _files(bench, runtime)
        if files:
            taken = list(_scenarios(bench, runtime, files, module))
            timings += taken
            # a network takes seconds to import and to compile: its own timing's process is one cold start
            cold += _cold_of(taken) if runtime in WAYS else _cold(bench, runtime, files)
    return Measured(
        title=" and ".join(place.label for place in places),
        environment=read_environment(),
        options=options,
        subjects=tuple(subjects),
        timings=tuple(timings),
        cold=tuple(cold),
        not_run=tuple(not_run),
        pool_bytes=bench.pool.nbytes,
        cache_bytes=cache_bytes(),
        seconds=dict(bench.stages.seconds),
    )


def pool_of(images: NDArray[np.float32]) -> NDArray[np.float32]:
    """Twice the largest cache of images in an order without a pattern, each at an address of its own."""
    wanted = min(_POOL_LIMIT_BYTES, 2 * (cache_bytes() or 2**25))
    count = max(len(images), -(-wanted // images[0].nbytes))
    pool: NDArray[np.float32] = images[np.random.default_rng(0).integers(len(images), size=count)]
    return pool


def resolved(options: Options) -> Options:
    """Cores and threads as they will be: all this process may use unless told otherwise."""
    cores = options.cores or affinity()
    missing = set(options.cores) - set(affinity())
    if missing and affinity():
        mine = ", ".join(map(str, affinity()))
        raise InputError(f"core {min(missing)} is not among those this process may use: {mine}")
    return replace(options, cores=cores, threads=options.threads or len(cores))


def _reason(name: str) -> str:
    if name in WAYS:
        return unavailable(name)
    if name not in available():
        known = [*_PORTABLE, *WAYS]
        raise InputError(f"no runtime {name!r}; there are {', '.join(known)}.{did_you_mean(name, known)}")
    return available()[name]


def subject_name(bench_places: Sequence[Place], place: Place, subject: str) -> str:
    """`shipped-int8`, with the place before it where there are several."""
    return subject if len(bench_places) == 1 else f"{place.label}/{subject}"


def _files(bench: _Bench, runtime: str) -> tuple[dict[str, Path], str]:
    """What the runtime opens, by subject, and the child that opens it. The dense network of a second place is too."""
    found: dict[str, Path] = {}
    for place in bench.places:
        if runtime in WAYS and place.networks is not None:
            opened: Mapping[str, Path] = {variant: place.networks / variant for variant in VARIANTS}
        elif runtime in WAYS:
            opened = {}
        else:
            opened = {f.artifact.subject: f.path for f in place.files}
        found |= {subject_name(bench.places, place, name): path for name, path in opened.items()}
    return found, MODULE if runtime in WAYS else "compressor.device.worker"


def _subjects(bench: _Bench, place: Place) -> Iterator[SubjectRow]:
    for file in place.files:
        name = subject_name(bench.places, place, file.artifact.subject)
        yield SubjectRow(
            name,
            place.label,
            file.artifact.variant,
            file.artifact.precision,
            file.artifact.name,
            file.path.stat().st_size,
            place.budget if file.artifact.variant == "shipped" else "",
            file.macs,
            file.parameters,
            _accuracy(bench, place, name, file.path),
        )


def _accuracy(bench: _Bench, place: Place, name: str, path: Path) -> Accuracy | None:
    evaluation = place.evaluation
    if evaluation is None:
        return None
    images = evaluation
    part = f"accuracy of {name}"
    key = [file_sha256(path), place.evaluation_hash]
    return Accuracy(**_part(bench, part, key, lambda: asdict(accuracy_of(path, images)))["value"])


def _cold_of(taken: Sequence[ScenarioTiming]) -> list[ColdStart]:
    """The processes that timed single images opened them first; their peak has the pool of images in it."""
    singles = [t.timing for t in taken if t.scenario == SINGLE]
    return [ColdStart(t.name, t.runtime, (t.load_ms,), (t.first_run_ms,), (t.peak_bytes,)) for t in singles]


def _cold(bench: _Bench, runtime: str, files: Mapping[str, Path]) -> list[ColdStart]:
    """Every subject opened and run once in as many fresh processes as there are repeats, in turns."""
    options = bench.options
    plain = Schedule(threads=options.threads, cores=options.cores)
    one = replace(plain, rounds=1, seconds=0, runs=1, warmup_s=0, warmup_limit_s=0)

    def take() -> Any:
        times = [time_files(files, bench.pool[:1], schedule=one, runtime=runtime) for _ in range(options.repeats)]
        return [
            asdict(
                ColdStart(
                    name,
                    runtime,
                    tuple(t[name].load_ms for t in times),
                    tuple(t[name].first_run_ms for t in times),
                    tuple(t[name].peak_bytes for t in times),
                )
            )
            for name in files
        ]

    key = [_identities(files), asdict(one), options.repeats]
    held = _part(bench, f"cold start, {runtime}", key, take)["value"]
    return [cold_start(row) for row in held]


def _scenarios(bench: _Bench, runtime: str, files: Mapping[str, Path], module: str) -> Iterator[ScenarioTiming]:
    options = bench.options
    plain = Schedule(
        rounds=ROUNDS,
        seconds=options.seconds,
        runs=options.runs,
        warmup_limit_s=_WARM_UP_LIMIT_S,
        threads=options.threads,
        cores=options.cores,
    )
    schedules = {SINGLE: plain, OFFLINE: replace(plain, batch=options.offline_batch, runs=_OFFLINE_RUNS)}
    if options.rate_hz:
        schedules[CAMERA] = replace(plain, rate_hz=options.rate_hz)
    for scenario, schedule in schedules.items():

        def take(schedule: Schedule = schedule) -> Any:
            repeats = 1 if runtime in WAYS else options.repeats
            shorter = replace(schedule, seconds=schedule.seconds / repeats, runs=-(-schedule.runs // repeats))
            parts = [
                time_files(files, bench.pool, schedule=shorter, runtime=runtime, module=module) for _ in range(repeats)
            ]
            return [to_json(replace(_joined([p[name] for p in parts]), schedule=schedule)) for name in files]

        key = [_identities(files), asdict(schedule), options.repeats]
        for content in _part(bench, f"{scenario}, {runtime}", key, take)["value"]:
            yield ScenarioTiming(scenario, from_json(content))


def _joined(timings: Sequence[Timing]) -> Timing:
    """One subject's processes as one record; turns count on, so that a process is never split."""
    first, turns = timings[0], []
    for index, timing in enumerate(timings):
        turns += [index * timing.schedule.rounds + turn for turn in timing.turns]
    return replace(
        first,
        samples_ms=tuple(round(ms, 5) for timing in timings for ms in timing.samples_ms),
        turns=tuple(turns),
        warmup_runs=sum(t.warmup_runs for t in timings),
        stable=all(t.stable for t in timings),
    )


def _identities(files: Mapping[str, Path]) -> dict[str, str]:
    return {name: file_sha256(path) if path.is_file() else str(path) for name, path in files.items()}


def _part(bench: _Bench, name: str, key: object, take: Callable[[], Any]) -> dict[str, Any]:
    """Measured now, or read back when an interrupted benchmark with the same options had it already."""
    path = bench.stages.folder / f"{name.replace('/', '-')}.json"

    def read() -> dict[str, Any]:
        return read_json(path, "part/1")

    inputs = [key, read_environment().fingerprint]
    return bench.stages.do(name, inputs, lambda: write_json(path, {"schema": "part/1", "value": take()}), read)
