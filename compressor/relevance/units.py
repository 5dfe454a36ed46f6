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

from ..errors import ModelError
from ..graph import aten
from ..records import Group, Site, UnitKind
from ..samples import Samples
from .options import Per, Place, Sign

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
    """[N, units] in float64; with `per` "all" the caller takes the sign once everything is summed."""
    axis, inner = reading.samples.axis, reading.samples.inner
    x = value.reshape(*value.shape[:axis], -1, n, inner, *value.shape[axis + 1 :])
    units = [a + 2 * (a > axis) for a in reading.site.axes]
    positions = [a for a in range(x.ndim) if a not in units and a != axis + 1]
    per = per or _usual_per(reading, value.ndim)
    if per == "element":
        x = _signed_as(x, sign)
    features = [a for a in positions if per != "position" or (reading.kind == "head" and a == x.ndim - 1)]
    rest = [a for a in positions if a not in features]
    if features:
        x = x.sum(features, keepdim=True, dtype=torch.float64)
    x = x.permute([axis + 1, *rest, *units, *features]).flatten(1 + len(rest))  # [N, *rest, coordinates]
    x = _scatter(x, reading)
    if per == "element":
        return x.double()
    x = x if per == "all" else _signed_as(x, sign)
    return x.sum(list(range(1, 1 + len(rest))), dtype=torch.float64) if rest else x.double()


def _usual_per(reading: Reading, ndim: int) -> Per:
    channels_first = reading.site.axes == (1,) and reading.kind != "head" and ndim > 2
    return "sample" if channels_first or ndim == 2 else "position"


def _signed_as(x: Tensor, sign: Sign) -> Tensor:
    if sign == "squared":
        return x.double().square()  # the square of a small float32 gradient would vanish
    return x.abs() if sign == "absolute" else x


def _scatter(x: Tensor, reading: Reading) -> Tensor:
    """[..., coordinates] -> [..., units]; coordinates of no unit are dropped, those of one unit added."""
    units = reading.site.units.reshape(-1)
    if np.array_equal(units, np.arange(reading.size)):
        return x
    own = np.flatnonzero(units >= 0)
    out = x.new_zeros(*x.shape[:-1], reading.size, dtype=torch.float64)
    where, unit = (torch.from_numpy(index).to(x.device) for index in (own, units[own]))
    return out.index_add_(-1, unit, x.index_select(-1, where).double())


def readings(
    graph: fx.GraphModule, group: Group, place: Place, samples: Mapping[str, Samples | None]
) -> dict[int, Reading]:
    """By their place in the group, the sites that have samples to tell apart."""
    found = {}
    for i, site in enumerate(group.sites):
        node = place_of(graph, site, place).name
        layout = samples[node]
        if layout is not None and layout.axis not in site.axes:
            found[i] = Reading(node, site, group.size, group.kind, layout)
    return found


def place_of(graph: fx.GraphModule, site: Site, place: Place) -> fx.Node:
    node = named(graph, site.node)
    return settled(node) if place == "settled" else node


def named(graph: fx.GraphModule, name: str) -> fx.Node:
    for node in graph.graph.nodes:
        if node.name == name:
            assert isinstance(node, fx.Node)
            return node
    raise ModelError(f"the groups name node {name!r}, the graph has none; find the groups of this graph again")


def settled(node: fx.Node) -> fx.Node:
    """The last node of the chain of element-wise operations that only this one feeds."""
    while len(node.users) == 1:
        user = next(iter(node.users))
        if user.op != "call_function" or not is_elementwise(user) or shape(user) != shape(node):
            break
        others = [n for n in user.all_input_nodes if n is not node]
        if any(n.op != "get_attr" for n in others) or user.args[0] is not node:
            break
        node = user
    return node


def is_elementwise(node: fx.Node) -> bool:
    return node.target in _ALSO_ELEMENTWISE or torch.Tag.pointwise in getattr(node.target, "tags", ())


def shape(node: fx.Node) -> tuple[int, ...]:
    value = node.meta.get("val")
    return tuple(value.shape) if isinstance(value, Tensor) else ()
