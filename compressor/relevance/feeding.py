"""A site in, the rows of weights that compute its units out: `Feed(weight node, unit of each row)`.

Unit labels are laid on every element of the site's tensor and walked back through whatever only moves,
scales or mixes elements of one unit, to the convolutions and linear layers behind. Knows no criterion.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from ..graph import aten
from ..records import IntArray, Site
from .units import is_elementwise, named, shape

_CONVOLUTIONS = (
    *(aten.conv1d.default, aten.conv2d.default, aten.conv3d.default),
    *(aten.conv1d.padding, aten.conv2d.padding, aten.conv3d.padding),
    aten.convolution.default,
)
_TRANSPOSED = (aten.conv_transpose1d.default, aten.conv_transpose2d.input, aten.conv_transpose3d.input)
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
        if self.blocks:
            weight = weight.unflatten(0, (self.blocks, -1)).transpose(1, 2).flatten(0, 1)  # type: ignore[no-untyped-call]
        return weight.double().reshape(len(weight), -1)


def feeds(graph: fx.GraphModule, site: Site) -> tuple[Feed, ...]:
    """In the order of the graph; empty when nothing with weights computes the site's units."""
    start = named(graph, site.node)
    labels = {start: _laid(site, shape(start))}
    found: dict[fx.Node, Tensor] = {}
    for node in reversed(list(graph.graph.nodes)):
        if node not in labels:
            continue
        if _is_producer(node):
            found[node] = labels[node]
            continue
        for source, back in _back(node, labels[node]):
            if bool((back >= 0).any()):
                labels[source] = torch.maximum(labels[source], back) if source in labels else back
    return tuple(_feed(node, own) for node, own in reversed(found.items()))


def _laid(site: Site, full: tuple[int, ...]) -> Tensor:
    units = torch.as_tensor(site.units).reshape(tuple(full[a] for a in site.axes))
    order = sorted(range(len(site.axes)), key=lambda i: site.axes[i])
    units = units.permute(order)
    return units.reshape([full[a] if a in site.axes else 1 for a in range(len(full))]).expand(full)


def _is_producer(node: fx.Node) -> bool:
    return node.target in (*_CONVOLUTIONS, *_TRANSPOSED, aten.linear.default)


def _feed(node: fx.Node, labels: Tensor) -> Feed:
    weight = node.args[1]
    assert isinstance(weight, fx.Node)
    channels = labels.ndim - 1 if node.target is aten.linear.default else 1
    rows = labels.movedim(channels, 0).flatten(1)
    return Feed(weight.name, _one_of(rows, 1).squeeze(1).numpy(), _blocks(node))


def _blocks(node: fx.Node) -> int:
    if node.target is aten.convolution.default:
        return int(str(node.args[8])) if node.args[6] else 0
    if node.target in _TRANSPOSED:
        return int(str(node.args[6])) if len(node.args) > 6 else 1
    return 0


def _one_of(labels: Tensor, *axes: int) -> Tensor:
    """The label that all elements along the axes share, else -1; the axes stay, of length 1."""
    most, least = labels.amax(axes, keepdim=True), labels.amin(axes, keepdim=True)
    return torch.where(most == least, most, -1)


def _back(node: fx.Node, labels: Tensor) -> Iterator[tuple[fx.Node, Tensor]]:
    target = node.target
    if target is operator.getitem:
        yield from _through_item(node, labels)
    elif target in _MOVES:
        yield from _through_move(node, labels)
    elif target is aten.scaled_dot_product_attention.default:
        yield from _through_attention(node, labels)
    elif target is aten.matmul.default:
        yield from _through_product(node, labels)
    elif is_elementwise(node):
        for source in node.all_input_nodes:
            if len(shape(source)) <= labels.ndim and shape(source):
                yield source, _fitted(labels, shape(source))
    elif node.all_input_nodes and shape(node.all_input_nodes[0])[:2] == shape(node)[:2]:
        yield node.all_input_nodes[0], _spread(labels, shape(node.all_input_nodes[0]))


def _spread(labels: Tensor, wanted: tuple[int, ...]) -> Tensor:
    """Back through what keeps units in place: normalisation and softmax elementwise, pooling by channel."""
    if tuple(labels.shape) == wanted:
        return labels
    channels = _one_of(labels, *range(2, labels.ndim)) if labels.ndim > 2 else labels
    return channels.reshape(*wanted[:2], *[1] * (len(wanted) - 2)).expand(wanted)


def _fitted(labels: Tensor, wanted: tuple[int, ...]) -> Tensor:
    """Labels reduced along the axes a smaller operand was broadcast over."""
    axes = [a for a in range(labels.ndim) if a < labels.ndim - len(wanted) or wanted[a - labels.ndim] == 1]
    reduced = _one_of(labels, *axes) if axes else labels
    return reduced.reshape(wanted)


def _through_move(node: fx.Node, labels: Tensor, item: int | None = None) -> Iterator[tuple[fx.Node, Tensor]]:
    """Runs the operation on positions instead of values: what it fetched from where."""
    sources = [n for n in node.all_input_nodes if shape(n)]
    ends = torch.tensor([0, *(_numel(n) for n in sources)]).cumsum(0).tolist()
    places = {n: torch.arange(a, a + _numel(n)).reshape(shape(n)) for n, a in zip(sources, ends, strict=False)}
    args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: places[n] if n in places else n.meta["val"])
    target: Any = node.target
    moved = target(*args, **kwargs)
    fetched = (moved if item is None else moved[item]).reshape(-1)
    whole = torch.full((ends[-1],), -1, dtype=torch.int64)
    whole[fetched] = labels.reshape(-1)
    for source, a in zip(sources, ends, strict=False):
        yield source, whole[a : a + _numel(source)].reshape(shape(source))


def _numel(node: fx.Node) -> int:
    return int(torch.Size(shape(node)).numel())


def _through_item(node: fx.Node, labels: Tensor) -> Iterator[tuple[fx.Node, Tensor]]:
    source, item = node.args
    if isinstance(source, fx.Node) and isinstance(item, int) and source.target in _MOVES:
        yield from _through_move(source, labels, item)


def _through_attention(node: fx.Node, labels: Tensor) -> Iterator[tuple[fx.Node, Tensor]]:
    """Values by head and dimension; queries and keys by head, where a whole head is one unit."""
    query, key, value = (n for n in node.args[:3] if isinstance(n, fx.Node))
    by_dimension = _one_of(labels, -2)
    by_head = _one_of(labels, -2, -1)
    for source, own in ((value, by_dimension), (key, by_head), (query, by_head)):
        if shape(source)[:-2] == tuple(own.shape[:-2]):
            yield source, own.expand(shape(source))


def _through_product(node: fx.Node, labels: Tensor) -> Iterator[tuple[fx.Node, Tensor]]:
    left, right = (n for n in node.args[:2] if isinstance(n, fx.Node))
    for source, own in ((left, _one_of(labels, -1)), (right, _one_of(labels, -2))):
        if len(shape(source)) == labels.ndim:
            fitted = _fitted(own, tuple(1 if a == 1 else b for a, b in zip(shape(source), own.shape, strict=True)))
            yield source, fitted.expand(shape(source))
