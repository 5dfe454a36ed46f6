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


def receivers(node: fx.Node, known: Canonical, composite: Composite) -> list[fx.Node]:
    """The signals a node may hand relevance to: not a denominator, a normaliser, a detached gate or a choice."""
    inputs = [n for n in signals(node, known) if carries_numbers(n)]
    name = operation(node)
    if name == "mul" and len(inputs) > 1:
        inputs = [n for n in inputs if not is_normaliser(n, known)] or inputs
        if composite.gate == "signal" and len(inputs) > 1:
            inputs = [n for n in inputs if not is_gate(n, known)] or inputs
    if name in ("div", "copy"):
        inputs = [n for n in inputs if n is node.args[name == "copy"]]
    return inputs


def multiply(call: Call) -> Sequence[Contribution]:
    """Half to each of two signals; all to the one where the other is a constant, a normaliser or a detached gate."""
    kept = receivers(call.node, call.known, call.composite)
    part = call.relevance if len(kept) == 1 else call.relevance / len(kept)
    return [(n, part.sum_to_size(call.values[n].shape)) for n in kept]


def copy(call: Call) -> Sequence[Contribution]:
    """The second tensor in the shape and place of the first, whose values are lost."""
    source = call.node.args[1]
    assert isinstance(source, fx.Node)
    return [(source, call.relevance.sum_to_size(call.values[source].shape))] if source in call.known.data else []


def divide(call: Call) -> Sequence[Contribution]:
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
        simple = name in MOVES or name == "getitem" or torch.Tag.pointwise in getattr(node.target, "tags", ())
        if not simple or not inputs or (len(inputs) > 1 and name != "div"):
            return False
        node = inputs[0]
    return False


def softmax(call: Call) -> Sequence[Contribution]:
    (source,) = signals(call.node, call.known)
    dim: Any = call.node.args[1]
    x, p = call.values[source], call.values[call.node]
    return [(source, attention.softmax(x, p, call.relevance, dim, call.composite.softmax))]


def product(call: Call) -> Sequence[Contribution]:
    a, b = signals(call.node, call.known)[:2]

    def function(first: Tensor, second: Tensor) -> Tensor:
        result: Tensor = evaluate(call, {a: first, b: second})
        return result

    given = attention.product(function, call.values[a], call.values[b], call.relevance, call.composite.epsilon)
    return list(zip((a, b), given, strict=True))


def matrix_product(call: Call) -> Sequence[Contribution]:
    a, b = signals(call.node, call.known)
    first, second = call.values[a], call.values[b]
    if call.composite.softmax == "cp" and (comes_from_softmax(a, call.known) or comes_from_softmax(b, call.known)):
        return _constant_attention(call, a, b)
    if first.shape[:-2] != second.shape[:-2]:
        return product(call)
    epsilon = attention.SCORE_EPSILON if _feeds_softmax(call.node) else call.composite.epsilon
    given = attention.matrix_product(first, second, call.relevance, epsilon, call.values[call.node])
    return list(zip((a, b), given, strict=True))


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
    other = b if comes_from_softmax(a, call.known) else a
    leaf = leaf_of(call.values[other])
    out = evaluate(call, {other: leaf})
    grads = back(call, {other: leaf}, out, ratio(call.relevance, out.detach(), call))
    return [(n, None if g is None else g * call.values[n]) for n, g in grads]


def comes_from_softmax(node: fx.Node, known: Canonical) -> bool:
    return _comes_from(node, known, ("softmax", "_softmax"))


def attend(call: Call) -> Sequence[Contribution]:
    names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
    given = {**dict(zip(names, call.node.args, strict=False)), **call.node.kwargs}
    nodes: list[Any] = [given.pop(name) for name in names[:3]]
    options = {name: call.values[v] if isinstance(v, fx.Node) else v for name, v in given.items() if v is not None}
    options.pop("dropout_p", None)
    tensors = tuple(call.values[n] for n in nodes)
    epsilon = call.composite.epsilon
    results: tuple[Tensor | None, ...]
    if call.composite.softmax == "attnlrp":
        results = attention.attention_fused(tensors, call.relevance, call.values[call.node], options, epsilon)
    else:
        rule = call.composite.softmax
        results = attention.attention_written_out(tensors, call.relevance, options, rule, epsilon)
    return [(n, r) for n, r in zip(nodes, results, strict=True) if n in call.known.data]


def gated(call: Call) -> Sequence[Contribution]:
    """GLU: half to the signal, half to the gate."""
    (source,) = signals(call.node, call.known)
    dim: Any = call.node.args[1] if len(call.node.args) > 1 else -1
    half = call.relevance * 0.5
    gate = torch.zeros_like(half) if call.composite.gate == "signal" else half
    signal = call.relevance if call.composite.gate == "signal" else half
    return [(source, torch.cat([signal, gate], dim))]
