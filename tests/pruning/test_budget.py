"""A budget is met within 2 % from below, or refused with the nearest reachable figure."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional
from torchvision.models import MobileNetV2

from compressor.budgets import SLACK
from compressor.cost import measure_cost
from compressor.errors import BudgetError, RecipeError
from compressor.graph import trace
from compressor.pruning import Budget, RankingOptions, Structure, find_structure, make_plan, parse_budget, prune
from compressor.pruning.budget import compose, least_share
from compressor.pruning.surgery import Keep, compact_shape, removed_classes
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


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.cell, self.head = nn.Conv2d(3, 8, 3), nn.LSTM(8, 6, batch_first=True), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.cell(self.stem(x).flatten(2).transpose(1, 2))[0][:, -1])


def test_a_network_without_units_says_what_stands_in_the_way() -> None:
    example = torch.randn(2, 3, 8, 8)
    graph = trace(Recurrent().eval(), example)
    with pytest.raises(BudgetError, match=r"no unit .* can be removed \(left alone: stem reaches aten\.lstm\.input"):
        make_plan(graph, find_structure(graph, example), Scores("given", {}, 1), Budget("macs", 0.5), RankingOptions())


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


class FusedAttention(nn.Module):
    """Queries, keys and values of one projection: their dimensions lie on one axis and lose equally many."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj, self.head = nn.Linear(24, 72), nn.Linear(24, 24), nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).reshape(len(x), -1, 3, 4, 6).permute(2, 0, 3, 1, 4).unbind(0)
        attended = functional.scaled_dot_product_attention(q, k, v)
        out: Tensor = self.head((x + self.proj(attended.transpose(1, 2).flatten(2))).mean(1))
        return out


def test_a_cost_of_every_tensor_may_be_asked_of_every_group() -> None:
    example = torch.randn(2, 7, 24, generator=torch.Generator().manual_seed(0))
    graph = trace(FusedAttention().eval(), example)
    structure = find_structure(graph, example)
    assert structure.coupled
    nodes = [n for n in graph.graph.nodes if isinstance(n.meta.get("val"), Tensor) and n.name in structure.values]

    def moved(gone: Keep) -> float:
        return float(sum(np.prod(compact_shape(n.meta["val"].shape, structure.lying(n), gone)) for n in nodes))

    values = {g.name: np.ones((len(g.sites), g.size)) for g in structure.groups.groups}
    budget = Budget("latency", 0.8, slack=1.0, runtime="onnxruntime")
    plan = make_plan(graph, structure, Scores("given", values, 1), budget, RankingOptions(multiple=1), cost=moved)
    assert moved(removed_classes(structure, plan.kept)) <= 0.8 * moved(removed_classes(structure, {}))
