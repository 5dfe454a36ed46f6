"""Labels: which coordinates of which tensors are one unit, as integers on every element.

A facet is an int64 tensor of the labelled tensor's shape, expanded (stride 0) along the axes it does not
depend on; an element goes when any of its facets' labels goes. Label 0 never goes. Ties are collected as
pairs and resolved once (`classes.py`). Knows no operation: how they use labels is in `relations.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Value:
    """What is known of one tensor of the graph: its shape, its facets, its content if it is a constant.

    `content` is kept of constants of whole numbers and booleans, as movements run on it (an index, a permutation).
    """

    shape: tuple[int, ...]
    facets: tuple[Tensor, ...] = ()
    content: Tensor | None = None


Result = Value | bool | int | float | None | tuple["Result", ...]
"""What is known of a node's result: a tensor's `Value`, a number (the size of an axis), or several results."""


@dataclass(frozen=True, slots=True)
class Rows:
    """Row r of `children` [R, K] goes as a whole exactly when `parents[r]` does; rows that stay keep equal counts.

    `parents` is [R]. Twelve heads of 64 dimensions are R = 12, K = 64: a head is a row, its dimensions are children.
    """

    parents: Tensor
    children: Tensor
    node: str


@dataclass(frozen=True, slots=True)
class Columns:
    """Column k of `children` [R, K] goes as a whole when `parents[k]` does; one of its units goes only with its row.

    `parents` is [K]. A scale [64] of twelve heads is R = 12, K = 64: its dimensions go from all heads at once. Where
    the children lie in no rows (`Rows`), a column is one unit.
    """

    parents: Tensor
    children: Tensor


@dataclass
class Ledger:
    """Everything the walk over a graph found out about labels, in the order it was found.

    `pairs` are [2, P] labels that are one; `frozen` holds (labels, node, reason), `inexact` (labels, node). The next
    new label is `count`.
    """

    count: int = 1
    pairs: list[Tensor] = field(default_factory=list)
    rows: list[Rows] = field(default_factory=list)
    columns: list[Columns] = field(default_factory=list)
    frozen: list[tuple[Tensor, str, str]] = field(default_factory=list)
    inexact: list[tuple[Tensor, str]] = field(default_factory=list)

    def fresh(self, *shape: int) -> Tensor:
        """Labels that no tensor carries yet, int64, ascending in row-major order."""
        n = math.prod(shape)
        labels = torch.arange(self.count, self.count + n).reshape(shape)
        self.count += n
        return labels

    def fresh_rows(self, facet: Tensor, row_axes: Collection[int]) -> Tensor:
        """New labels in the facet's shape that depend on those axes alone, the same for rows of the same labels.

        [1, heads, 1, 1] for one each head, [batch * heads, 1, 1] for as many, once for every image.
        """
        _, number = torch.unique(_table(facet, facet, row_axes), dim=0, return_inverse=True)  # [R]
        sizes = [n if axis in row_axes else 1 for axis, n in enumerate(facet.shape)]
        return self.fresh(int(number.max()) + 1)[number].reshape(sizes).expand(facet.shape)

    def tie(self, a: Tensor, b: Tensor) -> None:
        """Makes equally placed labels one; a and b broadcast."""
        shape = np.broadcast_shapes(a.shape, b.shape)
        a, b = a.expand(shape), b.expand(shape)
        varying = {*axes(a), *axes(b)}
        labels_a, labels_b = reduce_to(a, varying).reshape(-1), reduce_to(b, varying).reshape(-1)

        # a pair as one number, of which `unique` is quick: among 10 labels, (3, 7) is 37
        codes = torch.unique(labels_a * self.count + labels_b)
        self.pairs.append(torch.stack([codes // self.count, codes % self.count]))  # [2, P]

    def freeze(self, facet: Tensor, node: str, reason: str) -> None:
        """None of the facet's labels may go; `node` and `reason` are what a report says of them."""
        labels = distinct(facet)
        self.frozen.append((labels, node, reason))
        self.tie(labels, torch.zeros_like(labels))

    def pin(self, facet: Tensor, over: Iterable[int], node: str, reason: str) -> Tensor | None:
        """Nothing may go along `over`: single units freeze; rows across it stay removable, and are returned."""
        row_axes = set(axes(facet)).difference(over)
        if not row_axes:
            self.freeze(facet, node, reason)
            return None

        # [heads, d] pinned along d: a head may go, of its dimensions none
        row = self.fresh_rows(facet, row_axes)
        self.relate(row, facet, node)
        self.relate_columns(torch.zeros((), dtype=torch.int64).expand(facet.shape), facet, row_axes)
        self.frozen.append((distinct(facet), node, reason))
        return row

    def mark_inexact(self, facet: Tensor, node: str) -> None:
        """The node's result depends on the facet's units beyond zeroing them, as a normalisation over them does."""
        self.inexact.append((distinct(facet), node))

    def relate(self, parents: Tensor, children: Tensor, node: str) -> None:
        """Makes rows. Both have the same rank; children varies on axes where parents does not.

        Parents [1, heads, 1, 1] and children [1, heads, 1, d] become R = heads rows of K = d children.
        """
        row_axes = axes(parents)
        parents = _table(parents.expand(children.shape), children, row_axes)[:, 0]  # [R]
        table = _table(children, children, row_axes)  # [R, K]
        listed = torch.unique(torch.cat([parents[:, None], table], 1), dim=0)  # once for all images of the batch
        self.rows.append(Rows(listed[:, 0].clone(), listed[:, 1:].clone(), node))

    def relate_columns(self, parents: Tensor, children: Tensor, row_axes: Collection[int]) -> None:
        """Makes columns across the rows that lie on `row_axes`. Both have the same rank; parents vary on others alone.

        Parents [1, 1, 1, d] and children [1, heads, 1, d] with rows on axis 1: K = d columns of R = heads children.
        """
        parents = _table(parents.expand(children.shape), children, row_axes)  # [R, K]
        self.columns.append(Columns(parents[0].clone(), _table(children, children, row_axes)))


def _table(facet: Tensor, children: Tensor, row_axes: Collection[int]) -> Tensor:
    """[R, K] the facet's labels on the axes of `children`, which has its shape: rows along some, the rest inside."""
    rows = sorted(row_axes)
    order = [*rows, *(axis for axis in axes(children) if axis not in rows)]
    # of axes 3 (rows) and 1, `reduce_to` leaves 1 at place 0 and 3 at place 1: rows first is (1, 0)
    places = {axis: place for place, axis in enumerate(sorted(order))}
    rows_first = [places[axis] for axis in order]
    n_rows = math.prod(children.shape[axis] for axis in rows)
    return reduce_to(facet, order).permute(rows_first).reshape(n_rows, -1)


def axes(facet: Tensor) -> tuple[int, ...]:
    """The axes a facet's labels depend on."""
    # what is stretched over an axis has stride 0 there: [N, C] labels of C alone have strides (0, 1)
    return tuple(axis for axis in range(facet.ndim) if facet.stride(axis) != 0 and facet.shape[axis] > 1)


def distinct(facet: Tensor) -> Tensor:
    """The facet's labels, each once, ascending."""
    labels: Tensor = torch.unique(reduce_to(facet, axes(facet)))
    return labels


def compress(facet: Tensor) -> Tensor:
    """The same facet with stride 0 along every axis its labels do not change on."""
    for axis in axes(facet):
        first = facet.narrow(axis, 0, 1).expand(facet.shape)
        over = axes(facet)  # along all others both repeat themselves, which need not be compared
        if torch.equal(reduce_to(facet, over), reduce_to(first, over)):
            facet = first
    return facet


def varying(facets: Iterable[Tensor]) -> tuple[Tensor, ...]:
    """The facets, compressed, without those that hold one label alone."""
    compressed = map(compress, facets)
    return tuple(facet for facet in compressed if axes(facet))


def reduce_to(facet: Tensor, keep: Iterable[int]) -> Tensor:
    """The facet indexed at 0 on every axis not in `keep`; those axes are gone, the others keep their order."""
    wanted = set(keep)
    index = [slice(None) if axis in wanted else 0 for axis in range(facet.ndim)]
    return _filled(facet)[tuple(index)]


def _filled(facet: Tensor) -> Tensor:
    """A facet of an empty tensor with one entry along its empty axes: what it says of the other axes still holds.

    No register token [1, 0, C] has channels. Of a copy, which holds no label any more, 0; of no empty tensor, itself.
    """
    if 0 not in facet.shape:
        return facet
    sizes = [max(1, n) for n in facet.shape]
    strides = [stride if n > 1 else 0 for n, stride in zip(facet.shape, facet.stride(), strict=True)]
    last = facet.storage_offset() + sum((n - 1) * stride for n, stride in zip(sizes, strides, strict=True))
    if last >= facet.untyped_storage().nbytes() // facet.element_size():
        return torch.zeros((), dtype=torch.int64).expand(sizes)
    return facet.as_strided(sizes, strides)


def first_along(facet: Tensor, over: Iterable[int]) -> Tensor:
    """The facet's first entry along the axes `over`, which stay with size 1."""
    narrowed = set(over)
    index = [slice(0, 1 if axis in narrowed else n) for axis, n in enumerate(facet.shape)]
    return _filled(facet)[tuple(index)]


def along(labels: Tensor, axis: int, shape: Sequence[int]) -> Tensor:
    """A facet of that shape depending on one axis only; labels are [shape[axis]]."""
    view = [1] * len(shape)
    view[axis] = -1
    return labels.reshape(view).expand(*shape)


def values_in(tree: object) -> Iterator[Value]:
    """The Values in nested lists and tuples, in order; whatever else lies there is passed over."""
    if isinstance(tree, Value):
        yield tree
    elif isinstance(tree, (list, tuple)):
        for branch in tree:
            yield from values_in(branch)


def facets_in(tree: object) -> Iterator[Tensor]:
    """The facets of the Values in nested lists and tuples, in order."""
    for value in values_in(tree):
        yield from value.facets


def map_labelled(function: Callable[[Tensor, Value], Tensor], result: object, labels: Result) -> object:
    """A node's result, or each of several, with what the function makes of every tensor and its labels in its place."""
    if isinstance(result, Tensor) and isinstance(labels, Value):
        return function(result, labels)
    if isinstance(result, (tuple, list)) and isinstance(labels, tuple):
        pairs = zip(result, labels, strict=True)
        return type(result)([map_labelled(function, piece, piece_labels) for piece, piece_labels in pairs])
    return result
