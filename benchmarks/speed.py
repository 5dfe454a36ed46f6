"""Is it faster? Random weights, one interleaved run per model: what pruning, int8 and both buy on this machine.

Three parts: the latency ratio as a share of the MAC ratio beside torch_pruning's (default), `--precisions` for
pruned, int8 and both on ONNX Runtime CPU, `--engines` for sizes, kernels and pad kernels of TensorRT-RTX engines
built without a GPU. Out: tables and, as the last line, one JSON object; DIR/speed.jsonl holds what is done.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import io
import json
import platform
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch_pruning as tp
from torch import Tensor, fx, nn

from compressor.budgets import Budget
from compressor.device.environment import affinity, read_environment
from compressor.device.timing import Schedule, Timing, compare
from compressor.device.worker import time_files
from compressor.errors import CompressorError
from compressor.export.calibration import collect, ranges
from compressor.export.engines import build_engine, image_profile, supported_targets
from compressor.export.onnx import export_onnx
from compressor.export.precision import to_fp16, to_int8, with_half_rest
from compressor.graph import trace
from compressor.graph.cost import measure_cost
from compressor.inputs.models import load_model
from compressor.planning import RankingOptions, make_plan
from compressor.pruning import find_structure, prune
from compressor.relevance import ScoreOptions, score

MODELS = "torchvision:resnet50,torchvision:mobilenet_v2,torchvision:resnet18,torchvision:vit_b_16"
ENGINES = (
    "torchvision:resnet50,torchvision:mobilenet_v2,torchvision:vit_b_16,torchvision:convnext_tiny,torchvision:swin_t"
)
PRECISIONS = ("fp32", "fp16", "int8")
PEER_MULTIPLE = 8  # unrounded, torch_pruning's ResNet-50 is slower than dense
STEPS = 12  # of bisection over torch_pruning's ratio, which knows no MACs
CALIBRATION = 4  # noise images: ranges of random weights need no more, and speed does not depend on them


@dataclass(frozen=True)
class Job:
    """One model in one part; `folder` keeps its files."""

    model: str
    options: argparse.Namespace
    folder: Path


def main() -> None:
    options = _options()
    torch.set_num_threads(options.threads)
    options.out.mkdir(parents=True, exist_ok=True)
    environment = read_environment()
    machine = environment.machine
    print(f"{machine['cpu'] or platform.machine()}, {options.threads} threads of {machine['cores']} cores")
    results: dict[str, dict[str, Any]] = {}
    for part in options.parts:
        print(f"\n{part}\n{_HEADS[part]}")
        for model in (options.models or (ENGINES if part == "engines" else MODELS)).split(","):
            found = _held(options, part, model, environment.fingerprint)
            for line in _LINES[part](model, found):
                print(line, flush=True)
            results.setdefault(part, {})[model] = found
    print(json.dumps({"fingerprint": environment.fingerprint, "budget": options.budget, **results}))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", default="", help="as the command line takes them, comma-separated")
    add_network_flags(parser)
    parser.add_argument("--seconds", type=float, default=20.0, help="for each network")
    parser.add_argument("--threads", type=int, default=len(affinity()) or 1)
    parser.add_argument("--target", default="SM86", help="of the engines")
    parser.add_argument("--out", type=Path, default=Path("runs/speed"))
    parser.add_argument("--ratio", dest="parts", action="append_const", const="ratio", help="the default part")
    parser.add_argument("--precisions", dest="parts", action="append_const", const="precisions")
    parser.add_argument("--engines", dest="parts", action="append_const", const="engines")
    found = parser.parse_args()
    found.parts = found.parts or ["ratio"]
    return found


def add_network_flags(parser: argparse.ArgumentParser) -> None:
    """What decides the pruned network, as `ours` reads it."""
    parser.add_argument("--budget", type=float, default=0.5, help="share of the MACs that stays")
    parser.add_argument("--multiple", type=int, default=16, help="our widths are multiples of this")
    parser.add_argument("--criterion", default="l1", help="one that needs no images")
    parser.add_argument("--scope", default="uniform", help="global, isomorphic or uniform")
    parser.add_argument("--size", type=int, default=0, help="pixels; 0: the model's own")


def _held(options: argparse.Namespace, part: str, model: str, fingerprint: str) -> dict[str, Any]:
    """The model's figures, from an earlier call with the same options on the same machine if there was one."""
    given = {k: str(v) for k, v in vars(options).items() if k not in ("models", "parts", "out")}
    key = hashlib.sha256(json.dumps([part, model, fingerprint, given]).encode()).hexdigest()[:16]
    path = options.out / "speed.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
    for row in rows:
        if row["key"] == key:
            return row["found"]
    folder = options.out / hashlib.sha256(json.dumps([model, given]).encode()).hexdigest()[:16]
    folder.mkdir(exist_ok=True)
    try:
        found = _PARTS[part](Job(model, options, folder))
    except CompressorError as error:
        sys.exit(f"{model}: {error}")
    with path.open("a") as file:
        file.write(json.dumps({"key": key, "part": part, "model": model, "found": found}) + "\n")
    return found


# networks


def example_of(job: Job) -> tuple[nn.Module, Tensor]:
    """The model with random weights and statistics of real activations, and two images of noise."""
    model = load_model(job.model, "none")
    height, width = model.preprocessing.size if model.preprocessing else (224, 224)
    channels = len(model.preprocessing.mean) if model.preprocessing else 3
    size = (job.options.size or height, job.options.size or width)
    example = torch.randn(2, channels, *size, generator=torch.Generator().manual_seed(1))
    norms = [m for m in model.module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    for norm in norms:  # else activations vanish with depth, and numbers close to zero are slow
        norm.train()
        norm.momentum = 1.0
    with torch.no_grad():
        model.module(example)
    return model.module.eval(), example


def ours(job: Job, graph: fx.GraphModule, example: Tensor) -> fx.GraphModule:
    structure = find_structure(graph, example)
    scores = score(graph, structure.groups, (), criterion=job.options.criterion, options=ScoreOptions())
    ranking = RankingOptions(multiple=job.options.multiple, scope=job.options.scope)
    return prune(graph, structure, make_plan(graph, structure, scores, Budget("macs", job.options.budget), ranking))[0]


def _peer(module: nn.Module, example: Tensor, budget: float) -> nn.Module:
    """torch_pruning: magnitude, uniform, widths rounded to 8; the pruned copy with the most MACs within the budget."""
    dense, low, high = measure_cost(trace(module, example)).macs, 0.0, 1.0
    best: nn.Module | None = None
    for _ in range(STEPS):
        ratio = (low + high) / 2
        small = _peer_pruned(module, example, ratio)
        if measure_cost(trace(small, example)).macs <= budget * dense:
            best, high = small, ratio
        else:
            low = ratio
    if best is None:
        raise RuntimeError(f"no ratio brings it to {budget:g} of the MACs")
    return best


def _peer_pruned(module: nn.Module, example: Tensor, ratio: float) -> nn.Module:
    small = copy.deepcopy(module).requires_grad_(True)
    heads = {m: m.num_heads for m in small.modules() if isinstance(m, nn.MultiheadAttention)}
    heads |= {m.qkv: m.num_heads for m in small.modules() if hasattr(m, "qkv") and hasattr(m, "num_heads")}
    classes = small(example[:1]).shape[1]
    ignored = [m for m in small.modules() if isinstance(m, nn.Linear) and m.out_features == classes]
    with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        tp.pruner.BasePruner(
            small,
            example[:1],
            tp.importance.GroupMagnitudeImportance(p=2),
            pruning_ratio=ratio,
            ignored_layers=ignored,
            round_to=PEER_MULTIPLE,
            num_heads=heads,
            in_channel_groups={},
            out_channel_groups={},
        ).step()
    return small.requires_grad_(False)


def _exported(job: Job, *, peer: bool = False) -> tuple[dict[str, Path], dict[str, int], str]:
    """Files and MACs by name (dense, ours and, if asked for, the peer's) and why there is no peer; made once."""
    record = job.folder / f"files{'-peer' * peer}.json"
    files = {name: job.folder / f"{name}.onnx" for name in ("dense", "torch_pruning", "ours")}
    if not record.is_file():
        module, example = example_of(job)
        graph = trace(module, example)
        networks: dict[str, nn.Module] = {"dense": graph, "ours": ours(job, graph, example)}
        why = ""
        try:
            if peer:
                networks["torch_pruning"] = trace(_peer(module, example, job.options.budget), example)
        except Exception as error:  # another library's failure is a result of the comparison
            why = f"{type(error).__name__}: {str(error).splitlines()[0][:120] if str(error) else ''}"
        for name, network in networks.items():
            export_onnx(network, example, files[name])
        macs = {name: measure_cost(network).macs for name, network in networks.items()}
        record.write_text(json.dumps({"macs": macs, "why": why, "shape": list(example.shape[1:])}))
    held = json.loads(record.read_text())
    return {name: files[name] for name in held["macs"]}, held["macs"], held["why"]


def _noise(job: Job, count: int) -> np.ndarray:
    shape = json.loads(next(job.folder.glob("files*.json")).read_text())["shape"]
    return np.random.default_rng(2).standard_normal((count, *shape), dtype=np.float32)


# parts


def _timed(job: Job, files: dict[str, Path]) -> dict[str, Timing]:
    threads = job.options.threads
    schedule = Schedule(rounds=20, seconds=job.options.seconds, runs=64, threads=threads, cores=affinity()[:threads])
    return time_files(files, _noise(job, 64), schedule=schedule)


def _speedups(timings: dict[str, Timing]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, timing in timings.items():
        speedup = compare(timings["dense"], timing)
        found[name] = {
            "p50_ms": round(timing.p50_ms, 4),
            "n": len(timing.samples_ms),
            "speed_up": round(speedup.ratio, 4),
            "interval": [round(speedup.low, 4), round(speedup.high, 4)],
            "speed_up_quiet": round(_quiet_ms(timings["dense"]) / _quiet_ms(timing), 4),
        }
    return found


def _quiet_ms(timing: Timing) -> float:
    """What a tenth of the runs stay below: on a shared machine, those that nothing interrupted."""
    return float(np.quantile(timing.samples_ms, 0.1))


def _ratio(job: Job) -> dict[str, Any]:
    files, macs, why = _exported(job, peer=True)
    found = _speedups(_timed(job, files))
    for name, row in found.items():
        row["macs_kept"] = round(macs[name] / macs["dense"], 4)
        for name_of, source in (("share_of_mac_ratio", "speed_up"), ("share_quiet", "speed_up_quiet")):
            row[name_of] = round(row[source] * row["macs_kept"], 4)
    return {**found, "no_peer": why}


def _precisions(job: Job) -> dict[str, Any]:
    files, _, _ = _exported(job)
    timed = {"dense": files["dense"], "pruned": files["ours"]}
    for name, source in (("int8", files["dense"]), ("pruned int8", files["ours"])):
        timed[name] = job.folder / f"{name.replace(' ', '-')}.onnx"
        if not timed[name].is_file():
            chosen = ranges(collect(source, _noise(job, CALIBRATION)))
            to_int8(source, timed[name], ranges=chosen, placement="onnxruntime")
    return _speedups(_timed(job, timed))


def _engines(job: Job) -> dict[str, Any]:
    files, _, _ = _exported(job)
    found: dict[str, Any] = {"target": job.options.target}
    for variant, source in (("dense", files["dense"]), ("pruned", files["ours"])):
        statistics = None
        for precision in PRECISIONS:
            path = job.folder / f"{variant}.{precision}.onnx"
            if precision != "fp32" and not path.is_file():
                statistics = statistics or collect(source, _noise(job, CALIBRATION))
                if precision == "fp16":
                    to_fp16(source, path, statistics=statistics)
                else:
                    to_int8(source, path, ranges=ranges(statistics))
                    with_half_rest(path, path, statistics=statistics)
            found[f"{variant} {precision}"] = _engine(job, source if precision == "fp32" else path, variant, precision)
    refused = {name: why for name, why in supported_targets().items() if why and name in ("SM87", "SM90")}
    return {**found, "refused": refused}


def _engine(job: Job, source: Path, variant: str, precision: str) -> dict[str, Any]:
    profile = image_profile(_noise(job, 1).shape[1:], batches=(1, 1, 8))
    path = job.folder / f"{variant}.{precision}.engine"
    try:
        record = build_engine(source, path, target=job.options.target, profiles=profile, precision=precision)
    except CompressorError as error:
        return {"failed": str(error)}
    lowered = record.lowering
    return {
        "bytes": record.size_bytes,
        "kernels": lowered.kernels if lowered.available else None,
        "padded": list(lowered.padded),
        "types": dict(lowered.types),
        "build_s": round(record.build_s, 2),
    }


# tables


def _ratio_lines(model: str, found: dict[str, Any]) -> Iterator[str]:
    for name in ("dense", "torch_pruning", "ours"):
        row = found.get(name)
        if row is None:
            yield f"{model:28} {name:14} failed: {found['no_peer']}"
            continue
        shares = f"{row['share_of_mac_ratio']:9.2f} {row['share_quiet']:9.2f}"
        yield f"{model:28} {name:14} {row['macs_kept']:9.3f} {_faster(row)} {shares} {row['n']:6}"


def _precision_lines(model: str, found: dict[str, Any]) -> Iterator[str]:
    for name, row in found.items():
        yield f"{model:28} {name:14} {_faster(row)} {row['speed_up_quiet']:8.2f}x {row['n']:6}"


def _faster(row: dict[str, Any]) -> str:
    low, high = row["interval"]
    return f"{row['p50_ms']:9.3f} {row['speed_up']:8.2f}x {low:5.2f}-{high:4.2f}"


def _engine_lines(model: str, found: dict[str, Any]) -> Iterator[str]:
    for name, row in found.items():
        if name in ("target", "refused"):
            continue
        if "failed" in row:
            yield f"{model:28} {name:14} failed: {row['failed'][:150]}"
            continue
        kernels = "unknown" if row["kernels"] is None else str(row["kernels"])
        yield f"{model:28} {name:14} {row['bytes']:12,} {kernels:>8} {len(row['padded']):6} {row['build_s']:8.1f}"
    for name, why in found["refused"].items():
        yield f"{model:28} {name:14} refused: {why}"


_PARTS: dict[str, Callable[[Job], dict[str, Any]]] = {"ratio": _ratio, "precisions": _precisions, "engines": _engines}
_LINES: dict[str, Callable[[str, dict[str, Any]], Iterator[str]]] = {
    "ratio": _ratio_lines,
    "precisions": _precision_lines,
    "engines": _engine_lines,
}
_FASTER = f"{'p50 ms':>9} {'speed-up':>9} {'95 %':>10}"
_HEADS = {
    "ratio": f"{'model':28} {'network':14} {'MACs kept':>9} {_FASTER} {'share':>9} {'quiet':>9} {'n':>6}",
    "precisions": f"{'model':28} {'file':14} {_FASTER} {'quiet':>9} {'n':>6}",
    "engines": f"{'model':28} {'engine':14} {'bytes':>12} {'kernels':>8} {'padded':>6} {'build s':>8}",
}


if __name__ == "__main__":
    main()
