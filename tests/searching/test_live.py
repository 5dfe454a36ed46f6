"""A search as it is watched: each trial whoever tries it, a table for people, a line a trial for logs."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path

import pytest
from optuna.exceptions import StorageInternalError
from optuna.study import Study
from rich.console import Console

from compressor.cli import trials as shown
from compressor.cli.trials import search_screen, table_of, trial_line
from compressor.searching import watching
from compressor.searching.bench import Kept
from compressor.searching.storage import open_study
from compressor.searching.study import Progress, TrialRow
from compressor.searching.watching import TrialView, point_text, watched

MORE = {f"lrp.layer{number}.rule": "zplus" for number in range(20)}  # longer than any terminal


@pytest.fixture
def study(tmp_path: Path) -> Iterator[Study]:
    with open_study(f"sqlite:///{tmp_path / 'study.db'}", "test", seed=0, images=100) as study:
        yield study


def _row(number: int, value: float, state: str = "complete", preset: str = "") -> TrialRow:
    point = {"lrp.low.rule": "gamma", "lrp.low.gamma": 0.25, "scope": "global", **MORE}
    kept = (Kept(0.5, 0.5, value, 100), Kept(0.8, 0.8, value, 100))
    return TrialRow(number, state, value, point, kept, 2.0, preset, worker="host:7:run:machine")


def _views(count: int, running: int = 0) -> list[TrialView]:
    finished = [TrialView(_row(i, 0.5 + i / 100), "complete", "host:7") for i in range(count)]
    return [*finished, *(TrialView(_row(count + i, 0.1), "running", "host:8") for i in range(running))]


def _printed(views: list[TrialView], height: int) -> list[str]:
    console = Console(file=io.StringIO(), width=100)
    console.print(table_of(views, height=height, width=100))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue().splitlines()


# what is seen


def test_a_running_trial_is_seen_with_its_worker_its_point_and_what_it_reached(study: Study) -> None:
    trial = study.ask()
    trial.set_user_attr("worker", "host:7:run:machine")
    trial.suggest_categorical("scope", ("global",))
    trial.set_user_attr("points", [[0.5, 0.5, 0.9, 100, True]])
    with watched(study) as look:
        (view,) = look()
    assert (view.state, view.worker, view.row.point) == ("running", "host:7", {"scope": "global"})
    assert view.row.points == (Kept(0.5, 0.5, 0.9, 100),)


def test_a_skipped_trial_is_not_seen_and_a_broken_one_is(study: Study) -> None:
    for attributes in ({"skipped": "as trial 0"}, {}):
        trial = study.ask()
        for name, value in attributes.items():
            trial.set_user_attr(name, value)
        study.tell(trial, state=watching.TrialState.FAIL)
    with watched(study) as look:
        assert [(view.row.number, view.state) for view in look()] == [(1, "broken off")]


def test_the_last_look_stands_when_the_storage_is_silent_or_closed(
    study: Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    study.ask()

    def silent(study: Study, seen_since: dict[int, float]) -> tuple[TrialView, ...]:
        raise StorageInternalError

    with watched(study) as look:
        seen = look()
        monkeypatch.setattr(watching, "_views", silent)
        assert look() == seen
    assert look() == seen


def test_a_point_is_told_in_short() -> None:
    point = {"lrp.low.rule": "gamma", "lrp.low.gamma": 0.25, "scope": "global"}
    assert point_text(point) == "low.rule gamma, low.gamma 0.25, scope global"


# what is shown


def test_the_table_has_what_runs_and_the_latest_of_the_others_in_order() -> None:
    lines = _printed(_views(30, running=2), height=6)
    assert lines[0].split() == ["trial", "worker", "state", "point", "area", "at", "the", "budgets", "seconds"]
    assert [line.split()[0] for line in lines[1:]] == ["26", "27", "28", "29", "30", "31"]
    assert lines[-1].split()[:3] == ["31", "host:8", "running"]
    assert "low.rule gamma, low.gamma 0.25" in lines[1]
    assert lines[1].split()[-7:] == ["76.00", "%", "76.00", "%", "76.00", "%", "2"]
    assert all(len(line) <= 100 for line in lines)


def test_the_table_is_no_higher_than_the_terminal() -> None:
    assert len(_printed(_views(3, running=9), height=4)) == 1 + 4
    assert len(_printed([], height=4)) == 1


def test_brackets_of_a_preset_are_no_markup() -> None:
    view = TrialView(_row(0, 0.5, preset="recipe = lrp"), "complete", "host:7")
    assert "[recipe = lrp]" in _printed([view], height=4)[1]


def _progress() -> Progress:
    row = _row(3, 0.5)
    return Progress(row, row, 4, 10, 90.0)


def test_a_log_names_the_worker_where_there_are_several() -> None:
    assert "trial 3 complete by host:7: area 50.00 % (best)" in trial_line(_progress(), several=True)
    assert "host" not in trial_line(_progress(), several=False)


def test_without_a_terminal_trials_are_lines_and_quiet_is_quiet(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for quiet in (False, True):
        monkeypatch.setattr(shown.console, "quiet", quiet)
        with search_screen(10, several=False) as screen:
            screen.on_study(lambda: tuple(_views(2)))
            screen.notify("finalists", 0.0)
            screen.on_trial(_progress())
    said = capsys.readouterr()
    assert said.out == ""
    assert [line.split(":")[0] for line in said.err.splitlines()] == ["finalists", "4/10 trial 3 complete"]


def test_on_a_terminal_the_table_lives(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = io.StringIO()
    terminal.isatty = lambda: True  # type: ignore[method-assign]
    monkeypatch.setattr(shown.sys, "stderr", terminal)
    monkeypatch.setattr(shown, "console", Console(file=terminal, force_terminal=True, width=120, height=40))
    with search_screen(10, several=False) as screen:
        screen.on_study(lambda: tuple(_views(2, running=1)))
        screen.on_trial(_progress())
    text = terminal.getvalue()
    assert "trials: best 50.00 %" in text
    assert "running" in text
    assert "4/10 trial 3" not in text
