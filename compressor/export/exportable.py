"""A traced graph in, an error that names what has no form in ONNX out: asked before anything long is begun.

Also spells maximum pooling to a given size, which the exporter doesn't know, as slices and maxima. Knows no files.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx
from torch.utils._python_dispatch import TorchDispatchMode

from ..errors import ModelError
from ..graph import aten, place_of
from ..graph.neighbours import calls_of
from ..graph.operators import ALL_CONVOLUTIONS, arguments

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
    """What is said of the operation behind its name; empty for one that can be exported."""
    if node.target in ADAPTIVE_MAXIMA:  # spelled in other operations, but for its indices
        return "gives the places of its maxima, which ONNX has no function for" if _reads_indices(node) else ""
    if node.target is aten.lstm.input and _has_projections(node):
        return "projects its state (proj_size), which ONNX's LSTM can't"
    if node.target is aten.cdist.default and arguments(node)["p"] != 2:
        return "takes another norm than 1 and 2, which has no ONNX function"
    missing = next((part for part in _parts_of(node) if not _is_known(part)), None)
    if missing is not None:
        return "has no ONNX function" if missing is node.target else f"has no ONNX function ({missing} in it)"
    if node.target in ALL_CONVOLUTIONS and not isinstance(arguments(node)["groups"], int):
        return "has as many groups as the batch has images, and ONNX fixes a convolution's groups in the file"
    return ""


def _has_projections(lstm: fx.Node) -> bool:
    """Each layer has two weights in each direction, two biases where it has any, and a third weight for projections."""
    settings = arguments(lstm)
    directions: int = settings["num_layers"] * (2 if settings["bidirectional"] else 1)
    parameters: list[fx.Node] = settings["params"]
    return len(parameters) > directions * (4 if settings["has_biases"] else 2)


def _reads_indices(pooling: fx.Node) -> bool:
    """Its results are (values, indices), each taken out by a node `getitem(result, 0 or 1)`."""
    return any(user.args[1] == 1 and user.users for user in pooling.users)


def _parts_of(node: fx.Node) -> Sequence[object]:
    """The operation itself or, of one that the exporter only knows by what it is made of, those."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload) or not _is_composite(target) or _translations()(target):
        return (target,)
    parts = _Parts()
    try:
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda source: source.meta["val"])
        with parts:
            target(*args, **kwargs)
    except Exception:  # what depends on values can't be followed by shapes alone
        return ()
    return parts.called


class _Parts(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes the operations that are called, those that composites are made of."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.called: list[object] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.called.append(func)
        return func(*args, **(kwargs or {}))


def _is_composite(target: torch._ops.OpOverload) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(str(target._name), "CompositeImplicitAutograd")


def _is_known(target: object) -> bool:
    """Whether the exporter has a form of it, or makes it of others that PyTorch takes it apart into."""
    if not isinstance(target, torch._ops.OpOverload):
        return True  # Python's own arithmetic on sizes
    is_taken_apart = _is_composite(target) or target in torch._decomp.decomposition_table
    return is_taken_apart or len(_translations()(target)) > 0


@functools.cache
def _translations() -> Callable[[torch._ops.OpOverload], Sequence[object]]:
    """ONNX's forms of an operation, as torch's own exporter has them."""
    from torch.onnx._internal.exporter import _registration

    return _registration.ONNXRegistry.from_torchlib().get_decomps


def spell_adaptive_maximum(graph: fx.GraphModule, node: fx.Node) -> None:
    """Writes an adaptive maximum as slices and maxima, one axis after the other, in place.

    Cell i of m on n entries is the maximum of floor(i n / m) up to ceil((i + 1) n / m): 2 of 5 are 0-2 and 2-4.
    """
    pooled: Any = node.args[0]
    sizes: Any = node.args[1]
    shape = pooled.meta["val"].shape
    cells_by_axis = [sizes] if isinstance(sizes, int) else sizes
    first_axis = len(shape) - len(cells_by_axis)  # the sizes are of the last axes

    with graph.graph.inserting_before(node):
        for axis, cells in enumerate(cells_by_axis, first_axis):
            if cells not in (None, shape[axis]):
                pooled = _maxima_along(graph, pooled, axis, int(shape[axis]), int(cells))

    for user in list(node.users):
        if user.args[1] == 0:
            user.replace_all_uses_with(pooled)
        graph.graph.erase_node(user)
    graph.graph.erase_node(node)


def _maxima_along(graph: fx.GraphModule, source: fx.Node, axis: int, length: int, cells: int) -> fx.Node:
    call = graph.graph.call_function
    if cells == 1:
        return call(aten.amax.default, (source, [axis], True))
    maxima = []
    for cell in range(cells):
        first, end = cell * length // cells, math.ceil((cell + 1) * length / cells)
        entries = call(aten.slice.Tensor, (source, axis, first, end))
        maxima.append(call(aten.amax.default, (entries, [axis], True)))
    return call(aten.cat.default, (maxima, axis))
