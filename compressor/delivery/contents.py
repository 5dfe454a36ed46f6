"""An outcome and its delivery in, the report's record out: rows of plain values.

Nothing is derived that the report can derive.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, fx

from ..choices import ranking_of
from ..device.environment import read_environment
from ..device.external import model_bytes
from ..device.runtimes import REFERENCE
from ..device.timing import Timing, summarise
from ..distributed import world
from ..export.kernels import ELSEWHERE
from ..files import read_record
from ..graph.cost import macs_by_layer, measure_cost
from ..graph.interface import nodes_by_name
from ..planning import RankingOptions, importance
from ..records import Compensation, Cost, Figure, Scores
from ..recovery import Recovery
from ..recovery import text_of as recovery_text
from ..repair.better_of_two import text_of
from ..report import (
    AccuracyRow,
    EngineRow,
    FileRow,
    GroupRow,
    LatencyRow,
    LayerRow,
    ParetoPoint,
    ParityRow,
    RecoveryRow,
    ReportInput,
    StageRow,
    TradePoint,
    facts,
)
from ..run.work import Work
from .artifacts import of_subject
from .gates import limits_of
from .results import Delivery, Engine, Files, Lowered, Outcome


def report_of(work: Work, outcome: Outcome, delivery: Delivery) -> ReportInput:
    """What the report says of a run, finished or stopped by a gate: what was not measured has no row.

    Scores, repair and the rest of the stages' results are read from the run's folder; raises FolderError where they
    are gone.
    """
    recipe = work.recipe
    scores, repair = _read_scores(work), _read_repair(work)
    dense_cost, cost = measure_cost(work.dense), measure_cost(outcome.network)
    environment = read_environment()
    choice, checks = outcome.choice, delivery.checks
    ships = outcome.shipped
    return ReportInput(
        model=recipe.model,
        recipe=asdict(recipe),
        environment={
            **environment.machine,
            **environment.libraries,
            **environment.state,
            "computed on": computed_on(work.device),
        },
        groups=tuple(_group_rows(outcome, scores, ranking_of(recipe))),
        cost_dense=dense_cost,
        cost_shipped=cost,
        accuracy=tuple(_accuracy_rows(outcome.accuracy, delivery)),
        criterion=scores.criterion,
        samples=scores.samples,
        budget=outcome.budget or recipe.budget,
        splits=dict(work.splits.hashes),
        left_alone=outcome.structure.groups.left_alone if outcome.structure else (),
        repair=repair,
        unscored=scores.unscored,
        uncovered=scores.uncovered,
        layers=tuple(_layer_rows(work.dense, outcome.network, dense_cost, cost, delivery.layer_ms)),
        parity=tuple(_parity_rows(delivery, recipe.max_parity)),
        latency=tuple(_latency_row(timing, outcome.is_dense) for timing in delivery.latency.timings),
        files=tuple(_file_rows(delivery.files)),
        engines=tuple(_engine_row(engine) for engine in delivery.engines.built),
        gates=checks.gates,
        trade=tuple(_trade(outcome.accuracy, ships, cost.macs / dense_cost.macs)),
        pareto=tuple(_pareto(delivery)),
        not_checked=checks.not_checked,
        stages=tuple(_stage_rows(work)),
        warnings=checks.warnings,
        shipped=ships,
        choice=text_of(choice) if choice else "",
        recovered=recovery_text(outcome.recovery) if outcome.recovery else "",
        recovery=tuple(_recovery_rows(outcome.recovery)) if outcome.recovery else (),
        busy=delivery.latency.busy,
        task=work.chosen.name,
        task_reason=work.chosen.reason,
        fidelity=outcome.fidelity,
        pictures=delivery.pictures.rows,
        pictured_of=delivery.pictures.looked_at,
        depth=work.depth,
        explanation=delivery.survival.figure,
        selector_masks=delivery.survival.masks,
    )


def computed_on(device: torch.device) -> str:
    """The device, and among how many processes (`torchrun`) the work was shared out, where there were several."""
    processes = world()
    if processes == 1:
        return str(device)
    return f"{device}, in each of {processes} processes"


def _read_scores(work: Work) -> Scores:
    """Those that decided: losses measured in the first round, or the criterion's own; none where nothing went."""
    if work.recipe.as_it_is:
        return Scores("", {}, 0)
    name = "measured-1.json" if work.recipe.normalisation == "measured" else "scores-1.json"
    return read_record(work.stages.folder / name, Scores)


def _read_repair(work: Work) -> Compensation:
    """The last round's."""
    if work.recipe.as_it_is:
        return Compensation()
    return read_record(work.stages.folder / f"repair-{work.recipe.rounds}.json", Compensation)


def _accuracy_rows(accuracy: Mapping[str, Figure], delivery: Delivery) -> list[AccuracyRow]:
    """The networks in PyTorch, then every file as ONNX Runtime runs it."""
    rows = [AccuracyRow(name, measured) for name, measured in accuracy.items()]  # type: ignore[arg-type]
    by_file = delivery.accuracy.by_file
    for artifact in delivery.files.artifacts:
        if artifact.name not in by_file:
            continue
        runtime = f"{REFERENCE}, form for {artifact.made_for}" if artifact.made_for else REFERENCE
        rows.append(AccuracyRow(artifact.variant, by_file[artifact.name], artifact.precision, runtime))
    return rows


def _parity_rows(delivery: Delivery, max_parity: float) -> list[ParityRow]:
    """One row for each file and batch size; limits are shares of the reference's largest output."""
    rows = []
    for artifact in delivery.files.artifacts:
        name = f"{artifact.variant}, {artifact.made_for} form" if artifact.made_for else artifact.variant
        limit = limits_of(artifact.precision, max_parity).relative
        for batch, parity in delivery.parity.by_file.get(artifact.name, {}).items():
            scale = max(parity.reference_max_abs, 1e-30)  # outputs that are all zero have no relative difference
            row = ParityRow(
                reference="PyTorch",
                runtime=REFERENCE,
                precision=artifact.precision,
                batch=batch,
                max_abs=parity.max_abs,
                max_rel=parity.max_abs / scale,
                limit=limit * scale,
                variant=name,
            )
            rows.append(row)
    return rows


def _file_rows(files: Files) -> list[FileRow]:
    """The files that were made: a failed gate may have stopped the run before the others."""
    rows = []
    for artifact, path in files.paths.items():
        lowered = files.lowered.get(artifact, Lowered())
        row = FileRow(
            name=artifact.name,
            role=artifact.purpose,
            variant=artifact.variant,
            precision=artifact.precision,
            bytes=model_bytes(path),
            kept=lowered.layers,
            method=lowered.method,
            bits=lowered.bits,
            rest=_rest(lowered) if artifact.precision == "int8" else "",
        )
        rows.append(row)
    return rows


def _rest(lowered: Lowered) -> str:
    """The precision of what is not int8 in an int8 file."""
    if lowered.islands is None:
        return "fp32"
    return f"fp16, {len(lowered.islands)} operations in fp32" if lowered.islands else "fp16"


def _engine_row(engine: Engine) -> EngineRow:
    return EngineRow(
        name=Path(engine.path).name,
        runtime=engine.library,
        target=engine.target,
        precision=engine.precision,
        bytes=engine.size_bytes,
        status=engine.status,
        kernels=engine.kernels,
        build_s=engine.build_s,
    )


def _group_rows(outcome: Outcome, scores: Scores, options: RankingOptions) -> list[GroupRow]:
    structure, plan = outcome.structure, outcome.plan
    rows: list[GroupRow] = []
    if structure is None or plan is None:
        return rows
    for group in structure.groups.groups:
        kept = plan.kept.get(group.name, np.arange(group.size))
        if group.parent in plan.kept:  # units of rows that went are gone with them
            rows_left = plan.kept[group.parent]
            kept = kept[np.isin(structure.above(group.name)[kept], rows_left)]

        unit_scores = np.full(group.size, np.nan)
        if group.name in scores.values:
            unit_scores = importance(group, scores, options)

        layers = tuple(dict.fromkeys(site.layer for site in group.sites))  # each once, the producing one first
        rows.append(GroupRow(group.name, group.kind, layers, group.size, kept, unit_scores))
    return rows


def _layer_rows(
    dense: fx.GraphModule,
    shipped: fx.GraphModule,
    before: Cost,
    after: Cost,
    layer_ms: Mapping[str, Mapping[str, float]],
) -> list[LayerRow]:
    """Weighted layers in order, then what else took time: activations, sums, norms, layout changes."""
    macs_before, macs_after = macs_by_layer(dense, before), macs_by_layer(shipped, after)
    ms_dense = layer_ms.get("dense", {})
    ms_shipped = layer_ms.get("shipped", {})
    twins = nodes_by_name(shipped)

    rows: dict[str, LayerRow] = {}
    for node in dense.graph.nodes:
        layer = node.meta.get("layer", "")
        if node.name not in before.by_node or layer in rows:  # no MACs, or a layer that is called again
            continue
        rows[layer] = LayerRow(
            layer=layer,
            operation=str(node.target).split(".")[1],  # aten.conv2d.default: conv2d
            width_dense=_width(node),
            width_shipped=_width(twins[node.name]) if node.name in twins else 0,  # 0: its branch went
            macs_dense=macs_before[layer],
            macs_shipped=macs_after.get(layer, 0),
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
    results = node.meta["val"]
    outputs = results if isinstance(results, Tensor) else results[0]  # a recurrent layer gives its state too
    return int(outputs.shape[axis])


def _latency_row(timing: Timing, is_dense: bool) -> LatencyRow:
    """Where a network ships as it is, its fp32 file is the dense one that the others are compared with."""
    variant, precision = of_subject("dense" if is_dense and timing.name == "shipped" else timing.name)
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


def _pareto(delivery: Delivery) -> list[ParetoPoint]:
    """Every file that was both timed one image at a time and evaluated, on ONNX Runtime."""
    timed: dict[str, Timing] = {}
    for timing in delivery.latency.timings:
        if timing.runtime == REFERENCE and timing.schedule.batch == 1:
            timed[timing.name] = timing

    points = []
    by_file = delivery.accuracy.by_file
    for artifact in delivery.files.runnable:
        if artifact.subject not in timed or artifact.name not in by_file:
            continue
        label = artifact.subject.replace("-", ", ")
        p50_ms = timed[artifact.subject].p50_ms
        points.append(ParetoPoint(label, p50_ms, by_file[artifact.name], reference=artifact.variant == "dense"))
    return points


def _stage_rows(work: Work) -> list[StageRow]:
    stages = work.stages
    return [
        StageRow(name, cost.seconds, cost.peak_bytes, cost.gpu_peak_bytes, name in stages.reused)
        for name, cost in stages.costs.items()
    ]


def _recovery_rows(recovery: Recovery) -> Iterator[RecoveryRow]:
    for index, moment in enumerate(recovery.moments):
        yield RecoveryRow(
            moment.seconds, moment.shown, moment.fidelity, moment.quality, recovery.metric, kept=index == recovery.best
        )


def _trade(accuracy: Mapping[str, Figure], ships: str, share: float) -> list[TradePoint]:
    """Every network but `shipped`, which is one of the others; all but the dense one keep `share` of the MACs."""
    points = []
    for name, measured in accuracy.items():
        if name == "shipped":
            continue
        macs_share = 1.0 if name == "dense" else share
        point = TradePoint(
            name, macs_share, measured.value, chosen=name == ships, metric=measured.metric, is_share=measured.is_share
        )
        points.append(point)
    return points
