"""Tables of times: interpolation against the bilinear formula written out, and a file that outlives its writers."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest

from compressor.latency import tables
from compressor.latency.tables import Kept, Table, levels, shared_place, smoothed

# One bilinear formula in float64.
EXACT = 1e-12

TABLE = Table((8, 16, 32), (4, 12), (1, 1), ((1.0, 5.0), (2.0, 8.0), (6.0, 20.0)))


def by_hand(inputs: float, outputs: float) -> float:
    """Between the four points around it, each weighed by the opposite area."""
    low_i, high_i = (8, 16) if inputs <= 16 else (16, 32)
    row = {8: 0, 16: 1, 32: 2}
    a, b = (inputs - low_i) / (high_i - low_i), (outputs - 4) / 8
    us = TABLE.us
    return (
        (1 - a) * (1 - b) * us[row[low_i]][0]
        + (1 - a) * b * us[row[low_i]][1]
        + a * (1 - b) * us[row[high_i]][0]
        + a * b * us[row[high_i]][1]
    )


@pytest.mark.parametrize("inputs", [8, 9, 13, 16, 17, 31, 32])
@pytest.mark.parametrize("outputs", [4, 5, 11, 12])
def test_between_the_points_it_is_bilinear(inputs: int, outputs: int) -> None:
    assert TABLE.at(inputs, outputs) == pytest.approx(by_hand(inputs, outputs), abs=EXACT)


def test_beyond_the_lattice_its_nearest_point_counts() -> None:
    assert TABLE.at(1, 1) == TABLE.at(8, 4) == 1.0
    assert TABLE.at(99, 99) == TABLE.at(32, 12) == 20.0


def test_a_width_counts_as_the_next_step_above_it() -> None:
    stepped = Table((16, 32, 64), (8,), (16, 1), ((1.0,), (2.0,), (6.0,)))
    assert [stepped.at(width, 8) for width in (17, 32)] == [2.0, 2.0]
    assert [stepped.at(width, 8) for width in (33, 48)] == [4.0, 4.0]  # half the way from 32 to 64
    assert stepped.at(49, 8) == stepped.at(64, 8) == 6.0


@pytest.mark.parametrize(
    ("dense", "least", "step", "widths"),
    [(64, 7, 16, (16, 32, 64)), (64, 64, 16, (64,)), (60, 10, 8, (16, 32, 60)), (64, 1, 1, (8, 16, 32, 64))],
)
def test_widths_worth_timing_are_halves_on_the_steps(
    dense: int, least: int, step: int, widths: tuple[int, ...]
) -> None:
    assert levels(dense, least, step) == widths


def test_smoothed_times_rise_and_true_ones_stay() -> None:
    rng = np.random.default_rng(0)
    noisy = np.cumsum(rng.uniform(0.1, 1, (6, 5)), axis=0) + rng.normal(0, 0.5, (6, 5))
    smooth = smoothed(noisy)
    assert (np.diff(smooth, axis=0) >= -EXACT).all()
    assert (np.diff(smooth, axis=1) >= -EXACT).all()
    rising = np.add.outer(np.arange(6.0), np.arange(5.0))
    np.testing.assert_array_equal(smoothed(rising), rising)
    np.testing.assert_array_equal(smoothed(np.array([[10.0, 14.0, 12.0]])), [[10.0, 13.0, 13.0]])


def test_what_was_put_is_there_for_the_next(tmp_path: Path) -> None:
    kept = Kept(tmp_path / "model.json")
    assert kept.get("a") is None
    kept.put("a", [1.0, 2.0])
    assert (kept.measured, Kept(tmp_path / "model.json").get("a")) == (1, [1.0, 2.0])
    assert Kept(tmp_path / "model.json").measured == 0


def test_two_runs_that_share_a_file_lose_nothing_of_each_others(tmp_path: Path) -> None:
    shared = tmp_path / "shared.json"
    first, second = Kept(tmp_path / "1.json", shared), Kept(tmp_path / "2.json", shared)
    first.put("a", 1.0)
    second.put("b", 2.0)
    first.put("c", 3.0)
    assert Kept(None, shared).entries == {"a": 1.0, "b": 2.0, "c": 3.0}
    assert Kept(tmp_path / "1.json").entries == {"a": 1.0, "c": 3.0}


def test_a_runs_own_entry_stands_before_the_shared_one(tmp_path: Path) -> None:
    Kept(tmp_path / "shared.json").put("a", 1.0)
    Kept(tmp_path / "own.json").put("a", 2.0)
    assert Kept(tmp_path / "own.json", tmp_path / "shared.json").get("a") == 2.0


@pytest.mark.parametrize("content", ["", "no JSON", '{"schema": "other"}', '{"schema": "latency-model/1"}'])
def test_a_damaged_file_holds_nothing(tmp_path: Path, content: str) -> None:
    (tmp_path / "model.json").write_text(content)
    assert Kept(tmp_path / "model.json").entries == {}


def test_an_entry_that_was_changed_by_hand_is_not_believed(tmp_path: Path) -> None:
    path = tmp_path / "model.json"
    Kept(path).put("a", 12.5)
    path.write_text(path.read_text().replace("12.5", "2.5"))
    assert Kept(path).entries == {}


def test_without_a_file_entries_are_kept_in_memory() -> None:
    kept = Kept(None)
    kept.put("a", 1.0)
    assert kept.get("a") == 1.0


def test_the_shared_file_lies_where_the_environment_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COMPRESSOR_CACHE", raising=False)
    assert shared_place() is None
    monkeypatch.setenv("COMPRESSOR_CACHE", "cache")
    assert shared_place() == Path("cache/latency-model.json")


def test_a_place_lies_between_its_neighbours() -> None:
    for width, step in itertools.product(range(1, 70), (1, 4, 16)):
        index, fraction = tables._place((16, 32, 64), width, step)
        assert 0 <= index <= 1
        assert 0 <= fraction <= 1
