"""What a search leaves in its folder: best.toml, search.json, search.md, search.html and the pictures.

In: the finished trials and the finalists. Knows no optuna and draws nothing itself.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ..files import write_text
from ..recipe import Recipe, to_toml
from ..relevance.composite import Axis
from ..report.searched import Curve, SearchReport, Tried, write_search_report
from ..work import Work
from .finalists import Finalist, best_preset, plain_finalist, plain_row, winner_of
from .options import SearchOptions
from .storage import masked
from .study import TrialRow

_SHOWN = (
    "criterion",
    "start",
    "start_class",
    "sign",
    "per",
    "place",
    "reduction",
    "normalisation",
    "scope",
    "per_cost",
)


@dataclass(frozen=True, slots=True)
class Found:
    """A finished search. `recipe` is the best one, also in `best.toml`; `summary` the command's last line."""

    folder: Path
    recipe: Recipe
    summary: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Outcome:
    """`importance`: how far each choice sets the best trials apart; `dense`: the dense network's accuracy by part."""

    work: Work
    options: SearchOptions
    axes: tuple[Axis, ...]
    rows: tuple[TrialRow, ...]
    finalists: tuple[Finalist, ...]
    importance: Mapping[str, float]
    dense: Mapping[str, float]
    seconds: float


def write_outcome(outcome: Outcome) -> Found:
    """The best finalist's recipe and the report of how it was found."""
    folder, best = outcome.work.stages.folder, winner_of(outcome.finalists)
    recipe = replace(best.recipe, out="")
    write_text(folder / "best.toml", to_toml(recipe))
    summary = _summary(outcome, best, recipe)
    hashes = {"hashes": dict(outcome.work.splits.hashes), "images": _sizes(outcome.work)}
    record = {
        "schema": "search/1",
        **summary,
        "options": {**asdict(outcome.options), "storage": masked(outcome.options.storage)},
        "space": [asdict(axis) for axis in outcome.axes],
        "importance": dict(outcome.importance),
        "dense": dict(outcome.dense),
        "finalists": [plain_finalist(f) for f in outcome.finalists],
        "history": [plain_row(row) for row in outcome.rows],
        "splits": hashes,
    }
    write_search_report(_report(outcome, best), folder, record)
    return Found(folder, recipe, summary)


def _summary(outcome: Outcome, best: Finalist, recipe: Recipe) -> dict[str, Any]:
    folder, preset = outcome.work.stages.folder, best_preset(outcome.finalists)
    return {
        "model": recipe.model,
        "run_dir": str(folder),
        "recipe": str(folder / "best.toml"),
        "best": best.name,
        "criterion": recipe.criterion,
        "composite": json.loads(recipe.composite) if recipe.composite.startswith("{") else recipe.composite,
        "area": _areas(best),
        "best_preset": preset.name if preset else None,
        "area_presets": {f.name: _areas(f) for f in outcome.finalists if f.row.preset},
        "budgets": sorted(outcome.options.budgets),
        "trials": len(outcome.rows),
        "trials_stopped": sum(row.state == "stopped" for row in outcome.rows),
        "trial_seconds": round(sum(row.seconds for row in outcome.rows), 1),
        "seconds": round(outcome.seconds, 1),
    }


def _areas(finalist: Finalist) -> dict[str, float]:
    return {part: round(finalist.area(part), 4) for part in finalist.points}


def _sizes(work: Work) -> dict[str, int]:
    return {name: len(getattr(work.splits, name)) for name in ("calibration", "search", "evaluation")}


def _report(outcome: Outcome, best: Finalist) -> SearchReport:
    work, options, preset = outcome.work, outcome.options, best_preset(outcome.finalists)
    return SearchReport(
        model=work.recipe.model,
        best=best.name,
        preset=preset.name if preset else "",
        dense=outcome.dense,
        settings=tuple((name, str(getattr(best.recipe, name)) or "as published") for name in _SHOWN),
        composite=tuple(_composite_rows(best.recipe)),
        curves=tuple(_curves(outcome.finalists, best)),
        tried=tuple(
            Tried(r.number, r.state, r.value, r.preset, tuple((p.budget, p.accuracy) for p in r.points), r.seconds)
            for r in outcome.rows
        ),
        importance=tuple(outcome.importance.items()),
        images=_sizes(work),
        hashes=dict(work.splits.hashes),
        trial_images=min(options.trial_images, len(work.splits.search)),
        score_images=min(options.score_images, len(work.splits.calibration)),
        repaired=best.recipe.compensate or best.recipe.reestimate,
    )


def _curves(finalists: tuple[Finalist, ...], best: Finalist) -> Iterator[Curve]:
    for f in finalists:
        for part, points in f.points.items():
            shown = tuple((p.budget, p.accuracy, p.macs, p.n) for p in points)
            yield Curve(f.name, part, shown, f.area(part), f is best, f.row.preset)


def _composite_rows(recipe: Recipe) -> Iterator[tuple[str, str]]:
    if recipe.criterion != "lrp":
        return
    if not recipe.composite.startswith("{"):
        yield "preset", recipe.composite or "epsilon-plus-flat"
        return
    for name, value in json.loads(recipe.composite).items():
        if isinstance(value, dict):
            numbers = ", ".join(f"{k} {v:.3g}" for k, v in value.items() if isinstance(v, float))
            yield name, f"{value['name']} ({numbers or 'no bias'})"
        else:
            yield name, f"{value:.3g}" if isinstance(value, float) else str(value)
