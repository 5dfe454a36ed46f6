"""What tensors ask of groups beyond their ties: spans of which something stays, groups that lose equally many.

A structure with groups in, sets of units and of names out. Knows no scores but those it is handed.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterator, Sequence

import numpy as np

from ..records import FloatArray, Group, IntArray
from .labels import values_in
from .structure import Lying, Structure


def units_by_row(group: Group) -> list[IntArray]:
    """The units of each row that has to keep as many as the others; all of them where rows need not."""
    if not group.balanced:
        return [np.arange(group.size)]
    return [np.flatnonzero(group.rows == row) for row in np.unique(group.rows)]


def spans_of(structure: Structure) -> dict[str, tuple[IntArray, ...]]:
    """The smallest sets of units, in each group, that make up a whole axis of some tensor."""
    sets_of: dict[int, set[frozenset[int]]] = defaultdict(set)
    for _, classes in _facets(structure):
        for members in _levels(classes, structure.classes.parent):
            goes = np.unique(structure.classes.units(members))
            owners = structure.group_of[goes]
            if owners[0] >= 0:
                units = structure.unit_of[goes[owners == owners[0]]]
                sets_of[int(owners[0])].add(frozenset(units.tolist()))
    groups = structure.groups.groups
    return {groups[number].name: _smallest(sets, groups[number].size) for number, sets in sets_of.items()}


def _levels(classes: IntArray, parent: IntArray) -> Iterator[IntArray]:
    """The classes of a facet, then the rows they lie in, then the rows of those; up to where something has to stay."""
    members = np.unique(classes)
    while members[0] > 0:
        yield members
        members = np.unique(parent[members])


def _facets(structure: Structure) -> Iterator[Lying]:
    """Of every tensor of the graph, also of those among several results."""
    for value in values_in(list(structure.values.values())):
        yield from structure.lying_of(value)


def _smallest(sets: Collection[frozenset[int]], size: int) -> tuple[IntArray, ...]:
    """The sets that hold no other one; the whole group is left out, for something of it stays anyway."""
    proper = [units for units in sets if len(units) < size]
    least = sorted(sorted(units) for units in proper if not any(smaller < units for smaller in proper))
    return tuple(np.array(units, dtype=np.int64) for units in least)


def coupled_groups(structure: Structure) -> tuple[frozenset[str], ...]:
    """Sets of groups of which some row, of some tensor, holds one and not the other."""
    groups = structure.groups.groups
    coupled: list[set[str]] = []
    for over, classes in _facets(structure):
        if len(over) < 2:
            continue
        numbers = _apart(structure.group_of, structure.classes.units(classes))
        if numbers:
            coupled = _with_joined(coupled, {groups[number].name for number in numbers})
    return tuple(frozenset(names) for names in coupled)


def _apart(group_of: IntArray, classes: IntArray) -> list[int]:
    """The numbers of the groups that lie in classes [..., row], where some row holds one of them and not another.

    Two layers joined to [2, d], the first in row 0 and the second in row 1: `holds` is [[1, 0], [0, 1]].
    """
    owners = np.where(classes > 0, group_of[classes], -1).reshape(-1, classes.shape[-1])  # [rows, row]
    present = np.unique(owners[owners >= 0])
    if len(present) < 2:
        return []
    holds = np.stack([(owners == number).any(axis=1) for number in present])  # [groups present, rows]
    is_alike = (holds == holds[:1]).all()
    return [] if is_alike else present.tolist()


def _with_joined(coupled: Sequence[set[str]], joined: set[str]) -> list[set[str]]:
    """Disjoint sets and one more, united with all those that it meets."""
    apart = [names for names in coupled if not names & joined]
    met = [names for names in coupled if names & joined]
    return [*apart, joined.union(*met)]


def spared(group: Group, values: FloatArray, spans: Sequence[IntArray]) -> IntArray:
    """Units that stay so that no tensor is left empty: the best of each span."""
    if group.balanced:  # every row that stays keeps some
        return np.zeros(0, dtype=np.int64)
    return np.unique([units[np.argmax(values[units])] for units in spans]).astype(np.int64)
