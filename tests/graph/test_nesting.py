"""What an owner trains on is called as the model was and answers in the model's own containers."""

from __future__ import annotations

import copy
import inspect
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from compressor.graph import trace
from compressor.graph.nesting import nesting_of
from compressor.graph.training import TrainableGraph
from compressor.tensors import named_leaves

X = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))


@dataclass(frozen=True)
class Boxes:
    deltas: Tensor
    scale: float


class Pair(NamedTuple):
    out: Tensor
    features: list[Tensor]


class Answering(nn.Module):
    """One layer, whose answer is in the containers that `wrap` makes."""

    def __init__(self, wrap: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.layer, self.norm, self.drop = nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Dropout(0.5)
        self.wrap = wrap

    def forward(self, x: Tensor) -> Any:
        return self.wrap(self.drop(self.norm(self.layer(x))))


TREES: dict[str, Callable[[Tensor], Any]] = {
    "tensor": lambda y: y,
    "dictionary": lambda y: {"out": y, "boxes": Boxes(2 * y, 0.5), "none": None},
    "ordered": lambda y: OrderedDict(out=y, aux=[y + 1, (y - 1,)]),
    "dataclass": lambda y: Boxes(y, 2.0),
    "named tuple": lambda y: Pair(y, [y + 1, y + 2]),
    "tuple": lambda y: (y, 2 * y),
    "lone in a list": lambda y: [y],
}


def _network(model: nn.Module, example: Any, keywords: tuple[str, ...] = ()) -> TrainableGraph:
    graph = trace(model, example, keywords)
    return TrainableGraph(graph, graph.graph, nesting=nesting_of(model, graph, example, keywords))


@pytest.mark.parametrize("wrap", TREES.values(), ids=TREES)
def test_the_answer_is_in_the_models_own_containers(wrap: Callable[[Tensor], Any]) -> None:
    model = Answering(wrap).eval()
    network = _network(model, X)

    for other in (network, copy.deepcopy(network)):
        expected, answer = model(X), other(X)
        assert type(answer) is type(expected)
        assert _shape(answer) == _shape(expected)
        leaves = named_leaves(answer)
        for name, leaf in named_leaves(expected).items():
            torch.testing.assert_close(leaves[name], leaf)


def _shape(tree: Any) -> object:
    """The containers and what they hold beside tensors."""
    if isinstance(tree, Tensor):
        return list(tree.shape)
    if isinstance(tree, dict):
        return {name: _shape(entry) for name, entry in tree.items()}
    if isinstance(tree, (list, tuple)):
        return [type(tree), *map(_shape, tree)]
    return [type(tree), *map(_shape, vars(tree).values())] if isinstance(tree, Boxes) else tree


def test_training_and_evaluation_mean_what_they_mean_in_pytorch_below_the_containers() -> None:
    model = Answering(TREES["dictionary"]).eval()
    network = _network(model, X)
    before = network(X)["out"]

    network.train()
    assert not torch.equal(network(X)["out"], network(X)["out"])
    assert not torch.equal(dict(network.named_buffers())["norm.running_mean"], model.norm.running_mean)
    network.load_state_dict(model.state_dict(), strict=False)
    assert torch.equal(network.eval()(X)["out"], before)


def test_a_moving_average_of_the_weights_answers_alike() -> None:
    network = _network(Answering(TREES["dataclass"]).eval(), X)
    average = AveragedModel(network, use_buffers=True)
    average.update_parameters(network)
    torch.testing.assert_close(average(X).deltas, network(X).deltas)


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(6, 3), nn.Linear(2, 3)

    def forward(self, image: Tensor, vector: Tensor, flag: bool = False) -> dict[str, Tensor]:
        return {"sum": self.left(image) + self.right(vector), "other": self.right(vector)}


class Mapped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.two = Two()

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        return self.two(**batch)


V = torch.randn(4, 2, generator=torch.Generator().manual_seed(1))


def test_several_inputs_are_given_as_the_model_takes_them() -> None:
    model = Two().eval()
    expected = model(X, V)["sum"]
    by_position, by_name = _network(model, (X, V)), _network(model, (V, X), ("vector", "image"))
    for network in (by_position, by_name):
        torch.testing.assert_close(network(X, V)["sum"], expected)
        torch.testing.assert_close(network(X, vector=V)["sum"], expected)
        torch.testing.assert_close(network(vector=V, image=X)["sum"], expected)
        assert list(inspect.signature(network.forward).parameters) == ["image", "vector"]
    mapped = Mapped().eval()
    answer = _network(mapped, (X, V), ("image", "vector"))({"vector": V, "image": X})
    torch.testing.assert_close(answer["sum"], mapped({"image": X, "vector": V})["sum"])


def test_what_forward_was_not_traced_with_is_a_type_error_that_names_the_inputs() -> None:
    network = _network(Two().eval(), (X, V))
    with pytest.raises(TypeError, match="lacks 'vector'"):
        network(X)
    with pytest.raises(TypeError, match="without the argument 'flag'; its inputs are image, vector"):
        network(X, V, flag=True)
    with pytest.raises(TypeError, match="takes 2 inputs but 3"):
        network(X, V, X)
    with pytest.raises(TypeError, match="several values for 'image'"):
        network(X, image=X)


def test_the_network_can_be_traced_again() -> None:
    network = _network(Two().eval(), (X, V))
    again = trace(network, (X, V))
    torch.testing.assert_close(again(X, V)[0], network(X, V)["sum"])
