"""A budget is met within 2 % from below, or refused with the nearest reachable figure."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from torch import fx
from torchvision.models import MobileNetV2

from compressor.cost import measure_cost
from compressor.errors import BudgetError, RecipeError
from compressor.graph import trace
from compressor.pruning import Budget, RankingOptions, Structure, find_structure, make_plan, parse_budget, prune
from compressor.pruning.budget import SLACK, compose, least_share
from compressor.records import Scores

Net = tuple[fx.GraphModule, Structure, Scores]


@pytest.fixture(scope="module")
def net() -> Net:
    torch.manual_seed(0)
    setting = [[1, 16, 1, 1], [6, 24, 2, 2], [6, 32, 2, 2]]
    example = torch.randn(2, 3, 32, 32)
    graph = trace(MobileNetV2(num_classes=7, inverted_residual_setting=setting), example)
    structure = find_structure(graph, example)
    generator = np.random.default_rng(0)
    values = {g.name: generator.random((len(g.sites), g.size)) for g in structure.groups.groups}
    return graph, structure, Scores("given", values, 1)


@pytest.mark.parametrize("kind", ["macs", "parameters"])
@pytest.mark.parametrize("share", [0.8, 0.5, 0.4])
def test_met_within_two_percent_from_below(net: Net, kind: str, share: float) -> None:
    graph, structure, scores = net
    plan = make_plan(graph, structure, scores, Budget(kind, share), RankingOptions(multiple=4))  # type: ignore[arg-type]
    small, _ = prune(graph, structure, plan)
    before, after = measure_cost(graph), measure_cost(small)
    reached = getattr(after, kind) / getattr(before, kind)
    assert (1 - SLACK) * share <= reached <= share
    assert plan.macs_kept == after.macs, "the figure read off the labels is the pruned network's own"
    assert plan.macs_dense == before.macs


@pytest.mark.parametrize("multiple", [2, 8])
def test_kept_counts_are_multiples(net: Net, multiple: int) -> None:
    graph, structure, scores = net
    plan = make_plan(graph, structure, scores, Budget("macs", 0.5), RankingOptions(multiple=multiple))
    assert plan.kept
    assert all(len(units) % multiple == 0 for units in plan.kept.values())


def test_refusal_names_a_figure_that_can_be_met(net: Net) -> None:
    graph, structure, scores = net
    options = RankingOptions(least=0.5)
    with pytest.raises(BudgetError) as refused:
        make_plan(graph, structure, scores, Budget("macs", 0.1), options)
    named = re.search(r"'macs ([\d.]+)'", str(refused.value).split("ask for")[1])
    assert named
    share = float(named.group(1))
    assert share == pytest.approx(least_share(graph, structure, scores, "macs", options), abs=1e-3)
    plan = make_plan(graph, structure, scores, Budget("macs", share), options)
    assert plan.macs_kept <= share * plan.macs_dense


def test_same_scores_same_plan(net: Net) -> None:
    graph, structure, scores = net
    plans = [make_plan(graph, structure, scores, Budget("macs", 0.5), RankingOptions()) for _ in range(2)]
    assert plans[0].kept.keys() == plans[1].kept.keys()
    assert all(np.array_equal(plans[0].kept[n], plans[1].kept[n]) for n in plans[0].kept)


@pytest.mark.parametrize("text", ["half", "macs", "macs 0", "macs 1.5", "latency"])
def test_budgets_that_are_not_understood(text: str) -> None:
    with pytest.raises(RecipeError, match="write 'macs S'"):
        parse_budget(text)


def test_two_rounds_as_one() -> None:
    first, second = {"a": np.array([1, 3, 5])}, {"a": np.array([0, 2]), "b": np.array([4])}
    both = compose(first, second)
    assert both["a"].tolist() == [1, 5]
    assert both["b"].tolist() == [4]
