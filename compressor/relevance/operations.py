"""LRP of every operation that is no weighted layer: operation -> how its relevance goes to what it read.

Each rule takes a `Call` (a node, its relevance, the values kept from the forward pass) and returns relevance
per input. What has no entry has no rule: `rule_of` returns None and the caller names it.
Sources: Bach et al. 2015 (epsilon), Achtibat et al. 2024 (AttnLRP: products, normalisation, activations).
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, fx

from ..graph.operators import arguments
from . import attention
from .canonical import Canonical, affine, operation
from .normalisation import norm_of, through_norm
from .products import attend, gated, matrix_product, product, softmax, to_receivers
from .rules import stabilised_
from .spreading import (
    MOVES,
    Call,
    Contribution,
    OperationRule,
    Output,
    Relevance,
    Value,
    back,
    evaluate,
    is_complex,
    leaf_of,
    number_named,
    numbers,
    ratio,
    signals,
)


def rule_of(node: fx.Node, canon: Canonical) -> OperationRule | None:
    """The rule of an operation, or None where there is none."""
    if node.target is operator.getitem:
        return OperationRule("shapes", _item)
    name = operation(node)
    inputs = signals(node, canon)
    if any(map(is_complex, (node, *inputs))):
        return OperationRule("inputs", by_taylor)
    if name in _RULES:
        return _RULES[name]

    if name in (*_MATRIX_PRODUCTS, *_BILINEAR):
        return _product_rule(name, len(inputs))
    is_pointwise = torch.Tag.pointwise in getattr(node.target, "tags", ())
    return _ACTIVATION if is_pointwise and len(inputs) == 1 else None


def _product_rule(name: str, signal_count: int) -> OperationRule:
    """Of a product of two signals where both factors come from the image; else it is linear in the one that does."""
    if signal_count < 2:
        return OperationRule("inputs", _linear)
    if name in _MATRIX_PRODUCTS:
        return OperationRule("both", matrix_product)
    return OperationRule("inputs", product)


def by_taylor(call: Call) -> Sequence[Contribution]:
    """First-order expansion at zero: input x gradient, in proportion to the output. For what has no rule of its own."""
    with torch.backends.cudnn.flags(enabled=False):  # its recurrent layers have a gradient in training only
        return _linear(call)


def _item(call: Call) -> Sequence[Contribution]:
    """What one of several outputs was handed, as relevance of the node with all of them.

    Output 1 of 3 gives [None, relevance, None].
    """
    (source,) = call.node.all_input_nodes
    index = call.node.args[1]
    assert isinstance(index, int)
    outputs = call.values[source]  # several tensors, or the `Spec`s of those that were not kept
    assert isinstance(outputs, Sequence)
    of_each_output: list[Tensor | None] = [None] * len(outputs)
    of_each_output[index] = call.relevance
    return [(source, of_each_output)]


def _same_way_back(call: Call) -> Sequence[Contribution]:
    """Values change place, or some of them win (maximum, selection by a mask): relevance goes where they came from."""
    leaves = _leaves_of(call)
    if not leaves:  # a mask or an index, cast to numbers
        return []
    return back(call, leaves, evaluate(call, leaves), call.arriving)


def _leaves_of(call: Call) -> dict[fx.Node, Tensor]:
    """The signals that hold numbers, ready to be differentiated by."""
    return {source: leaf_of(call.spec(source)) for source in numbers(call)}


def _reshape(call: Call) -> Sequence[Contribution]:
    (source,) = signals(call.node, call.canon)
    return [(source, call.relevance.reshape(call.shape(source)))]


def _cat(call: Call) -> Sequence[Contribution]:
    dim = number_named(call.node, "dim")
    sources: Sequence[fx.Node] = arguments(call.node)["tensors"]
    widths = [call.shape(source)[dim] for source in sources]
    pieces = torch.split(call.relevance, widths, dim)
    # a constant piece (a class token) keeps its relevance
    return [(source, piece) for source, piece in zip(sources, pieces, strict=True) if source in call.canon.data]


_POOL_SETTINGS = ("kernel_size", "stride", "padding", "dilation", "ceil_mode")


def _pool_with_places(x: Tensor, *settings: object, **by_name: object) -> tuple[Tensor, Tensor]:
    """Max pooling once: on the way back the places of the maxima are enough."""
    out, places = torch.ops.aten.max_pool2d_with_indices.default(x, *settings, **by_name)
    return out, places


def _max_pool(call: Call) -> Sequence[Contribution]:
    (source,) = signals(call.node, call.canon)
    spec = call.spec(source)
    like = torch.empty(spec.shape, dtype=spec.dtype, device=spec.device)  # read for its shape only
    settings = arguments(call.node)
    geometry = [settings[name] for name in _POOL_SETTINGS]
    pool_back = torch.ops.aten.max_pool2d_with_indices_backward.default
    return [(source, pool_back(call.relevance, like, *geometry, call.saved))]


def _linear(call: Call) -> Sequence[Contribution]:
    """An affine function: in proportion to the products, the constant part absorbs (epsilon rule)."""
    leaves = _leaves_of(call)
    output = evaluate(call, leaves)
    contributions: list[Contribution] = []
    for source, gradient in back(call, leaves, output, _share(call, output)):
        relevance = _input_times(call.tensor(source), gradient) if isinstance(gradient, Tensor) else None
        contributions.append((source, relevance))
    return contributions


def _share(call: Call, output: Output) -> Relevance:
    """Relevance over output; of each output, None where nobody read it."""
    if isinstance(output, Tensor):
        return ratio(call.relevance, output.detach(), call)
    shares: list[Tensor | None] = []
    for tensor, arriving in zip(output, call.arriving, strict=True):
        shares.append(None if arriving is None else ratio(arriving, tensor.detach(), call))
    return shares


def _input_times(value: Tensor, gradient: Tensor) -> Tensor:
    """Real also where the value is complex: what its real and its imaginary part contribute."""
    if value.is_complex():
        return (value * gradient.conj()).real
    return attention.scaled(value, gradient)


def _activation(call: Call) -> Sequence[Contribution]:
    """Passed on unchanged (the identity rule); summed where the input was broadcast."""
    (source,) = signals(call.node, call.canon)
    return [(source, call.relevance.sum_to_size(call.shape(source)))]


def _activation_by_choice(call: Call) -> Sequence[Contribution]:
    return _activation(call) if call.composite.activation == "pass" else _linear(call)


def _sum(call: Call) -> Sequence[Contribution]:
    """Each summand in proportion to its part (epsilon rule); a constant summand absorbs like a bias."""
    summands = call.node.args[:2]
    a, b = (_operand(call, summand) for summand in summands)
    factors = _factors(call.node)
    total = torch.as_tensor(a * factors[0] + b * factors[1])  # type: ignore[operator]  # one is a tensor
    share = torch.div(call.relevance, stabilised_(total, call.composite.epsilon), out=total)

    contributions: list[Contribution] = []
    for summand, factor in zip(summands, factors, strict=True):
        if isinstance(summand, fx.Node) and summand in call.canon.data:
            contributions.append((summand, _summand_relevance(call, call.tensor(summand), share, factor)))
    return contributions


def _operand(call: Call, summand: fx.node.Argument) -> fx.node.Argument | Value:
    """What a sum adds: a node's value, or a number that the graph holds."""
    return call.values[summand] if isinstance(summand, fx.Node) else summand


def _factors(node: fx.Node) -> tuple[float, float]:
    """What a sum multiplies its two operands by: a + alpha b, a - alpha b, b - alpha a."""
    alpha = node.kwargs.get("alpha", 1)
    assert isinstance(alpha, (int, float))
    return {"add": (1, alpha), "sub": (1, -alpha), "rsub": (-alpha, 1)}[operation(node)]


def _summand_relevance(call: Call, value: Tensor, share: Tensor, factor: float) -> Tensor:
    relevance = attention.scaled(value, share) if _may_be_infinite(call) else value * share
    if factor != 1:
        relevance = relevance * factor
    return relevance.sum_to_size(value.shape)  # [1, C, 1, 1] takes the sum over all places it was broadcast to


def _may_be_infinite(call: Call) -> bool:
    """Sums that feed a softmax may hold a mask of -inf."""
    towards_softmax = any(operation(user) in _MASKED_SUMS_FEED for user in call.node.users)
    return towards_softmax and any(source in call.canon.constants for source in call.node.all_input_nodes)


def _batch_norm(call: Call) -> Sequence[Contribution]:
    (source,) = signals(call.node, call.canon)
    if call.node in call.canon.merged or call.composite.normalisation == "pass":
        return [(source, call.relevance)]
    x = call.tensor(source)
    shape = (1, -1) + (1,) * (x.dim() - 2)  # [C] -> [1, C, 1, 1]
    scale, shift = (per_channel.reshape(shape) for per_channel in affine(call.node, call.canon.constants))
    scaled_x = x * scale
    share = ratio(call.relevance, scaled_x + shift, call)
    return [(source, scaled_x.mul_(share))]


def _normalise(call: Call) -> Sequence[Contribution]:
    source = signals(call.node, call.canon)[0]
    if call.composite.normalisation == "pass":
        return [(source, call.relevance)]
    x = call.tensor(source)
    norm = norm_of(call.node, x, call.canon.constants)
    return [(source, through_norm(norm, x, call.relevance, call.composite.epsilon))]


# affine in what they read
_AVERAGES = (
    "avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d _adaptive_avg_pool2d "
    "mean sum upsample_nearest2d upsample_bilinear2d upsample_bicubic2d cumsum addmm baddbmm addcmul lerp "
    "linalg_vector_norm std col2im grid_sampler affine_grid_generator conv_transpose1d conv_transpose2d "
    "conv_transpose3d convolution dot mv"
).split()
# each value of the output is one of those read
_WINNERS = (
    "max_pool1d max_pool3d adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d amax amin max min "
    "maximum minimum max_pool2d_with_indices topk sort where masked_fill index gather index_select scatter index_put "
    "take_along_dim"
).split()
_ACTIVATIONS = (
    "relu relu6 hardtanh gelu silu mish hardswish hardsigmoid sigmoid tanh elu celu selu leaky_relu softplus softsign "
    "log_sigmoid log_sigmoid_forward hardshrink softshrink threshold clamp clamp_min clamp_max exp log sqrt pow"
).split()
# passed whatever the composite says of activations
_PASSED_ON = "prelu dropout native_dropout rrelu alpha_dropout feature_dropout log_softmax _log_softmax".split()
_SUMS = ("add", "sub", "rsub")
_RESHAPES = ("reshape", "view", "flatten", "_unsafe_view")
_NORMS = "layer_norm group_norm instance_norm rms_norm".split()
_MATRIX_PRODUCTS = ("matmul", "bmm", "mm")
_BILINEAR = "linear conv1d conv2d conv3d einsum bilinear".split()
# a masked score may pass another sum (a second mask) or a reshape on its way to the softmax
_MASKED_SUMS_FEED = ("softmax", "_softmax", "add", "reshape")

_ACTIVATION = OperationRule("unless passed", _activation_by_choice)
_PASSED = OperationRule("shapes", _activation)

_RULES: Mapping[str, OperationRule] = {
    **dict.fromkeys(MOVES, OperationRule("shapes", _same_way_back)),
    **dict.fromkeys(_AVERAGES, OperationRule("inputs", _linear)),
    **dict.fromkeys(_WINNERS, OperationRule("inputs", _same_way_back)),
    **dict.fromkeys(_NORMS, OperationRule("inputs", _normalise)),
    **dict.fromkeys(_ACTIVATIONS, _ACTIVATION),
    **dict.fromkeys(_PASSED_ON, _PASSED),
    **dict.fromkeys(_SUMS, OperationRule("inputs", _sum)),
    **dict.fromkeys(_RESHAPES, OperationRule("shapes", _reshape)),
    "cat": OperationRule("shapes", _cat),
    **dict.fromkeys(("mul", "div", "copy"), OperationRule("shapes", to_receivers)),
    "max_pool2d": OperationRule("shapes", _max_pool, _pool_with_places),
    "batch_norm": OperationRule("inputs", _batch_norm),
    "softmax": OperationRule("both", softmax),
    "_softmax": OperationRule("both", softmax),
    "scaled_dot_product_attention": OperationRule("both", attend),
    "glu": OperationRule("shapes", gated),
}
COVERED = frozenset((*_RULES, *_MATRIX_PRODUCTS, *_BILINEAR))
"""Names of the operations that have a rule of their own; convolutions and linear layers have their composite's."""
