"""Does memory stay where it is when there are more images? Peaks of scoring, measured loss and repair.

In: a network, numbers of images, their size; images are noise that a file holds, decoded as they are needed. Every
number has a process of its own. Out: a table of peaks in MB (resident set), and as the last line one JSON object.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from compressor.budgets import Budget
from compressor.graph import trace
from compressor.inputs.images import Batches, Preprocessing, batches
from compressor.inputs.models import load_model
from compressor.inputs.sources import load_images
from compressor.planning import RankingOptions, make_plan, measure_scores
from compressor.planning.budget import least_share
from compressor.pruning import find_structure, prune, slices_of
from compressor.relevance import score
from compressor.repair import compensate

RANKING = RankingOptions(normalisation="none", per_cost=1)
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def main() -> None:
    options = _options()
    if options.worker:
        _work(options)
        return
    peaks: dict[int, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        counts = [int(text) for text in options.images.split(",")]
        _make(Path(folder), max(counts), options.size)
        for count in counts:
            given = ["--model", options.model, "--size", str(options.size), "--batch", str(options.batch)]
            command = [sys.executable, __file__, *given, "--worker", folder, "--images", str(count)]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            peaks[count] = json.loads(done.stdout.splitlines()[-1])
            print(f"{count:6} images: " + ", ".join(f"{k} {v:,.0f} MB" for k, v in peaks[count].items()), flush=True)
    print(json.dumps({"model": options.model, "size": options.size, "peaks_mb": peaks}))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="torchvision:resnet50")
    parser.add_argument("--images", default="64,256,1024")
    parser.add_argument("--size", type=int, default=112, help="pixels")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--worker", default="", help=argparse.SUPPRESS)
    return parser.parse_args()


def _make(folder: Path, count: int, size: int) -> None:
    generator = np.random.default_rng(0)
    for index in range(count):
        pixels = generator.integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((size, size), Image.Resampling.BICUBIC).save(folder / f"{index:05d}.jpg")


def _work(options: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    how = Preprocessing((options.size, options.size), (options.size,), "bilinear", MEAN, STD)
    images = load_images(options.worker).prepared(how).subset(np.arange(int(options.images)))
    images = images.labelled(np.arange(len(images)) % 10)
    peaks = _peaks(load_model(options.model, "none", seed=0).module.eval(), batches(images, options.batch))
    print(json.dumps(peaks))


def _peaks(module: torch.nn.Module, images: Batches) -> dict[str, float]:
    example = next(iter(images))[0][:2]
    graph = trace(module, example)
    structure = find_structure(graph, example)
    peaks = {"groups": _peak_mb()}
    scores = score(graph, structure.groups, images, criterion="lrp")
    peaks["scoring"] = _peak_mb()
    scores = measure_scores(graph, structure, scores, images, RANKING)
    peaks["measured loss"] = _peak_mb()
    budget = Budget("macs", max(0.5, 1.05 * least_share(graph, structure, scores, "macs", RANKING)))
    plan = make_plan(graph, structure, scores, budget, RANKING)
    small, _ = prune(graph, structure, plan)
    compensate(graph, small, slices_of(graph, structure, plan.kept), images)
    peaks["repair"] = _peak_mb()
    return peaks


def _peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    main()
