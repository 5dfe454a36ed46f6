"""The pruned graph in the model's own class: same outputs, or an error that names the way out."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torchvision.models import MobileNetV2, ResNet
from torchvision.models.resnet import BasicBlock

from compressor.errors import ModelError
from compressor.graph import trace
from compressor.pruning import analyse, prune
from compressor.pruning.check import random_units
from compressor.pruning.modules import to_module
from compressor.records import Plan

TOLERANCE = 1e-4  # float32: the class and the graph sum in another order


def _pruned(model: nn.Module, example: torch.Tensor):
    graph = trace(model, example)
    structure = analyse(graph)
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


class _Scaled(nn.Module):
    """Divides by how many channels there are: the trace has the number that there were."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 16, 3), nn.Linear(16, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        return self.last(x.mean((2, 3)) / x.shape[1])


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, groups=2), nn.Conv2d(8, 4, 1)), "layer '1' is a grouped"),
        (_Scaled(), "gives other outputs .* use the traced network"),
    ],
)
def test_what_the_class_would_compute_otherwise_is_refused(model: nn.Module, words: str) -> None:
    example = torch.randn(2, 3, 8, 8)
    with pytest.raises(ModelError, match=words):
        to_module(model.eval(), *_pruned(model, example), example)
