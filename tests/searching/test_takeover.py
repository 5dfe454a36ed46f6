"""Trials whose worker died, was interrupted or was taken for dead: each is done once, by whoever comes next."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from optuna.study import Study
from optuna.trial import TrialState

from compressor.recipe import Recipe
from compressor.relevance.composite import Choice
from compressor.searching import study as studies
from compressor.searching import takeover
from compressor.searching.bench import Kept
from compressor.searching.space import Space
from compressor.searching.storage import open_study
from compressor.searching.study import enqueue_presets, rows, run_trials
from compressor.searching.takeover import DEATHS, Lookout, is_dead, name_of_worker, short_name, take_back

AXES = ("a", "b", "c", "d")
SPACE = Space(Recipe(), tuple(Choice(f"axis{i}", AXES) for i in range(6)))
POINT = {f"axis{i}": "a" for i in range(6)}


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path / 'study.db'}"


@pytest.fixture
def study(url: str) -> Iterator[Study]:
    with open_study(url, "test", seed=0, images=100) as study:
        yield study


def _qualities(point: dict[str, str | float]) -> Iterator[Kept]:
    yield Kept(0.5, 0.5, sum(value == "a" for value in point.values()) / 8, 100)


def _run(study: Study, total: int, qualities: studies.Qualities = _qualities) -> list[studies.TrialRow]:
    run_trials(study, SPACE, qualities, total=total, steps=1)
    return rows(study)


def _dead_worker(study: Study) -> int:
    """A trial of the preset whose worker, of this machine, runs no more; its number."""
    trial = study.ask()
    host, _, run, machine = name_of_worker().split(":")
    trial.set_user_attr("worker", f"{host}:{2**22 + 1}:{run}:{machine}")  # Linux has no process of that number
    for axis in SPACE.axes:
        trial.suggest_categorical(axis.field, AXES)
    trial.set_user_attr("asked", True)
    return trial.number


def test_a_dead_workers_trial_is_done_by_the_next_once(study: Study) -> None:
    enqueue_presets(study, {"recipe": POINT})
    dead = _dead_worker(study)
    finished = _run(study, 3)
    assert len(finished) == 3
    assert [(row.preset, row.point) for row in finished if row.preset] == [("recipe", POINT)]
    assert [t.number for t in study.trials if t.state == TrialState.FAIL] == [dead]


def test_a_trial_that_two_workers_queued_again_at_once_is_done_once(study: Study) -> None:
    enqueue_presets(study, {"recipe": POINT})
    dead = _dead_worker(study)
    take_back(study, Lookout(name_of_worker()))
    study.enqueue_trial(dict(POINT), user_attrs={"retries": dead, "deaths": 1, "preset": "recipe"})
    finished = _run(study, 3)
    assert [row.point for row in finished].count(POINT) == 1
    assert study.trials[2].user_attrs["skipped"] == "as trial 1"


def test_a_preset_that_two_commands_queued_at_once_is_done_once(study: Study) -> None:
    for _ in range(2):
        study.enqueue_trial(dict(POINT), user_attrs={"preset": "recipe"})
    finished = _run(study, 3)
    assert [row.preset for row in finished].count("recipe") == 1


@pytest.mark.parametrize("reason", [{"preset": "recipe"}, {"retries": 7, "preset": "recipe"}], ids=["preset", "retry"])
def test_of_two_queued_for_one_reason_the_later_steps_back_whatever_the_earlier_said(
    study: Study, monkeypatch: pytest.MonkeyPatch, reason: dict[str, object]
) -> None:
    monkeypatch.setattr(studies, "ASKING_S", 0.0)
    for _ in range(2):
        study.enqueue_trial(dict(POINT), user_attrs=reason)
    earlier, later = study.ask(), study.ask()
    for axis in SPACE.axes:  # of the earlier one nothing is known yet
        later.suggest_categorical(axis.field, AXES)
    with pytest.raises(studies.RepeatedError):
        studies._require_new(later, 100)
    studies._require_new(earlier, 100)


def test_a_preset_that_was_one_too_many_may_be_queued_again(study: Study) -> None:
    presets = {"first": POINT, "second": {**POINT, "axis0": "b"}}
    enqueue_presets(study, presets)
    skipped, kept = study.ask(), study.ask()
    skipped.set_user_attr("skipped", "enough trials")
    for trial in (skipped, kept):
        trial.set_user_attr("worker", name_of_worker())
        study.tell(trial, state=TrialState.FAIL)
    enqueue_presets(study, presets)
    assert {row.preset for row in _run(study, 2)} == {"first", "second"}


def test_a_point_that_its_workers_die_of_is_a_failed_trial_and_said_so(study: Study) -> None:
    enqueue_presets(study, {"deadly": POINT})
    for _ in range(DEATHS):
        _dead_worker(study)
        take_back(study, Lookout(name_of_worker()))
    finished = _run(study, 2)
    assert [row.state for row in finished if row.preset == "deadly"] == ["failed"]
    assert f"died {DEATHS} times" in finished[0].why
    assert len(finished) == 2


def test_an_interrupted_trial_is_not_held_against_its_point(study: Study) -> None:
    def interrupted(point: dict[str, str | float]) -> Iterator[Kept]:
        raise KeyboardInterrupt
        yield

    enqueue_presets(study, {"recipe": POINT})
    for _ in range(DEATHS + 1):
        with pytest.raises(KeyboardInterrupt):
            _run(study, 2, interrupted)
    finished = _run(study, 1)
    assert [(row.preset, row.state) for row in finished] == [("recipe", "complete")]


def test_a_trial_whose_worker_never_said_its_name_is_taken_after_the_grace_time(
    study: Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It died between beginning the trial and its first heartbeat, which no heartbeat shows."""
    enqueue_presets(study, {"recipe": POINT})
    study.ask()
    lookout = Lookout(name_of_worker())
    take_back(study, lookout)
    assert [t.state for t in study.trials] == [TrialState.RUNNING]
    monkeypatch.setattr(takeover, "GRACE_S", -1)
    take_back(study, lookout)
    assert [t.state for t in study.trials] == [TrialState.FAIL, TrialState.WAITING]


def test_a_worker_that_was_taken_for_dead_goes_on_with_another_trial(study: Study) -> None:
    """As one that was asleep for longer than the grace time: what it does then counts for nothing."""
    robbed: list[dict[str, str | float]] = []

    def qualities(point: dict[str, str | float]) -> Iterator[Kept]:
        if not robbed:
            robbed.append(point)
            study.tell(study.trials[-1].number, state=TrialState.FAIL)
        yield from _qualities(point)

    finished = _run(study, 3, qualities)
    assert len(finished) == 3
    assert [row.point for row in finished].count(robbed[0]) == 1


def test_of_two_trials_begun_at_once_the_later_waits_until_the_earlier_said_its_point(
    study: Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    earlier, later = study.ask(), study.ask()
    waits: list[float] = []

    def meanwhile(seconds: float) -> None:
        waits.append(seconds)
        earlier.set_user_attr("asked", True)

    monkeypatch.setattr(studies.time, "sleep", meanwhile)
    trials = studies._once_asked(later)
    assert len(waits) == 1
    assert "asked" in trials[earlier.number].user_attrs


def test_one_that_died_before_it_said_its_point_is_not_waited_for(
    study: Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(studies, "ASKING_S", 0.0)
    study.ask()
    assert len(studies._once_asked(study.ask())) == 2


def test_a_quality_that_is_no_number_is_a_failed_trial(study: Study) -> None:
    def unmeasured(point: dict[str, str | float]) -> Iterator[Kept]:
        yield Kept(0.5, 0.5, float("nan"), 100)

    finished = _run(study, 1, unmeasured)
    assert [(row.state, row.why) for row in finished] == [("failed", "its quality is nan")]


def test_a_worker_that_ended_and_was_not_asked_how_is_dead() -> None:
    """As a helper is that was killed, while the process that started it is at a trial of its own."""
    host, _, run, machine = name_of_worker().split(":")
    process = subprocess.Popen([sys.executable, "-c", ""])
    worker = f"{host}:{process.pid}:{run}:{machine}"
    end = time.monotonic() + 30
    while not is_dead(worker, name_of_worker()) and time.monotonic() < end:
        time.sleep(0.01)
    assert is_dead(worker, name_of_worker())
    process.wait()


def test_workers_of_another_machine_are_judged_by_their_heartbeat_alone() -> None:
    own = name_of_worker()
    host, _, run, machine = own.split(":")
    gone = 2**22 + 1
    assert is_dead(f"{host}:{gone}:{run}:{machine}", own)
    assert not is_dead(f"{host}:{gone}:{run}:elsewhere", own)  # another container or boot that calls itself the same
    assert not is_dead(f"{host}:1:{run}:{machine}", own)
    assert not is_dead(f"{host}:{gone}:{run}", own)  # as an earlier version wrote it
    assert not is_dead(own, own)
    assert short_name(own) == ":".join(own.split(":")[:2])
