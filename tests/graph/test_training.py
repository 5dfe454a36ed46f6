"""A pruned graph that its owner trains further follows train() and eval() as the model did."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from compressor.graph import trace
from compressor.graph.training import TrainableGraph

EXAMPLE = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
        self.maps, self.features, self.head = nn.Dropout2d(0.3), nn.Dropout(0.5), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.maps(F.relu(self.norm(self.conv(x)))).mean((2, 3))
        return self.head(self.features(y))  # type: ignore[no-any-return]


def network() -> tuple[nn.Module, TrainableGraph]:
    torch.manual_seed(0)
    model = Net().eval()
    graph = trace(model, EXAMPLE)
    assert not [n for n in graph.graph.nodes if "dropout" in n.name]  # evaluation has none
    return model, TrainableGraph(graph, graph.graph)


def test_evaluation_is_the_models() -> None:
    model, graph = network()
    assert torch.equal(graph(EXAMPLE), graph(EXAMPLE))
    assert torch.allclose(graph(EXAMPLE), model(EXAMPLE), atol=1e-6)


def test_training_draws_dropout_and_moves_statistics_as_the_model_does() -> None:
    model, graph = network()
    model.train()
    graph.train()
    assert not torch.equal(graph(EXAMPLE), graph(EXAMPLE))
    fresh = network()[1].train()
    torch.manual_seed(1)
    expected = model(EXAMPLE)
    torch.manual_seed(1)
    assert torch.allclose(fresh(EXAMPLE), expected, atol=1e-6)  # the same draws, in the same order
    assert torch.allclose(dict(fresh.named_buffers())["norm.running_mean"], model.norm.running_mean, atol=1e-6)


def test_evaluation_comes_back() -> None:
    _, graph = network()
    before = graph(EXAMPLE)
    graph.train().eval()
    assert torch.equal(graph(EXAMPLE), before)


def test_a_copy_follows_too() -> None:
    _, graph = network()
    again = copy.deepcopy(graph)
    assert not torch.equal(again.train()(EXAMPLE), again(EXAMPLE))
    assert torch.equal(graph(EXAMPLE), graph(EXAMPLE))


def test_a_recurrent_layer_trains_with_its_own_dropout() -> None:
    class Columns(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell = nn.LSTM(24, 8, num_layers=2, dropout=0.5, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.cell(x.flatten(1, 2).transpose(1, 2))[0][:, -1]  # type: ignore[no-any-return]

    torch.manual_seed(0)
    traced = trace(Columns().eval(), EXAMPLE)
    graph = TrainableGraph(traced, traced.graph)
    assert torch.equal(graph(EXAMPLE), graph(EXAMPLE))
    assert not torch.equal(graph.train()(EXAMPLE), graph(EXAMPLE))
