"""Which units go first: those whose work the others can take over. Layers' inputs and weights in, an order out.

A unit's loss is the share of its consumers' outputs that least squares can't recover from the units still there,
each output counted by its own score. Units go greedily, and the inverse covariance is reduced as they do
(optimal brain surgeon, Hassibi & Stork 1993, with blocks of inputs for weights). Knows no budget.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, fx

from ..graph import fetch
from ..lockstep import arguments
from ..records import FloatArray, Group, IntArray, Scores
from .consumers import Layer
from .groups import Structure
from .moments import Inputs

AT_ONCE = 50  # a group is emptied in about so many steps


@dataclass(slots=True)
class _Consumer:
    """A layer that reads the group: what remains of its inverse covariance and of its weights, by unit."""

    inverse: Tensor
    weights: Tensor  # [outputs, features], rows scaled by the root of what an output counts
    entries: Sequence[Tensor]  # the features each unit of the group makes, none where this layer does not read it

    def losses(self, alive: Tensor) -> Tensor:
        """[units] what removing one more unit costs; units of equally many entries are solved together."""
        found = torch.zeros(len(self.entries), dtype=torch.float64)
        by_count: dict[int, list[int]] = {}
        for unit, entries in enumerate(self.entries):
            if len(entries) and alive[unit]:
                by_count.setdefault(len(entries), []).append(unit)
        for some in by_count.values():
            index = torch.stack([self.entries[unit] for unit in some])
            blocks = self.inverse[index.unsqueeze(2), index.unsqueeze(1)]
            columns = self.weights[:, index].permute(1, 2, 0)  # [units, entries, outputs]
            found[some] += (torch.linalg.solve(blocks, columns) * columns).sum((1, 2))
        return found

    def remove(self, units: Tensor) -> None:
        gone = torch.cat([self.entries[unit] for unit in units.tolist()])
        if not len(gone):
            return
        reduced = torch.linalg.solve(self.inverse[gone][:, gone], self.inverse[gone])
        self.weights -= self.weights[:, gone] @ reduced
        self.inverse -= self.inverse[:, gone] @ reduced
        self.weights[:, gone] = 0
        self.inverse[gone] = 0
        self.inverse[:, gone] = 0
        self.inverse[gone, gone] = 1


def consumers_of(structure: Structure, layers: Mapping[fx.Node, Layer]) -> dict[str, dict[fx.Node, IntArray]]:
    """For every group the layers that read it, each with the unit of every input channel (-1: none)."""
    found: dict[str, dict[fx.Node, IntArray]] = {}
    groups = structure.groups.groups
    for node, layer in layers.items():
        source = arguments(node)["input"]
        axis = layer.channel_axis % source.meta["val"].ndim
        for over, members in structure.lying(source):
            if over != (axis,):
                continue
            for classes in (members, structure.classes.parent[members]):
                owner = np.where(classes > 0, structure.group_of[classes], -1)
                for number in np.unique(owner[owner >= 0]).tolist():
                    units = np.where(owner == number, structure.unit_of[classes], -1)
                    found.setdefault(groups[number].name, {})[node] = units
    return found


def order_of_loss(
    graph: fx.GraphModule,
    group: Group,
    readers: Mapping[fx.Node, IntArray],
    layers: Mapping[fx.Node, Layer],
    inputs: Mapping[fx.Node, Inputs],
    counts: Mapping[str, FloatArray],
) -> FloatArray | None:
    """[units] the turn in which each should go, 0 first; None where no layer that reads the group was looked at.

    `counts[node name]` is what each of a layer's outputs is worth.
    """
    state = [
        _consumer(fetch(graph, layers[node].weight).detach(), units, group.size, inputs[node], counts.get(node.name))
        for node, units in readers.items()
        if node in inputs
    ]
    if not state:
        return None
    alive = torch.ones(group.size, dtype=torch.bool)
    order = np.zeros(group.size)
    step = -(-group.size // AT_ONCE)
    for gone in range(0, group.size, step):
        losses = torch.stack([c.losses(alive) for c in state]).sum(0)
        losses[~alive] = torch.inf
        units = losses.argsort(stable=True)[: min(step, group.size - gone)]
        order[units.numpy()] = np.arange(gone, gone + len(units))
        alive[units] = False
        for consumer in state:
            consumer.remove(units)
    return order


def _consumer(weight: Tensor, units: IntArray, size: int, inputs: Inputs, counts: FloatArray | None) -> _Consumer:
    weights = weight.double().cpu().flatten(1)
    variance = ((weights @ inputs.covariance) * weights).sum(1)
    worth = torch.ones(len(weights), dtype=torch.float64) if counts is None else torch.from_numpy(np.abs(counts))
    worth = worth / worth.sum().clamp(min=torch.finfo(torch.float64).tiny)
    root = (worth / variance.clamp(min=1e-3 * variance.mean() + torch.finfo(torch.float64).tiny)).sqrt()
    of = torch.from_numpy(np.repeat(units, weights.shape[1] // len(units)))
    entries = [torch.nonzero(of == unit).flatten() for unit in range(size)]
    return _Consumer(torch.linalg.inv(inputs.covariance), weights * root.unsqueeze(1), entries)


def counts_of(scores: Scores, groups: Sequence[Group]) -> dict[str, FloatArray]:
    """What each output channel of a scored layer is worth, by the node's name."""
    found: dict[str, FloatArray] = {}
    for group in groups:
        for values, site in zip(scores.values.get(group.name, ()), group.sites, strict=False):
            if len(site.axes) == 1:
                here = found.setdefault(site.node, np.zeros(site.units.shape))
                here[site.units >= 0] += values[site.units[site.units >= 0]]
    return found
