"""A traced graph in, an error that names what has no form in ONNX out: asked before anything long is begun.

Also spells maximum pooling to a given size, which the exporter doesn't know, as slices and maxima. Knows no files.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import fx

from ..errors import ModelError
from ..graph import aten, place_of

_GROUPED = (aten.conv1d.default, aten.conv2d.default, aten.conv3d.default)
ADAPTIVE_MAXIMA = (
    aten.adaptive_max_pool1d.default,
    aten.adaptive_max_pool2d.default,
    aten.adaptive_max_pool3d.default,
)


def require_exportable(graph: fx.GraphModule) -> None:
    """Raises ModelError, naming operation, layer and line, for what the ONNX exporter would refuse after hours."""
    for node in graph.graph.nodes:
        if node.op != "call_function":
            continue
        reason = _obstacle(node)
        if reason:
            raise ModelError(
                f"{node.target} in {place_of(node)} {reason}; write it with other operations, as the files made of it "
                "are ONNX"
            )


def _obstacle(node: fx.Node) -> str:
    if node.target in _GROUPED and len(node.args) > 6 and not isinstance(node.args[6], int):
        return "has as many groups as the batch has images, and ONNX fixes a convolution's groups in the file"
    if node.target in ADAPTIVE_MAXIMA:
        indices = [user for user in node.users if user.args[1] == 1 and user.users]
        return "gives the places of its maxima, which ONNX has no function for" if indices else ""
    return "" if _has_function(node.target) else "has no ONNX function"


def _has_function(target: Any) -> bool:
    if not isinstance(target, torch._ops.OpOverload):
        return True  # Python's own arithmetic on sizes
    made_of_others = torch._C._dispatch_has_kernel_for_dispatch_key(str(target._name), "CompositeImplicitAutograd")
    return made_of_others or target in _decompositions() or bool(_registry().get_decomps(target))


@functools.cache
def _registry() -> Any:
    from torch.onnx._internal.exporter import _registration

    return _registration.ONNXRegistry.from_torchlib()


@functools.cache
def _decompositions() -> Any:
    return torch.export.default_decompositions()


def spell_adaptive_maximum(graph: fx.GraphModule, node: fx.Node) -> None:
    """Axis after axis: cell i of m on n entries is the maximum of floor(i n / m) up to ceil((i + 1) n / m)."""
    source: Any = node.args[0]
    sizes: Any = node.args[1]
    assert isinstance(source, fx.Node)
    shape = source.meta["val"].shape
    lengths = [sizes] if isinstance(sizes, int) else list(sizes)
    at = source
    with graph.graph.inserting_before(node):
        for offset, cells in enumerate(lengths):
            axis = len(shape) - len(lengths) + offset
            if cells in (None, shape[axis]):
                continue
            at = _maxima_along(graph, at, axis, int(shape[axis]), int(cells))
    for user in list(node.users):
        if user.args[1] == 0:
            user.replace_all_uses_with(at)
        graph.graph.erase_node(user)
    graph.graph.erase_node(node)


def _maxima_along(graph: fx.GraphModule, source: fx.Node, axis: int, length: int, cells: int) -> fx.Node:
    call = graph.graph.call_function
    parts = []
    for cell in range(cells):
        first, last = cell * length // cells, math.ceil((cell + 1) * length / cells)
        part = call(aten.slice.Tensor, (source, axis, first, last)) if cells > 1 else source
        parts.append(call(aten.amax.default, (part, [axis], True)))
    return call(aten.cat.default, (parts, axis)) if len(parts) > 1 else parts[0]
