"""Where a node's tensor keeps the images of a batch: a traced graph and node names in, an axis and a stride out.

Attention over windows folds images into another axis, `nn.MultiheadAttention` puts them second, frames and tiles lie
beside them on the first. This is measured on a few images, never assumed. Knows no criterion and no repair.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from ..errors import ModelError
from ..tensors import Inputs, as_tuple, cut, joined, mapped
from .interface import traced_count
from .neighbours import shape_of
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
    graph: fx.GraphModule, nodes: Iterable[str], images: Inputs, *, strict: bool = True
) -> dict[str, Samples | None]:
    """Where each node keeps the samples: the axis that grows with the batch and, where it is folded with
    others, the coordinates that change when one sample does. None: the node does not depend on the input.

    Raises ModelError for a node whose samples can't be told apart; None too where not `strict`.
    """
    traced_shapes = {node.name: shape_of(node) for node in graph.graph.nodes}
    traced_n = traced_count(graph)
    n = next(count for count in _PROBE_SAMPLES if count != traced_n)
    batch = _probes(images, n + 1)  # the last one is exchanged for the first further on

    wanted = set(nodes)
    values = _run(graph, cut(batch, 0, n), wanted)
    layouts: dict[str, Samples | None] = dict.fromkeys(wanted)
    folded: dict[str, int] = {}  # the axis of those that keep more than the samples there
    for name in wanted:
        axis = _growing_axis(values[name].shape, traced_shapes[name], n, traced_n)
        if axis is None:
            continue
        if values[name].shape[axis] == n:
            layouts[name] = Samples(axis, 1)
        else:
            folded[name] = axis

    exchanged = joined([cut(batch, n, n + 1), cut(batch, 1, n)])
    changed = _run(graph, exchanged, set(folded)) if folded else {}
    for name, axis in folded.items():
        inner = _inner(axis, n, values[name], changed[name])
        if inner is not None:
            layouts[name] = Samples(axis, inner)
        elif strict:
            raise ModelError(
                f"the samples of a batch can't be told apart at node {name!r} (shape {list(values[name].shape)} for "
                f"{n} samples): one sample's value depends on another's; score samples one by one or leave its group "
                "out"
            )
    return layouts


def _probes(images: Inputs, count: int) -> Inputs:
    """[count, ...], the first image with other noise on each, about as strong as the image itself."""
    generator = torch.Generator().manual_seed(0)
    return mapped(lambda tensor: _noisy(tensor[:1], count, generator), images)


def _noisy(sample: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """[count, ...] of a sample [1, ...]; pixels in whole numbers stay in their range, indices stay as they are."""
    if sample.dtype == torch.uint8:
        noise = torch.randint(256, (count, *sample.shape[1:]), generator=generator, dtype=torch.uint8)
        return noise.to(sample.device)
    if not sample.is_floating_point():
        return sample.expand(count, *sample.shape[1:]).clone()
    noise = torch.randn(count, *sample.shape[1:], generator=generator).to(sample)
    strength = sample.std() if sample.numel() > 1 else sample.abs().sum()  # one number has no deviation
    return sample + noise * strength.clamp_min(1e-3)


def _run(graph: fx.GraphModule, batch: Inputs, wanted: set[str]) -> dict[str, Tensor]:
    """The tensors at the wanted nodes."""
    tensors: dict[str, Tensor] = {}

    def watch(node: fx.Node, value: object) -> object:
        if node.name in wanted and isinstance(value, Tensor):
            tensors[node.name] = value
        return value

    Watcher(graph, watch).run(*as_tuple(batch))
    return tensors


def _growing_axis(shape: Sequence[int], traced_shape: Sequence[int], n: int, traced_n: int) -> int | None:
    """The axis whose length follows the number of samples: 8 traced with 2 and 12 with 3 are 4 a sample."""
    for axis, (length, traced_length) in enumerate(zip(shape, traced_shape, strict=True)):
        if length != traced_length and length * traced_n == traced_length * n:
            return axis
    return None


def _inner(axis: int, n: int, before: Tensor, after: Tensor) -> int | None:
    """How many neighbouring coordinates of the axis one sample takes before the next one's begin.

    `before` and `after` differ in sample 0 alone. Of 12 coordinates and 3 samples, where 0, 1, 6 and 7 changed,
    every other stretch of 2 is a later sample's: (c // 2) % 3 is 0 for those four only.
    """
    length = before.shape[axis]
    moved = (before != after).movedim(axis, 0).reshape(length, -1).any(1)  # [length]
    coordinates = torch.arange(length, device=moved.device)

    per_sample = length // n
    for stride in range(per_sample, 0, -1):  # the widest stretch that fits
        of_later_samples = (coordinates // stride) % n != 0
        if per_sample % stride == 0 and not bool(moved[of_later_samples].any()):
            return stride
    return None
