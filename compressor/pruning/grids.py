"""Rows and columns over the same units: where they make a grid both may go, elsewhere a column is one unit.

Twelve heads (rows) of 64 dimensions that share a table of relative positions (columns): a head goes, or a dimension
goes from all heads; a cell, one dimension of one head, goes with either. Labels' classes and their relations in, ties
that these imply out. Knows no operation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

from ..records import IntArray
from .labels import Columns, Rows

Mask = NDArray[np.bool_]


def components(edges: IntArray, count: int) -> IntArray:
    """[labels] the smallest label each is tied to, over [2, E] ties."""
    graph = coo_matrix((np.ones(edges.shape[1], dtype=np.int8), (edges[0], edges[1])), shape=(count, count))
    _, component = connected_components(graph, directed=False)
    # the smallest label names its class, so that 0 stays 0
    smallest = np.full(component.max() + 1, count, dtype=np.int64)
    np.minimum.at(smallest, component, np.arange(count))
    class_of: IntArray = smallest[component]
    return class_of


def column_ties(
    class_of: IntArray, rows: Sequence[Rows], columns: Sequence[Columns], edges: IntArray
) -> tuple[IntArray, list[Columns]]:
    """Ties that columns imply, [2, T], and the columns that remain columns, after `class_of` of the ties `edges`."""
    ties, columns = _without_whole_rows(class_of, columns)
    if ties.shape[1]:
        return ties, columns

    columns_joined = components(joined_with(edges, columns), len(class_of))
    view = _View(class_of, columns_joined, cells_of(class_of, columns))
    sound, unsound = _parted_by_soundness(view, rows, columns)
    if unsound:
        return joined_with(ties, unsound), sound
    return _ties_of_fixed(view, rows), sound


def unboxed_ties(
    class_of: IntArray, rows: Sequence[Rows], columns: Sequence[Columns]
) -> tuple[IntArray, list[Columns]]:
    """Ties of columns over rows of which some lie in more places than others, [2, T], and the columns that remain.

    Queries, keys and values of one layer as [3, heads, d], where queries' and keys' heads are not those of the values
    (talking heads): a head that goes in two of three places leaves no box, so only dimensions may go, from all heads.
    """
    row_of = np.full(len(class_of), -1, dtype=np.int64)  # [classes] the row's class, -1: in no row
    for relation in rows:
        children = class_of[relation.children.numpy()]  # [R, K]
        row_of[children] = class_of[relation.parents.numpy()][:, None]
    ties = [np.zeros((2, 0), dtype=np.int64)]
    remaining: list[Columns] = []
    for relation_of_columns in columns:
        parents = row_of[class_of[relation_of_columns.children.numpy()[:, 0]]]  # [R] the row that each entry lies in
        # heads 5 6 7 of queries and of keys, 8 9 10 of values: 5 6 7 lie in two places each, 8 9 10 in one
        _, counts = np.unique(parents[parents > 0], return_counts=True)
        if len(np.unique(counts)) > 1:
            ties.append(pairs_of(relation_of_columns))
        else:
            remaining.append(relation_of_columns)
    return np.concatenate(ties, axis=1), remaining


def pairs_of(relation: Columns) -> IntArray:
    """[2, R * K] each column's label with those of its cells."""
    children: IntArray = relation.children.numpy()
    columns = np.broadcast_to(relation.parents.numpy(), children.shape)
    return np.stack([columns.reshape(-1), children.reshape(-1)])


def joined_with(edges: IntArray, columns: Sequence[Columns]) -> IntArray:
    """[2, E] the edges, and behind them each column's label with those of its cells: columns as ties."""
    return np.concatenate([edges, *map(pairs_of, columns)], axis=1)


def cells_of(class_of: IntArray, columns: Sequence[Columns]) -> Mask:
    """[labels] whether a label's class is a cell."""
    is_cell = np.zeros(len(class_of), dtype=bool)
    for relation in columns:
        is_cell[class_of[relation.children.numpy()]] = True
    is_cell[0] = False
    return is_cell[class_of]


def distinct_rows(table: IntArray) -> IntArray:
    """Of classes [R, K], each row once: heads that stand once for each image of the batch count once."""
    _, first = np.unique(np.sort(table, axis=1), axis=0, return_index=True)
    return table[np.sort(first)]


def shared_between_rows(table: IntArray) -> bool:
    """Whether some class but 0 lies in more than one row of [R, K]."""
    per_row = [np.unique(row[row != 0]) for row in table]
    listed = np.concatenate([np.zeros(0, dtype=np.int64), *per_row])
    return len(np.unique(listed)) < len(listed)


@dataclass(frozen=True, slots=True)
class _View:
    """[labels] the class without columns, the class where columns are ties, and whether the label is a cell's."""

    class_of: IntArray
    column_of: IntArray
    is_cell: Mask


def _without_whole_rows(class_of: IntArray, columns: Sequence[Columns]) -> tuple[IntArray, list[Columns]]:
    """The columns beside rows that only go as a whole; those they would cut never go, which are the ties."""
    ties: list[IntArray] = []
    remaining: list[Columns] = []
    for relation in columns:
        children = class_of[relation.children.numpy()]  # [R, K]
        whole = (children == children[:, :1]).all(axis=1)  # [R] whether a row is one class
        if whole.any():
            never = relation.parents.numpy()
            never = never[class_of[never] != 0]
            ties.append(np.stack([never, np.zeros_like(never)]))
        if not whole.all():
            remaining.append(Columns(relation.parents, relation.children[~whole]))
    return np.concatenate([np.zeros((2, 0), dtype=np.int64), *ties], axis=1), remaining


def _parted_by_soundness(
    view: _View, rows: Sequence[Rows], columns: Sequence[Columns]
) -> tuple[list[Columns], list[Columns]]:
    """Columns that cut rows, all of one relation alike, and no unit that is not a cell; then all other columns."""
    count = len(view.class_of)
    # of classes: whether one lies in rows, in rows that are cut unevenly, and whether units other than cells are in it
    in_rows, is_uneven, is_mixed = (np.zeros(count, dtype=bool) for _ in range(3))
    for relation in rows:
        is_mixed[view.column_of[relation.parents.numpy()]] = True
        table = distinct_rows(view.class_of[relation.children.numpy()])  # [rows, K]
        if shared_between_rows(table):
            continue
        in_rows[table] = True
        if not _cut_alike(view, table):
            is_uneven[table] = True
        alone = table[~view.is_cell[table]]
        is_mixed[view.column_of[alone]] = True
    in_rows[0], is_uneven[0], is_mixed[0] = True, False, False

    sound: list[Columns] = []
    unsound: list[Columns] = []
    for relation_of_columns in columns:
        labels = relation_of_columns.parents.numpy()
        children = view.class_of[relation_of_columns.children.numpy()]  # [R, K]
        is_grid = in_rows[children].all() and not is_uneven[children].any()
        is_pure = not view.is_cell[labels].any() and not is_mixed[view.column_of[labels]].any()
        if is_grid and is_pure:
            sound.append(relation_of_columns)
        else:
            unsound.append(relation_of_columns)
    return sound, unsound


def _cut_alike(view: _View, table: IntArray) -> bool:
    """Whether every row of classes [R, K] has as many cells of each column as the others."""
    columns = np.sort(np.where(view.is_cell[table], view.column_of[table], -1), axis=1)
    return bool((columns == columns[:1]).all())


def _ties_of_fixed(view: _View, rows: Sequence[Rows]) -> IntArray:
    """Of cells whose columns never go: rows that they fill are one unit each; in a row that never goes they stay."""
    ties = [np.zeros((2, 0), dtype=np.int64)]
    for relation in rows:
        children = view.class_of[relation.children.numpy()]  # [R, K]
        parents = np.broadcast_to(view.class_of[relation.parents.numpy()][:, None], children.shape)
        fixed = view.is_cell[children] & (view.column_of[children] == 0)
        tied = fixed if fixed.all() else fixed & (parents == 0)
        tied &= parents != children
        ties.append(np.stack([parents[tied], children[tied]]))
    return np.concatenate(ties, axis=1)
