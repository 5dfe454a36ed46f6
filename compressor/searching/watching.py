"""A study as somebody watches it: every trial, whoever tries it, as it stands now.

Read at any moment and from any thread; a storage that does not answer leaves the last look standing, since it is for
the trials themselves to say so.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace

from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState

from .storage import LOST
from .study import TrialRow, row_of
from .takeover import short_name

_WORDS = {TrialState.RUNNING: "running", TrialState.WAITING: "waiting", TrialState.FAIL: "broken off"}


@dataclass(frozen=True, slots=True)
class TrialView:
    """One trial. Of a running one `row` holds what it reached, and `row.seconds` how long it was seen running."""

    row: TrialRow
    state: str
    worker: str


Look = Callable[[], tuple[TrialView, ...]]


@contextmanager
def watched(study: Study) -> Iterator[Look]:
    """What looks at the study; after the block it gives what was seen last."""
    seen_since: dict[int, float] = {}
    last: tuple[TrialView, ...] = ()
    is_open = True

    def look() -> tuple[TrialView, ...]:
        nonlocal last
        if is_open:
            with suppress(*LOST):
                last = _views(study, seen_since)
        return last

    try:
        yield look
    finally:
        look()
        is_open = False


def _views(study: Study, seen_since: dict[int, float]) -> tuple[TrialView, ...]:
    """In the order the trials were begun, but for what was skipped: a point that was another trial's already."""
    trials = study.get_trials(deepcopy=False)
    return tuple(_view(trial, seen_since) for trial in trials if "skipped" not in trial.user_attrs)


def _view(trial: FrozenTrial, seen_since: dict[int, float]) -> TrialView:
    row = row_of(trial)
    if trial.state == TrialState.RUNNING:  # by our clock: another machine's may be wrong
        since_s = seen_since.setdefault(trial.number, time.monotonic() - row.seconds)
        row = replace(row, seconds=time.monotonic() - since_s)
    return TrialView(row, _WORDS.get(trial.state, row.state), short_name(row.worker))


def point_text(point: Mapping[str, str | float]) -> str:
    """`low.rule gamma, low.gamma 0.3, scope global`: the families' prefix left out."""
    return ", ".join(f"{name.removeprefix('lrp.')} {_value_text(value)}" for name, value in point.items())


def _value_text(value: str | float) -> str:
    return value if isinstance(value, str) else f"{value:.3g}"
