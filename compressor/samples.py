"""Where a node's tensor keeps the images of a batch: a traced graph and node names in, an axis and a stride out.

Attention over windows folds images into another axis, `nn.MultiheadAttention` puts them second, frames and tiles lie
beside them on the first. This is measured on a few images, never assumed. Knows no criterion and no repair.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from .errors import ModelError
from .graph import Watcher

_PROBE_SAMPLES = (3, 5)


@dataclass(frozen=True, slots=True)
class Samples:
    """Coordinate c of `axis` belongs to sample (c // inner) % N."""

    axis: int
    inner: int

    def images_first(self, value: Tensor, n: int) -> Tensor:
        """[N, ...] or, where images were folded into the first axis, [N * entries, ...], each image's in a row.

        An axis of length 12 that holds 3 images with inner = 2 is `outer 2 x images 3 x inner 2`; images come first,
        what is left of a folded axis further on stays where it was: [T, N, C] becomes [N, T, C].
        """
        if self.axis == 0 and value.shape[0] == n:
            return value
        before, after = value.shape[: self.axis], value.shape[self.axis + 1 :]
        parted = value.reshape(*before, -1, n, self.inner, *after).movedim(self.axis + 1, 0)
        if self.axis == 0:
            return parted.flatten(0, 2)  # [N, outer, inner, ...]: entries of one image
        outer = self.axis + 1  # where the folded axis' rest begins, behind N
        return parted.flatten(outer, outer + 1)


@torch.no_grad()
def sample_layouts(
    graph: fx.GraphModule, nodes: Iterable[str], images: Tensor, *, strict: bool = True
) -> dict[str, Samples | None]:
    """Where each node keeps the samples: the axis that grows with the batch and, where it is folded with
    others, the coordinates that change when one sample does. None: the node does not depend on the input.

    Raises ModelError for a node whose samples can't be told apart; None too where not `strict`.
    """
    traced_nodes = {node.name: node for node in graph.graph.nodes}
    traced = next(n for n in graph.graph.nodes if n.op == "placeholder").meta["val"].shape[0]
    n = next(count for count in _PROBE_SAMPLES if count != traced)
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(n + 1, *images.shape[1:], generator=generator).to(images)
    batch = images[:1] + noise * images[:1].std().clamp_min(1e-3)
    wanted, values = set(nodes), dict[str, Tensor]()
    _run(graph, batch[:n], wanted, values)
    changed: dict[str, Tensor] = {}
    axes = {name: _growing_axis(values[name], _shape(traced_nodes[name]), n, traced) for name in wanted}
    folded = {name for name, axis in axes.items() if axis is not None and values[name].shape[axis] != n}
    if folded:
        _run(graph, torch.cat([batch[n:], batch[1:n]]), folded, changed)
    layouts: dict[str, Samples | None] = {}
    for name, axis in axes.items():
        inner = None if axis is None else _inner(axis, n, values[name], changed.get(name))
        if strict and axis is not None and inner is None:
            raise ModelError(
                f"the samples of a batch can't be told apart at node {name!r} (shape {list(values[name].shape)} for "
                f"{n} samples): one sample's value depends on another's; score samples one by one or leave its group "
                "out"
            )
        layouts[name] = None if axis is None or inner is None else Samples(axis, inner)
    return layouts


def _run(graph: fx.GraphModule, batch: Tensor, wanted: set[str], into: dict[str, Tensor]) -> None:
    def watch(node: fx.Node, value: Any) -> Any:
        if node.name in wanted and isinstance(value, Tensor):
            into[node.name] = value
        return value

    Watcher(graph, watch).run(batch)


def _shape(node: fx.Node) -> tuple[int, ...]:
    value = node.meta.get("val")
    return tuple(value.shape) if isinstance(value, Tensor) else ()


def _growing_axis(value: Tensor, traced_shape: tuple[int, ...], n: int, traced: int) -> int | None:
    for axis, (now, then) in enumerate(zip(value.shape, traced_shape, strict=True)):
        if now != then and now * traced == then * n:
            return axis
    return None


def _inner(axis: int, n: int, before: Tensor, after: Tensor | None) -> int | None:
    """How many neighbouring coordinates of the axis one sample takes before the next one's begin."""
    if after is None:
        return 1
    length = before.shape[axis]
    others = [a for a in range(before.ndim) if a != axis]
    moved = (before != after).amax(others) if others else before != after
    coordinates = torch.arange(length, device=moved.device)
    shares = [k for k in range(1, length // n + 1) if (length // n) % k == 0]
    fits = [k for k in shares if not bool(moved[(coordinates // k) % n != 0].any())]
    return max(fits) if fits else None
