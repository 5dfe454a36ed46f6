"""Operations that move values: run on the labels themselves, or joined, padded and overwritten label by label.

One handler for each family of ATen operations, in `TABLE`. Knows no arithmetic: that is in `arithmetic.py`.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from ..graph import aten
from .handlers import Args, Kwargs, Table, argument_at, shape_of, unknown
from .labels import Ledger, Value, along, axes, compress, first_along, reduce_to
from .relations import Operand, freeze_all, merge

# in place of a tensor among the arguments whose content is not known: an index that depends on the image
_UNKNOWN = object()
TABLE = Table()


@TABLE.handles(
    aten.reshape.default,
    aten.view.default,
    aten.permute.default,
    aten.transpose.int,
    aten.t.default,
    aten.select.int,
    aten.unsqueeze.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.squeeze.default,
    aten.expand.default,
    aten.split.Tensor,
    aten.split_with_sizes.default,
    aten.chunk.default,
    aten.unbind.int,
    aten.flip.default,
    aten.roll.default,
    aten.repeat.default,
    aten.repeat_interleave.self_int,
    aten.narrow.default,
    aten.movedim.int,
    aten.flatten.using_ints,
    aten.unflatten.int,
    aten.unfold.default,
    aten.index_select.default,
    aten.index.Tensor,
    aten.pixel_shuffle.default,
    aten.pixel_unshuffle.default,
    aten.channel_shuffle.default,
    aten.rot90.default,
    aten.tril.default,
    aten.triu.default,
)
def movement(ledger: Ledger, node: fx.Node, args: Args, kwargs: Kwargs) -> Any:
    """Elements go to new places and labels with them: the operation is run on every facet, and on known content."""
    x = args[0]
    settings = [_content(argument) for argument in args[1:]]
    if _has_unknown(settings):
        return unknown(ledger, node, args, kwargs)
    move: Callable[..., Any] = node.target  # type: ignore[assignment]
    moved = [move(facet, *settings, **kwargs) for facet in x.facets]
    content = None if x.content is None else move(x.content, *settings, **kwargs)

    meta = node.meta["val"]
    if isinstance(meta, Tensor):
        return Value(tuple(meta.shape), _lasting(ledger, node, moved), content)
    pieces = []
    for i, piece in enumerate(meta):  # of a split, each entry of `moved` is one facet's pieces
        facets = _lasting(ledger, node, [facet_pieces[i] for facet_pieces in moved])
        pieces.append(Value(tuple(piece.shape), facets, None if content is None else content[i]))
    return tuple(pieces)


@TABLE.handles(aten.slice.Tensor)
def cut(ledger: Ledger, node: fx.Node, args: Args, kwargs: Kwargs) -> Any:
    """Every second coordinate stays every second one only when neighbours go together."""
    x, step = args[0], argument_at(args, 4, 1)
    axis = argument_at(args, 1, 0) % len(x.shape)
    if step > 1:
        _tie_strides(ledger, node, x, axis, step)
    return movement(ledger, node, args, kwargs)


def _tie_strides(ledger: Ledger, node: fx.Node, x: Value, axis: int, step: int) -> None:
    for facet in x.facets:
        if axis not in axes(facet):
            continue
        if facet.shape[axis] % step:
            ledger.freeze(facet, node.name, "is taken in strides that do not divide it")
            continue
        # [..., 6, ...] in steps of 2: [..., 3, 2, ...]
        strides: Tensor = facet.unflatten(axis, (-1, step))  # type: ignore[no-untyped-call]
        ledger.tie(strides, strides.narrow(axis + 1, 0, 1))


def _content(argument: Any) -> Any:
    """The argument with tensors in place of Values, `_UNKNOWN` where none is known."""
    if isinstance(argument, Value):
        return _UNKNOWN if argument.content is None else argument.content
    if isinstance(argument, (list, tuple)):
        return [_content(entry) for entry in argument]
    return argument


def _has_unknown(contents: Sequence[object]) -> bool:
    return any(entry is _UNKNOWN or (isinstance(entry, list) and _has_unknown(entry)) for entry in contents)


def _lasting(ledger: Ledger, node: fx.Node, facets: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Facets that still vary; one that shrank to a single label would empty the tensor with it."""
    compressed = [compress(facet) for facet in facets]
    for facet in compressed:
        if not axes(facet) and facet.numel() and bool(facet.reshape(-1)[0] != 0):
            ledger.freeze(facet, node.name, "is taken out alone")
    return tuple(facet for facet in compressed if axes(facet))


@TABLE.handles(aten.cat.default)
def concatenate(ledger: Ledger, node: fx.Node, args: Args, kwargs: Kwargs) -> Value:
    """Labels along the joined axis lie one behind another, those across it meet as in a sum."""
    shape = shape_of(node)
    axis = argument_at(args, 1, kwargs.get("dim", 0)) % len(shape)
    pieces = [piece for piece in args[0] if 0 not in piece.shape]

    operands: list[Operand] = []
    for piece in pieces:
        across = [first_along(facet, [axis]).expand(*shape) for facet in piece.facets if axis not in axes(facet)]
        sizes = [1 if i == axis else n for i, n in enumerate(piece.shape)]
        operands.append((across, sizes))
    merged = merge(ledger, operands, shape, node.name)

    labels = []
    for piece in pieces:
        joined_axis = [facet for facet in piece.facets if axis in axes(facet)]
        for extra in joined_axis[1:]:
            ledger.freeze(extra, node.name, "is joined in two ways at once")
        unlabelled = torch.zeros((), dtype=torch.int64).expand(piece.shape)  # 0: what never goes
        labels.append(joined_axis[0] if joined_axis else unlabelled)
    joined = compress(torch.cat(labels, axis))
    return Value(shape, (*merged, joined) if axes(joined) else merged)


@TABLE.handles(aten.stack.default)
def stack(ledger: Ledger, node: fx.Node, args: Args, kwargs: Kwargs) -> Value:
    """The new axis has no labels; those of the stacked tensors meet as in a sum."""
    shape = shape_of(node)
    axis = argument_at(args, 1, kwargs.get("dim", 0)) % len(shape)
    operands: list[Operand] = []
    for piece in args[0]:
        sizes = [*piece.shape[:axis], 1, *piece.shape[axis:]]  # [N, C] on a new axis 1: [N, 1, C]
        operands.append(([facet.unsqueeze(axis).expand(*shape) for facet in piece.facets], sizes))
    return Value(shape, merge(ledger, operands, shape, node.name))


@TABLE.handles(aten.slice_scatter.default)
def slice_scatter(ledger: Ledger, node: fx.Node, args: Args, kwargs: Kwargs) -> Value:
    """A tensor with part of an axis written over. What lies on the same axes in both goes on; the rest freezes."""
    x, patch = args[0], args[1]
    settings = list(args[2:])  # axis, start, end, step
    axis = (settings[0] if settings else 0) % len(x.shape)
    pairs = [(old, new) for old in x.facets for new in patch.facets if axes(old) == axes(new)]
    paired = {id(facet) for pair in pairs for facet in pair}
    freeze_all(ledger, node.name, _without(x, paired), "is partly overwritten")
    freeze_all(ledger, node.name, _without(patch, paired), "overwrites a part")

    facets = []
    for old, new in pairs:
        if axis in axes(old):
            facets.append(aten.slice_scatter.default(old.contiguous(), new.contiguous(), *settings, **kwargs))
        else:
            ledger.tie(first_along(old, [axis]), first_along(new, [axis]))
            facets.append(old)
    compressed = [compress(facet) for facet in facets]
    return Value(x.shape, tuple(facet for facet in compressed if axes(facet)))


def _without(value: Value, paired: Collection[int]) -> Value:
    """The value with its facets that are not among those, named by `id`."""
    return Value(value.shape, tuple(facet for facet in value.facets if id(facet) not in paired))


@TABLE.handles(aten.pad.default, aten.constant_pad_nd.default)
def pad(ledger: Ledger, node: fx.Node, args: Args, kwargs: Kwargs) -> Value:
    """Padded coordinates of a labelled axis are units of their own: zeros that nobody produced."""
    x, amounts = args[0], list(args[1])
    shape = shape_of(node)
    # before and after of the last axis, then of the one before it: (1, 1, 2, 0) pads W by 1, 1 and H by 2, 0
    before = {len(shape) - 1 - i: amounts[2 * i] for i in range(len(amounts) // 2)}
    padded = [len(shape) - 1 - i for i in range(len(amounts) // 2) if amounts[2 * i] or amounts[2 * i + 1]]
    constant = node.target is aten.constant_pad_nd.default or argument_at(args, 2, "constant") == "constant"

    facets = []
    for facet in x.facets:
        over = axes(facet)
        if not set(over) & set(padded):
            facets.append(first_along(facet, set(range(facet.ndim)) - set(over)).expand(*shape))
        elif len(over) == 1 and constant:
            axis = over[0]
            labels = ledger.fresh(shape[axis])
            # 3 channels padded by 1 and 2: new a b c d e f, of which b c d become those of the tensor
            labels[before[axis] : before[axis] + x.shape[axis]] = reduce_to(facet, over)
            facets.append(along(labels, axis, shape))
        else:
            ledger.freeze(facet, node.name, "is padded together with another axis")
    return Value(shape, tuple(facets))


@TABLE.handles(aten.glu.default)
def gated_linear_unit(ledger: Ledger, node: fx.Node, args: Args, kwargs: Kwargs) -> Value:
    """One half times the sigmoid of the other: both halves' labels meet."""
    x = args[0]
    axis = argument_at(args, 1, -1) % len(x.shape)
    shape = shape_of(node)
    passed = [compress(facet.chunk(2, axis)[0]) for facet in x.facets]
    gates = [compress(facet.chunk(2, axis)[1]) for facet in x.facets]
    return Value(shape, merge(ledger, [(passed, shape), (gates, shape)], shape, node.name))


@TABLE.handles(aten.embedding.default)
def embedding(ledger: Ledger, node: fx.Node, args: Args, kwargs: Kwargs) -> Value:
    """Columns of the table [rows, d] become the last axis; its rows are chosen by number and never go."""
    table, shape = args[0], shape_of(node)
    columns = [facet for facet in table.facets if axes(facet) == (1,)]
    facets = tuple(along(reduce_to(facet, (1,)), len(shape) - 1, shape) for facet in columns)
    freeze_all(ledger, node.name, _without(table, {id(facet) for facet in columns}), "is a table's row")
    return Value(shape, facets)


@TABLE.handles(operator.getitem)
def item(ledger: Ledger, node: fx.Node, args: Args, kwargs: Kwargs) -> Any:
    """One of several results."""
    return args[0][args[1]]


@TABLE.handles(aten.dropout.default)
def passing(ledger: Ledger, node: fx.Node, args: Args, kwargs: Kwargs) -> Value:
    """In evaluation the tensor itself."""
    return Value(args[0].shape, args[0].facets)
