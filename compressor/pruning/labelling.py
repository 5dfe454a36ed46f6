"""A traced graph in, the labels of every node's result out: one walk over the operation table, parameters first.

New labels begin on every axis of every parameter; the operations hand them on. Knows no groups.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from ..graph import aten, fetch
from ..graph.neighbours import is_stored
from ..graph.operators import ALL_CONVOLUTIONS, arguments, weight_shape
from .handlers import Call, left_alone, unknown
from .kernels import KernelAxis, kernel_axes, kernel_labels
from .labels import Ledger, Result, Value, along, axes, facets_in, values_in
from .operations import handler_of
from .relations import freeze_all, spread_over_space

_KERNEL_SIDES = (3, 5, 7, 9, 11)


def label(graph: fx.GraphModule, tied: Collection[str], frozen: Collection[str]) -> tuple[Ledger, dict[str, Result]]:
    """What the walk tied, and what is known of every node's result, by the node's name.

    At nodes named in `tied` rows are tied to columns, at `frozen` nothing may go.
    """
    ledger = Ledger()
    results: dict[str, Result] = {}
    parameters: dict[int, Value] = {}
    grouped = set(_grouped_weights(graph))
    kernels = kernel_axes(graph)
    for node in graph.graph.nodes:
        match node.op:
            case "placeholder":
                results[node.name] = Value(tuple(node.meta["val"].shape))
            case "output":
                freeze_all(ledger, node.name, _call_of(node, results).args, "is the model's output")
            case "get_attr":
                name = str(node.target)
                value = _parameter(ledger, fetch(graph, name), name in grouped, kernels.get(name), parameters)
                if node.name in frozen:
                    freeze_all(ledger, node.name, value, "can't lose single units of a row")
                elif node.name in tied:
                    _tie_rows(ledger, value)
                results[node.name] = value
            case _:
                call = _call_of(node, results)
                if node.name in frozen:
                    freeze_all(ledger, node.name, call.passed, f"failed a trial without some channels at {node.target}")
                results[node.name] = _result(ledger, call)
                if node.name in tied:
                    _tie_rows(ledger, results[node.name])
    return ledger, results


def _call_of(node: fx.Node, results: Mapping[str, Result]) -> Call:
    def known(source: fx.Node) -> Any:  # no fx argument, which is all that fx's own types foresee
        return results[source.name]

    args, kwargs = fx.map_arg((node.args, node.kwargs), known)
    return Call(node, args, kwargs)


def _result(ledger: Ledger, call: Call) -> Result:
    """What is known of the node's result, from what is known of its arguments."""
    node = call.node
    if node.target is aten.sym_size.int:
        return call.input.shape[call.integer("dim")]
    meta = node.meta.get("val")
    if isinstance(meta, (Tensor, tuple, list)):
        return _handled(ledger, call)
    if list(values_in(call.passed)):  # a number that is read out of a tensor
        return unknown(ledger, call)
    size: Result = node.target(*call.args, **call.kwargs)  # type: ignore[operator]  # arithmetic on sizes
    return size


def _handled(ledger: Ledger, call: Call) -> Result:
    """What the operation's handler says; a form that it does not foresee is left alone, as if it had none.

    What it tied before it failed makes units coarser, never wrong.
    """
    try:
        return handler_of(call.node)(ledger, call)
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        reason = f"reaches {call.node.target} in a form that its pruning rule does not take ({type(error).__name__})"
        return left_alone(ledger, call, reason)


def _tie_rows(ledger: Ledger, tree: object) -> None:
    """Of [heads, d] labels, every head's become columns: a dimension goes from all heads at once."""
    for facet in facets_in(tree):
        *row_axes, last = axes(facet)
        if row_axes:
            columns = along(ledger.fresh(facet.shape[last]), last, facet.shape)
            ledger.relate_columns(columns, facet, row_axes)


def _grouped_weights(graph: fx.GraphModule) -> Iterator[str]:
    """Parameters that become the kernel of a grouped, not depthwise, convolution."""
    for node in filter(_is_grouped, graph.graph.nodes):
        for source in parameters_behind(node):
            if source.meta["val"].ndim >= 3:  # a kernel, not a vector it is scaled with
                yield str(source.target)


def _is_grouped(node: fx.Node) -> bool:
    """Whether a node is a convolution that parts its channels, into groups of more than one."""
    if node.target not in ALL_CONVOLUTIONS:
        return False
    groups = arguments(node)["groups"]
    return isinstance(groups, int) and groups > 1 and weight_shape(node)[1] > 1


def parameters_behind(layer: fx.Node) -> Iterator[fx.Node]:
    """Parameters that a layer's weight is computed from; mostly it is one itself."""
    front = [layer.args[1]]
    while front:
        source = front.pop()
        if is_stored(source):
            yield source
        elif isinstance(source, fx.Node):
            front += source.all_input_nodes


def _parameter(
    ledger: Ledger, tensor: Tensor, grouped: bool, kernel: KernelAxis | None, parameters: dict[int, Value]
) -> Value:
    """New labels on every axis of a parameter; `parameters` holds those met before, by `id`, and this one then."""
    if id(tensor) in parameters:  # tied parameters have the same labels
        return parameters[id(tensor)]
    shape = tuple(tensor.shape)
    if not tensor.is_floating_point():
        return Value(shape, (), tensor)

    labelled = [axis for axis, n in enumerate(shape) if n > 1 and axis not in _tap_axes(shape)]
    facets = [along(ledger.fresh(shape[axis]), axis, shape) for axis in labelled]
    if grouped and shape[1] > 1:  # the input channels of each group are its own
        joint = spread_over_space(ledger.fresh(*shape[:2]), shape)  # a label for each entry of [out, in / groups]
        facets = [*_beside(facets, 1), joint]
    if kernel is not None:
        ways = [along(labels, kernel.axis, shape) for labels in kernel_labels(ledger, kernel.shape)]
        facets = [*_beside(facets, kernel.axis), *ways]
    parameters[id(tensor)] = Value(shape, tuple(facets))
    return parameters[id(tensor)]


def _tap_axes(shape: Sequence[int]) -> tuple[int, ...]:
    """The last two of what looks like a kernel, [..., 3, 3]: no tap goes by itself.

    So a kernel may be laid out as a matrix, [out, in * 9], whose inputs go with all their taps.
    """
    rank = len(shape)
    is_kernel = rank >= 4 and shape[-1] == shape[-2] and shape[-1] in _KERNEL_SIDES
    return (rank - 2, rank - 1) if is_kernel else ()


def _beside(facets: Sequence[Tensor], axis: int) -> list[Tensor]:
    """The facets but that which lies on that axis alone."""
    return [facet for facet in facets if axes(facet) != (axis,)]
