"""What LRP has to know of a traced graph before it runs: merged layers, rules, and what flows from the image.

Convolutions and linear layers are found by operation, merged with the BatchNorm next to them, and given
the composite's rule for their depth. Nothing is listed by name and the graph is not changed.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from ..graph import aten
from .composite import Composite, DepthGroup, Rule
from .rules import Layer

_CONVOLUTIONS = {
    aten.conv1d.default: 1,
    aten.conv2d.default: 2,
    aten.conv3d.default: 3,
    aten.conv1d.padding: 1,
    aten.conv2d.padding: 2,
    aten.conv3d.padding: 3,
}
_NONNEGATIVE = ("relu", "sigmoid", "hardsigmoid", "softmax", "_softmax", "relu6", "abs", "softplus", "exp")
_KEEPS_SIGN = (
    "max_pool1d max_pool2d max_pool3d avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d "
    "adaptive_avg_pool3d adaptive_max_pool2d mean sum amax reshape permute transpose flatten squeeze unsqueeze slice "
    "select expand cat stack add mul dropout pad roll index repeat channel_shuffle clone split chunk unbind "
    "split_with_sizes flip view contiguous pixel_shuffle pixel_unshuffle constant_pad_nd"
).split()
_PROBABILITIES = ("softmax", "_softmax", "log_softmax", "_log_softmax", "sigmoid")
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
    return str(packet).split(".")[-1] if packet is not None else getattr(node.target, "__name__", str(node.target))


def canonical(graph: fx.GraphModule, composite: Composite) -> Canonical:
    data = _from_image(graph)
    constants = _constants(graph, data)
    layers = {node: layer for node in data if (layer := _layer(node, data, constants)) is not None}
    merged = _merge(layers, data, constants)
    weighted = _with_rules(layers, data, composite)
    return Canonical(data, constants, weighted, frozenset(merged), _output(graph))


def _output(graph: fx.GraphModule) -> fx.Node:
    """The node whose value holds the class scores: the first the model returns, before probabilities are made of it."""
    value: Any = next(n for n in graph.graph.nodes if n.op == "output").args[0]
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
    data: dict[fx.Node, None] = {}
    for node in graph.graph.nodes:
        if node.op == "placeholder" or (
            node.op == "call_function"
            and operation(node) not in _SHAPE_ONLY
            and isinstance(node.meta.get("val"), (Tensor, tuple, list))
            and any(n in data for n in node.all_input_nodes)
        ):
            data[node] = None
    return data


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


def _layer(node: fx.Node, data: Mapping[fx.Node, None], constants: Mapping[fx.Node, Any]) -> Layer | None:
    """The layer a node computes, or None where it is none or its weights come from the image."""
    if node.op != "call_function" or any(n not in constants for n in node.all_input_nodes if n is not node.args[0]):
        return None
    if node.args[0] not in data:
        return None
    if node.target is aten.linear.default:
        given: list[Any] = [constants.get(a) if isinstance(a, fx.Node) else a for a in node.args[1:]]
        weight, bias = [*given, None][:2]
        return Layer(weight, bias)
    if node.target in _CONVOLUTIONS:
        return _convolution(node, constants)
    return None


def _convolution(node: fx.Node, constants: Mapping[fx.Node, Any]) -> Layer:
    target: Any = node.target
    dims = _CONVOLUTIONS[target]
    names = [argument.name for argument in target._schema.arguments]
    given = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
    weight = constants[given["weight"]]
    bias = constants[given["bias"]] if isinstance(given.get("bias"), fx.Node) else None
    stride, dilation = (_tuple(given.get(name, 1), dims) for name in ("stride", "dilation"))
    padding = given.get("padding", 0)
    padding = 0 if padding == "valid" else padding
    exact = padding if isinstance(padding, str) else _tuple(padding, dims)
    groups = given.get("groups", 1)
    assert isinstance(groups, int)
    return Layer(weight, bias, dims, stride, exact, dilation, groups)


def _tuple(value: Any, dims: int) -> tuple[int, ...]:
    values = tuple(value) if isinstance(value, (tuple, list)) else (value,)
    return values if len(values) == dims else values * dims


def _merge(
    layers: dict[fx.Node, Layer], data: Mapping[fx.Node, None], constants: Mapping[fx.Node, Any]
) -> dict[fx.Node, None]:
    """Folds each BatchNorm into the layer before it, else into the one after it; returns those folded."""
    merged: dict[fx.Node, None] = {}
    for node in data:
        if node.target is not aten.batch_norm.default or node.args[5]:
            continue
        scale, shift = affine(node, constants)
        before = node.args[0]
        while before in merged:
            before = before.args[0]  # type: ignore[union-attr]
        assert isinstance(before, fx.Node)
        if before in layers and _alone(before, node, merged) and _channels_agree(layers[before], node):
            layers[before] = _scaled_output(layers[before], scale, shift)
            merged[node] = None
            continue
        after = next(iter(node.users)) if len(node.users) == 1 else None
        if after in layers and after.args[0] is node and _can_absorb(layers[after], node):
            layers[after] = _scaled_input(layers[after], scale, shift)
            merged[node] = None
    return merged


def affine(node: fx.Node, constants: Mapping[fx.Node, Any]) -> tuple[Tensor, Tensor]:
    """A BatchNorm in evaluation mode as scale and shift per channel."""
    given: list[Any] = [constants[a] if isinstance(a, fx.Node) else None for a in node.args[1:5]]
    weight, bias, mean, var = given
    epsilon: Any = node.args[7]
    scale: Tensor = torch.rsqrt(var + epsilon)
    scale = scale if weight is None else scale * weight
    shift: Tensor = -mean * scale
    return scale, shift if bias is None else shift + bias


def _alone(before: fx.Node, norm: fx.Node, merged: Mapping[fx.Node, None]) -> bool:
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
    weight = layer.weight * scale.reshape(-1, *[1] * (layer.weight.dim() - 1))
    return _with(layer, weight, shift if layer.bias is None else layer.bias * scale + shift)


def _scaled_input(layer: Layer, scale: Tensor, shift: Tensor) -> Layer:
    out, per_group = layer.weight.shape[:2]
    shape = (layer.groups, out // layer.groups, per_group, *layer.weight.shape[2:])
    weight = layer.weight.reshape(shape)
    side = (layer.groups, 1, per_group, *[1] * (len(shape) - 3))
    extra = (weight * shift.reshape(side)).flatten(2).sum(2).reshape(out)
    scaled = (weight * scale.reshape(side)).reshape(layer.weight.shape)
    return _with(layer, scaled, extra if layer.bias is None else layer.bias + extra)


def _with(layer: Layer, weight: Tensor, bias: Tensor) -> Layer:
    return Layer(weight, bias, layer.dims, layer.stride, layer.padding, layer.dilation, layer.groups)


def _with_rules(
    layers: Mapping[fx.Node, Layer], data: Mapping[fx.Node, None], composite: Composite
) -> dict[fx.Node, Weighted]:
    depths = _depths(layers, data)
    head = _head(layers, data)
    deepest = max((d for node, d in depths.items() if node in layers and node not in head), default=1)
    nonnegative = _nonnegative(data, layers)
    result = {}
    for node, layer in layers.items():
        share = (depths[node] - 1) / deepest
        low, high = composite.boundaries
        group: DepthGroup = "fc" if node in head else "low" if share < low else "mid" if share < high else "high"
        source = node.args[0]
        assert isinstance(source, fx.Node)
        rule = _rule(composite, group, layer, first=depths[node] == 1)
        result[node] = Weighted(source, layer, rule, group, source in nonnegative)
    return result


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
        before = max((depths[n] for n in node.all_input_nodes if n in data), default=0)
        depths[node] = before + (node in layers)
    return depths


def _head(layers: Mapping[fx.Node, Layer], data: Mapping[fx.Node, None]) -> set[fx.Node]:
    """The linear layers on [N, F] behind which no other kind of layer comes; the last alone in a plain MLP."""
    reaches: dict[fx.Node, bool] = {}
    for node in reversed(list(data)):
        inner = node in layers and not _flat_linear(node, layers[node])
        reaches[node] = inner or any(reaches[user] for user in node.users if user in reaches)
    head = [node for node in layers if not reaches[node]]
    if len(head) == len(layers):
        head = head[-1:]
    return set(head)


def _flat_linear(node: fx.Node, layer: Layer) -> bool:
    return layer.dims == 0 and len(node.meta["val"].shape) == 2


def _nonnegative(data: Mapping[fx.Node, None], layers: Mapping[fx.Node, Layer]) -> set[fx.Node]:
    """Nodes whose values can't be below zero, by what computes them."""
    known: set[fx.Node] = set()
    for node in data:
        name = operation(node)
        if name in _NONNEGATIVE or (name in ("hardtanh", "clamp", "clamp_min") and _floor(node) >= 0):
            known.add(node)
        elif name in _KEEPS_SIGN or node.target is operator.getitem:
            tensors = [n for n in node.all_input_nodes if isinstance(n.meta.get("val"), (Tensor, tuple, list))]
            pads = name in ("pad", "constant_pad_nd") and _fill(node) < 0
            if all(n in known for n in tensors) and not pads and _scalars_nonnegative(node, name):
                known.add(node)
    return known


def _floor(node: fx.Node) -> float:
    default = -1.0
    value = node.args[1] if len(node.args) > 1 else node.kwargs.get("min", default)
    return float(value) if isinstance(value, (int, float)) else default


def _fill(node: fx.Node) -> float:
    values = [a for a in (*node.args[2:], *node.kwargs.values()) if isinstance(a, (int, float))]
    return float(values[-1]) if values else 0.0


def _scalars_nonnegative(node: fx.Node, name: str) -> bool:
    if name not in ("add", "mul"):
        return True
    return all(a >= 0 for a in (*node.args, *node.kwargs.values()) if isinstance(a, (int, float)))
