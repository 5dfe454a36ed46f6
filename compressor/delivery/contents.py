"""A run's findings in, the report's record out: rows of plain values, nothing derived that the report can derive."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from torch import fx

from ..choices import ranking_of
from ..cost import macs_by_layer, measure_cost
from ..device.environment import read_environment
from ..device.timing import Timing, summarise
from ..export.kernels import ELSEWHERE
from ..files import read_record
from ..pruning import Structure, importance
from ..records import Accuracy, Compensation, Cost, Plan, Scores
from ..recovery.choice import Choice, text_of
from ..report import (
    AccuracyRow,
    EngineRow,
    FileRow,
    GroupRow,
    LatencyRow,
    LayerRow,
    ParetoPoint,
    ParityRow,
    ReportInput,
    StageRow,
    TradePoint,
    facts,
)
from ..work import Work
from .artifacts import Findings, of_subject
from .gates import limits_of
from .latency import crowd_of


def report_of(
    work: Work,
    structure: Structure,
    plan: Plan,
    final: fx.GraphModule,
    accuracy: Mapping[str, Accuracy],
    found: Findings,
    choice: Choice | None = None,
) -> ReportInput:
    recipe = work.recipe
    decided = "measured-1.json" if recipe.normalisation == "measured" else "scores-1.json"
    scores = read_record(work.stages.folder / decided, Scores)
    dense_cost, cost = measure_cost(work.dense), measure_cost(final)
    environment = read_environment()
    ships = choice.shipped if choice else "repaired"
    return ReportInput(
        model=recipe.model,
        recipe=asdict(recipe),
        environment={
            **environment.machine,
            **environment.libraries,
            **environment.state,
            "computed on": str(work.device),
        },
        groups=tuple(_group_rows(work, structure, plan, scores)),
        cost_dense=dense_cost,
        cost_shipped=cost,
        accuracy=tuple(_accuracy_rows(accuracy, found)),
        criterion=scores.criterion,
        samples=scores.samples,
        budget=recipe.budget,
        splits=dict(work.splits.hashes),
        left_alone=structure.groups.left_alone,
        repair=read_record(work.stages.folder / f"repair-{recipe.rounds}.json", Compensation),
        unscored=scores.unscored,
        uncovered=scores.uncovered,
        layers=tuple(_layer_rows(work.dense, final, dense_cost, cost, found)),
        parity=tuple(_parity_rows(work, found)),
        latency=tuple(_latency_row(t) for t in found.timings),
        files=tuple(_file_rows(found)),
        engines=tuple(_engine_row(e) for e in found.engines if e["path"]),
        gates=tuple(work.gates),
        trade=tuple(_trade(accuracy, ships, cost.macs / dense_cost.macs)),
        pareto=tuple(_pareto(found)),
        not_checked=tuple(work.not_checked),
        stages=tuple(_stage_rows(work)),
        warnings=tuple(work.warnings),
        shipped=ships,
        choice=text_of(choice) if choice else "",
        busy=crowd_of(found.timings),
    )


def _accuracy_rows(accuracy: Mapping[str, Accuracy], found: Findings) -> list[AccuracyRow]:
    """The networks in PyTorch, then every file as ONNX Runtime runs it."""
    rows = [AccuracyRow(name, a) for name, a in accuracy.items()]  # type: ignore[arg-type]
    for artifact in found.artifacts:
        if artifact.name in found.accuracy:
            runtime = f"onnxruntime, form for {artifact.made_for}" if artifact.made_for else "onnxruntime"
            rows.append(AccuracyRow(artifact.variant, found.accuracy[artifact.name], artifact.precision, runtime))
    return rows


def _parity_rows(work: Work, found: Findings) -> list[ParityRow]:
    rows = []
    for artifact in found.artifacts:
        share = limits_of(work, artifact.precision).relative
        for batch, p in found.parity.get(artifact.name, {}).items():
            scale = max(p.reference_max_abs, 1e-30)
            name = f"{artifact.variant}, {artifact.made_for} form" if artifact.made_for else artifact.variant
            about = ("PyTorch", "onnxruntime", artifact.precision, batch)
            rows.append(ParityRow(*about, p.max_abs, p.max_abs / scale, share * scale, name))
    return rows


def _file_rows(found: Findings) -> list[FileRow]:
    rows = []
    for artifact in found.artifacts:
        if found.path(artifact).is_file():
            detail, size = found.details.get(artifact.name, {}), found.path(artifact).stat().st_size
            about = (artifact.name, artifact.purpose, artifact.variant, artifact.precision, size)
            how = (str(detail.get("method", "")), int(detail.get("bits", 0)), _rest(artifact.precision, detail))
            rows.append(FileRow(*about, tuple(detail.get("layers", ())), *how))
    return rows


def _rest(precision: str, detail: Mapping[str, Any]) -> str:
    """The precision of what is not int8 in an int8 file."""
    if precision != "int8":
        return ""
    islands = detail.get("islands")
    if islands is None:
        return "fp32"
    return f"fp16, {len(islands)} operations in fp32" if islands else "fp16"


def _engine_row(engine: Mapping[str, Any]) -> EngineRow:
    lowering = engine.get("lowering") or {}
    return EngineRow(
        Path(engine["path"]).name,
        engine["library"],
        engine["target"],
        engine["precision"],
        engine["size_bytes"],
        engine["status"],
        lowering["kernels"] if lowering.get("available") else None,
        build_s=engine["build_s"],
    )


def _group_rows(work: Work, structure: Structure, plan: Plan, scores: Scores) -> list[GroupRow]:
    options = ranking_of(work.recipe)
    rows = []
    for group in structure.groups.groups:
        kept = plan.kept.get(group.name, np.arange(group.size))
        if group.parent in plan.kept:  # units of rows that went are gone with them
            kept = kept[np.isin(group.rows[kept], plan.kept[group.parent])]
        values = importance(group, scores, options) if group.name in scores.values else np.full(group.size, np.nan)
        layers = tuple(dict.fromkeys(site.layer for site in group.sites))
        rows.append(GroupRow(group.name, group.kind, layers, group.size, kept, values))
    return rows


def _layer_rows(
    dense: fx.GraphModule, shipped: fx.GraphModule, before: Cost, after: Cost, found: Findings
) -> list[LayerRow]:
    """Weighted layers in order, then what else took time: activations, sums, norms, layout changes."""
    macs_before, macs_after = macs_by_layer(dense, before), macs_by_layer(shipped, after)
    widths = {n.name: n for n in shipped.graph.nodes}
    ms_dense, ms_shipped = (found.layer_ms.get(v, {}) for v in ("dense", "shipped"))
    rows: dict[str, LayerRow] = {}
    for node in dense.graph.nodes:
        layer = node.meta.get("layer", "")
        if node.name in before.by_node and layer not in rows:
            axis = 1 if "conv" in str(node.target) else -1
            width, kept = (int(n.meta["val"].shape[axis]) for n in (node, widths[node.name]))
            rows[layer] = LayerRow(
                layer,
                str(node.target).split(".")[1],
                width,
                kept,
                macs_before[layer],
                macs_after[layer],
                ms_dense.get(layer),
                ms_shipped.get(layer),
            )
    others = [name for name in dict.fromkeys((*ms_dense, *ms_shipped)) if name not in rows]
    operation = {ELSEWHERE: "layout changes and what no layer owns"}
    for name in others:
        rows[name] = LayerRow(name, operation.get(name, "other"), 0, 0, 0, 0, ms_dense.get(name), ms_shipped.get(name))
    return list(rows.values())


def _latency_row(timing: Timing) -> LatencyRow:
    found = summarise(timing)
    percentiles = {"p50": found["p50_ms"], "p90": found["p90_ms"], "p99": found["p99_ms"]}
    variant, precision = of_subject(timing.name)
    batch, threads = timing.schedule.batch, timing.schedule.threads
    note = facts.crowd(timing.environment.state, timing.environment.machine)
    samples = np.array(timing.samples_ms)
    return LatencyRow(timing.runtime, precision, batch, variant, samples, percentiles, threads, note)


def _pareto(found: Findings) -> list[ParetoPoint]:
    """Every file that was both timed one image at a time and evaluated, on ONNX Runtime."""
    timed = {t.name: t for t in found.timings if (t.runtime, t.schedule.batch) == ("onnxruntime", 1)}
    return [
        ParetoPoint(
            a.subject.replace("-", ", "),
            timed[a.subject].p50_ms,
            found.accuracy[a.name],
            reference=a.variant == "dense",
        )
        for a in found.runnable
        if a.subject in timed and a.name in found.accuracy
    ]


def _stage_rows(work: Work) -> list[StageRow]:
    stages = work.stages
    return [
        StageRow(name, cost.seconds, cost.peak_bytes, cost.gpu_peak_bytes, name in stages.reused)
        for name, cost in stages.costs.items()
    ]


def _trade(accuracy: Mapping[str, Accuracy], ships: str, share: float) -> list[TradePoint]:
    return [
        TradePoint(name, 1.0 if name == "dense" else share, found.top1, chosen=name == ships)
        for name, found in accuracy.items()
        if name != "shipped"
    ]
