"""What the job costs, stage by stage: seconds from groups to the repaired network over one forward-and-gradient pass.

    python benchmarks/job_cost.py                                   # six networks at 224 px, 256 images
    python benchmarks/job_cost.py --models torchvision:resnet18 --images 64 --device cuda

Each network runs in a process of its own, with random weights whose normalisations know the images, and the default
recipe. One pass is the network's forward and the gradient of its logits down to the image, over all images, in the
same process right before the job. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, fx, nn

from compressor.budgets import parse_budget
from compressor.choices import ranking_of, repairing_of, scoring_of
from compressor.graph import trace
from compressor.inputs.models import load_model
from compressor.placement import placed, release
from compressor.planning import make_plan
from compressor.pruning import find_structure, identity_error, prune
from compressor.recipe import Recipe, make_recipe
from compressor.relevance import score
from compressor.rounds import Prunable, measure_units, repair_layers

DEFAULT = (
    "torchvision:resnet18,torchvision:resnet50,torchvision:mobilenet_v2,timm:vit_small_patch16_224,"
    "torchvision:swin_t,torchvision:convnext_tiny"
)
T = TypeVar("T")
IDENTITY_IMAGES = 4
COUNTED = ("groups", "scores", "measured", "plan", "identity", "repair")  # what the ratio counts


def main() -> None:
    options = _options()
    names = options.models.split(",")
    run = _in_a_child if len(names) > 1 else lambda name: measure(name, options)
    found = {name: run(name) for name in names}
    print(json.dumps({"models": found}))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=DEFAULT, help="comma-separated names")
    parser.add_argument("--weights", default="none", help="none, default, or a file for a single model")
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--size", type=int, default=224, help="pixels")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--recipe", action="append", default=[], help="field=value of the recipe, repeatable")
    return parser.parse_args()


def _in_a_child(name: str) -> dict[str, Any]:
    """The same command for one network alone, so that its peak memory is its own."""
    flags = list(sys.argv[1:])
    while "--models" in flags:
        at = flags.index("--models")
        del flags[at : at + 2]
    done = subprocess.run(
        [sys.executable, __file__, "--models", name, *flags], stdout=subprocess.PIPE, text=True, check=False
    )
    if done.returncode:
        return {"failed": f"exit code {done.returncode}"}
    *table, last = done.stdout.splitlines()
    print("\n".join(table), flush=True)
    found: dict[str, Any] = json.loads(last)["models"][name]
    return found


class Stages:
    """Seconds and peak bytes of each stage."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.rows: dict[str, dict[str, float]] = {}

    def time(self, name: str, stage: Callable[[], T]) -> T:
        reset_peak(self.device)
        begin = time.perf_counter()
        found = stage()
        _settled(self.device)
        seconds = time.perf_counter() - begin
        self.rows[name] = {"seconds": round(seconds, 3), "peak_bytes": peak_bytes(self.device)}
        print(f"  {name:12} {seconds:8.2f} s  {self.rows[name]['peak_bytes'] / 1e9:6.2f} GB", flush=True)
        return found


def _settled(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        Path("/proc/self/clear_refs").write_text("5")  # the resident peak starts anew


def peak_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))


def measure(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """One network: the pass, every stage, and what they come to."""
    torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    fields = dict(pair.split("=", 1) for pair in options.recipe)
    recipe = make_recipe({"model": name, **fields})
    print(f"{name}, {options.images} images of {options.size} px, {options.threads} threads, {device}", flush=True)
    module, batches = subjects(name, recipe, options)
    stages = Stages(device)
    graph = stages.time("trace", lambda: placed(trace(module, batches[0][0][:2]), device))
    passes = [_timed(lambda: gradient_pass(graph, batches, device), device) for _ in range(2)]
    stages.rows["one pass"] = {"seconds": round(statistics.median(passes), 3)}
    print(f"  {'one pass':12} {statistics.median(passes):8.2f} s", flush=True)
    release()  # of the passes' gradients, which the job has no part in
    error = job(graph, recipe, batches, stages)
    seconds = sum(stages.rows[stage]["seconds"] for stage in COUNTED)
    ratio = seconds / statistics.median(passes)
    peak = max(stages.rows[stage]["peak_bytes"] for stage in COUNTED)
    print(f"  {'together':12} {seconds:8.2f} s  {peak / 1e9:6.2f} GB, {ratio:.1f} passes; identity {error:.1e}")
    return {"ratio": round(ratio, 2), "seconds": round(seconds, 2), "peak_bytes": peak, "stages": stages.rows}


def subjects(name: str, recipe: Recipe, options: argparse.Namespace) -> tuple[nn.Module, list[tuple[Tensor, Tensor]]]:
    """The network and its batches: smooth noise, as photographs are, and labels."""
    module = load_model(name, options.weights, seed=0).module.eval()
    generator = torch.Generator().manual_seed(0)
    coarse = torch.randn(options.images, 3, 14, 14, generator=generator)
    images = nn.functional.interpolate(coarse, size=(options.size, options.size), mode="bicubic")
    images += 0.1 * torch.randn(images.shape, generator=generator)
    labels = torch.arange(options.images) % 10
    if options.weights == "none":
        settle(module, images[:32])
    return module, list(zip(images.split(recipe.batch_size), labels.split(recipe.batch_size), strict=True))


def settle(module: nn.Module, images: Tensor) -> None:
    """Fresh batch normalisations learn their statistics: activations that vanish would time denormal numbers."""
    for norm in [m for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]:
        norm.train().momentum = 1.0
    with torch.no_grad():
        module(images)
    module.eval()


def gradient_pass(graph: fx.GraphModule, batches: list[tuple[Tensor, Tensor]], device: torch.device) -> None:
    for parameter in graph.parameters():
        parameter.requires_grad_(False)
    for images, labels in batches:
        leaf = images.to(device).requires_grad_()
        logits = graph(leaf)
        torch.autograd.grad(logits[torch.arange(len(labels)), labels.to(device)].sum(), leaf)


def _timed(run: Callable[[], object], device: torch.device) -> float:
    _settled(device)
    begin = time.perf_counter()
    run()
    _settled(device)
    return time.perf_counter() - begin


def job(graph: fx.GraphModule, recipe: Recipe, batches: list[tuple[Tensor, Tensor]], stages: Stages) -> float:
    """The run's own stages, from groups to the repaired network; the identity check's error."""
    example = batches[0][0][:2].to(next(graph.parameters()).device)
    structure = stages.time("groups", lambda: find_structure(graph, example, recipe.seed))
    scoring, ranking = scoring_of(recipe), ranking_of(recipe)
    scores = stages.time(
        "scores",
        lambda: score(graph, structure.groups, batches, criterion=scoring.criterion, options=scoring.options),
    )
    if scoring.measured:
        subject, unmeasured = Prunable(graph, structure), scores
        scores = stages.time("measured", lambda: measure_units(subject, unmeasured, batches, ranking))
    plan = stages.time("plan", lambda: make_plan(graph, structure, scores, parse_budget(recipe.budget), ranking))
    small, slices = prune(graph, structure, plan)
    images = batches[0][0][:IDENTITY_IMAGES]
    error = stages.time("identity", lambda: identity_error(graph, small, structure, plan.kept, images))
    repaired = copy.deepcopy(small)
    repairing = repairing_of(recipe)
    record = stages.time("repair", lambda: repair_layers(graph, repaired, slices, batches, repairing=repairing))
    print(f"  {len(record.repaired)} layers refitted, {plan.macs_kept / plan.macs_dense:.1%} of the MACs")
    return error


if __name__ == "__main__":
    main()
