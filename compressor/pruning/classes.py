"""The resolved ledger: ties to classes by connected components, rows to parents, contradictions to what never goes.

What the walk over a graph tied goes in; the class of every label, the row it lies in and why it may not go come out.
"""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components
from torch import Tensor

from ..records import IntArray
from .labels import Ledger, Rows, axes, reduce_to


@dataclass(frozen=True, slots=True)
class Classes:
    """The resolved ledger: `of[label]` is its class, counted from 0; class 0 never goes.

    `parent[class]` is the class of the row it lies in, -1 for none; rows of one relation keep equal counts,
    and `relations[class]` names the relations a child takes part in, `row[class]` its row there.
    `reasons[label]` is (node, reason) of a label that may not go, `inexact[class]` the nodes marked so.
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
    nothing = np.zeros((2, 0), dtype=np.int64)
    edges = np.concatenate([nothing, *(pairs.numpy() for pairs in ledger.pairs)], axis=1)  # [2, ties]
    rows = list(ledger.rows)
    # a tie that rows imply may make other rows' members one, so until nothing is new
    while True:
        class_of = _components(edges, ledger.count)
        implied, rows = _row_ties(class_of, rows)
        if implied.shape[1] == 0:
            break
        edges = np.concatenate([edges, implied], axis=1)

    class_of = _counted(class_of)
    parent = np.full(int(class_of.max()) + 1, -1, dtype=np.int64)
    row = np.zeros(len(parent), dtype=np.int64)
    relations: dict[int, tuple[int, ...]] = defaultdict(tuple)
    for number, relation in enumerate(rows):
        children = class_of[relation.children.numpy()]  # [R, K]
        parent[children] = class_of[relation.parents.numpy()][:, None]
        row[children] = np.arange(len(children))[:, None]
        for child in np.unique(children).tolist():
            relations[child] += (number,)

    for cells in _cells(class_of, rows):
        blocks = _blocks(cells)  # in place of the rows of one relation: they keep those of all
        row[list(blocks)] = list(blocks.values())
    parent[0] = -1
    return Classes(class_of, parent, row, dict(relations), _reasons(ledger, edges), _inexact(ledger, class_of))


def _components(edges: IntArray, count: int) -> IntArray:
    """[labels] the smallest label each is tied to, over [2, E] ties."""
    graph = coo_matrix((np.ones(edges.shape[1], dtype=np.int8), (edges[0], edges[1])), shape=(count, count))
    _, component = connected_components(graph, directed=False)
    # the smallest label names its class, so that 0 stays 0
    smallest = np.full(component.max() + 1, count, dtype=np.int64)
    np.minimum.at(smallest, component, np.arange(count))
    class_of: IntArray = smallest[component]
    return class_of


def _counted(class_of: IntArray) -> IntArray:
    """Classes named by their smallest labels, numbered in that order: [0, 1, 1, 3, 1] becomes [0, 1, 1, 2, 1]."""
    names_a_class = np.zeros(len(class_of), dtype=np.int64)
    names_a_class[class_of] = 1
    counted: IntArray = (np.cumsum(names_a_class) - 1)[class_of]
    return counted


def _row_ties(class_of: IntArray, rows: list[Rows]) -> tuple[IntArray, list[Rows]]:
    """Further ties that rows imply, [2, T], and the rows that remain rows."""
    ties: list[tuple[int, int]] = []
    remaining: list[Rows] = []
    row_of_member: dict[int, int] = {}
    crossing = _crossing(_places(class_of, rows))

    for number, relation in enumerate(rows):
        parents = class_of[relation.parents.numpy()]  # [R]
        children = class_of[relation.children.numpy()]  # [R, K]
        none_may_go = [(parent, 0) for parent in parents.tolist() if parent != 0]

        if (children == children[:, :1]).all():  # rows of one class: the unit is the row
            pairs = zip(parents.tolist(), children[:, 0].tolist(), strict=True)
            ties += [(parent, child) for parent, child in pairs if parent != child]
            continue
        if _shared_between_rows(children):  # columns run through all rows: no row can go alone
            ties += none_may_go
            continue

        remaining.append(relation)
        if number in crossing:  # its rows overlap others in part: none of them can go alone
            ties += none_may_go
            continue
        if (parents == 0).any():  # the rows of a relation may all go, or none
            ties += none_may_go
        ties += _member_ties(parents, children, row_of_member)

    return np.array(ties, dtype=np.int64).reshape(-1, 2).T, remaining


def _member_ties(parents: IntArray, children: IntArray, row_of_member: dict[int, int]) -> list[tuple[int, int]]:
    """A row with a member that may not go stays; a member of two rows makes them one.

    `row_of_member` holds the row each class was first seen in, over all relations, and is added to.
    """
    ties: list[tuple[int, int]] = []
    for parent, row in zip(parents.tolist(), children, strict=True):
        for member in np.unique(row).tolist():
            # what never goes lies in a row that never goes
            first_parent = 0 if member == 0 else row_of_member.setdefault(member, parent)
            if first_parent != parent:
                ties.append((first_parent, parent))
    return ties


def _crossing(places: Mapping[int, Mapping[int, int]]) -> set[int]:
    """Relations that part the same units in two ways of which neither refines the other (4 rows of 24, 6 of 16)."""
    cells_of: dict[tuple[int, int], set[tuple[int, int]]] = defaultdict(set)
    for row_in in places.values():
        for (first, row_in_first), (second, row_in_second) in itertools.combinations(row_in.items(), 2):
            cells_of[first, second].add((row_in_first, row_in_second))

    crossing: set[int] = set()
    for pair, cells in cells_of.items():
        if _cross(cells):
            crossing.update(pair)
    return crossing


def _places(class_of: IntArray, rows: Sequence[Rows]) -> dict[int, dict[int, int]]:
    """For each class the relations it takes part in and its row there."""
    places: dict[int, dict[int, int]] = defaultdict(dict)
    for number, relation in enumerate(rows):
        for row, children in enumerate(class_of[relation.children.numpy()]):  # [R, K]
            for child in np.unique(children[children != 0]).tolist():
                places[child][number] = row
    return places


def _cross(cells: Collection[tuple[int, int]]) -> bool:
    """Whether, of two ways to part units, neither refines the other; a cell is a row of each that share units.

    Rows of 24 and of 16 among 48 units share cells (0, 0), (0, 1), (1, 1), (1, 2): 4, where refined rows had 3.
    """
    rows_left, rows_right = {left for left, _ in cells}, {right for _, right in cells}
    return len(cells) > max(len(rows_left), len(rows_right))


def _cells(class_of: IntArray, rows: Sequence[Rows]) -> Iterator[dict[int, tuple[int, ...]]]:
    """For each set of crossing relations that share units: the row of every unit in each of them."""
    places = _places(class_of, rows)
    crossing = _crossing(places)
    cells_of: dict[tuple[int, ...], dict[int, tuple[int, ...]]] = defaultdict(dict)
    for unit, row_in in places.items():
        relations = tuple(number for number in row_in if number in crossing)
        if relations:
            cells_of[relations][unit] = tuple(row_in[number] for number in relations)
    yield from cells_of.values()


def _blocks(cells: dict[int, tuple[int, ...]]) -> dict[int, int]:
    """Classes and the rows each lies in; blocks out that all of those rows are made of, where rows cross.

    Rows of 24 and of 16 cut 48 units into cells of 16, 8, 8 and 16. Blocks of 8 that each lose equally many leave
    equally many in every row.
    """
    members: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for unit in sorted(cells):
        members[cells[unit]].append(unit)
    size = math.gcd(*(len(units) for units in members.values()))

    blocks: dict[int, int] = {}
    first = 0  # the number of this cell's first block
    for units in members.values():
        blocks |= {unit: first + place // size for place, unit in enumerate(units)}
        first += len(units) // size
    return blocks


def _shared_between_rows(children: IntArray) -> bool:
    """Whether some class but 0 lies in more than one row of [R, K]."""
    per_row = [np.unique(row[row != 0]) for row in children]
    if not per_row:
        return False
    listed = np.concatenate(per_row)
    return len(np.unique(listed)) < len(listed)


def _reasons(ledger: Ledger, edges: IntArray) -> dict[int, tuple[str, str]]:
    """For each label frozen by what it is tied to: the node and reason found first among those ties."""
    # without ties to 0, which would join everything frozen whatever the reason
    island_of = _components(edges[:, (edges != 0).all(axis=0)], ledger.count)
    reason_of: dict[int, tuple[str, str]] = {}
    for labels, node, reason in ledger.frozen:
        for island in np.unique(island_of[labels.numpy()]).tolist():
            reason_of.setdefault(island, (node, reason))

    frozen = np.flatnonzero(np.isin(island_of, list(reason_of)))
    islands = island_of[frozen].tolist()
    return {label: reason_of[island] for label, island in zip(frozen.tolist(), islands, strict=True)}


def _inexact(ledger: Ledger, class_of: IntArray) -> dict[int, tuple[str, ...]]:
    """For each class the nodes whose results its labels were marked for, each once, in graph order."""
    nodes_of: dict[int, list[str]] = defaultdict(list)
    for labels, node in ledger.inexact:
        for member in np.unique(class_of[labels.numpy()]).tolist():
            if node not in nodes_of[member]:
                nodes_of[member].append(node)
    return {member: tuple(nodes) for member, nodes in nodes_of.items()}
