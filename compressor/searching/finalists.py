"""From a study's trials to its answer: finalists made again as a run makes them, and the best of them.

The choice is made on search images alone; the evaluation images are counted once, after it. Knows no optuna.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..errors import FolderError
from ..files import content_hash, read_signed, signed, write_json
from ..inputs.images import Batches
from ..recipe import Recipe
from .bench import Bench, Kept, area
from .space import Space, recipe_at
from .study import TrialRow, complete_of

# say where something lies or runs; what the model and the images hold is in a finalist's key by their hashes
_PLACE_FIELDS = ("model", "data", "evaluation_data", "out", "weights", "device")


@dataclass(frozen=True, slots=True)
class Finalist:
    """A trial made again with all calibration images; `points[split]` holds its qualities there, budget by budget."""

    row: TrialRow
    recipe: Recipe
    points: Mapping[str, tuple[Kept, ...]]

    @property
    def name(self) -> str:
        """The preset's, or the trial's number."""
        return self.row.preset or f"trial {self.row.number}"

    def area(self, split: str) -> float:
        """Mean quality over the budgets (see `bench.area`), on the images of that split."""
        return area(self.points[split])


def finalists_of(rows: Sequence[TrialRow], count: int) -> list[TrialRow]:
    """The best complete trials and every preset, best first, earlier ones before equals."""
    # the value of a complete trial is its area; `or` is for the type alone
    ordered = sorted(complete_of(rows), key=lambda row: (-(row.value or 0.0), row.number))
    presets_behind = [row for row in ordered[count:] if row.preset]
    return ordered[:count] + presets_behind


def check_finalists(
    bench: Bench,
    space: Space,
    rows: Sequence[TrialRow],
    budgets: Sequence[float],
    images_by_split: Mapping[str, Batches],
    *,
    notify: Callable[[str, float], None],
) -> list[Finalist]:
    """Each finalist as a run would make it; what was checked before is read from the search's folder."""
    finalists = []
    for index, row in enumerate(rows):
        recipe = recipe_at(space, row.point)
        notify("finalists", index / len(rows))
        points = _checked(bench, recipe, budgets, images_by_split)
        finalists.append(Finalist(row, recipe, points))
    notify("finalists", 1.0)
    return finalists


def _checked(
    bench: Bench, recipe: Recipe, budgets: Sequence[float], images_by_split: Mapping[str, Batches]
) -> dict[str, tuple[Kept, ...]]:
    """The points of each split, from the file an earlier start left or made now and kept."""
    path = _file_of(bench, recipe, budgets, images_by_split)
    with suppress(FolderError):  # gone or damaged: judged again
        saved_points = read_signed(path, "finalist/3")["points"]
        return {split: _points_of(rows) for split, rows in saved_points.items()}

    steps = list(bench.check(recipe, budgets, images_by_split))
    points: dict[str, tuple[Kept, ...]] = {}
    plain_points: dict[str, list[dict[str, float]]] = {}
    for split in images_by_split:
        points[split] = tuple(step[split] for step in steps)
        plain_points[split] = list(map(asdict, points[split]))
    path.parent.mkdir(exist_ok=True)
    write_json(path, signed({"schema": "finalist/3", "points": plain_points}))
    return points


def _points_of(rows: Iterable[Mapping[str, Any]]) -> tuple[Kept, ...]:
    """The inverse of `asdict`, as a finalist's file holds it."""
    return tuple(Kept(**fields) for fields in rows)


def _file_of(bench: Bench, recipe: Recipe, budgets: Sequence[float], splits: Iterable[str]) -> Path:
    """Named by the hash of what a finalist's qualities depend on."""
    hashes = {split: bench.work.splits.hashes[split] for split in ("calibration", *splits)}
    fields = {name: value for name, value in asdict(recipe).items() if name not in _PLACE_FIELDS}
    key = content_hash(fields, hashes, list(budgets), bench.work.model.sha256, bench.work.chosen.parts.prints)
    return bench.work.stages.folder / "finalists" / f"{key[:16]}.json"


def winner_of(finalists: Sequence[Finalist]) -> Finalist:
    """The largest area on the search images; a preset before a trial that is no better, earlier before later."""

    def order(finalist: Finalist) -> tuple[float, bool, int]:
        return finalist.area("search"), bool(finalist.row.preset), -finalist.row.number

    return max(finalists, key=order)


def best_preset(finalists: Sequence[Finalist]) -> Finalist | None:
    """The winner among the presets; None where none of them was completed."""
    presets = presets_among(finalists)
    if not presets:
        return None
    return winner_of(presets)


def presets_among(finalists: Sequence[Finalist]) -> list[Finalist]:
    """In the finalists' order."""
    return [finalist for finalist in finalists if finalist.row.preset]


def plain_row(row: TrialRow) -> dict[str, object]:
    """A trial as JSON, without who tried it; `quality` is by budget."""
    fields = asdict(row)
    del fields["worker"]
    fields["quality"] = {f"{point.budget:g}": round(point.quality, 4) for point in row.points}
    return fields


def plain_finalist(finalist: Finalist) -> dict[str, object]:
    """A finalist as JSON; areas and points by split."""
    areas: dict[str, float] = {}
    plain_points: dict[str, list[dict[str, object]]] = {}
    for split, points in finalist.points.items():
        areas[split] = round(finalist.area(split), 5)
        plain_points[split] = [{**asdict(point), "quality": round(point.quality, 4)} for point in points]
    return {"name": finalist.name, "trial": finalist.row.number, "area": areas, "points": plain_points}
