"""A budget on the clock, met against machines of known law: how often they are asked, and what is said if in vain."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from compressor.budgets import Budget, parse_budget
from compressor.errors import BudgetError
from compressor.latency.correction import NETWORKS, Met, Ratio, meet, met_from_json, met_to_json, ratio_of
from compressor.records import Plan

BUDGET = parse_budget("latency 0.5 on onnxruntime")


class Machine:
    """Networks of `grain` units: a plan for a share keeps so many, and takes the law's time of that share."""

    def __init__(self, law: Callable[[float], float], grain: int = 1000) -> None:
        self.law, self.grain = law, grain
        self.timed: list[float] = []
        self.asked: list[float] = []

    def plan_at(self, share: float) -> tuple[Plan, float]:
        self.asked.append(share)
        kept = int(share * self.grain)
        return Plan({"g": np.arange(kept)}, self.grain, kept), kept / self.grain

    def measure(self, plan: Plan) -> Ratio:
        measured = self.law(plan.macs_kept / self.grain)
        self.timed.append(measured)
        return Ratio(measured, measured, measured)

    def meet(self, budget: Budget = BUDGET, least: float = 0.05) -> Met:
        return meet(budget, plan_at=self.plan_at, measure=self.measure, least=least)


LAWS: dict[str, Callable[[float], float]] = {
    "right": lambda share: share,
    "too slow": lambda share: 0.2 + 0.8 * share,
    "too fast": lambda share: share**2,
    "much too fast": lambda share: share**4,
    "root": lambda share: share**0.5,
    "in steps": lambda share: 0.03 * round(share / 0.03),
}


@pytest.mark.parametrize("law", LAWS.values(), ids=LAWS)
@pytest.mark.parametrize("share", [0.3, 0.5, 0.8])
def test_the_measured_share_is_met_within_its_slack_and_few_networks(
    law: Callable[[float], float], share: float
) -> None:
    machine = Machine(law)
    met = machine.meet(Budget("latency", share, 0.03, "onnxruntime"))
    assert abs(met.trial.measured.value / share - 1) <= 0.03
    assert met.trial.measured.value == law(met.plan.macs_kept / machine.grain)
    assert len(machine.timed) <= NETWORKS
    assert met.trials[-1] is met.trial


def test_what_all_may_go_still_takes_is_named() -> None:
    machine = Machine(lambda share: 0.7 + 0.3 * share)
    with pytest.raises(BudgetError, match=r"can't be met: with every removable unit gone .* still takes 0\.7"):
        machine.meet(least=0.1)
    assert min(machine.asked) == 0.1  # never less than can be planned


def test_between_two_networks_the_nearest_is_named_and_no_network_timed_twice() -> None:
    machine = Machine(lambda share: share, grain=10)
    with pytest.raises(BudgetError, match=r"was not met within 3%: the nearest of \d networks timed takes 0\.[56]00"):
        machine.meet(Budget("latency", 0.55, 0.03, "onnxruntime"))
    assert len(machine.timed) == len(set(machine.timed))


def test_a_noisy_clock_ends_too() -> None:
    rng = np.random.default_rng(0)
    machine = Machine(lambda share: share * float(rng.uniform(0.7, 1.4)))
    try:
        machine.meet(Budget("latency", 0.5, 0.0001, "onnxruntime"))
    except BudgetError:
        assert len(machine.timed) <= NETWORKS


def test_progress_tells_each_network_once() -> None:
    said: list[str] = []
    machine = Machine(LAWS["too slow"])
    meet(
        BUDGET,
        plan_at=machine.plan_at,
        measure=machine.measure,
        least=0.05,
        progress=lambda what, share: said.append(what),
    )
    assert len(said) == len(machine.timed)
    assert all("measured, 0.5 asked for" in line for line in said)


def test_a_ratio_is_the_median_and_its_interval_holds_it() -> None:
    ratio = ratio_of([0.5, 0.52, 0.48, 5.0, 0.5])
    assert ratio.value == 0.5
    assert ratio.low <= 0.5 <= ratio.high
    assert ratio.turns == 5
    assert ratio_of([0.5, 0.52, 0.48, 5.0, 0.5]) == ratio  # the same draws every time
    assert str(Ratio(0.5, 0.48, 0.52)) == "0.500 (0.480-0.520)"


def test_the_interval_is_a_medians_of_so_many_turns() -> None:
    """1.96 standard errors of a median on either side: 1.2533 sigma / sqrt(n), for normal turns."""
    turns = 0.5 + 0.1 * np.random.default_rng(0).standard_normal(500)
    ratio = ratio_of(turns.tolist())
    assert ratio.high - ratio.low == pytest.approx(2 * 1.96 * 1.2533 * 0.1 / np.sqrt(500), rel=0.3)


def test_what_was_met_comes_back_from_json_with_its_plan() -> None:
    met = Machine(LAWS["too slow"]).meet()
    assert met_from_json(met_to_json(met), met.plan) == met


def test_a_network_that_another_budget_makes_faster_meets_this_one() -> None:
    """With more than 0.3 of the prediction the other budget would not hold."""
    machine = Machine(lambda share: share)
    met = meet(BUDGET, plan_at=machine.plan_at, measure=machine.measure, least=0.05, most=0.3)
    assert met.trial.measured.value == 0.3
    assert len(machine.timed) == 1


def test_where_the_other_budget_leaves_room_this_one_is_met_as_ever() -> None:
    machine = Machine(LAWS["too slow"])
    met = meet(BUDGET, plan_at=machine.plan_at, measure=machine.measure, least=0.05, most=0.9)
    assert abs(met.trial.measured.value / 0.5 - 1) <= 0.03
    assert max(machine.asked) <= 0.9
