"""A node's tensor in, its units' values per sample out: [N, ...] -> [N, units].

Where the samples of a batch lie is for `samples` to say. Knows no criterion. Where the absolute value is
taken follows Yeom et al. 2021 (channels) and Hatefi et al. 2024 (tokens and heads).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, fx

from ..criteria import Per, Place, Sign
from ..errors import ModelError
from ..graph import aten
from ..graph.interface import nodes_by_name
from ..graph.neighbours import is_stored, only_user, other_operands, shape_of
from ..graph.samples import Samples
from ..records import Group, Site, UnitKind

# In evaluation mode, and though torch does not tag them so.
_ALSO_ELEMENTWISE = (aten.batch_norm.default, aten.hardswish.default, aten.prelu.default)


@dataclass(frozen=True, slots=True)
class Reading:
    """One site, the node it is read at and how its tensor becomes units."""

    node: str
    site: Site
    size: int
    kind: UnitKind
    samples: Samples


def read_units(value: Tensor, reading: Reading, n: int, *, sign: Sign, per: Per | None) -> Tensor:
    """[N, units] in float64; with `per` "all" the caller takes the sign once everything is summed.

    `value` is the tensor at `reading.node` for a batch of `n` images. Its axes fall into four kinds: the one that
    holds the images, those of the units, positions summed with their sign and positions that count one by one.
    """
    # the axis that holds the images becomes three, [outer, N, inner]: 2 images of 8 windows each, inner = 8,
    # turn [16, 49, 96] into [1, 2, 8, 49, 96]
    axis, inner = reading.samples.axis, reading.samples.inner
    sample_axis = axis + 1
    x = value.reshape(*value.shape[:axis], -1, n, inner, *value.shape[axis + 1 :])

    # axes behind it moved on by two: the channels, axis 2 of [16, 49, 96], are axis 4 of [1, 2, 8, 49, 96]
    unit_axes = [a + 2 if a > axis else a for a in reading.site.axes]
    position_axes = sorted(set(range(x.ndim)) - {sample_axis, *unit_axes})
    per = per or _usual_per(reading, value.ndim)
    summed_axes = _summed_axes(position_axes, x.ndim - 1, reading, per)
    counted_axes = sorted(set(position_axes) - set(summed_axes))

    if per == "element":
        x = _signed_as(x, sign)
    if summed_axes:
        x = x.sum(summed_axes, keepdim=True, dtype=torch.float64)
    x = x.permute([sample_axis, *counted_axes, *unit_axes, *summed_axes])
    x = x.flatten(1 + len(counted_axes))  # [N, *counted, coordinates]: summed axes have length 1
    x = _scatter(x, reading)  # [N, *counted, units]

    if per not in ("element", "all"):
        x = _signed_as(x, sign)
    if not counted_axes:
        return x.double()
    return x.sum(list(range(1, 1 + len(counted_axes))), dtype=torch.float64)


def _summed_axes(position_axes: list[int], last_axis: int, reading: Reading, per: Per) -> list[int]:
    """The positions whose values are summed before a sign is taken of them (by `per` "element": after).

    All of them, unless each position counts by itself; then a head's features are, which lie on the last axis.
    """
    if per != "position":
        return position_axes
    if reading.kind == "head" and last_axis in position_axes:
        return [last_axis]
    return []


def _usual_per(reading: Reading, ndim: int) -> Per:
    """Samples for channels before space and for [N, F], positions (tokens, queries) for all else."""
    channels_first = reading.site.axes == (1,) and reading.kind != "head"
    return "sample" if channels_first or ndim == 2 else "position"


def _signed_as(x: Tensor, sign: Sign) -> Tensor:
    match sign:
        case "squared":
            return x.double().square()  # the square of a small float32 gradient would vanish
        case "absolute":
            return x.abs()
        case "signed":
            return x


def _scatter(x: Tensor, reading: Reading) -> Tensor:
    """[..., coordinates] -> [..., units]; coordinates of no unit are dropped, those of one unit added.

    Units [0, 0, -1, 1] of values [1, 2, 4, 8] give [3, 8].
    """
    units = reading.site.units.reshape(-1)
    if np.array_equal(units, np.arange(reading.size)):  # every coordinate is the unit of its number
        return x
    coordinates = np.flatnonzero(units >= 0)
    source = torch.from_numpy(coordinates).to(x.device)
    destination = torch.from_numpy(units[coordinates]).to(x.device)
    out = x.new_zeros(*x.shape[:-1], reading.size, dtype=torch.float64)
    return out.index_add_(-1, destination, x.index_select(-1, source).double())


def readings(
    graph: fx.GraphModule, group: Group, place: Place, samples: Mapping[str, Samples | None]
) -> dict[int, Reading]:
    """How each site of a group is read, by its number in `group.sites`.

    Left out are sites whose tensor keeps no images apart, or has its units on the axis that does.
    """
    by_place = {}
    for i, site in enumerate(group.sites):
        node = place_of(graph, site, place).name
        layout = samples[node]
        if layout is not None and layout.axis not in site.axes:
            by_place[i] = Reading(node, site, group.size, group.kind, layout)
    return by_place


def place_of(graph: fx.GraphModule, site: Site, place: Place) -> fx.Node:
    """The node at which a site's units are read."""
    node = named(graph, site.node)
    if place == "settled":
        node = settled(node)
    return node


def named(graph: fx.GraphModule, name: str) -> fx.Node:
    """The graph's node of that name. Raises ModelError where it has none."""
    node = nodes_by_name(graph).get(name)
    if node is None:
        raise ModelError(f"the groups name node {name!r}, the graph has none; find the groups of this graph again")
    return node


def settled(node: fx.Node) -> fx.Node:
    """The last node of the chain of element-wise operations that only this one feeds."""
    reader = only_user(node)
    while reader is not None and _keeps_units(reader, node):
        node, reader = reader, only_user(reader)
    return node


def _keeps_units(reader: fx.Node, node: fx.Node) -> bool:
    """True where an operation changes each element by itself; parameters may take part, another signal may not."""
    if not is_elementwise(reader) or shape_of(reader) != shape_of(node):
        return False
    # another signal (a sum's, a gate's) would put its own relevance into the units
    return reader.args[0] is node and all(map(is_stored, other_operands(reader, node)))


def is_elementwise(node: fx.Node) -> bool:
    """True where every element of the output depends on the elements at its own place only."""
    return node.target in _ALSO_ELEMENTWISE or torch.Tag.pointwise in getattr(node.target, "tags", ())
