"""A study of trials, shared by any number of processes.

In: a space, presets, a function from a point to qualities budget by budget. Out: the finished trials. What a
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
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass

import optuna
from optuna.exceptions import UpdateFinishedTrialError
from optuna.study import Study
from optuna.trial import FrozenTrial, Trial, TrialState

from ..errors import CompressorError
from ..relevance.composite import Axis, Choice
from .bench import Kept, area
from .sampling import FINISHED, JUDGES
from .space import Space

Qualities = Callable[[dict[str, str | float]], Iterator[Kept]]
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
    enqueued = {trial.user_attrs.get("preset") for trial in study.get_trials(deepcopy=False, states=live)}
    for name, point in presets.items():
        if name not in enqueued:
            study.enqueue_trial(dict(point), user_attrs={"preset": name})


def run_trials(
    study: Study,
    space: Space,
    qualities: Qualities,
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
    began, own_trials, repeats = time.monotonic(), 0, 0
    while time.monotonic() < until and repeats < REPEATS:
        _take_back(study, worker)
        finished = _count(study, FINISHED)
        running = _count(study, (TrialState.RUNNING,))
        if finished >= total:
            return
        if finished + running >= total:
            time.sleep(WAIT_S)
            continue

        try:
            study.optimize(lambda trial: _try(trial, space, qualities, worker, total, steps), n_trials=1)
        except (RepeatedError, UpdateFinishedTrialError):  # the latter: taken for dead, and another's by now
            repeats += 1
            continue
        own_trials, repeats = own_trials + 1, 0

        last = _last_of(study, worker)
        finished = _count(study, FINISHED)
        # this process's pace, shared with as many processes as ran beside it when the trial began
        left_s = (time.monotonic() - began) / own_trials * max(0, total - finished) / (running + 1)
        report(Progress(last, best_of(rows(study)), finished, total, left_s))


def _count(study: Study, states: tuple[TrialState, ...]) -> int:
    return len(study.get_trials(deepcopy=False, states=states))


def _last_of(study: Study, worker: str) -> TrialRow:
    """The finished trial that this worker began last."""
    finished = rows(study)
    trials = study.trials  # read after the rows: other processes add trials meanwhile
    return next(row for row in reversed(finished) if trials[row.number].user_attrs.get("worker") == worker)


def _try(trial: Trial, space: Space, qualities: Qualities, worker: str, total: int, steps: int) -> float:
    """The area under the trial's qualities; what it reached is kept with it after every budget.

    Raises TrialPruned when it is given up, RepeatedError when it need not be tried.
    """
    trial.set_user_attr("worker", worker)
    point = space.walk(lambda axis: _suggested(trial, axis))
    _require_new(trial, total)

    points: list[Kept] = []
    start = time.perf_counter()
    try:
        for step, kept in enumerate(qualities(point)):
            points.append(kept)
            trial.set_user_attr("points", [list(astuple(done)) for done in points])
            trial.set_user_attr("seconds", round(time.perf_counter() - start, 2))
            trial.report(statistics.fmean(done.quality for done in points), step)
            budgets_are_left = step + 1 < steps
            if budgets_are_left and trial.should_prune():
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
    earlier = [row for row in trial.study.get_trials(deepcopy=False) if _began_before(row, trial)]
    twin = next((row for row in earlier if row.params == trial.params), None)
    if twin is None and len(earlier) < total:
        return
    trial.set_user_attr("skipped", "enough trials" if twin is None else f"as trial {twin.number}")
    raise RepeatedError


def _began_before(rival: FrozenTrial, trial: Trial) -> bool:
    """Of two that run the lower number goes on; what is finished came before in any case."""
    if rival.number == trial.number:
        return False
    return rival.state in FINISHED or (rival.state == TrialState.RUNNING and rival.number < trial.number)


def _take_back(study: Study, worker: str) -> None:
    """Trials that were stopped half-way are queued again; those of dead processes are stopped first."""
    optuna.storages.fail_stale_trials(study)
    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        if _is_dead(str(trial.user_attrs.get("worker", "")), worker):
            study.tell(trial.number, state=TrialState.FAIL, skip_if_finished=True)

    trials = study.get_trials(deepcopy=False)
    retried = {trial.user_attrs.get("retries") for trial in trials}
    for trial in trials:
        if trial.state != TrialState.FAIL or "skipped" in trial.user_attrs or trial.number in retried:
            continue
        attributes = {"retries": trial.number}
        if "preset" in trial.user_attrs:
            attributes["preset"] = trial.user_attrs["preset"]
        point = {**trial.system_attrs.get("fixed_params", {}), **trial.params}
        study.enqueue_trial(point, user_attrs=attributes)


def _is_dead(worker: str, asking: str) -> bool:
    """Whether a worker of this machine (`host:pid:run`) does not run any more; of other machines its heartbeat tells.

    `asking` is the worker of this process.
    """
    host, _, process = worker.partition(":")
    if host != asking.partition(":")[0] or worker == asking or not process:
        return False
    pid = int(process.partition(":")[0])
    if pid == os.getpid():  # an earlier search of this very process, or one whose number came again
        return True
    try:
        os.kill(pid, 0)  # signal 0 only asks whether it is there
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    return False


def rows(study: Study) -> list[TrialRow]:
    """The finished trials in the order they were begun."""
    return [_row(trial) for trial in study.get_trials(deepcopy=False, states=FINISHED)]


def _row(trial: FrozenTrial) -> TrialRow:
    attributes = trial.user_attrs
    saved_points = attributes.get("points", [])
    points = tuple(Kept(*fields) for fields in saved_points)

    if trial.state == TrialState.COMPLETE:
        state, value = "complete", trial.value
    else:
        state = "failed" if "why" in attributes else "stopped"
        value = area(points) if points else None

    return TrialRow(
        trial.number,
        state,
        value,
        dict(trial.params),
        points,
        float(attributes.get("seconds", 0.0)),
        str(attributes.get("preset", "")),
        str(attributes.get("why", "")),
    )


def best_of(trials: list[TrialRow]) -> TrialRow | None:
    """The complete trial with the largest area, the earlier of equals."""
    return max(complete_of(trials), key=lambda row: (row.value, -row.number), default=None)


def complete_of(trials: Sequence[TrialRow]) -> list[TrialRow]:
    """Those that went through all budgets; each has an area."""
    return [row for row in trials if row.state == "complete" and row.value is not None]


def importances(study: Study) -> dict[str, float]:
    """How far each choice sets the best complete trials apart, in shares of one (PED-ANOVA: Watanabe et al. 2023).

    Only of choices that enough complete trials had to make; empty where there are none.
    """
    complete = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    distinct_values = {trial.value for trial in complete}
    if len(complete) < 2 * JUDGES or len(distinct_values) < 2:
        return {}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of values that hardly any trial had
            evaluator = optuna.importance.PedAnovaImportanceEvaluator()
            shares = optuna.importance.get_param_importances(study, evaluator=evaluator)
    except (ValueError, RuntimeError):
        return {}  # nothing sets them apart

    weights: dict[str, float] = {}
    for name, share in shares.items():
        asked = sum(name in trial.params for trial in complete)
        if asked >= 2 * JUDGES and share > 0:
            weights[name] = float(share)
    total = sum(weights.values())
    return {name: round(weight / total, 4) for name, weight in weights.items()}
