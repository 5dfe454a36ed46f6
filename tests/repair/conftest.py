"""What the tests of repair share: cuts by hand, and how far two networks lie apart."""

from __future__ import annotations

import copy

import numpy as np
from torch import Tensor, fx

from compressor.graph import fetch, store
from compressor.records import Slices

# float64 sums of the same numbers in another order.
ORDER_TOLERANCE = 1e-9
# Two processes add their halves in float64, the weights are float32.
RANK_TOLERANCE = 1e-5


def sliced(dense: fx.GraphModule, cuts: dict[str, dict[int, list[int]]]) -> tuple[fx.GraphModule, Slices]:
    """A copy with the named axes of the named parameters cut to the given indices."""
    pruned, kept = copy.deepcopy(dense), {}
    for name, axes in cuts.items():
        whole = fetch(dense, name).detach()
        index = tuple(np.array(axes.get(axis, range(size)), np.int64) for axis, size in enumerate(whole.shape))
        store(pruned, name, whole[np.ix_(*index)].clone())
        kept[name] = index
    return pruned, Slices(kept)


def distance(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())
