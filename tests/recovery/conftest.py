"""A dense network, the same one without two channels, and images of noise: what every test of a recovery needs."""

from __future__ import annotations

import copy
from functools import cache

import numpy as np
import pytest
import torch
from torch import Tensor, fx, nn

from compressor.graph import trace
from compressor.inputs.examples import examples_in_memory
from compressor.inputs.images import Batches, batches
from compressor.inputs.samples import Sample
from compressor.records import Slices

KEPT = np.array([0, 2, 3, 5])  # channels of the second layer that are left


class Net(nn.Module):
    """Two convolutions, the second as wide as it is told, and classes or a map for each place."""

    def __init__(self, width: int = 6, *, places: bool = False, norm: bool = True) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4) if norm else nn.Identity()
        self.second = nn.Conv2d(4, width, 3, padding=1)
        self.places = places
        self.head = nn.Conv2d(width, 3, 1) if places else nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        features = torch.relu(self.second(torch.relu(self.norm(self.first(x)))))
        answer: Tensor = self.head(features if self.places else features.mean((2, 3)))
        return answer


def pool(count: int, seed: int = 0) -> Batches:
    generator = torch.Generator().manual_seed(seed)
    samples = [Sample(torch.randn(3, 8, 8, generator=generator), torch.tensor(i % 3)) for i in range(count)]
    return batches(examples_in_memory("noise", samples, [f"{seed}-{i:03d}" for i in range(count)]), 16)


@pytest.fixture(scope="module")
def lessons() -> Batches:
    return pool(160)


@pytest.fixture(scope="module")
def held() -> Batches:
    return pool(64, seed=1)


def pair(*, places: bool = False, norm: bool = True) -> tuple[fx.GraphModule, fx.GraphModule, Slices]:
    """A dense graph, and the same without two channels of the second layer, nothing repaired; both one's own."""
    return copy.deepcopy(_pair(places, norm))


@cache
def _pair(places: bool, norm: bool) -> tuple[fx.GraphModule, fx.GraphModule, Slices]:
    torch.manual_seed(0)
    dense = Net(places=places, norm=norm).eval()
    small = Net(len(KEPT), places=places, norm=norm).eval()
    state = dense.state_dict()
    for name in ("second.weight", "second.bias"):
        state[name] = state[name][KEPT]
    state["head.weight"] = state["head.weight"][:, KEPT]
    small.load_state_dict(state)
    example = torch.randn(2, 3, 8, 8)
    slices = Slices({"head.weight": (np.arange(3), KEPT)})
    return trace(dense, example), trace(small, example), slices
