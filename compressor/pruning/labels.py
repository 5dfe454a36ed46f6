"""Labels: which coordinates of which tensors are one unit, as integers on every element.

A facet is an int64 tensor of the labelled tensor's shape, expanded (stride 0) along the axes it does not
depend on; an element goes when any of its facets' labels goes. Label 0 never goes. Ties are collected as
pairs and resolved once, by connected components. Knows no operation: how they use labels is in `relations.py`.
"""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components
from torch import Tensor

from ..records import IntArray


@dataclass(frozen=True, slots=True)
class Value:
    """What is known of one tensor of the graph: its shape, its facets, its content if it is a constant."""

    shape: tuple[int, ...]
    facets: tuple[Tensor, ...] = ()
    content: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Rows:
    """Row r of `children` [R, K] goes as a whole exactly when `parents[r]` does; rows that stay keep equal counts."""

    parents: Tensor
    children: Tensor
    node: str


@dataclass
class Ledger:
    """Everything the walk over a graph found out about labels, in the order it was found."""

    count: int = 1
    pairs: list[Tensor] = field(default_factory=list)
    rows: list[Rows] = field(default_factory=list)
    frozen: list[tuple[Tensor, str, str]] = field(default_factory=list)
    inexact: list[tuple[Tensor, str]] = field(default_factory=list)

    def fresh(self, *shape: int) -> Tensor:
        n = int(np.prod(shape))
        labels = torch.arange(self.count, self.count + n).reshape(shape)
        self.count += n
        return labels

    def tie(self, a: Tensor, b: Tensor) -> None:
        """Makes equally placed labels one; a and b broadcast."""
        shape = np.broadcast_shapes(a.shape, b.shape)
        a, b = a.expand(shape), b.expand(shape)
        both = torch.unique(_squeeze(a, b).reshape(-1) * self.count + _squeeze(b, a).reshape(-1))
        self.pairs.append(torch.stack([both // self.count, both % self.count]))

    def freeze(self, facet: Tensor, node: str, reason: str) -> None:
        labels = distinct(facet)
        self.frozen.append((labels, node, reason))
        self.tie(labels, torch.zeros_like(labels))

    def pin(self, facet: Tensor, over: Iterable[int], node: str, reason: str) -> Tensor | None:
        """Nothing may go along `over`: single units freeze; rows across it stay removable, and are returned."""
        rows = [a for a in axes(facet) if a not in set(over)]
        if not rows:
            self.freeze(facet, node, reason)
            return None
        index = tuple(slice(None) if a in rows else slice(0, 1) for a in range(facet.ndim))
        row = facet[index].expand(facet.shape)
        self.tie(facet, row)
        self.frozen.append((distinct(facet), node, reason))
        return row

    def mark_inexact(self, facet: Tensor, node: str) -> None:
        self.inexact.append((distinct(facet), node))

    def relate(self, parents: Tensor, children: Tensor, node: str) -> None:
        """Both have the same rank; children varies on axes where parents does not."""
        over = axes(parents)
        parents, children = parents.expand(children.shape), children
        inner = [a for a in axes(children) if a not in over]
        keep = [*over, *inner]
        index = tuple(slice(None) if a in keep else 0 for a in range(children.ndim))
        p, c = parents[index], children[index]
        order = [sorted(keep).index(a) for a in keep]
        p, c = p.permute(order), c.permute(order)
        n_rows = int(np.prod([children.shape[a] for a in over]))
        self.rows.append(Rows(p.reshape(n_rows, -1)[:, 0].clone(), c.reshape(n_rows, -1).clone(), node))


def axes(facet: Tensor) -> tuple[int, ...]:
    """The axes a facet's labels depend on."""
    return tuple(i for i in range(facet.ndim) if facet.stride(i) != 0 and facet.shape[i] > 1)


def distinct(facet: Tensor) -> Tensor:
    index = tuple(slice(None) if a in axes(facet) else 0 for a in range(facet.ndim))
    found: Tensor = torch.unique(facet[index])
    return found


def compress(facet: Tensor) -> Tensor:
    """The same facet with stride 0 along every axis its labels do not change on."""
    for axis in axes(facet):
        first = facet.narrow(axis, 0, 1).expand(facet.shape)
        if torch.equal(reduce_to(facet, axes(facet)), reduce_to(first, axes(facet))):
            facet = first
    return facet


def reduce_to(facet: Tensor, keep: Iterable[int]) -> Tensor:
    """The facet indexed at 0 on every axis not in `keep`; those axes are gone."""
    wanted = set(keep)
    return facet[tuple(slice(None) if a in wanted else 0 for a in range(facet.ndim))]


def along(labels: Tensor, axis: int, shape: Sequence[int]) -> Tensor:
    """A facet of that shape depending on one axis only."""
    view = [1] * len(shape)
    view[axis] = -1
    return labels.reshape(view).expand(*shape)


def _squeeze(a: Tensor, b: Tensor) -> Tensor:
    keep = set(axes(a)) | set(axes(b))
    return reduce_to(a, keep)


@dataclass(frozen=True, slots=True)
class Classes:
    """The resolved ledger: `of[label]` is its class, counted from 0; class 0 never goes.

    `parent[class]` is the class of the row it lies in, -1 for none; rows of one relation keep equal counts,
    and `relations[class]` names the relations a child takes part in, `row[class]` its row there.
    """

    of: IntArray
    parent: IntArray
    row: IntArray
    relations: dict[int, tuple[int, ...]]
    reasons: dict[int, tuple[str, str]]
    inexact: dict[int, tuple[str, ...]]

    def __call__(self, facet: Tensor) -> tuple[tuple[int, ...], IntArray]:
        """The axes a facet lies on and the class of every coordinate there."""
        over = axes(facet)
        return over, self.of[reduce_to(facet, over).numpy()]


def resolve(ledger: Ledger) -> Classes:
    """Ties to classes, rows to parents; contradictions between rows end in class 0 or in columns."""
    pairs = [np.zeros((2, 0), dtype=np.int64)] + [p.numpy() for p in ledger.pairs]
    edges = np.concatenate(pairs, axis=1)
    rows = list(ledger.rows)
    while True:
        of = _components(edges, ledger.count)
        more, rows = _row_ties(of, rows)
        if not more.shape[1]:
            break
        edges = np.concatenate([edges, more], axis=1)
    of = _counted(of)
    parent = np.full(int(of.max()) + 1, -1, dtype=np.int64)
    row = np.zeros(len(parent), dtype=np.int64)
    relations: dict[int, tuple[int, ...]] = defaultdict(tuple)
    for i, relation in enumerate(rows):
        children = of[relation.children.numpy()]
        parent[children] = of[relation.parents.numpy()][:, None]
        row[children] = np.arange(len(children))[:, None]
        for c in np.unique(children).tolist():
            relations[c] += (i,)
    for cells in _cells(of, rows):
        blocks = _blocks(cells)
        row[list(blocks)] = list(blocks.values())
    parent[0] = -1
    return Classes(of, parent, row, dict(relations), _reasons(ledger, edges), _inexact(ledger, of))


def _components(edges: IntArray, count: int) -> IntArray:
    graph = coo_matrix((np.ones(edges.shape[1], dtype=np.int8), (edges[0], edges[1])), shape=(count, count))
    _, component = connected_components(graph, directed=False)
    # the smallest label names its class, so that 0 stays 0
    first = np.full(component.max() + 1, count, dtype=np.int64)
    np.minimum.at(first, component, np.arange(count))
    of: IntArray = first[component]
    return of


def _counted(of: IntArray) -> IntArray:
    """Classes named by their smallest labels, numbered in that order."""
    named = np.zeros(len(of), dtype=np.int64)
    named[of] = 1
    counted: IntArray = (np.cumsum(named) - 1)[of]
    return counted


def _row_ties(of: IntArray, rows: list[Rows]) -> tuple[IntArray, list[Rows]]:
    """Further ties that rows imply, and the rows that remain rows."""
    ties: list[tuple[int, int]] = []
    kept: list[Rows] = []
    owner: dict[int, int] = {}
    crossing = _crossing(_places(of, rows))
    for i, relation in enumerate(rows):
        parents, children = of[relation.parents.numpy()], of[relation.children.numpy()]
        if (children == children[:, :1]).all():  # rows of one class: the unit is the row
            ties += [(int(p), int(c)) for p, c in zip(parents, children[:, 0], strict=True) if p != c]
            continue
        if _shared_between_rows(children):  # columns run through all rows: no row can go alone
            ties += [(int(p), 0) for p in parents if p != 0]
            continue
        kept.append(relation)
        if i in crossing:  # its rows overlap others in part: none of them can go alone
            ties += [(int(p), 0) for p in parents if p != 0]
            continue
        if (parents == 0).any():
            ties += [(int(p), 0) for p in parents if p != 0]
        for p, row in zip(parents, children, strict=True):
            for c in np.unique(row):
                if c == 0:
                    if p != 0:
                        ties.append((int(p), 0))
                elif owner.setdefault(int(c), int(p)) != p:
                    ties.append((owner[int(c)], int(p)))
    return np.array(ties, dtype=np.int64).reshape(-1, 2).T, kept


def _crossing(places: Mapping[int, Mapping[int, int]]) -> set[int]:
    """Relations that part the same units in two ways of which neither refines the other (4 rows of 24, 6 of 16)."""
    met: dict[tuple[int, int], set[tuple[int, int]]] = defaultdict(set)
    for of_class in places.values():
        for (i, row), (j, other) in itertools.combinations(of_class.items(), 2):
            met[i, j].add((row, other))
    return {relation for pair, cells in met.items() if _cross(cells) for relation in pair}


def _places(of: IntArray, rows: Sequence[Rows]) -> dict[int, dict[int, int]]:
    """For each class the relations it takes part in and its row there."""
    places: dict[int, dict[int, int]] = defaultdict(dict)
    for i, relation in enumerate(rows):
        for row, children in enumerate(of[relation.children.numpy()]):
            for c in np.unique(children[children != 0]).tolist():
                places[c][i] = row
    return places


def _cross(cells: Collection[tuple[int, int]]) -> bool:
    """Whether some row meets several others on either side."""
    left, right = ({cell[side] for cell in cells} for side in (0, 1))
    return len(cells) > max(len(left), len(right))


def _cells(of: IntArray, rows: Sequence[Rows]) -> Iterator[dict[int, tuple[int, ...]]]:
    """For each set of crossing relations that share units: the row of every unit in each of them."""
    places = _places(of, rows)
    crossing = _crossing(places)
    together: dict[tuple[int, ...], dict[int, tuple[int, ...]]] = defaultdict(dict)
    for c, of_class in places.items():
        own = tuple(i for i in of_class if i in crossing)
        if own:
            together[own][c] = tuple(of_class[i] for i in own)
    yield from together.values()


def _blocks(cells: dict[int, tuple[int, ...]]) -> dict[int, int]:
    """Classes and the rows each lies in; blocks out that all of those rows are made of, where rows cross.

    Rows of 24 and of 16 cut 48 units into cells of 16, 8, 8 and 16. Blocks of 8 that each lose equally many leave
    equally many in every row.
    """
    members: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for c in sorted(cells):
        members[cells[c]].append(c)
    size = math.gcd(*(len(classes) for classes in members.values()))
    blocks: dict[int, int] = {}
    first = 0
    for classes in members.values():
        blocks |= {c: first + place // size for place, c in enumerate(classes)}
        first += len(classes) // size
    return blocks


def _shared_between_rows(children: IntArray) -> bool:
    per_row = [np.unique(row[row != 0]) for row in children]
    everything = np.concatenate(per_row) if per_row else np.zeros(0, dtype=np.int64)
    return len(np.unique(everything)) < len(everything)


def _reasons(ledger: Ledger, edges: IntArray) -> dict[int, tuple[str, str]]:
    """For each label frozen by what it is tied to: the node and reason found first among those ties."""
    island = _components(edges[:, (edges != 0).all(axis=0)], ledger.count)
    first: dict[int, tuple[str, str]] = {}
    for labels, node, reason in ledger.frozen:
        for name in np.unique(island[labels.numpy()]).tolist():
            first.setdefault(name, (node, reason))
    found = np.flatnonzero(np.isin(island, list(first)))
    return {label: first[name] for label, name in zip(found.tolist(), island[found].tolist(), strict=True)}


def _inexact(ledger: Ledger, of: IntArray) -> dict[int, tuple[str, ...]]:
    found: dict[int, list[str]] = defaultdict(list)
    for labels, node in ledger.inexact:
        for c in np.unique(of[labels.numpy()]).tolist():
            if node not in found[c]:
                found[c].append(node)
    return {c: tuple(nodes) for c, nodes in found.items()}
