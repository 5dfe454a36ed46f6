"""A recipe whose budget is a sweep in, a recipe for each of its runs out; their summaries in, one page out.

What a finished run and the next one have in common is handed on: stages that stand for the same inputs. Knows no flow;
who makes the runs hands in what came of each.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from .budgets import points_of
from .device.runtimes import REFERENCE
from .errors import CompressorError, FolderError, GateError
from .files import read_json
from .recipe import Recipe
from .run.stages import hand_on

SCHEMA = "sweep/1"
PAGE = "sweep.html"
SHARED = ("groups", "steps", "scores-1", "measured-1")  # no budget goes into these
BEGUN = ("latency-model",)  # one does, but most of what was timed serves the next


@dataclass(frozen=True, slots=True)
class Ended:
    """One run of a sweep: its summary, or why it gave none."""

    recipe: Recipe
    summary: Mapping[str, Any] | None = None
    error: CompressorError | None = None


def is_sweep(recipe: Recipe) -> bool:
    """Whether the budget asks for several runs."""
    return len(points_of(recipe.budget)) > 1


def recipes_of(recipe: Recipe) -> tuple[Recipe, ...]:
    """One for each budget, in a folder below the sweep's: `macs 0.7` in `macs-0.7`. Itself where it is one run."""
    if not is_sweep(recipe):
        return (recipe,)
    recipes = []
    for budget in points_of(recipe.budget):
        folder = recipe.folder / _folder_name(budget)
        recipes.append(replace(recipe, budget=budget, out=str(folder)))
    return tuple(recipes)


def _folder_name(budget: str) -> str:
    figure = budget.partition(" on ")[0]  # all points are on one runtime
    return re.sub(r"[^A-Za-z0-9.]+", "-", figure)


def require_free(recipe: Recipe, points: Sequence[Recipe]) -> None:
    """Raises FolderError where the sweep's folder holds a run itself, or what no sweep has left."""
    folder = recipe.folder
    if not folder.exists():
        return
    if not folder.is_dir() or (folder / "run.json").is_file():
        raise FolderError(f"{folder} is no folder of a sweep, it holds something else; give another --out")
    expected = {point.folder.name for point in points} | {"plots"}
    for path in folder.iterdir():
        is_of_sweep = path.name in expected or path.name.startswith(("sweep.", ".part-"))
        if not is_of_sweep and not (path / "run.json").is_file():
            raise FolderError(f"{folder} holds {path.name}, which no sweep has left there; give another --out")


def share(made: Iterable[Recipe], recipe: Recipe) -> None:
    """Hands on what earlier runs of the sweep have found out, from the first that began."""
    begun_folders = (point.folder for point in made if (point.folder / "run.json").is_file())
    source = next(begun_folders, recipe.folder)
    if source != recipe.folder:
        hand_on(source, recipe.folder, SHARED, begun=BEGUN)


def summarise(recipe: Recipe, ended: Sequence[Ended]) -> dict[str, Any]:
    """The sweep's last line and, with a schema, its sweep.json: the dense network and a row for each budget."""
    summaries = [point.summary for point in ended if point.summary is not None]
    rows = [_row(point) for point in ended]
    return {
        "model": recipe.model,
        "budget": recipe.budget,
        "run_dir": str(recipe.folder),
        "page": str(recipe.folder / PAGE),
        "dense": _figures(summaries[0], "dense") if summaries else {},
        "points": rows,
        "failed": [row["budget"] for row in rows if row["failure"]],
        "seconds": round(sum(summary["seconds"] for summary in summaries), 3),
    }


def _row(point: Ended) -> dict[str, Any]:
    recipe, summary = point.recipe, point.summary
    row: dict[str, Any] = {"budget": recipe.budget, "run_dir": str(recipe.folder), "failure": ""}
    if summary is not None:
        row |= _figures(summary, "shipped")
        row |= {"macs_kept": summary["macs_kept"], "precisions": summary["precisions"]}
        return row | {"bundle": str(recipe.folder / "bundle")}
    row |= {"failure": str(point.error), "bundle": ""}
    if isinstance(point.error, GateError):
        row |= _reported(recipe.folder)
    return row


def _figures(summary: Mapping[str, Any], variant: str) -> dict[str, Any]:
    """Of the dense or the shipped network: accuracy, costs, and medians in milliseconds by runtime and batch size."""
    medians: dict[str, dict[str, float]] = {}
    for runtime, batches in summary["latency_ms"].items():
        medians[runtime] = {
            batch: subjects[variant]["p50"] for batch, subjects in batches.items() if variant in subjects
        }
    return {
        "metric": summary["metric"],
        "is_share": summary["is_share"],
        "accuracy": summary[f"accuracy_{variant}"],
        "evaluation_images": summary["evaluation_images"],
        "macs": summary[f"macs_{variant}"],
        "params": summary[f"params_{variant}"],
        "onnx_bytes": summary[f"onnx_bytes_{variant}"],
        "latency_ms": medians,
    }


def _reported(folder: Path) -> dict[str, Any]:
    """What the report of a run that a gate stopped says of its network; empty where it came to none."""
    try:
        report = read_json(folder / "report.json", "report/2")
        cost = report["cost_shipped"]
        return {"accuracy": report["summary"]["accuracy_final"], "macs": cost["macs"], "params": cost["parameters"]}
    except (CompressorError, OSError, KeyError, TypeError):
        return {}


def write_page(recipe: Recipe, summary: Mapping[str, Any]) -> None:
    """The curve and a row for each run, beside their folders."""
    from .report.swept import SweepReport, write_sweep_report  # brings matplotlib, and the page comes last

    dense, rows = summary["dense"], summary["points"]
    report = SweepReport(
        model=recipe.model,
        dense=_point("dense", dense),
        points=tuple(_point(row["budget"], row, recipe.folder) for row in rows),
        images=int(dense.get("evaluation_images", 0)),
        runtime=REFERENCE,
        metric=dense.get("metric", "top-1"),
        is_share=dense.get("is_share", True),
    )
    write_sweep_report(report, recipe.folder, {"schema": SCHEMA, **summary})


def _point(budget: str, row: Mapping[str, Any], folder: Path | None = None) -> Any:
    from .report.swept import SweptPoint

    bundle = row.get("bundle", "")
    if bundle and folder is not None:
        bundle = str(Path(bundle).relative_to(folder))
    return SweptPoint(
        budget=budget,
        quality=row.get("accuracy"),
        macs=row.get("macs"),
        bytes=row.get("onnx_bytes"),
        ms=row.get("latency_ms", {}).get(REFERENCE, {}).get("1"),
        bundle=bundle,
        failure=row.get("failure", ""),
    )
