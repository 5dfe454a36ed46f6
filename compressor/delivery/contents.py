"""A run's findings in, the report's record out: rows of plain values, nothing derived that the report can derive."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from torch import fx

from ..choices import ranking_of
from ..device.environment import read_environment
from ..device.timing import Timing, summarise
from ..export.kernels import ELSEWHERE
from ..files import read_record
from ..graph.cost import macs_by_layer, measure_cost
from ..planning import importance
from ..pruning import Structure
from ..records import Accuracy, Compensation, Cost, Plan, Scores
from ..repair.choice import Choice, text_of
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
from ..run.work import Work
from .artifacts import Findings, of_subject
from .gates import limits_of
from .latency import crowd_of


def report_of(
    work: Work,
    structure: Structure,
    plan: Plan,
    final: fx.GraphModule,
    accuracy: Mapping[str, Accuracy],
    findings: Findings,
    choice: Choice | None = None,
) -> ReportInput:
    """What the report says of a run, finished or stopped by a gate: what was not measured has no row.

    `accuracy` is that of the networks in PyTorch, by name. Scores, repair and the rest of the stages' results are
    read from the run's folder; raises FolderError where they are gone.
    """
    recipe = work.recipe
    # the scores that decided: losses measured in the first round, or the criterion's own
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
        accuracy=tuple(_accuracy_rows(accuracy, findings)),
        criterion=scores.criterion,
        samples=scores.samples,
        budget=recipe.budget,
        splits=dict(work.splits.hashes),
        left_alone=structure.groups.left_alone,
        repair=read_record(work.stages.folder / f"repair-{recipe.rounds}.json", Compensation),
        unscored=scores.unscored,
        uncovered=scores.uncovered,
        layers=tuple(_layer_rows(work.dense, final, dense_cost, cost, findings)),
        parity=tuple(_parity_rows(work, findings)),
        latency=tuple(_latency_row(timing) for timing in findings.timings),
        files=tuple(_file_rows(findings)),
        engines=tuple(_engine_row(engine) for engine in findings.engines if engine["path"]),
        gates=tuple(work.gates),
        trade=tuple(_trade(accuracy, ships, cost.macs / dense_cost.macs)),
        pareto=tuple(_pareto(findings)),
        not_checked=tuple(work.not_checked),
        stages=tuple(_stage_rows(work)),
        warnings=tuple(work.warnings),
        shipped=ships,
        choice=text_of(choice) if choice else "",
        busy=crowd_of(findings.timings),
    )


def _accuracy_rows(accuracy: Mapping[str, Accuracy], findings: Findings) -> list[AccuracyRow]:
    """The networks in PyTorch, then every file as ONNX Runtime runs it."""
    rows = [AccuracyRow(name, measured) for name, measured in accuracy.items()]  # type: ignore[arg-type]
    for artifact in findings.artifacts:
        if artifact.name not in findings.accuracy:
            continue
        runtime = f"onnxruntime, form for {artifact.made_for}" if artifact.made_for else "onnxruntime"
        rows.append(AccuracyRow(artifact.variant, findings.accuracy[artifact.name], artifact.precision, runtime))
    return rows


def _parity_rows(work: Work, findings: Findings) -> list[ParityRow]:
    """One row for each file and batch size; limits are shares of the reference's largest output."""
    rows = []
    for artifact in findings.artifacts:
        name = f"{artifact.variant}, {artifact.made_for} form" if artifact.made_for else artifact.variant
        limit = limits_of(work, artifact.precision).relative
        for batch, parity in findings.parity.get(artifact.name, {}).items():
            scale = max(parity.reference_max_abs, 1e-30)  # outputs that are all zero have no relative difference
            row = ParityRow(
                reference="PyTorch",
                runtime="onnxruntime",
                precision=artifact.precision,
                batch=batch,
                max_abs=parity.max_abs,
                max_rel=parity.max_abs / scale,
                limit=limit * scale,
                variant=name,
            )
            rows.append(row)
    return rows


def _file_rows(findings: Findings) -> list[FileRow]:
    """The files that are there: a failed gate may have stopped the run before the others."""
    rows = []
    for artifact in findings.artifacts:
        path = findings.path(artifact)
        if not path.is_file():
            continue
        detail = findings.details.get(artifact.name, {})
        row = FileRow(
            name=artifact.name,
            role=artifact.purpose,
            variant=artifact.variant,
            precision=artifact.precision,
            bytes=path.stat().st_size,
            kept=tuple(detail.get("layers", ())),
            method=str(detail.get("method", "")),
            bits=int(detail.get("bits", 0)),
            rest=_rest(artifact.precision, detail),
        )
        rows.append(row)
    return rows


def _rest(precision: str, detail: Mapping[str, Any]) -> str:
    """The precision of what is not int8 in an int8 file; empty for any other file."""
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
            rows_left = plan.kept[group.parent]
            kept = kept[np.isin(group.rows[kept], rows_left)]

        unit_scores = np.full(group.size, np.nan)
        if group.name in scores.values:
            unit_scores = importance(group, scores, options)

        layers = tuple(dict.fromkeys(site.layer for site in group.sites))  # each once, the producing one first
        rows.append(GroupRow(group.name, group.kind, layers, group.size, kept, unit_scores))
    return rows


def _layer_rows(
    dense: fx.GraphModule, shipped: fx.GraphModule, before: Cost, after: Cost, findings: Findings
) -> list[LayerRow]:
    """Weighted layers in order, then what else took time: activations, sums, norms, layout changes."""
    macs_before, macs_after = macs_by_layer(dense, before), macs_by_layer(shipped, after)
    ms_dense = findings.layer_ms.get("dense", {})
    ms_shipped = findings.layer_ms.get("shipped", {})
    twins = {node.name: node for node in shipped.graph.nodes}

    rows: dict[str, LayerRow] = {}
    for node in dense.graph.nodes:
        layer = node.meta.get("layer", "")
        if node.name not in before.by_node or layer in rows:  # no MACs, or a layer that is called again
            continue
        rows[layer] = LayerRow(
            layer=layer,
            operation=str(node.target).split(".")[1],  # aten.conv2d.default: conv2d
            width_dense=_width(node),
            width_shipped=_width(twins[node.name]),
            macs_dense=macs_before[layer],
            macs_shipped=macs_after[layer],
            ms_dense=ms_dense.get(layer),
            ms_shipped=ms_shipped.get(layer),
        )

    operations = {ELSEWHERE: "layout changes and what no layer owns"}
    for name in dict.fromkeys((*ms_dense, *ms_shipped)):
        if name not in rows:
            operation = operations.get(name, "other")
            rows[name] = LayerRow(name, operation, 0, 0, 0, 0, ms_dense.get(name), ms_shipped.get(name))
    return list(rows.values())


def _width(node: fx.Node) -> int:
    """Output units of a weighted node: channels of [N, C, ...], features of [..., C]."""
    axis = 1 if "conv" in str(node.target) else -1
    return int(node.meta["val"].shape[axis])


def _latency_row(timing: Timing) -> LatencyRow:
    variant, precision = of_subject(timing.name)
    figures = summarise(timing)
    return LatencyRow(
        runtime=timing.runtime,
        precision=precision,
        batch=timing.schedule.batch,
        variant=variant,
        samples_ms=np.array(timing.samples_ms),
        percentiles={"p50": figures["p50_ms"], "p90": figures["p90_ms"], "p99": figures["p99_ms"]},
        threads=timing.schedule.threads,
        note=facts.crowd(timing.environment.state, timing.environment.machine),
    )


def _pareto(findings: Findings) -> list[ParetoPoint]:
    """Every file that was both timed one image at a time and evaluated, on ONNX Runtime."""
    timed: dict[str, Timing] = {}
    for timing in findings.timings:
        if timing.runtime == "onnxruntime" and timing.schedule.batch == 1:
            timed[timing.name] = timing

    points = []
    for artifact in findings.runnable:
        if artifact.subject not in timed or artifact.name not in findings.accuracy:
            continue
        label = artifact.subject.replace("-", ", ")
        p50_ms = timed[artifact.subject].p50_ms
        accuracy = findings.accuracy[artifact.name]
        points.append(ParetoPoint(label, p50_ms, accuracy, reference=artifact.variant == "dense"))
    return points


def _stage_rows(work: Work) -> list[StageRow]:
    stages = work.stages
    return [
        StageRow(name, cost.seconds, cost.peak_bytes, cost.gpu_peak_bytes, name in stages.reused)
        for name, cost in stages.costs.items()
    ]


def _trade(accuracy: Mapping[str, Accuracy], ships: str, share: float) -> list[TradePoint]:
    """Every network but `shipped`, which is one of the others; all but the dense one keep `share` of the MACs."""
    points = []
    for name, measured in accuracy.items():
        if name == "shipped":
            continue
        macs_share = 1.0 if name == "dense" else share
        points.append(TradePoint(name, macs_share, measured.top1, chosen=name == ships))
    return points
