"""What a search leaves in its folder: best.toml, search.json, search.md, search.html and the pictures.

In: the finished trials and the finalists. Knows no optuna and draws nothing itself.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TypedDict

from ..files import Json, write_text
from ..recipe import Recipe, to_toml
from ..records import Figure
from ..relevance.composite import Axis
from ..report.searched import Curve, SearchReport, Tried, write_search_report
from ..run.work import Work
from .finalists import Finalist, best_preset, plain_finalist, plain_row, presets_among, winner_of
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


class SearchSummary(TypedDict):
    """What the command prints last, and the head of `search.json`.

    `run_dir` and `recipe` are paths. `composite` is a preset's name or the table that a recipe spells as JSON. Areas
    are mean qualities over the budgets, by the split of the images: in the task's `metric`, of which 1 is the best
    where `is_share`.
    """

    model: str
    run_dir: str
    recipe: str
    best: str
    task: str
    metric: str
    is_share: bool
    criterion: str
    composite: Json
    area: dict[str, float]
    best_preset: str | None
    area_presets: dict[str, dict[str, float]]
    budgets: list[float]
    trials: int
    trials_stopped: int
    trial_seconds: float
    seconds: float
    lost_workers: list[str]


@dataclass(frozen=True, slots=True)
class SearchResult:
    """A finished search. `recipe` is the best one, also in `best.toml`; `summary` the command's last line."""

    folder: Path
    recipe: Recipe
    summary: SearchSummary


@dataclass(frozen=True, slots=True)
class Outcome:
    """`importance`: how far each choice sets the best trials apart; `dense`: the dense network's quality by split.

    `lost_workers` has a line for each helping process that ended before it was done.
    """

    work: Work
    options: SearchOptions
    axes: tuple[Axis, ...]
    rows: tuple[TrialRow, ...]
    finalists: tuple[Finalist, ...]
    importance: Mapping[str, float]
    dense: Mapping[str, Figure]
    seconds: float
    lost_workers: tuple[str, ...] = ()

    @property
    def metric(self) -> str:
        """What the task's quality is called."""
        figure = next(iter(self.dense.values()))
        return figure.metric

    @property
    def is_share(self) -> bool:
        """Whether 1 is the best there is."""
        figure = next(iter(self.dense.values()))
        return figure.is_share

    @property
    def dense_qualities(self) -> dict[str, float]:
        """By split."""
        return {split: figure.value for split, figure in self.dense.items()}


def write_outcome(outcome: Outcome) -> SearchResult:
    """The best finalist's recipe and the report of how it was found."""
    folder, best = outcome.work.stages.folder, winner_of(outcome.finalists)
    recipe = replace(best.recipe, out="")  # a run of it gets a folder of its own
    write_text(folder / "best.toml", to_toml(recipe))

    summary = _summary(outcome, best, recipe)
    splits = {"hashes": dict(outcome.work.splits.hashes), "images": _sizes(outcome.work)}
    record = {
        "schema": "search/2",
        **summary,
        "options": {**asdict(outcome.options), "storage": masked(outcome.options.storage)},
        "space": list(map(asdict, outcome.axes)),
        "importance": dict(outcome.importance),
        "dense": outcome.dense_qualities,
        "finalists": list(map(plain_finalist, outcome.finalists)),
        "history": list(map(plain_row, outcome.rows)),
        "splits": splits,
    }
    write_search_report(_report(outcome, best), folder, record)
    return SearchResult(folder, recipe, summary)


def _summary(outcome: Outcome, best: Finalist, recipe: Recipe) -> SearchSummary:
    folder, preset = outcome.work.stages.folder, best_preset(outcome.finalists)
    composite: Json = recipe.composite
    if _is_spelled_out(recipe):
        composite = json.loads(recipe.composite)
    return {
        "model": recipe.model,
        "run_dir": str(folder),
        "recipe": str(folder / "best.toml"),
        "best": best.name,
        "task": outcome.work.chosen.name,
        "metric": outcome.metric,
        "is_share": outcome.is_share,
        "criterion": recipe.criterion,
        "composite": composite,
        "area": _areas(best),
        "best_preset": preset.name if preset else None,
        "area_presets": {finalist.name: _areas(finalist) for finalist in presets_among(outcome.finalists)},
        "budgets": sorted(outcome.options.budgets),
        "trials": len(outcome.rows),
        "trials_stopped": sum(row.state == "stopped" for row in outcome.rows),
        "trial_seconds": round(sum(row.seconds for row in outcome.rows), 1),
        "seconds": round(outcome.seconds, 1),
        "lost_workers": list(outcome.lost_workers),
    }


def _is_spelled_out(recipe: Recipe) -> bool:
    """Whether the composite is no preset's name but the table itself, as JSON."""
    return recipe.composite.startswith("{")


def _areas(finalist: Finalist) -> dict[str, float]:
    return {split: round(finalist.area(split), 4) for split in finalist.points}


def _sizes(work: Work) -> dict[str, int]:
    """Images of each split."""
    return {split: len(getattr(work.splits, split)) for split in ("calibration", "search", "evaluation")}


def _report(outcome: Outcome, best: Finalist) -> SearchReport:
    work, options, preset = outcome.work, outcome.options, best_preset(outcome.finalists)
    settings = tuple((name, str(getattr(best.recipe, name)) or "as published") for name in _SHOWN)
    return SearchReport(
        model=work.recipe.model,
        best=best.name,
        preset=preset.name if preset else "",
        dense=outcome.dense_qualities,
        metric=outcome.metric,
        is_share=outcome.is_share,
        settings=settings,
        composite=tuple(_composite_rows(best.recipe)),
        curves=tuple(_curves(outcome.finalists, best)),
        tried=tuple(map(_tried, outcome.rows)),
        importance=tuple(outcome.importance.items()),
        images=_sizes(work),
        hashes=dict(work.splits.hashes),
        trial_images=min(options.trial_images, len(work.splits.search)),
        score_images=min(options.score_images, len(work.splits.calibration)),
        repaired=best.recipe.compensate or best.recipe.reestimate,
    )


def _tried(row: TrialRow) -> Tried:
    points = tuple((point.budget, point.quality) for point in row.points)
    return Tried(row.number, row.state, row.value, row.preset, points, row.seconds)


def _curves(finalists: tuple[Finalist, ...], best: Finalist) -> Iterator[Curve]:
    """Each finalist's curve on every split it was judged on."""
    for finalist in finalists:
        for split, points in finalist.points.items():
            figures = tuple((point.budget, point.quality, point.macs, point.n) for point in points)
            yield Curve(finalist.name, split, figures, finalist.area(split), finalist is best, finalist.row.preset)


def _composite_rows(recipe: Recipe) -> Iterator[tuple[str, str]]:
    """The composite as a table: a preset's name, or each layer's rule and each fixed choice."""
    if recipe.criterion != "lrp":
        return
    if not _is_spelled_out(recipe):
        yield "preset", recipe.composite or "epsilon-plus-flat"
        return
    for name, value in json.loads(recipe.composite).items():
        match value:
            case dict():
                yield name, _rule_text(value)
            case float():
                yield name, f"{value:.3g}"
            case _:
                yield name, str(value)


def _rule_text(rule: Mapping[str, Json]) -> str:
    """`gamma (gamma 0.1, epsilon 1e-06)`; a rule without a number to it is one that leaves the bias out."""
    numbers = ", ".join(f"{name} {value:.3g}" for name, value in rule.items() if isinstance(value, float))
    return f"{rule['name']} ({numbers or 'no bias'})"
