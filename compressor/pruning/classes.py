"""The resolved ledger: ties to classes, rows to parents, columns to cells, contradictions to what never goes.

What the walk over a graph tied goes in; the class of every label, the row it lies in and why it may not go come out.
"""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..records import IntArray
from .grids import Mask, cells_of, column_ties, components, joined_with, shared_between_rows, unboxed_ties
from .labels import Columns, Ledger, Rows, axes, reduce_to


@dataclass(frozen=True, slots=True)
class Classes:
    """The resolved ledger: `of[label]` is its class, counted from 0; class 0 never goes.

    `parent[class]` is the class of the row it lies in, -1 for none; rows of one relation keep equal counts,
    and `relations[class]` names the relations a child takes part in, `row[class]` its row there.
    `column[class]` is the class of the column that a cell lies in, -1 for what is no cell: a cell is where a row meets
    a column, it goes with either and never alone.
    `reasons[label]` is (node, reason) of a label that may not go, `inexact[class]` the nodes marked so.
    """

    of: IntArray
    parent: IntArray
    column: IntArray
    row: IntArray
    relations: dict[int, tuple[int, ...]]
    reasons: dict[int, tuple[str, str]]
    inexact: dict[int, tuple[str, ...]]

    def __call__(self, facet: Tensor) -> tuple[tuple[int, ...], IntArray]:
        """The axes a facet lies on and the class of every coordinate there."""
        over = axes(facet)
        return over, self.of[reduce_to(facet, over).numpy()]

    def units(self, classes: IntArray) -> IntArray:
        """The classes with columns in place of cells: what goes by itself."""
        return np.where(self.column[classes] >= 0, self.column[classes], classes)


def resolve(ledger: Ledger) -> Classes:
    """Ties to classes, rows to parents, columns to cells; contradictions between rows end in class 0 or in columns."""
    class_of, edges, rows, columns = _settled(ledger)
    is_cell = cells_of(class_of, columns)
    joined = joined_with(edges, columns)
    class_of, column_of = _named(class_of, components(joined, ledger.count), is_cell)

    nowhere = np.full(int(class_of.max()) + 1, -1, dtype=np.int64)  # [classes]
    column, parent, row = nowhere.copy(), nowhere.copy(), np.zeros(len(nowhere), dtype=np.int64)
    column[class_of[is_cell]] = column_of[is_cell]
    relations: dict[int, tuple[int, ...]] = defaultdict(tuple)
    for number, relation in enumerate(rows):
        children = class_of[relation.children.numpy()]  # [R, K]
        parent[children] = class_of[relation.parents.numpy()][:, None]
        row[children] = np.arange(len(children))[:, None]
        for child in np.unique(children).tolist():
            relations[child] += (number,)
    parent[0] = -1

    for parts in _parts(class_of, rows, is_cell):
        blocks = _blocks(parts)  # in place of the rows of one relation: they keep those of all
        row[list(blocks)] = list(blocks.values())
    reasons, inexact = _reasons(ledger, joined), _inexact(ledger, column_of)
    return Classes(class_of, parent, column, row, dict(relations), reasons, inexact)


def _settled(ledger: Ledger) -> tuple[IntArray, IntArray, list[Rows], list[Columns]]:
    """[labels] classes, the ties they come of, [2, ties], and the rows and columns that imply no further ones."""
    nothing = np.zeros((2, 0), dtype=np.int64)
    edges = np.concatenate([nothing, *(pairs.numpy() for pairs in ledger.pairs)], axis=1)
    rows, columns = list(ledger.rows), list(ledger.columns)
    # a tie that rows or columns imply may make other rows' members one, so until nothing is new
    while True:
        class_of = components(edges, ledger.count)
        implied, rows, columns = _implied(class_of, edges, rows, columns)
        if not implied.size:
            return class_of, edges, rows, columns
        edges = np.concatenate([edges, implied], axis=1)


def _implied(
    class_of: IntArray, edges: IntArray, rows: list[Rows], columns: list[Columns]
) -> tuple[IntArray, list[Rows], list[Columns]]:
    """Further ties, [2, T], of the first kind of relations that implies any; the rows and columns that remain."""
    implied, columns = column_ties(class_of, rows, columns, edges)
    if implied.size:
        return implied, rows, columns
    implied, rows = _row_ties(class_of, rows, cells_of(class_of, columns))
    if implied.size:
        return implied, rows, columns
    implied, columns = unboxed_ties(class_of, rows, columns)
    return implied, rows, columns


def _named(class_of: IntArray, joined: IntArray, is_cell: Mask) -> tuple[IntArray, IntArray]:
    """[labels] classes, and of cells the columns they lie in, numbered together in the order of their smallest labels.

    `joined` are the classes where columns are ties: a column is named by the smallest of its labels that is no cell's.
    """
    count = len(class_of)
    smallest = np.full(count, count, dtype=np.int64)
    others = np.flatnonzero(~is_cell)
    np.minimum.at(smallest, joined[others], others)
    column_of = smallest[joined]
    class_of = np.where(is_cell, class_of, column_of)
    column_of = np.where(is_cell, column_of, class_of)
    numbered = _counted(np.concatenate([class_of, column_of]))
    return numbered[:count], numbered[count:]


def _counted(class_of: IntArray) -> IntArray:
    """Classes named by their smallest labels, numbered in that order: [0, 1, 1, 3, 1] becomes [0, 1, 1, 2, 1]."""
    _, counted = np.unique(class_of, return_inverse=True)
    return counted


def _row_ties(class_of: IntArray, rows: Sequence[Rows], is_cell: Mask) -> tuple[IntArray, list[Rows]]:
    """Further ties that rows imply, [2, T], and the rows that remain rows."""
    repeats, rows = _without_repeats(class_of, rows)
    crossing = _crossing(_places(class_of, rows, is_cell))
    ties = [repeats]
    remaining: list[Rows] = []
    row_of_member = {0: 0}  # what never goes lies in a row that never goes
    for number, relation in enumerate(rows):
        parents = class_of[relation.parents.numpy()]  # [R]
        children = class_of[relation.children.numpy()]  # [R, K]
        none_may_go = _pairs(parents, np.zeros_like(parents))

        if (children == children[:, :1]).all():  # rows of one class: the unit is the row
            ties.append(_pairs(parents, children[:, 0]))
            continue
        if shared_between_rows(children):  # columns run through all rows: no row can go alone
            ties.append(none_may_go)
            continue

        remaining.append(relation)
        if number in crossing:  # its rows overlap others in part: none of them can go alone
            ties.append(none_may_go)
            continue
        if (parents == 0).any():  # the rows of a relation may all go, or none
            ties.append(none_may_go)
        ties.append(_member_ties(parents, children, row_of_member))
    return np.concatenate(ties, axis=1), remaining


def _pairs(first: IntArray, second: IntArray) -> IntArray:
    """[2, T] classes at the same places that are not one yet: of [3, 4] and [3, 7], 4 with 7."""
    differ = first != second
    return np.stack([first[differ], second[differ]])


def _without_repeats(class_of: IntArray, rows: Sequence[Rows]) -> tuple[IntArray, list[Rows]]:
    """Rows without those of the same members as an earlier one, whose parents are tied, [2, T], to its own.

    [batch * heads, d] lists the rows of its heads once for each image.
    """
    ties = [np.zeros((2, 0), dtype=np.int64)]
    distinct: list[Rows] = []
    for relation in rows:
        children = np.sort(class_of[relation.children.numpy()], axis=1)  # [R, K]
        _, first, number = np.unique(children, axis=0, return_index=True, return_inverse=True)
        if len(first) in (1, len(children)):
            distinct.append(relation)
            continue
        parents = class_of[relation.parents.numpy()]
        ties.append(_pairs(parents[first[number.reshape(-1)]], parents))
        places = torch.from_numpy(np.sort(first))
        distinct.append(Rows(relation.parents[places], relation.children[places], relation.node))
    return np.concatenate(ties, axis=1), distinct


def _member_ties(parents: IntArray, children: IntArray, row_of_member: dict[int, int]) -> IntArray:
    """A row with a member that may not go stays; a member of two rows makes them one: ties, [2, T].

    `row_of_member` holds the row each class was first seen in, over all relations, and is added to.
    """
    ties = [np.zeros((2, 0), dtype=np.int64)]
    for parent, row in zip(parents.tolist(), children, strict=True):
        members = np.unique(row).tolist()
        first_parents = np.array([row_of_member.setdefault(member, parent) for member in members])
        ties.append(_pairs(first_parents, np.full_like(first_parents, parent)))
    return np.concatenate(ties, axis=1)


def _crossing(places: Mapping[int, Mapping[int, int]]) -> set[int]:
    """Relations that part the same units in two ways of which neither refines the other (4 rows of 24, 6 of 16)."""
    parts_of: dict[tuple[int, int], set[tuple[int, int]]] = defaultdict(set)
    for row_in in places.values():
        for (first, row_in_first), (second, row_in_second) in itertools.combinations(row_in.items(), 2):
            parts_of[first, second].add((row_in_first, row_in_second))

    crossing = [pair for pair, parts in parts_of.items() if _cross(parts)]
    return set(itertools.chain.from_iterable(crossing))


def _places(class_of: IntArray, rows: Sequence[Rows], is_cell: Mask) -> dict[int, dict[int, int]]:
    """For each class, but cells, the relations it takes part in and its row there; `is_cell` is [labels]."""
    places: dict[int, dict[int, int]] = defaultdict(dict)
    for number, relation in enumerate(rows):
        labels = relation.children.numpy()
        alone = np.where(is_cell[labels], 0, class_of[labels])  # [R, K]
        for row, children in enumerate(alone):
            for child in np.unique(children[children != 0]).tolist():
                places[child][number] = row
    return places


def _cross(parts: Collection[tuple[int, int]]) -> bool:
    """Whether, of two ways to part units, neither refines the other; a part is a row of each that share units.

    Rows of 24 and of 16 among 48 units share parts (0, 0), (0, 1), (1, 1), (1, 2): 4, where refined rows had 3.
    """
    rows_left, rows_right = {left for left, _ in parts}, {right for _, right in parts}
    return len(parts) > max(len(rows_left), len(rows_right))


def _parts(class_of: IntArray, rows: Sequence[Rows], is_cell: Mask) -> Iterator[dict[int, tuple[int, ...]]]:
    """For each set of crossing relations that share units: the row of every unit in each of them."""
    places = _places(class_of, rows, is_cell)
    crossing = _crossing(places)
    parts_of: dict[tuple[int, ...], dict[int, tuple[int, ...]]] = defaultdict(dict)
    for unit, row_in in places.items():
        relations = tuple(number for number in row_in if number in crossing)
        if relations:
            parts_of[relations][unit] = tuple(row_in[number] for number in relations)
    yield from parts_of.values()


def _blocks(parts: dict[int, tuple[int, ...]]) -> dict[int, int]:
    """Classes and the rows each lies in; blocks out that all of those rows are made of, where rows cross.

    Rows of 24 and of 16 cut 48 units into parts of 16, 8, 8 and 16. Blocks of 8 that each lose equally many leave
    equally many in every row.
    """
    members: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for unit in sorted(parts):
        members[parts[unit]].append(unit)
    size = math.gcd(*(len(units) for units in members.values()))

    blocks: dict[int, int] = {}
    first = 0  # the number of this part's first block
    for units in members.values():
        blocks |= {unit: first + place // size for place, unit in enumerate(units)}
        first += len(units) // size
    return blocks


def _reasons(ledger: Ledger, edges: IntArray) -> dict[int, tuple[str, str]]:
    """For each label frozen by what it is tied to: the node and reason found first among those ties."""
    # without ties to 0, which would join everything frozen whatever the reason
    island_of = components(edges[:, (edges != 0).all(axis=0)], ledger.count)
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
            nodes_of[member].append(node)
    return {member: tuple(dict.fromkeys(nodes)) for member, nodes in nodes_of.items()}
