"""A traced graph in, the units it can lose out: one walk of the operation table, then classes to groups.

Groups are connected classes of producers' output channels (convolutions, linear layers), rows of them
(heads, convolution groups) their parents. Knows no scores and no plan; `check.py` tests what is found here.
"""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, fx

from ..graph import aten, fetch
from ..graph.operators import ALL_CONVOLUTIONS
from ..records import FloatArray, Group, Groups, IntArray, LeftAlone, Site, UnitKind
from .handlers import Args, Kwargs, argument_at, unknown
from .labels import Classes, Ledger, Value, along, axes, distinct, first_along, reduce_to, resolve, values_in
from .operations import handler_of
from .relations import freeze_all

ATTENTIONS = (
    aten.scaled_dot_product_attention.default,
    aten.matmul.default,
    aten.bmm.default,
    aten.einsum.default,
)

Lying = tuple[tuple[int, ...], IntArray]  # axes of a tensor, and the class of every coordinate on them
Shown = tuple[fx.Node, Site]  # a node, and the units that its result shows


@dataclass(frozen=True)
class Structure:
    """Groups of a graph and the labels they came from; `group_of`/`unit_of` are indexed by class.

    `values[node]` is what the walk knew of the node's result: a `Value`, a tuple of them, or a size.
    `spans[group]` are sets of its units that some tensor is made of: one of each set stays, or that tensor is empty.
    `coupled` are groups that fill different rows of one tensor, and so lose equally many units or none.
    """

    groups: Groups
    classes: Classes
    values: Mapping[str, Any]
    group_of: IntArray
    unit_of: IntArray
    spans: Mapping[str, tuple[IntArray, ...]]
    tied: tuple[str, ...] = ()
    frozen: tuple[str, ...] = ()
    coupled: tuple[frozenset[str], ...] = ()
    _lying: dict[str, list[Lying]] = field(default_factory=dict, init=False, repr=False, compare=False)

    @functools.cached_property
    def members(self) -> dict[str, IntArray]:
        """The classes of each group."""
        return {group.name: np.flatnonzero(self.group_of == i) for i, group in enumerate(self.groups.groups)}

    def lying(self, node: fx.Node) -> list[Lying]:
        """For each facet of the node's result: its axes and the class of every coordinate on them."""
        if node.name not in self._lying:
            value = self.values[node.name]
            facets = value.facets if isinstance(value, Value) else ()
            self._lying[node.name] = [self.classes(facet) for facet in facets]
        return self._lying[node.name]

    @functools.cached_property
    def _places(self) -> tuple[tuple[str, ...], IntArray, IntArray]:
        """Names of nodes; then, as two columns, every class that lies in a node's result and the node's place."""
        names: list[str] = []
        classes: list[IntArray] = []
        for name, result in self.values.items():
            facets = [facet for leaf in values_in(result) for facet in leaf.facets]
            if facets:
                names.append(name)
                classes.append(np.unique(np.concatenate([self.classes(facet)[1].ravel() for facet in facets])))
        places = np.repeat(np.arange(len(names)), [len(own) for own in classes])
        return tuple(names), np.concatenate([np.zeros(0, dtype=np.int64), *classes]), places

    def touched(self, gone: NDArray[np.bool_]) -> set[str]:
        """The names of the nodes whose results lose something where the classes `gone` [classes] go."""
        names, classes, places = self._places
        return {names[place] for place in np.unique(places[gone[classes]])}


def analyse(graph: fx.GraphModule, tied: Collection[str] = (), frozen: Collection[str] = ()) -> Structure:
    """Walks the graph; at nodes named in `tied` rows are tied to columns, at `frozen` nothing may go."""
    ledger = Ledger()
    values = _walk(graph, ledger, tied, frozen)
    classes = resolve(ledger)
    return replace(_collect(graph, classes, values), tied=tuple(sorted(tied)), frozen=tuple(sorted(frozen)))


def _walk(graph: fx.GraphModule, ledger: Ledger, tied: Collection[str], frozen: Collection[str]) -> dict[str, Any]:
    """What is known of every node's result, by the node's name; `ledger` is filled on the way."""
    values: dict[str, Any] = {}
    parameters: dict[int, Value] = {}
    grouped = set(_grouped_weights(graph))
    for node in graph.graph.nodes:
        if node.op == "placeholder":
            values[node.name] = Value(tuple(node.meta["val"].shape))
        elif node.op == "output":
            outputs = fx.map_arg(node.args, lambda source: values[source.name])
            freeze_all(ledger, node.name, outputs, "is the model's output")
        elif node.op == "get_attr":
            tensor = fetch(graph, str(node.target))
            value = _parameter(ledger, tensor, node.target in grouped, parameters)
            values[node.name] = value
            if node.name in frozen:
                freeze_all(ledger, node.name, value, "can't lose single units of a row")
            elif node.name in tied:
                _tie_rows(ledger, value)
        else:
            args, kwargs = fx.map_arg((node.args, node.kwargs), lambda source: values[source.name])
            if node.name in frozen:
                freeze_all(ledger, node.name, (args, list(kwargs.values())), f"failed the check at {node.target}")
            values[node.name] = _visit(ledger, node, list(args), dict(kwargs))
            if node.name in tied:
                _tie_rows(ledger, values[node.name])
    return values


def _visit(ledger: Ledger, node: fx.Node, args: Args, kwargs: Kwargs) -> Any:
    """What is known of the node's result, from what is known of its arguments."""
    if node.target is aten.sym_size.int:
        return args[0].shape[args[1]]
    meta = node.meta.get("val")
    if isinstance(meta, (Tensor, tuple, list)):
        return handler_of(node)(ledger, node, args, kwargs)
    if list(values_in((args, list(kwargs.values())))):  # a number that is read out of a tensor
        return unknown(ledger, node, args, kwargs)
    return node.target(*args, **kwargs)  # type: ignore[operator]  # arithmetic on sizes


def _tie_rows(ledger: Ledger, tree: object) -> None:
    """Of [heads, d] labels, every head's become those of the first: a dimension goes from all heads at once."""
    for value in values_in(tree):
        for facet in value.facets:
            over = axes(facet)
            if len(over) > 1:
                ledger.tie(facet, first_along(facet, over[:-1]).expand(facet.shape))


def _grouped_weights(graph: fx.GraphModule) -> Iterator[str]:
    """Parameters that become the kernel of a grouped, not depthwise, convolution."""
    for node in graph.graph.nodes:
        if node.target not in ALL_CONVOLUTIONS:
            continue
        groups = argument_at(node.args, 6, 1)
        if not isinstance(groups, int) or groups <= 1 or weight_shape(node)[1] == 1:
            continue
        for source in _parameters_behind(node):
            if source.meta["val"].ndim >= 3:  # a kernel, not a vector it is scaled with
                yield str(source.target)


def _parameters_behind(layer: fx.Node) -> Iterator[fx.Node]:
    """Parameters that a layer's weight is computed from; mostly it is one itself."""
    front = [layer.args[1]]
    while front:
        source = front.pop()
        if isinstance(source, fx.Node):
            if source.op == "get_attr":
                yield source
            front += source.all_input_nodes


def _parameter(ledger: Ledger, tensor: Tensor, grouped: bool, parameters: dict[int, Value]) -> Value:
    """New labels on every axis of a parameter; `parameters` holds those met before, by `id`, and this one then."""
    if id(tensor) in parameters:
        return parameters[id(tensor)]
    shape = tuple(tensor.shape)
    if not tensor.is_floating_point():
        return Value(shape, (), tensor)

    facets = [along(ledger.fresh(n), axis, shape) for axis, n in enumerate(shape) if n > 1]
    if grouped and shape[1] > 1:  # the input channels of each group are its own
        labels = ledger.fresh(*shape[:2])  # [out, in / groups]
        joint = labels.reshape(*shape[:2], *[1] * (len(shape) - 2)).expand(*shape)
        facets = [*(facet for facet in facets if axes(facet) != (1,)), joint]
    parameters[id(tensor)] = Value(shape, tuple(facets))
    return parameters[id(tensor)]


def _collect(graph: fx.GraphModule, classes: Classes, values: Mapping[str, Any]) -> Structure:
    """Classes to groups, rows first: a group that lies in heads comes after the heads."""
    produced = {node: _produced(node, values) for node in graph.graph.nodes if channel_axis(node) is not None}
    inner = _components([classes.of[labels] for labels in produced.values()], classes)
    rows = _parents(inner, classes)

    group_of = np.full(len(classes.parent), -1, dtype=np.int64)
    unit_of = np.full(len(classes.parent), -1, dtype=np.int64)
    for number, members in enumerate([*rows, *inner]):
        group_of[members] = number
        unit_of[members] = np.arange(len(members))

    # names and kinds are read from sites, which are read from a structure that has no groups yet
    structure = Structure(Groups(()), classes, values, group_of, unit_of, {})
    groups = _groups(graph, structure, [*rows, *inner], len(rows))
    left_alone = tuple(_left_alone(graph, structure, produced))
    structure = replace(structure, groups=Groups(tuple(groups), left_alone))
    return replace(structure, spans=_spans(structure), coupled=_coupled(structure))


def _spans(structure: Structure) -> dict[str, tuple[IntArray, ...]]:
    """The smallest sets of units, in each group, that make up a whole axis of some tensor."""
    groups, parent = structure.groups.groups, structure.classes.parent
    sets_of: dict[int, set[frozenset[int]]] = defaultdict(set)
    for value in values_in(list(structure.values.values())):
        for facet in value.facets:
            _, classes = structure.classes(facet)
            members = np.unique(classes)
            while members[0] > 0:  # nothing in it has to stay
                owners = structure.group_of[members]
                units = structure.unit_of[members[owners == owners[0]]]
                sets_of[int(owners[0])].add(frozenset(units.tolist()))
                members = np.unique(parent[members])  # then the rows they lie in
    return {
        groups[number].name: _smallest(sets, groups[number].size) for number, sets in sets_of.items() if number >= 0
    }


def _coupled(structure: Structure) -> tuple[frozenset[str], ...]:
    """Sets of groups of which some row, of some tensor, holds one and not the other."""
    groups = structure.groups.groups
    coupled: list[set[str]] = []
    for value in values_in(list(structure.values.values())):
        for facet in value.facets:
            over, classes = structure.classes(facet)
            if len(over) < 2:
                continue
            owners = np.where(classes > 0, structure.group_of[classes], -1).reshape(-1, classes.shape[-1])
            present = np.unique(owners[owners >= 0])
            if len(present) < 2:
                continue
            holds = np.stack([(owners == number).any(1) for number in present])  # [groups present, rows]
            if (holds != holds[:1]).any():
                coupled = _with_joined(coupled, {groups[number].name for number in present.tolist()})
    return tuple(frozenset(names) for names in coupled)


def _with_joined(coupled: Sequence[set[str]], joined: set[str]) -> list[set[str]]:
    """Disjoint sets and one more, united with all those that it meets."""
    apart = [names for names in coupled if not names & joined]
    met = [names for names in coupled if names & joined]
    return [*apart, joined.union(*met)]


def _smallest(sets: Collection[frozenset[int]], size: int) -> tuple[IntArray, ...]:
    """The sets that hold no other one; the whole group is left out, for something of it stays anyway."""
    proper = [units for units in sets if len(units) < size]
    least = [units for units in proper if not any(smaller < units for smaller in proper)]
    return tuple(np.array(sorted(units), dtype=np.int64) for units in sorted(least, key=sorted))


def channel_axis(node: fx.Node) -> int | None:
    """The output-channel axis of a convolution or linear node, None for any other."""
    if node.target is aten.linear.default:
        return int(node.meta["val"].ndim) - 1
    return 1 if node.target in ALL_CONVOLUTIONS else None


def weight_shape(node: fx.Node) -> tuple[int, ...]:
    """The shape of a layer's weight: [out, in], [out, in / groups, ...] or, transposed, [in, out / groups, ...]."""
    weight = node.args[1]
    assert isinstance(weight, fx.Node)
    return tuple(weight.meta["val"].shape)


def _produced(node: fx.Node, values: Mapping[str, Any]) -> IntArray:
    """Labels of a weighted node's output channels, 0 where it has none of its own."""
    axis = channel_axis(node)
    assert axis is not None
    value = values[node.name]
    channels = [reduce_to(facet, (axis,)) for facet in value.facets if axes(facet) == (axis,)]
    if len(channels) != 1:
        return np.zeros(value.shape[axis], dtype=np.int64)
    labels: IntArray = channels[0].numpy()
    return labels


def _components(producers: list[IntArray], classes: Classes) -> list[list[int]]:
    """Classes that share a producer and take part in the same row relations, each list ascending."""
    root: dict[int, int] = {}

    def root_of(member: int) -> int:
        root.setdefault(member, member)
        while root[member] != member:
            root[member] = root[root[member]]  # halves the way for the next search
            member = root[member]
        return member

    rows = {int(row) for row in np.unique(classes.parent) if row > 0}
    for produced in producers:
        by_relations: dict[tuple[int, ...], list[int]] = defaultdict(list)
        for member in np.unique(produced[produced > 0]).tolist():
            if member not in rows:
                by_relations[classes.relations.get(member, ())].append(member)
        for members in by_relations.values():
            for member in members:
                root[root_of(member)] = root_of(members[0])

    components: dict[int, list[int]] = defaultdict(list)
    for member in sorted(root):
        components[root_of(member)].append(member)
    return list(components.values())


def _parents(components: list[list[int]], classes: Classes) -> list[list[int]]:
    """The rows of each component as units of their own, rows of rows first; components that share rows share them."""
    levels: list[list[list[int]]] = [components]
    seen: set[int] = set()
    while levels[-1]:
        level: list[list[int]] = []
        for members in levels[-1]:
            rows = sorted({int(row) for row in classes.parent[members] if row > 0})
            if rows and not seen & set(rows):
                seen |= set(rows)
                level.append(rows)
        levels.append(level)
    return [rows for level in levels[:0:-1] for rows in level]  # all but the components, last level first


def _sites(graph: fx.GraphModule, structure: Structure) -> dict[int, list[Shown]]:
    """Where each group shows: producers' channel axes; for rows, results whose elements lie in them."""
    sites: dict[int, list[Shown]] = defaultdict(list)
    for node in graph.graph.nodes:
        axis = channel_axis(node)
        if axis is None and node.target not in ATTENTIONS:
            continue
        for over, members in structure.lying(node):
            if axis is not None and over != (axis,):
                continue
            rows = structure.classes.parent[members]
            for classes in [rows] if axis is None else [members, rows]:
                for number, site in _shown(structure, node, over, classes):
                    sites[number].append((node, site))
    return {number: _attended(shown) for number, shown in sites.items()}


def _attended(sites: list[Shown]) -> list[Shown]:
    """Heads show at what attention gives out, not at the layers before it."""
    attended = [(node, site) for node, site in sites if node.target in ATTENTIONS]
    return attended or sites


def _shown(structure: Structure, node: fx.Node, over: tuple[int, ...], classes: IntArray) -> Iterator[tuple[int, Site]]:
    """The number of each group that has units among the classes, and the site they make."""
    owners = np.where(classes > 0, structure.group_of[classes], -1)
    for number in np.unique(owners[owners >= 0]).tolist():
        units = np.where(owners == number, structure.unit_of[classes], -1)
        yield number, Site(node.name, node.meta["layer"], over, units)


def _groups(graph: fx.GraphModule, structure: Structure, members: list[list[int]], n_rows: int) -> list[Group]:
    """The records; the first `n_rows` lists of classes are rows of those behind them."""
    sites, classes = _sites(graph, structure), structure.classes
    names: list[str] = []
    groups: list[Group] = []
    for number, units in enumerate(members):
        parents = classes.parent[units]
        balanced = bool(classes.relations.get(units[0]))
        # rows precede what lies in them, so a parent's name and kind are known by now
        in_rows = int(parents[0]) > 0
        parent = int(structure.group_of[parents[0]]) if in_rows else -1
        in_heads = in_rows and groups[parent].kind == "head"
        kind: UnitKind = "head_dim" if in_heads else _kind(number < n_rows, sites[number])
        names.append(_name(kind, sites[number], names))

        if balanced and in_rows:
            rows = structure.unit_of[parents]
        elif balanced:  # a normalisation's groups: rows that are no units
            rows = classes.row[units]
        else:
            rows = np.zeros(len(units), dtype=np.int64)
        inexact = dict.fromkeys(name for unit in units for name in classes.inexact.get(unit, ()))
        groups.append(
            Group(
                name=names[-1],
                kind=kind,
                size=len(units),
                sites=tuple(site for _, site in sites[number]),
                rows=rows,
                balanced=balanced,
                parent=names[parent] if balanced and in_rows else "",
                inexact=tuple(inexact),
            )
        )
    return groups


def _name(kind: UnitKind, sites: list[Shown], taken: list[str]) -> str:
    """The first layer's name, or node's where it has none; `@head`, and `#2` for a second group of that name."""
    first = sites[0][1].layer or sites[0][1].node
    name = f"{first}@{kind}" if kind in ("head", "head_dim", "conv_group") else first
    same = sum(earlier == name or earlier.startswith(f"{name}#") for earlier in taken)
    return f"{name}#{same + 1}" if same else name


def _kind(is_row: bool, sites: list[Shown]) -> UnitKind:
    nodes = [node for node, _ in sites]
    if is_row:
        return "head" if any(node.target in ATTENTIONS for node in nodes) else "conv_group"
    # a depthwise convolution hands channels on and is no second producer
    mixing = {node for node in nodes if not (node.target in ALL_CONVOLUTIONS and weight_shape(node)[1] == 1)}
    if len(mixing) > 1:
        return "stream"
    return "neuron" if nodes[0].target is aten.linear.default else "channel"


def _left_alone(
    graph: fx.GraphModule, structure: Structure, produced: Mapping[fx.Node, IntArray]
) -> Iterator[LeftAlone]:
    """Layers of which no output channel may go, and the operation that is why."""
    classes = structure.classes
    operations = {node.name: str(node.target) for node in graph.graph.nodes}
    for node, labels in produced.items():
        if (classes.of[labels] != 0).any():
            continue
        candidates = labels.tolist()
        if not labels.any():
            candidates += _labels_of_weight(node, structure)
        reasons = [classes.reasons[label] for label in candidates if label in classes.reasons]
        obstacle, reason = reasons[0] if reasons else (node.name, "does not give channels of its own")
        yield LeftAlone(node.meta["layer"], operations.get(obstacle, obstacle), reason)


def _labels_of_weight(node: fx.Node, structure: Structure) -> Iterator[int]:
    """Labels of the parameters a weight is computed from: where they stopped says why the layer has none."""
    for source in _parameters_behind(node):
        for facet in structure.values[source.name].facets:
            yield from distinct(facet).tolist()


def spared(group: Group, values: FloatArray, spans: Sequence[IntArray]) -> IntArray:
    """Units that stay so that no tensor is left empty: the best of each span."""
    if group.balanced:  # every row that stays keeps some
        return np.zeros(0, dtype=np.int64)
    return np.unique([units[np.argmax(values[units])] for units in spans]).astype(np.int64)
