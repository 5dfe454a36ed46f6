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
    plan: Plan
    trial: Trial
    trials: tuple[Trial, ...]


def ratio_of(pairs: Sequence[float], *, draws: int = 2000, seed: int = 0) -> Ratio:
    """The ratio of neighbouring turns' medians, `pairs`: what both turns had to share of a busy machine cancels."""
    values: FloatArray = np.asarray(pairs, dtype=np.float64)
    chosen = values[np.random.default_rng(seed).integers(len(values), size=(draws, len(values)))]
    low, high = np.quantile(np.median(chosen, axis=1), (0.025, 0.975))
    return Ratio(float(np.median(values)), float(low), float(high), len(values))


def meet(
    budget: Budget,
    *,
    plan_at: Callable[[float], tuple[Plan, float]],
    measure: Callable[[Plan], Ratio],
    least: float,
    progress: Callable[[str, float], None] = lambda what, share: None,
) -> Met:
    """Plans and times until the measured share is the budget's, within its slack.

    `plan_at(share)` gives the plan predicted to take at most that share (never asked for less than `least`,
    the share with everything removable gone) and its own prediction. Raises BudgetError naming the nearest
    measured figure.
    """
    trials: list[tuple[Trial, Plan]] = []
    asked = budget.share
    for _ in range(QUESTIONS):
        plan, predicted = plan_at(min(max(asked, least), 1.0))
        known = next((t for t, tried in trials if _same(plan, tried)), None)
        measured = known.measured if known else measure(plan)
        trial = Trial(asked, predicted, plan.macs_kept, measured)
        trials.append((trial, plan))
        if not known:
            progress(f"latency budget: {measured} measured, {budget.share:g} asked for", 1.0)
        if _is_met(trial, budget):
            return Met(plan, trial, tuple(t for t, _ in trials))
        asked = _next([t for t, _ in trials], budget.share, least)
        too_narrow = any(abs(asked / t.asked - 1) < FINEST for t, _ in trials)
        if too_narrow or len({t.measured for t, _ in trials}) == NETWORKS:
            break
    raise _refusal(budget, [t for t, _ in trials], least)


def _is_met(trial: Trial, budget: Budget) -> bool:
    return abs(trial.measured.value / budget.share - 1) <= budget.slack


def _same(plan: Plan, other: Plan) -> bool:
    return plan.kept.keys() == other.kept.keys() and all(np.array_equal(plan.kept[n], other.kept[n]) for n in plan.kept)


def _next(trials: Sequence[Trial], share: float, least: float) -> float:
    """What to ask for next: between the nearest answers on either side of the share, else beyond all of them."""
    above = min((t for t in trials if t.measured.value > share), key=lambda t: t.asked, default=None)
    below = max((t for t in trials if t.measured.value <= share), key=lambda t: t.asked, default=None)
    if above is None or below is None:
        return _beyond(trials, share, least)
    if above.asked <= below.asked:  # noise, or widths the tables misjudge
        return (above.asked + below.asked) / 2
    low, high, wanted = (log(v) for v in (below.measured.value, above.measured.value, share))
    part = min(max((wanted - low) / (high - low), 0.2), 0.8)
    return exp(log(below.asked) + part * (log(above.asked) - log(below.asked)))


def _beyond(trials: Sequence[Trial], share: float, least: float) -> float:
    """Along the line through the outermost answers, at most half the way to what can be asked at all upwards."""
    upwards = trials[0].measured.value <= share
    first, *rest = sorted(trials, key=lambda t: t.asked, reverse=upwards)
    other = next((t for t in rest if t.measured.value != first.measured.value), None)
    wanted = first.asked * share / first.measured.value
    if other is not None:
        slope = (first.asked - other.asked) / (first.measured.value - other.measured.value)
        wanted = first.asked + slope * (share - first.measured.value)
    if upwards:
        return min(max(wanted, first.asked * (1 + STRIDE)), sqrt(first.asked))
    return max(min(wanted, first.asked * (1 - STRIDE)), least)


def _refusal(budget: Budget, trials: Sequence[Trial], least: float) -> BudgetError:
    nearest = min(trials, key=lambda t: abs(log(t.measured.value / budget.share)))
    if all(t.measured.value > budget.share for t in trials) and nearest.asked <= least:
        return unreachable(budget, nearest.measured)
    figure, timed = nearest.measured, len({t.measured for t in trials})
    return BudgetError(
        f"budget '{budget}' was not met within {budget.slack:.0%}: the nearest of {timed} networks timed takes "
        f"{figure} of the dense one's time; ask for '{budget.asking(figure.value)}', or round kept counts to a "
        "smaller multiple"
    )


def unreachable(budget: Budget, least: Ratio) -> BudgetError:
    return BudgetError(
        f"budget '{budget}' can't be met: with every removable unit gone the network still takes {least} of the "
        f"dense one's time; ask for at least '{budget.asking(least.value)}', allow more kinds of units, or lower the "
        "share of each group that always stays"
    )


def met_to_json(met: Met) -> dict[str, Any]:
    return {"chosen": met.trials.index(met.trial), "trials": [asdict(t) for t in met.trials]}


def met_from_json(held: Mapping[str, Any], plan: Plan) -> Met:
    trials = tuple(Trial(**{**t, "measured": Ratio(**t["measured"])}) for t in held["trials"])
    return Met(plan, trials[held["chosen"]], trials)
