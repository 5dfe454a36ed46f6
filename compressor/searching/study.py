"""A study of trials, shared by any number of processes.

In: a space, presets, a function from a point to accuracies budget by budget. Out: the finished trials. What a
process that died was doing is taken up again, and no point is tried twice.
"""

from __future__ import annotations

import math
import os
import socket
import statistics
import time
import uuid
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import optuna
from optuna.exceptions import UpdateFinishedTrialError
from optuna.study import Study
from optuna.trial import FrozenTrial, Trial, TrialState

from ..errors import CompressorError
from ..relevance.composite import Axis, Choice
from .bench import Kept, area
from .sampling import FINISHED, JUDGES
from .space import Space

Accuracies = Callable[[dict[str, str | float]], Iterator[Kept]]
WAIT_S = 1.0
REPEATS = 100  # in a row: the space holds nothing new


class RepeatedError(Exception):
    """A point that was tried already, or is being tried; not counted."""


@dataclass(frozen=True, slots=True)
class TrialRow:
    """One finished trial. `value` is its area, of a stopped one that of the budgets it reached; None: it failed."""

    number: int
    state: str
    value: float | None
    point: Mapping[str, str | float]
    points: tuple[Kept, ...]
    seconds: float
    preset: str = ""
    why: str = ""


@dataclass(frozen=True, slots=True)
class Progress:
    """How a study stands after a trial of this process."""

    row: TrialRow
    best: TrialRow | None
    done: int
    total: int
    left_s: float


def enqueue_presets(study: Study, presets: Mapping[str, Mapping[str, str | float]]) -> None:
    """The presets not in the study yet are tried before anything else."""
    live = (*FINISHED, TrialState.RUNNING, TrialState.WAITING)
    there = {t.user_attrs.get("preset") for t in study.get_trials(deepcopy=False, states=live)}
    for name, point in presets.items():
        if name not in there:
            study.enqueue_trial(dict(point), user_attrs={"preset": name})


def run_trials(
    study: Study,
    space: Space,
    accuracies: Accuracies,
    *,
    total: int,
    steps: int,
    until: float = math.inf,
    report: Callable[[Progress], None] = lambda progress: None,
) -> None:
    """Trials of `steps` budgets until the study has `total` finished ones, or `time.monotonic()` passes `until`.

    The last ones may be another process's: they are waited for, and taken over when it dies.
    """
    worker = f"{socket.gethostname()}:{os.getpid()}:{uuid.uuid4().hex[:8]}"
    began, mine, repeats = time.monotonic(), 0, 0
    while time.monotonic() < until and repeats < REPEATS:
        _take_back(study, worker)
        done = len(study.get_trials(deepcopy=False, states=FINISHED))
        running = len(study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)))
        if done >= total:
            return
        if done + running >= total:
            time.sleep(WAIT_S)
            continue
        try:
            study.optimize(lambda trial: _try(trial, space, accuracies, worker, total, steps), n_trials=1)
        except (RepeatedError, UpdateFinishedTrialError):  # the latter: taken for dead, and another's by now
            repeats += 1
            continue
        mine, repeats = mine + 1, 0
        last = next(r for r in reversed(rows(study)) if study.trials[r.number].user_attrs.get("worker") == worker)
        done = len(study.get_trials(deepcopy=False, states=FINISHED))
        left_s = (time.monotonic() - began) / mine * max(0, total - done) / (running + 1)
        report(Progress(last, best_of(rows(study)), done, total, left_s))


def _try(trial: Trial, space: Space, accuracies: Accuracies, worker: str, total: int, steps: int) -> float:
    trial.set_user_attr("worker", worker)
    point = space.walk(lambda axis: _suggested(trial, axis))
    _require_new(trial, total)
    points: list[Kept] = []
    start = time.perf_counter()
    try:
        for step, kept in enumerate(accuracies(point)):
            points.append(kept)
            trial.set_user_attr("points", [[p.budget, p.macs, p.correct, p.n] for p in points])
            trial.set_user_attr("seconds", round(time.perf_counter() - start, 2))
            trial.report(statistics.fmean(p.accuracy for p in points), step)
            if step + 1 < steps and trial.should_prune():
                raise optuna.TrialPruned
    except CompressorError as error:  # a composite may overflow on this network: a bad point, not a bad search
        trial.set_user_attr("why", str(error))
        raise optuna.TrialPruned from error
    return area(points)


def _suggested(trial: Trial, axis: Axis) -> str | float:
    if isinstance(axis, Choice):
        return str(trial.suggest_categorical(axis.field, axis.values))
    return trial.suggest_float(axis.field, axis.lowest, axis.highest, log=axis.logarithmic)


def _require_new(trial: Trial, total: int) -> None:
    """Raises RepeatedError where the point is another trial's, or enough others were begun before this one."""
    others = [t for t in trial.study.get_trials(deepcopy=False) if t.number != trial.number]
    earlier = [t for t in others if t.state in FINISHED or (t.state == TrialState.RUNNING and t.number < trial.number)]
    twin = next((t for t in earlier if t.params == trial.params), None)
    if twin is None and len(earlier) < total:
        return
    trial.set_user_attr("skipped", "enough trials" if twin is None else f"as trial {twin.number}")
    raise RepeatedError


def _take_back(study: Study, worker: str) -> None:
    """Trials that were stopped half-way are queued again; those of dead processes are stopped first."""
    optuna.storages.fail_stale_trials(study)
    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        if _is_dead(str(trial.user_attrs.get("worker", "")), worker):
            study.tell(trial.number, state=TrialState.FAIL, skip_if_finished=True)
    known = study.get_trials(deepcopy=False)
    again = {t.user_attrs.get("retries") for t in known}
    for trial in known:
        if trial.state == TrialState.FAIL and "skipped" not in trial.user_attrs and trial.number not in again:
            named = {"preset": trial.user_attrs["preset"]} if "preset" in trial.user_attrs else {}
            fixed = {**trial.system_attrs.get("fixed_params", {}), **trial.params}
            study.enqueue_trial(fixed, user_attrs={"retries": trial.number, **named})


def _is_dead(other: str, own: str) -> bool:
    """Whether a worker of this machine does not run any more; of other machines its heartbeat tells."""
    host, _, process = other.partition(":")
    if host != own.partition(":")[0] or other == own or not process:
        return False
    pid = int(process.partition(":")[0])
    if pid == os.getpid():
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    return False


def rows(study: Study) -> list[TrialRow]:
    """The finished trials in the order they were begun."""
    return [_row(t) for t in study.get_trials(deepcopy=False, states=FINISHED)]


def _row(trial: FrozenTrial) -> TrialRow:
    held = trial.user_attrs
    points = tuple(Kept(b, m, int(c), int(n)) for b, m, c, n in held.get("points", []))
    state = "complete" if trial.state == TrialState.COMPLETE else "failed" if "why" in held else "stopped"
    value = trial.value if state == "complete" else area(points) if points else None
    return TrialRow(
        trial.number,
        state,
        value,
        dict(trial.params),
        points,
        float(held.get("seconds", 0.0)),
        str(held.get("preset", "")),
        str(held.get("why", "")),
    )


def best_of(found: list[TrialRow]) -> TrialRow | None:
    """The complete trial with the largest area, the earlier of equals."""
    complete = [row for row in found if row.state == "complete" and row.value is not None]
    return max(complete, key=lambda row: (row.value, -row.number), default=None)


def importances(study: Study) -> dict[str, float]:
    """How far each choice sets the best complete trials apart, in shares of one (PED-ANOVA: Watanabe et al. 2023).

    Only of choices that enough complete trials had to make; empty where there are none.
    """
    complete = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    if len(complete) < 2 * JUDGES or len({t.value for t in complete}) < 2:
        return {}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of values that hardly any trial had
            evaluator = optuna.importance.PedAnovaImportanceEvaluator()
            found = optuna.importance.get_param_importances(study, evaluator=evaluator)
    except (ValueError, RuntimeError):
        return {}  # nothing sets them apart
    asked = {name: sum(name in t.params for t in complete) for name in found}
    said = {name: float(share) for name, share in found.items() if asked[name] >= 2 * JUDGES and share > 0}
    return {name: round(share / sum(said.values()), 4) for name, share in said.items()}
