"""Is it faster on a GPU? Random weights, one interleaved run per model, precision and batch size, dense beside pruned.

    python benchmarks/gpu.py --models torchvision:resnet50,torchvision:vit_b_16 --batches 1,8,64
PyTorch eager, compiled and as a captured CUDA graph, ONNX Runtime CUDA; fp32 and fp16. A time is that of the network
alone: images lie on the GPU, and the result is waited for there. Out: a table and, as the last line, JSON; DIR holds
what is done, for each model, options and machine apart. A way that fails says why, and is tried again.
"""

from __future__ import annotations

import argparse
import copy
import functools
import itertools
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from speed import Job, add_network_flags, example_of, ours
from torch import Tensor, fx, nn

from compressor.delivery.networks import captured
from compressor.device.environment import read_environment
from compressor.device.timing import Schedule, compare, time_interleaved
from compressor.export.calibration import collect
from compressor.export.onnx import export_onnx
from compressor.export.precision import to_fp16
from compressor.files import content_hash
from compressor.graph import trace
from compressor.graph.cost import measure_cost

MODELS = "torchvision:resnet50,torchvision:vit_b_16"
PRECISIONS = {"fp32": torch.float32, "fp16": torch.float16}
Run = Callable[[], object]


@dataclass(frozen=True)
class Case:
    """A network, two images of its size on the CPU, where its ONNX file belongs, its MACs."""

    network: fx.GraphModule
    example: Tensor
    file: Path
    macs: int


def main() -> None:
    options = _options()
    if not torch.cuda.is_available():
        raise SystemExit("no GPU: PyTorch finds no CUDA device; speed.py compares on the CPU")
    options.out.mkdir(parents=True, exist_ok=True)
    environment = read_environment()
    print(f"{torch.cuda.get_device_name()}, PyTorch {torch.__version__}, ONNX Runtime {onnxruntime.__version__}")
    print(f"{'model':24} {'batch':>5} {'precision':9} {'way':10} {'dense ms':>9} {'pruned ms':>9}  faster")
    rows = [row for model in options.models.split(",") for row in _rows(options, model, environment.fingerprint)]
    print(json.dumps({"gpu": torch.cuda.get_device_name(), "fingerprint": environment.fingerprint, "rows": rows}))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=MODELS, help="as the command line takes them, comma-separated")
    parser.add_argument("--batches", default="1,8,64")
    parser.add_argument("--ways", default=",".join(WAYS))
    add_network_flags(parser)
    parser.add_argument("--seconds", type=float, default=0.5, help="for each network")
    parser.add_argument("--out", type=Path, default=Path("runs/gpu"))
    return parser.parse_args()


def _rows(options: argparse.Namespace, model: str, fingerprint: str) -> Iterator[dict[str, Any]]:
    """What is on file for these options and this machine, else measured; networks are made if one is missing."""
    given = {k: str(v) for k, v in vars(options).items() if k not in ("models", "batches", "ways", "out")}
    folder = options.out / content_hash([model, given, fingerprint])[:16]
    folder.mkdir(exist_ok=True)
    path = folder / "gpu.jsonl"
    known = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
    cases = functools.cache(lambda: _cases(Job(model, options, folder)))
    wanted = itertools.product(map(int, options.batches.split(",")), PRECISIONS, options.ways.split(","))
    for batch, precision, way in wanted:
        named = {"model": model, "batch": batch, "precision": precision, "way": way}
        row = next((r for r in known if named.items() <= r.items() and "failed" not in r), None)
        if row is None:
            row = named | _measured(cases(), options.seconds, batch, precision, way)
            with path.open("a") as file:
                file.write(json.dumps(row) + "\n")
        print(_line(row), flush=True)
        yield row


def _cases(job: Job) -> dict[str, Case]:
    module, example = example_of(job)
    graph = trace(module, example)
    networks = {"dense": graph, "pruned": ours(job, graph, example)}
    return {
        name: Case(network, example, job.folder / f"{name}.onnx", measure_cost(network).macs)
        for name, network in networks.items()
    }


def _measured(cases: dict[str, Case], seconds: float, batch: int, precision: str, way: str) -> dict[str, Any]:
    shape = cases["dense"].example.shape[1:]
    images = torch.randn(batch, *shape, generator=torch.Generator().manual_seed(2)).cuda()
    try:
        runs = {name: WAYS[way](case, images, precision) for name, case in cases.items()}
        schedule = Schedule(batch=1, rounds=10, seconds=seconds, runs=100, warmup_s=0.3, warmup_limit_s=3)
        subjects = {name: _waited(run) for name, run in runs.items()}
        timings = time_interleaved(subjects, np.zeros((1, 1, 1, 1), np.float32), schedule=schedule)
    except Exception as error:  # a way that does not work here is a result
        return {"failed": f"{type(error).__name__}: {str(error).strip().splitlines()[0][:150] if str(error) else ''}"}
    speedup = compare(timings["dense"], timings["pruned"])
    return {
        "macs_kept": round(cases["pruned"].macs / cases["dense"].macs, 4),
        "dense_ms": round(timings["dense"].p50_ms, 4),
        "pruned_ms": round(timings["pruned"].p50_ms, 4),
        "faster": round(speedup.ratio, 3),
        "interval": [round(speedup.low, 3), round(speedup.high, 3)],
        "n": len(timings["pruned"].samples_ms),
    }


def _waited(run: Run) -> Callable[[object], None]:
    def call(_: object) -> None:
        run()
        torch.cuda.synchronize()

    return call


# ways: a case, images on the GPU and precision in, something to run out


def _eager(case: Case, images: Tensor, precision: str, compiled: bool = False) -> Run:
    placed, images = _placed(case, images, precision)
    function = torch.compile(placed, dynamic=False) if compiled else placed

    def run() -> object:
        with torch.inference_mode():
            return function(images)

    return run


def _graph(case: Case, images: Tensor, precision: str) -> Run:
    network, images = _placed(case, images, precision)
    graph, source, result = captured(network, images)

    def run(_held: object = (network, source, result)) -> None:  # the graph reads and writes their memory
        graph.replay()

    return run


def _placed(case: Case, images: Tensor, precision: str) -> tuple[nn.Module, Tensor]:
    kind = PRECISIONS[precision]
    return copy.deepcopy(case.network).to("cuda", kind), images.to(kind)


def _onnxruntime(case: Case, images: Tensor, precision: str) -> Run:
    """Its CUDA provider through I/O binding, so that nothing is copied; refused where it would fall back to the CPU."""
    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        raise RuntimeError("this onnxruntime has no CUDA provider; install onnxruntime-gpu instead of onnxruntime")
    onnxruntime.preload_dlls()
    source = case.file
    if not source.is_file():
        export_onnx(case.network, case.example, source)
    half = source.with_suffix(".fp16.onnx")
    if precision == "fp16" and not half.is_file():
        to_fp16(source, half, statistics=collect(source, case.example.numpy()))
    path = half if precision == "fp16" else source
    session = onnxruntime.InferenceSession(str(path), providers=["CUDAExecutionProvider"])
    if "CUDAExecutionProvider" not in session.get_providers():
        raise RuntimeError("the CUDA provider did not start")
    binding = session.io_binding()
    entry = session.get_inputs()[0]
    images = images.half() if "float16" in entry.type else images
    kind = np.float16 if images.dtype == torch.float16 else np.float32
    binding.bind_input(entry.name, "cuda", 0, kind, tuple(images.shape), images.data_ptr())
    binding.bind_output(session.get_outputs()[0].name, "cuda")

    def run(_held: Tensor = images) -> object:
        return session.run_with_iobinding(binding)

    return run


WAYS: dict[str, Callable[[Case, Tensor, str], Run]] = {
    "eager": _eager,
    "compiled": functools.partial(_eager, compiled=True),
    "CUDA graph": _graph,
    "ONNX Runtime": _onnxruntime,
}


def _line(row: dict[str, Any]) -> str:
    named = f"{row['model']:24} {row['batch']:5} {row['precision']:9} {row['way']:12}"
    if "failed" in row:
        return f"{named} failed: {row['failed']}"
    low, high = row["interval"]
    return f"{named} {row['dense_ms']:9.3f} {row['pruned_ms']:9.3f} {row['faster']:6.2f}x {low:5.2f}-{high:4.2f}"


if __name__ == "__main__":
    main()
