"""What a person reads on the terminal: bars that move, tables, warnings, and the lines below them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from rich.progress import TimeRemainingColumn
from rich.table import Table

from compressor.cli import screen, tables
from compressor.cli.screen import StageBars
from compressor.recipe import make_recipe
from compressor.records import Groups, LeftAlone

SUMMARY: dict[str, Any] = {
    "evaluation_images": 719,
    "accuracy_dense": 0.99,
    "accuracy_removed": 0.1,
    "accuracy_repaired": 0.97,
    "accuracy_tuned": 0.98,
    "accuracy_shipped": 0.98,
    "fidelity_shipped": 0.9421,
    "shipped": "tuned",
    "metric": "top-1",
    "is_share": True,
}


@pytest.fixture(autouse=True)
def _talking(monkeypatch: pytest.MonkeyPatch) -> None:
    """A command of another test in this process may have been asked to be quiet."""
    monkeypatch.setattr(screen.console, "quiet", False)


def cells(table: Table) -> list[list[str]]:
    """Rows of a table."""
    columns = [list(column.cells) for column in table.columns]
    return [[str(cell) for cell in row] for row in zip(*columns, strict=True)]


def test_a_bar_moves_once_a_share_is_known_and_says_how_long_it_takes_yet() -> None:
    bars = StageBars(None)
    with bars as notify:
        notify("repair-1", 0.0)
        (task,) = bars.bar.tasks
        assert task.total is None  # nothing is known yet, so it is not shown as standing at none
        notify("repair-1", 0.25)
        assert (task.total, task.completed) == (1.0, 0.25)
    assert [column for column in bars.bar.columns if isinstance(column, TimeRemainingColumn)] != []


def test_one_layer_left_alone_is_not_called_layers(capsys: pytest.CaptureFixture[str]) -> None:
    left_alone = (LeftAlone("fc", "output", "is the model's output"),)
    tables.units(make_recipe({"model": "net"}), Groups((), left_alone), "32 x 32 alone")
    said = capsys.readouterr().out
    assert "1 layer left alone" in said
    assert "0 groups of units" in said


def test_each_network_of_a_run_has_one_name_and_the_shipped_one_says_which_it_is() -> None:
    table = Table("", "dense", "shipped")
    tables._add_accuracies(table, SUMMARY)
    assert cells(table) == [
        ["top-1, 719 held out", "99.00%", "98.00% (tuned)"],
        ["  removed", "", "10.00%"],
        ["  repaired", "", "97.00%"],
        ["  tuned", "", "98.00%"],
        ["fidelity to the dense network (1: the same)", "", "0.942"],
    ]


def test_a_figure_is_under_its_measures_name_and_has_no_per_cent_where_it_is_no_share() -> None:
    def shown(**changes: object) -> list[list[str]]:
        table = Table("", "dense", "shipped")
        tables._add_accuracies(table, {**SUMMARY, **changes})
        return cells(table)

    decibels = shown(metric="PSNR", is_share=False, accuracy_dense=30.25, accuracy_shipped=29.5)
    assert decibels[0] == ["PSNR, 719 held out", "30.25", "29.50 (tuned)"]
    assert shown(metric="agreement")[0][0] == "agreement with the dense network, 719 held out"
    assert [row[0] for row in shown(metric="fidelity")].count("fidelity to the dense network (1: the same)") == 0


def test_a_gate_that_shows_nothing_is_not_among_those_that_passed() -> None:
    assert tables._gates_line({"a": "passed"}) == "all 1 gate passed"
    line = tables._gates_line({"a": "passed", "b": "not shown"})
    assert line.startswith("1 of 2 gates passed; not shown (")
    assert line.endswith("): b")


def test_what_a_busy_machine_timed_is_doubted_beside_its_figures(capsys: pytest.CaptureFixture[str]) -> None:
    busy = "busy machine: load 16.4 on 2 cores"
    speed_up = {"onnxruntime": {"single-stream": {"shipped": (1.58, 1.56, 1.61)}}}
    summary: Any = {"busy": busy, "speed_up": speed_up, "changes": [], "not_run": [], "page": str(Path("b.html"))}
    tables.benchmarked(summary)
    said = " ".join(capsys.readouterr().err.split())
    assert f"by medians (95 % interval); {busy}" in said
    assert f"warning: {busy} when the timing began: times and ratios may be off" in said
