"""How a layer reads its input, and the rows that its weights are multiplied with.

A row is the input patch (or token) under one output position; a layer is `weights @ row + intercept` for each group
of its channels. Knows neither graphs nor files.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional


@dataclass(frozen=True, slots=True)
class Window:
    """How a layer reads its input: no kernel means the last axis of a linear layer.

    `padding` holds (before, after) of each spatial axis.
    """

    kernel: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()
    padding: tuple[tuple[int, int], ...] = ()
    dilation: tuple[int, ...] = ()
    groups: int = 1

    @property
    def linear(self) -> bool:
        """Whether the layer multiplies the last axis alone."""
        return not self.kernel


def rows_of(x: Tensor, window: Window, positions: Tensor) -> Tensor:
    """The input rows under the flat output `positions`: [groups, B, positions, features]."""
    if window.linear:
        return x.reshape(x.shape[0], -1, x.shape[-1])[:, positions].unsqueeze(0)  # [1, B, positions, features]

    axes = len(window.kernel)
    # `pad` takes the last axis first: ((1, 1), (0, 2)) is [0, 2, 1, 1]
    before_after = [amount for pair in reversed(window.padding) for amount in pair]
    view = functional.pad(x, before_after) if any(before_after) else x
    for axis, (size, step, gap) in enumerate(zip(window.kernel, window.stride, window.dilation, strict=True), 2):
        # a window of 3 with gap 2 spans 5, of which every second counts
        view = view.unfold(axis, (size - 1) * gap + 1, step)[..., ::gap]

    # [B, C, *outputs, *kernel] to [B, *outputs, C, *kernel]
    order = (0, *range(2, 2 + axes), 1, *range(2 + axes, 2 + 2 * axes))
    where: list[slice | Tensor] = [slice(None), *torch.unravel_index(positions, view.shape[2 : 2 + axes])]
    patches = view.permute(order)[tuple(where)]  # [B, positions, C, *kernel]
    rows = patches.reshape(len(x), len(positions), window.groups, -1)
    return rows.permute(2, 0, 1, 3)


def targets_of(y: Tensor, window: Window, positions: Tensor) -> Tensor:
    """The outputs at the flat `positions`: [groups, B, positions, outputs per group]."""
    if window.linear:
        return y.reshape(y.shape[0], -1, y.shape[-1])[:, positions].unsqueeze(0)
    chosen = y.flatten(2)[:, :, positions]  # [B, outputs, positions]
    by_group = chosen.reshape(len(y), window.groups, -1, len(positions))  # [B, groups, outputs per group, positions]
    return by_group.permute(1, 0, 3, 2)


def position_count(x: Tensor, window: Window) -> int:
    """How many rows one image of the input `x` has: a 3 x 3 window of stride 2, padded by 1, on 7 x 7 has 4 x 4."""
    if window.linear:
        return math.prod(x.shape[1:-1])
    axes = zip(x.shape[2:], window.kernel, window.stride, window.padding, window.dilation, strict=True)
    return math.prod((length + sum(pads) - (size - 1) * gap - 1) // step + 1 for length, size, step, pads, gap in axes)
