"""Criteria from gradients and activations against finite differences, loops and closed forms."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional

from compressor.errors import ModelError
from compressor.graph import Watcher, trace
from compressor.records import Group, Groups, Site
from compressor.relevance import ScoreOptions, score
from compressor.relevance.options import Start
from compressor.relevance.starts import objective_of, require_logits, seed, targets_of
from compressor.relevance.tape import record
from compressor.tasks import task_named

# Central differences of a smooth function in float64, step 1e-5: truncation 1e-10 and cancellation 1e-11.
DIFFERENCE_TOLERANCE = 1e-7
FLOAT64_TOLERANCE = 1e-12
# The trapezoid rule is of second order: 200 steps over a softplus net.
PATH_TOLERANCE = 1e-4
N = 5


class Net(nn.Module):
    """Smooth, with a normalisation between the layer looked at and its activation."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.second, self.last = nn.Conv2d(4, 6, 3, stride=2), nn.Linear(6, 3)
        nn.init.normal_(self.norm.running_mean)
        nn.init.normal_(self.norm.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.softplus(self.norm(self.first(x)))
        return self.last(functional.softplus(self.second(x)).mean((2, 3)))


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.randn(N, 3, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def labels() -> Tensor:
    return torch.tensor([0, 1, 2, 1, 0])


@pytest.fixture(scope="module")
def graph(images: Tensor) -> fx.GraphModule:
    torch.manual_seed(0)
    return trace(Net().double(), images[:2])


@pytest.fixture(scope="module")
def groups() -> Groups:
    sizes = {"conv2d": 4, "conv2d_1": 6}
    return Groups(
        tuple(
            Group(n, "channel", k, (Site(n, n, (1,), np.arange(k)),), np.zeros(k, np.int64)) for n, k in sizes.items()
        )
    )


def replaced(graph: fx.GraphModule, images: Tensor, name: str, change: Any) -> Tensor:
    """The logits with one node's value changed."""
    with torch.no_grad():
        out: Tensor = Watcher(graph, lambda node, value: change(value) if node.name == name else value).run(images)
    return out


def objective(logits: Tensor, labels: Tensor, start: Start) -> Tensor:
    """Per sample, what `start` is the gradient of; for `logit` the start is the logit times that of `one`."""
    if start == "loss":
        return functional.cross_entropy(logits, labels, reduction="none")
    return logits[torch.arange(len(labels)), labels]


def scores(
    graph: fx.GraphModule, groups: Groups, images: Tensor, labels: Tensor, criterion: str, **options: Any
) -> Any:
    batches = [(images[:2], labels[:2]), (images[2:], labels[2:])]
    return score(graph, groups, batches, criterion=criterion, options=ScoreOptions(**options)).values


@pytest.mark.parametrize("start", ["one", "loss", "logit"])
@pytest.mark.parametrize("name", ["conv2d", "conv2d_1"])
def test_gradient_equals_central_differences(
    graph: fx.GraphModule, images: Tensor, labels: Tensor, start: Start, name: str
) -> None:
    _, gradients = record(graph, images, labels, [name], start=start)
    factor = objective(graph(images), labels, "one").detach() if start == "logit" else torch.ones(N)
    step = 1e-5
    for place in [(0, 0, 0), (1, 1, 1), (3, 0, 1)]:
        shift = torch.zeros_like(gradients[name][:1])
        shift[(0, *place)] = step
        up, down = (
            objective(replaced(graph, images, name, lambda v, by=sign * shift: v + by), labels, start)
            for sign in (1, -1)
        )
        expected = (up - down) / (2 * step) * factor
        found = gradients[name][(slice(None), *place)]
        assert (found - expected).abs().max() < DIFFERENCE_TOLERANCE
        assert found.abs().max() > 1e-4


@pytest.mark.parametrize(("criterion", "start"), [("gradient_x_input", "one"), ("taylor", "loss")])
def test_first_order_is_the_slope_of_shrinking_a_unit(
    graph: fx.GraphModule, groups: Groups, images: Tensor, labels: Tensor, criterion: str, start: Start
) -> None:
    """d/ds of the objective at s = 1 when a channel, behind its activation, is multiplied by s."""
    found = scores(graph, groups, images, labels, criterion)["conv2d"][0]
    step = 1e-5
    for unit in range(4):
        scale = torch.zeros(4, 1, 1, dtype=torch.float64)
        scale[unit] = step
        up, down = (
            objective(replaced(graph, images, "softplus", lambda v, by=1 + sign * scale: v * by), labels, start)
            for sign in (1, -1)
        )
        slope = (up - down) / (2 * step)
        assert abs(float(slope.abs().sum()) - found[unit]) < DIFFERENCE_TOLERANCE


def test_fisher_is_the_sum_of_squared_per_sample_slopes(
    graph: fx.GraphModule, groups: Groups, images: Tensor, labels: Tensor
) -> None:
    found = scores(graph, groups, images, labels, "fisher")["conv2d_1"][0]
    expected = np.zeros(6)
    for i in range(N):
        values, gradients = record(graph, images[i : i + 1], labels[i : i + 1], ["softplus_1"], start="loss")
        expected += (values["softplus_1"] * gradients["softplus_1"]).sum((0, 2, 3)).square().numpy()
    assert np.abs(found - expected).max() <= FLOAT64_TOLERANCE * expected.max()
    at_once = scores(graph, groups, images, labels, "taylor", per="all")["conv2d_1"][0] ** 2
    assert np.abs(found - at_once).max() > 0.01 * expected.max()  # the square of the sum is another thing


def test_signs_and_places(graph: fx.GraphModule, groups: Groups, images: Tensor, labels: Tensor) -> None:
    values, gradients = record(graph, images, labels, ["conv2d", "softplus"], start="one")
    product = (values["conv2d"] * gradients["conv2d"]).sum((2, 3))
    for options, expected in (
        ({"sign": "absolute"}, product.abs().sum(0)),
        ({"sign": "signed"}, product.sum(0)),
        ({"per": "all"}, product.sum(0).abs()),
        ({"per": "element"}, (values["conv2d"] * gradients["conv2d"]).abs().sum((0, 2, 3))),
    ):
        found = scores(graph, groups, images, labels, "gradient_x_input", place="site", **options)["conv2d"][0]
        assert np.abs(found - expected.numpy()).max() <= FLOAT64_TOLERANCE * np.abs(found).max()
    settled = (values["softplus"] * gradients["softplus"]).sum((2, 3)).abs().sum(0).numpy()
    found = scores(graph, groups, images, labels, "gradient_x_input")["conv2d"][0]
    assert np.abs(found - settled).max() <= FLOAT64_TOLERANCE * settled.max()
    activation = scores(graph, groups, images, labels, "activation")["conv2d"][0]
    assert np.abs(activation - values["softplus"].sum((0, 2, 3)).numpy()).max() <= FLOAT64_TOLERANCE * activation.max()


@pytest.mark.parametrize("name", ["conv2d", "conv2d_1"])
def test_integrated_gradients_add_up_to_the_change_of_the_logit(
    graph: fx.GraphModule, groups: Groups, images: Tensor, labels: Tensor, name: str
) -> None:
    options = {"sign": "signed", "place": "site", "steps": 200}
    found = scores(graph, groups, images, labels, "integrated_gradients", **options)[name].sum()
    with torch.no_grad():
        change = objective(graph(images), labels, "one") - objective(graph(torch.zeros_like(images)), labels, "one")
    assert abs(found - float(change.sum())) < PATH_TOLERANCE * float(change.abs().sum())


def test_nothing_but_the_asked_nodes_gets_a_gradient(graph: fx.GraphModule, images: Tensor, labels: Tensor) -> None:
    record(graph, images, labels, ["conv2d"], start="one")
    assert images.grad is None
    assert not images.requires_grad
    assert all(p.grad is None for p in graph.parameters())


def test_a_node_the_output_ignores_has_gradient_zero() -> None:
    class Ignoring(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 3), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.a(x), self.b(x)

    graph = trace(Ignoring(), torch.randn(2, 4))
    says_first = replace(task_named("any"), says=lambda leaves, targets: leaves["output.0"].sum(1))
    starting = objective_of(graph, says_first)
    _, gradients = record(graph, torch.randn(3, 4), None, ["linear_1"], start="one", objective=starting)
    assert gradients["linear_1"].shape == (3, 2)
    assert not gradients["linear_1"].any()


def test_starts_and_targets(graph: fx.GraphModule, images: Tensor, labels: Tensor) -> None:
    logits = graph(images).detach().requires_grad_()
    functional.cross_entropy(logits, labels, reduction="sum").backward()
    assert logits.grad is not None
    assert torch.allclose(seed(logits, labels, "loss"), logits.grad, rtol=1e-12)
    assert torch.equal(seed(logits, labels, "logit").sum(1), objective(logits, labels, "one"))
    best = logits.argmax(1)
    some = torch.where(torch.arange(N) % 2 == 0, -1, labels)
    assert torch.equal(targets_of(graph, images, some, predicted=False), torch.where(some < 0, best, labels))
    assert torch.equal(targets_of(graph, images, labels, predicted=True), best)


def test_class_scores_are_one_tensor() -> None:
    logits = torch.randn(2, 3)
    assert require_logits((logits,)) is logits
    with pytest.raises(ModelError, match=r"\[2, 3, 4, 4\]"):
        require_logits((torch.randn(2, 3, 4, 4),))
    with pytest.raises(ModelError, match="--task"):
        require_logits((logits, logits))
