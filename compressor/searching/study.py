"""A study of trials, shared by any number of processes.

In: a space, presets, a function from a point to qualities budget by budget. Out: the finished trials. What a
process that died was doing is taken up again, and no point is tried twice.
"""

from __future__ import annotations

import math
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import astuple, dataclass
from typing import NoReturn

import optuna
from optuna.exceptions import UpdateFinishedTrialError
from optuna.study import Study
from optuna.trial import FrozenTrial, Trial, TrialState

from ..errors import CompressorError
from ..relevance.composite import Axis, Choice
from .bench import Kept, area
from .heartbeat import beating
from .sampling import FINISHED, JUDGES
from .space import Space
from .storage import LOST
from .takeover import DEATHS, Lookout, name_of_worker, take_back, twin_in_queue

Qualities = Callable[[dict[str, str | float]], Iterator[Kept]]
WAIT_S = 1.0
REPEATS = 100  # in a row: the space holds nothing new
ASKING_S = 5.0  # a worker that began a trial says its point within, unless it died
ENOUGH = 2 * JUDGES  # complete trials, to say what a choice weighs


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
    worker: str = ""


@dataclass(frozen=True, slots=True)
class Progress:
    """How a study stands after a trial, of this process or another."""

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

    The last ones may be another process's: they are waited for, and taken over when it dies. `report` is called for
    every trial that finished since, between trials of this process.
    """
    lookout = Lookout(name_of_worker())
    news = _News(study, total, report)
    repeats = 0
    while time.monotonic() < until and repeats < REPEATS:
        take_back(study, lookout)
        news.tell()
        finished = _count(study, FINISHED)
        if finished >= total:
            return
        if finished + _count(study, (TrialState.RUNNING,)) >= total:
            time.sleep(WAIT_S)
            continue

        try:
            _run_next(study, lambda trial: _try(trial, space, qualities, lookout.worker, total, steps))
            repeats = 0
        except (RepeatedError, UpdateFinishedTrialError):  # the latter: taken for dead, and another's by now
            repeats += 1
    news.tell()


def _count(study: Study, states: tuple[TrialState, ...]) -> int:
    return len(study.get_trials(deepcopy=False, states=states))


class _News:
    """What finished since it was last told of, whoever tried it."""

    def __init__(self, study: Study, total: int, report: Callable[[Progress], None]) -> None:
        self.study, self.total, self.report = study, total, report
        self.told = {row.number: row for row in rows(study)}
        self.told_at_first, self.began_s = len(self.told), time.monotonic()

    def tell(self) -> None:
        """Each new row once, in the order the trials were begun."""
        for row in rows(self.study):
            if row.number in self.told:
                continue
            self.told[row.number] = row
            done = len(self.told)
            pace_s = (time.monotonic() - self.began_s) / (done - self.told_at_first)
            left_s = pace_s * max(0, self.total - done)
            self.report(Progress(row, best_of([*self.told.values()]), done, self.total, left_s))


def _run_next(study: Study, objective: Callable[[Trial], float]) -> None:
    """One trial, from the queue or drawn; what becomes of it is told the study, whatever that is.

    Raises what the objective raises, TrialPruned apart. Not by `Study.optimize`: where a trial was taken over, or the
    storage went away, that raises errors of its own in place of these.
    """
    trial = study.ask()
    try:
        with beating(study, trial):
            value = objective(trial)
    except optuna.TrialPruned:
        study.tell(trial, state=TrialState.PRUNED, skip_if_finished=True)
    except LOST:
        raise  # nobody is there to be told; the trial is known by its worker, which ends
    except BaseException as error:
        with suppress(UpdateFinishedTrialError, *LOST):
            if isinstance(error, KeyboardInterrupt):
                trial.set_user_attr("interrupted", True)
            study.tell(trial, state=TrialState.FAIL, skip_if_finished=True)
        raise
    else:
        study.tell(trial, value, skip_if_finished=True)


def _try(trial: Trial, space: Space, qualities: Qualities, worker: str, total: int, steps: int) -> float:
    """The area under the trial's qualities; what it reached is kept with it after every budget.

    Raises TrialPruned when it is given up, RepeatedError when it need not be tried.
    """
    trial.set_user_attr("worker", worker)
    point = space.walk(lambda axis: _suggested(trial, axis))
    trial.set_user_attr("asked", True)
    _require_new(trial, total)
    _require_survivable(trial)

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
        _give_up(trial, str(error))
    value = area(points)
    if not math.isfinite(value):
        _give_up(trial, f"its quality is {value}")
    return value


def _give_up(trial: Trial, why: str) -> NoReturn:
    """Ends a trial as a failed one, which counts and is not tried again."""
    trial.set_user_attr("why", why)
    raise optuna.TrialPruned


def _require_survivable(trial: Trial) -> None:
    """Gives up a point whose workers died too often."""
    deaths = trial.user_attrs.get("deaths", 0)
    if deaths >= DEATHS:
        _give_up(trial, f"its worker died {deaths} times in a row; it is not tried again")


def _suggested(trial: Trial, axis: Axis) -> str | float:
    if isinstance(axis, Choice):
        return str(trial.suggest_categorical(axis.field, axis.values))
    return trial.suggest_float(axis.field, axis.lowest, axis.highest, log=axis.logarithmic)


def _require_new(trial: Trial, total: int) -> None:
    """Raises RepeatedError where the point is another trial's, or enough others were begun before this one."""
    trials = _once_asked(trial)
    earlier = [row for row in trials if _began_before(row, trial)]
    twin = twin_in_queue(trials[trial.number], trials)
    if twin is None:
        twin = next((row for row in earlier if row.params == trial.params), None)

    if twin is not None:
        reason = f"as trial {twin.number}"
    elif len(earlier) >= total:
        reason = "enough trials"
    else:
        return
    trial.set_user_attr("skipped", reason)
    raise RepeatedError


def _once_asked(trial: Trial) -> list[FrozenTrial]:
    """All trials, by number, when those that were begun before this one have said their points.

    Of two that are begun at once the later waits for the earlier; one that died in that moment is not waited for.
    """
    give_up_s = time.monotonic() + ASKING_S
    trials = trial.study.get_trials(deepcopy=False)
    while any(map(_is_silent, trials[: trial.number])) and time.monotonic() <= give_up_s:
        time.sleep(0.05)
        trials = trial.study.get_trials(deepcopy=False)
    return trials


def _is_silent(trial: FrozenTrial) -> bool:
    """Whether it was begun and has not said its point yet."""
    return trial.state == TrialState.RUNNING and "asked" not in trial.user_attrs


def _began_before(rival: FrozenTrial, trial: Trial) -> bool:
    """Of two that run the lower number goes on; what is finished came before in any case."""
    if rival.state == TrialState.RUNNING:
        return rival.number < trial.number
    return rival.state in FINISHED


def rows(study: Study) -> list[TrialRow]:
    """The finished trials in the order they were begun."""
    return [row_of(trial) for trial in study.get_trials(deepcopy=False, states=FINISHED)]


def row_of(trial: FrozenTrial) -> TrialRow:
    """A trial as it stands, also one that runs."""
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
        str(attributes.get("worker", "")),
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
    if len(complete) < ENOUGH or len(distinct_values) < 2:
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
        if asked >= ENOUGH and share > 0:
            weights[name] = float(share)
    total = sum(weights.values())
    return {name: round(weight / total, 4) for name, weight in weights.items()}
