"""A trial's heartbeat: the first before anything else, through short silences, and a long one ends the trial."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from pathlib import Path

import optuna
import pytest
from optuna.exceptions import StorageInternalError
from optuna.study import Study
from optuna.trial import TrialState

from compressor.errors import RecipeError
from compressor.searching import heartbeat
from compressor.searching.heartbeat import beating
from compressor.searching.storage import open_study

ENOUGH_S = 10.0  # for anything here, on a machine that is busy


@pytest.fixture
def study(tmp_path: Path) -> Iterator[Study]:
    with open_study(f"sqlite:///{tmp_path / 'study.db'}", "test", seed=0, images=100) as study:
        yield study


@pytest.fixture
def beats(monkeypatch: pytest.MonkeyPatch) -> list[Exception | None]:
    """What each of the next beats meets; those after the last are answered."""
    meetings: list[Exception | None] = []

    def beat(study: Study, trial: optuna.Trial) -> None:
        if len(meetings) > 1 and meetings.pop(0) is not None:
            raise StorageInternalError("gone")
        if len(meetings) == 1 and meetings[0] is not None:
            raise meetings[0]

    monkeypatch.setattr(heartbeat, "_beat", beat)
    monkeypatch.setattr(heartbeat, "HEARTBEAT_S", 0.01)
    monkeypatch.setattr(heartbeat, "PATIENCE_S", 0.05)
    return meetings


def test_a_trial_has_a_heartbeat_before_it_begins(study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without one, no other machine would ever take it for dead."""
    trial = study.ask()
    with beating(study, trial):
        monkeypatch.setattr(study._storage._backend, "grace_period", -1)  # type: ignore[attr-defined]
        optuna.storages.fail_stale_trials(study)
        assert study.trials[0].state == TrialState.FAIL


@pytest.fixture(params=["heard", "ignored"])
def ctrl_c(request: pytest.FixtureRequest) -> Iterator[None]:
    """As in a terminal, and as in a job that a shell started in the background."""
    before = signal.getsignal(signal.SIGINT)
    if request.param == "ignored":
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    yield
    after = signal.getsignal(signal.SIGINT)
    signal.signal(signal.SIGINT, before)
    assert after is (before if request.param == "heard" else signal.SIG_IGN)


@pytest.mark.usefixtures("ctrl_c")
def test_a_storage_that_stays_silent_ends_the_trial_with_its_error(study: Study, beats: list[Exception | None]) -> None:
    trial = study.ask()
    end = time.monotonic() + ENOUGH_S
    silence = StorageInternalError("gone")
    silence.__cause__ = ConnectionError("refused")
    with pytest.raises(StorageInternalError, match="gone") as caught, beating(study, trial):  # noqa: PT012
        beats.append(silence)
        while time.monotonic() < end:
            time.sleep(0.001)
    assert str(caught.value.__cause__) == "refused"


def test_a_short_silence_ends_nothing(
    study: Study, beats: list[Exception | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(heartbeat, "PATIENCE_S", ENOUGH_S)
    trial = study.ask()
    with beating(study, trial):
        beats += [StorageInternalError("gone"), StorageInternalError("gone"), None]
        end = time.monotonic() + ENOUGH_S
        while len(beats) > 1 and time.monotonic() < end:
            time.sleep(0.001)
    assert beats == [None]


def test_ctrl_c_stays_what_it_is(study: Study, beats: list[Exception | None]) -> None:
    with pytest.raises(KeyboardInterrupt), beating(study, study.ask()):
        raise KeyboardInterrupt


def test_a_storage_that_goes_away_is_one_line_and_how_to_go_on(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'study.db'}"
    with pytest.raises(RecipeError) as caught, open_study(url, "test", seed=0, images=100):
        raise StorageInternalError("the server closed the connection\nand more")
    assert "does not answer any more (the server closed the connection)" in str(caught.value)
    assert "the same command again" in str(caught.value)
    assert "\n" not in str(caught.value)
