"""Units of dynamic convolutions: experts that hold whole kernels on one axis lose channels on both sides of it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from compressor.graph import trace
from compressor.graph.cost import measure_cost
from compressor.pruning import Structure, find_structure, identity_error, prune
from compressor.pruning.kernels import KernelAxis, kernel_axes, kernel_labels
from compressor.pruning.labels import Ledger

PX = 12
EXACT = 1e-12  # float64 rounding over a few hundred terms


class CondConv(nn.Module):
    """timm's, in short: experts [K, out * in / groups * 3 * 3] and what each image takes of them."""

    def __init__(self, channels: int, outputs: int, groups: int = 1) -> None:
        super().__init__()
        self.shape, self.outputs, self.groups = (channels // groups, 3, 3), outputs, groups
        self.weight = nn.Parameter(torch.randn(2, outputs * channels // groups * 9) * 0.2)

    def forward(self, y: Tensor, routing: Tensor) -> Tensor:
        n, c, h, w = y.shape
        kernels = (routing @ self.weight).view(n * self.outputs, *self.shape)
        y = F.conv2d(y.reshape(1, n * c, h, w), kernels, padding=1, groups=n * self.groups)
        return y.permute(1, 0, 2, 3).reshape(n, self.outputs, h, w)


class Net(nn.Module):
    """An expansion, a depthwise kernel and a projection, all mixed by the same routing."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.route = nn.Conv2d(3, 6, 3, 2, 1), nn.Linear(6, 2)
        self.wide, self.depthwise, self.narrow = CondConv(6, 10), CondConv(10, 10, 10), CondConv(10, 8)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.a(x))
        routing = self.route(y.mean((2, 3))).sigmoid()
        y = F.relu(self.depthwise(F.relu(self.wide(y, routing)), routing))
        return self.head(F.relu(self.narrow(y, routing)).mean((2, 3)))  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def traced() -> tuple[torch.fx.GraphModule, Structure, Tensor]:
    torch.manual_seed(0)
    images = torch.randn(3, 3, PX, PX)
    graph = trace(Net().eval(), images[:2])
    return graph, find_structure(graph, images[:2]), images


def test_each_expert_is_known_for_the_kernel_that_it_holds(
    traced: tuple[torch.fx.GraphModule, Structure, Tensor],
) -> None:
    graph, _, _ = traced
    assert kernel_axes(graph) == {
        "wide.weight": KernelAxis(1, (1, 10, 6, 9)),
        "depthwise.weight": KernelAxis(1, (10, 1, 1, 9)),
        "narrow.weight": KernelAxis(1, (1, 8, 10, 9)),
    }


def test_channels_on_both_sides_and_experts_are_units(traced: tuple[torch.fx.GraphModule, Structure, Tensor]) -> None:
    _, structure, _ = traced
    units = {group.name: (group.kind, group.size) for group in structure.groups.groups}
    assert units == {
        "a": ("channel", 6),
        "route": ("neuron", 2),
        "wide": ("channel", 10),
        "narrow": ("channel", 8),
    }


def test_removal_is_exact_and_cuts_experts_as_kernels(traced: tuple[torch.fx.GraphModule, Structure, Tensor]) -> None:
    graph, structure, images = traced
    kept = {"a": np.array([0, 2, 5]), "route": np.array([0, 1]), "wide": np.arange(1, 9, 2), "narrow": np.arange(3)}
    small, _ = prune(graph, structure, kept)
    assert identity_error(graph, small, structure, kept, images) < EXACT

    dense = dict(graph.named_parameters())["wide.weight"].reshape(2, 10, 6, 9)
    cut = dict(small.named_parameters())["wide.weight"]
    assert torch.equal(cut, dense[:, kept["wide"]][:, :, kept["a"]].flatten(1))
    assert dict(small.named_parameters())["depthwise.weight"].shape == (2, 4 * 9)
    assert measure_cost(small).macs < 0.5 * measure_cost(graph).macs
    for count in (1, 3):
        assert small(images[:count]).shape == (count, 5)


@pytest.mark.parametrize(
    ("shape", "labels"),
    [
        ((1, 2, 3, 1), [[1, 1, 1, 2, 2, 2], [3, 4, 5, 3, 4, 5]]),
        ((1, 2, 2, 2), [[1, 1, 1, 1, 2, 2, 2, 2], [3, 3, 4, 4, 3, 3, 4, 4]]),
        ((2, 1, 2, 1), [[1, 1, 2, 2], [3, 4, 5, 6]]),  # inputs of each group by themselves
        ((3, 1, 1, 2), [[1, 1, 2, 2, 3, 3]]),  # depthwise: outputs speak for inputs
        ((1, 1, 3, 1), [[1, 2, 3]]),
    ],
)
def test_an_entry_of_a_kernel_goes_with_its_output_and_its_input(
    shape: tuple[int, int, int, int], labels: list[list[int]]
) -> None:
    assert [entries.tolist() for entries in kernel_labels(Ledger(), shape)] == labels


class Predicting(nn.Module):
    """Kernels that layers predict: a linear one and its shifts, with biases, a convolution for a depthwise one."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.hidden = nn.Conv2d(3, 6, 3, 2, 1), nn.Linear(6, 4)
        self.kernels, self.shifts = nn.Linear(4, 8 * 6 * 9), nn.Linear(4, 8)
        self.depthwise, self.head = nn.Conv2d(8, 8 * 9, 1, bias=False), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.a(x))
        n, c, h, w = y.shape
        hidden = F.relu(self.hidden(y.mean((2, 3))))
        kernels, shifts = torch.tanh(self.kernels(hidden)).view(n * 8, c, 3, 3), self.shifts(hidden).view(-1)
        z = F.relu(F.conv2d(y.reshape(1, n * c, h, w), kernels, shifts, padding=1, groups=n).view(n, 8, h, w))
        kernels = self.depthwise(z.mean((2, 3), keepdim=True)).view(n * 8, 1, 3, 3)
        z = F.conv2d(z.reshape(1, n * 8, h, w), kernels, padding=1, groups=n * 8).view(n, 8, h, w)
        return self.head(F.relu(z).mean((2, 3)))  # type: ignore[no-any-return]


def test_layers_that_predict_kernels_lose_entries_of_both_sides_exactly() -> None:
    torch.manual_seed(0)
    images = torch.randn(3, 3, PX, PX)
    graph = trace(Predicting().eval(), images[:2])
    assert kernel_axes(graph) == {
        "kernels.weight": KernelAxis(0, (1, 8, 6, 9)),
        "kernels.bias": KernelAxis(0, (1, 8, 6, 9)),
        "depthwise.weight": KernelAxis(0, (8, 1, 1, 9)),
    }
    structure = find_structure(graph, images[:2])
    units = {group.name: (group.kind, group.size) for group in structure.groups.groups}
    assert (units["a"][1], units["hidden"][1]) == (6, 4), "a bias of kernels makes no unit of them all"
    kept = {"a": np.array([0, 2, 3, 5]), "hidden": np.array([1, 3])}
    small, _ = prune(graph, structure, kept)
    assert identity_error(graph, small, structure, kept, images) < EXACT
    dense = dict(graph.named_parameters())["kernels.weight"].reshape(8, 6, 9, 4)
    cut = dict(small.named_parameters())["kernels.weight"]
    assert torch.equal(cut, dense[:, kept["a"]][..., kept["hidden"]].flatten(0, 2))
