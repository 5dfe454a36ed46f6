"""Least squares in front of a clamp: the optimum of its convex loss, found where a clamp is, and worth having."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional

from compressor.budgets import Budget
from compressor.graph import fetch, trace
from compressor.inputs.models import load_model
from compressor.inputs.sources import load_images
from compressor.planning import RankingOptions, make_plan
from compressor.pruning import find_structure, prune
from compressor.records import Slices
from compressor.relevance import ScoreOptions, score
from compressor.repair import clamped, compensation, least_squares
from compressor.repair.clamped import Bounds, Rows
from compressor.repair.compensation import CompensationOptions, compensate
from compressor.repair.consumers import find_layers

from .conftest import ORDER_TOLERANCE, RANK_TOLERANCE, distance, sliced

INF = math.inf
RIDGE = 1e-3


def problem(groups: int) -> tuple[Rows, least_squares.Moments, Tensor]:
    """Targets that the rows can't make; the clamp is given them and a constant that the layer doesn't know of."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(groups, 400, 5, generator=generator, dtype=torch.float64)
    hidden = torch.randn(groups, 400, 3, generator=generator, dtype=torch.float64)
    both = torch.randn(groups, 8, 4, generator=generator, dtype=torch.float64)
    targets = torch.cat([x, hidden], 2) @ both
    sums = least_squares.MomentSums(groups, 5, 4, x.device, (x.mean(1), targets.mean(1)))
    sums.add(x, targets)
    return Rows(x, targets, targets - 0.5), sums.moments(), torch.zeros(groups, 4, 5, dtype=torch.float64)


def loss(rows: Rows, bounds: Bounds, weights: Tensor, offset: Tensor) -> Tensor:
    """Written from its definition: beyond a bound where the dense network is, only what comes back counts."""
    given = rows.x @ weights.mT + offset.unsqueeze(1) - rows.targets + rows.clamp_inputs
    off = given - rows.clamp_inputs
    off = torch.where(rows.clamp_inputs <= bounds.low, (given - bounds.low).clamp(min=0), off)
    off = torch.where(rows.clamp_inputs >= bounds.high, (given - bounds.high).clamp(max=0), off)
    return off.square().sum() / rows.x.shape[1]


@pytest.mark.parametrize("bounds", [Bounds(0.0, INF), Bounds(0.0, 1.0), Bounds(-INF, INF)], ids=str)
@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("intercept", [True, False])
def test_the_fit_is_the_optimum(bounds: Bounds, groups: int, intercept: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, moments, start = problem(groups)
    monkeypatch.setattr(clamped, "STEPS", 400)
    monkeypatch.setattr(clamped, "CHUNK_ENTRIES", 2500)
    found = clamped.solve(moments, rows, bounds, RIDGE, start, intercept=intercept)
    assert found is not None
    weights, offset = (t.clone().requires_grad_() for t in found)
    value = loss(rows, bounds, weights, offset)
    assert clamped.squared_error(rows, bounds, *found) == pytest.approx(float(value.detach()), rel=ORDER_TOLERANCE)
    xx = least_squares.problem_of(moments, intercept).xx.diagonal(dim1=-2, dim2=-1)
    (value + (RIDGE * xx.mean(-1).view(-1, 1, 1) * weights.square()).sum()).backward()
    assert weights.grad is not None
    assert offset.grad is not None
    assert float(weights.grad.abs().max()) < 1e-6
    if intercept:
        assert float(offset.grad.abs().max()) < 1e-6
    else:
        assert not bool(offset.any())


def test_without_bounds_it_is_plain_least_squares() -> None:
    rows, moments, start = problem(2)
    found = clamped.solve(moments, rows, Bounds(-INF, INF), RIDGE, start, intercept=True)
    left = least_squares.problem_of(least_squares.unexplained_by(start, moments), True)
    change = least_squares.correction(left, RIDGE)
    assert found is not None
    assert change is not None
    plain = start + change
    assert plain is not None
    assert torch.allclose(found[0], plain, rtol=0, atol=ORDER_TOLERANCE)


def test_ten_steps_go_most_of_the_way(monkeypatch: pytest.MonkeyPatch) -> None:
    bounds = Bounds(0.0, INF)
    rows, moments, start = problem(1)
    errors = {}
    for steps in (0, clamped.STEPS, 400):
        monkeypatch.setattr(clamped, "STEPS", steps)
        found = clamped.solve(moments, rows, bounds, RIDGE, start, intercept=True)
        assert found is not None
        errors[steps] = clamped.squared_error(rows, bounds, *found)
    assert errors[10] - errors[400] < 0.02 * (errors[0] - errors[400])


class Sum(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.one, self.two = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)
        self.norm = nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return functional.relu(self.norm(self.two(self.one(x).relu())) + x)


class Twice(nn.Module):
    """What the clamp takes is read by another node too."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Conv2d(3, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.one(x)
        return x.relu() + x


class Cut(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Conv2d(3, 4, 1)
        self.register_buffer("high", torch.tensor(1.5))

    def forward(self, x: Tensor) -> Tensor:
        return torch.minimum(functional.gelu(self.one(x)), self.get_buffer("high"))


def one(activation: nn.Module, *before: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 1), *before, activation)


FOUND: dict[str, tuple[Callable[[], nn.Module], str, Bounds | None]] = {
    "relu": (lambda: one(nn.ReLU()), "0", Bounds(0.0, INF)),
    "relu in place": (lambda: one(nn.ReLU(inplace=True)), "0", Bounds(0.0, INF)),
    "relu6 behind a normalisation": (lambda: one(nn.ReLU6(), nn.BatchNorm2d(4)), "0", Bounds(0.0, 6.0)),
    "hardtanh": (lambda: one(nn.Hardtanh(-2.0, 3.0)), "0", Bounds(-2.0, 3.0)),
    "hardswish": (lambda: one(nn.Hardswish()), "0", Bounds(-3.0, INF)),
    "hardsigmoid": (lambda: one(nn.Hardsigmoid()), "0", Bounds(-3.0, 3.0)),
    "relu behind a sum": (Sum, "two", Bounds(0.0, INF)),
    "relu before it": (Sum, "one", Bounds(0.0, INF)),
    "gelu, nearly": (lambda: one(nn.GELU()), "0", Bounds(-2.4, INF)),
    "silu, nearly": (lambda: one(nn.SiLU()), "0", Bounds(-5.64, INF)),
    "gelu, then cut at a stored value": (Cut, "one", Bounds(-2.4, 1.59)),
    "leaky": (lambda: one(nn.LeakyReLU()), "0", None),
    "read twice": (Twice, "one", None),
    "none": (lambda: one(nn.Identity()), "0", None),
}


@pytest.mark.parametrize("case", FOUND)
def test_the_clamp_behind_a_layer_is_found(case: str) -> None:
    make, name, expected = FOUND[case]
    graph = trace(make().eval(), torch.randn(2, 3, 4, 4))
    layers, _ = find_layers(graph, set(graph.graph.nodes))
    (found,) = (layer.bounds for layer in layers.values() if layer.name == name)
    assert (found is None) == (expected is None)
    if found is not None and expected is not None:
        assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=0.005)


@pytest.mark.parametrize(("low", "high"), [(0.5, None), (None, 1.5), (-1.0, 1.0)])
def test_clamps_with_one_bound_or_two(low: float | None, high: float | None) -> None:
    class Clamped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one = nn.Conv2d(3, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.one(x).clamp(low, high)

    graph = trace(Clamped(), torch.randn(2, 3, 4, 4))
    (layer,) = find_layers(graph, set(graph.graph.nodes))[0].values()
    assert layer.bounds == Bounds(-INF if low is None else low, INF if high is None else high)


class Block(nn.Module):
    """ReLU behind a normalisation, and behind a sum."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 16, 1), nn.Conv2d(16, 8, 3, padding=1), nn.Conv2d(8, 16, 1)
        self.norm = nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu(self.a(x))
        return functional.relu(self.c(functional.relu(self.norm(self.b(x)))) + x)


KEPT = [0, 5, 10, 15]


def narrowed(dense: fx.GraphModule) -> tuple[fx.GraphModule, Slices]:
    cuts = {f"{layer}.{kind}": {0: KEPT} for layer in "ac" for kind in ("weight", "bias")}
    return sliced(dense, cuts | {"b.weight": {1: KEPT}})


@pytest.mark.thorough
def test_a_trained_networks_outputs_are_nearer_on_fresh_images(monkeypatch: pytest.MonkeyPatch) -> None:
    model = load_model("digits-resnet", None)
    assert model.preprocessing is not None
    held = load_images("digits").prepared(model.preprocessing)
    images, fresh = torch.stack([held[i] for i in range(400)]), torch.stack([held[i] for i in range(400, 700)])
    dense = trace(model.module, images[:2])
    structure = find_structure(dense, images[:2])
    scores = score(dense, structure.groups, (), criterion="l1", options=ScoreOptions())
    plan = make_plan(dense, structure, scores, Budget("macs", 0.5), RankingOptions(multiple=1))
    errors = []
    for minds_clamps in (True, False):
        pruned, slices = prune(dense, structure, plan)
        if not minds_clamps:
            monkeypatch.setattr(compensation, "_clamped_is_better", lambda *_: False)
        compensate(dense, pruned, slices, images.split(50))
        with torch.no_grad():
            errors.append(distance(pruned(fresh), dense(fresh)))
    assert errors[0] < 0.95 * errors[1]


def test_rows_that_do_not_fit_are_not_held() -> None:
    """Linear least squares needs no rows; with little memory it is what is left."""
    torch.manual_seed(0)
    images = torch.randn(64, 3, 6, 6)
    dense = trace(Block().eval(), images[:2])
    found = {}
    for limit in (0, 2 << 30):
        small, slices = narrowed(dense)
        compensate(dense, small, slices, images.split(16), options=CompensationOptions(limit_bytes=limit))
        found[limit] = fetch(small, "b.weight").detach()
    assert float((found[0] - found[2 << 30]).abs().max()) > RANK_TOLERANCE
