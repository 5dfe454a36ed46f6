"""What LRP costs beside a gradient: time and peak memory of one relevance pass over forward + input gradient.

In: model names as the command line takes them. Out: a table and, as the last line, one JSON object. Plain zennit
(its EpsilonPlusFlat composite hooked to the model's modules) is measured beside it in the same process, rounds
interleaved. Relevance goes down to the image and is reduced to channel sums at every layer, as scoring does.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import platform
import re
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import zennit.attribution
import zennit.canonizers
import zennit.composites
import zennit.torchvision
from torch import Tensor, fx, nn

from compressor.errors import ModelError
from compressor.graph import trace
from compressor.inputs.models import load_model
from compressor.relevance import lrp

DEFAULT = "torchvision:resnet18,torchvision:resnet50,torchvision:vgg11_bn,torchvision:mobilenet_v2,torchvision:vit_b_16"
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # glibc's names for mallopt


def main() -> None:
    options = _options()
    torch.set_num_threads(options.threads)
    print(
        f"torch {torch.__version__}, {options.threads} threads, batch {options.batch}, {platform.processor() or 'cpu'}"
    )
    print(f"{'model':32} {'gradient s':>10} {'zennit x':>9} {'ours x':>7} {'memory x':>9} {'difference':>11}")
    results = {name: _measure(name, options) for name in re.split(r",(?![^()]*\))", options.models)}
    print(json.dumps({"models": results}))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--models", default=DEFAULT, help="comma-separated, as `compressor compress --model` takes them"
    )
    parser.add_argument("--weights", default="none")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--size", type=int, default=0, help="pixels; 0: the model's own, else 224")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cpu")
    return parser.parse_args()


def _measure(name: str, options: argparse.Namespace) -> dict[str, float]:
    model, images = _model_and_images(name, options)
    targets = torch.zeros(len(images), dtype=torch.long, device=images.device)
    graph = trace(model, images[:2])
    prepared = lrp.prepare(graph)
    nodes = [n.name for n in prepared.canon.weighted] + [n.name for n in graph.graph.nodes if n.op == "placeholder"]
    plain = lrp.prepare(graph, lrp.LrpOptions(fast=False))
    passes: dict[str, Callable[[], Any]] = {
        "gradient": lambda: _gradient(model, images),
        "zennit": _plain(model, images, lambda: plain(images, targets, nodes, take=_channel_sums)),
        "ours": lambda: prepared(images, targets, nodes, take=_channel_sums),
    }
    seconds = _interleaved(passes, options.rounds)
    peaks = {key: _peak_bytes(run, images.device) for key, run in passes.items() if key != "zennit"}
    result = {
        "time_ratio": _ratio(seconds, "ours"),
        "memory_ratio": (peaks["ours"] + _own_bytes(prepared, graph)) / max(peaks["gradient"], 1),
        "plain_time_ratio": _ratio(seconds, "zennit"),
        "max_difference": _difference(passes["ours"](), plain(images, targets, nodes, take=_channel_sums)),
    }
    print(
        f"{name:32} {statistics.median(seconds['gradient']):10.3f} {result['plain_time_ratio']:9.2f} "
        f"{result['time_ratio']:7.2f} {result['memory_ratio']:9.2f} {result['max_difference']:11.1e}",
        flush=True,
    )
    return result


def _model_and_images(name: str, options: argparse.Namespace) -> tuple[nn.Module, Tensor]:
    try:
        loaded = load_model(name, options.weights)
    except ModelError:
        if ":" in name:
            raise
        loaded = load_model(f"torchvision:{name}", options.weights)
    own = loaded.preprocessing.size if loaded.preprocessing else (224, 224)
    size = (options.size, options.size) if options.size else own
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(options.batch, 3, *size, generator=generator)
    model = loaded.module.requires_grad_(False)
    if options.weights == "none":
        _settle(model, images)
    return model.to(options.device), images.to(options.device)


def _settle(model: nn.Module, images: Tensor) -> None:
    """BatchNorm statistics of fresh weights from the images: activations that vanish would time denormal numbers."""
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    for norm in norms:
        norm.train().momentum = 1.0
    with torch.no_grad():
        model(images)
    model.eval()


def _gradient(model: nn.Module, images: Tensor) -> Tensor:
    leaf = images.clone().requires_grad_()
    return torch.autograd.grad(model(leaf)[:, 0].sum(), leaf)[0]


def _plain(model: nn.Module, images: Tensor, ours: Callable[[], Any]) -> Callable[[], Any]:
    """Zennit's hooks on the model; where they can't run it (nn.MultiheadAttention), its rules on our graph."""
    try:
        _zennit(model, images[:1])
    except RuntimeError as error:
        print(f"zennit can't run this model: {str(error).splitlines()[0]}; its rules on the traced graph instead")
        return ours
    return lambda: _zennit(model, images)


def _zennit(model: nn.Module, images: Tensor) -> Tensor:
    names = [type(m).__name__ for m in model.modules()]
    if "BasicBlock" in names or "Bottleneck" in names:
        canonizers = [zennit.torchvision.ResNetCanonizer()]
    else:
        canonizers = [zennit.canonizers.SequentialMergeBatchNorm()]
    composite = zennit.composites.EpsilonPlusFlat(canonizers=canonizers)
    with zennit.attribution.Gradient(model, composite) as attributor:
        found: Tensor = attributor(images, _one_hot)[1]
    return found


def _one_hot(logits: Tensor) -> Tensor:
    start = torch.zeros_like(logits)
    start[:, 0] = 1.0
    return start


def _channel_sums(name: str, relevance: Tensor) -> Tensor:
    return relevance.sum(tuple(range(2, relevance.dim()))) if relevance.dim() > 2 else relevance


def _interleaved(passes: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    seconds: dict[str, list[float]] = {key: [] for key in passes}
    for number in range(rounds + 1):  # the first round warms up
        for key, run in passes.items():
            before = time.perf_counter()
            run()
            _wait()
            if number:
                seconds[key].append(time.perf_counter() - before)
    return seconds


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _ratio(seconds: dict[str, list[float]], key: str) -> float:
    """The median over rounds of a round's own ratio: what else the machine does meets both alike."""
    return statistics.median(a / b for a, b in zip(seconds[key], seconds["gradient"], strict=True))


def _peak_bytes(run: Callable[[], Any], device: torch.device) -> int:
    """Memory a pass takes above what was there before it: allocator's peak on a GPU, resident peak on a CPU."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    if sys.platform != "linux":
        return 0
    libc = ctypes.CDLL(None)
    libc.mallopt(_MMAP_THRESHOLD, 1 << 18)  # what is freed goes back to the system, so that the peak is the pass's
    run()
    libc.malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # resets the resident peak
    before = _status_bytes("VmRSS")
    run()
    peak = _status_bytes("VmHWM") - before
    libc.mallopt(_MMAP_THRESHOLD, 1 << 25)  # where glibc's own adaptation ends up, as it was for the timing
    libc.mallopt(_TRIM_THRESHOLD, 1 << 26)
    return peak


def _status_bytes(field: str) -> int:
    line = next(row for row in Path("/proc/self/status").read_text().splitlines() if row.startswith(field))
    return int(line.split()[1]) * 1024


def _own_bytes(prepared: lrp.Prepared, graph: fx.GraphModule) -> int:
    """Weights that preparing made besides the graph's: the merged ones."""
    shared = {t.data_ptr() for t in graph.state_dict().values()}
    made = [w.layer.weight for w in prepared.canon.weighted.values()]
    return sum(t.numel() * t.element_size() for t in made if t.data_ptr() not in shared)


def _difference(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    """Largest deviation of a layer's channel relevance from zennit's own rules, in shares of the layer's largest."""
    return max(float((ours[n] - theirs[n]).abs().max() / theirs[n].abs().max().clamp_min(1e-30)) for n in theirs)


if __name__ == "__main__":
    main()
