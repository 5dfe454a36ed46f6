"""Every LRP rule against its definition: contributions as an explicit matrix, in float64."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from compressor.errors import RecipeError
from compressor.relevance.composite import Rule
from compressor.relevance.rules import Layer, fast, forward, plain

EXACT = 1e-9  # float64 rounding of sums of at most some hundred terms
SAME_AS_ZENNIT = 1e-5  # float32, other order of summation

LAYERS = {
    "linear": (Layer(torch.empty(5, 7), torch.empty(5)), (3, 7)),
    "tokens": (Layer(torch.empty(5, 7), None), (2, 4, 7)),
    "conv1d": (Layer(torch.empty(6, 2, 3), torch.empty(6), 1, (2,), (1,), (1,), 2), (2, 4, 9)),
    "conv2d": (Layer(torch.empty(4, 3, 3, 2), torch.empty(4), 2, (2, 1), (1, 0), (1, 2), 1), (2, 3, 7, 6)),
    "depthwise": (Layer(torch.empty(8, 1, 3, 3), torch.empty(8), 2, (1, 1), (1, 1), (1, 1), 4), (2, 4, 5, 5)),
    "same": (Layer(torch.empty(4, 3, 1, 3), torch.empty(4), 2, (1, 1), "same", (1, 1), 1), (2, 3, 4, 4)),
    "conv3d": (
        Layer(torch.empty(4, 2, 2, 2, 2), torch.empty(4), 3, (1, 2, 1), (1, 0, 1), (2, 1, 1), 2),
        (1, 4, 4, 4, 3),
    ),
}
RULES = (
    Rule("epsilon", epsilon=0.1),
    Rule("epsilon", bias=False),
    Rule("zplus"),
    Rule("zplus", bias=False),
    Rule("alphabeta", alpha=2.0),
    Rule("alphabeta", alpha=1.5, bias=False),
    Rule("gamma", gamma=0.25),
    Rule("gamma", gamma=3.0, bias=False),
    Rule("zbox"),
    Rule("zbox", box=((-4.0,), (5.0,))),
    Rule("wsquare"),
    Rule("flat"),
    Rule("norm"),
)


def _layer(name: str, seed: int, dtype: torch.dtype) -> tuple[Layer, Tensor, Tensor]:
    """The layer with random weights, a signed input and a relevance for its output."""
    generator = torch.Generator().manual_seed(seed)
    shape, size = LAYERS[name]
    weight = torch.randn(shape.weight.shape, generator=generator, dtype=dtype)
    bias = None if shape.bias is None else torch.randn(shape.bias.shape, generator=generator, dtype=dtype)
    layer = Layer(weight, bias, shape.dims, shape.stride, shape.padding, shape.dilation, shape.groups)
    x = torch.randn(size, generator=generator, dtype=dtype)
    out = forward(layer, x, weight, bias)
    return layer, x, torch.randn(out.shape, generator=generator, dtype=dtype)


def _jacobian(layer: Layer, x: Tensor, weight: Tensor) -> Tensor:
    """The layer of one sample as a matrix [outputs, inputs], column by column from unit inputs."""
    basis = torch.eye(x[0].numel(), dtype=x.dtype).reshape(-1, *x.shape[1:])
    return forward(layer, basis, weight, None).flatten(1).T


def _by_definition(layer: Layer, rule: Rule, x: Tensor, relevance: Tensor) -> Tensor:
    """Row by row: the relevance of output j goes to input i by the rule's share of z_ji = W_ji x_i."""
    matrix = _jacobian(layer, x, layer.weight)
    zero = torch.zeros(layer.weight.shape[0], dtype=x.dtype)
    per_output = zero if layer.bias is None else layer.bias
    bias = forward(layer, torch.zeros_like(x[:1]), layer.weight, per_output).flatten()
    used = bias if rule.bias or rule.name == "norm" else torch.zeros_like(bias)
    ones = _jacobian(layer, x, torch.ones_like(layer.weight))
    rows = [
        _sample(rule, matrix, ones, xs, r, used, bias) for xs, r in zip(x.flatten(1), relevance.flatten(1), strict=True)
    ]
    boxed = rule.name == "zbox"
    return (torch.stack(rows) if not boxed else _zbox(matrix, x, relevance, rule)).reshape(x.shape)


def _sign(z: Tensor) -> Tensor:
    return torch.where(z >= 0, torch.ones_like(z), -torch.ones_like(z))


def _sample(rule: Rule, matrix: Tensor, ones: Tensor, x: Tensor, r: Tensor, bias: Tensor, true_bias: Tensor) -> Tensor:
    z = matrix * x
    total = torch.zeros_like(x)
    for j in range(len(r)):
        total += _row(rule, z[j], matrix[j], ones[j], bias[j], true_bias[j]) * r[j]
    return total


def _row(rule: Rule, z: Tensor, w: Tensor, one: Tensor, b: Tensor, true_b: Tensor) -> Tensor:
    """The shares of one output's relevance over all inputs."""
    e = rule.epsilon
    positive, negative = z.clamp(min=0), z.clamp(max=0)
    up, down = positive.sum() + b.clamp(min=0), negative.sum() + b.clamp(max=0)
    if rule.name in ("epsilon", "norm"):
        s = z.sum() + b
        return z / (s + e * _sign(s))
    if rule.name == "zplus":
        return positive / (up + e)
    if rule.name == "alphabeta":
        return rule.alpha * positive / (up + e) - (rule.alpha - 1) * negative / (down + e * _sign(down))
    if rule.name == "gamma":
        out = z.sum() + true_b
        favoured = positive if out > 0 else negative
        edge = b + rule.gamma * (b.clamp(min=0) if out > 0 else b.clamp(max=0))
        s = (z + rule.gamma * favoured).sum() + edge
        return (z + rule.gamma * favoured) / (s + e * _sign(s)) if out != 0 else torch.zeros_like(z)
    if rule.name == "wsquare":
        return w**2 / ((w**2).sum() + b**2 + e)
    return one / (one.sum() + e)


def _zbox(matrix: Tensor, x: Tensor, relevance: Tensor, rule: Rule) -> Tensor:
    axes = tuple(range(2, x.dim())) or (1,)
    low, high = (torch.full_like(x, side[0]) for side in rule.box or ((0.0,), (0.0,)))
    if rule.box is None:
        low, high = x.amin(axes, keepdim=True).expand_as(x), x.amax(axes, keepdim=True).expand_as(x)
    up, down = matrix.clamp(min=0), matrix.clamp(max=0)
    result = []
    for xs, lo, hi, r in zip(x.flatten(1), low.flatten(1), high.flatten(1), relevance.flatten(1), strict=True):
        z = matrix * xs - up * lo - down * hi
        total = z.sum(1, keepdim=True)
        result.append((z / (total + rule.epsilon * _sign(total)) * r[:, None]).sum(0))
    return torch.stack(result)


def _distance(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max().clamp_min(1e-30))


CASES = list(itertools.product(LAYERS, RULES))


@pytest.mark.parametrize(("name", "rule"), CASES, ids=lambda v: v if isinstance(v, str) else f"{v.name}-{v.bias}")
@pytest.mark.parametrize("nonnegative", [False, True])
def test_rule_equals_its_definition(name: str, rule: Rule, nonnegative: bool) -> None:
    layer, x, relevance = _layer(name, 3, torch.float64)
    x = x.abs() if nonnegative else x
    expected = _by_definition(layer, rule, x, relevance)
    assert _distance(plain(layer, rule, x, relevance), expected) < EXACT
    assert _distance(fast(layer, rule, x, relevance, output=None, nonnegative=nonnegative), expected) < EXACT
    out = forward(layer, x, layer.weight, layer.bias)
    assert _distance(fast(layer, rule, x, relevance, output=out, nonnegative=nonnegative), expected) < EXACT


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("rule", RULES, ids=lambda r: f"{r.name}-{r.bias}")
def test_fast_equals_zennit_in_single_precision(name: str, rule: Rule) -> None:
    layer, x, relevance = _layer(name, 5, torch.float32)
    for nonnegative, values in ((False, x), (True, x.relu())):
        given = fast(layer, rule, values, relevance, output=None, nonnegative=nonnegative)
        assert _distance(given, plain(layer, rule, values, relevance)) < SAME_AS_ZENNIT


def test_pass_hands_relevance_on_and_refuses_another_shape() -> None:
    square = Layer(torch.randn(4, 4), None)
    x, relevance = torch.randn(2, 4), torch.randn(2, 4)
    assert torch.equal(plain(square, Rule("pass"), x, relevance), relevance)
    with pytest.raises(RecipeError, match="equal input and output shapes"):
        plain(Layer(torch.randn(3, 4), None), Rule("pass"), x, torch.randn(2, 3))


def test_rules_leave_their_arguments_alone() -> None:
    layer, x, relevance = _layer("conv2d", 1, torch.float64)
    before = [t.clone() for t in (layer.weight, x, relevance)]
    out = forward(layer, x, layer.weight, layer.bias)
    kept = out.clone()
    for rule in RULES:
        fast(layer, rule, x, relevance, output=out, nonnegative=False)
        plain(layer, rule, x, relevance)
    assert all(torch.equal(a, b) for a, b in zip(before, (layer.weight, x, relevance), strict=True))
    assert torch.equal(out, kept)
