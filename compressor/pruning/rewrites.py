"""Integer arguments (sizes, slice bounds, group counts) from the widths that remain: operation -> rewrite.

A rewrite gets a node and what remains of its tensors, and changes the node's arguments in place. So no attribute of
any module has to follow. An operation that is in no table has no argument that depends on a width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from torch import fx
from torch.fx.node import Argument

from ..graph import aten
from ..graph.operators import ALL_CONVOLUTIONS, TRANSPOSED_CONVOLUTIONS, arguments
from .compaction import compact_shape, cut_axes
from .labels import Value
from .structure import Keep, Lying, Structure


@dataclass(frozen=True, slots=True)
class Remaining:
    """What is left of a structure's tensors where the classes `gone` [classes] go."""

    structure: Structure
    gone: Keep

    def shape(self, node: fx.Node) -> tuple[int, ...]:
        """Of the node's result, which is one tensor."""
        return self.shape_of(self.structure.value(node))

    def shape_of(self, value: Value) -> tuple[int, ...]:
        """Of one tensor, also of one among several results."""
        return compact_shape(value.shape, self.structure.lying_of(value), self.gone)

    def thins(self, node: fx.Node, axis: int) -> bool:
        """Whether the node's result loses anything along the axis."""
        axis %= len(self.structure.shape(node))
        return axis in cut_axes(self.structure.lying(node), self.gone)

    def count_before(self, node: fx.Node, axis: int, position: int) -> int:
        """How many coordinates of the axis remain in front of a position: of [a b c d] without b, 2 in front of 3."""
        sizes = list(self.structure.shape(node))
        axis %= len(sizes)
        sizes[axis] = min(position, sizes[axis])
        if 0 in sizes:
            return 0
        lying = [_first_along(entry, axis, sizes[axis]) for entry in self.structure.lying(node)]
        return compact_shape(sizes, lying, self.gone)[axis]


def _first_along(lying: Lying, axis: int, length: int) -> Lying:
    """The classes of a tensor's first coordinates along the axis."""
    over, classes = lying
    if axis not in over:
        return lying
    return over, np.take(classes, np.arange(length), axis=over.index(axis))


Rewrite = Callable[[fx.Node, Remaining], None]


def _resize(position: int) -> Rewrite:
    """Sizes of the result, which is what the argument at `position` lists, from its last axis on."""

    def rewrite(node: fx.Node, remaining: Remaining) -> None:
        before, after = remaining.structure.shape(node), remaining.shape(node)
        sizes = _listed(node, position)
        offset = len(before) - len(sizes)
        for i, size in enumerate(sizes):
            if size == -1 or before[i + offset] == after[i + offset]:
                continue
            # a size computed from the batch (batch x heads) is left to the reshape to find
            sizes[i] = after[i + offset] if isinstance(size, int) else -1
        node.update_arg(position, sizes)

    return rewrite


def _listed(node: fx.Node, position: int) -> list[Argument]:
    """The entries of an argument that is a list."""
    entries = node.args[position]
    assert isinstance(entries, (list, tuple))
    return list(entries)


def _unflatten(node: fx.Node, remaining: Remaining) -> None:
    settings = arguments(node)
    after = remaining.shape(node)
    first = settings["dim"] % len(remaining.structure.shape(settings["self"]))
    # [N, 12, d] with axis 1 as (3, 4): axes 1 and 2 of the result
    sizes = [-1 if size == -1 else after[first + i] for i, size in enumerate(settings["sizes"])]
    node.update_arg(2, sizes)


def _bounds(first: int) -> Rewrite:
    """Slices: `first` is the position of (axis, start, end, step) among the arguments.

    Neighbours within a stride go together: of [a b c d], 1::2 without a and b is still the second of two.
    """

    def rewrite(node: fx.Node, remaining: Remaining) -> None:
        settings = arguments(node)
        source, axis, step = settings["self"], settings["dim"], settings["step"]
        if not remaining.thins(source, axis):
            return
        size = remaining.structure.shape(source)[axis]
        start = settings["start"] or 0
        end = size if settings["end"] is None else settings["end"]
        if not (isinstance(start, int) and isinstance(end, int)):  # computed from the batch
            return
        if start == 0 and end > size and step == 1:  # all of it, also where heads of a larger batch lie on the axis
            return

        # [a b c d e f] by 1::2 is b d f: three strides of two from 0, of each the second (phase 1). Without c and d
        # four entries are in front of the last stride's end, so 1:4:2 of [a b e f] is b f
        start, end, _ = slice(start, end).indices(size)
        phase = start % step
        strides = max(0, math.ceil((end - start) / step))
        first_stride = start - phase
        start_left = remaining.count_before(source, axis, first_stride)
        end_left = remaining.count_before(source, axis, first_stride + strides * step)
        node.args = (*node.args[:first], axis, start_left + phase, end_left, step)

    return rewrite


def _select(node: fx.Node, remaining: Remaining) -> None:
    settings = arguments(node)
    source, axis, index = settings["self"], settings["dim"], settings["index"]
    if isinstance(index, int) and remaining.thins(source, axis):
        size = remaining.structure.shape(source)[axis]
        node.update_arg(2, remaining.count_before(source, axis, index % size))


def _split(node: fx.Node, remaining: Remaining) -> None:
    """Pieces that were equal need not be so any more: each gets its own size."""
    settings = arguments(node)
    source, axis = settings["self"], settings["dim"]
    if not remaining.thins(source, axis):
        return
    pieces = remaining.structure.values[node.name]
    assert isinstance(pieces, tuple)
    sizes = [remaining.shape_of(piece)[axis] for piece in pieces if isinstance(piece, Value)]
    node.target = aten.split_with_sizes.default
    node.args, node.kwargs = (source, sizes, axis), {}


def _layer_norm(node: fx.Node, remaining: Remaining) -> None:
    after = remaining.shape(node)
    normalised_shape = after[len(after) - len(_listed(node, 1)) :]
    node.update_arg(1, list(normalised_shape))


def _groups(node: fx.Node, remaining: Remaining) -> None:
    """As many groups as the channels that remain fill, each with what its kernel reads."""
    settings = arguments(node)
    if not isinstance(settings["groups"], int) or settings["groups"] == 1:
        return
    kernel = remaining.shape(settings["weight"])
    # a transposed kernel is [in, out / groups]: its inputs per group are known only through its outputs
    counted = node if node.target in TRANSPOSED_CONVOLUTIONS else settings["input"]
    node.update_arg(6, remaining.shape(counted)[1] // kernel[1])


def _pad(node: fx.Node, remaining: Remaining) -> None:
    amounts: list[int] = list(arguments(node)["pad"])
    before = remaining.structure.shape(arguments(node)["self"])
    after = remaining.shape(node)
    for i in range(len(amounts) // 2):
        axis = len(after) - 1 - i  # amounts begin at the last axis
        if not remaining.thins(node, axis):
            continue
        # 3 channels padded by 2 and 3 are 8: what stays of the first 2, and what stays after the first 2 + 3
        left = remaining.count_before(node, axis, amounts[2 * i])
        middle = remaining.count_before(node, axis, amounts[2 * i] + before[axis])
        amounts[2 * i], amounts[2 * i + 1] = left, after[axis] - middle
    node.update_arg(1, amounts)


def _attention_scale(node: fx.Node, remaining: Remaining) -> None:
    """Thinner heads keep the scale they were trained with; what loses nothing stays as it is written."""
    query = arguments(node)["query"]
    if node.kwargs.get("scale") is None and remaining.thins(query, -1):
        width = remaining.structure.shape(query)[-1]
        node.kwargs = {**node.kwargs, "scale": 1.0 / math.sqrt(width)}


REWRITES: Mapping[object, Rewrite] = {
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
