"""Delivery's part of the run's last line: costs, sizes, latency, parity, engines and stages as plain numbers."""

from __future__ import annotations

from typing import TypedDict

from ..device.external import model_bytes
from ..device.runtimes import REFERENCE
from ..device.timing import summarise
from ..records import Cost, Figure
from ..run.stages import Stages
from .artifacts import DENSE, SHIPPED, Artifact
from .results import Delivery, Engine

_ENGINE_FIELDS = ("target", "precision", "path", "library", "library_version", "size_bytes", "status")


class Percentiles(TypedDict):
    """Milliseconds; p90 is None where the samples are too few for it to stand."""

    p50: float
    p90: float | None


Latencies = dict[str, dict[str, dict[str, Percentiles]]]  # [runtime][batch size][subject]


def summary_of(delivery: Delivery, dense: Cost, cost: Cost, accuracy: Figure) -> dict[str, object]:
    """What a run's summary says of its files, engines and timings; `dense` and `cost` are those of both networks.

    `accuracy` is the dense network's figure, which the precisions' losses count from. Sizes are bytes, latencies
    milliseconds, `macs_kept` a share of one. Only for a run that no gate stopped.
    """
    latency, files = _latency(delivery), delivery.files
    dense_file = files.paths.get(DENSE, files.paths[SHIPPED])  # one file where the network ships as it is
    survived, masks = delivery.survival.figure, delivery.survival.masks
    fp32 = [artifact for artifact in files.artifacts if artifact.precision == "fp32"]
    return {
        "macs_dense": dense.macs,
        "macs_shipped": cost.macs,
        "macs_kept": round(cost.macs / dense.macs, 4),
        "flops_dense": dense.flops,
        "flops_shipped": cost.flops,
        "params_dense": dense.parameters,
        "params_shipped": cost.parameters,
        "onnx_bytes_dense": model_bytes(dense_file),
        "onnx_bytes_shipped": model_bytes(files.paths[SHIPPED]),
        "latency_ms": latency,
        "busy": delivery.latency.busy,
        **_ratios(latency),
        "parity_max_abs": max(delivery.parity.worst(artifact).max_abs for artifact in fp32),
        "precisions": {artifact.name: _precision(delivery, artifact, accuracy) for artifact in files.shipped},
        "engines": [_engine(engine) for engine in delivery.engines.built],
        "explanation_shipped": None if survived is None else round(survived.value, 4),
        "selector_masks_shipped": None if masks is None else round(masks.value, 4),
        "not_checked": list(delivery.checks.not_checked),
    }


def _engine(engine: Engine) -> dict[str, object]:
    return {name: getattr(engine, name) for name in _ENGINE_FIELDS}


def stage_costs(stages: Stages) -> dict[str, object]:
    """What every stage took when it was done, here or in an earlier process, and their seconds together."""
    costs: dict[str, dict[str, object]] = {}
    for name, cost in stages.costs.items():
        costs[name] = {"seconds": cost.seconds, "peak_bytes": cost.peak_bytes, "reused": name in stages.reused}
        if cost.gpu_peak_bytes is not None:
            costs[name]["gpu_peak_bytes"] = cost.gpu_peak_bytes
    return {"seconds": round(sum(stages.seconds.values()), 3), "stages": costs}


def _latency(delivery: Delivery) -> Latencies:
    latency: Latencies = {}
    for timing in delivery.latency.timings:
        figures = summarise(timing)
        by_batch = latency.setdefault(timing.runtime, {})
        by_subject = by_batch.setdefault(str(timing.schedule.batch), {})
        p90 = figures["p90_ms"]
        by_subject[timing.name] = {"p50": round(figures["p50_ms"], 4), "p90": None if p90 is None else round(p90, 4)}
        if DENSE not in delivery.files.paths and timing.name == SHIPPED.subject:
            by_subject[DENSE.subject] = by_subject[timing.name]
    return latency


def _ratios(latency: Latencies) -> dict[str, float]:
    """Shipped over dense by median latency on ONNX Runtime, both in fp32."""
    return {
        f"latency_ratio_b{batch}": round(by_subject["shipped"]["p50"] / by_subject["dense"]["p50"], 4)
        for batch, by_subject in latency.get(REFERENCE, {}).items()
    }


def _precision(delivery: Delivery, artifact: Artifact, dense: Figure) -> dict[str, object]:
    measured, lowered = delivery.accuracy.by_file[artifact.name], delivery.files.lowered.get(artifact)
    return {
        "precision": artifact.precision,
        "bytes": model_bytes(delivery.files.paths[artifact]),
        "accuracy": round(measured.value, 4),
        "points_lost": round(dense.lost(measured), 2),
        "parity_max_abs": delivery.parity.worst(artifact).max_abs,
        "layers_in_float": list(lowered.layers) if lowered else [],
    }
