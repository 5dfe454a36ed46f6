"""How the job's cost grows with images, units, depth and processes, and what that makes of ImageNet on GPUs.

    python benchmarks/scaling.py                                # two families of networks, half an hour on one core
    python benchmarks/scaling.py --models torchvision:resnet50,torchvision:vit_l_16 --images 192,320

Every operation of scoring, measured loss and repair is counted while they run: arithmetic in float32 and in float64,
and the bytes that are read and written. A line through the counts at several numbers of images tells what a step costs
once (solving, which grows with the units of a layer) and for each image (passes, which grow with the network's MACs).
A processor of known speed then takes at least arithmetic over its speed plus bytes over its memory's; how many times
that a core of this machine takes, whose speeds are measured first, is measured too, and GPUs are taken to lose as
much, and never to gain.
Fewer than 160 images are not on the line: up to there the probes and refits of measured losses grow with them. Out:
tables, and as the last line one JSON object.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from compressor.budgets import Budget
from compressor.graph import trace
from compressor.graph.cost import measure_cost
from compressor.inputs.models import load_model
from compressor.planning import RankingOptions, make_plan, measure_scores
from compressor.planning.budget import least_share
from compressor.planning.covariance import features_of
from compressor.pruning import find_structure, prune, slices_of
from compressor.relevance import score
from compressor.repair import compensate
from compressor.repair.consumers import find_layers

RANKING = RankingOptions(normalisation="none", per_cost=1)
RESNETS = "torchvision:resnet18,torchvision:resnet50"
TRANSFORMERS = "timm:vit_small_patch16_224,timm:vit_base_patch16_224"
STEPS = ("scoring", "measured loss", "repair")
IMAGENET = 1_281_167  # training images
USUAL_PX = 224
PASSES, BATCH = 10, 256  # of a recovery over them
SCORES_BYTES = 1e6  # a number in float64 for each of 100,000 units
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Processor:
    """What one does at its best: operations a second in both precisions, bytes a second from its memory.

    `link` are the bytes a second between the processors of a machine, `network` those between machines, for each
    processor.
    """

    name: str
    float32: float
    float64: float
    memory: float
    link: float = 300e9
    network: float = 25e9 / 8

    def least_s(self, work: Work) -> float:
        """Nothing overlaps, and nothing waits."""
        return work.float32 / self.float32 + work.float64 / self.float64 + work.moved_bytes / self.memory


# Of their makers' data sheets: float32 without TF32, float64 with the tensor cores that have it.
GPUS = (
    Processor("A100 80 GB", 19.5e12, 19.5e12, 2.0e12),
    Processor("H100 SXM", 67e12, 67e12, 3.35e12, link=450e9, network=50e9),
    Processor("RTX 4090", 82.6e12, 1.3e12, 1.0e12, link=25e9),
)
PER_MACHINE = 8


@dataclass
class Work:
    """Multiplications and additions by precision, and bytes read and written."""

    float32: float = 0.0
    float64: float = 0.0
    moved_bytes: float = 0.0

    @property
    def operations(self) -> float:
        return self.float32 + self.float64

    def scaled(self, by: float) -> Work:
        return Work(self.float32 * by, self.float64 * by, self.moved_bytes * by)


@dataclass
class Step:
    """What a step did, and the seconds that this machine's core was busy with it."""

    work: Work
    seconds: float


class Counter(TorchDispatchMode):
    """Counts what runs inside, forward, backward and factorisations."""

    def __init__(self) -> None:
        super().__init__()
        self.work = Work()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if getattr(func, "is_view", False):
            return out
        tensors = [leaf for leaf in tree_leaves((args, kwargs, out)) if isinstance(leaf, Tensor)]
        if not tensors:
            return out
        operations = _operations(func, args, kwargs, out) or float(max(tensor.numel() for tensor in tensors))
        if any(tensor.dtype == torch.float64 for tensor in tensors):
            self.work.float64 += operations
        else:
            self.work.float32 += operations
        self.work.moved_bytes += sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        return out


def _operations(func: Any, args: Any, kwargs: Any, out: Any) -> float:
    """Multiplications and additions of products, convolutions and factorisations; 0 for what goes entry by entry."""
    packet = func._overloadpacket
    name = packet.__name__
    if name in FACTORISATIONS:
        matrices = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor) and leaf.dim() >= 2]
        rows, columns = matrices[0].shape[-2:]
        several = math.prod(matrices[0].shape[:-2])
        right = matrices[1].shape[-1] if len(matrices) > 1 else 0
        return several * FACTORISATIONS[name](rows, columns, right)
    if packet in flop_registry:
        return float(flop_registry[packet](*args, **kwargs, out_val=out))
    return 0.0


# LAPACK's own counts (working note 41), for a matrix [m, n] and k right sides; eigenvalues with vectors as a rule of
# thumb. Of `cholesky_solve(b, factor)` and its like the first matrix may be the right side: both are square or wide.
FACTORISATIONS: Mapping[str, Callable[[int, int, int], float]] = {
    "linalg_cholesky_ex": lambda m, n, k: m**3 / 3,
    "linalg_solve_triangular": lambda m, n, k: m * n * k,
    "cholesky_solve": lambda m, n, k: 2 * m * m * n,
    "cholesky_inverse": lambda m, n, k: 2 * m**3 / 3,
    "linalg_inv_ex": lambda m, n, k: 2 * m**3,
    "_linalg_solve_ex": lambda m, n, k: 2 * m**3 / 3 + 2 * m * m * max(k, 1),
    "linalg_qr": lambda m, n, k: 2 * m * n * n - 2 * n**3 / 3,
    "_linalg_eigh": lambda m, n, k: 9 * m**3,
}


def main() -> None:
    options = _options()
    if options.worker:
        print(json.dumps(_measured(options.worker, options)))
        return
    networks = {name: _in_a_child(name) for name in options.models.split(",")}
    print(json.dumps({"networks": networks}))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=f"{RESNETS},{TRANSFORMERS}")
    parser.add_argument("--images", default="192,256,320", help="numbers of them, ascending")
    parser.add_argument("--size", type=int, default=64, help="pixels of those that are run; the tables are of 224")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--worker", default="", help=argparse.SUPPRESS)
    return parser.parse_args()


def _in_a_child(name: str) -> dict[str, Any]:
    command = [sys.executable, __file__, *sys.argv[1:], "--worker", name]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    *table, last = done.stdout.splitlines()
    print("\n".join(table), flush=True)
    found: dict[str, Any] = json.loads(last)
    return found


def _measured(name: str, options: argparse.Namespace) -> dict[str, Any]:
    torch.set_num_threads(1)
    core = _this_core()
    module = load_model(name, "none", seed=0).module.eval()
    network = _network(_at(module, USUAL_PX), USUAL_PX)
    counts = [int(text) for text in options.images.split(",")]
    runs = {count: _run(_at(module, options.size), options, count) for count in counts}
    lines = {step: _line([(count, runs[count][step]) for count in counts], core) for step in STEPS}

    macs = _network(module, options.size)["macs"]
    print(f"{name}: {network['macs'] / 1e9:.2f} G MACs at 224 px, {network['parameters'] / 1e6:.1f} M parameters")
    print(
        f"  {'':14} {'once':>10} {'float64':>8} {'an image':>10} {'forwards':>9} {'off line':>9} {'core / least':>13}"
    )
    for step, line in lines.items():
        print(
            f"  {step:14} {line.once.operations / 1e12:8.3f} T {line.once.float64 / line.once.operations:8.0%} "
            f"{line.image.operations / 1e9:8.2f} G {line.image.operations / (2 * macs):9.1f} {line.off:9.1%} "
            f"{line.behind:13.1f}"
        )
    larger = network["macs"] / macs  # passes grow with the image
    projected = {gpu.name: _projected(gpu, network, lines, larger) for gpu in GPUS}
    steps = {step: asdict(line) for step, line in lines.items()}
    return {"network": network, "steps": steps, "core": asdict(core), "projected": projected}


def _this_core() -> Processor:
    """Products of matrices that fit the cache, copies of arrays that don't."""

    def rate(work: Callable[[], object], amount: float) -> float:
        times = []
        for _ in range(5):
            begin = time.process_time()
            work()
            times.append(time.process_time() - begin)
        return amount / min(times)

    single, double, large = torch.randn(768, 768), torch.randn(768, 768, dtype=torch.float64), torch.randn(1 << 25)
    return Processor(
        "this core",
        float32=rate(lambda: single @ single, 2 * 768**3),
        float64=rate(lambda: double @ double, 2 * 768**3),
        memory=rate(large.clone, 2.0 * large.numel() * large.element_size()),
    )


def _network(module: nn.Module, size: int) -> dict[str, float]:
    """What passes and sums of processes depend on."""
    example = torch.zeros(2, 3, size, size)
    graph = trace(module, example)
    layers, _ = find_layers(graph, set(graph.graph.nodes))
    cost = measure_cost(graph)
    features = [features_of(graph, layer) for layer in layers.values()]
    return {
        "macs": float(cost.macs),
        "parameters": float(cost.parameters),
        "covariance_bytes": float(8 * sum(count**2 for count in features)),
    }


def _run(module: nn.Module, options: argparse.Namespace, count: int) -> dict[str, Step]:
    """The three steps over `count` images."""
    generator = torch.Generator().manual_seed(1)
    coarse = torch.randn(count, 3, 8, 8, generator=generator)
    pixels = nn.functional.interpolate(coarse, size=(options.size, options.size), mode="bicubic")
    batches = list(zip(pixels.split(options.batch), (torch.arange(count) % 10).split(options.batch), strict=True))
    found: dict[str, Step] = {}

    def counted(step: str, work: Callable[[], T]) -> T:
        begin = time.process_time()
        with Counter() as counter:
            result = work()
        found[step] = Step(counter.work, time.process_time() - begin)
        return result

    graph = trace(module, pixels[:2])
    structure = find_structure(graph, pixels[:2])
    scores = counted("scoring", lambda: score(graph, structure.groups, batches, criterion="lrp"))
    measured = counted("measured loss", lambda: measure_scores(graph, structure, scores, batches, RANKING))
    budget = Budget("macs", max(0.5, 1.05 * least_share(graph, structure, measured, "macs", RANKING)))
    plan = make_plan(graph, structure, measured, budget, RANKING)
    small, _ = prune(graph, structure, plan)
    slices = slices_of(graph, structure, plan.kept)
    counted("repair", lambda: compensate(graph, small, slices, batches))
    return found


def _at(module: nn.Module, size: int) -> nn.Module:
    """A transformer that takes images of that size."""
    if hasattr(module, "set_input_size"):
        module.set_input_size((size, size))
    return module


@dataclass(frozen=True, slots=True)
class Line:
    """What a step takes once and for each image, how far counts lie off that, and how long a core takes.

    `off` is a share of the largest count, `behind` the seconds of a core over the least that its speeds allow.
    """

    once: Work
    image: Work
    off: float
    behind: float
    seconds: Mapping[int, float]  # by number of images


def _line(runs: Sequence[tuple[int, Step]], core: Processor) -> Line:
    """Least squares over the number of images."""
    counts = np.array([count for count, _ in runs], np.float64)
    fits = {}
    for kind in ("float32", "float64", "moved_bytes"):
        fits[kind] = np.polyfit(counts, [getattr(step.work, kind) for _, step in runs], 1)
    image = Work(**{kind: max(0.0, float(slope)) for kind, (slope, _) in fits.items()})
    once = Work(**{kind: max(0.0, float(start)) for kind, (_, start) in fits.items()})
    operations = np.array([step.work.operations for _, step in runs])
    off = np.abs(once.operations + counts * image.operations - operations).max() / operations.max()
    least = sum(core.least_s(step.work) for _, step in runs)
    seconds = {count: step.seconds for count, step in runs}
    return Line(once, image, float(off), sum(seconds.values()) / least, seconds)


def _projected(
    gpu: Processor, network: Mapping[str, float], lines: Mapping[str, Line], larger: float
) -> dict[str, dict[int, dict[str, Any]]]:
    """Seconds of each step with all of ImageNet at 224 px on 1, 8 and 64 GPUs, and what takes most of them."""
    rows = {}
    for step, line in lines.items():
        passes_s = max(1.0, line.behind) * gpu.least_s(line.image.scaled(larger * IMAGENET))
        sent = SCORES_BYTES if step == "scoring" else network["covariance_bytes"]
        solving_s = max(1.0, line.behind) * gpu.least_s(line.once)
        rows[step] = _on_several(gpu, passes_s, solving_s, sent, shared=step == "measured loss")
    # the dense network forward, half of it forward and twice backward; memory as scoring has it for its arithmetic
    scoring = lines["scoring"]
    share = 2 * network["macs"] * (1 + 3 * 0.5) / (scoring.image.operations * larger)
    passes_s = max(1.0, scoring.behind) * gpu.least_s(scoring.image.scaled(share * larger * IMAGENET * PASSES))
    rows["recovery"] = _on_several(gpu, passes_s, 0.0, 4 * network["parameters"] * PASSES * IMAGENET / BATCH)

    print(f"  {gpu.name}, {IMAGENET:,} images of {USUAL_PX} px, recovery {PASSES} passes over them")
    for step, numbers in rows.items():
        told = [f"{number}: {_time(row['together'])} ({row['binds']})" for number, row in numbers.items()]
        print(f"    {step:14} " + "   ".join(told))
    return rows


def _on_several(
    gpu: Processor, passes_s: float, solving_s: float, sent: float, *, shared: bool = False
) -> dict[int, dict[str, Any]]:
    """Seconds on 1, 8 and 64: passes are shared out, solving only where a group is one process's.

    Sums go round a ring: each of n processes sends 2 (n - 1) / n of the `sent` bytes.
    """
    rows = {}
    for number in (1, PER_MACHINE, 64):
        bandwidth = gpu.link if number <= PER_MACHINE else gpu.network
        parts = {
            "passes": passes_s / number,
            "solving": solving_s / (number if shared else 1),
            "sums": 2 * (number - 1) / number * sent / bandwidth,
        }
        rows[number] = {**parts, "together": sum(parts.values()), "binds": max(parts, key=lambda part: parts[part])}
    return rows


def _time(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


if __name__ == "__main__":
    main()
