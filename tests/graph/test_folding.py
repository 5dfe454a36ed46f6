"""Norms in the form that can train, constants as buffers: the graph against its module in float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx, nn

from compressor.errors import ModelError
from compressor.graph import aten, fetch, store, trace
from compressor.graph.tracing import place_of

EXACT = 1e-12  # float64 rounding; a wrong statistic or table shows as 1e-2 or more


def randomised(model: nn.Module) -> nn.Module:
    """In evaluation and float64, with statistics and scales that no norm begins with."""
    torch.manual_seed(0)
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point():
            low = 0.5 if "var" in name else -0.5
            tensor.copy_(torch.rand(tensor.shape) + low)
    return model.eval().double()


def difference(graph: fx.GraphModule, model: nn.Module, shape: tuple[int, ...]) -> float:
    """The largest one between their answers, for one, two and three images."""
    images = torch.randn(3, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return max(float((graph(images[:n]) - model(images[:n])).abs().max()) for n in (1, 2, 3))


NORMS: dict[str, tuple[nn.Module, tuple[int, ...], object]] = {
    "batch, of rows": (nn.BatchNorm1d(6), (6,), aten.batch_norm.default),
    "batch, of a line": (nn.BatchNorm1d(6), (6, 5), aten.batch_norm.default),
    "batch, of a plane": (nn.BatchNorm2d(6, eps=0.1), (6, 4, 5), aten.batch_norm.default),
    "batch, of a volume": (nn.BatchNorm3d(6), (6, 2, 3, 4), aten.batch_norm.default),
    "batch, without scale": (nn.BatchNorm2d(6, affine=False), (6, 4, 5), aten.batch_norm.default),
    "instance": (nn.InstanceNorm2d(6, affine=True), (6, 4, 5), aten.instance_norm.default),
    "instance, stored": (nn.InstanceNorm2d(6, track_running_stats=True), (6, 4, 5), aten.instance_norm.default),
    "groups": (nn.GroupNorm(3, 6), (6, 4, 5), aten.group_norm.default),
    "layer, two axes": (nn.LayerNorm((4, 5)), (6, 4, 5), aten.layer_norm.default),
    "root mean square": (nn.RMSNorm(5), (6, 4, 5), aten.rms_norm.default),
}


@pytest.mark.parametrize("name", NORMS)
def test_a_norm_is_one_operation_and_equals_its_module(name: str) -> None:
    norm, shape, target = NORMS[name]
    model = randomised(nn.Sequential(norm, nn.Tanh()))
    graph = trace(model, torch.randn(2, *shape, dtype=torch.float64))
    targets = [node.target for node in graph.graph.nodes if node.op == "call_function"]
    assert targets == [target, aten.tanh.default]
    assert difference(graph, model, shape) < EXACT


def test_a_batch_norm_of_the_graph_can_take_statistics_of_a_batch() -> None:
    graph = trace(nn.BatchNorm2d(6).eval(), torch.randn(2, 6, 4, 5))
    (norm,) = graph.graph.find_nodes(op="call_function", target=aten.batch_norm.default)
    assert norm.args[5] is False
    norm.update_arg(5, True)
    graph.recompile()
    answer = graph(3 + 2 * torch.randn(8, 6, 4, 5))
    assert torch.allclose(answer.mean((0, 2, 3)), torch.zeros(6), atol=1e-5)
    assert torch.allclose(answer.std((0, 2, 3), correction=0), torch.ones(6), atol=1e-3)


class Function(nn.Module):
    """A function of a parameter [5, 4] and the images."""

    def __init__(self, function: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.weight, self.function = nn.Parameter(torch.randn(5, 4)), function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.weight, x)


def gridded(w: Tensor, x: Tensor) -> Tensor:
    rows, columns = torch.meshgrid(torch.linspace(-1, 1, 5), torch.arange(4) / 4, indexing="ij")
    return x * torch.stack([rows, columns]).square().sum(0) + w


def masked(w: Tensor, x: Tensor) -> Tensor:
    return (x + w).masked_fill(torch.ones(5, 4, dtype=torch.bool).triu(1), 0.0)


# how many tables are stored, and whether an operation is left that makes one
CONSTANTS: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], int, bool]] = {
    "a grid": (gridded, 1, False),
    "a mask": (masked, 1, False),
    "zeros in the input's type": (lambda w, x: x + w * (x.new_zeros(4) + 2), 1, False),
    "ones for each image": (lambda w, x: x + w * x.new_ones(x.shape[0], 5, 1).cumsum(1), 0, True),
    "computed from a parameter": (lambda w, x: x * w.square().sum(0), 0, False),
    "two tables, one made of the other": (lambda w, x: (x + torch.arange(4)) * (torch.arange(4) + 1), 2, False),
}


@pytest.mark.parametrize("name", CONSTANTS)
def test_what_depends_on_no_input_and_no_parameter_is_stored(name: str) -> None:
    function, tables, makes = CONSTANTS[name]
    model = Function(function).double()
    graph = trace(model, torch.randn(2, 5, 4, dtype=torch.float64))
    stored = [name for name, _ in graph.named_buffers()]
    makers = {
        aten.arange.default,
        aten.linspace.default,
        aten.ones.default,
        aten.new_zeros.default,
        aten.new_ones.default,
    }
    assert len(stored) == tables
    assert all(name.startswith("_constant_") for name in stored)
    assert any(node.target in makers for node in graph.graph.nodes) == makes
    assert [name for name, _ in graph.named_parameters()] == ["weight"]
    assert difference(graph, model, (5, 4)) < EXACT


class Steered(nn.Module):
    """A buffer's numbers are taken as Python's: a shift, a slice's end, a factor, a slope."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("steps", torch.tensor([1, 2, 3]))
        self.register_buffer("slope", torch.tensor([0.25], dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        shift, end, factor = self.steps.tolist()
        x = torch.roll(x, shift, 2)[:, :end] * factor + self.steps[0].item()
        return nn.functional.leaky_relu(x, float(self.slope))


def test_numbers_of_a_buffer_stand_where_they_are_used() -> None:
    model = Steered().double()
    graph = trace(model, torch.randn(2, 5, 4, dtype=torch.float64))
    targets = [node.target for node in graph.graph.nodes if node.op == "call_function"]
    leaky = aten.leaky_relu.default
    assert targets == [aten.roll.default, aten.slice.Tensor, aten.mul.Tensor, aten.add.Tensor, leaky]
    assert difference(graph, model, (5, 4)) < EXACT


class Initialised(nn.Module):
    """What its buffers say decides what is done: a flag (ActNorm, codebooks), a count, a size, a threshold."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("initialised", torch.tensor(True))
        self.register_buffer("sizes", torch.tensor([2, 3]))
        self.register_buffer("steps", torch.tensor(3, dtype=torch.uint8))
        self.register_buffer("threshold", torch.tensor([0.5]))
        self.scale = nn.Parameter(torch.rand(4))

    def forward(self, x: Tensor) -> Tensor:
        if not self.initialised:
            self.scale.data.copy_(x.mean((0, 1)))
        for _ in range(int(self.steps)):
            x = x * self.scale + 1
        first, last = self.sizes.tolist()
        return x[:, first:last] if self.threshold > 0.25 else x


def test_a_forward_may_branch_on_what_its_buffers_say() -> None:
    model = Initialised().double()
    graph = trace(model, torch.randn(2, 5, 4, dtype=torch.float64))
    assert sum(node.target is aten.mul.Tensor for node in graph.graph.nodes) == 3
    assert difference(graph, model, (5, 4)) < EXACT


def test_a_forward_that_counts_in_what_it_branches_on_is_refused() -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("calls", torch.tensor(0))

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return x * 2 if self.calls > 3 else x

    with pytest.raises(ModelError, match="branch on values"):
        trace(Counting(), torch.randn(2, 3))


@pytest.mark.parametrize(
    ("layer", "place", "words"),
    [
        ("blocks.0.attn", "model.py:31", "layer 'blocks.0.attn' (model.py:31)"),
        ("blocks.0.attn", "", "layer 'blocks.0.attn'"),
        ("", "model.py:31", "model.py:31"),
        ("", "", "forward"),
    ],
)
def test_a_place_is_said_as_far_as_it_is_known(layer: str, place: str, words: str) -> None:
    node = fx.Graph().placeholder("x")
    node.meta = {"layer": layer, "place": place}
    assert place_of(node) == words


def test_what_is_put_in_a_tensors_place_keeps_its_kind() -> None:
    graph = trace(nn.Sequential(nn.Conv2d(3, 6, 1), nn.BatchNorm2d(6)).eval(), torch.randn(2, 3, 4, 4))
    parameters, buffers = dict(graph.named_parameters()), dict(graph.named_buffers())
    store(graph, "0.weight", torch.zeros(4, 3, 1, 1))
    store(graph, "1.running_mean", torch.ones(4))
    assert dict(graph.named_parameters()).keys() == parameters.keys()
    assert dict(graph.named_buffers()).keys() == buffers.keys()
    assert fetch(graph, "0.weight").shape == (4, 3, 1, 1)
    assert fetch(graph, "1.running_mean").tolist() == [1.0] * 4
