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
from ..work import Work
from .artifacts import DENSE, SHIPPED, Artifact, Findings
from .networks import WAYS, caller, unavailable
from .precisions import layers_of

POOL_IMAGES = 64  # calibration images that latency runs draw from, so that none is always in the caches
ENOUGH_RUNS = least_samples(0.99)  # 662: the least common percentile of the report stands
ENOUGH_BATCHES = 2 * least_samples(0.9)  # 128: of a large batch, throughput and a p90 are asked for
LIMIT_S = 60.0  # of one network: one whose batch takes a second is timed by fewer runs, which are counted
ENGINES = ("tensorrt", "tensorrt_rtx")


def measure_latency(work: Work, found: Findings, networks: Mapping[str, fx.GraphModule]) -> None:
    """Every runtime of the recipe at every batch size; dense first, so that ratios read from it."""
    folder, recipe = work.stages.folder, work.recipe
    reasons = {name: unavailable(name) if name in WAYS else available()[name] for name in recipe.runtimes}
    here = [name for name, reason in reasons.items() if not reason]

    def write() -> None:
        timings: list[Timing] = []
        for index, (batch, runtime) in enumerate((b, r) for b in recipe.latency_batches for r in here):
            share = index / (len(here) * len(recipe.latency_batches))
            work.stages.notify(f"latency: {runtime}, batch {batch}", share)
            enough = ENOUGH_RUNS if batch == 1 else ENOUGH_BATCHES
            schedule = Schedule(batch=batch, seconds=recipe.latency_seconds, enough=enough, limit_s=LIMIT_S)
            timings += _timed(work, found, networks, runtime, schedule).values()
        write_json(folder / "latency.json", {"schema": "latency/2", "timings": [to_json(t) for t in timings]})

    def read() -> list[Timing]:
        return [from_json(t) for t in read_json(folder / "latency.json", "latency/2")["timings"]]

    hashes = {a.name: file_sha256(found.path(a)) for a in found.runnable}
    engines = {name: _engines(found, name) for name in here if name in ENGINES}
    built = {name: {subject: file_sha256(path) for subject, path in files.items()} for name, files in engines.items()}
    place = [here, built, read_environment().fingerprint]
    inputs = [hashes, list(recipe.latency_batches), recipe.latency_seconds, *place]
    found.timings = work.stages.do("latency", inputs, write, read)
    reasons |= {name: "no engine was built for this GPU" for name, files in engines.items() if not files}
    work.not_checked += [f"latency on {name}: {reason}" for name, reason in reasons.items() if reason]


def _timed(
    work: Work, found: Findings, networks: Mapping[str, fx.GraphModule], runtime: str, schedule: Schedule
) -> dict[str, Timing]:
    images = work.sample(max(POOL_IMAGES, schedule.batch))
    if runtime in WAYS:
        moved = "cuda" in runtime  # a module is moved in place, and the run still needs it here
        own = {name: copy.deepcopy(network) if moved else network for name, network in networks.items()}
        subjects = {name: caller(network, runtime) for name, network in own.items()}
        return time_interleaved(subjects, images, schedule=schedule, runtimes=dict.fromkeys(subjects, runtime))
    files = _engines(found, runtime) if runtime in ENGINES else {a.subject: found.path(a) for a in found.runnable}
    return time_files(files, images, schedule=schedule, runtime=runtime) if files else {}


def _engines(found: Findings, runtime: str) -> dict[str, Path]:
    """The shipped network's engines that this machine's GPU can load."""
    mine = (cuda.device()[1], "rtx", "this-gpu")
    usable = [e for e in found.engines if e["path"] and e["library"] == runtime and e["target"] in mine]
    return {Artifact("", "shipped", e["precision"]).subject: found.folder / e["path"] for e in usable}


def crowd_of(timings: Sequence[Timing]) -> str:
    """How crowded the machine was at the busiest beginning of a timing, in words; empty where it was not."""
    taken = sorted((timing.environment for timing in timings), key=lambda e: facts.load_of(e.state))
    return facts.crowd(taken[-1].state, taken[-1].machine) if taken else ""


def measure_layers(work: Work, found: Findings, networks: Mapping[str, fx.GraphModule]) -> None:
    """Where time goes in the dense and the shipped file, layer by layer, on ONNX Runtime at batch 1."""
    folder, sources = work.stages.folder, (DENSE, SHIPPED)
    images = work.sample(POOL_IMAGES)

    def write() -> None:
        times = {}
        for source in sources:
            kernels = profile_kernels(found.path(source), images)
            times[source.variant] = layer_times_ms(found.path(source), kernels, layers_of(networks[source.variant]))
        write_json(folder / "layers.json", {"schema": "layers/2", "ms": times})

    def read() -> dict[str, dict[str, float]]:
        held: dict[str, dict[str, float]] = read_json(folder / "layers.json", "layers/2")["ms"]
        return held

    hashes = [file_sha256(found.path(a)) for a in sources]
    found.layer_ms = work.stages.do("layers", [hashes, read_environment().fingerprint], write, read)
