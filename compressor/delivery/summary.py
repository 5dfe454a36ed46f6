"""Delivery's part of the run's last line: costs, sizes, latency, parity, engines and stages as plain numbers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..device.timing import summarise
from ..records import Accuracy, Cost
from ..run.stages import Stages
from ..run.work import Work
from .artifacts import DENSE, SHIPPED, Artifact, Findings
from .latency import crowd_of

_ENGINE_FIELDS = ("target", "precision", "path", "library", "library_version", "size_bytes", "status")


def summary_of(work: Work, findings: Findings, dense: Cost, cost: Cost, accuracy: Accuracy) -> dict[str, Any]:
    """`accuracy` is the dense network's, which the precisions' losses count from.

    Sizes are bytes, latencies milliseconds, `macs_kept` a share of one. Only for a run that no gate stopped.
    """
    latency = _latency(findings)
    fp32 = [artifact for artifact in findings.artifacts if artifact.precision == "fp32"]
    shipped = [artifact for artifact in findings.artifacts if artifact.variant == "shipped"]
    return {
        "macs_dense": dense.macs,
        "macs_shipped": cost.macs,
        "macs_kept": round(cost.macs / dense.macs, 4),
        "flops_dense": dense.flops,
        "flops_shipped": cost.flops,
        "params_dense": dense.parameters,
        "params_shipped": cost.parameters,
        "onnx_bytes_dense": findings.path(DENSE).stat().st_size,
        "onnx_bytes_shipped": findings.path(SHIPPED).stat().st_size,
        "latency_ms": latency,
        "busy": crowd_of(findings.timings),
        **_ratios(latency),
        "parity_max_abs": max(findings.worst_parity(artifact).max_abs for artifact in fp32),
        "precisions": {artifact.name: _precision(findings, artifact, accuracy) for artifact in shipped},
        "engines": [_engine(engine) for engine in findings.engines if engine["path"]],
        "not_checked": list(work.not_checked),
    }


def _engine(record: Mapping[str, Any]) -> dict[str, Any]:
    return {name: record[name] for name in _ENGINE_FIELDS}


def stage_costs(stages: Stages) -> dict[str, Any]:
    """What every stage took when it was done, here or in an earlier process, and their seconds together."""
    costs: dict[str, dict[str, Any]] = {}
    for name, cost in stages.costs.items():
        costs[name] = {"seconds": cost.seconds, "peak_bytes": cost.peak_bytes, "reused": name in stages.reused}
        if cost.gpu_peak_bytes is not None:
            costs[name]["gpu_peak_bytes"] = cost.gpu_peak_bytes
    return {"seconds": round(sum(stages.seconds.values()), 3), "stages": costs}


def _latency(findings: Findings) -> dict[str, Any]:
    """`[runtime][batch size][subject]`, milliseconds; p90 is None where the samples are too few for it to stand."""
    latency: dict[str, Any] = {}
    for timing in findings.timings:
        figures = summarise(timing)
        by_batch = latency.setdefault(timing.runtime, {})
        by_subject = by_batch.setdefault(str(timing.schedule.batch), {})
        p90 = figures["p90_ms"]
        by_subject[timing.name] = {"p50": round(figures["p50_ms"], 4), "p90": None if p90 is None else round(p90, 4)}
    return latency


def _ratios(latency: dict[str, Any]) -> dict[str, float]:
    """Shipped over dense by median latency on ONNX Runtime, both in fp32."""
    return {
        f"latency_ratio_b{batch}": round(by_subject["shipped"]["p50"] / by_subject["dense"]["p50"], 4)
        for batch, by_subject in latency.get("onnxruntime", {}).items()
    }


def _precision(findings: Findings, artifact: Artifact, dense: Accuracy) -> dict[str, Any]:
    measured = findings.accuracy[artifact.name]
    return {
        "precision": artifact.precision,
        "bytes": findings.path(artifact).stat().st_size,
        "accuracy": round(measured.top1, 4),
        "points_lost": round(100 * (dense.top1 - measured.top1), 2),
        "parity_max_abs": findings.worst_parity(artifact).max_abs,
        "layers_in_float": list(findings.details.get(artifact.name, {}).get("layers", ())),
    }
