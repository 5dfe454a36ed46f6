"""From a study's trials to its answer: finalists made again as a run makes them, and the best of them.

The choice is made on search images alone; the evaluation images are counted once, after it. Knows no optuna.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any

from ..errors import FolderError
from ..files import content_hash, read_signed, signed, write_json
from ..images import Batches
from ..recipe import Recipe
from .bench import Bench, Kept, area
from .space import Space, recipe_at
from .study import TrialRow


@dataclass(frozen=True, slots=True)
class Finalist:
    """A trial made again with all calibration images; `points` holds its accuracies on each part of the images."""

    row: TrialRow
    recipe: Recipe
    points: Mapping[str, tuple[Kept, ...]]

    @property
    def name(self) -> str:
        return self.row.preset or f"trial {self.row.number}"

    def area(self, part: str) -> float:
        return area(self.points[part])


def finalists_of(rows: Sequence[TrialRow], count: int) -> list[TrialRow]:
    """The best complete trials and every preset, best first, earlier ones before equals."""
    complete = [row for row in rows if row.state == "complete" and row.value is not None]
    ordered = sorted(complete, key=lambda row: (-(row.value or 0.0), row.number))
    return ordered[:count] + [row for row in ordered[count:] if row.preset]


def check_finalists(
    bench: Bench,
    space: Space,
    rows: Sequence[TrialRow],
    budgets: Sequence[float],
    parts: Mapping[str, Batches],
    *,
    notify: Callable[[str, float], None],
) -> list[Finalist]:
    """Each finalist as a run would make it; what was checked before is read from the search's folder."""
    found = []
    for done, row in enumerate(rows):
        recipe = recipe_at(space, row.point)
        notify("finalists", done / len(rows))
        points = _held(bench, recipe, budgets, parts)
        found.append(Finalist(row, recipe, points))
    notify("finalists", 1.0)
    return found


def _held(
    bench: Bench, recipe: Recipe, budgets: Sequence[float], parts: Mapping[str, Batches]
) -> dict[str, tuple[Kept, ...]]:
    hashes = {name: bench.work.splits.hashes[name] for name in ("calibration", *parts)}
    scored = {
        k: v
        for k, v in asdict(recipe).items()
        if k not in ("model", "data", "evaluation_data", "out", "weights", "device")
    }
    key = content_hash(scored, hashes, list(budgets), bench.work.model.sha256)
    path = bench.work.stages.folder / "finalists" / f"{key[:16]}.json"
    with suppress(FolderError):  # gone or damaged: judged again
        held = read_signed(path, "finalist/2")["points"]
        return {name: tuple(Kept(**p) for p in points) for name, points in held.items()}
    steps = list(bench.check(recipe, budgets, parts))
    points = {name: tuple(step[name] for step in steps) for name in parts}
    path.parent.mkdir(exist_ok=True)
    write_json(
        path, signed({"schema": "finalist/2", "points": {n: [asdict(p) for p in ps] for n, ps in points.items()}})
    )
    return points


def winner_of(finalists: Sequence[Finalist]) -> Finalist:
    """The largest area on the search images; a preset before a trial that is no better, earlier before later."""
    return max(finalists, key=lambda f: (f.area("search"), bool(f.row.preset), -f.row.number))


def best_preset(finalists: Sequence[Finalist]) -> Finalist | None:
    named = [f for f in finalists if f.row.preset]
    return winner_of(named) if named else None


def plain_row(row: TrialRow) -> dict[str, Any]:
    """A trial as JSON."""
    return {**asdict(row), "accuracy": {f"{p.budget:g}": round(p.accuracy, 4) for p in row.points}}


def plain_finalist(finalist: Finalist) -> dict[str, Any]:
    return {
        "name": finalist.name,
        "trial": finalist.row.number,
        "area": {part: round(finalist.area(part), 5) for part in finalist.points},
        "points": {
            part: [{**asdict(p), "accuracy": round(p.accuracy, 4)} for p in points]
            for part, points in finalist.points.items()
        },
    }
