"""A traced graph in, the units it can lose out: labels from one walk, then classes to groups.

Groups are connected classes of producers' output channels (convolutions, linear layers), rows of them
(heads, convolution groups) their parents. Knows no scores and no plan; `check.py` tests what is found here.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np
from torch import fx

from ..graph import aten
from ..graph.dynamic import is_part, part_of
from ..graph.operators import ALL_CONVOLUTIONS, RECURRENT, channel_axis, weight_shape
from ..records import Group, Groups, IntArray, LeftAlone, Site, UnitKind
from .classes import Classes, resolve
from .coupling import coupled_groups, spans_of
from .grids import components
from .labelling import label, parameters_behind
from .labels import Result, Value, axes, distinct, reduce_to
from .structure import Structure

ATTENTIONS = (
    aten.scaled_dot_product_attention.default,
    aten.matmul.default,
    aten.bmm.default,
    aten.einsum.default,
)

BATCHED = ATTENTIONS[:3]
"""Attentions whose heads lie in front of the last two axes."""

Shown = tuple[fx.Node, Site]  # a node, and the units that its result shows


def analyse(graph: fx.GraphModule, tied: Collection[str] = (), frozen: Collection[str] = ()) -> Structure:
    """Which units the graph can lose, before any group was tried.

    At nodes named in `tied` rows are tied to columns, at those in `frozen` nothing may go.
    """
    ledger, results = label(graph, tied, frozen)
    structure = _collect(graph, resolve(ledger), results)
    return replace(structure, tied=tuple(sorted(tied)), frozen=tuple(sorted(frozen)))


def _collect(graph: fx.GraphModule, classes: Classes, results: Mapping[str, Result]) -> Structure:
    """Classes to groups, rows first: a group that lies in heads comes after the heads."""
    produced: dict[fx.Node, IntArray] = {}
    for node in graph.graph.nodes:
        axis = _channel_axis(node)
        if axis is not None:
            produced[node] = _produced(results[node.name], axis)
    alike: list[list[int]] = []
    for labels in produced.values():
        alike += _alike(classes.of[labels], classes)
    cells = [members for members in alike if classes.column[members[0]] >= 0]
    inner = _connected(alike, classes)
    rows = _parents([*inner, *cells], classes)

    group_of = np.full(len(classes.parent), -1, dtype=np.int64)  # [classes], -1: in no group
    unit_of = np.full(len(classes.parent), -1, dtype=np.int64)  # [classes], the place in its group
    for number, members in enumerate([*rows, *inner]):
        group_of[members] = number
        unit_of[members] = np.arange(len(members))

    # names and kinds are read from sites, which are read from a structure that has no groups yet
    structure = Structure(Groups(()), classes, results, group_of, unit_of, {})
    groups = _groups(graph, structure, [*rows, *inner], len(rows))
    left_alone = tuple(_left_alone(graph, structure, produced))
    structure = replace(structure, groups=Groups(tuple(groups), left_alone))
    return replace(structure, spans=spans_of(structure), coupled=coupled_groups(structure))


def _channel_axis(node: fx.Node) -> int | None:
    """The output-channel axis of a layer, also of a dynamic convolution's result; None for any other node."""
    if is_part(node, "result"):
        return 1  # [N, out, ...]
    return channel_axis(node)


def _is_attention(node: fx.Node) -> bool:
    """Whether a product may be one of an attention: it neither makes a dynamic convolution's kernel nor reads one."""
    if node.target not in ATTENTIONS:
        return False
    around = [*node.all_input_nodes, *node.users]
    return not any(is_part(neighbour, "kernel", "bias") for neighbour in around)


def _produced(result: Result, axis: int) -> IntArray:
    """[channels] labels of a layer's outputs, which lie along `axis`; all 0 where it has none of its own."""
    assert isinstance(result, Value)
    on_channels = [facet for facet in result.facets if axes(facet) == (axis,)]
    if len(on_channels) != 1:
        return np.zeros(result.shape[axis], dtype=np.int64)
    labels: IntArray = reduce_to(on_channels[0], (axis,)).numpy()
    return labels


def _connected(alike: Sequence[list[int]], classes: Classes) -> list[list[int]]:
    """Classes that are in one list, or in lists that share some: a list of units for each group, ascending.

    Two convolutions that are added share their classes, so a third that shares one with either is of the same group.
    """
    ties = [np.zeros((2, 0), dtype=np.int64)]
    for members in alike:
        units = classes.units(np.array(members))
        units = units[units > 0]
        ties.append(np.stack([units, np.repeat(units[:1], len(units))]))
    edges = np.concatenate(ties, axis=1)  # [2, E]: units 3, 4, 5 of one producer are (3, 3), (4, 3), (5, 3)
    smallest = components(edges, len(classes.parent))  # [classes]

    groups: dict[int, list[int]] = defaultdict(list)
    for member in np.unique(edges[0]).tolist():
        groups[int(smallest[member])].append(member)
    return list(groups.values())


def _alike(produced: IntArray, classes: Classes) -> list[list[int]]:
    """The classes among a producer's channels, but rows and 0, one list for all that lie in the same relations.

    Of queries, keys and values from one layer, [3 * heads * d], those of the keys and queries are tied and lie in
    another relation than those of the values: two lists.
    """
    is_row = np.isin(produced, classes.parent)
    by_relations: dict[tuple[bool, tuple[int, ...]], list[int]] = defaultdict(list)
    for member in np.unique(produced[(produced > 0) & ~is_row]).tolist():
        is_cell = bool(classes.column[member] >= 0)
        by_relations[is_cell, classes.relations.get(member, ())].append(member)
    return list(by_relations.values())


def _parents(connected: list[list[int]], classes: Classes) -> list[list[int]]:
    """The rows that connected classes lie in, as units of their own; rows of rows first.

    Queries and keys lie in the same heads: these are one list, not two.
    """
    levels: list[list[list[int]]] = []
    seen: set[int] = set()
    level = connected
    while level:
        rows_of_level: list[list[int]] = []
        for members in level:
            parents = classes.parent[members]
            rows: list[int] = np.unique(parents[parents > 0]).tolist()
            if rows and seen.isdisjoint(rows):
                seen |= set(rows)
                rows_of_level.append(rows)
        levels.append(rows_of_level)
        level = rows_of_level
    return list(itertools.chain.from_iterable(reversed(levels)))


def _sites(graph: fx.GraphModule, structure: Structure) -> dict[int, list[Shown]]:
    """By a group's number, where it shows: at its producers' channels or, of heads, at attention's results."""
    sites: dict[int, list[Shown]] = defaultdict(list)
    whole_heads: dict[int, Shown] = {}
    for node in graph.graph.nodes:
        shown_at = _heads_at if _is_attention(node) else _channels_at
        for number, shown in shown_at(structure, node):
            sites[number].append(shown)
        whole_heads |= dict(_whole_heads_at(structure, node))
    return {number: _attended(shown, whole_heads.get(number)) for number, shown in sites.items()}


def _channels_at(structure: Structure, node: fx.Node) -> Iterator[tuple[int, Shown]]:
    """What a layer's output channels show: its units, and the rows that they lie in. Nothing for any other node."""
    axis = _channel_axis(node)
    if axis is None:
        return
    for members in structure.along(node, axis):
        yield from _shown(structure, node, (axis,), structure.classes.units(members))
        yield from _shown(structure, node, (axis,), structure.classes.parent[members])


def _heads_at(structure: Structure, attention: fx.Node) -> Iterator[tuple[int, Shown]]:
    """An attention shows heads alone: the rows that its result lies in."""
    for over, members in structure.lying(attention):
        yield from _shown(structure, attention, over, structure.classes.parent[members])


def _whole_heads_at(structure: Structure, node: fx.Node) -> Iterator[tuple[int, Shown]]:
    """Heads that are units themselves: of [N, heads, tokens, d], what lies in front of the last two axes."""
    if node.target not in BATCHED or not _is_attention(node):
        return
    for over, members in structure.lying(node):
        if over[-1] < len(structure.shape(node)) - 2:
            yield from _shown(structure, node, over, members)


def _attended(sites: list[Shown], whole_head: Shown | None) -> list[Shown]:
    """Of a group's sites, those that count: heads show at what attention gives out, not at the layers before it.

    Where no dimension may go by itself, heads are no rows but units of their layers. Then they show at `whole_head`,
    where attention last gave them out, if a layer has several channels of each.
    """
    attended = [(node, site) for node, site in sites if _is_attention(node)]
    if attended:
        return attended
    if whole_head is not None and any(_repeats(site.units) for _, site in sites):
        return [whole_head]
    return sites


def _repeats(units: IntArray) -> bool:
    """Whether some unit stands at several coordinates, as a head of [heads * d] channels does."""
    return len(np.unique(units)) < len(units)


def _shown(
    structure: Structure, node: fx.Node, over: tuple[int, ...], classes: IntArray
) -> Iterator[tuple[int, Shown]]:
    """The number of each group that has units among the classes, and the node with the site they make."""
    owners = np.where(classes > 0, structure.group_of[classes], -1)
    for number in np.unique(owners[owners >= 0]).tolist():
        units = np.where(owners == number, structure.unit_of[classes], -1)
        yield number, (node, Site(node.name, node.meta["layer"], over, units))


def _groups(graph: fx.GraphModule, structure: Structure, members: list[list[int]], n_rows: int) -> list[Group]:
    """A record for each list of classes in `members`, of which the first `n_rows` are rows of those behind them."""
    sites, classes = _sites(graph, structure), structure.classes
    rows_across = np.full(len(classes.parent), -1, dtype=np.int64)  # of a column, one of the rows that it crosses
    rows_across[classes.column] = classes.parent
    groups: list[Group] = []
    for number, units in enumerate(members):  # one unit of a list tells of all: they are alike
        # rows precede what lies in them, so the group of a row is among the groups by now
        parent = _group_of_row(structure, groups, int(classes.parent[units[0]]))
        crossed = _group_of_row(structure, groups, int(rows_across[units[0]]))
        kind = _kind(number < n_rows, sites[number], crossed or parent)
        balanced = bool(classes.relations.get(units[0]))
        groups.append(
            Group(
                name=_name(kind, sites[number], groups),
                kind=kind,
                size=len(units),
                sites=tuple(site for _, site in sites[number]),
                rows=_rows(structure, units, balanced=balanced, in_rows=parent is not None),
                balanced=balanced,
                parent=parent.name if parent is not None and balanced else "",
                inexact=_inexact(classes, units),
            )
        )
    return groups


def _group_of_row(structure: Structure, groups: Sequence[Group], row: int) -> Group | None:
    """The group that a row's class is a unit of; None where there is no row (-1), or it never goes (0)."""
    if row <= 0:
        return None
    return groups[int(structure.group_of[row])]


def _rows(structure: Structure, units: list[int], *, balanced: bool, in_rows: bool) -> IntArray:
    """[units] the number of the row that each unit lies in; all 0 where rows need not keep equally many."""
    if not balanced:
        return np.zeros(len(units), dtype=np.int64)
    rows = structure.classes.row[units]
    if not in_rows:
        return rows  # a normalisation's groups: rows that are no units
    # rows that go together (the groups of a convolution whose results are added) keep equal counts each
    above = structure.unit_of[structure.classes.parent[units]]
    _, numbers = np.unique(np.stack([above, rows]), axis=1, return_inverse=True)
    return numbers.reshape(-1).astype(np.int64)  # NumPy 2.0 alone gives [1, units]


def _inexact(classes: Classes, units: list[int]) -> tuple[str, ...]:
    """The nodes whose results depend on any of the units beyond zeroing them, each once, in order."""
    names = itertools.chain.from_iterable(classes.inexact.get(unit, ()) for unit in units)
    return tuple(dict.fromkeys(names))


def _name(kind: UnitKind, sites: list[Shown], earlier: Sequence[Group]) -> str:
    """The first layer's name, or node's where it has none; `@head`, and `#2` for a second group of that name."""
    _, site = sites[0]
    name = site.layer or site.node
    if kind in ("head", "head_dim", "conv_group"):
        name = f"{name}@{kind}"
    # `conv` and `conv#2` are of the name `conv`, `conv1` is not
    same = [group for group in earlier if f"{group.name}#".startswith(f"{name}#")]
    return f"{name}#{len(same) + 1}" if same else name


def _kind(is_row: bool, sites: list[Shown], above: Group | None) -> UnitKind:
    """What units are that show at these sites; `above` is the group of rows that they lie in or cross."""
    if above is not None and above.kind == "head":
        return "head_dim"
    nodes = [node for node, _ in sites]
    if any(map(_is_attention, nodes)):
        return "head"
    if is_row:
        return "conv_group"
    # a depthwise convolution hands channels on and is no second producer
    mixing = set(itertools.filterfalse(_is_depthwise, nodes))
    if len(mixing) > 1:
        return "stream"
    return "neuron" if nodes[0].target is aten.linear.default else "channel"


def _is_depthwise(node: fx.Node) -> bool:
    part = part_of(node)
    if part is not None:
        return part.depthwise
    return node.target in ALL_CONVOLUTIONS and weight_shape(node)[1] == 1


def _left_alone(
    graph: fx.GraphModule, structure: Structure, produced: Mapping[fx.Node, IntArray]
) -> Iterator[LeftAlone]:
    """Layers of which no output channel may go, and the operation that is why."""
    classes = structure.classes
    operations = {node.name: str(node.target) for node in graph.graph.nodes}
    for node, labels in produced.items():
        if (classes.of[labels] != 0).any():
            continue
        stopped = [*labels.tolist(), *_labels_before(node, labels, structure)]
        reasons = (classes.reasons[label_number] for label_number in stopped if label_number in classes.reasons)
        obstacle, reason = next(reasons, (node.name, "does not give channels of its own"))
        yield LeftAlone(node.meta["layer"] or node.name, operations.get(obstacle, obstacle), reason)
    for node in graph.graph.nodes:
        if node.target in RECURRENT:
            yield LeftAlone(node.meta["layer"] or node.name, str(node.target), "keeps its hidden units, all of them")


def _labels_before(node: fx.Node, labels: IntArray, structure: Structure) -> Iterator[int]:
    """Of a layer whose channels have no labels, those of the parameters behind its weight, which stopped on the way."""
    if labels.any():
        return
    for source in parameters_behind(node):
        for facet in structure.value(source).facets:
            yield from distinct(facet).tolist()
