"""From trials to an answer: who is made again, who wins, and what is read back instead of being judged twice."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from compressor.recipe import Recipe
from compressor.searching import finalists
from compressor.searching.bench import Kept, area
from compressor.searching.finalists import (
    Finalist,
    best_preset,
    check_finalists,
    finalists_of,
    plain_finalist,
    plain_row,
    winner_of,
)
from compressor.searching.study import TrialRow


def row(number: int, value: float | None, *, preset: str = "", state: str = "complete") -> TrialRow:
    points = () if value is None else (Kept(0.5, 0.49, round(value, 2), 100),)
    return TrialRow(number, state, value, {"n": float(number)}, points, 1.0, preset)


def finalist(number: int, right: int, *, preset: str = "", unseen: int = 0) -> Finalist:
    points = {"search": (Kept(0.5, 0.49, right / 100, 100),), "evaluation": (Kept(0.5, 0.49, unseen / 100, 100),)}
    return Finalist(row(number, 0.1, preset=preset), Recipe(), points)


@pytest.mark.parametrize(
    ("points", "expected"),
    [
        (((0.5, 80),), 0.8),
        (((0.4, 60), (0.5, 80), (0.8, 90)), 0.8125),
        (((0.8, 90), (0.4, 60), (0.5, 80)), 0.8125),
        (((0.2, 50), (0.4, 50), (0.9, 50)), 0.5),
    ],
)
def test_an_area_is_the_mean_height_in_any_order(points: tuple[tuple[float, int], ...], expected: float) -> None:
    assert area([Kept(budget, budget, right / 100, 100) for budget, right in points]) == pytest.approx(expected)


def test_the_best_complete_trials_go_on_with_every_preset_behind() -> None:
    rows = [
        row(0, 0.2, preset="epsilon"),
        row(1, 0.9),
        row(2, 0.95, state="stopped"),
        row(3, None, state="failed"),
        row(4, 0.9),
        row(5, 0.8, preset="gamma"),
        row(6, 0.7),
    ]
    assert [one.number for one in finalists_of(rows, 1)] == [1, 5, 0]
    assert [one.number for one in finalists_of(rows, 3)] == [1, 4, 5, 0]
    assert [one.number for one in finalists_of(rows, 99)] == [1, 4, 5, 6, 0]
    assert finalists_of([], 3) == []


def test_images_that_the_search_never_saw_choose_nothing() -> None:
    first, second = finalist(1, 90, unseen=10), finalist(2, 80, unseen=99)
    assert winner_of([second, first]) is first


def test_of_equals_a_preset_wins_and_then_the_earlier() -> None:
    equal = [finalist(1, 90), finalist(4, 90, preset="gamma"), finalist(2, 90, preset="epsilon")]
    assert winner_of(equal).name == "epsilon"
    assert winner_of([*equal[:1], finalist(0, 90)]).name == "trial 0"
    preset = best_preset([*equal, finalist(9, 99)])
    assert preset is not None
    assert preset.name == "epsilon"
    assert best_preset([finalist(1, 90)]) is None


def test_trials_and_finalists_as_json_are_rounded_and_whole() -> None:
    assert plain_row(row(3, 0.67))["quality"] == {"0.5": 0.67}
    plain = plain_finalist(finalist(3, 67, unseen=50))
    assert (plain["name"], plain["trial"]) == ("trial 3", 3)
    assert plain["area"] == {"search": 0.67, "evaluation": 0.5}
    assert plain["points"]["search"] == [{"budget": 0.5, "macs": 0.49, "quality": 0.67, "n": 100, "is_share": True}]


class Bench:
    """In a bench's place: judges nothing, but says how often it was asked."""

    def __init__(self, folder: Path, weights: str = "w") -> None:
        hashes = {"calibration": "c", "search": "s"}
        stages, splits, model = SimpleNamespace(folder=folder), SimpleNamespace(hashes=hashes), SimpleNamespace()
        model.sha256 = weights
        chosen = SimpleNamespace(parts=SimpleNamespace(prints={}))
        self.work = SimpleNamespace(stages=stages, splits=splits, model=model, chosen=chosen)
        self.asked: list[Recipe] = []

    def check(self, recipe: Recipe, shares: Sequence[float], splits: Mapping[str, Any]) -> Iterator[dict[str, Kept]]:
        self.asked.append(recipe)
        for share in shares:
            yield {split: Kept(share, share, 0.9, 100) for split in splits}


@pytest.fixture
def recipes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The recipe of a point is told by its number."""
    monkeypatch.setattr(finalists, "recipe_at", lambda space, point: Recipe(seed=int(point["n"])))


def checked(bench: Bench, rows: list[TrialRow], budgets: tuple[float, ...] = (0.3, 0.6)) -> list[Finalist]:
    said: list[float] = []
    made = check_finalists(
        bench,  # type: ignore[arg-type]
        None,  # type: ignore[arg-type]
        rows,
        budgets,
        {"search": ()},  # type: ignore[dict-item]
        notify=lambda stage, share: said.append(share),
    )
    assert said == [*(index / len(rows) for index in range(len(rows))), 1.0]
    return made


def test_what_was_checked_is_not_checked_again(recipes: None, tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    first = checked(bench, [row(1, 0.5), row(2, 0.4)])
    assert [one.points["search"] for one in first] == [(Kept(0.3, 0.3, 0.9, 100), Kept(0.6, 0.6, 0.9, 100))] * 2
    again = Bench(tmp_path)
    assert checked(again, [row(1, 0.5), row(2, 0.4)]) == first
    assert (len(bench.asked), len(again.asked)) == (2, 0)


@pytest.mark.parametrize("change", ["weights", "budgets", "images", "recipe", "damage"])
def test_another_question_is_judged_anew(recipes: None, tmp_path: Path, change: str) -> None:
    checked(Bench(tmp_path), [row(1, 0.5)])
    bench = Bench(tmp_path, "other" if change == "weights" else "w")
    if change == "images":
        bench.work.splits.hashes["search"] = "other"
    if change == "damage":
        (saved,) = (tmp_path / "finalists").iterdir()
        saved.write_text(saved.read_text().replace("0.9", "0.8"))
    checked(bench, [row(2 if change == "recipe" else 1, 0.5)], (0.3,) if change == "budgets" else (0.3, 0.6))
    assert len(bench.asked) == 1
