"""A traced graph with a gate on every unit: its values where gates are half open, the pruned network's where shut.

A unit is gated once on every way, where a layer reads it: there a shut gate is what removal is. Normalisations
over units weigh each by its gate, so that with gates of 0 and 1 they are those of what remains. No layer and no
architecture is known here, only where the labels lie.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from ..graph import aten
from ..graph.interface import output_names
from ..graph.operators import ALL_CONVOLUTIONS, LINEAR, arguments
from ..placement import device_of
from ..pruning import Structure
from ..pruning.compaction import laid
from ..pruning.labels import Value, values_in
from ..pruning.masking import inexact_nodes, is_weight
from ..records import IntArray, UnitKind
from ..tensors import Inputs, as_tuple

_LEAST = 1e-6  # of the sum of gates that a mean is divided by, so that a layer without any gives a number


@dataclass(frozen=True, slots=True)
class Places:
    """Coordinates of a tensor and their gates: `slots` [levels, *axes], the number of a gate, the last for none.

    A coordinate's gates are multiplied: a head's and a dimension's of it.
    """

    axes: tuple[int, ...]
    slots: Tensor

    def of(self, gates: Tensor, rank: int) -> Tensor:
        """The product of the gates, laid on the axes of a tensor of that rank; `gates` [units + 1] end in a one."""
        return laid(self.products(gates), self.axes, rank)

    def products(self, gates: Tensor) -> Tensor:
        """[*axes] the product of each coordinate's gates."""
        levels = gates[self.slots]
        if len(levels) == 1:
            return levels[0]
        return levels.prod(0)


@dataclass(frozen=True, slots=True, eq=False)
class Gating:
    """Where the gates of a graph's units lie: `units[group]` are the places of a group's gates among all.

    `reads[node][operand]` are gated before the node reads them; `norms[node]` weigh what a normalisation counts.
    """

    graph: fx.GraphModule
    structure: Structure
    units: Mapping[str, slice]
    slot_of: IntArray
    levels: tuple[IntArray, ...]
    reads: Mapping[str, Mapping[str, tuple[Places, ...]]]
    norms: Mapping[str, tuple[Places, ...]]

    @property
    def count(self) -> int:
        """How many gates there are."""
        return max((units.stop for units in self.units.values()), default=0)

    def places(self, axes: tuple[int, ...], classes: IntArray, but: Collection[int] = ()) -> Places | None:
        """The gates of the classes on some axes, those of the classes `but` left out; None without any."""
        none = self.count  # the slot of what has no gate
        levels = []
        for level in self.levels:
            members = level[classes]
            slots = np.where(np.isin(members, list(but)), none, self.slot_of[members])
            if (slots < none).any():
                levels.append(slots)
        if not levels:
            return None
        return Places(axes, torch.from_numpy(np.stack(levels)).to(device_of(self.graph)))

    def at(self, node: str) -> tuple[Places, ...]:
        """The gates of everything that lies on a node's result, a single tensor."""
        value = self.structure.values[node]
        if not isinstance(value, Value):
            return ()
        places = (self.places(axes, classes) for axes, classes in self.structure.lying_of(value))
        return tuple(filter(None, places))


def find_gates(graph: fx.GraphModule, structure: Structure, kinds: Collection[UnitKind]) -> Gating:
    """A gate for each unit of the groups of those kinds, and where the graph reads each."""
    units, slot_of = _numbered(structure, kinds)
    gating = Gating(graph, structure, units, slot_of, _levels(structure.classes.parent), {}, {})
    reads, norms = {}, {}
    inexact = inexact_nodes(structure)
    for node in graph.graph.nodes:
        if node.op != "call_function" or not isinstance(node.meta.get("val"), (Tensor, tuple, list)):
            continue
        if node.name in inexact and node.target in _WEIGHED:
            norms[node.name] = gating.at(node.all_input_nodes[0].name)
            continue
        operands = dict(_operands(gating, node))
        if operands:
            reads[node.name] = operands
    return replace(gating, reads=reads, norms=norms)


def _numbered(structure: Structure, kinds: Collection[UnitKind]) -> tuple[dict[str, slice], IntArray]:
    """Where each group's gates are among all, and the gate of each class, of one without any their count."""
    units: dict[str, slice] = {}
    slot_of = np.full(len(structure.classes.parent), -1, dtype=np.int64)
    count = 0
    for group in structure.groups.groups:
        if group.kind in kinds:
            units[group.name] = slice(count, count + group.size)
            members = structure.members[group.name]
            slot_of[members] = count + structure.unit_of[members]
            count += group.size
    slot_of[slot_of < 0] = count
    return units, slot_of


def _levels(parent: IntArray) -> tuple[IntArray, ...]:
    """Of every class itself, the row it lies in, that row's own, and so on to the outermost."""
    above = np.maximum(parent, 0)  # no row: class 0, which never goes
    levels = [np.arange(len(parent))]
    while levels[-1].any():
        levels.append(above[levels[-1]])
    return tuple(levels)


def _operands(gating: Gating, node: fx.Node) -> Iterator[tuple[str, tuple[Places, ...]]]:
    """The operands that a node reads units of, with those that its result does not show any more.

    Of two operands with the same units, the first alone: queries meet keys once.
    """
    structure = gating.structure
    seen = _members(gating, structure.values[node.name])  # by who reads the result
    read: set[int] = set()
    contracted = _contracted_axis(node)
    for source in node.all_input_nodes:
        value = structure.values.get(source.name)
        if not isinstance(value, Value) or is_weight(source) or not source.meta["val"].is_floating_point():
            continue
        operand: list[Places] = []
        for axes, classes in structure.lying_of(value):
            # what lies along the axis that is summed is read, though a residual stream may write the same units
            but = read if axes == (contracted,) else seen | read
            places = gating.places(axes, classes, but)
            if places is not None:
                operand.append(places)
        if operand:
            yield source.name, tuple(operand)
        read |= _members(gating, value)


def _members(gating: Gating, result: Any) -> set[int]:
    """The classes of a node's result or results, and the rows that they lie in."""
    members: set[int] = set()
    for value in values_in(result):
        for _, classes in gating.structure.lying_of(value):
            for level in gating.levels:
                members.update(np.unique(level[classes]).tolist())
    return members


def _contracted_axis(node: fx.Node) -> int:
    """The axis of its input that a layer sums over; -1 where channels may pass through or it is another operation."""
    if node.target is LINEAR:
        return int(node.all_input_nodes[0].meta["val"].ndim) - 1
    if node.target in ALL_CONVOLUTIONS and arguments(node)["groups"] == 1:
        return 1
    return -1


class Gated(fx.Interpreter):
    """The graph, run with gates [units] in 0 to 1; of nodes named in `keep`, values stay in `kept`."""

    def __init__(self, gating: Gating, keep: Collection[str] = ()) -> None:
        super().__init__(gating.graph)
        self.gating = gating
        self.keep = frozenset(keep)
        self.kept: dict[str, Tensor] = {}
        self.gates = torch.ones(gating.count + 1)

    def answers(self, inputs: Inputs, gates: Tensor) -> dict[str, Tensor]:
        """The leaves of the answer by their names."""
        self.gates = torch.cat([gates, gates.new_ones(1)])
        self.kept = {}
        answer = as_tuple(self.run(*as_tuple(inputs)))
        return dict(zip(output_names(self.gating.graph), answer, strict=True))

    def get_attr(self, *call: Any) -> Any:
        """Weights stay as they are: nothing learns but gates."""
        tensor: Tensor = super().get_attr(*call)
        return tensor.detach()

    def run_node(self, n: fx.Node) -> Any:
        result = self._computed(n)
        if n.name in self.keep:
            self.kept[n.name] = self.gated(result, self.gating.at(n.name))
        return result

    def _computed(self, n: fx.Node) -> Any:
        """The node's value with its operands, or what its normalisation counts, times their gates."""
        if n.name in self.gating.norms:
            return self._normalised(n)
        reads = self.gating.reads.get(n.name)
        if reads is None:
            return super().run_node(n)

        def operand(source: fx.Node) -> Any:
            return self.gated(self.env[source], reads.get(source.name, ()))

        args, kwargs = fx.map_arg((n.args, n.kwargs), operand)
        return n.target(*args, **kwargs)  # type: ignore[operator]

    def gated(self, tensor: Tensor, gates: Sequence[Places]) -> Tensor:
        """A tensor times the gates of what lies on it."""
        for places in gates:
            tensor = tensor * places.of(self.gates, tensor.ndim).to(tensor.dtype)
        return tensor

    def _normalised(self, n: fx.Node) -> Any:
        """A normalisation's value where each unit counts as much as its gate is open."""
        named: dict[str, Any] = dict(fx.map_arg(arguments(n), self.env.__getitem__))
        x = next(iter(named.values()))
        weights = self.gated(x.new_ones([1] * x.ndim), self.gating.norms[n.name])
        return _WEIGHED[n.target](x, weights, named)


def _layer_norm(x: Tensor, gates: Tensor, named: Mapping[str, Any]) -> Tensor:
    """Mean and variance over the last axes, each entry by its gate."""
    over = list(range(x.ndim - len(named["normalized_shape"]), x.ndim))
    centred = x - _mean(x, gates, over)
    scaled = centred * (_mean(centred.square(), gates, over) + named["eps"]).rsqrt()
    return _affine(scaled, named["weight"], named["bias"])


def _rms_norm(x: Tensor, gates: Tensor, named: Mapping[str, Any]) -> Tensor:
    """The mean square over the last axes, each entry by its gate."""
    over = list(range(x.ndim - len(named["normalized_shape"]), x.ndim))
    eps = torch.finfo(x.dtype).eps if named["eps"] is None else named["eps"]
    return _affine(x * (_mean(x.square(), gates, over) + eps).rsqrt(), named["weight"], None)


def _group_norm(x: Tensor, gates: Tensor, named: Mapping[str, Any]) -> Tensor:
    """[N, C, ...] as [N, groups, C / groups, ...]: over all but the first two."""
    groups, channels = named["num_groups"], x.shape[1]
    by_group = x.reshape(x.shape[0], groups, channels // groups, *x.shape[2:])
    weights = gates.expand(-1, channels, *gates.shape[2:]).reshape(1, groups, channels // groups, *gates.shape[2:])
    over = list(range(2, by_group.ndim))
    centred = by_group - _mean(by_group, weights, over)
    scaled = centred * (_mean(centred.square(), weights, over) + named["eps"]).rsqrt()
    shape = [1, channels, *[1] * (x.ndim - 2)]  # in which [C] meets [N, C, ...]
    return _affine(scaled.reshape(x.shape), named["weight"], named["bias"], shape)


def _mean_over(x: Tensor, gates: Tensor, named: Mapping[str, Any]) -> Tensor:
    """A mean over axes, all of them where none are named, each entry by its gate."""
    dims = named["dim"]
    over = [dims] if isinstance(dims, int) else list(dims or range(x.ndim))
    mean = _mean(x, gates, over)
    if named["keepdim"]:
        return mean
    return mean.squeeze(tuple(over))


def _mean(x: Tensor, gates: Tensor, over: Sequence[int]) -> Tensor:
    """Over some axes, which stay with size 1."""
    weights, axes = gates.expand(x.shape), list(over)
    counted = weights.sum(axes, keepdim=True).clamp_min(_LEAST)
    return (x * weights).sum(axes, keepdim=True) / counted


def _affine(x: Tensor, weight: Tensor | None, bias: Tensor | None, shape: Sequence[int] | None = None) -> Tensor:
    """x * weight + bias, both in that shape where one is told."""
    if weight is not None:
        x = x * (weight if shape is None else weight.reshape(shape))
    if bias is not None:
        x = x + (bias if shape is None else bias.reshape(shape))
    return x


_WEIGHED: Mapping[Any, Any] = {
    aten.layer_norm.default: _layer_norm,
    aten.rms_norm.default: _rms_norm,
    aten.group_norm.default: _group_norm,
    aten.mean.dim: _mean_over,
}
"""Operations that count units, by what they give where each counts as much as its gate is open."""
