"""A traced graph in, where it uses which layer at which widths out, and what else moves data.

Widths are read off shapes, of the graph's own or of a hypothetical plan's, so that one reading serves both.
Knows no runtime and no times.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

from torch import Tensor, fx

from ..export.layers import Layer
from ..graph import aten

Shapes = Callable[[fx.Node], Sequence[int]]
Widths = tuple[int, int]

_CONVOLUTIONS = {
    aten.conv1d.default: False,
    aten.conv2d.default: False,
    aten.conv3d.default: False,
    aten.conv1d.padding: False,
    aten.conv2d.padding: False,
    aten.conv3d.padding: False,
    aten.conv_transpose1d.default: True,
    aten.conv_transpose2d.input: True,
    aten.conv_transpose3d.input: True,
}
_PRODUCTS = (aten.matmul.default, aten.bmm.default)
_ATTENTION = aten.scaled_dot_product_attention.default
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


def dense_shapes(node: fx.Node) -> Sequence[int]:
    value = node.meta.get("val")
    return tuple(value.shape) if isinstance(value, Tensor) else ()


def uses_of(graph: fx.GraphModule) -> list[Use]:
    """Convolutions, linear layers and products of activations; einsum and rarer products are not among them."""
    found = []
    for node in graph.graph.nodes:
        layer = _layer(node)
        if layer is not None:
            found.append(Use(node, layer, widths(node, layer, dense_shapes)))
    return found


def widths(node: fx.Node, layer: Layer, shapes: Shapes) -> Widths:
    if layer.kind in ("linear", "product", "attention"):
        return int(shapes(_input(node))[-1]), int(shapes(node)[-1])
    return int(shapes(_input(node))[1]), int(shapes(node)[1])


def moved_bytes(graph: fx.GraphModule, uses: Sequence[Use], shapes: Shapes) -> int:
    """What the other operations read and write for one image, at four bytes a value."""
    weighted = {use.node for use in uses}
    batch = next(int(dense_shapes(n)[0]) for n in graph.graph.nodes if n.op == "placeholder")
    total = 0
    for node in graph.graph.nodes:
        if node.op != "call_function" or node in weighted or node.target in _FREE or not dense_shapes(node):
            continue
        operands = [n for n in node.all_input_nodes if n.op != "get_attr"]
        total += sum(prod(shapes(n)) for n in (node, *operands) if dense_shapes(n))
    return 4 * total // batch


def _input(node: fx.Node) -> fx.Node:
    source = node.args[0]
    assert isinstance(source, fx.Node)
    return source


def _layer(node: fx.Node) -> Layer | None:
    if node.op != "call_function":
        return None
    if node.target in _CONVOLUTIONS:
        return _convolution(node, transposed=_CONVOLUTIONS[node.target])
    if node.target is aten.linear.default:
        return Layer("linear", (prod(dense_shapes(_input(node))[1:-1]) if len(dense_shapes(node)) > 2 else 0,))
    if node.target in (*_PRODUCTS, _ATTENTION) and _live(node.args[1]):
        return _product(node)
    return None


def _live(argument: Any) -> bool:
    return isinstance(argument, fx.Node) and argument.op != "get_attr" and len(dense_shapes(argument)) > 1


def _product(node: fx.Node) -> Layer | None:
    *leading, m, n = dense_shapes(node)
    lead = prod(leading[1:])
    if node.target is _ATTENTION:
        keys = node.args[1]
        assert isinstance(keys, fx.Node)
        return Layer("attention", (lead, m, int(dense_shapes(keys)[-2])))
    return Layer("product", (lead, m, n)) if len(leading) else None


def _convolution(node: fx.Node, *, transposed: bool) -> Layer:
    weight = node.args[1]
    assert isinstance(weight, fx.Node)
    given = list(node.args[3:])
    source, shape = dense_shapes(_input(node)), dense_shapes(weight)
    n = len(shape) - 2
    stride, padding, dilation = given[:1], given[1:2], given[3:4] if transposed else given[2:3]
    groups = int(_at(given, 4 if transposed else 3, 1)) if not transposed else int(_at(given, 4, 1))
    kind = "transposed" if transposed else "conv"
    if groups > 1:
        kind = "depthwise" if groups == source[1] and dense_shapes(node)[1] == source[1] else "grouped"
    kernel, spread = tuple(shape[2:]), _each(dilation, n, 1)
    return Layer(
        kind,  # type: ignore[arg-type]
        tuple(source[2:]),
        kernel,
        _each(stride, n, 1),
        _pads(padding, kernel, spread),
        spread,
        groups if kind == "grouped" else 1,
    )


def _at(values: Sequence[Any], i: int, default: Any) -> Any:
    return values[i] if len(values) > i else default


def _each(given: Sequence[Any], n: int, default: int) -> tuple[int, ...]:
    value = given[0] if given else default
    numbers = list(value) if isinstance(value, (list, tuple)) else [value]
    return tuple(int(v) for v in (numbers * n)[:n])


def _pads(given: Sequence[Any], kernel: Sequence[int], dilation: Sequence[int]) -> tuple[int, ...]:
    """ONNX's order: all begins, then all ends."""
    padding = given[0] if given else 0
    if padding == "valid":
        padding = 0
    if padding == "same":
        whole = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
        return (*[w // 2 for w in whole], *[w - w // 2 for w in whole])
    each = _each([padding], len(kernel), 0)
    return (*each, *each)


def macs_of(use: Use, shapes: Shapes) -> int:
    """MACs of a scaled use, at hypothetical shapes."""
    out = prod(shapes(use.node))
    if use.layer.kind == "grouped":
        weight = use.node.args[1]
        assert isinstance(weight, fx.Node)
        return out * prod(shapes(weight)[1:])
    if use.layer.kind == "attention":
        query = shapes(_input(use.node))
        return prod(query[:-1]) * use.layer.sizes[2] * (query[-1] + shapes(use.node)[-1])
    return out * int(shapes(_input(use.node))[-1])
