"""LRP of every operation that is no weighted layer: operation -> how its relevance goes to what it read.

Each rule takes a `Call` (a node, its relevance, the values kept from the forward pass) and returns relevance
per input. What has no entry has no rule: `rule_of` returns None and the caller names it.
Sources: Bach et al. 2015 (epsilon), Achtibat et al. 2024 (AttnLRP: products, normalisation, activations).
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, fx

from . import attention
from .canonical import Canonical, affine, operation
from .composite import Composite
from .rules import stabilised_

Contribution = tuple[fx.Node, Tensor | None]
Need = Literal["shapes", "inputs", "both", "unless passed"]


@dataclass(frozen=True, slots=True)
class Spec:
    """A tensor that was not kept."""

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device


@dataclass(frozen=True, slots=True)
class Call:
    """`values` holds tensors, or a `Spec` where the rule needs the shape only. `relevance` is the node's,
    a list with None for unread parts where the node returns several tensors."""

    node: fx.Node
    relevance: Any
    values: Mapping[fx.Node, Any]
    known: Canonical
    composite: Composite


@dataclass(frozen=True, slots=True)
class OperationRule:
    need: Need
    spread: Callable[[Call], Sequence[Contribution]]


def signals(node: fx.Node, known: Canonical) -> list[fx.Node]:
    """The inputs that come from the image, each once, in order."""
    return [n for n in node.all_input_nodes if n in known.data]


def rule_of(node: fx.Node, known: Canonical) -> OperationRule | None:
    """The rule of an operation, or None where there is none."""
    if node.target is operator.getitem:
        return OperationRule("shapes", _nothing)
    name = operation(node)
    inputs = signals(node, known)
    if name in _RULES:
        return _RULES[name]
    if name in ("matmul", "bmm", "mm"):
        return OperationRule("both", _matrix_product) if len(inputs) > 1 else OperationRule("inputs", _linear)
    if name in _BILINEAR:
        return OperationRule("inputs", _product if len(inputs) > 1 else _linear)
    if len(inputs) == 1 and torch.Tag.pointwise in getattr(node.target, "tags", ()):
        return _ACTIVATION
    return None


def by_taylor(call: Call) -> Sequence[Contribution]:
    """First-order expansion at zero: input x gradient, in proportion to the output. For accepted operations."""
    return _linear(call)


def _nothing(call: Call) -> Sequence[Contribution]:
    return ()


def _evaluate(call: Call, replaced: Mapping[fx.Node, Tensor]) -> Any:
    arguments = fx.map_arg((call.node.args, call.node.kwargs), lambda n: replaced.get(n, call.values.get(n)))
    with torch.enable_grad():
        return call.node.target(*arguments[0], **arguments[1])  # type: ignore[operator]


def _leaf(value: Any) -> Tensor:
    if isinstance(value, Spec):
        return torch.empty(value.shape, dtype=value.dtype, device=value.device, requires_grad=True)
    leaf: Tensor = value.detach()
    return leaf.requires_grad_() if leaf.is_floating_point() else leaf


def _back(call: Call, leaves: Mapping[fx.Node, Tensor], out: Any, relevance: Any) -> list[Contribution]:
    """Gradients of the outputs to the leaves, weighted by relevance."""
    outs = list(out) if isinstance(out, (tuple, list)) else [out]
    given = relevance if isinstance(relevance, list) else [relevance]
    pairs = [(o, r) for o, r in zip(outs, given, strict=False) if r is not None and o.requires_grad]
    if not pairs:
        return [(n, None) for n in leaves]
    grads = torch.autograd.grad([o for o, _ in pairs], list(leaves.values()), [r for _, r in pairs], allow_unused=True)
    return list(zip(leaves, grads, strict=True))


def _float_signals(call: Call) -> list[fx.Node]:
    nodes = signals(call.node, call.known)
    return [n for n in nodes if getattr(call.values[n], "dtype", torch.bool).is_floating_point]


def _move(call: Call) -> Sequence[Contribution]:
    """Values only change place: relevance goes the same way back."""
    leaves = {n: _leaf(call.values[n]) for n in _float_signals(call)}
    return _back(call, leaves, _evaluate(call, leaves), call.relevance)


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
    leaves = {n: _leaf(call.values[n]) for n in _float_signals(call)}
    return _back(call, leaves, _evaluate(call, leaves), call.relevance)


def _linear(call: Call) -> Sequence[Contribution]:
    """An affine function: in proportion to the products, the constant part absorbs (epsilon rule)."""
    leaves = {n: _leaf(call.values[n]) for n in _float_signals(call)}
    out = _evaluate(call, leaves)
    if isinstance(out, (tuple, list)):
        pairs = zip(out, call.relevance, strict=True)
        share: Any = [None if r is None else _ratio(r, o.detach(), call) for o, r in pairs]
    else:
        share = _ratio(call.relevance, out.detach(), call)
    back = _back(call, leaves, out, share)
    return [(n, None if g is None else attention.scaled(call.values[n], g)) for n, g in back]


def _ratio(relevance: Tensor, out: Tensor, call: Call) -> Tensor:
    return torch.div(relevance, stabilised_(out.clone(), call.composite.epsilon))


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
    parts = [call.values[n] if isinstance(n, fx.Node) else n for n in (a, b)]
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


def receivers(node: fx.Node, known: Canonical, composite: Composite) -> list[fx.Node]:
    """The signals a node may hand relevance to: not a denominator, a normaliser, a detached gate or a choice."""
    inputs = [n for n in signals(node, known) if _carries_numbers(n)]
    name = operation(node)
    if name == "mul" and len(inputs) > 1:
        inputs = [n for n in inputs if not is_normaliser(n, known)] or inputs
        if composite.gate == "signal" and len(inputs) > 1:
            inputs = [n for n in inputs if not is_gate(n, known)] or inputs
    if name in ("div", "copy"):
        inputs = [n for n in inputs if n is node.args[name == "copy"]]
    return inputs


def _carries_numbers(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return not isinstance(value, Tensor) or value.is_floating_point()


def _multiply(call: Call) -> Sequence[Contribution]:
    """Half to each of two signals; all to the one where the other is a constant, a normaliser or a detached gate."""
    kept = receivers(call.node, call.known, call.composite)
    if len(kept) == 1 and call.node.args[0] is not call.node.args[1]:
        return [(kept[0], call.relevance.sum_to_size(call.values[kept[0]].shape))]
    half = call.relevance * (1 / len(kept))
    return [(n, half.sum_to_size(call.values[n].shape)) for n in kept]


def _copy(call: Call) -> Sequence[Contribution]:
    """The second tensor in the shape and place of the first, whose values are lost."""
    source = call.node.args[1]
    assert isinstance(source, fx.Node)
    return [(source, call.relevance.sum_to_size(call.values[source].shape))] if source in call.known.data else []


def _divide(call: Call) -> Sequence[Contribution]:
    """The denominator only scales: it takes no relevance."""
    kept = receivers(call.node, call.known, call.composite)
    return [(n, call.relevance.sum_to_size(call.values[n].shape)) for n in kept]


_NORMALISERS = ("rsqrt", "reciprocal", "linalg_vector_norm", "norm", "std", "var", "frobenius_norm")
_GATES = ("sigmoid", "hardsigmoid", "softmax", "tanh")


def is_normaliser(node: fx.Node, known: Canonical) -> bool:
    return _comes_from(node, known, _NORMALISERS)


def is_gate(node: fx.Node, known: Canonical) -> bool:
    return _comes_from(node, known, _GATES)


def _comes_from(node: fx.Node, known: Canonical, names: Sequence[str]) -> bool:
    """Goes back along the one signal (a quotient's numerator) through element-wise operations and moves."""
    while node.op == "call_function":
        name = operation(node)
        if name in names:
            return True
        inputs = signals(node, known)
        simple = name in _MOVES or name == "getitem" or torch.Tag.pointwise in getattr(node.target, "tags", ())
        if not simple or not inputs or (len(inputs) > 1 and name != "div"):
            return False
        node = inputs[0]
    return False


def _batch_norm(call: Call) -> Sequence[Contribution]:
    (source,) = signals(call.node, call.known)
    if call.node in call.known.merged or call.composite.normalisation == "pass":
        return [(source, call.relevance)]
    x = call.values[source]
    shape = (1, -1) + (1,) * (x.dim() - 2)
    scale, shift = (t.reshape(shape) for t in affine(call.node, call.known.constants))
    part = x * scale
    return [(source, part.mul_(_ratio(call.relevance, part + shift, call)))]


def _normalise(call: Call) -> Sequence[Contribution]:
    """Standard deviation held constant, mean and affine part as a linear layer (epsilon rule)."""
    source = signals(call.node, call.known)[0]
    if call.composite.normalisation == "pass":
        return [(source, call.relevance)]
    x = call.values[source]
    centred, deviation, weight, bias, axes = _statistics(call, x)
    gain = deviation if weight is None else deviation * weight
    out = centred * gain
    out = out if bias is None else out + bias
    share = torch.div(call.relevance.reshape(out.shape), stabilised_(out, call.composite.epsilon)).mul_(gain)
    if operation(call.node) != "rms_norm":
        share = share - share.mean(axes, keepdim=True)
    return [(source, share.reshape(x.shape).mul_(x))]


def _statistics(call: Call, x: Tensor) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, tuple[int, ...]]:
    """Centred input, 1 / deviation, weight and bias in the shape the norm works in, and the axes it is over."""
    names = [argument.name for argument in call.node.target._schema.arguments]  # type: ignore[union-attr]
    given = {**dict(zip(names, call.node.args, strict=False)), **call.node.kwargs}
    nodes = (given.get(key) for key in ("weight", "bias"))
    weight, bias = (call.values.get(n) if isinstance(n, fx.Node) else None for n in nodes)
    eps: Any = given.get("eps", 1e-5)
    eps = torch.finfo(x.dtype).eps if eps is None else eps
    if operation(call.node) in ("layer_norm", "rms_norm"):
        axes = tuple(range(-len(given["normalized_shape"]), 0))  # type: ignore[arg-type]
    else:
        groups = given.get("num_groups", x.shape[1])
        x = x.reshape(x.shape[0], groups, -1, *x.shape[2:])  # type: ignore[arg-type]
        weight, bias = (
            None if t is None else t.reshape(1, groups, -1, *[1] * (x.dim() - 3))  # type: ignore[arg-type]
            for t in (weight, bias)
        )
        axes = tuple(range(2, x.dim()))
    centred = x if operation(call.node) == "rms_norm" else x - x.mean(axes, keepdim=True)
    return centred, torch.rsqrt(centred.square().mean(axes, keepdim=True) + eps), weight, bias, axes


def _softmax(call: Call) -> Sequence[Contribution]:
    (source,) = signals(call.node, call.known)
    dim: Any = call.node.args[1]
    x, p = call.values[source], call.values[call.node]
    return [(source, attention.softmax(x, p, call.relevance, dim, call.composite.softmax))]


def _product(call: Call) -> Sequence[Contribution]:
    a, b = signals(call.node, call.known)[:2]

    def function(first: Tensor, second: Tensor) -> Tensor:
        result: Tensor = _evaluate(call, {a: first, b: second})
        return result

    given = attention.product(function, call.values[a], call.values[b], call.relevance, call.composite.epsilon)
    return list(zip((a, b), given, strict=True))


def _matrix_product(call: Call) -> Sequence[Contribution]:
    a, b = signals(call.node, call.known)
    first, second = call.values[a], call.values[b]
    if call.composite.softmax == "cp" and (comes_from_softmax(a, call.known) or comes_from_softmax(b, call.known)):
        return _constant_attention(call, a, b)
    if first.shape[:-2] != second.shape[:-2]:
        return _product(call)
    epsilon = attention.SCORE_EPSILON if _feeds_softmax(call.node) else call.composite.epsilon
    given = attention.matrix_product(first, second, call.relevance, epsilon, call.values[call.node])
    return list(zip((a, b), given, strict=True))


def _feeds_softmax(node: fx.Node) -> bool:
    """True where a product becomes attention scores, with or without scale, mask and bias on the way."""
    while len(node.users) == 1:
        node = next(iter(node.users))
        if operation(node) in ("softmax", "_softmax"):
            return True
        if operation(node) not in (*_MOVES, "mul", "div", "add", "reshape"):
            return False
    return False


def _constant_attention(call: Call, a: fx.Node, b: fx.Node) -> Sequence[Contribution]:
    """CP-LRP: the factor that is a softmax takes no relevance, the other all."""
    other = b if comes_from_softmax(a, call.known) else a
    leaf = _leaf(call.values[other])
    out = _evaluate(call, {other: leaf})
    back = _back(call, {other: leaf}, out, _ratio(call.relevance, out.detach(), call))
    return [(n, None if g is None else g * call.values[n]) for n, g in back]


def comes_from_softmax(node: fx.Node, known: Canonical) -> bool:
    return _comes_from(node, known, ("softmax", "_softmax"))


def _attention(call: Call) -> Sequence[Contribution]:
    names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
    given = {**dict(zip(names, call.node.args, strict=False)), **call.node.kwargs}
    nodes: list[Any] = [given.pop(name) for name in names[:3]]
    options = {name: call.values[v] if isinstance(v, fx.Node) else v for name, v in given.items() if v is not None}
    options.pop("dropout_p", None)
    tensors = tuple(call.values[n] for n in nodes)
    epsilon = call.composite.epsilon
    results: tuple[Tensor | None, ...]
    if call.composite.softmax == "attnlrp":
        results = attention.attention_fused(tensors, call.relevance, call.values[call.node], options, epsilon)  # type: ignore[arg-type]
    else:
        rule = call.composite.softmax
        results = attention.attention_written_out(tensors, call.relevance, options, rule, epsilon)  # type: ignore[arg-type]
    return [(n, r) for n, r in zip(nodes, results, strict=True) if n in call.known.data]


def _gated(call: Call) -> Sequence[Contribution]:
    """GLU: half to the signal, half to the gate."""
    (source,) = signals(call.node, call.known)
    dim: Any = call.node.args[1] if len(call.node.args) > 1 else -1
    half = call.relevance * 0.5
    gate = torch.zeros_like(half) if call.composite.gate == "signal" else half
    signal = call.relevance if call.composite.gate == "signal" else half
    return [(source, torch.cat([signal, gate], dim))]


_MOVES = (
    "permute transpose unsqueeze squeeze expand select slice roll pad constant_pad_nd flip stack split chunk unbind "
    "split_with_sizes tensor_split repeat repeat_interleave unfold im2col pixel_shuffle pixel_unshuffle channel_shuffle "
    "movedim t narrow clone to _to_copy contiguous alias detach reflection_pad1d reflection_pad2d replication_pad2d "
    "diagonal tile unflatten rot90 swapaxes narrow_copy broadcast_to expand_as type_as lift_fresh_copy slice_scatter "
    "select_scatter"
).split()
_AVERAGES = (
    "avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d _adaptive_avg_pool2d "
    "mean sum upsample_nearest2d upsample_bilinear2d upsample_bicubic2d cumsum addmm baddbmm addcmul lerp "
    "linalg_vector_norm std col2im grid_sampler conv_transpose1d conv_transpose2d conv_transpose3d convolution dot mv"
).split()
_WINNERS = (
    "max_pool1d max_pool2d max_pool3d adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d amax amin max min "
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
    **{name: OperationRule("shapes", _move) for name in _MOVES},
    **{name: OperationRule("inputs", _linear) for name in _AVERAGES},
    **{name: OperationRule("inputs", _winner) for name in _WINNERS},
    **{name: OperationRule("inputs", _normalise) for name in _NORMS},
    **dict.fromkeys(_ACTIVATIONS, _ACTIVATION),
    **dict.fromkeys(_PASSED_ON, _PASSED),
    **{name: OperationRule("inputs", _sum) for name in ("add", "sub", "rsub")},
    **{name: OperationRule("shapes", _reshape) for name in ("reshape", "view", "flatten", "_unsafe_view")},
    "cat": OperationRule("shapes", _cat),
    "mul": OperationRule("shapes", _multiply),
    "div": OperationRule("shapes", _divide),
    "copy": OperationRule("shapes", _copy),
    "batch_norm": OperationRule("inputs", _batch_norm),
    "softmax": OperationRule("both", _softmax),
    "_softmax": OperationRule("both", _softmax),
    "scaled_dot_product_attention": OperationRule("both", _attention),
    "glu": OperationRule("shapes", _gated),
}
