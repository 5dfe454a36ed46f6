"""The pruned graph in the model's own class: same outputs, or an error that names the way out."""

from __future__ import annotations

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
