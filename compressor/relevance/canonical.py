"""What LRP has to know of a traced graph before it runs: merged layers, rules, and what flows from the image.

Convolutions and linear layers are found by operation, merged with the BatchNorm next to them, and given
the composite's rule for their depth. Nothing is listed by name and the graph is not changed.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx

from ..graph import aten
from ..graph.operators import CONVOLUTIONS, Convolution
from .composite import Composite, DepthGroup, Rule
from .rules import Layer

_NONNEGATIVE = ("relu", "sigmoid", "hardsigmoid", "softmax", "_softmax", "relu6", "abs", "softplus", "exp")
_CLAMPS = ("hardtanh", "clamp", "clamp_min")
# not below zero where all that they read is not: sums and products are among them, differences are not
_KEEPS_SIGN = (
    "max_pool1d max_pool2d max_pool3d avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d "
    "adaptive_avg_pool3d adaptive_max_pool2d mean sum amax reshape permute transpose flatten squeeze unsqueeze slice "
    "select expand cat stack add mul dropout pad roll index repeat channel_shuffle clone split chunk unbind "
    "split_with_sizes flip view contiguous pixel_shuffle pixel_unshuffle constant_pad_nd"
).split()
_PROBABILITIES = ("softmax", "_softmax", "log_softmax", "_log_softmax", "sigmoid")
# these read a tensor's shape and kind, none of its values
_SHAPE_ONLY = ("sym_size", "new_zeros", "new_ones", "new_full", "zeros_like", "ones_like", "full_like", "empty_like")


@dataclass(frozen=True, slots=True)
class Weighted:
    """One convolution or linear layer: where it reads, what it computes once merged, and its rule."""

    source: fx.Node
    layer: Layer
    rule: Rule
    group: DepthGroup
    nonnegative: bool


@dataclass(frozen=True, slots=True)
class Canonical:
    """`data`: nodes whose values come from the image, in order. `merged`: BatchNorm nodes that became identities.
    `constants`: values that parameters alone decide."""

    data: dict[fx.Node, None]
    constants: Mapping[fx.Node, Any]
    weighted: Mapping[fx.Node, Weighted]
    merged: frozenset[fx.Node]
    output: fx.Node


def operation(node: fx.Node) -> str:
    """`add` for aten.add.Tensor; `getitem` for Python's own."""
    packet = getattr(node.target, "overloadpacket", None)
    if packet is None:
        return getattr(node.target, "__name__", str(node.target))
    return str(packet).split(".")[-1]


def constant_of(argument: object, constants: Mapping[fx.Node, Any]) -> Any:
    """The value of an operation's argument that parameters alone decide; None for an argument that is no node."""
    return constants[argument] if isinstance(argument, fx.Node) else None


def canonical(graph: fx.GraphModule, composite: Composite) -> Canonical:
    """The graph as LRP reads it, with the composite's rule for each layer; the graph itself stays as it is."""
    data = _from_image(graph)
    constants = _constants(graph, data)
    layers = _layers(data, constants)
    merged = _merge(layers, data, constants)
    weighted = _with_rules(layers, data, composite)
    return Canonical(data, constants, weighted, frozenset(merged), _output(graph))


def _output(graph: fx.GraphModule) -> fx.Node:
    """The node whose value holds the class scores: the first the model returns, before probabilities are made of it."""
    value: Any = next(node for node in graph.graph.nodes if node.op == "output").args[0]
    while isinstance(value, (tuple, list)):
        value = value[0]
    if isinstance(value, dict):
        value = next(iter(value.values()))
    assert isinstance(value, fx.Node)
    while operation(value) in _PROBABILITIES:
        value = value.args[0]
        assert isinstance(value, fx.Node)
    return value


def _from_image(graph: fx.GraphModule) -> dict[fx.Node, None]:
    """The nodes whose values come from the image, in the graph's order."""
    data: dict[fx.Node, None] = {}
    for node in graph.graph.nodes:
        if node.op == "placeholder" or _carries_on(node, data):
            data[node] = None
    return data


def _carries_on(node: fx.Node, data: Mapping[fx.Node, None]) -> bool:
    """True where a node computes tensors of the image's values, not of their shapes alone."""
    if node.op != "call_function" or operation(node) in _SHAPE_ONLY:
        return False
    if not isinstance(node.meta.get("val"), (Tensor, tuple, list)):
        return False
    return any(source in data for source in node.all_input_nodes)


@torch.no_grad()
def _constants(graph: fx.GraphModule, data: Mapping[fx.Node, None]) -> dict[fx.Node, Any]:
    """Values of what depends neither on the image nor on the batch size."""
    values: dict[fx.Node, Any] = {}
    for node in graph.graph.nodes:
        if node.op == "get_attr":
            values[node] = _detached(operator.attrgetter(node.target)(graph))
        elif node.op == "call_function" and node not in data and all(n in values for n in node.all_input_nodes):
            args, kwargs = fx.map_arg((node.args, node.kwargs), values.__getitem__)
            values[node] = node.target(*args, **kwargs)
    return values


def _detached(value: Any) -> Any:
    return value.detach() if isinstance(value, Tensor) else value


def _layers(data: Mapping[fx.Node, None], constants: Mapping[fx.Node, Any]) -> dict[fx.Node, Layer]:
    layers: dict[fx.Node, Layer] = {}
    for node in data:
        layer = _layer(node, data, constants)
        if layer is not None:
            layers[node] = layer
    return layers


def _layer(node: fx.Node, data: Mapping[fx.Node, None], constants: Mapping[fx.Node, Any]) -> Layer | None:
    """The layer a node computes, or None where it is none or its weights come from the image."""
    if node.op != "call_function":
        return None
    if any(source not in constants for source in node.all_input_nodes if source is not node.args[0]):
        return None
    if node.args[0] not in data:
        return None
    if node.target is aten.linear.default:
        bias = constant_of(node.args[2], constants) if len(node.args) > 2 else None
        return Layer(constant_of(node.args[1], constants), bias)
    if node.target in CONVOLUTIONS:
        return _convolution(node, constants)
    return None


def _convolution(node: fx.Node, constants: Mapping[fx.Node, Any]) -> Layer:
    convolution = Convolution.of(node)
    weight, bias = constants[convolution.weight], constant_of(convolution.bias, constants)
    assert isinstance(convolution.groups, int)
    # "same" stays a word: how much it is depends on kernel and dilation
    geometry = (convolution.stride, convolution.padding, convolution.dilation, convolution.groups)
    return Layer(weight, bias, CONVOLUTIONS[node.target], *geometry)


def _merge(
    layers: dict[fx.Node, Layer], data: Mapping[fx.Node, None], constants: Mapping[fx.Node, Any]
) -> dict[fx.Node, None]:
    """Folds each BatchNorm into the layer before it, else into the one after it; returns those folded."""
    merged: dict[fx.Node, None] = {}
    for norm in data:
        if norm.target is not aten.batch_norm.default or norm.args[5]:  # argument 5: in training, by the batch
            continue
        scale, shift = affine(norm, constants)
        before = _before(norm, merged)
        if before in layers and _alone(before, norm) and _channels_agree(layers[before], norm):
            layers[before] = _scaled_output(layers[before], scale, shift)
            merged[norm] = None
            continue
        after = next(iter(norm.users)) if len(norm.users) == 1 else None
        if after in layers and after.args[0] is norm and _can_absorb(layers[after], norm):
            layers[after] = _scaled_input(layers[after], scale, shift)
            merged[norm] = None
    return merged


def _before(norm: fx.Node, merged: Mapping[fx.Node, None]) -> fx.Node:
    """What a BatchNorm reads, seen through those that are folded into it already."""
    before = norm.args[0]
    while before in merged:
        before = before.args[0]  # type: ignore[union-attr]
    assert isinstance(before, fx.Node)
    return before


def affine(node: fx.Node, constants: Mapping[fx.Node, Any]) -> tuple[Tensor, Tensor]:
    """A BatchNorm in evaluation mode as scale and shift per channel, both [C]."""
    weight, bias, mean, var = (constant_of(argument, constants) for argument in node.args[1:5])
    epsilon: Any = node.args[7]
    scale: Tensor = torch.rsqrt(var + epsilon)
    if weight is not None:
        scale = scale * weight
    shift: Tensor = -mean * scale
    if bias is not None:
        shift = shift + bias
    return scale, shift


def _alone(before: fx.Node, norm: fx.Node) -> bool:
    """True where every way from `before` leads through `norm`."""
    node = norm.args[0]
    while True:
        assert isinstance(node, fx.Node)
        if len(node.users) != 1:
            return False
        if node is before:
            return True
        node = node.args[0]


def _channels_agree(layer: Layer, norm: fx.Node) -> bool:
    """A linear layer's features are axis 1, as BatchNorm's channels are, only where its output is [N, F]."""
    return layer.dims > 0 or len(norm.meta["val"].shape) == 2


def _can_absorb(layer: Layer, norm: fx.Node) -> bool:
    """Zero padding sees the shift only behind the norm, so a padded layer can't take it in exactly."""
    if layer.dims == 0:
        return len(norm.meta["val"].shape) == 2
    return not isinstance(layer.padding, str) and not any(layer.padding)


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
    deepest = max((depth for node, depth in depths.items() if node in layers and node not in head), default=1)
    nonnegative = _nonnegative(data)
    weighted = {}
    for node, layer in layers.items():
        share = (depths[node] - 1) / deepest  # 0 where a layer reads the image
        group: DepthGroup = "fc" if node in head else _depth_group(share, composite)
        rule = _rule(composite, group, layer, first=depths[node] == 1)
        source = node.args[0]
        assert isinstance(source, fx.Node)
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
        before = max((depths[source] for source in node.all_input_nodes if source in data), default=0)
        depths[node] = before + (node in layers)
    return depths


def _head(layers: Mapping[fx.Node, Layer], data: Mapping[fx.Node, None]) -> set[fx.Node]:
    """The linear layers on [N, F] behind which no other kind of layer comes; the last alone in a plain MLP."""
    reaches_inner: dict[fx.Node, bool] = {}  # whether the node, or one behind it, is a layer of another kind
    for node in reversed(list(data)):
        inner = node in layers and not _flat_linear(node, layers[node])
        reaches_inner[node] = inner or any(reaches_inner[user] for user in node.users if user in reaches_inner)
    head = [node for node in layers if not reaches_inner[node]]
    if len(head) == len(layers):
        head = head[-1:]
    return set(head)


def _flat_linear(node: fx.Node, layer: Layer) -> bool:
    return layer.dims == 0 and len(node.meta["val"].shape) == 2


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
    if name not in _KEEPS_SIGN and node.target is not operator.getitem:
        return False
    if name in ("pad", "constant_pad_nd") and _fill(node) < 0:
        return False
    if name in ("add", "mul") and not _scalars_nonnegative(node):
        return False
    tensors = [source for source in node.all_input_nodes if isinstance(source.meta.get("val"), (Tensor, tuple, list))]
    return all(source in nonnegative for source in tensors)


def _floor(node: fx.Node) -> float:
    """The lower bound of a clamp; -1, hardtanh's own, where none is written or it is no number."""
    default = -1.0
    bound = node.args[1] if len(node.args) > 1 else node.kwargs.get("min", default)
    return float(bound) if isinstance(bound, (int, float)) else default


def _fill(node: fx.Node) -> float:
    """The number a padding writes: the last one among its arguments, 0 where there is none."""
    numbers = [a for a in (*node.args[2:], *node.kwargs.values()) if isinstance(a, (int, float))]
    return float(numbers[-1]) if numbers else 0.0


def _scalars_nonnegative(node: fx.Node) -> bool:
    return all(a >= 0 for a in (*node.args, *node.kwargs.values()) if isinstance(a, (int, float)))
