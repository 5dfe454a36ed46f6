"""Operations that move values: run on the labels themselves, or joined, padded and overwritten label by label.

One handler for each family of ATen operations, in `TABLE`. Knows no arithmetic: see `contractions.py`.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Collection, Sequence
from typing import cast

import torch
from torch import Tensor

from ..graph import aten
from ..graph.operators import arguments
from .handlers import Call, Table, left_alone
from .labels import Ledger, Result, Value, along, axes, compress, first_along, reduce_to, values_in, varying
from .relations import Operand, channels_only, facets_along, freeze_all, merge

Move = Callable[..., "Tensor | Sequence[Tensor]"]  # an operation on labels: one result, or the pieces of a split

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
def movement(ledger: Ledger, call: Call) -> Result:
    """Elements go to new places and labels with them: the operation is run on every facet, and on known content."""
    x = call.input
    settings = [_content(argument) for argument in call.args[1:]]
    if _has_unknown(settings):
        return left_alone(ledger, call, f"reaches {call.node.target} at places that are computed, not fixed")

    moved_facets = [_moved(facet, call, settings) for facet in x.facets]
    contents: Sequence[Tensor | None] = [None] * len(call.shapes)
    if x.content is not None:
        contents = _moved(x.content, call, settings)
    results = []
    for i, (shape, content) in enumerate(zip(call.shapes, contents, strict=True)):
        facets = [pieces[i] for pieces in moved_facets]  # of a split, piece i of every facet
        results.append(Value(shape, _lasting(ledger, call.name, facets), content))
    return call.returning(results)


def _moved(labels: Tensor, call: Call, settings: Sequence[object]) -> Sequence[Tensor]:
    """What the operation makes of them: one tensor, or the pieces of a split."""
    move = cast(Move, call.node.target)
    moved = move(labels, *settings, **call.kwargs)
    return [moved] if isinstance(moved, Tensor) else moved


def _content(argument: object) -> object:
    """The argument with tensors in place of Values, `_UNKNOWN` where none is known."""
    match argument:
        case Value():
            return _UNKNOWN if argument.content is None else argument.content
        case list() | tuple():
            return [_content(entry) for entry in argument]
        case _:
            return argument


def _has_unknown(contents: object) -> bool:
    if isinstance(contents, list):
        return any(_has_unknown(entry) for entry in contents)
    return contents is _UNKNOWN


def _lasting(ledger: Ledger, node: str, facets: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Facets that still vary; one that shrank to a single label would empty the tensor with it."""
    lasting = []
    for facet in facets:
        compressed = compress(facet)
        if axes(compressed):
            lasting.append(compressed)
        elif compressed.numel() and bool(compressed.reshape(-1)[0] != 0):
            ledger.freeze(compressed, node, "is taken out alone")
    return tuple(lasting)


@TABLE.handles(aten.view_as_complex.default)
def complex_of_pairs(ledger: Ledger, call: Call) -> Value:
    """[..., 2] to [...]: the real and the imaginary part of a number go together."""
    parts = len(call.input.shape) - 1
    facets = []
    for facet in call.input.facets:
        ledger.tie(facet, first_along(facet, [parts]))
        facets.append(first_along(facet, [parts]).squeeze(parts))
    return Value(call.shape, _lasting(ledger, call.name, facets))


@TABLE.handles(aten.view_as_real.default)
def pairs_of_complex(ledger: Ledger, call: Call) -> Value:
    """[...] to [..., 2]: both parts have the number's label."""
    facets = tuple(facet.unsqueeze(-1).expand(*call.shape) for facet in call.input.facets)
    return Value(call.shape, facets)


@TABLE.handles(aten.slice.Tensor)
def cut(ledger: Ledger, call: Call) -> Result:
    """Every second coordinate stays every second one only when neighbours go together."""
    step = call.integer("step")
    if step > 1:
        _tie_strides(ledger, call, step)
    return movement(ledger, call)


def _tie_strides(ledger: Ledger, call: Call, step: int) -> None:
    axis = call.integer("dim") % len(call.input.shape)
    for facet in facets_along(call.input, axis):
        if facet.shape[axis] % step:
            ledger.freeze(facet, call.name, "is taken in strides that do not divide it")
            continue
        # [..., 6, ...] in steps of 2: [..., 3, 2, ...]
        strides: Tensor = facet.unflatten(axis, (-1, step))  # type: ignore[no-untyped-call]
        ledger.tie(strides, strides.narrow(axis + 1, 0, 1))


@TABLE.handles(aten.cat.default)
def concatenate(ledger: Ledger, call: Call) -> Value:
    """Labels along the joined axis lie one behind another, those across it meet as in a sum."""
    shape = call.shape
    axis = call.integer("dim") % len(shape)
    pieces = [piece for piece in values_in(call.args[0]) if len(piece.shape) == len(shape)]  # not the old empty [0]
    merged = merge(ledger, [_across(piece, axis, shape) for piece in pieces], shape, call.name)

    labels = [_labels_along(ledger, piece, axis, call.name) for piece in pieces]
    joined = torch.cat(labels, axis)  # 3 and 5 channels: 8, the first piece's labels in front
    return Value(shape, (*merged.facets, *varying([joined])))


def _across(piece: Value, axis: int, shape: Sequence[int]) -> Operand:
    """A piece's labels on other axes than the joined one, in the shape of the whole."""
    facets = [first_along(facet, [axis]).expand(*shape) for facet in piece.facets if axis not in axes(facet)]
    sizes = list(piece.shape)
    sizes[axis] = 1  # along the joined axis the pieces do not meet
    return Operand(facets, sizes)


def _labels_along(ledger: Ledger, piece: Value, axis: int, node: str) -> Tensor:
    """The piece's one facet on the joined axis, 0 (what never goes) where it has none; further ones freeze."""
    facets = facets_along(piece, axis)
    for extra in facets[1:]:
        ledger.freeze(extra, node, "is joined in two ways at once")
    return facets[0] if facets else torch.zeros((), dtype=torch.int64).expand(piece.shape)


@TABLE.handles(aten.stack.default)
def stack(ledger: Ledger, call: Call) -> Value:
    """The new axis has no labels; those of the stacked tensors meet as in a sum."""
    shape = call.shape
    axis = call.integer("dim") % len(shape)
    operands = []
    for piece in values_in(call.args[0]):
        facets = [facet.unsqueeze(axis).expand(*shape) for facet in piece.facets]
        sizes = [*piece.shape[:axis], 1, *piece.shape[axis:]]  # [N, C] on a new axis 1: [N, 1, C]
        operands.append(Operand(facets, sizes))
    return merge(ledger, operands, shape, call.name)


@TABLE.handles(aten.slice_scatter.default)
def slice_scatter(ledger: Ledger, call: Call) -> Value:
    """A tensor with part of an axis written over. What lies on the same axes in both goes on; the rest freezes."""
    x, patch = call.input, call.operand(1)
    settings = call.args[2:]  # axis, start, end, step
    axis = call.integer("dim") % len(x.shape)
    pairs = [(old, new) for old, new in itertools.product(x.facets, patch.facets) if axes(old) == axes(new)]
    paired = set(map(id, itertools.chain.from_iterable(pairs)))
    freeze_all(ledger, call.name, _without(x, paired), "is partly overwritten")
    freeze_all(ledger, call.name, _without(patch, paired), "overwrites a part")

    facets = []
    for old, new in pairs:
        if axis in axes(old):
            facets.append(aten.slice_scatter.default(old.contiguous(), new.contiguous(), *settings, **call.kwargs))
        else:  # [N, C] labels of a map that is overwritten along H: the same channels before and after
            ledger.tie(first_along(old, [axis]), first_along(new, [axis]))
            facets.append(old)
    return Value(x.shape, varying(facets))


def _without(value: Value, paired: Collection[int]) -> Value:
    """The value with its facets that are not among those, named by `id`."""
    return Value(value.shape, tuple(facet for facet in value.facets if id(facet) not in paired))


@TABLE.handles(aten.pad.default, aten.constant_pad_nd.default)
def pad(ledger: Ledger, call: Call) -> Value:
    """Padded coordinates of a labelled axis are units of their own: zeros that nobody produced."""
    x, shape = call.input, call.shape
    amounts = call.integers("pad")
    before, cuts = _padding_before(amounts, len(shape)), min(amounts) < 0
    constant = call.node.target is aten.constant_pad_nd.default or call.argument("mode") == "constant"

    facets = []
    for facet in x.facets:
        over = axes(facet)
        if before.keys().isdisjoint(over):
            elsewhere = set(range(facet.ndim)) - set(over)
            facets.append(first_along(facet, elsewhere).expand(*shape))
        elif len(over) == 1 and constant and not cuts:
            axis = over[0]
            labels = ledger.fresh(shape[axis])
            # 3 channels padded by 1 and 2: new a b c d e f, of which b c d become those of the tensor
            labels[before[axis] : before[axis] + x.shape[axis]] = reduce_to(facet, over)
            facets.append(along(labels, axis, shape))
        else:
            reason = "is cut by a negative padding" if cuts else "is padded together with another axis"
            ledger.freeze(facet, call.name, reason)
    return Value(shape, tuple(facets))


def _padding_before(amounts: Sequence[int], rank: int) -> dict[int, int]:
    """How many coordinates come in front, of each axis that is padded at all.

    Amounts are before and after of the last axis, then of the one before it: (1, 1, 2, 0) pads W by 1, 1 and H by 2, 0.
    """
    before: dict[int, int] = {}
    for i, amounts_of_axis in enumerate(zip(amounts[::2], amounts[1::2], strict=True)):
        if any(amounts_of_axis):
            before[rank - 1 - i] = amounts_of_axis[0]
    return before


@TABLE.handles(aten.glu.default)
def gated_linear_unit(ledger: Ledger, call: Call) -> Value:
    """One half times the sigmoid of the other: both halves' labels meet."""
    axis = call.integer("dim") % len(call.input.shape)
    passed, gates = [], []
    for facet in call.input.facets:
        first, second = facet.chunk(2, axis)
        passed.append(compress(first))
        gates.append(compress(second))
    operands = [Operand(passed, call.shape), Operand(gates, call.shape)]
    return merge(ledger, operands, call.shape, call.name)


@TABLE.handles(aten.im2col.default)
def patches(ledger: Ledger, call: Call) -> Value:
    """[N, C, H, W] to [N, C * kernel, positions]: a channel's entries lie one behind another."""
    x = channels_only(ledger, call.input, call.name)  # [N, C]
    shape = call.shape
    kernel_size = shape[1] // x.shape[1]
    facets = []
    for facet in x.facets:
        entries = facet.repeat_interleave(kernel_size, 1)  # 2 channels under 2 x 2 kernels: 0 0 0 0 1 1 1 1
        facets.append(compress(entries[..., None].expand(*shape)))
    return Value(shape, tuple(facets))


@TABLE.handles(aten.col2im.default)
def folded_patches(ledger: Ledger, call: Call) -> Value:
    """[N, C * kernel, positions] to [N, C, H, W]: the entries of one channel go together."""
    x, shape = call.input, call.shape
    kernel_size = x.shape[1] // shape[1]
    facets = []
    for facet in x.facets:
        if axes(facet) != (1,):
            ledger.freeze(facet, call.name, "is folded together with its positions")
            continue
        entries = reduce_to(facet, (1,)).reshape(-1, kernel_size)  # [C, kernel]
        ledger.tie(entries, entries[:, :1])
        facets.append(along(entries[:, 0], 1, shape))
    return Value(shape, tuple(facets))


@TABLE.handles(aten.embedding.default)
def embedding(ledger: Ledger, call: Call) -> Value:
    """Columns of the table [rows, d] become the last axis; its rows are chosen by number and never go."""
    table, shape = call.input, call.shape
    columns = [facet for facet in table.facets if axes(facet) == (1,)]
    facets = tuple(along(reduce_to(facet, (1,)), len(shape) - 1, shape) for facet in columns)
    freeze_all(ledger, call.name, _without(table, {id(facet) for facet in columns}), "is a table's row")
    return Value(shape, facets)


@TABLE.handles(
    aten.zeros.default,
    aten.ones.default,
    aten.full.default,
    aten.empty.memory_format,
    aten.new_zeros.default,
    aten.new_ones.default,
    aten.new_full.default,
    aten.new_empty.default,
)
def filled(ledger: Ledger, call: Call) -> Value:
    """A tensor of one number may lose any coordinate of an axis whose length is written there; of others none."""
    facets = []
    for axis, length in enumerate(arguments(call.node)["size"]):  # as written: a size of the batch is a node
        if isinstance(length, int) and length > 1:
            facets.append(along(ledger.fresh(length), axis, call.shape))
    return Value(call.shape, tuple(facets))


@TABLE.handles(
    aten.zeros_like.default,
    aten.ones_like.default,
    aten.full_like.default,
    aten.empty_like.default,
    aten.dropout.default,
    aten.type_as.default,
)
def passing(ledger: Ledger, call: Call) -> Value:
    """As long as what it is made after, whatever that loses; dropout in evaluation, or a cast, is the tensor itself."""
    return Value(call.input.shape, call.input.facets)


@TABLE.handles(operator.getitem)
def item(ledger: Ledger, call: Call) -> Result:
    """One of several results."""
    results, index = call.args
    assert isinstance(results, tuple)
    assert isinstance(index, int)
    return cast(Result, results[index])
