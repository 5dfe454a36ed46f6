"""Which units go first: those whose work the others can take over. Layers' inputs and weights in, an order out.

A unit's loss is the share of its consumers' outputs that least squares can't recover from the units still there,
each output counted by its own score. Units go greedily, and the inverse covariance is reduced as they do
(optimal brain surgeon, Hassibi & Stork 1993, with blocks of inputs for weights). Knows no budget.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, fx

from ..graph import fetch
from ..graph.operators import arguments
from ..pruning import Structure
from ..records import FloatArray, Group, IntArray, Scores
from ..repair.consumers import Layer
from ..repair.experts import Experts
from .covariance import Inputs

AT_ONCE = 50  # a group is emptied in about so many steps
COMPACTED = 0.85  # of the features left: matrices are copied without the rest


class _Consumer:
    """A layer that reads the group: what remains of its inverse covariance and of its weights, by unit.

    `inverse` [features, features] and `weights` [outputs, features] (rows scaled by the root of what an output
    counts, or any rows with the same products of columns) hold the features of units still there only, but for those
    that went since they were last copied.
    """

    def __init__(self, inverse: Tensor, weights: Tensor, owner: Tensor, unit_count: int) -> None:
        """`owner` [features] is the unit each feature belongs to, -1 of none."""
        self.inverse, self.weights, self.owner = inverse, weights, owner
        self.unit_count = unit_count

    def losses(self) -> Tensor:
        """[units] what removing one more unit costs, 0 of those gone or not read here.

        Units of equally many features are solved together: one feature costs `|w|^2 / inverse`.
        """
        losses = self.weights.new_zeros(self.unit_count)
        units, counts = torch.unique(self.owner[self.owner >= 0], return_counts=True)
        order = self.owner.argsort(stable=True)
        order = order[self.owner[order] >= 0]  # the features of the first unit, of the second ...
        begins = counts.cumsum(0) - counts  # counts 2, 1, 3 begin at 0, 2, 3
        for count in counts.unique().tolist():
            alike = counts == count
            turns = begins[alike].unsqueeze(1) + torch.arange(count, device=order.device)
            features = order[turns]  # [units, count]
            losses[units[alike]] = self._losses_of(features)
        return losses

    def _losses_of(self, features: Tensor) -> Tensor:
        """[units] for units of features [units, count]."""
        if features.shape[1] == 1:
            single = features[:, 0]
            squares: Tensor = self.weights.square().sum(0)
            return squares[single] / self.inverse.diagonal()[single]
        blocks = self.inverse[features.unsqueeze(2), features.unsqueeze(1)]  # [units, count, count]
        columns = self.weights[:, features].movedim(0, -1)  # [units, count, outputs]
        losses: Tensor = ((torch.linalg.inv(blocks) @ columns) * columns).sum((1, 2))
        return losses

    def remove(self, units: Tensor) -> None:
        """Takes the units' features out: the others take over of their work what they can."""
        gone = torch.isin(self.owner, units).nonzero().flatten()
        if not len(gone):
            return
        # P - P_:g P_gg^-1 P_g: is the inverse covariance of the features that stay, P their common one
        across = self.inverse[gone]  # [gone, features]
        reduced = torch.linalg.solve(across[:, gone], across)
        self.weights.addmm_(self.weights[:, gone], reduced, alpha=-1)
        self.inverse.addmm_(across.mT, reduced, alpha=-1)
        self.owner = self.owner.clone()
        self.owner[gone] = -2

        remaining = (self.owner > -2).nonzero().flatten()
        if len(remaining) < COMPACTED * len(self.owner):
            self.inverse, self.weights = self.inverse[remaining][:, remaining], self.weights[:, remaining]
            self.owner = self.owner[remaining]


def consumers_of(
    structure: Structure, layers: Mapping[fx.Node, Layer], experts: Mapping[str, Experts] | None = None
) -> dict[str, dict[fx.Node, IntArray]]:
    """For every group the layers that read it, each with the unit of every input channel (-1: none).

    `experts`, by their weights' names, are those that layers stand for.
    """
    readers: dict[str, dict[fx.Node, IntArray]] = {}
    groups = structure.groups.groups
    for node, layer in layers.items():
        for members in _read_classes(structure, layer, (experts or {}).get(layer.weight)):
            # a channel goes with its own unit (a column's, if it is a cell), or with the row (a head) that it lies in
            for classes in (structure.classes.units(members), structure.classes.parent[members]):  # [channels]
                group_of_channel = np.where(classes > 0, structure.group_of[classes], -1)
                for number in np.unique(group_of_channel[group_of_channel >= 0]).tolist():
                    units = np.where(group_of_channel == number, structure.unit_of[classes], -1)
                    readers.setdefault(groups[number].name, {})[node] = units
    return readers


def _read_classes(structure: Structure, layer: Layer, experts: Experts | None) -> Iterator[IntArray]:
    """[channels] the classes along the channels that a layer reads, once for each way they are parted."""
    if experts is None:
        source = arguments(layer.node)["input"]
        axis = layer.channel_axis % source.meta["val"].ndim
        yield from structure.along(source, axis)
        return
    count, _, _, row = experts.sizes  # each expert reads the same row
    for members in structure.along(experts.patches, experts.patches.meta["val"].ndim - 2):
        yield np.tile(members, count)
    for members in structure.along(experts.routing, 1):
        yield np.repeat(members, row)


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
    consumers: list[_Consumer] = []
    for node, channel_units in readers.items():
        if node in inputs:
            weight = fetch(graph, layers[node].weight).detach()
            worth = counts.get(node.name)
            consumers.append(_consumer(weight, channel_units, group.size, inputs=inputs[node], counts=worth))
    if not consumers:
        return None

    remains = torch.ones(group.size, dtype=torch.bool, device=consumers[0].weights.device)  # [units]
    order = np.zeros(group.size)
    step = -(-group.size // AT_ONCE)  # rounded up
    for gone in range(0, group.size, step):
        losses = torch.stack([consumer.losses().double() for consumer in consumers]).sum(0)
        losses[~remains] = torch.inf
        units = losses.argsort(stable=True)[: min(step, group.size - gone)]
        order[units.cpu().numpy()] = np.arange(gone, gone + len(units))
        remains[units] = False
        if gone + step < group.size:  # behind the last ones nobody asks any more
            for consumer in consumers:
                consumer.remove(units)
    return order


def _consumer(
    weight: Tensor, channel_units: IntArray, unit_count: int, *, inputs: Inputs, counts: FloatArray | None
) -> _Consumer:
    """`counts` [outputs]; without any, all outputs count alike."""
    tiny = torch.finfo(torch.float64).tiny
    weights = weight.double().flatten(1)  # [outputs, features]
    worth = torch.ones(len(weights), dtype=torch.float64)
    if counts is not None:
        worth = torch.from_numpy(np.abs(counts))
    worth = (worth / worth.sum().clamp(min=tiny)).to(weights)

    # a loss is a share of an output's variance, at least of a thousandth of the mean: a nearly constant output
    # would count for everything
    variance = ((weights @ inputs.covariance) * weights).sum(1)
    root = (worth / variance.clamp(min=1e-3 * variance.mean() + tiny)).sqrt()  # [outputs]
    # 3 x 3 weights of channels [0, 1] have features of units 0 (nine of them), then 1
    owner = torch.from_numpy(np.repeat(channel_units, weights.shape[1] // len(channel_units))).to(weights.device)
    counted = weights * root.unsqueeze(1)
    if counted.shape[0] > counted.shape[1]:
        # only products of columns are asked for, and the triangle of its QR decomposition has the same in fewer rows
        counted = torch.linalg.qr(counted, mode="r").R  # [features, features]
    inverse = inputs.inverse.clone()
    return _Consumer(inverse, counted.to(inverse), owner, unit_count)


def counts_of(scores: Scores, groups: Sequence[Group]) -> dict[str, FloatArray]:
    """What each output channel of a scored layer is worth, by the node's name."""
    worth: dict[str, FloatArray] = {}
    for group in groups:
        for values, site in zip(scores.values.get(group.name, ()), group.sites, strict=False):
            if len(site.axes) != 1:  # seen on two axes, as a head's dimensions are, a unit is no channel
                continue
            channels = worth.setdefault(site.node, np.zeros(site.units.shape))
            in_group = site.units >= 0
            channels[in_group] += values[site.units[in_group]]
    return worth
