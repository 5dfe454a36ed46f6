"""LRP where two signals of the image meet in a product: gates, quotients, matrix products, attention, softmax.

Which factor takes relevance is found from what computes it (a normaliser, a gate, a softmax), not from names.
Source: Achtibat et al. 2024 (uniform rule for products, attention), Ali et al. 2022 (CP-LRP).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, fx

from ..graph.operators import arguments
from . import attention
from .attention import AttentionOptions
from .canonical import Canonical, operation
from .composite import Composite
from .spreading import (
    MOVES,
    Call,
    Contribution,
    back,
    carries_numbers,
    evaluate_one,
    leaf_of,
    number_named,
    ratio,
    signals,
)

# of these operations one operand alone takes relevance: a quotient's numerator, what a copy writes
_ONE_RECEIVER = {"div": 0, "copy": 1}
_SOFTMAX = ("softmax", "_softmax")
# what may stand between a product and its softmax: scale, mask and bias, reshapes
_TOWARDS_SOFTMAX = (*MOVES, "mul", "div", "add", "reshape")


def receivers(node: fx.Node, canon: Canonical, composite: Composite) -> list[fx.Node]:
    """The signals a node may hand relevance to: not a denominator, a normaliser, a detached gate or a choice."""
    inputs = list(filter(carries_numbers, signals(node, canon)))
    name = operation(node)
    if name in _ONE_RECEIVER:
        receiver = node.args[_ONE_RECEIVER[name]]
        return [source for source in inputs if source is receiver]
    if name != "mul":
        return inputs

    # normalisers, or gates, among themselves share like any signals: somebody has to take the relevance
    receiving = [source for source in inputs if not is_normaliser(source, canon)] or inputs
    if composite.gate == "half":
        return receiving
    return [source for source in receiving if not is_gate(source, canon)] or receiving


def to_receivers(call: Call) -> Sequence[Contribution]:
    """A product, a quotient, a copy: half to each of two factors, all to the one where only one takes relevance.

    Nothing where that one is a constant. What was broadcast takes the sum over where it went.
    """
    receiving = receivers(call.node, call.canon, call.composite)
    share = call.relevance
    if len(receiving) > 1:
        share = share / len(receiving)
    return [(source, share.sum_to_size(call.shape(source))) for source in receiving]


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
        most_signals = 2 if name == "div" else 1
        if len(inputs) > most_signals or not _passes_one_signal(node):
            return False
        node = inputs[0]
    return False


def _passes_one_signal(node: fx.Node) -> bool:
    name = operation(node)
    return name in MOVES or name == "getitem" or torch.Tag.pointwise in getattr(node.target, "tags", ())


def softmax(call: Call) -> Sequence[Contribution]:
    """By the composite's softmax rule; None to the scores where it sends none."""
    (source,) = signals(call.node, call.canon)
    dim = number_named(call.node, "dim")
    x, probabilities = call.tensor(source), call.tensor(call.node)
    return [(source, attention.softmax(x, probabilities, call.relevance, dim, call.composite.softmax))]


def product(call: Call) -> Sequence[Contribution]:
    """Half to each factor of a bilinear operation, in proportion to the products."""
    a, b = signals(call.node, call.canon)[:2]

    def function(value_a: Tensor, value_b: Tensor) -> Tensor:
        return evaluate_one(call, {a: value_a, b: value_b})

    shares = attention.product(function, call.tensor(a), call.tensor(b), call.relevance, call.composite.epsilon)
    return list(zip((a, b), shares, strict=True))


def matrix_product(call: Call) -> Sequence[Contribution]:
    """As `product`; under CP-LRP all to the factor that is no softmax, where the other is one."""
    a, b = signals(call.node, call.canon)
    if call.composite.softmax == "cp":
        if comes_from_softmax(a, call.canon):
            return _constant_attention(call, b)
        if comes_from_softmax(b, call.canon):
            return _constant_attention(call, a)

    value_a, value_b = call.tensor(a), call.tensor(b)
    if value_a.shape[:-2] != value_b.shape[:-2]:  # one of them is broadcast: autograd sums what belongs together
        return product(call)
    epsilon = attention.SCORE_EPSILON if _feeds_softmax(call.node) else call.composite.epsilon
    shares = attention.matrix_product(value_a, value_b, call.relevance, epsilon, call.tensor(call.node))
    return list(zip((a, b), shares, strict=True))


def _feeds_softmax(node: fx.Node) -> bool:
    """True where a product becomes attention scores, with or without scale, mask and bias on the way."""
    while len(node.users) == 1:
        node = next(iter(node.users))
        if operation(node) in _SOFTMAX:
            return True
        if operation(node) not in _TOWARDS_SOFTMAX:
            return False
    return False


def _constant_attention(call: Call, signal: fx.Node) -> Sequence[Contribution]:
    """CP-LRP: the factor that is a softmax takes no relevance, `signal`, the other one, all."""
    leaf = leaf_of(call.tensor(signal))
    out = evaluate_one(call, {signal: leaf})
    ((_, gradient),) = back(call, {signal: leaf}, out, ratio(call.relevance, out.detach(), call))
    assert isinstance(gradient, Tensor)
    return [(signal, gradient * call.tensor(signal))]


def comes_from_softmax(node: fx.Node, canon: Canonical) -> bool:
    """True where a factor is an attention matrix, however it was moved or scaled since."""
    return _comes_from(node, canon, _SOFTMAX)


def attend(call: Call) -> Sequence[Contribution]:
    """Fused attention: AttnLRP by its gradient kernel, any other softmax rule written out."""
    settings = arguments(call.node)
    nodes: list[fx.Node] = [settings["query"], settings["key"], settings["value"]]
    query, key, value = map(call.tensor, nodes)
    options, epsilon, rule = _attention_options(call), call.composite.epsilon, call.composite.softmax

    shares: tuple[Tensor | None, ...]
    if rule == "attnlrp":
        output = call.tensor(call.node)
        shares = attention.attention_fused((query, key, value), call.relevance, output, options, epsilon)
    else:
        shares = attention.attention_written_out((query, key, value), call.relevance, options, rule, epsilon)
    return [(source, share) for source, share in zip(nodes, shares, strict=True) if source in call.canon.data]


def _attention_options(call: Call) -> AttentionOptions:
    """What the call says beside query, key and value; dropout is none in evaluation."""
    settings = arguments(call.node)
    options: AttentionOptions = {
        "is_causal": bool(settings["is_causal"]),
        "enable_gqa": bool(settings.get("enable_gqa")),  # older releases of torch don't have it
    }
    if settings["attn_mask"] is not None:
        options["attn_mask"] = call.tensor(settings["attn_mask"])
    if settings["scale"] is not None:
        options["scale"] = float(settings["scale"])
    return options


def gated(call: Call) -> Sequence[Contribution]:
    """GLU: half to the signal, half to the gate; all to the signal where the composite detaches gates."""
    (source,) = signals(call.node, call.canon)
    half = call.relevance * 0.5
    to_signal, to_gate = half, half
    if call.composite.gate == "signal":
        to_signal, to_gate = call.relevance, torch.zeros_like(half)
    # the input is [signal, gate] along dim
    return [(source, torch.cat([to_signal, to_gate], number_named(call.node, "dim")))]
