"""The exported files and networks in, raw latency samples and times per layer out, as the recipe asks.

All files of a runtime take turns in processes of their own; PyTorch's ways take turns in this one, since a model
may have been given as an object. A runtime that is not here is a line of `not_checked`.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import fx

from ..device import cuda
from ..device.environment import read_environment
from ..device.percentiles import least_samples
from ..device.profiling import profile_kernels
from ..device.runtimes import available
from ..device.timing import Schedule, Timing, from_json, time_interleaved, to_json
from ..device.worker import time_files
from ..export.kernels import layer_times_ms
from ..files import file_sha256, read_json, write_json
from ..report import facts
from ..run.work import Work
from .artifacts import DENSE, SHIPPED, Artifact, Findings
from .networks import WAYS, Caller, caller, unavailable
from .precisions import layers_of

POOL_IMAGES = 64  # calibration images that latency runs draw from, so that none is always in the caches
ENOUGH_RUNS = least_samples(0.99)  # 662: the least common percentile of the report stands
ENOUGH_BATCHES = 2 * least_samples(0.9)  # 128: of a large batch, throughput and a p90 are asked for
LIMIT_S = 60.0  # of one network: one whose batch takes a second is timed by fewer runs, which are counted
ENGINES = ("tensorrt", "tensorrt_rtx")


def measure_latency(work: Work, findings: Findings, networks: Mapping[str, fx.GraphModule]) -> None:
    """Every runtime of the recipe at every batch size; dense first, so that ratios read from it.

    `networks` by variant, for PyTorch's ways. Samples are milliseconds of one call.
    """
    folder, recipe = work.stages.folder, work.recipe
    reasons = {name: unavailable(name) if name in WAYS else available()[name] for name in recipe.runtimes}
    here = [name for name, reason in reasons.items() if not reason]

    def write() -> None:
        timings: list[Timing] = []
        jobs = [(batch, runtime) for batch in recipe.latency_batches for runtime in here]
        for index, (batch, runtime) in enumerate(jobs):
            work.stages.notify(f"latency: {runtime}, batch {batch}", index / len(jobs))
            enough = ENOUGH_RUNS if batch == 1 else ENOUGH_BATCHES
            schedule = Schedule(batch=batch, seconds=recipe.latency_seconds, enough=enough, limit_s=LIMIT_S)
            timings += _timed(work, findings, networks, runtime, schedule).values()
        rows = [to_json(timing) for timing in timings]
        write_json(folder / "latency.json", {"schema": "latency/2", "timings": rows})

    def read() -> list[Timing]:
        rows = read_json(folder / "latency.json", "latency/2")["timings"]
        return [from_json(row) for row in rows]

    # of engines the key holds those that this GPU can load: with a new one, timings are made again
    hashes = {artifact.name: file_sha256(findings.path(artifact)) for artifact in findings.runnable}
    engines = {name: _engines(findings, name) for name in here if name in ENGINES}
    built = {name: _hashes_of(files) for name, files in engines.items()}
    place = [here, built, read_environment().fingerprint]
    inputs = [hashes, list(recipe.latency_batches), recipe.latency_seconds, *place]
    findings.timings = work.stages.do("latency", inputs, write, read)

    for name, files in engines.items():
        if not files:
            reasons[name] = "no engine was built for this GPU"
    work.not_checked += [f"latency on {name}: {reason}" for name, reason in reasons.items() if reason]


def _hashes_of(files: Mapping[str, Path]) -> dict[str, str]:
    return {subject: file_sha256(path) for subject, path in files.items()}


def _timed(
    work: Work, findings: Findings, networks: Mapping[str, fx.GraphModule], runtime: str, schedule: Schedule
) -> dict[str, Timing]:
    """By subject; empty where the runtime has nothing to run here."""
    images = work.sample(max(POOL_IMAGES, schedule.batch))
    if runtime in WAYS:
        subjects = _callers(networks, runtime)
        return time_interleaved(subjects, images, schedule=schedule, runtimes=dict.fromkeys(subjects, runtime))

    if runtime in ENGINES:
        files = _engines(findings, runtime)
    else:
        files = {artifact.subject: findings.path(artifact) for artifact in findings.runnable}
    return time_files(files, images, schedule=schedule, runtime=runtime) if files else {}


def _callers(networks: Mapping[str, fx.GraphModule], way: str) -> dict[str, Caller]:
    """A module is moved in place, and the run still needs it here: a way on the GPU gets a copy."""
    if "cuda" in way:
        networks = {name: copy.deepcopy(network) for name, network in networks.items()}
    return {name: caller(network, way) for name, network in networks.items()}


def _engines(findings: Findings, runtime: str) -> dict[str, Path]:
    """The shipped network's engines that this machine's GPU can load, by subject."""
    loadable_targets = (cuda.device()[1], "rtx", "this-gpu")
    files: dict[str, Path] = {}
    for engine in findings.engines:
        if engine["path"] and engine["library"] == runtime and engine["target"] in loadable_targets:
            artifact = Artifact("", "shipped", engine["precision"])
            files[artifact.subject] = findings.folder / engine["path"]
    return files


def crowd_of(timings: Sequence[Timing]) -> str:
    """How crowded the machine was at the busiest beginning of a timing, in words; empty where it was not."""
    if not timings:
        return ""
    environments = [timing.environment for timing in timings]
    environments.sort(key=lambda environment: facts.load_of(environment.state))
    busiest = environments[-1]
    return facts.crowd(busiest.state, busiest.machine)


def measure_layers(work: Work, findings: Findings, networks: Mapping[str, fx.GraphModule]) -> None:
    """Where time goes in the dense and the shipped file, layer by layer, on ONNX Runtime at batch 1; milliseconds."""
    folder, sources = work.stages.folder, (DENSE, SHIPPED)
    images = work.sample(POOL_IMAGES)

    def write() -> None:
        times = {}
        for source in sources:
            path, layers = findings.path(source), layers_of(networks[source.variant])
            times[source.variant] = layer_times_ms(path, profile_kernels(path, images), layers)
        write_json(folder / "layers.json", {"schema": "layers/2", "ms": times})

    def read() -> dict[str, dict[str, float]]:
        layer_ms: dict[str, dict[str, float]] = read_json(folder / "layers.json", "layers/2")["ms"]
        return layer_ms

    hashes = [file_sha256(findings.path(artifact)) for artifact in sources]
    findings.layer_ms = work.stages.do("layers", [hashes, read_environment().fingerprint], write, read)
