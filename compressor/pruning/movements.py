"""Operations that move values: run on the labels themselves, or joined, padded and overwritten label by label."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from ..graph import aten
from .handlers import Table, shape_of, unknown
from .labels import Ledger, Value, along, axes, compress, reduce_to
from .relations import freeze_all, merge

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
def movement(ledger: Ledger, node: fx.Node, args: list[Any], kwargs: dict[str, Any]) -> Any:
    x = args[0]
    rest = [_content(a) for a in args[1:]]
    if _has_unknown(rest):
        return unknown(ledger, node, args, kwargs)
    move: Callable[..., Any] = node.target  # type: ignore[assignment]
    meta = node.meta["val"]
    moved = [move(f, *rest, **kwargs) for f in x.facets]
    content = None if x.content is None else move(x.content, *rest, **kwargs)
    if isinstance(meta, Tensor):
        return Value(tuple(meta.shape), _lasting(ledger, node, moved), content)
    return tuple(
        Value(tuple(m.shape), _lasting(ledger, node, [p[i] for p in moved]), None if content is None else content[i])
        for i, m in enumerate(meta)
    )


@TABLE.handles(aten.slice.Tensor)
def cut(ledger: Ledger, node: fx.Node, args: list[Any], kwargs: dict[str, Any]) -> Any:
    """Every second coordinate stays every second one only when neighbours go together."""
    x, step = args[0], args[4] if len(args) > 4 else 1
    axis = (args[1] if len(args) > 1 else 0) % len(x.shape)
    for facet in x.facets if step > 1 else ():
        if axis not in axes(facet):
            continue
        if facet.shape[axis] % step:
            ledger.freeze(facet, node.name, "is taken in strides that do not divide it")
        else:
            parts = facet.unflatten(axis, (-1, step))
            ledger.tie(parts, parts.narrow(axis + 1, 0, 1))
    return movement(ledger, node, args, kwargs)


def _content(arg: Any) -> Any:
    if isinstance(arg, Value):
        return _UNKNOWN if arg.content is None else arg.content
    if isinstance(arg, (list, tuple)):
        return [_content(a) for a in arg]
    return arg


def _has_unknown(args: Any) -> bool:
    return any(a is _UNKNOWN or (isinstance(a, list) and _has_unknown(a)) for a in args)


def _lasting(ledger: Ledger, node: fx.Node, facets: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Facets that still vary; one that shrank to a single label would empty the tensor with it."""
    found = [compress(f) for f in facets]
    for facet in found:
        if not axes(facet) and facet.numel() and bool(facet.reshape(-1)[0] != 0):
            ledger.freeze(facet, node.name, "is taken out alone")
    return tuple(f for f in found if axes(f))


def _compressed(facets: Sequence[Tensor]) -> tuple[Tensor, ...]:
    return tuple(c for c in (compress(f) for f in facets) if axes(c))


@TABLE.handles(aten.cat.default)
def concatenate(ledger: Ledger, node: fx.Node, args: list[Any], kwargs: dict[str, Any]) -> Value:
    shape = shape_of(node)
    axis = (args[1] if len(args) > 1 else kwargs.get("dim", 0)) % len(shape)
    parts = [p for p in args[0] if 0 not in p.shape]
    across = [[f for f in p.facets if axis not in axes(f)] for p in parts]
    index = tuple(slice(0, 1) if a == axis else slice(None) for a in range(len(shape)))
    operands = [
        ([f[index].expand(*shape) for f in facets], [1 if a == axis else n for a, n in enumerate(p.shape)])
        for facets, p in zip(across, parts, strict=True)
    ]
    merged = merge(ledger, operands, shape, node.name)
    along_axis = [[f for f in p.facets if axis in axes(f)] for p in parts]
    for facets in along_axis:
        for extra in facets[1:]:
            ledger.freeze(extra, node.name, "is joined in two ways at once")
    pieces = [
        facets[0] if facets else torch.zeros((), dtype=torch.int64).expand(p.shape)
        for facets, p in zip(along_axis, parts, strict=True)
    ]
    joined = compress(torch.cat(pieces, axis))
    return Value(shape, (*merged, joined) if axes(joined) else merged)


@TABLE.handles(aten.stack.default)
def stack(ledger: Ledger, node: fx.Node, args: list[Any], kwargs: dict[str, Any]) -> Value:
    shape = shape_of(node)
    axis = (args[1] if len(args) > 1 else kwargs.get("dim", 0)) % len(shape)
    operands = []
    for p in args[0]:
        sizes = [*p.shape[:axis], 1, *p.shape[axis:]]
        operands.append(([f.unsqueeze(axis).expand(*shape) for f in p.facets], sizes))
    return Value(shape, merge(ledger, operands, shape, node.name))


@TABLE.handles(aten.slice_scatter.default)
def slice_scatter(ledger: Ledger, node: fx.Node, args: list[Any], kwargs: dict[str, Any]) -> Value:
    x, src = args[0], args[1]
    rest = list(args[2:])
    axis = (rest[0] if rest else 0) % len(x.shape)
    pairs = [(f, g) for f in x.facets for g in src.facets if axes(f) == axes(g)]
    used = {id(t) for pair in pairs for t in pair}
    freeze_all(ledger, node, Value(x.shape, tuple(f for f in x.facets if id(f) not in used)), "is partly overwritten")
    freeze_all(ledger, node, Value(src.shape, tuple(g for g in src.facets if id(g) not in used)), "overwrites a part")
    facets = []
    for f, g in pairs:
        if axis in axes(f):
            facets.append(aten.slice_scatter.default(f.contiguous(), g.contiguous(), *rest, **kwargs))
        else:
            first = tuple(slice(0, 1) if a == axis else slice(None) for a in range(f.ndim))
            ledger.tie(f[first], g[first])
            facets.append(f)
    return Value(x.shape, _compressed(facets))


@TABLE.handles(aten.pad.default, aten.constant_pad_nd.default)
def pad(ledger: Ledger, node: fx.Node, args: list[Any], kwargs: dict[str, Any]) -> Value:
    """Padded coordinates of a labelled axis are units of their own: zeros that nobody produced."""
    x, amounts = args[0], list(args[1])
    shape = shape_of(node)
    padded = [len(shape) - 1 - i for i in range(len(amounts) // 2) if amounts[2 * i] or amounts[2 * i + 1]]
    constant = node.target is aten.constant_pad_nd.default or (args[2] if len(args) > 2 else "constant") == "constant"
    facets = []
    for facet in x.facets:
        over = axes(facet)
        if not set(over) & set(padded):
            index = tuple(slice(None) if a in over else slice(0, 1) for a in range(facet.ndim))
            facets.append(facet[index].expand(*shape))
        elif len(over) == 1 and constant:
            axis = over[0]
            before = amounts[2 * (len(shape) - 1 - axis)]
            labels = ledger.fresh(shape[axis])
            labels[before : before + x.shape[axis]] = reduce_to(facet, over)
            facets.append(along(labels, axis, shape))
        else:
            ledger.freeze(facet, node.name, "is padded together with another axis")
    return Value(shape, tuple(facets))


@TABLE.handles(aten.glu.default)
def gated_linear_unit(ledger: Ledger, node: fx.Node, args: list[Any], kwargs: dict[str, Any]) -> Value:
    x = args[0]
    axis = (args[1] if len(args) > 1 else -1) % len(x.shape)
    halves = [[compress(f.chunk(2, axis)[i]) for f in x.facets] for i in (0, 1)]
    shape = shape_of(node)
    return Value(shape, merge(ledger, [(halves[0], shape), (halves[1], shape)], shape, node.name))


@TABLE.handles(aten.embedding.default)
def embedding(ledger: Ledger, node: fx.Node, args: list[Any], kwargs: dict[str, Any]) -> Value:
    table, shape = args[0], shape_of(node)
    facets = [along(reduce_to(f, (1,)), len(shape) - 1, shape) for f in table.facets if axes(f) == (1,)]
    freeze_all(ledger, node, Value(table.shape, tuple(f for f in table.facets if axes(f) != (1,))), "is a table's row")
    return Value(shape, tuple(facets))


@TABLE.handles(operator.getitem)
def item(ledger: Ledger, node: fx.Node, args: list[Any], kwargs: dict[str, Any]) -> Any:
    return args[0][args[1]]


@TABLE.handles(aten.dropout.default)
def passing(ledger: Ledger, node: fx.Node, args: list[Any], kwargs: dict[str, Any]) -> Value:
    return Value(args[0].shape, args[0].facets)
