"""A budget, a way to plan and a way to time in; the plan whose real latency meets the budget out.

The prediction is asked for the budget, the network it gives is timed beside the dense one, and what is asked
for is corrected: by the ratio while all are on one side, then by the secant (in logarithms) between the two sides.
Knows no network and no runtime.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from math import exp, log, sqrt
from typing import Any

import numpy as np

from ..budgets import Budget
from ..errors import BudgetError
from ..records import FloatArray, Plan

NETWORKS = 8  # timed at most
QUESTIONS = 24  # put to the prediction at most: neighbouring ones may give one and the same network
STRIDE = 0.01  # at least, towards answers on the other side
FINEST = 0.001  # between two questions, relative


@dataclass(frozen=True, slots=True)
class Ratio:
    """Pruned over dense latency: the median over turns, with a bootstrap 95 % interval, and whose clock it is."""

    value: float
    low: float
    high: float
    turns: int = 0
    clock: str = "wall"

    def __str__(self) -> str:
        return f"{self.value:.3f} ({self.low:.3f}-{self.high:.3f})"


@dataclass(frozen=True, slots=True)
class Trial:
    """`asked` of the prediction, `predicted` for the plan it gave, `measured` on the runtime: shares of dense."""

    asked: float
    predicted: float
    macs: int
    measured: Ratio


@dataclass(frozen=True, slots=True)
class Met:
    """The plan that meets the budget, the trial that showed it, and all trials in the order they were made."""

    plan: Plan
    trial: Trial
    trials: tuple[Trial, ...]


def ratio_of(pairs: Sequence[float], *, draws: int = 2000, seed: int = 0) -> Ratio:
    """The ratio of neighbouring turns' medians, `pairs`: what both turns had to share of a busy machine cancels."""
    ratios: FloatArray = np.asarray(pairs, dtype=np.float64)
    redrawn = np.random.default_rng(seed).integers(len(ratios), size=(draws, len(ratios)))  # with replacement
    medians = np.median(ratios[redrawn], axis=1)  # [draws]
    low, high = np.quantile(medians, (0.025, 0.975))
    return Ratio(float(np.median(ratios)), float(low), float(high), len(ratios))


def meet(
    budget: Budget,
    *,
    plan_at: Callable[[float], tuple[Plan, float]],
    measure: Callable[[Plan], Ratio],
    least: float,
    most: float = 1.0,
    progress: Callable[[str, float], None] = lambda what, share: None,
) -> Met:
    """Plans and times until the measured share is the budget's, within its slack.

    `plan_at(share)` gives the plan predicted to take at most that share (never asked for less than `least`,
    the share with everything removable gone, or more than `most`, beyond which another budget would not hold) and its
    own prediction. A network for `most` that is faster than asked for meets the budget. Raises BudgetError naming the
    nearest measured figure.
    """
    trials: list[Trial] = []
    plans: list[Plan] = []
    asked = min(budget.share, most)
    for _ in range(QUESTIONS):
        plan, predicted = plan_at(min(max(asked, least), most))
        measured = _measured_before(plan, plans, trials)
        if measured is None:
            measured = measure(plan)
            progress(f"latency budget: {measured} measured, {budget.share:.4g} asked for", 1.0)

        trial = Trial(asked, predicted, plan.macs_kept, measured)
        trials.append(trial)
        plans.append(plan)
        if _is_met(trial, budget, most):
            return Met(plan, trial, tuple(trials))

        asked = min(_next(trials, budget.share, least), most)
        too_narrow = any(abs(asked / earlier.asked - 1) < FINEST for earlier in trials)
        if too_narrow or _networks(trials) == NETWORKS:
            break
    raise _refusal(budget, trials, least)


def _measured_before(plan: Plan, plans: Sequence[Plan], trials: Sequence[Trial]) -> Ratio | None:
    """What the same plan measured, where an earlier question gave it: `plans` are the trials'."""
    for earlier_plan, trial in zip(plans, trials, strict=True):
        if _same(plan, earlier_plan):
            return trial.measured
    return None


def _networks(trials: Sequence[Trial]) -> int:
    """How many were timed; trials of one network share its measurement."""
    return len({trial.measured for trial in trials})


def _is_met(trial: Trial, budget: Budget, most: float) -> bool:
    """Within the budget's slack; or faster, where another budget lets no more stay."""
    share = trial.measured.value
    if abs(share / budget.share - 1) <= budget.slack:
        return True
    return most < 1 and trial.asked >= most and share <= budget.share


def _same(first: Plan, second: Plan) -> bool:
    if first.kept.keys() != second.kept.keys():
        return False
    return all(np.array_equal(first.kept[group], second.kept[group]) for group in first.kept)


def _next(trials: Sequence[Trial], share: float, least: float) -> float:
    """What to ask for next: between the nearest answers on either side of the share, else beyond all of them."""
    slower = [trial for trial in trials if trial.measured.value > share]
    faster = [trial for trial in trials if trial.measured.value <= share]
    if not slower or not faster:
        return _beyond(trials, share, least)

    above = min(slower, key=lambda trial: trial.asked)
    below = max(faster, key=lambda trial: trial.asked)
    if above.asked <= below.asked:  # noise, or widths the tables misjudge
        return (above.asked + below.asked) / 2

    # the secant in logarithms, kept off both ends: the line through two noisy points may hit one of them again
    low, high = log(below.measured.value), log(above.measured.value)
    fraction = min(max((log(share) - low) / (high - low), 0.2), 0.8)
    return exp(log(below.asked) + fraction * (log(above.asked) - log(below.asked)))


def _beyond(trials: Sequence[Trial], share: float, least: float) -> float:
    """Along the line through the outermost answers, at most half the way to what can be asked at all upwards.

    All answers lie on one side of the share; of a single one, what was asked is scaled by the ratio.
    """
    upwards = trials[0].measured.value <= share
    outermost, *inner = sorted(trials, key=lambda trial: trial.asked, reverse=upwards)
    second = next((trial for trial in inner if trial.measured.value != outermost.measured.value), None)
    if second is None:
        asked = outermost.asked * share / outermost.measured.value
    else:
        slope = (outermost.asked - second.asked) / (outermost.measured.value - second.measured.value)
        asked = outermost.asked + slope * (share - outermost.measured.value)

    if upwards:  # half the way to 1, in logarithms
        return min(max(asked, outermost.asked * (1 + STRIDE)), sqrt(outermost.asked))
    return max(min(asked, outermost.asked * (1 - STRIDE)), least)


def _refusal(budget: Budget, trials: Sequence[Trial], least: float) -> BudgetError:
    nearest = min(trials, key=lambda trial: abs(log(trial.measured.value / budget.share)))
    all_slower = all(trial.measured.value > budget.share for trial in trials)
    if all_slower and nearest.asked <= least:
        return unreachable(budget, nearest.measured)
    figure, timed = nearest.measured, _networks(trials)
    return BudgetError(
        f"budget '{budget}' was not met within {budget.slack:.0%}: the nearest of {timed} networks timed takes "
        f"{figure} of the dense one's time; ask for '{budget.asking(figure.value)}', or round kept counts to a "
        "smaller multiple"
    )


def unreachable(budget: Budget, least: Ratio) -> BudgetError:
    """The error to raise; `least` is what was measured with everything gone that may go."""
    return BudgetError(
        f"budget '{budget}' can't be met: with every removable unit gone the network still takes {least} of the "
        f"dense one's time; ask for at least '{budget.asking(least.value)}', allow more kinds of units, or lower the "
        "share of each group that always stays"
    )


def met_to_json(met: Met) -> dict[str, object]:
    """All but the plan, which has a file of its own."""
    return {"chosen": met.trials.index(met.trial), "trials": [asdict(trial) for trial in met.trials]}


def met_from_json(content: Mapping[str, Any], plan: Plan) -> Met:
    """The inverse of `met_to_json`."""
    trials = tuple(Trial(**{**fields, "measured": Ratio(**fields["measured"])}) for fields in content["trials"])
    return Met(plan, trials[content["chosen"]], trials)
