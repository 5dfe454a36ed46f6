"""A node's tensor in, its units' values per sample out: [N, ...] -> [N, units].

Where the samples of a batch lie is measured, not assumed: attention over windows folds them into
another axis, `nn.MultiheadAttention` puts them second. Knows no criterion. Where the absolute value is
taken follows Yeom et al. 2021 (channels) and Hatefi et al. 2024 (tokens and heads).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from ..errors import ModelError
from ..graph import Watcher, aten
from ..records import Group, Site, UnitKind
from .options import Per, Place, Sign

_PROBE_SAMPLES = (3, 5)

# In evaluation mode, and though torch does not tag them so.
_ALSO_ELEMENTWISE = (aten.batch_norm.default, aten.hardswish.default, aten.prelu.default)


@dataclass(frozen=True, slots=True)
class Samples:
    """Coordinate c of `axis` belongs to sample (c // inner) % N."""

    axis: int
    inner: int


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


@torch.no_grad()
def sample_layouts(graph: fx.GraphModule, nodes: Iterable[str], images: Tensor) -> dict[str, Samples | None]:
    """Where each node keeps the samples: the axis that grows with the batch and, where it is folded with
    others, the coordinates that change when one sample does. None: the node does not depend on the input.
    """
    traced = next(n for n in graph.graph.nodes if n.op == "placeholder").meta["val"].shape[0]
    n = next(count for count in _PROBE_SAMPLES if count != traced)
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(n + 1, *images.shape[1:], generator=generator).to(images)
    batch = images[:1] + noise * images[:1].std().clamp_min(1e-3)
    wanted, values = set(nodes), dict[str, Tensor]()
    _run(graph, batch[:n], wanted, values)
    changed: dict[str, Tensor] = {}
    axes = {name: _growing_axis(values[name], shape(named(graph, name)), n, traced) for name in wanted}
    folded = {name for name, axis in axes.items() if axis is not None and values[name].shape[axis] != n}
    if folded:
        _run(graph, torch.cat([batch[n:], batch[1:n]]), folded, changed)
    return {
        name: None if axis is None else Samples(axis, _inner(name, axis, n, values[name], changed.get(name)))
        for name, axis in axes.items()
    }


def _run(graph: fx.GraphModule, batch: Tensor, wanted: set[str], into: dict[str, Tensor]) -> None:
    def watch(node: fx.Node, value: Any) -> Any:
        if node.name in wanted and isinstance(value, Tensor):
            into[node.name] = value
        return value

    Watcher(graph, watch).run(batch)


def _growing_axis(value: Tensor, traced_shape: tuple[int, ...], n: int, traced: int) -> int | None:
    for axis, (now, then) in enumerate(zip(value.shape, traced_shape, strict=True)):
        if now != then and now * traced == then * n:
            return axis
    return None


def _inner(name: str, axis: int, n: int, before: Tensor, after: Tensor | None) -> int:
    """How many neighbouring coordinates of the axis one sample takes before the next one's begin."""
    if after is None:
        return 1
    length = before.shape[axis]
    others = [a for a in range(before.ndim) if a != axis]
    moved = (before != after).amax(others) if others else before != after
    coordinates = torch.arange(length, device=moved.device)
    shares = [k for k in range(1, length // n + 1) if (length // n) % k == 0]
    fits = [k for k in shares if not bool(moved[(coordinates // k) % n != 0].any())]
    if not fits:
        raise ModelError(
            f"the samples of a batch can't be told apart at node {name!r} (shape {list(before.shape)} for {n} "
            "samples): one sample's value depends on another's; score samples one by one or leave its group out"
        )
    return max(fits)
