"""LRP where two signals of the image meet in a product: gates, quotients, matrix products, attention, softmax.

Which factor takes relevance is found from what computes it (a normaliser, a gate, a softmax), not from names.
Source: Achtibat et al. 2024 (uniform rule for products, attention), Ali et al. 2022 (CP-LRP).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from . import attention
from .canonical import Canonical, operation
from .composite import Composite
from .spreading import MOVES, Call, Contribution, back, carries_numbers, evaluate, leaf_of, ratio, signals


def receivers(node: fx.Node, canon: Canonical, composite: Composite) -> list[fx.Node]:
    """The signals a node may hand relevance to: not a denominator, a normaliser, a detached gate or a choice."""
    inputs = [source for source in signals(node, canon) if carries_numbers(source)]
    name = operation(node)
    if name == "mul" and len(inputs) > 1:
        # two normalisers, or two gates, share like any two signals: somebody has to take the relevance
        inputs = [source for source in inputs if not is_normaliser(source, canon)] or inputs
        if composite.gate == "signal" and len(inputs) > 1:
            inputs = [source for source in inputs if not is_gate(source, canon)] or inputs
    if name == "div":
        inputs = [source for source in inputs if source is node.args[0]]
    if name == "copy":
        inputs = [source for source in inputs if source is node.args[1]]
    return inputs


def multiply(call: Call) -> Sequence[Contribution]:
    """Half to each of two signals; all to the one where the other is a constant, a normaliser or a detached gate."""
    receiving = receivers(call.node, call.canon, call.composite)
    share = call.relevance if len(receiving) == 1 else call.relevance / len(receiving)
    return [(source, share.sum_to_size(call.values[source].shape)) for source in receiving]


def copy(call: Call) -> Sequence[Contribution]:
    """The second tensor in the shape and place of the first, whose values are lost."""
    source = call.node.args[1]
    assert isinstance(source, fx.Node)
    if source not in call.canon.data:
        return []
    return [(source, call.relevance.sum_to_size(call.values[source].shape))]


def divide(call: Call) -> Sequence[Contribution]:
    """The denominator only scales: it takes no relevance."""
    receiving = receivers(call.node, call.canon, call.composite)
    return [(source, call.relevance.sum_to_size(call.values[source].shape)) for source in receiving]


_NORMALISERS = ("rsqrt", "reciprocal", "linalg_vector_norm", "norm", "std", "var", "frobenius_norm")
_GATES = ("sigmoid", "hardsigmoid", "softmax", "tanh")


def is_normaliser(node: fx.Node, canon: Canonical) -> bool:
    """True where a factor is one over a norm or a deviation, however it was reshaped since."""
    return _comes_from(node, canon, _NORMALISERS)


def is_gate(node: fx.Node, canon: Canonical) -> bool:
    """True where a factor is the output of a sigmoid, softmax or tanh."""
    return _comes_from(node, canon, _GATES)


def _comes_from(node: fx.Node, canon: Canonical, names: Sequence[str]) -> bool:
    """Goes back along the one signal (a quotient's numerator) through element-wise operations and moves."""
    while node.op == "call_function":
        name = operation(node)
        if name in names:
            return True
        inputs = signals(node, canon)
        if not inputs or not _passes_one_signal(node):
            return False
        if len(inputs) > 1 and name != "div":
            return False
        node = inputs[0]
    return False


def _passes_one_signal(node: fx.Node) -> bool:
    name = operation(node)
    return name in MOVES or name == "getitem" or torch.Tag.pointwise in getattr(node.target, "tags", ())


def softmax(call: Call) -> Sequence[Contribution]:
    """By the composite's softmax rule; None to the scores where it sends none."""
    (source,) = signals(call.node, call.canon)
    dim: Any = call.node.args[1]
    x, probabilities = call.values[source], call.values[call.node]
    return [(source, attention.softmax(x, probabilities, call.relevance, dim, call.composite.softmax))]


def product(call: Call) -> Sequence[Contribution]:
    """Half to each factor of a bilinear operation, in proportion to the products."""
    a, b = signals(call.node, call.canon)[:2]

    def function(value_a: Tensor, value_b: Tensor) -> Tensor:
        out: Tensor = evaluate(call, {a: value_a, b: value_b})
        return out

    shares = attention.product(function, call.values[a], call.values[b], call.relevance, call.composite.epsilon)
    return list(zip((a, b), shares, strict=True))


def matrix_product(call: Call) -> Sequence[Contribution]:
    """As `product`; under CP-LRP all to the factor that is no softmax, where the other is one."""
    a, b = signals(call.node, call.canon)
    value_a, value_b = call.values[a], call.values[b]
    if call.composite.softmax == "cp" and (comes_from_softmax(a, call.canon) or comes_from_softmax(b, call.canon)):
        return _constant_attention(call, a, b)
    if value_a.shape[:-2] != value_b.shape[:-2]:  # one of them is broadcast: autograd sums what belongs together
        return product(call)
    epsilon = attention.SCORE_EPSILON if _feeds_softmax(call.node) else call.composite.epsilon
    shares = attention.matrix_product(value_a, value_b, call.relevance, epsilon, call.values[call.node])
    return list(zip((a, b), shares, strict=True))


def _feeds_softmax(node: fx.Node) -> bool:
    """True where a product becomes attention scores, with or without scale, mask and bias on the way."""
    while len(node.users) == 1:
        node = next(iter(node.users))
        if operation(node) in ("softmax", "_softmax"):
            return True
        if operation(node) not in (*MOVES, "mul", "div", "add", "reshape"):
            return False
    return False


def _constant_attention(call: Call, a: fx.Node, b: fx.Node) -> Sequence[Contribution]:
    """CP-LRP: the factor that is a softmax takes no relevance, the other all."""
    signal = b if comes_from_softmax(a, call.canon) else a
    leaf = leaf_of(call.values[signal])
    out = evaluate(call, {signal: leaf})
    _, gradient = back(call, {signal: leaf}, out, ratio(call.relevance, out.detach(), call))[0]
    return [(signal, None if gradient is None else gradient * call.values[signal])]


def comes_from_softmax(node: fx.Node, canon: Canonical) -> bool:
    """True where a factor is an attention matrix, however it was moved or scaled since."""
    return _comes_from(node, canon, ("softmax", "_softmax"))


def attend(call: Call) -> Sequence[Contribution]:
    """Fused attention: AttnLRP by its gradient kernel, any other softmax rule written out."""
    names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
    arguments = {**dict(zip(names, call.node.args, strict=False)), **call.node.kwargs}
    nodes: list[Any] = [arguments.pop(name) for name in ("query", "key", "value")]
    arguments.pop("dropout_p", None)  # none in evaluation

    options: dict[str, Any] = {}
    for name, argument in arguments.items():
        if argument is not None:
            options[name] = call.values[argument] if isinstance(argument, fx.Node) else argument

    query_key_value = tuple(call.values[source] for source in nodes)
    epsilon = call.composite.epsilon
    shares: tuple[Tensor | None, ...]
    if call.composite.softmax == "attnlrp":
        shares = attention.attention_fused(query_key_value, call.relevance, call.values[call.node], options, epsilon)
    else:
        rule = call.composite.softmax
        shares = attention.attention_written_out(query_key_value, call.relevance, options, rule, epsilon)
    return [(source, share) for source, share in zip(nodes, shares, strict=True) if source in call.canon.data]


def gated(call: Call) -> Sequence[Contribution]:
    """GLU: half to the signal, half to the gate; all to the signal where the composite detaches gates."""
    (source,) = signals(call.node, call.canon)
    dim: Any = call.node.args[1] if len(call.node.args) > 1 else -1
    half = call.relevance * 0.5
    if call.composite.gate == "signal":
        to_signal, to_gate = call.relevance, torch.zeros_like(half)
    else:
        to_signal, to_gate = half, half
    return [(source, torch.cat([to_signal, to_gate], dim))]  # the input is [signal, gate] along dim
