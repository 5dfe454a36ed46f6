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
from ..graph.neighbours import calls_of

_GROUPED = (aten.conv1d.default, aten.conv2d.default, aten.conv3d.default)
ADAPTIVE_MAXIMA = (
    aten.adaptive_max_pool1d.default,
    aten.adaptive_max_pool2d.default,
    aten.adaptive_max_pool3d.default,
)


def require_exportable(graph: fx.GraphModule) -> None:
    """Raises ModelError, naming operation, layer and line, for what the ONNX exporter would refuse after hours."""
    for node in calls_of(graph):
        reason = _obstacle(node)
        if reason:
            raise ModelError(
                f"{node.target} in {place_of(node)} {reason}; write it with other operations, as the files made of it "
                "are ONNX"
            )


def _obstacle(node: fx.Node) -> str:
    if node.target in _GROUPED and len(node.args) > 6 and not isinstance(node.args[6], int):  # 6: groups
        return "has as many groups as the batch has images, and ONNX fixes a convolution's groups in the file"
    if node.target in ADAPTIVE_MAXIMA:
        # Its results are (values, indices), each taken out by a node `getitem(result, 0 or 1)`.
        read_indices = [user for user in node.users if user.args[1] == 1 and user.users]
        return "gives the places of its maxima, which ONNX has no function for" if read_indices else ""
    return "" if _has_function(node.target) else "has no ONNX function"


def _has_function(target: object) -> bool:
    if not isinstance(target, torch._ops.OpOverload):
        return True  # Python's own arithmetic on sizes
    is_composite = torch._C._dispatch_has_kernel_for_dispatch_key(str(target._name), "CompositeImplicitAutograd")
    return is_composite or target in _decompositions() or bool(_registry().get_decomps(target))


@functools.cache
def _registry() -> Any:
    from torch.onnx._internal.exporter import _registration

    return _registration.ONNXRegistry.from_torchlib()


@functools.cache
def _decompositions() -> Any:
    return torch.export.default_decompositions()


def spell_adaptive_maximum(graph: fx.GraphModule, node: fx.Node) -> None:
    """Writes an adaptive maximum as slices and maxima, one axis after the other, in place.

    Cell i of m on n entries is the maximum of floor(i n / m) up to ceil((i + 1) n / m): 2 of 5 are 0-2 and 2-4.
    """
    source: Any = node.args[0]
    sizes: Any = node.args[1]
    assert isinstance(source, fx.Node)
    shape = source.meta["val"].shape
    cells_by_axis = [sizes] if isinstance(sizes, int) else list(sizes)

    pooled = source
    with graph.graph.inserting_before(node):
        for offset, cells in enumerate(cells_by_axis):
            axis = len(shape) - len(cells_by_axis) + offset  # the sizes are of the last axes
            if cells in (None, shape[axis]):
                continue
            pooled = _maxima_along(graph, pooled, axis, int(shape[axis]), int(cells))

    for user in list(node.users):
        if user.args[1] == 0:
            user.replace_all_uses_with(pooled)
        graph.graph.erase_node(user)
    graph.graph.erase_node(node)


def _maxima_along(graph: fx.GraphModule, source: fx.Node, axis: int, length: int, cells: int) -> fx.Node:
    call = graph.graph.call_function
    maxima = []
    for cell in range(cells):
        first, end = cell * length // cells, math.ceil((cell + 1) * length / cells)
        entries = call(aten.slice.Tensor, (source, axis, first, end)) if cells > 1 else source
        maxima.append(call(aten.amax.default, (entries, [axis], True)))
    return call(aten.cat.default, (maxima, axis)) if len(maxima) > 1 else maxima[0]
