"""What LRP has to know of a traced graph before it runs: merged layers, rules, and what flows from the image.

Convolutions and linear layers are found by operation, merged with the BatchNorm next to them, and given
the composite's rule for their depth. Nothing is listed by name and the graph is not changed.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

import torch
from torch import Tensor, fx

from ..graph import aten
from ..graph.interface import output_nodes
from ..graph.neighbours import only_user, other_operands, shape_of
from ..graph.operators import CONVOLUTIONS, LAYERS, LINEAR, Convolution, arguments
from .composite import Composite, DepthGroup, Rule
from .rules import Layer

# a value that parameters alone decide
Constant: TypeAlias = "Tensor | int | float | Sequence[Constant]"

# never below zero, whatever they read
_NONNEGATIVE = ("relu", "sigmoid", "hardsigmoid", "softmax", "_softmax", "relu6", "abs", "softplus", "exp")
_CLAMPS = ("hardtanh", "clamp", "clamp_min")
_PADDINGS = ("pad", "constant_pad_nd")
# not below zero where all that they read is not: sums and products are among them, differences are not
_KEEPS_SIGN = (
    "max_pool1d max_pool2d max_pool3d avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d "
    "adaptive_avg_pool3d adaptive_max_pool2d mean sum amax reshape permute transpose flatten squeeze unsqueeze slice "
    "select expand cat stack add mul dropout pad roll index repeat channel_shuffle clone split chunk unbind "
    "split_with_sizes getitem flip view contiguous pixel_shuffle pixel_unshuffle constant_pad_nd"
).split()
_PROBABILITIES = ("softmax", "_softmax", "log_softmax", "_log_softmax", "sigmoid")
# these read a tensor's shape and kind, none of its values
_SHAPE_ONLY = ("sym_size", "new_zeros", "new_ones", "new_full", "zeros_like", "ones_like", "full_like", "empty_like")


@dataclass(frozen=True, slots=True)
class Weighted:
    """One convolution or linear layer: where it reads, what it computes once merged, and its rule.

    `nonnegative` promises that nothing it reads is below zero, so that rules need only half the convolutions.
    """

    source: fx.Node
    layer: Layer
    rule: Rule
    group: DepthGroup
    nonnegative: bool


@dataclass(frozen=True, slots=True)
class Canonical:
    """`data`: nodes whose values come from the image, in order. `merged`: BatchNorm nodes that became identities.
    `constants`: values that parameters alone decide. `outputs`: where relevance starts, a node for each output."""

    data: dict[fx.Node, None]
    constants: Mapping[fx.Node, Constant]
    weighted: Mapping[fx.Node, Weighted]
    merged: frozenset[fx.Node]
    outputs: tuple[fx.Node, ...]


def operation(node: fx.Node) -> str:
    """`add` for aten.add.Tensor; `getitem` for Python's own."""
    packet = getattr(node.target, "overloadpacket", None)
    if packet is None:
        return getattr(node.target, "__name__", str(node.target))
    return str(packet).split(".")[-1]


def constant_of(argument: object, constants: Mapping[fx.Node, Constant]) -> Tensor | None:
    """The tensor of an operation's argument that parameters alone decide; None for an argument that is no node."""
    if not isinstance(argument, fx.Node):
        return None
    value = constants[argument]
    assert isinstance(value, Tensor)
    return value


def _weight_of(argument: object, constants: Mapping[fx.Node, Constant]) -> Tensor:
    """As `constant_of`, of an argument that has to be there."""
    weight = constant_of(argument, constants)
    assert weight is not None
    return weight


def canonical(graph: fx.GraphModule, composite: Composite, *, classifies: bool = True) -> Canonical:
    """The graph as LRP reads it, with the composite's rule for each layer; the graph itself stays as it is.

    A network that `classifies` has relevance start at its class scores, before probabilities are made of them.
    """
    data = _from_image(graph)
    constants = _constants(graph)
    layers = _layers(data, constants)
    merged = _merge(layers, data, constants)
    weighted = _with_rules(layers, data, composite)
    outputs = output_nodes(graph)
    if classifies:
        outputs = [_scores(node) for node in outputs]
    return Canonical(data, constants, weighted, frozenset(merged), tuple(outputs))


def _scores(output: fx.Node) -> fx.Node:
    """The node whose value holds the class scores, of which the output makes probabilities."""
    while operation(output) in _PROBABILITIES:
        output = _node(output.args[0])
    return output


def _node(argument: object) -> fx.Node:
    """An operation's argument that can be nothing but another node's value."""
    assert isinstance(argument, fx.Node)
    return argument


def _from_image(graph: fx.GraphModule) -> dict[fx.Node, None]:
    """The nodes whose values come from the image, in the graph's order."""
    data: dict[fx.Node, None] = {}
    for node in graph.graph.nodes:
        if node.op == "placeholder" or _carries_on(node, data):
            data[node] = None
    return data


def _carries_on(node: fx.Node, data: Mapping[fx.Node, None]) -> bool:
    """True where a node computes tensors of the image's values, not of their shapes alone."""
    reads_image = not data.keys().isdisjoint(node.all_input_nodes)
    is_call = node.op == "call_function" and operation(node) not in _SHAPE_ONLY
    return reads_image and is_call and _returns_tensors(node)


def _returns_tensors(node: fx.Node) -> bool:
    """True for one tensor or several, not for a size."""
    return isinstance(node.meta.get("val"), (Tensor, tuple, list))


@torch.no_grad()
def _constants(graph: fx.GraphModule) -> dict[fx.Node, Constant]:
    """Values of what depends neither on the image nor on the batch size."""
    values: dict[fx.Node, Constant] = {}
    for node in graph.graph.nodes:
        if node.op == "get_attr":
            value = operator.attrgetter(node.target)(graph)
            values[node] = value.detach() if isinstance(value, Tensor) else value
            continue
        # what reads the image or the batch size reads a node that has no value here
        computable = values.keys() >= set(node.all_input_nodes)
        if node.op == "call_function" and computable:
            args, kwargs = fx.map_arg((node.args, node.kwargs), values.__getitem__)
            values[node] = node.target(*args, **kwargs)
    return values


def _layers(data: Mapping[fx.Node, None], constants: Mapping[fx.Node, Constant]) -> dict[fx.Node, Layer]:
    layers: dict[fx.Node, Layer] = {}
    for node in data:
        layer = _layer(node, data, constants)
        if layer is not None:
            layers[node] = layer
    return layers


def _layer(node: fx.Node, data: Mapping[fx.Node, None], constants: Mapping[fx.Node, Constant]) -> Layer | None:
    """The layer a node computes, or None where it is none or its weights come from the image."""
    if node.target not in LAYERS:
        return None
    source = _node(node.args[0])
    parameters = other_operands(node, source)
    if source not in data or not constants.keys() >= set(parameters):
        return None
    if node.target is LINEAR:
        settings = arguments(node)
        return Layer(_weight_of(settings["weight"], constants), constant_of(settings["bias"], constants))
    return _convolution(node, constants)


def _convolution(node: fx.Node, constants: Mapping[fx.Node, Constant]) -> Layer:
    convolution = Convolution.of(node)
    weight, bias = _weight_of(convolution.weight, constants), constant_of(convolution.bias, constants)
    assert isinstance(convolution.groups, int)
    # "same" stays a word: how much it is depends on kernel and dilation
    geometry = (convolution.stride, convolution.padding, convolution.dilation, convolution.groups)
    return Layer(weight, bias, CONVOLUTIONS[node.target], *geometry)


def _merge(
    layers: dict[fx.Node, Layer], data: Mapping[fx.Node, None], constants: Mapping[fx.Node, Constant]
) -> dict[fx.Node, None]:
    """Folds each BatchNorm into the layer before it, else into the one after it; returns those folded."""
    merged: dict[fx.Node, None] = {}
    for norm in data:
        if norm.target is not aten.batch_norm.default or arguments(norm)["training"]:
            continue
        before, after = _before(norm, merged), only_user(norm)
        scale, shift = affine(norm, constants)
        if before in layers and _absorbs_behind(layers[before], before, norm):
            layers[before] = _scaled_output(layers[before], scale, shift)
            merged[norm] = None
        elif after in layers and _absorbs_in_front(layers[after], after, norm):
            layers[after] = _scaled_input(layers[after], scale, shift)
            merged[norm] = None
    return merged


def _before(norm: fx.Node, merged: Mapping[fx.Node, None]) -> fx.Node:
    """What a BatchNorm reads, seen through those that are folded into it already."""
    before = _node(norm.args[0])
    while before in merged:
        before = _node(before.args[0])
    return before


def affine(node: fx.Node, constants: Mapping[fx.Node, Constant]) -> tuple[Tensor, Tensor]:
    """A BatchNorm in evaluation mode as scale and shift per channel, both [C].

    scale = weight / sqrt(var + eps), shift = bias - mean * scale (Ioffe and Szegedy 2015, algorithm 2).
    """
    settings = arguments(node)
    mean = _weight_of(settings["running_mean"], constants)
    var = _weight_of(settings["running_var"], constants)
    weight = constant_of(settings["weight"], constants)
    bias = constant_of(settings["bias"], constants)
    scale = torch.rsqrt(var + settings["eps"])
    if weight is not None:
        scale = scale * weight
    shift = -mean * scale
    if bias is not None:
        shift = shift + bias
    return scale, shift


def _alone(before: fx.Node, norm: fx.Node) -> bool:
    """True where every way from `before` leads through `norm`."""
    node = _node(norm.args[0])
    while len(node.users) == 1:
        if node is before:
            return True
        node = _node(node.args[0])
    return False


def _absorbs_behind(layer: Layer, node: fx.Node, norm: fx.Node) -> bool:
    """True where all that a layer computes goes through a norm over the layer's own channels."""
    return _alone(node, norm) and _channels_agree(layer, norm)


def _absorbs_in_front(layer: Layer, node: fx.Node, norm: fx.Node) -> bool:
    """True where a norm's values are what a layer reads, and it reads nothing else.

    Zero padding sees the shift only behind the norm, so a padded layer can't take it in exactly.
    """
    is_padded = isinstance(layer.padding, str) or any(layer.padding)
    return node.args[0] is norm and _channels_agree(layer, norm) and not is_padded


def _channels_agree(layer: Layer, norm: fx.Node) -> bool:
    """A linear layer's features are axis 1, as BatchNorm's channels are, only where the norm's values are [N, F]."""
    return layer.dims > 0 or len(shape_of(norm)) == 2


def _scaled_output(layer: Layer, scale: Tensor, shift: Tensor) -> Layer:
    """The layer with a BatchNorm behind it: scale * (w x + b) + shift."""
    weight = layer.weight * scale.reshape(-1, *[1] * (layer.weight.dim() - 1))  # [out, 1, ...] along the rows
    bias = shift if layer.bias is None else layer.bias * scale + shift
    return replace(layer, weight=weight, bias=bias)


def _scaled_input(layer: Layer, scale: Tensor, shift: Tensor) -> Layer:
    """The layer with a BatchNorm in front of it: w (scale * x + shift) + b.

    Input channel c of group g is channel g * per_group + c of the norm: with 2 groups of 3, group 1 reads 3, 4 and 5.
    """
    out, per_group = layer.weight.shape[:2]
    kernel = layer.weight.shape[2:]
    weight = layer.weight.reshape(layer.groups, out // layer.groups, per_group, *kernel)
    channels = (layer.groups, 1, per_group, *[1] * len(kernel))  # the shape in which the norm's [C] meets the weight

    from_shift = (weight * shift.reshape(channels)).flatten(2).sum(2).reshape(out)
    scaled = (weight * scale.reshape(channels)).reshape(layer.weight.shape)
    bias = from_shift if layer.bias is None else layer.bias + from_shift
    return replace(layer, weight=scaled, bias=bias)


def _with_rules(
    layers: Mapping[fx.Node, Layer], data: Mapping[fx.Node, None], composite: Composite
) -> dict[fx.Node, Weighted]:
    depths = _depths(layers, data)
    head = _head(layers, data)
    inner_depths = [depths[node] for node in layers if node not in head]
    deepest = max(inner_depths, default=1)
    nonnegative = _nonnegative(data)
    weighted = {}
    for node, layer in layers.items():
        group: DepthGroup = "fc"
        if node not in head:
            share = (depths[node] - 1) / deepest  # 0 where a layer reads the image
            group = _depth_group(share, composite)
        rule = _rule(composite, group, layer, first=depths[node] == 1)
        source = _node(node.args[0])
        weighted[node] = Weighted(source, layer, rule, group, source in nonnegative)
    return weighted


def _depth_group(share: float, composite: Composite) -> DepthGroup:
    low, high = composite.boundaries
    if share < low:
        return "low"
    return "mid" if share < high else "high"


def _rule(composite: Composite, group: DepthGroup, layer: Layer, *, first: bool) -> Rule:
    if group == "fc":
        return composite.fc
    if first:
        return composite.first
    if layer.dims == 0 and composite.linear is not None:
        return composite.linear
    return composite.of_group(group)


def _depths(layers: Mapping[fx.Node, Layer], data: Mapping[fx.Node, None]) -> dict[fx.Node, int]:
    """How many layers lie on the longest way from the image up to and with each node."""
    depths: dict[fx.Node, int] = {}
    for node in data:
        before = [depths[source] for source in node.all_input_nodes if source in data]
        depths[node] = max(before, default=0) + int(node in layers)
    return depths


def _head(layers: Mapping[fx.Node, Layer], data: Mapping[fx.Node, None]) -> set[fx.Node]:
    """The linear layers on [N, F] behind which no other kind of layer comes; the last alone in a plain MLP."""
    reaching_inner: set[fx.Node] = set()  # nodes that are a layer of another kind, or have one behind them
    for node in reversed(list(data)):
        is_inner = node in layers and not _is_flat_linear(node, layers[node])
        if is_inner or not reaching_inner.isdisjoint(node.users):
            reaching_inner.add(node)
    head = [node for node in layers if node not in reaching_inner]
    if len(head) == len(layers):
        head = head[-1:]
    return set(head)


def _is_flat_linear(node: fx.Node, layer: Layer) -> bool:
    return layer.dims == 0 and len(shape_of(node)) == 2


def _nonnegative(data: Mapping[fx.Node, None]) -> set[fx.Node]:
    """Nodes whose values can't be below zero, by what computes them."""
    nonnegative: set[fx.Node] = set()
    for node in data:
        if _cuts_negative(node) or _stays_nonnegative(node, nonnegative):
            nonnegative.add(node)
    return nonnegative


def _cuts_negative(node: fx.Node) -> bool:
    """True where the operation's result is never below zero, whatever it reads."""
    name = operation(node)
    return name in _NONNEGATIVE or (name in _CLAMPS and _floor(node) >= 0)


def _stays_nonnegative(node: fx.Node, nonnegative: set[fx.Node]) -> bool:
    """True where the operation keeps signs and all it reads is not below zero; a parameter's sign is never read."""
    name = operation(node)
    if name not in _KEEPS_SIGN:
        return False
    if name in _PADDINGS and _fill(node) < 0:
        return False
    if name in ("add", "mul") and min(_scalars(node), default=0.0) < 0:
        return False
    return all(source in nonnegative for source in node.all_input_nodes if _returns_tensors(source))


def _floor(node: fx.Node) -> float:
    """The lower bound of a clamp; minus infinity where it has none, or one that is no number."""
    settings = arguments(node)
    bound = settings.get("min_val", settings.get("min"))
    return float(bound) if isinstance(bound, (int, float)) else -math.inf


def _fill(node: fx.Node) -> float:
    """The number a padding writes; 0 where none is said."""
    fill = arguments(node)["value"]
    return float(fill) if isinstance(fill, (int, float)) else 0.0


def _scalars(node: fx.Node) -> list[float]:
    """The numbers among an operation's arguments."""
    settings = (*node.args, *node.kwargs.values())
    return [float(setting) for setting in settings if isinstance(setting, (int, float))]
