"""Residual branches: which are found, and the network without some of them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from compressor.errors import ModelError
from compressor.graph import trace
from compressor.graph.cost import measure_cost
from compressor.planning.depth import order_of_branches
from compressor.planning.likeness import Likeness
from compressor.pruning.branches import find_branches, without_branches


class Block(nn.Module):
    """x + scale * f(x), f of two convolutions."""

    def __init__(self, channels: int, scale: float = 1.0) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(channels, channels, 3, padding=1), nn.Conv2d(channels, channels, 1)
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        return x + self.scale * self.second(self.first(x).relu())


class Residual(nn.Module):
    """A stem, blocks whose outputs pass a ReLU, a head."""

    def __init__(self, *scales: float) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.blocks = nn.ModuleList(Block(8, scale) for scale in scales)
        self.head = nn.Linear(8, 4)

    def forward(self, images: Tensor) -> Tensor:
        x = self.stem(images).relu()
        for block in self.blocks:
            x = block(x).relu()
        return self.head(x.mean((2, 3)))


class Skipping(nn.Module):
    """No branch here can go: one feeds a second output, one changes the width, one is scaled by its own sum."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.wide, self.short = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 6, 1), nn.Conv2d(3, 6, 1)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        inner = self.inner(images.relu())
        x = images + inner
        return self.wide(x) + self.short(x), inner


def images(count: int = 4) -> Tensor:
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def residual(*scales: float) -> nn.Module:
    torch.manual_seed(0)
    return Residual(*scales).eval()


def test_every_block_is_a_branch() -> None:
    graph = trace(residual(1.0, 1.0, 1.0), images())
    branches = find_branches(graph)
    assert [branch.nodes[0].meta["layer"] for branch in branches] == [f"blocks.{n}.first" for n in range(3)]


def test_what_others_read_is_no_branch() -> None:
    assert find_branches(trace(Skipping().eval(), images())) == ()


def test_without_a_branch_the_sum_is_the_stream() -> None:
    model = residual(1.0, 1.0, 0.0)
    graph = trace(model, images())
    small = without_branches(graph, [find_branches(graph)[2].name])
    torch.testing.assert_close(small(images()), graph(images()))
    assert measure_cost(small).macs < measure_cost(graph).macs
    assert not any(name.startswith("blocks.2") for name, _ in small.named_parameters())


def test_names_of_what_stays_are_kept() -> None:
    graph = trace(residual(1.0, 1.0), images())
    gone = find_branches(graph)[0]
    small = without_branches(graph, [gone.name])
    left = {node.name for node in graph.graph.nodes} - {node.name for node in gone.nodes}
    kept = {node.name for node in small.graph.nodes}
    assert kept <= left
    assert gone.name in kept


def test_a_branch_inside_another_goes_with_it() -> None:
    class Nested(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.outer, self.block = nn.Conv2d(3, 3, 1), Block(3)

        def forward(self, x: Tensor) -> Tensor:
            x = x.relu()
            return x + self.block(self.outer(x))

    graph = trace(Nested().eval(), images())
    inner, outer = find_branches(graph)
    assert set(inner.nodes) < set(outer.nodes)
    small = without_branches(graph, [outer.name, inner.name])
    torch.testing.assert_close(small(images()), images().relu())


def test_another_model_s_branch_is_refused() -> None:
    with pytest.raises(ModelError, match="'add_99'"):
        without_branches(trace(residual(1.0), images()), ["add_99"])


def test_the_graph_that_came_in_is_left_alone() -> None:
    graph = trace(residual(1.0, 1.0), images())
    before = graph(images())
    without_branches(graph, [find_branches(graph)[0].name])
    torch.testing.assert_close(graph(images()), before)


def test_the_least_missed_goes_first() -> None:
    graph = trace(residual(1.0, 0.01, 0.3), images())
    order = order_of_branches(graph, [images()], most=1.0)
    assert [dropped.layer for dropped in order] == ["blocks.1.first", "blocks.2.first", "blocks.0.first"]
    assert order[0].loss < order[1].loss


def test_losses_are_those_of_the_network_without_them() -> None:
    graph = trace(residual(1.0, 0.5, 0.3, 0.2), images())
    order = order_of_branches(graph, [images(), images(2)], most=0.5)
    likeness = Likeness.to([graph(images()), graph(images(2))], ["logits"], None)
    for number, dropped in enumerate(order, 1):
        small = without_branches(graph, [branch.name for branch in order[:number]])
        error = likeness.error([small(images()), small(images(2))])
        assert dropped.loss == pytest.approx(error, rel=1e-6)


def test_enough_is_enough() -> None:
    graph = trace(residual(*[0.1] * 6), images())
    order = order_of_branches(graph, [images()], most=0.2)
    assert sum(dropped.macs for dropped in order[:-1]) < 0.2 <= sum(dropped.macs for dropped in order)


def test_a_network_without_branches_has_none_to_lose() -> None:
    assert order_of_branches(trace(Skipping().eval(), images()), [images()], most=0.5) == ()
