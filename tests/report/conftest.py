"""A report's contents with the shape of a real run's, from a seed; the numbers mean nothing."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from compressor.records import Accuracy, Compensation, Cost, LayerRepair, LeftAlone
from compressor.report import (
    AccuracyRow,
    EngineRow,
    FileRow,
    GateRow,
    GroupRow,
    LatencyRow,
    LayerRow,
    ParetoPoint,
    ParityRow,
    ReportInput,
    ReportPaths,
    StageRow,
    TradePoint,
    write_report,
)


def sample_run(seed: int = 0, groups: int = 14) -> ReportInput:
    rng = np.random.default_rng(seed)
    rows = tuple(_group(rng, i) for i in range(groups))
    return ReportInput(
        model="digits-resnet",
        recipe={"criterion": "lrp", "budget": "macs 0.5", "seed": 0, "round_to": 8, "ridge": 1e-3, "size": (28, 28)},
        environment={"python": "3.11.7", "torch": "2.15.0", "cpu": "2 cores, AVX-512 VNNI", "threads": 2, "gpu": None},
        groups=rows,
        cost_dense=Cost(31_251_200, 272_474, 188_426),
        cost_shipped=Cost(15_102_336, 101_220, 120_010, {}, ("aten.fft_rfft.default",)),
        accuracy=(
            AccuracyRow("dense", Accuracy(713, 719, 719)),
            AccuracyRow("removed", Accuracy(402, 719, 600)),
            AccuracyRow("repaired", Accuracy(701, 719, 719)),
            AccuracyRow("tuned", Accuracy(711, 719, 719)),
            AccuracyRow("shipped", Accuracy(711, 719, 719)),
            AccuracyRow("shipped", Accuracy(710, 719, 719), "int8", "onnxruntime-cpu"),
        ),
        criterion="LRP (epsilon-plus-flat)",
        samples=256,
        budget="50 % of the MACs",
        splits={"calibration": "256 images, sha256 1f0c…", "evaluation": "719 images, sha256 aa31…"},
        left_alone=(LeftAlone("fc", "aten.linear.default", "its outputs are the network's classes"),),
        repair=Compensation(
            (LayerRepair("layer1.0.conv2", "layer1.0.conv2.weight", 1e-3, 0.412, 0.087, 8192),),
            (LeftAlone("up", "aten.conv_transpose2d.input", "a transposed convolution"),),
        ),
        unscored=("layer3.0.downsample",),
        layers=tuple(_layer(rng, i) for i in range(groups + 6)),
        parity=(
            ParityRow("pytorch", "onnxruntime-cpu", "fp32", 1, 1.4e-6, 3.0e-5, 1e-4),
            ParityRow("pytorch", "onnxruntime-cpu", "fp32", 32, 2.2e-6, 4.1e-5, 1e-4),
            ParityRow("pytorch", "onnxruntime-cpu", "int8", 32, 0.31, 0.2, 0.2),
        ),
        latency=tuple(_latency(rng)),
        files=(
            FileRow("dense.onnx", "onnx", "dense", "fp32", 1_102_331),
            FileRow("model.onnx", "onnx", "shipped", "fp32", 421_870),
            FileRow("model.int8.onnx", "CPUs", "shipped", "int8", 121_870, ("layer1.0.conv1", "fc"), "percentile", 7),
        ),
        engines=(
            EngineRow("model.sm89.engine", "tensorrt-rtx", "sm 8.9", "fp16", 301_220, "built, not run: no GPU", 31),
            EngineRow(
                "model.sm87.engine", "tensorrt-rtx", "sm 8.7", "fp16", 0, "refused: TensorRT-RTX does not serve it"
            ),
        ),
        gates=(
            GateRow("removed equals masked", 1e-9, 3.1e-14, True),
            GateRow("accuracy lost", 0.7, 0.28, True, unit="points"),
            GateRow("budget", 0.5, 0.4832, True, unit="of the MACs"),
        ),
        trade=(
            TradePoint("dense", 1.0, 0.9917),
            *(TradePoint("repaired", s, a) for s, a in ((0.8, 0.99), (0.65, 0.986), (0.5, 0.975), (0.35, 0.91))),
            TradePoint("tuned", 0.5, 0.989, chosen=True),
        ),
        pareto=(
            ParetoPoint("dense", 0.21, Accuracy(713, 719, 719), reference=True),
            ParetoPoint("shipped", 0.13, Accuracy(711, 719, 719)),
            ParetoPoint("shipped, int8", 0.11, Accuracy(705, 719, 719)),
        ),
        not_checked=("the TensorRT engine's outputs (no GPU here)", "latency on the target device"),
        stages=(
            StageRow("groups", 1.2, 410_000_000, reused=True),
            StageRow("scores-1", 8.4, 530_000_000, reused=True),
            StageRow("repair-1", 9.4, None),
            StageRow("finetune", 41.0, 820_000_000),
        ),
        shipped="tuned",
    )


def failed_run() -> ReportInput:
    run = sample_run()
    gate = GateRow(
        "accuracy lost", 0.7, 5.2, False, unit="points", remedy="Keep more MACs (--budget), or fine-tune longer."
    )
    return replace(run, gates=(*run.gates[:1], gate))


def _group(rng: np.random.Generator, i: int) -> GroupRow:
    size = (16, 32, 64)[min(i // 5, 2)]
    kind = ("channel", "stream", "head")[i % 3 if i % 7 == 0 else 0]
    scores = rng.gamma(1.2, 1.0, size) - 0.1
    kept = np.sort(np.argsort(-scores)[: max(4, size - 8 * int(rng.integers(0, size // 8)))])
    return GroupRow(f"layer{1 + i // 5}.{i % 5}.conv1", kind, (f"layer{1 + i // 5}.{i % 5}.conv1",), size, kept, scores)


def _layer(rng: np.random.Generator, i: int) -> LayerRow:
    dense = int(rng.integers(4e5, 3e6))
    width = (16, 32, 64)[min(i // 7, 2)]
    kept = float(rng.uniform(0.2, 1))
    name = f"layer{1 + i // 7}.{i % 7}.conv{1 + i % 2}"
    return LayerRow(
        name, "conv2d", width, int(width * kept), dense, int(dense * kept), dense / 2e7, dense * kept / 1.8e7
    )


def _latency(rng: np.random.Generator) -> list[LatencyRow]:
    rows = []
    for runtime, speed in (("onnxruntime-cpu", 1.0), ("pytorch", 2.3)):
        for batch in (1, 32):
            for variant, factor in (("dense", 1.0), ("shipped", 0.58)):
                ms = speed * factor * (0.4 + 0.21 * batch) * rng.gamma(60, 1 / 60, 300)
                ms[rng.integers(0, 300, 3)] *= 4
                found = {"p50": float(np.median(ms)), "p90": float(np.quantile(ms, 0.9)), "p99": None}
                rows.append(LatencyRow(runtime, "fp32", batch, variant, ms, found, threads=2))
    return rows


@pytest.fixture
def run() -> ReportInput:
    return sample_run()


@pytest.fixture(scope="session")
def written(tmp_path_factory: pytest.TempPathFactory) -> ReportPaths:
    """The full report, written once: its plots take seconds."""
    return write_report(sample_run(), tmp_path_factory.mktemp("full") / "report")


@pytest.fixture
def failed() -> ReportInput:
    return replace(failed_run(), groups=(), layers=(), latency=())


@pytest.fixture
def bare() -> ReportInput:
    """A run that only pruned: nothing was measured, exported or checked."""
    full = sample_run()
    return ReportInput("net", {}, {}, full.groups[:1], full.cost_dense, full.cost_shipped, ())
