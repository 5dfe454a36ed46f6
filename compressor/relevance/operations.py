"""LRP of every operation that is no weighted layer: operation -> how its relevance goes to what it read.

Each rule takes a `Call` (a node, its relevance, the values kept from the forward pass) and returns relevance
per input. What has no entry has no rule: `rule_of` returns None and the caller names it.
Sources: Bach et al. 2015 (epsilon), Achtibat et al. 2024 (AttnLRP: products, normalisation, activations).
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from . import attention
from .canonical import Canonical, affine, operation
from .normalisation import norm_of, through_norm
from .products import attend, copy, divide, gated, matrix_product, multiply, product, softmax
from .rules import stabilised_
from .spreading import (
    MOVES,
    Call,
    Contribution,
    OperationRule,
    back,
    evaluate,
    is_complex,
    leaf_of,
    numbers,
    ratio,
    signals,
)


def rule_of(node: fx.Node, known: Canonical) -> OperationRule | None:
    """The rule of an operation, or None where there is none."""
    if node.target is operator.getitem:
        return OperationRule("shapes", _nothing)
    name = operation(node)
    inputs = signals(node, known)
    if any(is_complex(n) for n in (node, *inputs)):
        return OperationRule("inputs", by_taylor)
    if name in _RULES:
        return _RULES[name]
    if name in ("matmul", "bmm", "mm"):
        return OperationRule("both", matrix_product) if len(inputs) > 1 else OperationRule("inputs", _linear)
    if name in _BILINEAR:
        return OperationRule("inputs", product if len(inputs) > 1 else _linear)
    if len(inputs) == 1 and torch.Tag.pointwise in getattr(node.target, "tags", ()):
        return _ACTIVATION
    return None


def by_taylor(call: Call) -> Sequence[Contribution]:
    """First-order expansion at zero: input x gradient, in proportion to the output. For what has no rule of its own."""
    with torch.backends.cudnn.flags(enabled=False):  # its recurrent layers have a gradient in training only
        return _linear(call)


def _nothing(call: Call) -> Sequence[Contribution]:
    return ()


def _move(call: Call) -> Sequence[Contribution]:
    """Values only change place: relevance goes the same way back."""
    leaves = {n: leaf_of(call.values[n]) for n in numbers(call)}
    return back(call, leaves, evaluate(call, leaves), call.relevance)


def _reshape(call: Call) -> Sequence[Contribution]:
    (source,) = signals(call.node, call.known)
    return [(source, call.relevance.reshape(call.values[source].shape))]


def _cat(call: Call) -> Sequence[Contribution]:
    parts: Any = call.node.args[0]
    dim = int(call.node.args[1]) if len(call.node.args) > 1 else int(call.node.kwargs.get("dim", 0))  # type: ignore[arg-type]
    widths = [call.values[n].shape[dim] for n in parts]
    split = torch.split(call.relevance, widths, dim)
    return [(n, piece) for n, piece in zip(parts, split, strict=True) if n in call.known.data]


def _winner(call: Call) -> Sequence[Contribution]:
    """All relevance to the values that were passed on (maximum, selection by a mask)."""
    leaves = {n: leaf_of(call.values[n]) for n in numbers(call)}
    return back(call, leaves, evaluate(call, leaves), call.relevance)


def _pool_with_places(x: Tensor, kernel: Any, stride: Any = (), *rest: Any, **named: Any) -> tuple[Tensor, Tensor]:
    """Max pooling once: on the way back the places of the maxima are enough."""
    out, places = torch.ops.aten.max_pool2d_with_indices.default(x, kernel, stride, *rest, **named)
    return out, places


def _max_pool(call: Call) -> Sequence[Contribution]:
    source, kernel, *rest = call.node.args
    assert isinstance(source, fx.Node)
    usual: list[Any] = [(), 0, 1, False]  # stride, padding, dilation, ceil mode
    given: list[Any] = [*rest, *usual[len(rest) :]]
    geometry = [call.node.kwargs.get(n, v) for n, v in zip(_POOL, given, strict=True)]
    spec = call.values[source]
    like = torch.empty(spec.shape, dtype=spec.dtype, device=spec.device)
    back = torch.ops.aten.max_pool2d_with_indices_backward.default
    return [(source, back(call.relevance, like, kernel, *geometry, call.saved))]


_POOL = ("stride", "padding", "dilation", "ceil_mode")


def _linear(call: Call) -> Sequence[Contribution]:
    """An affine function: in proportion to the products, the constant part absorbs (epsilon rule)."""
    leaves = {n: leaf_of(call.values[n]) for n in numbers(call)}
    out = evaluate(call, leaves)
    if isinstance(out, (tuple, list)):
        pairs = zip(out, call.relevance, strict=True)
        share: Any = [None if r is None else ratio(r, o.detach(), call) for o, r in pairs]
    else:
        share = ratio(call.relevance, out.detach(), call)
    grads = back(call, leaves, out, share)
    return [(n, None if g is None else _input_times(call.values[n], g)) for n, g in grads]


def _input_times(value: Tensor, gradient: Tensor) -> Tensor:
    """Real also where the value is complex: what its real and its imaginary part contribute."""
    return (value * gradient.conj()).real if value.is_complex() else attention.scaled(value, gradient)


def _activation(call: Call) -> Sequence[Contribution]:
    (source,) = signals(call.node, call.known)
    return [(source, call.relevance.sum_to_size(call.values[source].shape))]


def _activation_by_choice(call: Call) -> Sequence[Contribution]:
    return _activation(call) if call.composite.activation == "pass" else _linear(call)


def _sum(call: Call) -> Sequence[Contribution]:
    """Each summand in proportion to its part (epsilon rule); a constant summand absorbs like a bias."""
    name, (a, b) = operation(call.node), call.node.args[:2]
    factor: Any = call.node.kwargs.get("alpha", 1)
    weights = {"add": (1, factor), "sub": (1, -factor), "rsub": (-factor, 1)}[name]
    parts: list[Any] = [call.values[n] if isinstance(n, fx.Node) else n for n in (a, b)]
    total = torch.as_tensor(parts[0] * weights[0] + parts[1] * weights[1])
    share = torch.div(call.relevance, stabilised_(total, call.composite.epsilon), out=total)
    found: list[Contribution] = []
    for node, part, weight in zip((a, b), parts, weights, strict=True):
        if isinstance(node, fx.Node) and node in call.known.data:
            given = attention.scaled(part, share) if _may_be_infinite(call) else part * share
            found.append((node, (given if weight == 1 else given * weight).sum_to_size(part.shape)))
    return found


def _may_be_infinite(call: Call) -> bool:
    """Sums that feed a softmax may hold a mask of -inf."""
    return any(operation(user) in ("softmax", "_softmax", "add", "reshape") for user in call.node.users) and any(
        n in call.known.constants for n in call.node.all_input_nodes
    )


def _batch_norm(call: Call) -> Sequence[Contribution]:
    (source,) = signals(call.node, call.known)
    if call.node in call.known.merged or call.composite.normalisation == "pass":
        return [(source, call.relevance)]
    x = call.values[source]
    shape = (1, -1) + (1,) * (x.dim() - 2)
    scale, shift = (t.reshape(shape) for t in affine(call.node, call.known.constants))
    part = x * scale
    return [(source, part.mul_(ratio(call.relevance, part + shift, call)))]


def _normalise(call: Call) -> Sequence[Contribution]:
    source = signals(call.node, call.known)[0]
    if call.composite.normalisation == "pass":
        return [(source, call.relevance)]
    x = call.values[source]
    norm = norm_of(call.node, x, call.known.constants)
    return [(source, through_norm(norm, x, call.relevance, call.composite.epsilon))]


_AVERAGES = (
    "avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d _adaptive_avg_pool2d "
    "mean sum upsample_nearest2d upsample_bilinear2d upsample_bicubic2d cumsum addmm baddbmm addcmul lerp "
    "linalg_vector_norm std col2im grid_sampler conv_transpose1d conv_transpose2d conv_transpose3d convolution dot mv"
).split()
_WINNERS = (
    "max_pool1d max_pool3d adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d amax amin max min "
    "maximum minimum max_pool2d_with_indices topk sort where masked_fill index gather index_select scatter index_put"
).split()
_ACTIVATIONS = (
    "relu relu6 hardtanh gelu silu mish hardswish hardsigmoid sigmoid tanh elu celu selu leaky_relu softplus softsign "
    "log_sigmoid log_sigmoid_forward hardshrink softshrink threshold clamp clamp_min clamp_max exp log sqrt pow"
).split()
_PASSED_ON = "prelu dropout native_dropout rrelu alpha_dropout feature_dropout log_softmax _log_softmax".split()
_NORMS = "layer_norm group_norm instance_norm rms_norm".split()
_BILINEAR = "linear conv1d conv2d conv3d einsum bilinear".split()

_ACTIVATION = OperationRule("unless passed", _activation_by_choice)
_PASSED = OperationRule("shapes", _activation)

_RULES: Mapping[str, OperationRule] = {
    **{name: OperationRule("shapes", _move) for name in MOVES},
    **{name: OperationRule("inputs", _linear) for name in _AVERAGES},
    **{name: OperationRule("inputs", _winner) for name in _WINNERS},
    **{name: OperationRule("inputs", _normalise) for name in _NORMS},
    **dict.fromkeys(_ACTIVATIONS, _ACTIVATION),
    **dict.fromkeys(_PASSED_ON, _PASSED),
    **{name: OperationRule("inputs", _sum) for name in ("add", "sub", "rsub")},
    **{name: OperationRule("shapes", _reshape) for name in ("reshape", "view", "flatten", "_unsafe_view")},
    "cat": OperationRule("shapes", _cat),
    "mul": OperationRule("shapes", multiply),
    "div": OperationRule("shapes", divide),
    "copy": OperationRule("shapes", copy),
    "max_pool2d": OperationRule("shapes", _max_pool, _pool_with_places),
    "batch_norm": OperationRule("inputs", _batch_norm),
    "softmax": OperationRule("both", softmax),
    "_softmax": OperationRule("both", softmax),
    "scaled_dot_product_attention": OperationRule("both", attend),
    "glu": OperationRule("shapes", gated),
}
