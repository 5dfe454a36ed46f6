"""A model that is no function of one image is told so, with the place in its own code; one that is passes."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from compressor.errors import ModelError
from compressor.graph import trace
from compressor.graph.behaviour import require_function

PX = 16


class Base(nn.Module):
    """A convolution and a classifier; `between` is what each test is about."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 8, 3, 2, 1), nn.Linear(8, 5)
        self.norm = nn.BatchNorm2d(8, track_running_stats=False)
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("centre", torch.zeros(1, 8, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        features: Tensor = self.between(self.conv(x))
        return self.head(F.relu(features).mean((2, 3)))  # type: ignore[no-any-return]

    def between(self, y: Tensor) -> Tensor:
        return y


class DropoutLeftOn(Base):
    def between(self, y: Tensor) -> Tensor:
        return F.dropout(y, 0.5)


class NoiseOfFixedShape(Base):
    def between(self, y: Tensor) -> Tensor:
        return y + torch.randn(1, 1, PX // 2, PX // 2)


class NoiseLikeTheInput(Base):
    def between(self, y: Tensor) -> Tensor:
        return y + torch.rand_like(y)


class PythonsRandom(Base):
    def between(self, y: Tensor) -> Tensor:
        return y * random.random()


class RunningMeanInEvaluation(Base):
    def between(self, y: Tensor) -> Tensor:
        self.centre.mul_(0.9).add_(0.1 * y.mean((0, 2, 3), keepdim=True))
        return y - self.centre


class StatisticsOfTheBatch(Base):
    def between(self, y: Tensor) -> Tensor:
        return self.norm(y)  # type: ignore[no-any-return]


class CentredByTheBatch(Base):
    def between(self, y: Tensor) -> Tensor:
        return y - y.mean(0, keepdim=True)


class CountsCalls(Base):
    def between(self, y: Tensor) -> Tensor:
        self.calls.add_(1)
        return y


class ChangesItsInput(Base):
    def forward(self, x: Tensor) -> Tensor:
        x.sub_(0.5).mul_(2.0)
        return super().forward(x)


class CountsInPython(Base):
    seen = 0

    def between(self, y: Tensor) -> Tensor:
        self.seen += 1
        return y * (1.0 + self.seen)


class ChangesAfterSomeCalls(Base):
    calls_left = 100

    def between(self, y: Tensor) -> Tensor:
        type(self).calls_left -= 1
        return y if type(self).calls_left >= 0 else 2 * y


class AddsItsGradient(Base):
    def between(self, y: Tensor) -> Tensor:
        with torch.enable_grad():
            part = y.detach().requires_grad_()
            energy = F.linear(part.mean((2, 3)), self.head.weight).square().sum()
            (gradient,) = torch.autograd.grad(energy, part)
        return y + gradient


def refusal(make: Callable[[], nn.Module]) -> str:
    torch.manual_seed(0)
    model, example = make().eval(), torch.randn(2, 3, PX, PX)
    with pytest.raises(ModelError) as caught:
        require_function(model, trace(model, example), example)
    return str(caught.value)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (DropoutLeftOn, ("random in evaluation", "native_dropout", "test_behaviour.py:")),
        (NoiseOfFixedShape, ("random in evaluation", "randn", "test_behaviour.py:")),
        (NoiseLikeTheInput, ("random in evaluation", "rand", "test_behaviour.py:")),
        (PythonsRandom, ("random in evaluation", "two passes")),
        (CountsInPython, ("two passes",)),
        (RunningMeanInEvaluation, ("depends on state", "'centre'")),
        (StatisticsOfTheBatch, ("statistics of the batch", "'norm'", "track_running_stats")),
        (CentredByTheBatch, ("depends on the other images", "over the first axis")),
        (AddsItsGradient, ("can't be traced", "takes gradients")),
    ],
)
def test_what_is_no_function_of_one_image_is_named(make: Callable[[], nn.Module], words: tuple[str, ...]) -> None:
    message = refusal(make)
    assert all(word in message for word in words), message
    assert "report" not in message
    assert "defect" not in message


def test_a_counter_that_turns_between_two_passes_is_no_statistic_of_the_batch() -> None:
    torch.manual_seed(0)
    model, example = ChangesAfterSomeCalls().eval(), torch.randn(2, 3, PX, PX)
    graph = trace(model, example)
    ChangesAfterSomeCalls.calls_left = 2  # two passes over the batch, then one image alone
    with pytest.raises(ModelError, match=r"random in evaluation.*a counter"):
        require_function(model, graph, example)


@pytest.mark.parametrize("make", [Base, CountsCalls, ChangesItsInput])
def test_harmless_state_and_input_changed_in_place_pass(make: Callable[[], nn.Module]) -> None:
    model, example = make().train(), torch.randn(2, 3, PX, PX)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    kept = example.clone()
    graph = trace(model, example)
    require_function(model, graph, example)
    assert torch.equal(example, kept)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert model.training
    first = graph(example)
    assert torch.equal(first, graph(example))
    assert torch.equal(example, kept)
    assert torch.allclose(first, model.eval()(example.clone()), atol=1e-6)


def test_a_branch_on_values_is_refused_with_its_line() -> None:
    class Branches(Base):
        def between(self, y: Tensor) -> Tensor:
            return y * 2 if float(y.sum()) > 0 else y

    with pytest.raises(ModelError, match=r"test_behaviour\.py:\d+"):
        trace(Branches(), torch.randn(2, 3, PX, PX))


def test_a_model_of_two_inputs_is_refused_by_their_names() -> None:
    class Two(nn.Module):
        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return a + b

    with pytest.raises(ModelError, match=r"needs 2 inputs \(a, b\)"):
        trace(Two(), torch.randn(2, 3, PX, PX))


class RootOfLess(Base):
    def between(self, y: Tensor) -> Tensor:
        return (y - 1e6).sqrt()


class OneOfMany(Base):
    def forward(self, x: Tensor) -> Tensor:
        answers = super().forward(x)
        return answers.masked_fill(torch.arange(5) == 2, -torch.inf)


def test_a_model_that_answers_no_number_is_refused_where_it_begins() -> None:
    example = torch.randn(2, 3, PX, PX)
    model = RootOfLess().eval()
    with pytest.raises(
        ModelError, match=r"NaN or infinity alone, first from aten\.sqrt\.default at test_behaviour\.py:\d+"
    ):
        require_function(model, trace(model, example), example)
    masked = OneOfMany().eval()
    require_function(masked, trace(masked, example), example)
