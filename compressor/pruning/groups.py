"""A traced graph in, the units it can lose out: one walk of the operation table, then classes to groups.

Groups are connected classes of producers' output channels (convolutions, linear layers), rows of them
(heads, convolution groups) their parents. Knows no scores and no plan; `check.py` tests what is found here.
"""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, fx

from ..graph import aten, fetch
from ..records import Group, Groups, IntArray, LeftAlone, Site, UnitKind
from .handlers import unknown
from .labels import Classes, Ledger, Value, along, axes, distinct, reduce_to, resolve
from .operations import handler_of

CONVOLUTIONS = (
    aten.conv1d.default,
    aten.conv2d.default,
    aten.conv3d.default,
    aten.conv1d.padding,
    aten.conv2d.padding,
    aten.conv_transpose1d.default,
    aten.conv_transpose2d.input,
    aten.conv_transpose3d.input,
)
ATTENTIONS = (
    aten.scaled_dot_product_attention.default,
    aten.matmul.default,
    aten.bmm.default,
    aten.einsum.default,
)


Lying = tuple[tuple[int, ...], IntArray]


@dataclass(frozen=True)
class Structure:
    """Groups of a graph and the labels they came from; `group_of`/`unit_of` are indexed by class.

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
        return {g.name: np.flatnonzero(self.group_of == i) for i, g in enumerate(self.groups.groups)}

    def lying(self, node: fx.Node) -> list[Lying]:
        """For each facet of the node's result: its axes and the class of every coordinate on them."""
        if node.name not in self._lying:
            value = self.values[node.name]
            self._lying[node.name] = [self.classes(f) for f in value.facets] if isinstance(value, Value) else []
        return self._lying[node.name]

    @functools.cached_property
    def _places(self) -> tuple[tuple[str, ...], IntArray, IntArray]:
        """Names of nodes; then, as two columns, every class that lies in a node's result and the node's place."""
        names: list[str] = []
        classes: list[IntArray] = []
        for name, result in self.values.items():
            facets = [facet for leaf in _leaves(result) for facet in leaf.facets]
            if facets:
                names.append(name)
                classes.append(np.unique(np.concatenate([self.classes(facet)[1].ravel() for facet in facets])))
        places = np.repeat(np.arange(len(names)), [len(own) for own in classes])
        return tuple(names), np.concatenate([np.zeros(0, dtype=np.int64), *classes]), places

    def touched(self, gone: NDArray[np.bool_]) -> set[str]:
        """The names of the nodes whose results lose something where the classes `gone` [classes] go."""
        names, classes, places = self._places
        return {names[place] for place in np.unique(places[gone[classes]])}


def _leaves(result: Any) -> Iterator[Value]:
    """The labelled tensors of a node's result, which may be a tuple of some."""
    if isinstance(result, Value):
        yield result
    elif isinstance(result, (tuple, list)):
        for part in result:
            yield from _leaves(part)


def analyse(graph: fx.GraphModule, tied: Collection[str] = (), frozen: Collection[str] = ()) -> Structure:
    """Walks the graph; at nodes named in `tied` rows are tied to columns, at `frozen` nothing may go."""
    ledger = Ledger()
    values = _walk(graph, ledger, tied, frozen)
    classes = resolve(ledger)
    return replace(_collect(graph, classes, values), tied=tuple(sorted(tied)), frozen=tuple(sorted(frozen)))


def _walk(graph: fx.GraphModule, ledger: Ledger, tied: Collection[str], frozen: Collection[str]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    parameters: dict[int, Value] = {}
    grouped = set(_grouped_weights(graph))
    for node in graph.graph.nodes:
        if node.op == "get_attr":
            value = _parameter(ledger, fetch(graph, str(node.target)), node.target in grouped, parameters)
            values[node.name] = value
            if node.name in frozen:
                _freeze_tree(ledger, value, node.name, "can't lose single units of a row")
            elif node.name in tied:
                _tie_rows(ledger, value)
        elif node.op == "placeholder":
            values[node.name] = Value(tuple(node.meta["val"].shape))
        elif node.op == "output":
            _freeze_tree(ledger, fx.map_arg(node.args, lambda n: values[n.name]), node.name, "is the model's output")
        else:
            args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: values[n.name])
            if node.name in frozen:
                _freeze_tree(ledger, (args, list(kwargs.values())), node.name, f"failed the check at {node.target}")
            values[node.name] = _visit(ledger, node, list(args), dict(kwargs))
            if node.name in tied:
                _tie_rows(ledger, values[node.name])
    return values


def _visit(ledger: Ledger, node: fx.Node, args: list[Any], kwargs: dict[str, Any]) -> Any:
    if node.target is aten.sym_size.int:
        return args[0].shape[args[1]]
    meta = node.meta.get("val")
    if not isinstance(meta, (Tensor, tuple, list)):
        if any(isinstance(v, Value) for v in _flat((args, list(kwargs.values())))):
            return unknown(ledger, node, args, kwargs)
        return node.target(*args, **kwargs)  # type: ignore[operator]  # arithmetic on sizes
    return handler_of(node)(ledger, node, args, kwargs)


def _flat(tree: Any) -> Iterator[Any]:
    if isinstance(tree, (list, tuple)):
        for part in tree:
            yield from _flat(part)
    else:
        yield tree


def _freeze_tree(ledger: Ledger, tree: Any, node: str, reason: str) -> None:
    for value in _flat(tree):
        if isinstance(value, Value):
            for facet in value.facets:
                ledger.freeze(facet, node, reason)


def _tie_rows(ledger: Ledger, value: Any) -> None:
    for part in _flat(value):
        for facet in part.facets if isinstance(part, Value) else ():
            over = axes(facet)
            if len(over) > 1:
                rows = tuple(slice(0, 1) if a in over[:-1] else slice(None) for a in range(facet.ndim))
                ledger.tie(facet, facet[rows].expand(facet.shape))


def _grouped_weights(graph: fx.GraphModule) -> Iterator[str]:
    """Parameters that become the kernel of a grouped, not depthwise, convolution."""
    for node in graph.graph.nodes:
        if node.target in CONVOLUTIONS and len(node.args) > 6 and isinstance(node.args[6], int) and node.args[6] > 1:
            if weight_shape(node)[1] == 1:
                continue
            front = [node.args[1]]
            while front:
                source = front.pop()
                if source.op == "get_attr" and source.meta["val"].ndim >= 3:
                    yield source.target
                front += [n for n in source.all_input_nodes if n.op != "placeholder"]


def _parameter(ledger: Ledger, tensor: Tensor, grouped: bool, known: dict[int, Value]) -> Value:
    if id(tensor) in known:
        return known[id(tensor)]
    shape = tuple(tensor.shape)
    if not tensor.is_floating_point():
        return Value(shape, (), tensor)
    facets = [along(ledger.fresh(n), axis, shape) for axis, n in enumerate(shape) if n > 1]
    if grouped and shape[1] > 1:  # the input channels of each group are its own
        joint = ledger.fresh(*shape[:2]).reshape(*shape[:2], *[1] * (len(shape) - 2)).expand(*shape)
        facets = [f for f in facets if axes(f) != (1,)] + [joint]
    known[id(tensor)] = Value(shape, tuple(facets))
    return known[id(tensor)]


def _collect(graph: fx.GraphModule, classes: Classes, values: Mapping[str, Any]) -> Structure:
    produced = {n: _produced(n, values) for n in graph.graph.nodes if channel_axis(n) is not None}
    inner = _components([classes.of[labels] for labels in produced.values()], classes)
    rows = _parents(inner, classes)
    group_of = np.full(len(classes.parent), -1, dtype=np.int64)
    unit_of = np.full(len(classes.parent), -1, dtype=np.int64)
    for g, members in enumerate([*rows, *inner]):
        group_of[members], unit_of[members] = g, np.arange(len(members))
    structure = Structure(Groups(()), classes, values, group_of, unit_of, {})
    groups = _groups(graph, structure, [*rows, *inner], len(rows))
    left = tuple(_left_alone(graph, structure, produced))
    structure = replace(structure, groups=Groups(tuple(groups), left))
    return replace(structure, spans=_spans(structure), coupled=_coupled(structure))


def _spans(structure: Structure) -> dict[str, tuple[IntArray, ...]]:
    """The smallest sets of units, in each group, that make up a whole axis of some tensor."""
    groups, parent = structure.groups.groups, structure.classes.parent
    found: dict[int, set[frozenset[int]]] = defaultdict(set)
    for value in _flat(list(structure.values.values())):
        for facet in value.facets if isinstance(value, Value) else ():
            _, classes = structure.classes(facet)
            members = np.unique(classes)
            while members[0] > 0:
                owner = structure.group_of[members]
                mine = members[owner == owner[0]]
                found[int(owner[0])].add(frozenset(structure.unit_of[mine].tolist()))
                members = np.unique(parent[members])
    return {groups[g].name: _smallest(sets, groups[g].size) for g, sets in found.items() if g >= 0}


def _coupled(structure: Structure) -> tuple[frozenset[str], ...]:
    """Sets of groups of which some row, of some tensor, holds one and not the other."""
    groups = structure.groups.groups
    found: list[set[str]] = []
    for value in _flat(list(structure.values.values())):
        for facet in value.facets if isinstance(value, Value) else ():
            over, classes = structure.classes(facet)
            owners = np.where(classes > 0, structure.group_of[classes], -1).reshape(-1, classes.shape[-1])
            if len(over) < 2 or len(present := np.unique(owners[owners >= 0])) < 2:
                continue
            rows = np.stack([(owners == g).any(1) for g in present])
            if (rows != rows[:1]).any():
                joined = {groups[g].name for g in present.tolist()}
                apart = [s for s in found if not s & joined]
                found = [*apart, joined.union(*(s for s in found if s & joined))]
    return tuple(frozenset(s) for s in found)


def _smallest(sets: Collection[frozenset[int]], size: int) -> tuple[IntArray, ...]:
    proper = [s for s in sets if len(s) < size]
    least = [s for s in proper if not any(other < s for other in proper)]
    return tuple(np.array(sorted(s), dtype=np.int64) for s in sorted(least, key=sorted))


def channel_axis(node: fx.Node) -> int | None:
    """The output-channel axis of a convolution or linear node, None for any other."""
    if node.target is aten.linear.default:
        return int(node.meta["val"].ndim) - 1
    return 1 if node.target in CONVOLUTIONS else None


def weight_shape(node: fx.Node) -> tuple[int, ...]:
    weight = node.args[1]
    assert isinstance(weight, fx.Node)
    return tuple(weight.meta["val"].shape)


def _produced(node: fx.Node, values: Mapping[str, Any]) -> IntArray:
    """Labels of a weighted node's output channels, 0 where it has none of its own."""
    axis = channel_axis(node)
    assert axis is not None
    value = values[node.name]
    labels = [reduce_to(f, (axis,)) for f in value.facets if axes(f) == (axis,)]
    if len(labels) != 1:
        return np.zeros(value.shape[axis], dtype=np.int64)
    found: IntArray = labels[0].numpy()
    return found


def _components(producers: list[IntArray], classes: Classes) -> list[list[int]]:
    """Classes that share a producer and take part in the same row relations, each list ascending."""
    root: dict[int, int] = {}

    def find(c: int) -> int:
        while root.setdefault(c, c) != c:
            root[c] = root[root[c]]
            c = root[c]
        return c

    rows = {int(p) for p in np.unique(classes.parent) if p > 0}
    for produced in producers:
        by_relation: dict[tuple[int, ...], list[int]] = defaultdict(list)
        for c in np.unique(produced[produced > 0]).tolist():
            if c not in rows:
                by_relation[classes.relations.get(c, ())].append(c)
        for members in by_relation.values():
            for c in members:
                root[find(c)] = find(members[0])
    found: dict[int, list[int]] = defaultdict(list)
    for c in sorted(root):
        found[find(c)].append(c)
    return list(found.values())


def _parents(components: list[list[int]], classes: Classes) -> list[list[int]]:
    """The rows of each component as units of their own, rows of rows first; components that share rows share them."""
    levels: list[list[list[int]]] = [components]
    seen: set[int] = set()
    while levels[-1]:
        found: list[list[int]] = []
        for members in levels[-1]:
            rows = sorted({int(p) for p in classes.parent[members] if p > 0})
            if rows and not seen & set(rows):
                seen |= set(rows)
                found.append(rows)
        levels.append(found)
    return [rows for level in levels[:0:-1] for rows in level]


def _sites(graph: fx.GraphModule, structure: Structure) -> dict[int, list[tuple[fx.Node, Site]]]:
    """Where each group shows: producers' channel axes; for rows, results whose elements lie in them."""
    sites: dict[int, list[tuple[fx.Node, Site]]] = defaultdict(list)
    for node in graph.graph.nodes:
        axis = channel_axis(node)
        if axis is None and node.target not in ATTENTIONS:
            continue
        for over, members in structure.lying(node):
            if axis is not None and over != (axis,):
                continue
            shown = (
                [members, structure.classes.parent[members]]
                if axis is not None
                else [structure.classes.parent[members]]
            )
            for classes in shown:
                for g, site in _shown(structure, node, over, classes):
                    sites[g].append((node, site))
    return {g: _attended(found) for g, found in sites.items()}


def _attended(sites: list[tuple[fx.Node, Site]]) -> list[tuple[fx.Node, Site]]:
    """Heads show at what attention gives out, not at the layers before it."""
    attended = [(node, site) for node, site in sites if node.target in ATTENTIONS]
    return attended or sites


def _shown(structure: Structure, node: fx.Node, over: tuple[int, ...], classes: IntArray) -> Iterator[tuple[int, Site]]:
    owner = np.where(classes > 0, structure.group_of[classes], -1)
    for g in np.unique(owner[owner >= 0]).tolist():
        units = np.where(owner == g, structure.unit_of[classes], -1)
        yield g, Site(node.name, node.meta["layer"], over, units)


def _groups(graph: fx.GraphModule, structure: Structure, members: list[list[int]], n_rows: int) -> list[Group]:
    sites, classes = _sites(graph, structure), structure.classes
    names: list[str] = []
    groups: list[Group] = []
    for g, units in enumerate(members):
        above = int(classes.parent[units[0]])
        in_heads = above > 0 and groups[structure.group_of[above]].kind == "head"
        kind: UnitKind = "head_dim" if in_heads else _kind(g < n_rows, sites[g])
        names.append(_name(kind, sites[g], names))
        balanced = bool(classes.relations.get(units[0]))
        parents = classes.parent[units]
        with_rows = balanced and parents[0] > 0
        groups.append(
            Group(
                names[-1],
                kind,
                len(units),
                tuple(site for _, site in sites[g]),
                structure.unit_of[parents] if with_rows else classes.row[units] * balanced,
                balanced,
                names[structure.group_of[parents[0]]] if with_rows else "",
                tuple(dict.fromkeys(n for c in units for n in classes.inexact.get(c, ()))),
            )
        )
    return groups


def _name(kind: UnitKind, sites: list[tuple[fx.Node, Site]], taken: list[str]) -> str:
    first = sites[0][1].layer or sites[0][1].node
    name = f"{first}@{kind}" if kind in ("head", "head_dim", "conv_group") else first
    same = sum(t == name or t.startswith(f"{name}#") for t in taken)
    return f"{name}#{same + 1}" if same else name


def _kind(rows: bool, sites: list[tuple[fx.Node, Site]]) -> UnitKind:
    nodes = [node for node, _ in sites]
    if rows:
        return "head" if any(n.target in ATTENTIONS for n in nodes) else "conv_group"
    mixing = {n for n in nodes if not (n.target in CONVOLUTIONS and weight_shape(n)[1] == 1)}
    if len(mixing) > 1:
        return "stream"
    return "neuron" if nodes[0].target is aten.linear.default else "channel"


def _left_alone(
    graph: fx.GraphModule, structure: Structure, produced: Mapping[fx.Node, IntArray]
) -> Iterator[LeftAlone]:
    classes = structure.classes
    operations = {n.name: str(n.target) for n in graph.graph.nodes}
    for node, labels in produced.items():
        if (classes.of[labels] != 0).any():
            continue
        asked = [*labels.tolist(), *(_labels_of_weight(node, structure) if not labels.any() else ())]
        reasons = [classes.reasons[x] for x in asked if x in classes.reasons]
        at, reason = reasons[0] if reasons else (node.name, "does not give channels of its own")
        yield LeftAlone(node.meta["layer"], operations.get(at, at), reason)


def _labels_of_weight(node: fx.Node, structure: Structure) -> Iterator[int]:
    """Labels of the parameters a weight is computed from: where they stopped says why the layer has none."""
    front = [node.args[1]]
    while front:
        source = front.pop()
        if isinstance(source, fx.Node):
            for facet in structure.values[source.name].facets if source.op == "get_attr" else ():
                yield from distinct(facet).tolist()
            front += source.all_input_nodes
