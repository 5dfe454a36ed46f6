"""From a finished network to what ships: ONNX files, gates, engines, timings, the report and the bundle.

Knows nothing of units and scores but what the report shows of them. What could not be run here is a line in
`not_checked`, never a silence.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import fx, nn

from .cost import macs_by_layer, measure_cost
from .device.bundle import Manifest, ModelFile, write_bundle
from .device.environment import read_environment
from .device.images import Preprocessing as DevicePreprocessing
from .device.parity import Limits, Parity, limits_around
from .device.timing import Schedule, Timing, from_json, summarise, time_interleaved, to_json
from .device.worker import time_files
from .errors import EngineError, GateError, MissingPackageError
from .export.engines import build_engine, build_recipe, image_profile, record_fields
from .export.gate import check_export
from .export.onnx import export_onnx
from .files import file_sha256, read_json, read_record, write_json
from .pruning import Structure, importance
from .records import Accuracy, Cost, Plan, Scores
from .report import (
    AccuracyRow,
    EngineRow,
    FileRow,
    GateRow,
    GroupRow,
    LatencyRow,
    LayerRow,
    ParityRow,
    ReportInput,
    TradePoint,
    write_report,
)
from .work import Work, ranking_of

GOLDEN_IMAGES = 8
LICENCES = (
    "compressor: Apache-2.0. The model's and the images' own licences apply to what was made from them.",
    "Layer-wise relevance propagation may be covered by patents where you ship.",
)


@dataclass(frozen=True, slots=True)
class Delivered:
    """`summary` is this part of the run's last line."""

    summary: dict[str, Any]
    gates: tuple[GateRow, ...]


def deliver(
    work: Work, structure: Structure, plan: Plan, final: fx.GraphModule, accuracy: Mapping[str, Accuracy]
) -> Delivered:
    """Exports, checks, builds, measures, reports and bundles; a failed gate is raised once the report is written."""
    folder = work.stages.folder
    failed: GateError | None = None
    parity: dict[str, dict[int, Parity]] = {}
    engines: list[dict[str, Any]] = []
    timings: list[Timing] = []
    try:
        _gate_accuracy(work, accuracy)
        _export(work, final)
        parity = _parity(work, final)
        engines = _engines(work)
        timings = _latency(work, final)
    except GateError as error:
        failed = error
    dense_cost, cost = measure_cost(work.dense), measure_cost(final)
    if failed is None:
        _bundle(work, final, parity, engines)
    report = _contents(work, structure, plan, final, accuracy, parity, engines, timings)
    write_report(report, folder)
    if failed is not None:
        raise failed
    return Delivered(_summary(work, dense_cost, cost, parity, engines, timings), tuple(work.gates))


def _gate_accuracy(work: Work, accuracy: Mapping[str, Accuracy]) -> None:
    shipped = accuracy.get("finetuned", accuracy["compensated"])
    work.gate(
        "accuracy: top-1 lost",
        100 * (accuracy["dense"].top1 - shipped.top1),
        work.recipe.max_accuracy_loss,
        "raise the budget, give more calibration images, or allow more fine-tuning",
        unit="points",
    )


def _files(work: Work) -> dict[str, Path]:
    return {"dense": work.stages.folder / "dense.onnx", "pruned": work.stages.folder / "model.onnx"}


def _export(work: Work, final: fx.GraphModule) -> None:
    recipe, files = work.recipe, _files(work)
    metadata = {"compressor.model": recipe.model, "compressor.budget": recipe.budget}

    def write() -> None:
        export_onnx(work.dense, work.example, files["dense"], metadata={**metadata, "compressor.variant": "dense"})
        export_onnx(final, work.example, files["pruned"], metadata={**metadata, "compressor.variant": "pruned"})

    def read() -> None:
        for path in files.values():
            path.stat()

    work.stages.do("onnx", [work.stages.keys["finetune"], metadata], write, read)


def _parity(work: Work, final: fx.GraphModule) -> dict[str, dict[int, Parity]]:
    """ONNX Runtime against PyTorch at two batch sizes, dense and pruned; a gate each."""
    folder, images = work.stages.folder, work.sample(2 * GOLDEN_IMAGES)
    limits = Limits(relative=work.recipe.max_parity, cosine=0.9999)
    networks = {"dense": work.dense, "pruned": final}

    def write() -> None:
        found = {
            name: {str(b): asdict(p) for b, p in check_export(path, networks[name], images, limits=limits).items()}
            for name, path in _files(work).items()
        }
        write_json(folder / "parity.json", {"schema": "parity/1", "onnxruntime": found})

    def read() -> dict[str, dict[int, Parity]]:
        held = read_json(folder / "parity.json", "parity/1")["onnxruntime"]
        return {name: {int(b): Parity(**p) for b, p in by_batch.items()} for name, by_batch in held.items()}

    hashes = [file_sha256(path) for path in _files(work).values()]
    found = work.stages.do("parity", [hashes, asdict(limits), work.splits.hashes["calibration"]], write, read)
    worst = max(p.max_abs / max(p.reference_max_abs, 1e-30) for by in found.values() for p in by.values())
    work.gate("parity: ONNX Runtime = PyTorch", worst, work.recipe.max_parity, "report the model; its export differs")
    return found


def _engines(work: Work) -> list[dict[str, Any]]:
    """Engines for every target that can be built here; the others go into the bundle as build recipes."""
    folder, source = work.stages.folder, _files(work)["pruned"]
    profiles = image_profile(work.example.shape[1:], batches=(1, 1, max((*work.recipe.latency_batches, 1))))

    def write() -> None:
        found: list[dict[str, Any]] = []
        for target in work.recipe.targets:
            path = folder / "engines" / f"{target.lower()}.engine"
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                record = build_engine(
                    source,
                    path,
                    target=target,
                    profiles=profiles,
                    progress=lambda phase, share: work.stages.notify(f"engines: {phase}", share),
                )
                found.append({"target": target, **record_fields(record), "path": str(path.relative_to(folder))})
            except (EngineError, MissingPackageError) as error:
                found.append({"target": target, "path": "", "status": f"not built: {error}"})
        recipes = [
            build_recipe(t, model="model.onnx", profiles=profiles, precision="fp32") for t in work.recipe.targets
        ]
        write_json(folder / "engines.json", {"schema": "engines/1", "engines": found, "build": recipes})

    def read() -> list[dict[str, Any]]:
        held: list[dict[str, Any]] = read_json(folder / "engines.json", "engines/1")["engines"]
        for engine in held:
            (folder / engine["path"]).stat()
        return held

    found = work.stages.do("engines", [file_sha256(source), list(work.recipe.targets), profiles], write, read)
    for engine in found:
        if not engine["status"].startswith("run"):
            work.not_checked.append(f"TensorRT engine for {engine['target']}: {engine['status']}")
    return found


def _latency(work: Work, final: fx.GraphModule) -> list[Timing]:
    """Dense and pruned in turns, ONNX Runtime in processes of their own and PyTorch in this one."""
    folder, recipe = work.stages.folder, work.recipe

    def write() -> None:
        found: list[Timing] = []
        for batch in recipe.latency_batches:
            schedule = Schedule(batch=batch, seconds=recipe.latency_seconds)
            images = work.sample(max(64, batch))
            work.stages.notify(f"latency: ONNX Runtime, batch {batch}", 0.0)
            found += time_files(_files(work), images, schedule=schedule, runtime="onnxruntime").values()
            work.stages.notify(f"latency: PyTorch, batch {batch}", 0.5)
            subjects = {"dense": _caller(work.dense), "pruned": _caller(final)}
            runtimes = dict.fromkeys(subjects, "pytorch")
            found += time_interleaved(subjects, images, schedule=schedule, runtimes=runtimes).values()
        write_json(folder / "latency.json", {"schema": "latency/1", "timings": [to_json(t) for t in found]})

    def read() -> list[Timing]:
        return [from_json(t) for t in read_json(folder / "latency.json", "latency/1")["timings"]]

    hashes = [file_sha256(path) for path in _files(work).values()]
    environment = read_environment().fingerprint
    return work.stages.do(
        "latency", [hashes, list(recipe.latency_batches), recipe.latency_seconds, environment], write, read
    )


def _caller(network: nn.Module) -> Any:
    def call(images: NDArray[np.float32]) -> NDArray[np.float32]:
        with torch.inference_mode():
            result: NDArray[np.float32] = network(torch.from_numpy(images)).numpy()
        return result

    return call


def _bundle(
    work: Work, final: fx.GraphModule, parity: Mapping[str, Mapping[int, Parity]], engines: list[dict[str, Any]]
) -> None:
    folder = work.stages.folder
    images = work.sample(GOLDEN_IMAGES)
    worst = max(parity["pruned"].values(), key=lambda p: p.max_abs)
    models = [ModelFile("model.onnx", limits=limits_around(worst))]
    files = {"model.onnx": folder / "model.onnx", "plan.json": folder / "network.json"}
    for engine in engines:
        if engine["path"]:
            models.append(ModelFile(engine["path"], library=engine["library"], target=engine["target"]))
            files[engine["path"]] = folder / engine["path"]
    how = work.preprocessing
    manifest = Manifest(
        name=work.recipe.model,
        models=tuple(models),
        preprocessing=DevicePreprocessing(how.size, how.resize, how.interpolation, how.mean, how.std),
        labels=tuple(work.splits.evaluation.class_names or work.model.class_names or ()),
        licences=LICENCES,
        build=tuple(read_json(folder / "engines.json", "engines/1")["build"]),
        provenance={"model": work.recipe.model, "weights_sha256": work.model.sha256, "budget": work.recipe.budget},
    )
    outputs = _caller(final)(images)
    write_bundle(folder / "bundle", files, manifest=manifest, golden_inputs=images, golden_outputs=outputs)


def _contents(
    work: Work,
    structure: Structure,
    plan: Plan,
    final: fx.GraphModule,
    accuracy: Mapping[str, Accuracy],
    parity: Mapping[str, Mapping[int, Parity]],
    engines: list[dict[str, Any]],
    timings: list[Timing],
) -> ReportInput:
    recipe, folder = work.recipe, work.stages.folder
    scores = read_record(folder / "scores-1.json", Scores)
    dense_cost, cost = measure_cost(work.dense), measure_cost(final)
    environment = read_environment()
    return ReportInput(
        model=recipe.model,
        recipe=asdict(recipe),
        environment={**environment.machine, **environment.libraries, **environment.state},
        groups=tuple(_group_rows(work, structure, plan, scores)),
        cost_dense=dense_cost,
        cost_pruned=cost,
        accuracy=tuple(AccuracyRow(name, a) for name, a in accuracy.items()),  # type: ignore[arg-type]
        criterion=scores.criterion,
        samples=scores.samples,
        budget=recipe.budget,
        splits=dict(work.splits.hashes),
        left_alone=structure.groups.left_alone,
        unscored=scores.unscored,
        uncovered=scores.uncovered,
        layers=tuple(_layer_rows(work.dense, final, dense_cost, cost)),
        parity=tuple(
            ParityRow(
                "PyTorch",
                "onnxruntime",
                "fp32",
                batch,
                p.max_abs,
                p.max_abs / max(p.reference_max_abs, 1e-30),
                recipe.max_parity,
                variant,
            )
            for variant, by_batch in parity.items()
            for batch, p in by_batch.items()
        ),
        latency=tuple(_latency_row(t) for t in timings),
        files=tuple(
            FileRow(path.name, "ONNX", name, "fp32", path.stat().st_size)
            for name, path in _files(work).items()
            if path.is_file()
        ),
        engines=tuple(
            EngineRow(
                Path(e["path"]).name,
                e["library"],
                e["target"],
                "fp32",
                e["size_bytes"],
                e["status"],
                None,
                build_s=e["build_s"],
            )
            for e in engines
            if e["path"]
        ),
        gates=tuple(work.gates),
        trade=tuple(_trade(accuracy, dense_cost, cost)),
        not_checked=tuple(work.not_checked),
        timings_s=dict(work.stages.seconds),
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


def _layer_rows(dense: fx.GraphModule, pruned: fx.GraphModule, before: Cost, after: Cost) -> list[LayerRow]:
    macs_before, macs_after = macs_by_layer(dense, before), macs_by_layer(pruned, after)
    widths = {n.name: n for n in pruned.graph.nodes}
    rows: dict[str, LayerRow] = {}
    for node in dense.graph.nodes:
        layer = node.meta.get("layer", "")
        if node.name in before.by_node and layer not in rows:
            axis = 1 if "conv" in str(node.target) else -1
            width, kept = (int(n.meta["val"].shape[axis]) for n in (node, widths[node.name]))
            operation = str(node.target).split(".")[1]
            rows[layer] = LayerRow(layer, operation, width, kept, macs_before[layer], macs_after[layer])
    return list(rows.values())


def _latency_row(timing: Timing) -> LatencyRow:
    found = summarise(timing)
    percentiles = {"p50": found["p50_ms"], "p90": found["p90_ms"], "p99": found["p99_ms"]}
    batch, threads = timing.schedule.batch, timing.schedule.threads
    return LatencyRow(timing.runtime, "fp32", batch, timing.name, np.array(timing.samples_ms), percentiles, threads)


def _trade(accuracy: Mapping[str, Accuracy], dense: Cost, cost: Cost) -> list[TradePoint]:
    names = {"dense": "dense", "pruned": "removed", "compensated": "repaired", "finetuned": "fine-tuned"}
    shipped = "finetuned" if "finetuned" in accuracy else "compensated"
    return [
        TradePoint(names[name], 1.0 if name == "dense" else cost.macs / dense.macs, a.top1, chosen=name == shipped)
        for name, a in accuracy.items()
    ]


def _summary(
    work: Work,
    dense: Cost,
    cost: Cost,
    parity: Mapping[str, Mapping[int, Parity]],
    engines: list[dict[str, Any]],
    timings: list[Timing],
) -> dict[str, Any]:
    files = _files(work)
    latency: dict[str, Any] = {}
    for t in timings:
        found = summarise(t)
        at = latency.setdefault(t.runtime, {}).setdefault(str(t.schedule.batch), {})
        at[t.name] = {"p50": round(found["p50_ms"], 4), "p90": found["p90_ms"] and round(found["p90_ms"], 4)}
    ratios = {
        f"latency_ratio_b{batch}": round(at["pruned"]["p50"] / at["dense"]["p50"], 4)
        for batch, at in latency.get("onnxruntime", {}).items()
    }
    return {
        "macs_dense": dense.macs,
        "macs_pruned": cost.macs,
        "macs_kept": round(cost.macs / dense.macs, 4),
        "flops_dense": dense.flops,
        "flops_pruned": cost.flops,
        "params_dense": dense.parameters,
        "params_pruned": cost.parameters,
        "onnx_bytes_dense": files["dense"].stat().st_size,
        "onnx_bytes_pruned": files["pruned"].stat().st_size,
        "latency_ms": latency,
        **ratios,
        "parity_max_abs": max(p.max_abs for by_batch in parity.values() for p in by_batch.values()),
        "engines": [
            {k: e[k] for k in ("target", "path", "library", "library_version", "size_bytes", "status")}
            for e in engines
            if e["path"]
        ],
        "not_checked": list(work.not_checked),
    }
