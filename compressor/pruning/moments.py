"""What a layer's inputs have in common: traced graph and images in, the covariance of every layer's input rows out.

Rows are the patches or tokens the repair fits on, so a layer's outputs are exactly `weights @ row + bias`.
Covariances are shrunk towards their diagonal, for there may be fewer rows than features (the strength is the
oracle-approximating estimator of Chen et al. 2010, on correlations). Knows no groups, no scores, no plan.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from ..distributed import sum_count, sum_over_ranks
from ..graph import Watcher, fetch
from ..lockstep import arguments
from ..windows import position_count, rows_of
from . import gram
from .compensation import CompensationOptions, rows_wanted, sampled_positions
from .consumers import Layer, window_of

ROWS = CompensationOptions(rows_per_feature=4.0, rows_least=4096)  # shrinkage makes up for what more would tell


@dataclass(frozen=True, slots=True)
class Inputs:
    """A layer's input rows: mean [features] and shrunk covariance [features, features], float64."""

    mean: Tensor
    covariance: Tensor


def features_of(graph: fx.GraphModule, layer: Layer) -> int:
    """Entries of one row, 0 where rows of this layer are not looked at (grouped, or too wide)."""
    weight = fetch(graph, layer.weight)
    features = weight[0].numel()
    return features if window_of(layer.node, weight).groups == 1 and features <= gram.WIDEST else 0


@torch.no_grad()
def collect(
    graph: fx.GraphModule,
    layers: Mapping[fx.Node, Layer],
    images: Iterable[Tensor],
    *,
    options: CompensationOptions = ROWS,
) -> dict[fx.Node, Inputs]:
    """One pass over the images; sums over ranks. Layers whose `features_of` is 0 are left out."""
    parts = list(images)
    total = sum_count(sum(len(part) for part in parts))
    widths = {node: features_of(graph, layer) for node, layer in layers.items()}
    sums = {node: _Sums.empty(width) for node, width in widths.items() if width}

    def watch(node: fx.Node, value: Tensor) -> Tensor:
        if node in sums:
            window = window_of(node, fetch(graph, layers[node].weight))
            wanted = rows_wanted(widths[node], options)
            given = walk.env[arguments(node)["input"]]
            positions = sampled_positions(position_count(given, window), wanted, total, options.seed)
            rows = rows_of(given, window, positions.to(value.device))
            sums[node].add(rows.flatten(0, 2))
        return value

    walk = Watcher(graph, watch)
    for part in parts:
        walk.run(part)
    return {node: _over_ranks(total).inputs() for node, total in sums.items()}


@dataclass(slots=True)
class _Sums:
    count: Tensor
    x: Tensor
    xx: Tensor

    @classmethod
    def empty(cls, features: int) -> _Sums:
        shapes: tuple[tuple[int, ...], ...] = ((), (features,), (features, features))
        return cls(*(torch.zeros(shape, dtype=torch.float64) for shape in shapes))

    def add(self, rows: Tensor) -> None:
        rows = rows.double().cpu()
        self.count += len(rows)
        self.x += rows.sum(0)
        self.xx.addmm_(rows.mT, rows)

    def inputs(self) -> Inputs:
        n = self.count.clamp(min=1)
        mean = self.x / n
        return Inputs(mean, shrunk(self.xx / n - mean.outer(mean), float(n)))


def _over_ranks(sums: _Sums) -> _Sums:
    named = {"count": sums.count.numpy(), "x": sums.x.numpy(), "xx": sums.xx.numpy()}
    found = sum_over_ranks(named)
    return _Sums(*(torch.as_tensor(found[name]) for name in named))


def shrunk(covariance: Tensor, rows: float) -> Tensor:
    """`(1 - r) C + r diag(C)`; r is 1 for a single row and goes to 0 as rows outnumber the features.

    Directions without variance get a millionth of the mean, so that the result can be inverted.
    """
    diagonal = covariance.diagonal()
    floor = 1e-6 * diagonal.mean() + torch.finfo(torch.float64).tiny
    deviation = diagonal.clamp(min=floor).sqrt()
    p = len(diagonal)
    squares = float((covariance / deviation.outer(deviation)).square().sum())
    spread = (rows + 1 - 2 / p) * (squares - p)
    strength = min(1.0, ((1 - 2 / p) * squares + p * p) / spread) if spread > 0 else 1.0
    return (1 - strength) * covariance + torch.diag(strength * diagonal + floor)
