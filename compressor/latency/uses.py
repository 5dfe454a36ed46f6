"""A traced graph in, where it uses which layer at which widths out, and what else moves data.

Widths are read off shapes, of the graph's own or of a hypothetical plan's, so that one reading serves both.
Knows no runtime and no times.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod

from torch import fx

from ..export.layers import Layer, LayerKind
from ..graph import aten
from ..graph.interface import traced_count
from ..graph.neighbours import calls_of, computed_operands, is_stored, shape_of
from ..graph.operators import ALL_CONVOLUTIONS, ATTENTION, LINEAR, Convolution, arguments, paddings_of

Shapes = Callable[[fx.Node], Sequence[int]]
Widths = tuple[int, int]

_PRODUCTS = (aten.matmul.default, aten.bmm.default)
# What runtimes fold into the operation before it, and what moves nothing.
_FREE = {
    *(aten.batch_norm.default, aten.relu.default, aten.relu_.default, aten.hardtanh.default, aten.clamp.default),
    *(aten.reshape.default, aten.unsqueeze.default, aten.squeeze.dim, aten.flatten.using_ints, aten.dropout.default),
}


@dataclass(frozen=True, slots=True)
class Use:
    """One node of the graph and the layer it is; `widths` are (input, output) channels in the dense network."""

    node: fx.Node
    layer: Layer
    widths: Widths

    @property
    def scaled(self) -> bool:
        """Timed at its dense widths only, and scaled by its MACs from there."""
        return self.layer.kind in ("grouped", "product", "attention")


def uses_of(graph: fx.GraphModule) -> list[Use]:
    """Convolutions, linear layers and products of activations; einsum and rarer products are not among them."""
    uses = []
    for node in graph.graph.nodes:
        layer = _layer(node)
        if layer is not None:
            uses.append(Use(node, layer, widths(node, layer, shape_of)))
    return uses


def widths(node: fx.Node, layer: Layer, shapes: Shapes) -> Widths:
    """(input, output) channels at those shapes: the last axis of [..., C], the second of a convolution's [N, C, ...].

    Of a product the first is the summed axis, of attention what a query is wide.
    """
    axis = -1 if layer.kind in ("linear", "product", "attention") else 1
    return int(shapes(_input(node))[axis]), int(shapes(node)[axis])


def moved_bytes(graph: fx.GraphModule, uses: Sequence[Use], shapes: Shapes) -> int:
    """What the other operations read and write for one image, at four bytes a value."""
    weighted = {use.node for use in uses}
    batch = traced_count(graph)
    moved_values = 0
    for node in calls_of(graph):
        if node not in weighted and node.target not in _FREE and shape_of(node):
            tensors = filter(shape_of, (node, *computed_operands(node)))  # but for scalars
            moved_values += sum(prod(shapes(tensor)) for tensor in tensors)
    return 4 * moved_values // batch


def _input(node: fx.Node) -> fx.Node:
    return node.all_input_nodes[0]


def _layer(node: fx.Node) -> Layer | None:
    """What is timed for this node; None where only the bytes it moves count."""
    if node.op != "call_function":
        return None
    if node.target in ALL_CONVOLUTIONS:
        return _convolution(node)
    if node.target is LINEAR:
        return _linear(node)
    if node.target in (*_PRODUCTS, ATTENTION) and _is_activation(node.args[1]):
        return _product(node)
    return None


def _is_activation(argument: object) -> bool:
    """Whether the second factor is computed, too, and is no vector: a parameter's product is not timed as one."""
    return isinstance(argument, fx.Node) and not is_stored(argument) and len(shape_of(argument)) > 1


def _linear(node: fx.Node) -> Layer:
    """Its rows of one image: the tokens of [N, tokens, C]; 0 where images themselves are the rows, [N, C]."""
    tokens = shape_of(_input(node))[1:-1]
    return Layer("linear", (prod(tokens) if tokens else 0,))


def _product(node: fx.Node) -> Layer | None:
    *leading, m, n = shape_of(node)  # [N, heads, m, n]; of attention m are queries
    lead = prod(leading[1:])
    if node.target is ATTENTION:
        keys = shape_of(arguments(node)["key"])  # [N, heads, keys, d]
        return Layer("attention", (lead, m, keys[-2]))
    if not leading:
        return None
    return Layer("product", (lead, m, n))


def _convolution(node: fx.Node) -> Layer | None:
    convolution = Convolution.of(node)
    source, kernel = shape_of(_input(node)), shape_of(convolution.weight)[2:]
    groups = convolution.groups
    if not isinstance(groups, int):
        return None  # as many as the batch has images: no file of one layer can say that

    kind: LayerKind = "transposed" if convolution.transposed else "conv"
    if groups > 1:
        is_depthwise = groups == source[1] and shape_of(node)[1] == source[1]
        kind = "depthwise" if is_depthwise else "grouped"
    return Layer(
        kind,
        tuple(source[2:]),
        tuple(kernel),
        convolution.stride,
        _pads(convolution.padding, kernel, convolution.dilation),
        convolution.dilation,
        groups if kind == "grouped" else 1,
    )


def _pads(padding: tuple[int, ...] | str, kernel: Sequence[int], dilation: Sequence[int]) -> tuple[int, ...]:
    """ONNX's order: all begins, then all ends."""
    begins, ends = zip(*paddings_of(padding, kernel, dilation), strict=True)
    return (*begins, *ends)


def macs_of(use: Use, shapes: Shapes) -> int:
    """MACs of a use at hypothetical shapes, of the whole batch. Right for products, attention and grouped layers.

    For other layers it serves to compare: a convolution's last input axis is no channel.
    """
    outputs = prod(shapes(use.node))
    if use.layer.kind == "grouped":
        return outputs * prod(shapes(arguments(use.node)["weight"])[1:])  # [out, in / groups, *kernel]
    if use.layer.kind == "attention":
        query = shapes(_input(use.node))  # [N, heads, queries, d]
        keys = use.layer.sizes[2]
        # both products: queries x keys over d, then what values are wide over keys
        return prod(query[:-1]) * keys * (query[-1] + shapes(use.node)[-1])
    return outputs * int(shapes(_input(use.node))[-1])
