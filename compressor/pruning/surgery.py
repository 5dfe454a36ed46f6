"""Removal: (graph, structure, plan) -> a graph with smaller tensors, same node and parameter names.

Parameters lose the coordinates whose labels go; integer arguments (sizes, slice bounds, group counts) are
rewritten from the widths that remain, so that no attribute of any module has to follow. The softmax scale
stays the trained one. The graph that came in is not touched.
"""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from ..errors import ModelError
from ..graph import aten, fetch, store
from ..graph.operators import ALL_CONVOLUTIONS
from ..records import IntArray, Plan, Slices
from .labels import Value
from .structure import Keep, Lying, Structure


class RaggedError(Exception):
    """What would remain of a tensor is not a box; the check turns it into a finding at `node`."""

    node = ""


def removed_classes(structure: Structure, kept: Mapping[str, IntArray]) -> Keep:
    """[classes] true where a plan removes the class: units not kept, and everything in rows not kept."""
    gone = np.zeros(len(structure.classes.parent), dtype=bool)
    for name, units in kept.items():
        if name not in structure.members:
            raise ModelError(f"the plan names group '{name}', which this model does not have; rebuild the plan")
        members = structure.members[name]
        goes = np.ones(structure.groups[name].size, dtype=bool)
        goes[units] = False
        gone[members[goes[structure.unit_of[members]]]] = True
    parent = structure.classes.parent
    inside = parent > 0
    before = -1
    while before != (before := int(gone.sum())):  # rows of rows
        gone[inside] |= gone[parent[inside]]
    gone[0] = False
    return gone


def prune(
    graph: fx.GraphModule, structure: Structure, plan: Plan | Mapping[str, IntArray], *, share: bool = False
) -> tuple[fx.GraphModule, Slices]:
    """The pruned graph and what stayed of each parameter. Raises ModelError for a plan of another model.

    A plan, or the units it keeps of each group. With `share`, parameters that lose nothing are the graph's own and no
    code is made: quicker, for a trial that is run node by node and writes no parameter in place.
    """
    return remove(graph, structure, removed_classes(structure, _kept_of(plan)), share=share)


def _kept_of(plan: Plan | Mapping[str, IntArray]) -> Mapping[str, IntArray]:
    return plan.kept if isinstance(plan, Plan) else plan


def slices_of(graph: fx.GraphModule, structure: Structure, plan: Plan | Mapping[str, IntArray]) -> Slices:
    """What stays of each parameter that a plan cuts; no tensor is copied. Raises ModelError as `prune` does."""
    gone = removed_classes(structure, _kept_of(plan))
    stays: dict[str, tuple[IntArray, ...]] = {}
    for node in graph.graph.nodes:
        if node.op == "get_attr" and _is_cut(structure.lying(node), gone):
            shape = fetch(graph, str(node.target)).shape
            stays[str(node.target)] = _kept_of_axes(shape, structure.lying(node), gone)
    return Slices(stays)


def remove(
    graph: fx.GraphModule, structure: Structure, gone: Keep, *, share: bool = False
) -> tuple[fx.GraphModule, Slices]:
    """The graph without the classes that are gone. Raises RaggedError, naming the node, where no box remains."""
    small = _shared(graph) if share else _copied(graph, structure, gone)
    kept: dict[str, tuple[IntArray, ...]] = {}
    done: dict[int, Tensor] = {}
    touched = structure.touched(gone)
    for node in small.graph.nodes:
        loses = node.name in touched
        # a slice or a split may lose nothing itself and still begin elsewhere in what it is cut from
        if not loses and not any(source.name in touched for source in node.all_input_nodes):
            continue
        try:
            if node.op == "get_attr":
                _cut_parameter(small, node, structure, gone, kept, done)
            elif node.target in REWRITES:
                REWRITES[node.target](node, structure, gone)
            if loses:
                node.meta = {**node.meta, "val": _shrunk(node.meta.get("val"), node, structure, gone)}
        except RaggedError as error:
            error.node = node.name
            raise
    if not share:
        small.recompile()
    return small, Slices(kept)


def _shared(graph: fx.GraphModule) -> fx.GraphModule:
    """A copy of the nodes, over the graph's own tensors; it has no code of its own, so it is run node by node."""
    twin: fx.GraphModule = fx.GraphModule.__new__(fx.GraphModule)
    nn.Module.__init__(twin)
    for path, module in graph.named_modules(remove_duplicate=False):
        owner: nn.Module = twin
        if path:
            parent, _, name = path.rpartition(".")
            owner = nn.Module()
            twin.get_submodule(parent).add_module(name, owner)
        owner._parameters.update(module._parameters)
        owner._buffers.update(module._buffers)
        owner.training = module.training
    twin._graph = copy.deepcopy(graph.graph)
    return twin


def _copied(graph: fx.GraphModule, structure: Structure, gone: Keep) -> fx.GraphModule:
    """A copy in which parameters that are cut next are still the graph's own, so that none is ever held twice."""
    names = Counter(
        id(tensor)
        for tensors in (graph.named_parameters, graph.named_buffers)
        for _, tensor in tensors(remove_duplicate=False)
    )
    read = [node for node in graph.graph.nodes if node.op == "get_attr" and _is_cut(structure.lying(node), gone)]
    cut = [fetch(graph, str(node.target)) for node in read]
    return copy.deepcopy(graph, {id(tensor): tensor for tensor in cut if names[id(tensor)] == 1})


def _is_cut(lying: Sequence[Lying], gone: Keep) -> bool:
    return any(gone[classes].any() for _, classes in lying)


def _cut_parameter(
    graph: fx.GraphModule,
    node: fx.Node,
    structure: Structure,
    gone: Keep,
    kept: dict[str, tuple[IntArray, ...]],
    done: dict[int, Tensor],
) -> None:
    lying = structure.lying(node)
    tensor = fetch(graph, str(node.target))
    if node.target in kept or not _is_cut(lying, gone):
        return
    if id(tensor) not in done:  # tied parameters stay tied
        cut = compact(tensor.detach(), lying, gone).clone()
        done[id(tensor)] = nn.Parameter(cut) if isinstance(tensor, nn.Parameter) else cut
    kept[str(node.target)] = _kept_of_axes(tensor.shape, lying, gone)
    store(graph, str(node.target), done[id(tensor)])


def _kept_of_axes(shape: Sequence[int], lying: Sequence[Lying], gone: Keep) -> tuple[IntArray, ...]:
    """The coordinates that stay on each axis."""
    return tuple(_kept_along(lying, axis, size, gone) for axis, size in enumerate(shape))


def _kept_along(lying: Sequence[Lying], axis: int, size: int, gone: Keep) -> IntArray:
    keep = np.ones(size, dtype=bool)
    for over, classes in lying:
        if over == (axis,):
            keep &= ~gone[classes]
    return np.flatnonzero(keep)


def compact(tensor: Tensor, lying: Sequence[Lying], gone: Keep) -> Tensor:
    """The tensor without the coordinates whose classes are gone. Raises RaggedError when that is not a box."""
    for over, keep in _cuts(lying, gone):
        if keep.ndim == 1:
            tensor = tensor.index_select(over[0], torch.from_numpy(np.flatnonzero(keep)).to(tensor.device))
        else:
            tensor = _squeeze_rows(tensor, over, keep)
    return tensor


def _cuts(lying: Sequence[Lying], gone: Keep) -> Iterator[tuple[tuple[int, ...], Keep]]:
    """What stays, cut after cut: of a whole axis, or of the last of several axes, row by row."""
    keeps = [(over, ~gone[classes]) for over, classes in lying if gone[classes].any()]
    for i, (over, keep) in enumerate(keeps):
        for position, axis in enumerate(over):  # whole slices first
            others = tuple(p for p in range(keep.ndim) if p != position)
            stays: Keep = np.asarray(keep.any(axis=others) if others else keep)
            if not stays.all():
                yield (axis,), stays
                index = np.flatnonzero(stays)
                keep = np.take(keep, index, axis=position)
                keeps[i + 1 :] = [_sliced(entry, axis, index) for entry in keeps[i + 1 :]]
        if not keep.all():
            yield over, keep
            keeps[i + 1 :] = [_refuse(entry, over[-1]) for entry in keeps[i + 1 :]]


def _sliced(entry: tuple[tuple[int, ...], Keep], axis: int, index: IntArray) -> tuple[tuple[int, ...], Keep]:
    over, keep = entry
    return (over, np.take(keep, index, axis=over.index(axis))) if axis in over else entry


def _refuse(entry: tuple[tuple[int, ...], Keep], axis: int) -> tuple[tuple[int, ...], Keep]:
    if axis in entry[0]:
        raise RaggedError("one axis is thinned row by row and also as a whole")
    return entry


def _squeeze_rows(tensor: Tensor, over: tuple[int, ...], keep: Keep) -> Tensor:
    """Rows that lose different coordinates of the last axis they lie on, the same number each."""
    count = _count_of_rows(keep)
    index = torch.from_numpy(np.argsort(~keep, axis=-1, kind="stable")[..., :count].copy()).to(tensor.device)
    shape = [1] * tensor.ndim
    for position, axis in enumerate(over):
        shape[axis] = index.shape[position]
    sizes = list(tensor.shape)
    sizes[over[-1]] = count
    return tensor.gather(over[-1], index.reshape(shape).expand(sizes))


def _count_of_rows(keep: Keep) -> int:
    counts = np.unique(keep.sum(axis=-1))
    if len(counts) > 1:
        raise RaggedError(f"rows would keep {counts.min()} to {counts.max()} units; they must keep equal counts")
    return int(counts[0])


def compact_shape(shape: Sequence[int], lying: Sequence[Lying], gone: Keep) -> tuple[int, ...]:
    """The sizes `compact` would give, for a tensor of that shape; no tensor is made."""
    sizes = list(shape)
    for over, keep in _cuts(lying, gone):
        sizes[over[-1]] = int(np.count_nonzero(keep)) if keep.ndim == 1 else _count_of_rows(keep)
    return tuple(sizes)


def _shrunk(meta: Any, node: fx.Node, structure: Structure, gone: Keep) -> Any:
    """What the trace says of a node's result, for what remains of it."""
    value = structure.values[node.name]
    if isinstance(value, Value):
        return _shrunk_tensor(meta, value, structure.lying(node), gone)
    return _shrunk_tree(meta, value, structure, gone)


def _shrunk_tree(meta: Any, value: Any, structure: Structure, gone: Keep) -> Any:
    if isinstance(value, Value):
        return _shrunk_tensor(meta, value, _lying_of(value, structure), gone)
    if isinstance(meta, (tuple, list)) and isinstance(value, (tuple, list)):
        return type(meta)(_shrunk_tree(m, v, structure, gone) for m, v in zip(meta, value, strict=True))
    return meta


def _shrunk_tensor(meta: Any, value: Value, lying: Sequence[Lying], gone: Keep) -> Any:
    if not isinstance(meta, Tensor):
        return meta
    return torch.empty(compact_shape(value.shape, lying, gone), dtype=meta.dtype, device="meta")


# -- integer arguments


def _lying_of(value: Any, structure: Structure) -> list[Lying]:
    return [structure.classes(f) for f in value.facets] if isinstance(value, Value) else []


def _arguments(node: fx.Node) -> list[Any]:
    return list(node.args)


def _out_shape(node: fx.Node, structure: Structure, gone: Keep, part: int | None = None) -> tuple[int, ...]:
    value: Any = structure.values[node.name]
    if part is None:
        return compact_shape(value.shape, structure.lying(node), gone)
    return compact_shape(value[part].shape, _lying_of(value[part], structure), gone)


def _resize(position: int) -> Any:
    def rule(node: fx.Node, structure: Structure, gone: Keep) -> None:
        before, after = structure.shape(node), _out_shape(node, structure, gone)
        sizes = list(_arguments(node)[position])
        offset = len(before) - len(sizes)
        for i, size in enumerate(sizes):
            if size == -1 or before[i + offset] == after[i + offset]:
                continue
            # a size computed from the batch (batch x heads) is left to the reshape to find
            sizes[i] = after[i + offset] if isinstance(size, int) else -1
        node.update_arg(position, sizes)

    return rule


def _unflatten(node: fx.Node, structure: Structure, gone: Keep) -> None:
    source, axis, parts = _arguments(node)
    axis %= len(structure.shape(source))
    after = _out_shape(node, structure, gone)
    sizes = [s if s == -1 else after[axis + i] for i, s in enumerate(parts)]
    node.update_arg(2, sizes)


def _kept_before(source: fx.Node, axis: int, position: int, structure: Structure, gone: Keep) -> int:
    """How many coordinates of `axis` before `position` remain."""
    shape = list(structure.shape(source))
    axis %= len(shape)
    lying = []
    for over, classes in structure.lying(source):
        if axis in over:
            classes = np.take(classes, np.arange(min(position, shape[axis])), axis=over.index(axis))
        lying.append((over, classes))
    shape[axis] = min(position, shape[axis])
    if 0 in shape:
        return 0
    return compact_shape(shape, lying, gone)[axis]


def _thinned(source: fx.Node, axis: int, structure: Structure, gone: Keep) -> bool:
    axis %= len(structure.shape(source))
    return any(axis in over and gone[classes].any() for over, classes in structure.lying(source))


def _bounds(first: int) -> Any:
    """Slices: `first` is the position of (axis, start, end, step) among the arguments.

    Neighbours within a stride go together: of [a b c d], 1::2 without a and b is still the second of two.
    """

    def rule(node: fx.Node, structure: Structure, gone: Keep) -> None:
        source, given = _arguments(node)[0], _arguments(node)[first:]
        defaults: list[Any] = [0, None, None, 1]
        axis, start, end, step = given + defaults[len(given) :]
        if not _thinned(source, axis, structure, gone):
            return
        size = structure.shape(source)[axis]
        if not all(isinstance(b, int) for b in (start or 0, size if end is None else end)):
            return
        start, end, _ = slice(start, end).indices(size)
        phase, count = start % step, max(0, -((start - end) // step))
        before = start - phase
        bounds = [_kept_before(source, axis, b, structure, gone) for b in (before, before + count * step)]
        node.args = (*node.args[:first], axis, bounds[0] + phase, bounds[1], step)

    return rule


def _select(node: fx.Node, structure: Structure, gone: Keep) -> None:
    source, axis, position = _arguments(node)
    if isinstance(position, int) and _thinned(source, axis, structure, gone):
        size = structure.shape(source)[axis]
        node.update_arg(2, _kept_before(source, axis, position % size, structure, gone))


def _split(node: fx.Node, structure: Structure, gone: Keep) -> None:
    source, _, *rest = _arguments(node)
    axis: Any = rest[0] if rest else node.kwargs.get("dim", 0)
    if not _thinned(source, axis, structure, gone):
        return
    parts: Any = structure.values[node.name]
    sizes = [_out_shape(node, structure, gone, i)[axis] for i in range(len(parts))]
    node.target = aten.split_with_sizes.default
    node.args, node.kwargs = (source, sizes, axis), {}


def _layer_norm(node: fx.Node, structure: Structure, gone: Keep) -> None:
    after = _out_shape(node, structure, gone)
    node.update_arg(1, list(after[len(after) - len(_arguments(node)[1]) :]))


def _groups(node: fx.Node, structure: Structure, gone: Keep) -> None:
    arguments = _arguments(node)
    if len(arguments) <= 6 or not isinstance(arguments[6], int) or arguments[6] == 1:
        return
    channels, kernel = _out_shape(arguments[0], structure, gone)[1], _out_shape(arguments[1], structure, gone)
    transposed = "transpose" in str(node.target)
    # a transposed kernel is [in, out / groups]: its inputs per group are known only through its outputs
    n = _out_shape(node, structure, gone)[1] // kernel[1] if transposed else channels // kernel[1]
    node.update_arg(6, n)


def _pad(node: fx.Node, structure: Structure, gone: Keep) -> None:
    source, amounts = _arguments(node)[0], list(_arguments(node)[1])
    before, after = structure.shape(source), structure.shape(node)
    for i in range(len(amounts) // 2):
        axis = len(after) - 1 - i
        if not _thinned(node, axis, structure, gone):
            continue
        left = _kept_before(node, axis, amounts[2 * i], structure, gone)
        middle = _kept_before(node, axis, amounts[2 * i] + before[axis], structure, gone)
        amounts[2 * i], amounts[2 * i + 1] = left, _out_shape(node, structure, gone)[axis] - middle
    node.update_arg(1, amounts)


def _attention_scale(node: fx.Node, structure: Structure, gone: Keep) -> None:
    """Thinner heads keep the scale they were trained with; what loses nothing stays as it is written."""
    query = _arguments(node)[0]
    if node.kwargs.get("scale") is None and _thinned(query, -1, structure, gone):
        width = structure.shape(query)[-1]
        node.kwargs = {**node.kwargs, "scale": 1.0 / math.sqrt(width)}


REWRITES: dict[Any, Any] = {
    aten.reshape.default: _resize(1),
    aten.view.default: _resize(1),
    aten.expand.default: _resize(1),
    **dict.fromkeys((aten.zeros.default, aten.ones.default, aten.full.default, aten.empty.memory_format), _resize(0)),
    **dict.fromkeys((aten.new_zeros.default, aten.new_ones.default, aten.new_full.default), _resize(1)),
    aten.new_empty.default: _resize(1),
    aten.unflatten.int: _unflatten,
    aten.slice.Tensor: _bounds(1),
    aten.slice_scatter.default: _bounds(2),
    aten.select.int: _select,
    aten.split.Tensor: _split,
    aten.split_with_sizes.default: _split,
    aten.chunk.default: _split,
    aten.layer_norm.default: _layer_norm,
    aten.rms_norm.default: _layer_norm,
    aten.pad.default: _pad,
    aten.constant_pad_nd.default: _pad,
    aten.scaled_dot_product_attention.default: _attention_scale,
    **dict.fromkeys(ALL_CONVOLUTIONS, _groups),
}
