"""Dynamic convolutions: the traced graph equals the module in float64 at any batch size, and counts the same MACs."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from compressor.graph import aten, trace
from compressor.graph.cost import measure_cost
from compressor.graph.dynamic import keeps_order
from compressor.graph.operators import CONVOLUTIONS

PX = 11
EXACT = 1e-12  # float64 rounding over a few hundred terms


class Experts(nn.Module):
    """Kernels [N * out, in / groups, *kernel] mixed of three experts by what the channels' means say."""

    def __init__(self, channels: int, outputs: int, kernel: tuple[int, ...], groups: int = 1) -> None:
        super().__init__()
        self.route, self.outputs, self.shape = nn.Linear(channels, 3), outputs, (channels // groups, *kernel)
        self.weight = nn.Parameter(torch.randn(3, outputs * math.prod(self.shape)))
        self.bias = nn.Parameter(torch.randn(3, outputs))

    def forward(self, y: Tensor) -> tuple[Tensor, Tensor]:
        routing = self.route(y.flatten(2).mean(2)).sigmoid()
        return (routing @ self.weight).view(-1, *self.shape), (routing @ self.bias).view(-1)


class Dynamic(nn.Module):
    """Eight channels in front, 16 behind; the last axis is averaged away in front of a kernel of one axis."""

    def __init__(self, kernel: tuple[int, ...], *, groups: int = 1, bias: bool = False, **settings: object) -> None:
        super().__init__()
        self.line = len(kernel) == 1
        self.a = nn.Conv2d(3, 8, 3, 1, 1)
        self.experts, self.groups, self.biased = Experts(8, 16, kernel, groups), groups, bias
        self.settings, self.head = settings, nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.a(x))
        if self.line:
            y = y.mean(3)
        n, c, *places = y.shape
        kernels, bias = self.experts(y)
        folded = y.reshape(1, n * c, *places)
        convolve: Callable[..., Tensor] = F.conv1d if self.line else F.conv2d
        settings = {**self.settings, "groups": n * self.groups}
        z = convolve(folded, kernels, bias if self.biased else None, **settings)
        z = z.permute(1, 0, *range(2, z.dim())).reshape(n, 16, *z.shape[2:])
        return self.head(torch.tanh(z).flatten(2).mean(2))  # type: ignore[no-any-return]


class Padded(nn.Module):
    """Padding between the fold and the convolution, as timm's `same` has it, and the folded result read as it is."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.experts, self.head = nn.Conv2d(3, 8, 3, 1, 1), Experts(8, 8, (4, 4), groups=8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.a(x))
        n, c, h, w = y.shape
        folded = F.pad(y.view(1, -1, h, w), (1, 2, 0, 3))
        z = F.relu(F.conv2d(folded, self.experts(y)[0], stride=2, groups=n * c))
        return self.head(z.view(n, 8, -1).mean(2))  # type: ignore[no-any-return]


MODULES = {
    "pointwise in strides": lambda: Dynamic((1, 1), stride=2),
    "pointwise padded": lambda: Dynamic((1, 1), padding=(1, 0)),
    "three by two, biased": lambda: Dynamic((3, 2), bias=True, padding=1),
    "dilated in strides": lambda: Dynamic((3, 3), stride=(2, 1), dilation=(1, 2), padding=2),
    "same": lambda: Dynamic((4, 3), padding="same"),
    "groups, biased": lambda: Dynamic((3, 3), groups=4, bias=True, padding=1),
    "depthwise, two each": lambda: Dynamic((5, 5), groups=8, padding=2),
    "a line": lambda: Dynamic((3,), padding=1, stride=2),
    "padded in front": Padded,
}


@functools.cache
def built(name: str) -> tuple[nn.Module, torch.fx.GraphModule, Tensor]:
    torch.manual_seed(0)
    model, images = MODULES[name]().eval().double(), torch.randn(3, 3, PX, PX).double()
    return model, trace(model, images[:2]), images


@pytest.mark.filterwarnings("ignore:Using padding='same'")  # of an even length: the further zero lies behind
@pytest.mark.parametrize("name", MODULES)
def test_the_graph_equals_the_module_at_any_batch_size(name: str) -> None:
    model, graph, images = built(name)
    convolutions = [node for node in graph.graph.nodes if node.target in CONVOLUTIONS]
    assert [node.meta["layer"] for node in convolutions] == ["a"]
    with torch.no_grad():
        for count in (1, 2, 3):
            expected = model(images[:count])
            assert float((graph(images[:count]) - expected).abs().max()) < EXACT
        assert float((expected[0] - expected[1]).abs().max()) > 1e-3


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize("name", MODULES)
def test_macs_are_those_of_the_convolution(name: str) -> None:
    model, graph, images = built(name)
    counted: list[int] = []

    def convolve(convolution: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def watched(x: Tensor, weight: Tensor, *args: object, **settings: object) -> Tensor:
            out = convolution(x, weight, *args, **settings)
            if len(x) == 1:
                counted.append(out.numel() * weight[0].numel())
            return out

        return watched

    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(F, "conv2d", convolve(F.conv2d))
        patch.setattr(F, "conv1d", convolve(F.conv1d))
        model(images[:2])
    cost = measure_cost(graph)
    kernels = [node for node in graph.graph.nodes if node.target is aten.matmul.default and node.name in cost.by_node]
    products = [cost.by_node[node.name] for node in kernels if node.meta["layer"] == ""]
    assert products == [counted[0] // 2]
    assert not cost.uncounted


def test_images_are_folded_no_more() -> None:
    _, graph, _ = built("three by two, biased")
    shapes = [tuple(node.meta["val"].shape) for node in graph.graph.nodes if hasattr(node.meta["val"], "shape")]
    assert not any(shape[0] == 1 for shape in shapes if shape)


def volume(y: Tensor, kernels: Tensor) -> Tensor:
    n, c, *places = y.shape
    deep = y.reshape(1, n * c, 1, *places)
    return F.conv3d(deep, kernels.reshape(n * c, 1, 1, 1, 1), groups=n * c).reshape(n, c, *places)


def counted_by_half(y: Tensor, kernels: Tensor) -> Tensor:
    n, c, *places = y.shape
    groups = (2 * n * c) // 2 + n - n
    return F.conv2d(y.reshape(1, n * c, *places), kernels.reshape(n * c, 1, 1, 1), groups=groups).reshape(y.shape)


@pytest.mark.parametrize("convolve", [volume, counted_by_half])
def test_what_is_not_of_that_form_stays(convolve: Callable[[Tensor, Tensor], Tensor]) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Conv2d(3, 4, 3, 1, 1)

        def forward(self, x: Tensor) -> Tensor:
            y = self.a(x)
            return convolve(y, y.mean((2, 3))).flatten(1)

    graph = trace(Net().eval(), torch.randn(2, 3, PX, PX))
    assert len([node for node in graph.graph.nodes if node.target in CONVOLUTIONS]) == 2


def test_order_is_kept_where_only_axes_of_length_one_move() -> None:
    class Net(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            one = x[:, :1].permute(0, 2, 1, 3)  # [N, H, 1, W]
            return one.transpose(1, 3).contiguous()

    graph = trace(Net().eval(), torch.randn(2, 3, 4, 5))
    kept = [keeps_order(node) for node in graph.graph.nodes if node.op == "call_function"][-2:]
    assert kept == [True, False]
