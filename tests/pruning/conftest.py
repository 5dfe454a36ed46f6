"""What the tests of removal share: channels that differ, images, cuts by hand, removed channels read off the record."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from compressor.records import Group, IntArray

# float64 rounding over a handful of layers; a wrong index shows as 1e-2 or more
TOLERANCE = 1e-10


def randomised(model: nn.Module) -> nn.Module:
    """Every parameter and statistic differs from channel to channel, so that a wrong index shows."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if tensor.is_floating_point():
                low = 0.5 if "var" in name.rsplit(".", 1)[-1] else -0.5
                tensor.copy_(torch.rand(tensor.shape, generator=generator) + low)
    return model.eval()


def removed_channels(groups: Sequence[Group], kept: Mapping[str, IntArray], layer: str) -> IntArray:
    """Output channels of a layer that go, read off the record alone."""
    found: set[int] = set()
    for group in groups:
        gone = ~np.isin(np.arange(group.size), kept.get(group.name, np.arange(group.size)))
        if group.parent and group.parent in kept:
            gone |= ~np.isin(group.rows, kept[group.parent])
        for site in group.sites:
            if site.layer == layer and len(site.axes) == 1:
                found |= set(np.flatnonzero((site.units >= 0) & gone[site.units]).tolist())
    return np.array(sorted(found), dtype=np.int64)


def images(shape: Sequence[int], n: int = 2) -> Tensor:
    return torch.randn(n, *shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
