"""What was found out about a graph's units: its groups, and where every class of labels lies in every tensor.

Made by `groups.analyse`, read by whoever scores, plans or removes units.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from torch import fx

from ..records import Groups, IntArray
from .classes import Classes
from .labels import Result, Value, values_in

Lying = tuple[tuple[int, ...], IntArray]  # axes of a tensor, and the class of every coordinate on them
Keep = NDArray[np.bool_]


@dataclass(frozen=True)
class Structure:
    """Groups of a graph and the labels they came from; `group_of`/`unit_of` are indexed by class.

    `values[node]` is what the walk knew of the node's result: a `Value`, a tuple of them, or a size.
    `spans[group]` are sets of its units that some tensor is made of: one of each set stays, or that tensor is empty.
    `coupled` are groups that fill different rows of one tensor, and so lose equally many units or none.
    """

    groups: Groups
    classes: Classes
    values: Mapping[str, Result]
    group_of: IntArray
    unit_of: IntArray
    spans: Mapping[str, tuple[IntArray, ...]]
    tied: tuple[str, ...] = ()
    frozen: tuple[str, ...] = ()
    coupled: tuple[frozenset[str], ...] = ()
    # by the `id` of a value, which is kept with its places, so that no other one gets its id
    _lying: dict[int, tuple[Value, list[Lying]]] = field(default_factory=dict, init=False, repr=False, compare=False)

    @functools.cached_property
    def members(self) -> dict[str, IntArray]:
        """The classes of each group."""
        return {group.name: np.flatnonzero(self.group_of == i) for i, group in enumerate(self.groups.groups)}

    def above(self, group: str) -> IntArray:
        """[units] the unit of its parent's group that each unit of a group lies in."""
        return self.unit_of[self.classes.parent[self.members[group]]]

    def value(self, node: fx.Node) -> Value:
        """What is known of a node's result, which is one tensor."""
        value = self.values[node.name]
        assert isinstance(value, Value)
        return value

    def shape(self, node: fx.Node) -> tuple[int, ...]:
        """The shape of a node's result, which is one tensor, before anything goes."""
        return self.value(node).shape

    def lying(self, node: fx.Node) -> list[Lying]:
        """What lies on the node's result, as `lying_of` says it; nothing on a number or on several results."""
        value = self.values[node.name]
        return self.lying_of(value) if isinstance(value, Value) else []

    def lying_of(self, value: Value) -> list[Lying]:
        """For each facet of one tensor of the graph: its axes and the class of every coordinate on them."""
        if id(value) not in self._lying:
            self._lying[id(value)] = value, [self.classes(facet) for facet in value.facets]
        return self._lying[id(value)][1]

    def along(self, node: fx.Node, axis: int) -> list[IntArray]:
        """The classes along an axis of the node's result, for each facet that lies on that one alone."""
        return [classes for over, classes in self.lying(node) if over == (axis,)]

    @functools.cached_property
    def _places(self) -> tuple[tuple[str, ...], IntArray, IntArray]:
        """Names of nodes; then, as two columns, every class that lies in a node's result and the node's place."""
        names: list[str] = []
        classes: list[IntArray] = [np.zeros(0, dtype=np.int64)]
        places: list[IntArray] = [np.zeros(0, dtype=np.int64)]
        for name, result in self.values.items():
            members = self._members_in(result)
            if len(members):
                classes.append(members)
                places.append(np.full(len(members), len(names)))
                names.append(name)
        # of two nodes with classes 3 4 and 4: classes 3 4 4, places 0 0 1
        return tuple(names), np.concatenate(classes), np.concatenate(places)

    def _members_in(self, result: Result) -> IntArray:
        """The classes that lie in a node's result or results, each once, ascending."""
        members = [np.zeros(0, dtype=np.int64)]
        for value in values_in(result):
            members += [classes.ravel() for _, classes in self.lying_of(value)]
        return np.unique(np.concatenate(members))

    def touched(self, gone: Keep) -> set[str]:
        """The names of the nodes whose results lose something where the classes `gone` [classes] go."""
        names, classes, places = self._places
        return {names[place] for place in np.unique(places[gone[classes]])}
