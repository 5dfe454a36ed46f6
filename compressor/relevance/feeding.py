"""A site in, the rows of weights that compute its units out: `Feed(weight node, unit of each row)`.

Unit labels are laid on every element of the site's tensor and walked back through whatever only moves,
scales or mixes elements of one unit, to the convolutions and linear layers behind. Knows no criterion.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from ..graph import aten
from ..graph.neighbours import shape_of
from ..graph.operators import ALL_CONVOLUTIONS, ATTENTION, LINEAR, TRANSPOSED_CONVOLUTIONS, arguments
from ..records import IntArray, Site
from .units import is_elementwise, named

_MOVES = (
    *(aten.reshape.default, aten.permute.default, aten.transpose.int, aten.select.int, aten.slice.Tensor),
    *(aten.unsqueeze.default, aten.squeeze.dim, aten.squeeze.dims, aten.squeeze.default, aten.expand.default),
    *(aten.flatten.using_ints, aten.unflatten.int, aten.roll.default, aten.flip.default, aten.t.default),
    *(aten.repeat.default, aten.pixel_shuffle.default, aten.pixel_unshuffle.default, aten.movedim.intlist),
    *(aten.unbind.int, aten.chunk.default, aten.split.Tensor, aten.split_with_sizes.default),
    *(aten.cat.default, aten.stack.default, aten.index_select.default, aten.channel_shuffle.default),
)


@dataclass(frozen=True, slots=True)
class Feed:
    """`units[r]` is the unit that row r of the weight computes, -1 none of the group.

    Rows lie along axis 0; those of a transposed convolution along axis 1 of each of its `blocks`.
    """

    weight: str
    units: IntArray
    blocks: int = 0

    def rows(self, weight: Tensor) -> Tensor:
        """[rows, what each is made of] in float64."""
        if self.blocks:  # [in, out / groups, *kernel], the inputs of one block (group) after those of the other
            by_block = weight.unflatten(0, (self.blocks, -1))  # type: ignore[no-untyped-call]
            weight = by_block.transpose(1, 2).flatten(0, 1)  # [out, in / groups, *kernel]
        return weight.double().reshape(len(weight), -1)


def feeds(graph: fx.GraphModule, site: Site) -> tuple[Feed, ...]:
    """The weights whose rows compute the site's units, in the order of the graph; empty where there are none.

    Raises ModelError for a site whose node the graph does not have.
    """
    start = named(graph, site.node)
    labels = {start: _label_elements(site, shape_of(start))}
    producers: dict[fx.Node, Tensor] = {}
    for node in reversed(list(graph.graph.nodes)):
        if node not in labels:
            continue
        if _is_producer(node):
            producers[node] = labels[node]
        else:
            for source, source_labels in _back(node, labels[node]):
                _lay(labels, source, source_labels)
    return tuple(_feed(node, node_labels) for node, node_labels in reversed(producers.items()))


def _lay(labels: dict[fx.Node, Tensor], source: fx.Node, source_labels: Tensor) -> None:
    """Notes the labels of a node that something labelled reads; nothing where they name no unit."""
    if source in labels:  # read twice: a label that one way knows wins over the other's -1
        labels[source] = torch.maximum(labels[source], source_labels)
    elif bool((source_labels >= 0).any()):
        labels[source] = source_labels


def _label_elements(site: Site, full: tuple[int, ...]) -> Tensor:
    """The unit of every element of a tensor with the shape `full`; -1 where it belongs to none."""
    sizes = [full[axis] for axis in site.axes]
    units = torch.as_tensor(site.units).reshape(sizes)
    # a site may name its axes in any order: (3, 1) of [N, heads, tokens, d] holds units as [d, heads]
    ascending = sorted(range(len(site.axes)), key=lambda i: site.axes[i])
    units = units.permute(ascending)  # [heads, d]
    broadcastable = [1] * len(full)
    for axis in site.axes:
        broadcastable[axis] = full[axis]
    return units.reshape(broadcastable).expand(full)  # [1, heads, 1, d] -> [N, heads, tokens, d]


def _is_producer(node: fx.Node) -> bool:
    return node.target in (*ALL_CONVOLUTIONS, LINEAR)


def _feed(node: fx.Node, labels: Tensor) -> Feed:
    weight: fx.Node = arguments(node)["weight"]
    channel_axis = labels.ndim - 1 if node.target is LINEAR else 1
    by_row = labels.movedim(channel_axis, 0).flatten(1)  # [rows of the weight, elements that the row computes]
    return Feed(weight.name, _common_label(by_row, 1).squeeze(1).numpy(), _blocks(node))


def _blocks(node: fx.Node) -> int:
    """The groups of a transposed convolution, whose weight has its outputs on axis 1; 0 for any other layer."""
    return int(arguments(node)["groups"]) if node.target in TRANSPOSED_CONVOLUTIONS else 0


def _common_label(labels: Tensor, *axes: int) -> Tensor:
    """The label that all elements along the axes share, else -1; the axes stay, of length 1.

    Along axis 1 [[4, 4], [4, 5]] is [[4], [-1]].
    """
    if not axes:
        return labels
    largest, smallest = labels.amax(axes, keepdim=True), labels.amin(axes, keepdim=True)
    return torch.where(largest == smallest, largest, -1)


# a node and the labels of its elements
_Labelled = tuple[fx.Node, Tensor]


def _back(node: fx.Node, labels: Tensor) -> Iterator[_Labelled]:
    """The inputs whose elements a node passes on, each with the labels of its own elements."""
    if node.target in _THROUGH:
        return _THROUGH[node.target](node, labels)
    if is_elementwise(node):
        return _through_elementwise(node, labels)
    return _through_in_place(node, labels)


def _through_elementwise(node: fx.Node, labels: Tensor) -> Iterator[_Labelled]:
    for source in node.all_input_nodes:
        source_shape = shape_of(source)
        if source_shape and len(source_shape) <= labels.ndim:
            yield source, _fitted(labels, source_shape)


def _through_in_place(node: fx.Node, labels: Tensor) -> Iterator[_Labelled]:
    """Normalisation, softmax, pooling: whatever leaves batch and channels of its first input where they are."""
    if not node.all_input_nodes:
        return
    source = node.all_input_nodes[0]
    if shape_of(source)[:2] == shape_of(node)[:2]:
        yield source, _spread(labels, shape_of(source))


def _spread(labels: Tensor, source_shape: tuple[int, ...]) -> Tensor:
    """Back through what keeps units in place: normalisation and softmax elementwise, pooling by channel."""
    if tuple(labels.shape) == source_shape:
        return labels
    by_channel = _common_label(labels, *range(2, labels.ndim))  # [N, C, 1, ...]
    positions = [1] * (len(source_shape) - 2)
    return by_channel.reshape(*source_shape[:2], *positions).expand(source_shape)


def _fitted(labels: Tensor, source_shape: tuple[int, ...]) -> Tensor:
    """Labels reduced along the axes a smaller operand was broadcast over."""
    axes = _broadcast_axes(labels.ndim, source_shape)
    return _common_label(labels, *axes).reshape(source_shape)


def _broadcast_axes(ndim: int, source_shape: tuple[int, ...]) -> list[int]:
    """Axes of a result along which an operand repeats: 0, 2 and 3 of [N, C, H, W] for one of shape [C, 1, 1]."""
    aligned = [1] * (ndim - len(source_shape)) + list(source_shape)  # [C, 1, 1] -> [1, C, 1, 1]
    return [axis for axis, length in enumerate(aligned) if length == 1]


def _through_move(node: fx.Node, labels: Tensor, item: int | None = None) -> Iterator[_Labelled]:
    """Runs the operation on positions instead of values: what it fetched from where.

    `labels` are of its output or, of several, of the one numbered `item`.
    """
    sources = [source for source in node.all_input_nodes if shape_of(source)]
    # all sources in a row, each element numbered: sources of 6 and 4 elements hold 0 to 5 and 6 to 9
    offsets = torch.tensor([0, *(_numel(source) for source in sources)]).cumsum(0).tolist()  # [0, 6, 10]
    positions = {}
    for source, offset in zip(sources, offsets, strict=False):
        positions[source] = torch.arange(offset, offset + _numel(source)).reshape(shape_of(source))

    def position_of(source: fx.Node) -> fx.node.Argument:
        size: fx.node.Argument = source.meta["val"]  # of a node that holds no tensor
        return positions.get(source, size)

    args, kwargs = fx.map_arg((node.args, node.kwargs), position_of)
    moved = node.target(*args, **kwargs)  # type: ignore[operator]
    fetched = (moved if item is None else moved[item]).reshape(-1)

    source_labels = torch.full((offsets[-1],), -1, dtype=torch.int64)
    source_labels[fetched] = labels.reshape(-1)
    for source, offset in zip(sources, offsets, strict=False):
        yield source, source_labels[offset : offset + _numel(source)].reshape(shape_of(source))


def _numel(node: fx.Node) -> int:
    return int(torch.Size(shape_of(node)).numel())


def _through_item(node: fx.Node, labels: Tensor) -> Iterator[_Labelled]:
    source, item = node.args
    if isinstance(source, fx.Node) and isinstance(item, int) and source.target in _MOVES:
        yield from _through_move(source, labels, item)


def _through_attention(node: fx.Node, labels: Tensor) -> Iterator[_Labelled]:
    """Values by head and dimension; queries and keys by head, where a whole head is one unit."""
    named_inputs = arguments(node)
    query, key, value = named_inputs["query"], named_inputs["key"], named_inputs["value"]
    by_dimension = _common_label(labels, -2)  # [N, heads, 1, d]
    by_head = _common_label(labels, -2, -1)  # [N, heads, 1, 1]
    for source, source_labels in ((value, by_dimension), (key, by_head), (query, by_head)):
        # with grouped queries there are fewer heads of keys and values than labels: not followed
        if shape_of(source)[:-2] == tuple(source_labels.shape[:-2]):
            yield source, source_labels.expand(shape_of(source))


def _through_product(node: fx.Node, labels: Tensor) -> Iterator[_Labelled]:
    """A row of the product belongs to a row of the left factor, a column to a column of the right one."""
    factors = arguments(node)
    left, right = factors["self"], factors["other"]
    by_row = _common_label(labels, -1)  # [..., n, 1]
    by_column = _common_label(labels, -2)  # [..., 1, d]
    for source, source_labels in ((left, by_row), (right, by_column)):
        source_shape = shape_of(source)
        if len(source_shape) != labels.ndim:
            continue
        # batch axes that the factor was broadcast over have length 1 in it, so labels are reduced along them
        lengths = zip(source_shape, source_labels.shape, strict=True)
        fitted_shape = tuple(min(source_length, length) for source_length, length in lengths)
        yield source, _fitted(source_labels, fitted_shape).expand(source_shape)


_THROUGH: Mapping[object, Callable[[fx.Node, Tensor], Iterator[_Labelled]]] = {
    **dict.fromkeys(_MOVES, _through_move),
    operator.getitem: _through_item,
    ATTENTION: _through_attention,
    aten.matmul.default: _through_product,
}
