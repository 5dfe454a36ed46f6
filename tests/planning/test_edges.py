"""Budgets that are exactly met and just missed, meters against pruned networks, and how answers lie apart."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from torch import Tensor, fx, nn

from compressor.budgets import Budget
from compressor.errors import BudgetError
from compressor.graph import trace
from compressor.graph.cost import measure_cost
from compressor.planning import RankingOptions, make_plan
from compressor.planning.budget import least_share, make_meter
from compressor.planning.likeness import WORST, Likeness
from compressor.pruning import Structure, analyse, prune
from compressor.pruning.check import random_units
from compressor.pruning.structure import Keep
from compressor.pruning.surgery import removed_classes
from compressor.records import Scores

ONE = RankingOptions(multiple=1, least=0.0)
Net = tuple[fx.GraphModule, Structure, Scores]


@pytest.fixture(scope="module")
def hundred() -> Net:
    """One group of a hundred units."""
    model = nn.Sequential(nn.Conv2d(3, 100, 1), nn.ReLU(), nn.Flatten(), nn.Linear(100, 5))
    graph = trace(model.eval(), torch.randn(2, 3, 1, 1))
    return graph, analyse(graph), Scores("given", {"0": np.arange(1.0, 101)[None]}, 1)


def units_left(gone: Keep) -> float:
    return 100 - float(gone.sum())


# 0.29 * 100 is 28.999999999999996 in floating point, and so are 57 and 58 missed
@pytest.mark.parametrize(
    ("share", "left"),
    [(0.29, 29), (0.57, 57), (0.58, 58), (0.289, 28), (0.295, 29), (0.01, 1), (0.999, 99), (1.0, 100)],
)
def test_a_budget_may_be_met_exactly(hundred: Net, share: float, left: int) -> None:
    plan = make_plan(*hundred, Budget("macs", share), ONE, cost=units_left)
    assert {name: len(units) for name, units in plan.kept.items()} == ({"0": left} if left < 100 else {})
    assert all(units.tolist() == list(range(100 - left, 100)) for units in plan.kept.values())


@pytest.mark.parametrize("least", [0.29, 0.57, 0.58, 0.3])
def test_the_budget_that_a_refusal_names_can_be_met(hundred: Net, least: float) -> None:
    options = RankingOptions(multiple=1, least=least)
    with pytest.raises(BudgetError) as refused:
        make_plan(*hundred, Budget("macs", least - 0.001), options, cost=units_left)
    named = re.search(r"--budget 'macs ([\d.]+)'", str(refused.value))
    assert named
    assert float(named[1]) == least
    plan = make_plan(*hundred, Budget("macs", float(named[1])), options, cost=units_left)
    assert len(plan.kept["0"]) == round(100 * least)
    assert least_share(*hundred, "macs", options, cost=units_left) == least


def test_of_two_budgets_both_may_be_met_exactly(hundred: Net) -> None:
    graph, structure, _ = hundred
    parameters = Budget("parameters", (29 * 9 + 5) / (100 * 9 + 5))  # 3 weights, a bias, 5 weights behind; 5 biases
    plan = make_plan(*hundred, Budget("macs", 0.29), ONE, also=[parameters])
    assert len(plan.kept["0"]) == 29
    small, _ = prune(graph, structure, plan)
    assert measure_cost(small).parameters == 29 * 9 + 5
    assert (plan.macs_kept, plan.macs_dense) == (29 * 8, 100 * 8)


def test_a_network_that_costs_nothing_keeps_everything(hundred: Net) -> None:
    options = RankingOptions(per_cost=0.0)
    assert make_plan(*hundred, Budget("macs", 0.5), options, cost=lambda gone: 0.0).kept == {}


class Mixed(nn.Module):
    """Convolutions of every form, attention, a parameter under two names and one that nothing reads."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.grouped = nn.Conv2d(3, 12, 3, padding=1), nn.Conv2d(12, 16, 3, dilation=2, groups=4)
        self.up, self.depthwise = nn.ConvTranspose2d(16, 12, 2, 2), nn.Conv2d(12, 24, 3, groups=12)
        self.qkv, self.proj, self.head = nn.Linear(24, 48), nn.Linear(16, 24, bias=False), nn.Linear(24, 5)
        self.tied = nn.Linear(16, 24, bias=False)
        self.tied.weight = self.proj.weight
        self.unread = nn.Parameter(torch.zeros(7))

    def forward(self, x: Tensor) -> Tensor:
        x = self.depthwise(self.up(self.grouped(self.stem(x).relu()).relu()).relu())
        x = x.flatten(2).transpose(1, 2)
        q, k, v = self.qkv(x).reshape(len(x), -1, 3, 2, 8).permute(2, 0, 3, 1, 4).unbind(0)
        y = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + self.proj(y) + self.tied(y)
        return self.head(x.mean(1))  # type: ignore[no-any-return]


def test_a_meter_says_what_the_pruned_network_costs() -> None:
    torch.manual_seed(0)
    graph = trace(Mixed().eval(), torch.randn(3, 3, 7, 7))
    structure = analyse(graph)
    meter = make_meter(graph, structure)
    dense = measure_cost(graph)
    assert meter(removed_classes(structure, {})) == (dense.macs, dense.parameters)
    # the tied weight counts once, the parameter that nothing reads is none of the graph's
    convolutions = (12 * 27 + 12) + (16 * 27 + 16) + (16 * 12 * 4 + 12) + (24 * 9 + 24)
    assert dense.parameters in (convolutions + (24 * 48 + 48) + 16 * 24 + 24 * 5 + 5 + unread for unread in (0, 7))
    for seed, share in ((0, 1 / 3), (1, 0.5), (2, 0.7)):
        kept = random_units(structure, seed, share)
        small = measure_cost(prune(graph, structure, kept)[0])
        assert meter(removed_classes(structure, kept)) == (small.macs, small.parameters)
        assert small.macs < dense.macs


# how far answers lie apart


def test_logits_are_compared_without_what_all_classes_share() -> None:
    """[1, 2, 3] is [-1, 0, 1] beside its mean: of square 2, and [1, 2, 6] is [-2, -1, 3], 1 + 1 + 4 from it."""
    expected = torch.tensor([[1.0, 2.0, 3.0]])
    likeness = Likeness.to([expected], ["logits"], None)
    assert likeness.error([expected + 5]) == 0.0
    assert likeness.error([torch.tensor([[1.0, 2.0, 6.0]])]) == pytest.approx(6 / 2)
    assert likeness.error([torch.zeros(1, 3)]) == pytest.approx(1.0)


def test_batches_count_by_their_squares_and_a_single_score_is_not_centred() -> None:
    likeness = Likeness.to([torch.tensor([[3.0]]), torch.tensor([[4.0], [0.0]])], ["score"], None)
    assert likeness.error([torch.tensor([[3.0]]), torch.tensor([[4.0], [5.0]])]) == pytest.approx(25 / 25)
    assert likeness.error([torch.tensor([[2.0]]), torch.tensor([[4.0], [0.0]])]) == pytest.approx(1 / 25)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
def test_what_is_no_answer_is_the_worst(value: float) -> None:
    likeness = Likeness.to([torch.tensor([[1.0, -1.0]])], ["logits"], None)
    assert likeness.error([torch.tensor([[value, 0.0]])]) == WORST


def test_answers_that_say_nothing_are_no_division_by_zero() -> None:
    likeness = Likeness.to([torch.zeros(2, 3)], ["logits"], None)
    assert likeness.error([torch.zeros(2, 3)]) == 0.0
    assert likeness.error([torch.tensor([[0.0, 1.0, 0.0]] * 2)]) == WORST
