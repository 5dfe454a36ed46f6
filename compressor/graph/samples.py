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

from ..errors import ModelError
from .tracing import Watcher

_PROBE_SAMPLES = (3, 5)  # two, so that one differs from the batch that the graph was traced with


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
        parted = value.reshape(*before, -1, n, self.inner, *after)  # [*before, outer, N, inner, *after]
        images_first = parted.movedim(self.axis + 1, 0)  # [N, *before, outer, inner, *after]
        if self.axis == 0:
            return images_first.flatten(0, 2)  # [N * outer * inner, ...]: entries of one image in a row
        outer = self.axis + 1  # where the folded axis' rest begins, behind N
        return images_first.flatten(outer, outer + 1)


@torch.no_grad()
def sample_layouts(
    graph: fx.GraphModule, nodes: Iterable[str], images: Tensor, *, strict: bool = True
) -> dict[str, Samples | None]:
    """Where each node keeps the samples: the axis that grows with the batch and, where it is folded with
    others, the coordinates that change when one sample does. None: the node does not depend on the input.

    Raises ModelError for a node whose samples can't be told apart; None too where not `strict`.
    """
    traced_nodes = {node.name: node for node in graph.graph.nodes}
    traced_n = next(node for node in graph.graph.nodes if node.op == "placeholder").meta["val"].shape[0]
    n = next(count for count in _PROBE_SAMPLES if count != traced_n)
    batch = _probes(images, n + 1)  # the last one is exchanged for the first further on

    wanted = set(nodes)
    values: dict[str, Tensor] = {}
    _run(graph, batch[:n], wanted, values)
    axes = {name: _growing_axis(values[name], _shape(traced_nodes[name]), n, traced_n) for name in wanted}

    changed: dict[str, Tensor] = {}
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


def _probes(images: Tensor, count: int) -> Tensor:
    """[count, C, H, W], the first image with other noise on each, about as strong as the image itself."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(count, *images.shape[1:], generator=generator).to(images)
    return images[:1] + noise * images[:1].std().clamp_min(1e-3)


def _run(graph: fx.GraphModule, batch: Tensor, wanted: set[str], into: dict[str, Tensor]) -> None:
    def watch(node: fx.Node, value: Any) -> Any:
        if node.name in wanted and isinstance(value, Tensor):
            into[node.name] = value
        return value

    Watcher(graph, watch).run(batch)


def _shape(node: fx.Node) -> tuple[int, ...]:
    value = node.meta.get("val")
    return tuple(value.shape) if isinstance(value, Tensor) else ()


def _growing_axis(value: Tensor, traced_shape: tuple[int, ...], n: int, traced_n: int) -> int | None:
    """The axis whose length follows the number of samples: 8 traced with 2 and 12 with 3 are 4 a sample."""
    for axis, (length, traced_length) in enumerate(zip(value.shape, traced_shape, strict=True)):
        if length != traced_length and length * traced_n == traced_length * n:
            return axis
    return None


def _inner(axis: int, n: int, before: Tensor, after: Tensor | None) -> int | None:
    """How many neighbouring coordinates of the axis one sample takes before the next one's begin.

    `before` and `after` differ in sample 0 alone. Of 12 coordinates and 3 samples, where 0, 1, 6 and 7 changed,
    every other stretch of 2 is a later sample's: (c // 2) % 3 is 0 for those four only.
    """
    if after is None:  # not folded
        return 1
    length = before.shape[axis]
    other_axes = [other for other in range(before.ndim) if other != axis]
    moved = (before != after).amax(other_axes) if other_axes else before != after  # [length]
    coordinates = torch.arange(length, device=moved.device)

    per_sample = length // n
    strides = [stride for stride in range(1, per_sample + 1) if per_sample % stride == 0]
    fitting = [stride for stride in strides if not bool(moved[(coordinates // stride) % n != 0].any())]
    return max(fitting) if fitting else None
