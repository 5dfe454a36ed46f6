"""Experts spelled out as one convolution give what their mixture gives, and are refitted as it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from compressor.graph import fetch, trace
from compressor.pruning import find_structure, prune
from compressor.records import Slices
from compressor.repair import compensate
from compressor.repair.experts import as_stored, experts_as_layers, experts_of

PX, IMAGES = 8, 96
EXACT = 1e-12  # float64 rounding over a few hundred terms


class Net(nn.Module):
    """Experts of two groups between two convolutions; what is read of them depends on the image."""

    def __init__(self, groups: int = 2) -> None:
        super().__init__()
        self.groups = groups
        self.a, self.route = nn.Conv2d(3, 12, 3, 2, 1), nn.Linear(3, 3)
        self.experts = nn.Parameter(torch.randn(3, 8 * 12 // groups * 9) * 0.2)
        self.norm, self.head = nn.BatchNorm2d(8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.tanh(self.a(x))
        n, c, h, w = y.shape
        kernels = (self.route(4 * x.mean((2, 3))).sigmoid() @ self.experts).view(n * 8, c // self.groups, 3, 3)
        y = F.conv2d(y.reshape(1, n * c, h, w), kernels, padding=1, groups=n * self.groups).view(n, 8, h, w)
        return self.head(self.norm(y).mean((2, 3)))  # type: ignore[no-any-return]


def built(groups: int) -> tuple[torch.fx.GraphModule, Tensor]:
    torch.manual_seed(0)
    images = torch.randn(IMAGES, 3, PX, PX) + torch.randn(IMAGES, 3, 1, 1)
    return trace(Net(groups).eval(), images[:2]), images


@pytest.mark.parametrize("groups", [1, 2])
def test_one_convolution_of_all_experts_gives_the_same(groups: int) -> None:
    graph, images = built(groups)
    graph, images = graph.double(), images.double()
    (experts,) = experts_of(graph)
    weight = fetch(graph, experts.weight)
    assert torch.equal(as_stored(experts.side_by_side(weight), weight.shape), weight)
    with experts_as_layers(graph, graph, Slices({})) as (wide, _, _), torch.no_grad():
        assert fetch(wide, "experts").shape == (8, 3 * 12 // groups * 9, 1, 1)
        assert float((wide(images) - graph(images)).abs().max()) < EXACT


def test_a_network_without_experts_is_itself() -> None:
    graph = trace(nn.Conv2d(3, 4, 3).eval(), torch.randn(2, 3, PX, PX))
    with experts_as_layers(graph, graph, Slices({})) as (dense, pruned, _):
        assert dense is graph
        assert pruned is graph


def test_experts_take_over_what_lost_inputs_did() -> None:
    graph, images = built(1)
    structure = find_structure(graph, images[:2])
    kept = {group.name: np.arange(group.size) for group in structure.groups.groups} | {"a": np.arange(7)}
    small, slices = prune(graph, structure, kept)
    fitting, fresh = images[:64], images[64:]

    def error() -> float:
        with torch.no_grad():
            expected = graph(fresh)
            return float((small(fresh) - expected).square().sum() / expected.square().sum())

    before, shape = error(), fetch(small, "experts").shape
    done = compensate(graph, small, slices, [fitting])
    (refit,) = [layer for layer in done.repaired if layer.weight == "experts"]
    assert refit.error_after < 0.7 * refit.error_before
    assert error() < before / 2
    assert fetch(small, "experts").shape == shape


class Line(nn.Module):
    """Experts along a line, read without a word in between: their product has the result's shape already."""

    def __init__(self, *, twice: bool = False) -> None:
        super().__init__()
        self.a, self.route, self.twice = nn.Conv1d(3, 6, 3), nn.Linear(6, 3), twice
        self.experts, self.head = nn.Parameter(torch.randn(3, 8 * 6 * 3)), nn.Linear(8 * 4, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.tanh(self.a(x))
        n, c, length = y.shape
        kernels = (self.route(y.mean(2)).sigmoid() @ self.experts).view(n * 8, 6, 3)
        z = F.conv1d(y.reshape(1, n * c, length), kernels, groups=n).view(n, 8, -1)
        return self.head(z.flatten(1)) + (self.experts.sum() if self.twice else 0.0)  # type: ignore[no-any-return]


def test_experts_along_a_line_are_spelled_out_whatever_reads_them() -> None:
    torch.manual_seed(0)
    images = torch.randn(3, 3, PX).double()
    graph = trace(Line().eval().double(), images[:2])
    (experts,) = experts_of(graph)
    assert experts.result is experts.product
    with experts_as_layers(graph, graph, Slices({})) as (wide, _, _), torch.no_grad():
        assert fetch(wide, "experts").shape == (8, 3 * 6 * 3, 1)
        assert float((wide(images) - graph(images)).abs().max()) < EXACT


def test_experts_that_something_else_reads_stay_experts() -> None:
    assert experts_of(trace(Line(twice=True).eval(), torch.randn(2, 3, PX))) == []


def test_what_stays_of_experts_is_what_stays_side_by_side() -> None:
    """Three experts of two groups, 4 outputs each that read 6 x 9 entries; the middle one and all of input 1 go."""
    graph, _ = built(2)
    (experts,) = experts_of(graph)
    assert experts.sizes == (3, 2, 4, 54)
    entries = np.arange(2 * 4 * 54).reshape(8, 6, 9)[[0, 2, 5, 6]][:, [0, 2, 3, 4, 5]].reshape(-1)
    outputs, inputs = experts.kept_side_by_side((np.array([0, 2]), entries))
    row = [entry for entry in range(54) if entry // 9 != 1]
    assert outputs.tolist() == [0, 2, 5, 6]
    assert inputs.tolist() == [*row, *(2 * 54 + entry for entry in row)]
    weight = fetch(graph, "experts")
    small = weight[[0, 2]][:, entries].reshape(2, 4, -1).transpose(0, 1).reshape(4, -1)
    wide = experts.side_by_side(weight)[:, :, 0, 0]
    assert torch.equal(wide[outputs][:, inputs], small)
