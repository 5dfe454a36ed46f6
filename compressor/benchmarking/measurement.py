"""Places in, `Measured` out: accuracy, cold starts and latency of every file and network, dense and shipped in turns.

Every subject has processes of its own, pinned; samples are drawn from a pool larger than the caches. What was
measured before an interruption is kept under `parts/` and taken from there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ..delivery.answers import predict_of_file
from ..delivery.gates import accuracy_of
from ..delivery.networks import WAYS, unavailable
from ..device import feeds
from ..device.environment import affinity, cache_bytes, read_environment
from ..device.external import model_bytes
from ..device.feeds import Arrays
from ..device.runtimes import available, runtime_names
from ..device.timing import Schedule, Timing, from_json, to_json
from ..device.worker import time_files
from ..errors import InputError, MissingPackageError, did_you_mean
from ..files import file_sha256, read_json, write_json
from ..records import Figure, figure_fields, figure_of
from ..run.stages import Notify, Stages
from ..run.task_choice import CLASSES
from ..tasks import Predict, is_labelled, task_named
from .network_worker import MODULE, VARIANTS
from .places import File, Place
from .records import (
    CAMERA,
    OFFLINE,
    SINGLE,
    ColdStart,
    Content,
    Measured,
    Options,
    ScenarioTiming,
    SubjectRow,
    cold_start,
)

ROUNDS = 10
_WARM_UP_LIMIT_S = 2.0  # a machine that never settles must not cost minutes; that it did not is said
_POOL_LIMIT_BYTES = 2**28
_CACHE_GUESS_BYTES = 2**25  # where the system does not say how large its caches are
_OFFLINE_RUNS = 24  # throughput is a mean; a percentile of it is not asked for


@dataclass(frozen=True, slots=True)
class _Bench:
    """What all measurements of one benchmark share."""

    places: tuple[Place, ...]
    options: Options
    stages: Stages
    pool: Arrays


def measure(places: Sequence[Place], options: Options, out: Path, notify: Notify) -> Measured:
    """Measures everything that can be here; the rest is in `not_run` with its reason. `out` holds the parts."""
    bench = _Bench(tuple(places), options, Stages(out / "parts", notify), pool_of(places[0].images))
    reasons = {runtime: _why_unavailable(runtime) for runtime in options.on or _measurable()}
    not_run = [f"{runtime}: {reason}" for runtime, reason in reasons.items() if reason]
    subjects: list[SubjectRow] = []
    for place in places:
        not_run += place.lacks
        for file in place.files:
            row, lacks = _subject(bench, place, file)
            subjects.append(row)
            not_run += lacks

    timings: list[ScenarioTiming] = []
    cold: list[ColdStart] = []
    for runtime, reason in reasons.items():
        if not reason:
            scenarios, starts = _timed(bench, runtime)
            timings += scenarios
            cold += starts

    return Measured(
        title=" and ".join(place.label for place in places),
        environment=read_environment(),
        options=options,
        subjects=tuple(subjects),
        timings=tuple(timings),
        cold=tuple(cold),
        not_run=tuple(not_run),
        pool_bytes=sum(array.nbytes for array in feeds.as_tuple(bench.pool)),
        cache_bytes=cache_bytes(),
        seconds=dict(bench.stages.seconds),
    )


def _timed(bench: _Bench, runtime: str) -> tuple[list[ScenarioTiming], list[ColdStart]]:
    """Every scenario and every cold start on one runtime; none where no place holds anything for it."""
    files = _files(bench, runtime)
    if not files:
        return [], []
    scenarios = list(_scenarios(bench, runtime, files))
    if runtime in WAYS:
        # a network takes seconds to import and to compile: its own timing's process is one cold start
        return scenarios, _cold_of(scenarios)
    return scenarios, _cold(bench, runtime, files)


def pool_of(images: Arrays) -> Arrays:
    """Twice the largest cache of images in an order without a pattern, each at an address of its own.

    In: `images` [N, ...], or several inputs of as many samples. Out: [M, ...], copies of them, M at least N.
    """
    wanted_bytes = min(_POOL_LIMIT_BYTES, 2 * (cache_bytes() or _CACHE_GUESS_BYTES))
    available_count = feeds.count(images)
    pool_count = max(available_count, -(-wanted_bytes // feeds.sample_bytes(images)))  # rounded up: part of one is one
    order = np.random.default_rng(0).integers(available_count, size=pool_count)
    return feeds.mapped(lambda array: array[order], images)


def resolved(options: Options) -> Options:
    """Cores and threads as they will be: all this process may use unless told otherwise.

    Raises InputError for a core that it may not use.
    """
    usable = affinity()
    cores = options.cores or usable
    missing = set(options.cores) - set(usable)
    if missing and usable:
        listed = ", ".join(map(str, usable))
        raise InputError(f"core {min(missing)} is not among those this process may use: {listed}")
    return replace(options, cores=cores, threads=options.threads or len(cores))


def _measurable() -> tuple[str, ...]:
    """What takes a place's files or networks as they are; engines are built for one GPU each and are in no place."""
    return runtime_names("onnx", "network")


def _why_unavailable(runtime: str) -> str:
    """Why the runtime can't be measured here; empty when it can. Raises InputError for an unknown one."""
    if runtime in WAYS:
        return unavailable(runtime)
    if runtime not in available():
        runtimes = _measurable()
        hint = did_you_mean(runtime, [*runtimes])
        raise InputError(f"no runtime {runtime!r}; there are {', '.join(runtimes)}.{hint}")
    return available()[runtime]


def subject_name(bench_places: Sequence[Place], place: Place, subject: str) -> str:
    """`shipped-int8`, with the place before it where there are several."""
    if len(bench_places) == 1:
        return subject
    return f"{place.label}/{subject}"


def _files(bench: _Bench, runtime: str) -> dict[str, Path]:
    """What the runtime opens, by subject; the dense networks of further places are there too."""
    paths_of = _networks if runtime in WAYS else _model_files
    files: dict[str, Path] = {}
    for place in bench.places:
        for subject, path in paths_of(place).items():
            files[subject_name(bench.places, place, subject)] = path
    return files


def _networks(place: Place) -> dict[str, Path]:
    """Folder and variant in one path, as `network_worker` takes them; none where PyTorch can't rebuild them."""
    if place.networks is None:
        return {}
    return {variant: place.networks / variant for variant in VARIANTS}


def _model_files(place: Place) -> dict[str, Path]:
    return {file.artifact.subject: file.path for file in place.files}


def _subject(bench: _Bench, place: Place, file: File) -> tuple[SubjectRow, list[str]]:
    """A file, and a line that says why its accuracy could not be measured where there are images; none where it was."""
    artifact = file.artifact
    name = subject_name(bench.places, place, artifact.subject)
    accuracy: Figure | None = None
    lacks: list[str] = []
    try:
        accuracy = _accuracy(bench, place, name, file.path)
    except (InputError, MissingPackageError) as error:  # a detector's boxes are made by code that no folder holds
        lacks.append(f"accuracy of {name}: {error}")
    row = SubjectRow(
        name=name,
        place=place.label,
        variant=artifact.variant,
        precision=artifact.precision,
        file=artifact.name,
        bytes=model_bytes(file.path),
        budget=place.budget if artifact.variant == "shipped" else "",
        macs=file.macs,
        parameters=file.parameters,
        accuracy=accuracy,
    )
    return row, lacks


def _accuracy(bench: _Bench, place: Place, name: str, path: Path) -> Figure | None:
    """By the task's measure; without labels, against the dense file's answers. Raises DataError where that is missing.

    TaskError for a task that is judged by a user's own function.
    """
    images = place.evaluation
    if images is None:
        return None
    labelled = any(is_labelled(targets) for _, targets in images)

    def take() -> dict[str, object]:
        if place.task == CLASSES and labelled:
            return figure_fields(accuracy_of(path, images))
        task = task_named(place.task, dense=_predict_of_dense(place))
        return figure_fields(task.quality(predict_of_file(path), images))

    key = [file_sha256(path), place.evaluation_hash, place.task]
    return figure_of(_taken_once(bench, f"accuracy of {name}", key, take))


def _predict_of_dense(place: Place) -> Predict | None:
    """The answers of the place's dense file; None where it has none."""
    for file in place.files:
        if file.artifact.variant == "dense":
            return predict_of_file(file.path)
    return None


def _cold_of(scenarios: Sequence[ScenarioTiming]) -> list[ColdStart]:
    """The processes that timed single images opened them first; their peak has the pool of images in it."""
    return [_cold_start([timed.timing]) for timed in scenarios if timed.scenario == SINGLE]


def _cold(bench: _Bench, runtime: str, files: Mapping[str, Path]) -> list[ColdStart]:
    """Every subject opened and run once in as many fresh processes as there are repeats, in turns."""
    options = bench.options
    schedule = Schedule(
        rounds=1, seconds=0, runs=1, warmup_s=0, warmup_limit_s=0, threads=options.threads, cores=options.cores
    )

    def take() -> list[dict[str, object]]:
        one_image = feeds.cut(bench.pool, 0, 1)
        by_process = [time_files(files, one_image, schedule=schedule, runtime=runtime) for _ in range(options.repeats)]
        return [asdict(_cold_start(timings)) for timings in _by_subject(files, by_process)]

    key = [_identities(files), asdict(schedule), options.repeats]
    rows = _taken_once(bench, f"cold start, {runtime}", key, take)
    return list(map(cold_start, rows))


def _cold_start(timings: Sequence[Timing]) -> ColdStart:
    """One subject's processes as one record."""
    return ColdStart(
        name=timings[0].name,
        runtime=timings[0].runtime,
        load_ms=tuple(timing.load_ms for timing in timings),
        first_run_ms=tuple(timing.first_run_ms for timing in timings),
        peak_bytes=tuple(timing.peak_bytes for timing in timings),
    )


def _scenarios(bench: _Bench, runtime: str, files: Mapping[str, Path]) -> Iterator[ScenarioTiming]:
    for scenario, schedule in _schedules(bench.options).items():

        def take(schedule: Schedule = schedule) -> list[dict[str, object]]:  # bound now: the loop goes on
            return [to_json(timing) for timing in _timings(bench, runtime, files, schedule)]

        key = [_identities(files), asdict(schedule), bench.options.repeats]
        for content in _taken_once(bench, f"{scenario}, {runtime}", key, take):
            yield ScenarioTiming(scenario, from_json(content))


def _schedules(options: Options) -> dict[str, Schedule]:
    """How each scenario is timed, all its processes together."""
    single = Schedule(
        rounds=ROUNDS,
        seconds=options.seconds,
        runs=options.runs,
        warmup_limit_s=_WARM_UP_LIMIT_S,
        threads=options.threads,
        cores=options.cores,
    )
    schedules = {SINGLE: single, OFFLINE: replace(single, batch=options.offline_batch, runs=_OFFLINE_RUNS)}
    if options.rate_hz:
        schedules[CAMERA] = replace(single, rate_hz=options.rate_hz)
    return schedules


def _timings(bench: _Bench, runtime: str, files: Mapping[str, Path], schedule: Schedule) -> list[Timing]:
    """Every file timed in fresh processes, which share the schedule's time and runs."""
    repeats, module = bench.options.repeats, "compressor.device.worker"
    if runtime in WAYS:
        repeats, module = 1, MODULE  # importing and compiling a network again costs more than its timing
    shorter = replace(schedule, seconds=schedule.seconds / repeats, runs=-(-schedule.runs // repeats))
    by_process = [
        time_files(files, bench.pool, schedule=shorter, runtime=runtime, module=module) for _ in range(repeats)
    ]
    return [replace(_joined(timings), schedule=schedule) for timings in _by_subject(files, by_process)]


def _by_subject(names: Iterable[str], by_process: Sequence[Mapping[str, Timing]]) -> Iterator[list[Timing]]:
    """For each subject its timing in every process."""
    for name in names:
        yield [timings[name] for timings in by_process]


def _joined(timings: Sequence[Timing]) -> Timing:
    """One subject's processes as one record; turns count on, so that a process is never split."""
    samples_ms: list[float] = []
    turns: list[int] = []
    for index, timing in enumerate(timings):
        samples_ms += [round(ms, 5) for ms in timing.samples_ms]
        turns += [index * timing.schedule.rounds + turn for turn in timing.turns]  # of 10 a process: 0-9, 10-19, ...
    return replace(
        timings[0],
        samples_ms=tuple(samples_ms),
        turns=tuple(turns),
        warmup_runs=sum(timing.warmup_runs for timing in timings),
        stable=all(timing.stable for timing in timings),
    )


def _identities(files: Mapping[str, Path]) -> dict[str, str]:
    """Hashes of files; a network is no file of its own, so its path stands for it."""
    return {name: _identity(path) for name, path in files.items()}


def _identity(path: Path) -> str:
    if path.is_file():
        return file_sha256(path)
    return str(path)


def _taken_once(bench: _Bench, name: str, key: object, take: Callable[[], object]) -> Any:
    """What `take` measures now, or measured before an interruption with the same options; in JSON's own types."""
    path = bench.stages.folder / f"{name.replace('/', '-')}.json"

    def write() -> None:
        write_json(path, {"schema": "part/1", "value": take()})

    def read() -> Content:
        return read_json(path, "part/1")

    inputs = [key, read_environment().fingerprint]
    return bench.stages.do(name, inputs, write, read)["value"]
