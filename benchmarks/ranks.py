"""What several processes make of one run: how much faster, how many bytes they send, and whether it stays the same.

In: networks, numbers of processes, images (noise, or `--data`). Each number of processes is started by `torchrun`, one
thread each, in turns; scoring, covariances, measured loss and repair are timed between barriers. Beside them as many
processes that know nothing of each other do all the work each: what they lose to one alone, the machine's caches and
memory take, and no program of several processes can have back. Out: a table, and as the last line one JSON object:
medians, that ceiling, efficiency (time of one over that of n, times n), bytes each process gave to sums, and how far
scores, plan and repaired weights lie from those of one process.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from compressor import distributed
from compressor.budgets import Budget
from compressor.criteria import CRITERIA, LEARNED
from compressor.graph import trace
from compressor.inputs.examples import examples_in_memory
from compressor.inputs.images import Batches, batches, overridden
from compressor.inputs.models import load_model
from compressor.inputs.samples import Sample
from compressor.inputs.sources import load_images
from compressor.planning import RankingOptions, make_plan, measure_scores
from compressor.planning.budget import least_share
from compressor.planning.covariance import Inputs, collect
from compressor.pruning import find_structure, prune, slices_of
from compressor.relevance import score
from compressor.repair import compensate
from compressor.repair.consumers import find_layers

RANKING = RankingOptions(normalisation="none", per_cost=1)
STEPS = ("scoring", "covariances", "measured loss", "repair")


def main() -> None:
    options = _options()
    if options.worker:
        _work(options)
        return
    results = {name: _compared(name, options) for name in options.models.split(",")}
    print(json.dumps(results))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", default="torchvision:resnet18,torchvision:mobilenet_v2")
    parser.add_argument("--ranks", default="1,2", help="numbers of processes, the first is compared with")
    parser.add_argument("--images", type=int, default=128)
    parser.add_argument("--size", type=int, default=96, help="pixels")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--data", default="", help="real images, as --data of the command line; without: noise")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--all-criteria", action="store_true", help="compare the scores of every criterion")
    parser.add_argument("--worker", default="", help=argparse.SUPPRESS)
    return parser.parse_args()


def _compared(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """All numbers of processes in turns, so that a machine that changes its speed changes it for all."""
    numbers = [int(text) for text in options.ranks.split(",")]
    runs: dict[int, list[dict[str, Any]]] = {number: [] for number in numbers}
    strangers: dict[int, list[dict[str, Any]]] = {number: [] for number in numbers[1:]}
    with tempfile.TemporaryDirectory() as folder:
        for repeat in range(options.repeats):
            for number in numbers:
                (times,) = _finished_runs([_start(name, number, Path(folder, f"{number}-{repeat}"), options)])
                runs[number].append(times)
            for number in numbers[1:]:
                outs = [Path(folder, f"alone-{number}-{repeat}-{index}") for index in range(number)]
                strangers[number] += _finished_runs([_start(name, 1, out, options) for out in outs])
        first = dict(np.load(Path(folder, f"{numbers[0]}-0.npz")))
        apart = {number: _apart(first, dict(np.load(Path(folder, f"{number}-0.npz")))) for number in numbers[1:]}

    rows: dict[str, Any] = {"images": options.images, "size": options.size, "apart": apart}
    print(f"{name}, {options.images} images of {options.size} px")
    for step in STEPS:
        rows[step] = _row(step, numbers, runs, strangers)
        print(f"  {step:14} {_told(rows[step])}")
    for number, distances in apart.items():
        print(f"  {number} processes and {numbers[0]}: {distances}")
    return rows


def _row(
    step: str,
    numbers: list[int],
    runs: Mapping[int, list[dict[str, Any]]],
    strangers: Mapping[int, list[dict[str, Any]]],
) -> dict[str, Any]:
    """Medians of one step, what several processes reach of their share, and what strangers would."""
    seconds = {number: median(run[step]["seconds"] for run in runs[number]) for number in numbers}
    base = numbers[0] * seconds[numbers[0]]
    beside = {number: median(run[step]["seconds"] for run in strangers[number]) for number in numbers[1:]}
    return {
        "seconds": seconds,
        "ceiling": {number: base / slowed for number, slowed in beside.items()},
        "efficiency": {number: base / (number * seconds[number]) for number in numbers},
        "sent_bytes": {number: runs[number][0][step]["sent_bytes"] for number in numbers},
    }


def _told(row: Mapping[str, Any]) -> str:
    parts = []
    for number, seconds in row["seconds"].items():
        ceiling = f" of {row['ceiling'][number]:.0%}" if number in row["ceiling"] else ""
        sent_mb = row["sent_bytes"][number] / 1e6
        parts.append(f"{number}: {seconds:.2f} s ({row['efficiency'][number]:.0%}{ceiling}, {sent_mb:.1f} MB)")
    return ", ".join(parts)


@dataclass(frozen=True, slots=True)
class Started:
    """A job that runs, and the file, without its suffix, that it leaves its times in."""

    process: subprocess.Popen[bytes]
    out: Path


def _finished_runs(jobs: list[Started]) -> list[dict[str, Any]]:
    """The times of jobs that run at once; raises CalledProcessError where one failed."""
    try:
        for job in jobs:
            code = job.process.wait()
            if code:
                raise subprocess.CalledProcessError(code, job.process.args)
    finally:
        for job in jobs:
            job.process.terminate()  # nothing to one that has ended; torchrun ends its own
            job.process.wait()
    return [json.loads(job.out.with_suffix(".json").read_text()) for job in jobs]


def _start(name: str, number: int, out: Path, options: argparse.Namespace) -> Started:
    given = ["--models", name, "--worker", str(out), "--images", str(options.images), "--size", str(options.size)]
    given += ["--batch", str(options.batch), "--data", options.data]
    given += ["--all-criteria"] if options.all_criteria else []
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(number)]
    command = [sys.executable, *launcher, __file__, *given]
    return Started(subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"}), out)


def _apart(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> dict[str, Any]:
    """The largest distance of scores and weights, over the largest entry; whether the plans are the same."""
    apart: dict[str, Any] = {"same_plan": True}
    for key, expected in one.items():
        kind = key.split("|")[0]
        if kind == "plan":
            apart["same_plan"] = apart["same_plan"] and np.array_equal(expected, other[key])
            continue
        distance = float(np.abs(other[key] - expected).max(initial=0)) / max(
            float(np.abs(expected).max(initial=0)), 1e-30
        )
        apart[kind] = max(apart.get(kind, 0.0), distance)
    return apart


def _work(options: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    with distributed.process_group():
        times, arrays = _measured(options)
        if distributed.rank() == 0:
            out = Path(options.worker)
            np.savez(out.with_suffix(".npz"), **arrays)
            out.with_suffix(".json").write_text(json.dumps(times))


def _measured(options: argparse.Namespace) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    images = _images(options)
    share = images.share(distributed.rank(), distributed.world())
    example = next(iter(images))[0][:2]
    module = load_model(options.models, "none", seed=0).module.eval()
    graph = trace(module, example)
    structure = find_structure(graph, example)
    layers, _ = find_layers(graph, set(graph.graph.nodes))
    list(images)  # decoded once
    score(graph, structure.groups, [next(iter(share))], criterion="lrp")  # nothing is imported while it is timed

    times: dict[str, Any] = {}
    arrays: dict[str, np.ndarray] = {}

    def timed(step: str, work: Callable[[], Any]) -> Any:
        distributed.sum_count(0)  # all begin at once
        begin, sent = time.perf_counter(), distributed.sent_bytes()
        result = work()
        distributed.sum_count(0)
        times[step] = {"seconds": time.perf_counter() - begin, "sent_bytes": distributed.sent_bytes() - sent}
        return result

    scores = timed("scoring", lambda: score(graph, structure.groups, share, criterion="lrp"))
    timed("covariances", lambda: _finished(collect(graph, layers, [inputs for inputs, _ in share])))
    measured = timed("measured loss", lambda: measure_scores(graph, structure, scores, list(images), RANKING))
    budget = Budget("macs", max(0.5, 1.05 * least_share(graph, structure, measured, "macs", RANKING)))
    plan = make_plan(graph, structure, measured, budget, RANKING)
    small, _ = prune(graph, structure, plan)
    slices = slices_of(graph, structure, plan.kept)
    timed("repair", lambda: compensate(graph, small, slices, share))

    criteria = sorted(set(CRITERIA) - set(LEARNED)) if options.all_criteria else ["lrp"]
    for criterion in criteria:
        values = score(graph, structure.groups, share, criterion=criterion).values
        arrays |= {f"{criterion}|{name}": array for name, array in values.items()}
    arrays |= {f"measured|{name}": values for name, values in measured.values.items()}
    arrays |= {f"plan|{name}": kept for name, kept in plan.kept.items()}
    arrays |= {f"repaired|{name}": tensor.numpy() for name, tensor in small.state_dict().items()}
    return times, arrays


def _finished(inputs: Mapping[fx.Node, Inputs]) -> None:
    """Each process needs the covariances of its own groups' readers."""
    for node in distributed.own_share(list(inputs)):
        assert len(inputs[node].covariance)


def _images(options: argparse.Namespace) -> Batches:
    if options.data:
        source = load_images(options.data)
        model = load_model(options.models, "none", seed=0)
        assert model.preprocessing is not None
        how = overridden(model.preprocessing, size=options.size)
        return batches(source.prepared(how).subset(np.arange(options.images)), options.batch)
    generator = torch.Generator().manual_seed(1)
    names = [f"{index:05d}" for index in range(options.images)]
    samples = [Sample(_noise(options.size, generator), torch.tensor(index % 10)) for index in range(options.images)]
    return batches(examples_in_memory("noise", samples, names), options.batch)


def _noise(size: int, generator: torch.Generator) -> Tensor:
    """[3, size, size], smooth."""
    coarse = torch.randn(1, 3, 8, 8, generator=generator)
    return torch.nn.functional.interpolate(coarse, size=(size, size), mode="bicubic")[0]


if __name__ == "__main__":
    main()
