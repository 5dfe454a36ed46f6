"""A site in, the rows of weights that compute its units out: `Feed(weight node, axis of its rows, unit of each row)`.

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
    """`units[r]` is the unit that row r (along `axis`) of the weight computes, -1 none of the group."""

    weight: str
    axis: int
    units: IntArray


def feeds(graph: fx.GraphModule, site: Site) -> tuple[Feed, ...]:
    """In the order of the graph; empty when nothing with weights computes the site's units."""
    start = named(graph, site.node)
    labels = {start: _laid(site, shape(start))}
    found: dict[fx.Node, Tensor] = {}
    for node in reversed(list(graph.graph.nodes)):
        if node not in labels:
            continue
        if _weight_axis(node) is not None:
            found[node] = labels[node]
            continue
        for source, back in _back(node, labels[node]):
            if bool((back >= 0).any()):
                labels[source] = torch.maximum(labels[source], back) if source in labels else back
    result = [_feed(node, own) for node, own in reversed(found.items())]
    return tuple(feed for feed in result if feed is not None)


def _laid(site: Site, full: tuple[int, ...]) -> Tensor:
    units = torch.as_tensor(site.units).reshape(tuple(full[a] for a in site.axes))
    order = sorted(range(len(site.axes)), key=lambda i: site.axes[i])
    units = units.permute(order)
    return units.reshape([full[a] if a in site.axes else 1 for a in range(len(full))]).expand(full)


def _weight_axis(node: fx.Node) -> int | None:
    """Which axis of args[1] holds the rows, for an operation that has a weight there."""
    if node.target in (*_CONVOLUTIONS, aten.linear.default):
        transposed = node.target is aten.convolution.default and node.args[6]
        return 1 if transposed else 0
    return 1 if node.target in _TRANSPOSED else None


def _feed(node: fx.Node, labels: Tensor) -> Feed | None:
    weight = node.args[1]
    assert isinstance(weight, fx.Node)
    axis = _weight_axis(node)
    assert axis is not None
    out = labels.ndim - 1 if node.target is aten.linear.default else 1
    rows = labels.movedim(out, 0).flatten(1)
    if axis == 1:  # rows of a transposed convolution repeat over its groups: keep the first group's
        rows = rows[: shape(weight)[1]]
    return Feed(weight.name, axis, _one_of(rows, 1).squeeze(1).numpy())


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
        first = node.all_input_nodes[0]  # normalisation, softmax, pooling: units stay where they are
        same = shape(first) == shape(node)
        yield (
            first,
            labels if same else _fitted(labels, (*shape(first)[:2], *[1] * (labels.ndim - 2))).expand(shape(first)),
        )


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
