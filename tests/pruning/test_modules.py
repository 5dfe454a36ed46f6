"""The pruned graph in the model's own class: same outputs, or an error that names the way out."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from timm.layers import LayerNorm2d, RmsNorm
from torch import nn
from torch.nn.utils import parametrizations
from torchvision.models import MobileNetV2, ResNet
from torchvision.models.resnet import BasicBlock

from compressor.errors import ModelError
from compressor.graph import trace
from compressor.pruning import analyse, prune
from compressor.pruning.check import find_structure, random_units
from compressor.pruning.modules import to_module
from compressor.records import Plan

TOLERANCE = 1e-4  # float32: the class and the graph sum in another order


def _pruned(model: nn.Module, example: torch.Tensor):
    graph = trace(model, example)
    structure = find_structure(graph, example)
    return prune(graph, structure, Plan(random_units(structure, 0), 0, 0))


@pytest.mark.parametrize(
    "model",
    [
        pytest.param(ResNet(BasicBlock, [1, 1, 1, 1], num_classes=7), id="residual"),
        pytest.param(MobileNetV2(num_classes=7, width_mult=0.35), id="inverted residual", marks=pytest.mark.slow),
    ],
)
def test_a_class_that_takes_its_widths_from_its_layers_follows(model: nn.Module) -> None:
    example = torch.randn(2, 3, 32, 32)
    pruned, slices = _pruned(model.eval(), example)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    small = to_module(model, pruned, slices, example)
    other_size = torch.randn(1, 3, 48, 48)
    assert type(small) is type(model)
    assert sum(p.numel() for p in small.parameters()) == sum(p.numel() for p in pruned.parameters())
    assert torch.allclose(small(example), pruned(example), atol=TOLERANCE)
    assert small(other_size).shape == (1, 7)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


class _FixedInCode(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 16, 3), nn.Linear(16, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.first(x).view(x.shape[0], 16, -1).mean(2))


def test_a_class_that_fixes_widths_in_its_code_is_refused_with_the_remedy() -> None:
    example = torch.randn(2, 3, 8, 8)
    model = _FixedInCode().eval()
    pruned, slices = _pruned(model, example)
    assert pruned(example).shape == (2, 5)
    with pytest.raises(ModelError, match="use the traced network"):
        to_module(model, pruned, slices, example)


def test_layers_of_every_type_follow_by_what_stays_of_their_weights() -> None:
    """By hand: a transposed weight is [in, out], a depthwise channel and its input go together."""
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8), nn.PReLU(8), nn.ConvTranspose2d(8, 6, 2, 2), nn.BatchNorm2d(6)),
        *(nn.Conv2d(6, 6, 3, groups=6), nn.Flatten(2), nn.LayerNorm(36), nn.Linear(36, 4), nn.Conv1d(6, 5, 1)),
    ).eval()
    example = torch.randn(2, 3, 6, 6)
    graph = trace(model, example)
    structure = analyse(graph)
    kept = {"0": np.array([0, 3, 5, 6]), "3": np.array([1, 2, 5])}
    assert {name: structure.groups[name].size for name in kept} == {"0": 8, "3": 6}
    pruned, slices = prune(graph, structure, kept)
    small = to_module(model, pruned, slices, example)
    assert [tuple(small[place].weight.shape) for place in (0, 1, 2, 3, 4, 5, 7, 9)] == [
        *((4, 3, 3, 3), (4,), (4,), (4, 3, 2, 2), (3,), (3, 1, 3, 3), (36,), (5, 3, 1)),
    ]
    assert (small[3].in_channels, small[3].out_channels, small[5].groups) == (4, 3, 3)
    assert torch.equal(small[3].weight, model[3].weight[kept["0"]][:, kept["3"]])
    assert torch.equal(small[4].running_var, model[4].running_var[kept["3"]])
    assert torch.allclose(small(example), pruned(example), atol=TOLERANCE)


class _Permuted(nn.Module):
    """A layer on [N, H, W, C] between [N, C, H, W]."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x.movedim(1, -1)).movedim(-1, 1)


def _stored_otherwise(layer: nn.Module) -> nn.Module:
    """With statistics and weights that are not what a new layer has, so that one in another's place shows."""
    for tensor in (*layer.parameters(), *layer.buffers()):
        if tensor.is_floating_point():
            nn.init.uniform_(tensor, 0.5, 2.0)
    return layer


@pytest.mark.filterwarnings("error")  # an instance norm whose width is wrong may only warn
@pytest.mark.parametrize(
    ("layer", "attribute", "width"),
    [
        (nn.BatchNorm2d(12, affine=False), "num_features", 8),
        (nn.BatchNorm2d(12, affine=False, track_running_stats=False), "num_features", 8),
        (nn.InstanceNorm2d(12), "num_features", 8),
        (nn.InstanceNorm2d(12, affine=True), "num_features", 8),
        (nn.InstanceNorm2d(12, track_running_stats=True), "num_features", 8),
        (nn.InstanceNorm2d(12, affine=True, track_running_stats=True), "num_features", 8),
        (nn.GroupNorm(4, 12), "num_channels", 8),
        (nn.GroupNorm(1, 12, affine=False), "num_channels", 8),
        (nn.LayerNorm([12, 6, 6]), "normalized_shape", (8, 6, 6)),
        (nn.LayerNorm([12, 6, 6], bias=False), "normalized_shape", (8, 6, 6)),
        (nn.LayerNorm([12, 6, 6], elementwise_affine=False), "normalized_shape", (8, 6, 6)),
        (nn.RMSNorm([12, 6, 6]), "normalized_shape", (8, 6, 6)),
        (_Permuted(nn.LayerNorm(12, elementwise_affine=False)), "normalized_shape", (8,)),
        (_Permuted(nn.LayerNorm([6, 12])), "normalized_shape", (6, 8)),
        (_Permuted(nn.RMSNorm(12)), "normalized_shape", (8,)),
        (_Permuted(nn.RMSNorm(12, elementwise_affine=False)), "normalized_shape", (8,)),
        (_Permuted(RmsNorm(12)), "normalized_shape", (8,)),
        (LayerNorm2d(12, affine=False), "normalized_shape", (8,)),
        (nn.PReLU(12), "num_parameters", 8),
        (nn.Conv2d(12, 12, 3, padding=1, groups=12), "groups", 8),
        (nn.ConvTranspose2d(12, 12, 3, padding=1, groups=12), "groups", 8),
        (nn.Conv2d(12, 12, 3, padding=1, groups=3), "in_channels", 8),
        (nn.ConvTranspose2d(12, 12, 3, padding=1, groups=3), "in_channels", 8),
        (parametrizations.weight_norm(nn.Conv2d(12, 12, 1)), "in_channels", 8),
    ],
)
def test_a_layer_takes_its_width_from_what_is_left(layer: nn.Module, attribute: str, width: object) -> None:
    torch.manual_seed(0)
    first, last = nn.Conv2d(3, 12, 3), nn.Conv2d(12, 5, 1)
    model = nn.Sequential(first, _stored_otherwise(layer), last).eval()
    example = torch.randn(2, 3, 8, 8)
    graph = trace(model, example)
    structure = find_structure(graph, example)
    kept = {group.name: _eight(group.size, getattr(layer, "groups", 1)) for group in structure.groups.groups}
    pruned, slices = prune(graph, structure, kept)

    small = to_module(model, pruned, slices, example)
    narrow = small[1].layer if isinstance(layer, _Permuted) else small[1]
    assert getattr(narrow, attribute) == width
    assert torch.allclose(small(example), pruned(example), atol=TOLERANCE)


def _eight(size: int, groups: int) -> np.ndarray:
    """Eight of twelve units, whole groups of a grouped convolution with them; all of anything else."""
    first_eight = np.array([0, 1, 2, 3, 4, 5, 6, 7])
    by_group = np.array([0, 1, 2, 3, 8, 9, 10, 11])
    if size == groups == 3:
        return np.array([0, 2])
    if size != 12:
        return np.arange(size)
    return by_group if groups == 3 else first_eight


class _Recurrent(nn.Module):
    def __init__(self, layer: nn.Module, outputs: int) -> None:
        super().__init__()
        self.first, self.layer, self.last = nn.Conv1d(3, 12, 3), layer, nn.Linear(outputs, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.layer(self.first(x).mT)[0])


class _Cell(_Recurrent):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        return self.last(self.layer(x[..., 1], self.layer(x[..., 0])))


@pytest.mark.parametrize(
    ("model", "kept_inputs"),
    [
        pytest.param(_Recurrent(nn.LSTM(12, 10, batch_first=True), 10), 8, id="LSTM"),
        pytest.param(
            _Recurrent(nn.LSTM(12, 10, 2, batch_first=True, bidirectional=True), 20), 8, id="LSTM in two directions"
        ),
        pytest.param(_Recurrent(nn.GRU(12, 10, batch_first=True), 10), 8, id="GRU"),
        pytest.param(_Recurrent(nn.RNN(12, 10, batch_first=True), 10), 8, id="RNN"),
        pytest.param(_Cell(nn.GRUCell(12, 10), 10), 12, id="cell, which keeps its units"),
    ],
)
def test_a_recurrent_layer_follows_though_its_graph_makes_float32_states(model: nn.Module, kept_inputs: int) -> None:
    example = torch.randn(2, 3, 9)
    pruned, slices = _pruned(model.eval(), example)
    small = to_module(model, pruned, slices, example)
    assert (small.layer.input_size, small.layer.hidden_size) == (kept_inputs, 10)
    assert torch.allclose(small(example), pruned(example), atol=TOLERANCE)


class _Float32Inside(nn.Module):
    """Makes a state in float32, as wide as what comes in or `width`, which fails on weights in float64."""

    def __init__(self, width: int | None = None) -> None:
        super().__init__()
        self.first, self.inner, self.last, self.width = nn.Linear(6, 12), nn.Linear(12, 8), nn.Linear(8, 5), width

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        state = torch.zeros(x.shape[0], self.width or x.shape[1])
        return self.last(self.inner(x) + self.inner(state))


class _RoundedInside(nn.Module):
    """Normalises in float32 whatever comes in, as many language models' blocks do."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 12), nn.Linear(12, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        single = x.float()
        return self.last((single * single.square().mean(-1, keepdim=True).rsqrt()).type_as(x))


@pytest.mark.parametrize("model", [_Float32Inside(), _RoundedInside()])
def test_a_class_that_computes_in_float32_itself_is_compared_in_float32(model: nn.Module) -> None:
    example = torch.randn(2, 6)
    pruned, slices = _pruned(model.eval(), example)
    small = to_module(model, pruned, slices, example)
    assert small.first.out_features < 12
    assert torch.allclose(small(example), pruned(example), atol=TOLERANCE)


def test_a_class_that_fails_is_told_the_layer_and_the_reason_and_not_a_matter_of_types() -> None:
    example = torch.randn(2, 6)
    model = _Float32Inside(width=12).eval()
    words = r"layer 'inner' \(Linear\) at test_modules.py:\d+ fails .*2x12 and 8x6.*use the traced network"
    with pytest.raises(ModelError, match=words):
        to_module(model, *_pruned(model, example), example)


class _Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.layer, self.last = nn.Linear(6, 12), nn.MultiheadAttention(12, 3), nn.Linear(12, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x).transpose(0, 1)
        return self.last(self.layer(x, x, x)[0].transpose(0, 1))


@pytest.mark.parametrize(
    ("model", "shape", "words"),
    [
        (_Attention(), (2, 4, 6), r"layer 'layer' \(MultiheadAttention\) .* expecting embedding dimension of 12"),
        (
            nn.Sequential(nn.Conv2d(3, 12, 1), nn.Unflatten(1, (3, 4)), nn.Flatten(1, 2), nn.Conv2d(12, 5, 1)),
            (2, 3, 8, 8),
            r"layer '1' \(Unflatten\)",
        ),
    ],
)
def test_a_layer_that_can_not_follow_is_named(model: nn.Module, shape: tuple[int, ...], words: str) -> None:
    example = torch.randn(shape)
    with pytest.raises(ModelError, match=words):
        to_module(model.eval(), *_pruned(model, example), example)


class _Tied(nn.Module):
    """One layer under two names, and two layers with one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.left, self.right = nn.Conv2d(3, 12, 1), nn.Conv2d(12, 12, 1), nn.Conv2d(12, 12, 1)
        self.right.weight = self.left.weight
        self.again, self.last = self.left, nn.Conv2d(12, 5, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.right(self.left(self.first(x)).relu())
        return self.last(self.again(x.relu()))


def test_tied_weights_stay_tied_and_frozen_ones_frozen() -> None:
    example = torch.randn(2, 3, 8, 8)
    model = _Tied().eval()
    model.first.requires_grad_(False)
    small = to_module(model, *_pruned(model, example), example)
    assert small.right.weight is small.left.weight
    assert small.again is small.left
    assert [name for name, parameter in small.named_parameters() if not parameter.requires_grad] == [
        *("first.weight", "first.bias"),
    ]
    assert small.right.in_channels == small.left.weight.shape[1] < 12


class _Scaled(nn.Module):
    """Divides by how many channels there are: the trace has the number that there were."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 16, 3), nn.Linear(16, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        return self.last(x.mean((2, 3)) / x.shape[1])


class _NaNs(_Scaled):
    """Numbers where the width is the trained one, else none."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        return self.last(x.mean((2, 3)) * math.sqrt(x.shape[1] - 15 if x.shape[1] >= 15 else math.nan))


@pytest.mark.parametrize("model", [_Scaled(), _NaNs()])
def test_what_the_class_would_compute_otherwise_is_refused(model: nn.Module) -> None:
    example = torch.randn(2, 3, 8, 8)
    with pytest.raises(ModelError, match=r"gives other outputs .* use the traced network"):
        to_module(model.eval(), *_pruned(model, example), example)
