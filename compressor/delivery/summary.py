"""Delivery's part of the run's last line: costs, sizes, latency, parity, engines and stages as plain numbers."""

from __future__ import annotations

from typing import Any

from ..device.timing import summarise
from ..records import Accuracy, Cost
from ..stages import Stages
from ..work import Work
from .artifacts import DENSE, SHIPPED, Findings
from .latency import crowd_of


def summary_of(work: Work, found: Findings, dense: Cost, cost: Cost, accuracy: Accuracy) -> dict[str, Any]:
    """`accuracy` is the dense network's, which the precisions' losses count from."""
    latency = _latency(found)
    return {
        "macs_dense": dense.macs,
        "macs_shipped": cost.macs,
        "macs_kept": round(cost.macs / dense.macs, 4),
        "flops_dense": dense.flops,
        "flops_shipped": cost.flops,
        "params_dense": dense.parameters,
        "params_shipped": cost.parameters,
        "onnx_bytes_dense": found.path(DENSE).stat().st_size,
        "onnx_bytes_shipped": found.path(SHIPPED).stat().st_size,
        "latency_ms": latency,
        "busy": crowd_of(found.timings),
        **_ratios(latency),
        "parity_max_abs": max(found.worst_parity(a).max_abs for a in found.artifacts if a.precision == "fp32"),
        "precisions": {a.name: _precision(found, a, accuracy) for a in found.artifacts if a.variant == "shipped"},
        "engines": [
            {k: e[k] for k in ("target", "precision", "path", "library", "library_version", "size_bytes", "status")}
            for e in found.engines
            if e["path"]
        ],
        "not_checked": list(work.not_checked),
    }


def stage_costs(stages: Stages) -> dict[str, Any]:
    """What every stage took when it was done, here or in an earlier process, and their seconds together."""
    costs: dict[str, dict[str, Any]] = {}
    for name, cost in stages.costs.items():
        costs[name] = {"seconds": cost.seconds, "peak_bytes": cost.peak_bytes, "reused": name in stages.reused}
        if cost.gpu_peak_bytes is not None:
            costs[name]["gpu_peak_bytes"] = cost.gpu_peak_bytes
    return {"seconds": round(sum(stages.seconds.values()), 3), "stages": costs}


def _latency(found: Findings) -> dict[str, Any]:
    latency: dict[str, Any] = {}
    for timing in found.timings:
        figures = summarise(timing)
        at = latency.setdefault(timing.runtime, {}).setdefault(str(timing.schedule.batch), {})
        p90 = figures["p90_ms"]
        at[timing.name] = {"p50": round(figures["p50_ms"], 4), "p90": p90 and round(p90, 4)}
    return latency


def _ratios(latency: dict[str, Any]) -> dict[str, float]:
    """Shipped over dense by median latency on ONNX Runtime, both in fp32."""
    return {
        f"latency_ratio_b{batch}": round(at["shipped"]["p50"] / at["dense"]["p50"], 4)
        for batch, at in latency.get("onnxruntime", {}).items()
    }


def _precision(found: Findings, artifact: Any, dense: Accuracy) -> dict[str, Any]:
    measured = found.accuracy[artifact.name]
    return {
        "precision": artifact.precision,
        "bytes": found.path(artifact).stat().st_size,
        "accuracy": round(measured.top1, 4),
        "points_lost": round(100 * (dense.top1 - measured.top1), 2),
        "parity_max_abs": found.worst_parity(artifact).max_abs,
        "layers_in_float": list(found.details.get(artifact.name, {}).get("layers", ())),
    }
