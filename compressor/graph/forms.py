"""One form for what ATen has under several names: a traced graph with shapes in, the same function in fewer words.

Other names of an operation (`concat`, `swapaxes`) become its first one; a cast to the type that a tensor has, a copy
over the whole of another and a write to all of an axis become the tensor itself. So grouping, relevance and repair
handle one form.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx

from .neighbours import calls_of
from .operators import arguments

aten = torch.ops.aten

# each takes the same arguments, in the same order
_FIRST_NAMES: Mapping[object, Any] = {
    aten.concat.default: aten.cat.default,
    aten.concatenate.default: aten.cat.default,
    aten.swapaxes.default: aten.transpose.int,
    aten.swapdims.default: aten.transpose.int,
    aten.moveaxis.int: aten.movedim.int,
    aten.multiply.Tensor: aten.mul.Tensor,
    aten.subtract.Tensor: aten.sub.Tensor,
    aten.divide.Tensor: aten.div.Tensor,
    aten.true_divide.Tensor: aten.div.Tensor,
    aten.negative.default: aten.neg.default,
    aten.absolute.default: aten.abs.default,
    aten.clip.default: aten.clamp.default,
    aten.__and__.Tensor: aten.bitwise_and.Tensor,
    aten.__or__.Tensor: aten.bitwise_or.Tensor,
    aten.__xor__.Tensor: aten.bitwise_xor.Tensor,
    # what memory holds is no one's: a forward that writes all of it gives the same from zeros
    aten.empty_like.default: aten.zeros_like.default,
    aten.new_empty.default: aten.new_zeros.default,
}
_CASTS = (aten.to.dtype, aten.to.dtype_layout, aten._to_copy.default, aten.type_as.default)
_TO_THE_END = 1 << 62  # an end further on than any axis is long

Rewrite = Callable[[fx.Node], "fx.Node | None"]  # the node that says the same; None where this one does


def unify(graph: fx.GraphModule) -> None:
    """Rewrites the graph in place. New nodes carry the `val`, layer and place of what they say."""
    for node in calls_of(graph):
        node.target = _FIRST_NAMES.get(node.target, node.target)
        rewrite = _REWRITES.get(node.target, _as_it_is)
        same = rewrite(node)
        if same is not None:
            node.replace_all_uses_with(same)
            graph.graph.erase_node(node)
    graph.graph.eliminate_dead_code()
    graph.recompile()


def _as_it_is(node: fx.Node) -> fx.Node | None:
    """What has one form alone."""
    return None


def _value(node: fx.Node) -> Tensor:
    """What the trace says of a node that gives one tensor, as all do that are named here."""
    value = node.meta["val"]
    assert isinstance(value, Tensor)
    return value


def _cast(node: fx.Node) -> fx.Node | None:
    """`x.to(y.dtype)` and `x.type_as(y)`: x itself where it is of that type, else a cast that reads x alone."""
    source, dtype = node.args[0], _value(node).dtype
    assert isinstance(source, fx.Node)
    if _value(source).dtype == dtype:
        return source
    if node.target is aten.type_as.default:
        node.target, node.args = aten.to.dtype, (source, dtype)
    return None


def _copy(node: fx.Node) -> fx.Node | None:
    """`copy(x, y)`, x with all its values overwritten by y's: y, cast where the types differ."""
    source: fx.Node = arguments(node)["src"]
    before, after = _value(source), _value(node)
    if before.shape != after.shape:
        return None  # y is stretched over x
    if before.dtype == after.dtype:
        return source
    node.target, node.args, node.kwargs = aten.to.dtype, (source, after.dtype), {}
    return None


def _slice(node: fx.Node) -> fx.Node | None:
    """All of an axis (`x[:, 3]` reads all of the first) is the tensor."""
    settings = arguments(node)
    source: fx.Node = settings["self"]
    end = settings["end"]
    to_the_end = end is None or (isinstance(end, int) and end > _TO_THE_END)
    return source if to_the_end and settings["start"] in (None, 0) and settings["step"] == 1 else None


def _slice_scatter(node: fx.Node) -> fx.Node | None:
    """What is written over part of an axis, between what stays in front of it and behind; over all of it, itself.

    So what is written over may go as it likes, and the files hold a concatenation in place of a scatter.
    """
    settings = arguments(node)
    source: fx.Node = settings["self"]
    patch: fx.Node = settings["src"]
    axis = settings["dim"] % _value(node).ndim
    bounds = (settings["start"] or 0, _TO_THE_END if settings["end"] is None else settings["end"])
    is_fixed = all(isinstance(bound, int) for bound in bounds) and (axis > 0 or bounds[0] == 0)
    if not is_fixed or settings["step"] != 1 or _value(patch).dtype != _value(node).dtype:
        return None
    length = _value(node).shape[axis]
    start, end, _ = slice(*bounds).indices(length)
    if end - start == length and (axis > 0 or bounds[1] >= _TO_THE_END):
        return patch
    if axis == 0:
        return None  # some samples of a batch, whose length is free
    pieces = [patch]
    if start > 0:
        pieces.insert(0, _called(node, aten.slice.Tensor, source, axis, 0, start))
    if end < length:
        pieces.append(_called(node, aten.slice.Tensor, source, axis, end, _TO_THE_END + 1))
    return _called(node, aten.cat.default, pieces, axis)


def _select_scatter(node: fx.Node) -> fx.Node | None:
    """`x[:, 3] = y`, as writing y with an axis of one over `x[:, 3:4]`."""
    settings = arguments(node)
    patch, axis, index = settings["src"], settings["dim"], settings["index"]
    if not isinstance(index, int):
        return None
    axis %= _value(node).ndim
    end = _TO_THE_END + 1 if index == -1 else index + 1
    with node.graph.inserting_before(node):
        row = node.graph.call_function(aten.unsqueeze.default, (patch, axis))
    row.meta = {**node.meta, "val": _value(patch).unsqueeze(axis)}
    node.target, node.args, node.kwargs = aten.slice_scatter.default, (settings["self"], row, axis, index, end), {}
    return _slice_scatter(node)


def _stacked(axis: int) -> Rewrite:
    """`hstack` and the like of tensors that have the axis already."""

    def rewrite(node: fx.Node) -> None:
        pieces = arguments(node)["tensors"]
        if all(_value(piece).ndim > max(axis, 1) for piece in pieces):
            node.target, node.args, node.kwargs = aten.cat.default, (pieces, axis), {}

    return rewrite


def _empty(node: fx.Node) -> None:
    """Zeros, as for `empty_like`; they know no order in memory."""
    node.target = aten.zeros.default
    node.kwargs = {name: value for name, value in node.kwargs.items() if name != "memory_format"}


def _fill(node: fx.Node) -> None:
    """A tensor filled with one number, of which only the sizes are read."""
    node.target = aten.full_like.default


def _tile(node: fx.Node) -> None:
    """`repeat`, which wants a number for every axis."""
    settings = arguments(node)
    repeats = list(settings["dims"])
    repeats = [1] * (_value(settings["self"]).ndim - len(repeats)) + repeats  # of [C, H], (2,) is (1, 2)
    node.target, node.args, node.kwargs = aten.repeat.default, (settings["self"], repeats), {}


def _var_mean(node: fx.Node) -> None:
    """`var` and `mean`, of which each reader wants one."""
    settings = arguments(node)
    over = (settings["self"], settings["dim"])
    for reader in list(node.users):
        assert reader.target is operator.getitem
        with node.graph.inserting_before(node):
            if reader.args[1] == 1:
                part = node.graph.call_function(aten.mean.dim, (*over, settings["keepdim"]))
            elif node.target is aten.var_mean.dim:
                part = node.graph.call_function(aten.var.dim, (*over, settings["unbiased"], settings["keepdim"]))
            else:
                kept = {name: settings[name] for name in ("correction", "keepdim")}
                part = node.graph.call_function(aten.var.correction, over, kept)
        part.meta = dict(reader.meta)
        reader.replace_all_uses_with(part)


def _expand(node: fx.Node) -> fx.Node | None:
    """`x / norm.expand_as(x)`: the norm itself where every reader stretches it to the length of its other operand.

    So that nothing says how long the axis is: channels of x may go.
    """
    source: fx.Node = arguments(node)["self"]
    return source if node.users and all(_stretches(user, node) for user in node.users) else None


def _gather(node: fx.Node) -> None:
    """At places that were stretched over other axes: `take_along_dim`, which stretches them itself.

    So that nothing says how long those axes are: channels that are read at the same places may go.
    """
    settings = arguments(node)
    places: fx.Node = settings["index"]
    axis = settings["dim"] % _value(node).ndim
    source = places.args[0] if places.target in (aten.expand.default, aten.repeat.default) else None
    if not isinstance(source, fx.Node) or _value(source).ndim != _value(node).ndim:
        return
    read, before, after = (_value(each).shape for each in (settings["self"], source, places))
    is_stretched = all(
        old == new or (old == 1 and other != axis and new == read[other])
        for other, (old, new) in enumerate(zip(before, after, strict=True))
    )
    if is_stretched:
        node.target = aten.take_along_dim.default
        node.args, node.kwargs = (settings["self"], source, axis), {}


def _stretches(operation: fx.Node, operand: fx.Node) -> bool:
    """Whether an operation has another operand, itself not stretched, of the shape that this one was brought to."""
    if operation.target not in _STRETCHING:
        return False
    others = [other for other in operation.args[:2] if other is not operand]
    if len(others) != 1 or not isinstance(others[0], fx.Node) or others[0].target is aten.expand.default:
        return False
    value = others[0].meta.get("val")
    return isinstance(value, Tensor) and value.shape == _value(operand).shape


def _distances(node: fx.Node) -> fx.Node | None:
    """`cdist` as differences, but where PyTorch itself takes matrix products: so that a few rows are exact.

    Raised to 1e-30 in front of the root, whose gradient at 0 is no number. Other norms than the first two stay.
    """
    settings = arguments(node)
    left, right, norm = settings["x1"], settings["x2"], settings["p"]
    if norm not in (1, 2) or (norm == 2 and _by_products(_value(left), _value(right), settings["compute_mode"])):
        return None
    rows = _called(node, aten.unsqueeze.default, left, -2)  # [..., P, 1, C]
    others = _called(node, aten.unsqueeze.default, right, -3)  # [..., 1, R, C]
    apart = _called(node, aten.sub.Tensor, rows, others)
    if norm == 1:
        return _called(node, aten.sum.dim_IntList, _called(node, aten.abs.default, apart), [-1])
    squares = _called(node, aten.sum.dim_IntList, _called(node, aten.mul.Tensor, apart, apart), [-1])
    return _called(node, aten.sqrt.default, _called(node, aten.clamp_min.default, squares, 1e-30))


def _by_products(left: Tensor, right: Tensor, mode: int | None) -> bool:
    """Whether `cdist` would: always (1), never (2), or from so many rows on."""
    rows = max(left.shape[-2], right.shape[-2])
    return mode == 1 or (mode in (None, 0) and rows > _ROWS_FOR_PRODUCTS)


def _called(node: fx.Node, operation: Any, *args: Any) -> fx.Node:
    """A new node in front of the given one, with its layer and place and a `val` of its own."""
    with node.graph.inserting_before(node):
        call = node.graph.call_function(operation, args)
    values = fx.map_arg(args, lambda source: source.meta["val"])
    call.meta = {**node.meta, "val": operation(*values)}
    return call


_ROWS_FOR_PRODUCTS = 25  # as in PyTorch's own cdist
_STRETCHING = (
    *(aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.div.Tensor, aten.maximum.default, aten.minimum.default),
    *(aten.pow.Tensor_Tensor, aten.atan2.default),
)
_REWRITES: Mapping[object, Rewrite] = {
    aten.var_mean.dim: _var_mean,
    aten.var_mean.correction: _var_mean,
    aten.expand.default: _expand,
    aten.cdist.default: _distances,
    aten.gather.default: _gather,
    **dict.fromkeys(_CASTS, _cast),
    aten.copy.default: _copy,
    aten.slice.Tensor: _slice,
    aten.slice_scatter.default: _slice_scatter,
    aten.select_scatter.default: _select_scatter,
    aten.hstack.default: _stacked(1),
    aten.vstack.default: _stacked(0),
    aten.dstack.default: _stacked(2),
    aten.tile.default: _tile,
    aten.empty.memory_format: _empty,
    aten.fill.Scalar: _fill,
}
