"""The exported files and networks in, raw latency samples and times per layer out, as the recipe asks.

All files of a runtime take turns in processes of their own; PyTorch's ways take turns in this one, since a model
may have been given as an object. A runtime that is not here is a line of `not_checked`.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import fx

from ..device import cuda, feeds
from ..device.environment import read_environment
from ..device.feeds import Arrays
from ..device.percentiles import least_samples
from ..device.profiling import profile_kernels
from ..device.runtimes import available, row_of
from ..device.timing import Schedule, Timing, from_json, time_interleaved, to_json
from ..device.worker import time_files
from ..export.kernels import layer_times_ms
from ..files import read_json, write_json
from ..report import facts
from ..run.checks import Checks
from ..run.fingerprints import Known
from ..run.stages import Keeper, Progress
from ..run.work import Work
from .artifacts import DENSE, SHIPPED, Artifact
from .networks import WAYS, Caller, caller, unavailable
from .precisions import layers_of
from .results import Engines, Files, Latency

POOL_IMAGES = 64  # calibration images that latency runs draw from, so that none is always in the caches
ENOUGH_RUNS = least_samples(0.99)  # 662: the least common percentile of the report stands
ENOUGH_BATCHES = 2 * least_samples(0.9)  # 128: of a large batch, throughput and a p90 are asked for
LIMIT_S = 60.0  # of one network: one whose batch takes a second is timed by fewer runs, which are counted

Networks = Mapping[str, fx.GraphModule]
FilesBySubject = Mapping[str, Path]


def measure_latency(work: Work, files: Files, engines: Engines, networks: Known) -> Latency:
    """Every runtime of the recipe at every batch size; dense first, so that ratios read from it.

    `networks` by variant, for PyTorch's ways. Samples are milliseconds of one call.
    """
    recipe = work.recipe
    reasons = {name: _refusal(name) for name in recipe.runtimes}
    here = [name for name, reason in reasons.items() if not reason]
    # of engines those that this GPU can load: with a new one, timings are made again
    loadable = {name: _loadable(engines, name, work.stages.folder) for name in here if row_of(name).takes == "engine"}
    timings = work.stages.make(
        "latency",
        _timed,
        Keeper(_write_timings, _read_timings),
        place=read_environment().fingerprint,
        files={artifact.subject: path for artifact, path in files.runnable.items()},
        engines=loadable,
        networks=networks,
        runtimes=here,
        images=work.sample(max(POOL_IMAGES, *recipe.latency_batches)),
        schedules=[_schedule(batch, recipe.latency_seconds) for batch in recipe.latency_batches],
    )

    for name, engine_files in loadable.items():
        if not engine_files:
            reasons[name] = "no engine was built for this GPU"
    not_checked = tuple(f"latency on {name}: {reason}" for name, reason in reasons.items() if reason)
    busy = crowd_of(timings)
    warnings: tuple[str, ...] = ()
    if busy:
        warnings = (f"{busy} when networks were timed: times and ratios may be off; time them again",)
    return Latency(timings, busy, Checks(not_checked=not_checked, warnings=warnings))


def _refusal(runtime: str) -> str:
    """Why it can't run here, empty where it can."""
    if runtime in WAYS:
        return unavailable(runtime)
    return available()[runtime]


def _schedule(batch: int, seconds: float) -> Schedule:
    enough = ENOUGH_RUNS if batch == 1 else ENOUGH_BATCHES
    return Schedule(batch=batch, seconds=seconds, enough=enough, limit_s=LIMIT_S)


def _loadable(engines: Engines, runtime: str, folder: Path) -> dict[str, Path]:
    """The shipped network's engines that this machine's GPU can load, by subject."""
    targets = (cuda.device()[1], "rtx", "this-gpu")
    files: dict[str, Path] = {}
    for engine in engines.built:
        if engine.library == runtime and engine.target in targets:
            subject = Artifact("", "shipped", engine.precision).subject
            files[subject] = folder / engine.path
    return files


def _timed(
    files: FilesBySubject,
    engines: Mapping[str, FilesBySubject],
    networks: Networks,
    runtimes: Sequence[str],
    images: Arrays,
    schedules: Sequence[Schedule],
    progress: Progress,
) -> tuple[Timing, ...]:
    """`engines` by runtime and subject; batches are drawn from `images` [N, ...] of each input."""
    timings: list[Timing] = []
    jobs = [(schedule, runtime) for schedule in schedules for runtime in runtimes]
    for index, (schedule, runtime) in enumerate(jobs):
        progress(index / len(jobs), f"{runtime}, batch {schedule.batch}")
        pool = feeds.cut(images, 0, max(POOL_IMAGES, schedule.batch))
        if runtime in WAYS:
            timings += _timed_networks(networks, runtime, pool, schedule)
        else:
            timings += _timed_files(engines.get(runtime, files), runtime, pool, schedule)
    return tuple(timings)


def _timed_networks(networks: Networks, way: str, images: Arrays, schedule: Schedule) -> Sequence[Timing]:
    subjects = _callers(networks, way)
    runtimes = dict.fromkeys(subjects, way)
    return [*time_interleaved(subjects, images, schedule=schedule, runtimes=runtimes).values()]


def _timed_files(files: FilesBySubject, runtime: str, images: Arrays, schedule: Schedule) -> Sequence[Timing]:
    """Empty where the runtime has nothing to run here."""
    if not files:
        return []
    return [*time_files(files, images, schedule=schedule, runtime=runtime).values()]


def _callers(networks: Networks, way: str) -> dict[str, Caller]:
    """A module is moved in place, and the run still needs it here: a way on the GPU gets a copy."""
    if "cuda" in way:
        networks = {name: copy.deepcopy(network) for name, network in networks.items()}
    return {name: caller(network, way) for name, network in networks.items()}


def _write_timings(folder: Path, timings: Sequence[Timing]) -> None:
    rows = [to_json(timing) for timing in timings]
    write_json(folder / "latency.json", {"schema": "latency/2", "timings": rows})


def _read_timings(folder: Path) -> tuple[Timing, ...]:
    return tuple(from_json(row) for row in read_json(folder / "latency.json", "latency/2")["timings"])


def crowd_of(timings: Sequence[Timing]) -> str:
    """How crowded the machine was at the busiest beginning of a timing, in words; empty where it was not."""
    if not timings:
        return ""
    environments = [timing.environment for timing in timings]
    environments.sort(key=lambda environment: facts.load_of(environment.state))
    busiest = environments[-1]
    return facts.crowd(busiest.state, busiest.machine)


def measure_layers(work: Work, files: Files, networks: Networks) -> dict[str, dict[str, float]]:
    """Where time goes in the dense and the shipped file, layer by layer, on ONNX Runtime at batch 1; milliseconds."""
    return work.stages.make(
        "layers",
        _profiled,
        Keeper(_write_layers, _read_layers),
        place=read_environment().fingerprint,
        files={artifact.variant: files.paths[artifact] for artifact in (DENSE, SHIPPED) if artifact in files.paths},
        layers={variant: layers_of(network) for variant, network in networks.items()},
        images=work.sample(POOL_IMAGES),
    )


def _profiled(
    files: Mapping[str, Path],
    layers: Mapping[str, Mapping[str, str]],
    images: Arrays,
    progress: Progress,
) -> dict[str, dict[str, float]]:
    """All by variant; `layers` are those of the traced graph's nodes."""
    times_ms = {}
    for variant, path in files.items():
        times_ms[variant] = layer_times_ms(path, profile_kernels(path, images), layers[variant])
    return times_ms


def _write_layers(folder: Path, layer_ms: Mapping[str, Mapping[str, float]]) -> None:
    write_json(folder / "layers.json", {"schema": "layers/2", "ms": layer_ms})


def _read_layers(folder: Path) -> dict[str, dict[str, float]]:
    layer_ms: dict[str, dict[str, float]] = read_json(folder / "layers.json", "layers/2")["ms"]
    return layer_ms
