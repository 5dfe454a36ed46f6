"""What a layer's inputs have in common: traced graph and images in, the covariance of every layer's input rows out.

Rows are the patches or tokens the repair fits on, so a layer's outputs are exactly `weights @ row + bias`.
Covariances are shrunk towards their diagonal, for there may be fewer rows than features (the strength is the
oracle-approximating estimator of Chen et al. 2010, on correlations). Knows no groups, no scores, no plan.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from ..distributed import sum_count, sum_over_ranks, world
from ..graph import Watcher, arguments, fetch
from ..placement import device_of, to_device
from ..windows import position_count, rows_of
from . import gram
from .compensation import CompensationOptions, Layouts, layouts_of, rows_wanted, sampled_positions
from .consumers import Layer, window_of

ROWS = CompensationOptions(rows_per_feature=4.0, rows_least=4096)  # shrinkage makes up for what more would tell
_NOTHING = 1e-60  # mean variance of the inputs of a layer that gets the same from every image
ROUGH = 5e-3  # shrunk by so much, no direction of the correlations is too thin for an inverse in float32


@dataclass(frozen=True, slots=True)
class Inputs:
    """A layer's input rows: mean [features] and shrunk covariance [features, features], float64."""

    mean: Tensor
    covariance: Tensor
    precision: torch.dtype = torch.float64  # of the inverse
    _inverse: list[Tensor] = field(default_factory=list, compare=False, repr=False)

    @property
    def inverse(self) -> Tensor:
        """[features, features], made once: orders and repairs of every group the layer reads stand on it."""
        if not self._inverse:
            self._inverse.append(_inverse_of(self.covariance, self.precision))
        return self._inverse[0]


def _inverse_of(covariance: Tensor, precision: torch.dtype) -> Tensor:
    """Of a positive definite matrix, by the Cholesky factor of its correlations: `C^-1 = D^-1 R^-1 D^-1`."""
    deviation = covariance.diagonal().sqrt()
    correlation = (covariance / deviation.outer(deviation)).to(precision)
    factor, failed = torch.linalg.cholesky_ex(correlation)
    if bool(failed):
        factor = stable_factor(correlation)
    root = torch.linalg.solve_triangular(factor, torch.eye(len(factor)).to(factor), upper=False)
    inverse = torch.zeros_like(root)
    gram.add_lower_product(inverse, root)
    deviation = deviation.to(inverse)
    return gram.mirrored(inverse) / deviation.outer(deviation)


def stable_factor(matrix: Tensor) -> Tensor:
    """The lower Cholesky factor in float64, with a ridge that grows until there is one: of rounding, or of nothing."""
    matrix = matrix.double()
    scale = matrix.diagonal().abs().mean().clamp_min(torch.finfo(torch.float64).tiny)
    eye = torch.eye(len(matrix)).to(matrix)
    factor: Tensor
    for ridge in (0.0, 1e-10, 1e-8, 1e-6, 1e-4, 1e-2, 1.0):
        factor, failed = torch.linalg.cholesky_ex(matrix + ridge * scale * eye)
        if not bool(failed):
            return factor
    return scale.sqrt() * eye


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
    layouts: Layouts | None = None,
    progress: Callable[[float], None] = lambda share: None,
) -> dict[fx.Node, Inputs]:
    """One pass over the images; sums over ranks.

    Layers whose `features_of` is 0, or whose inputs can't be told apart by image, are left out. `layouts` are
    `layouts_of` the graph's layers, where they are known already.
    """
    parts = list(images)
    total = sum_count(sum(len(part) for part in parts))
    if layouts is None:
        layouts = layouts_of(graph, layers, parts[0]) if parts else {}
    widths = {node: features_of(graph, layer) for node, layer in layers.items()}
    where = {node: layouts.get(arguments(node)["input"].name) for node in layers}
    sums = {node: _Sums(width) for node, width in widths.items() if width and where[node] is not None}

    device = device_of(graph)
    n = 0

    def watch(node: fx.Node, value: Any) -> Any:
        samples = where.get(node)
        if node in sums and samples is not None:
            window = window_of(node, fetch(graph, layers[node].weight))
            given = samples.images_first(walk.env[arguments(node)["input"]], n)
            given = given.reshape(n, -1, given.shape[-1]) if window.linear else given
            wanted, count = rows_wanted(widths[node], options), total * (len(given) // n)
            positions = sampled_positions(position_count(given, window), wanted, count, options.seed)
            sums[node].add(rows_of(given, window, positions.to(device)).flatten(0, 2))
        return value

    walk = Watcher(graph, watch)
    for index, part in enumerate(parts):
        n = len(part)
        walk.run(to_device(part, device))
        progress((index + 1) / len(parts))
    return {node: rows.inputs(device) for node, rows in sums.items()}


class _Sums:
    """Rows counted from the first ones' mean: products in the rows' own precision, sums in float64."""

    def __init__(self, features: int) -> None:
        self.features = features
        self.dtype = torch.float64
        self.count = 0
        self.origin = torch.zeros(features, dtype=torch.float64)
        self.x = self.xx = torch.zeros(0)

    def add(self, rows: Tensor) -> None:
        """Takes in rows [n, features]."""
        if not self.count:
            self.dtype = rows.dtype
            self.origin = rows.double().mean(0)
            self.x, self.xx = (self.origin.new_zeros(shape) for shape in ((len(self.origin),), (len(self.origin),) * 2))
        rows = rows - self.origin.to(rows)
        self.count += len(rows)
        self.x += rows.sum(0, dtype=torch.float64)
        gram.add_lower_product(self.xx, rows)

    def inputs(self, device: torch.device) -> Inputs:
        """Mean and shrunk covariance of the rows that all ranks saw."""
        if not self.count:
            self.x = torch.zeros(self.features, dtype=torch.float64)
            self.xx = torch.zeros(self.features, self.features, dtype=torch.float64)
        a, n = self.origin.to(self.x), float(self.count)
        raw = {"n": torch.tensor(n, dtype=torch.float64), "x": self.x + n * a}
        raw["xx"] = gram.mirrored(self.xx)
        if world() > 1:  # every rank counted from another point
            raw["xx"] = raw["xx"] + a.outer(self.x) + self.x.outer(a) + n * a.outer(a)
            found = sum_over_ranks({name: value.cpu().numpy() for name, value in raw.items()})
            raw = {name: torch.as_tensor(found[name]).to(device) for name in raw}
            a = torch.zeros_like(raw["x"])
        n = max(float(raw["n"]), 1.0)
        mean = raw["x"] / n
        covariance = raw["xx"] / n - (mean - a).outer(mean - a)
        strength = shrinkage(covariance, n)
        rough = self.dtype == torch.float32 and strength >= ROUGH
        return Inputs(mean, shrunk(covariance, strength), torch.float32 if rough else torch.float64)


def shrinkage(covariance: Tensor, rows: float) -> float:
    """1 for a single row, towards 0 as rows outnumber the features."""
    deviation = covariance.diagonal().clamp(min=_floor(covariance)).sqrt()
    p = len(deviation)
    squares = float((covariance / deviation.outer(deviation)).square().sum())
    spread = (rows + 1 - 2 / p) * (squares - p)
    return min(1.0, ((1 - 2 / p) * squares + p * p) / spread) if spread > 0 else 1.0


def shrunk(covariance: Tensor, strength: float) -> Tensor:
    """`(1 - r) C + r diag(C)`, r the strength.

    Directions without variance get a millionth of the mean, so that the result can be inverted; where none has any
    (a dead layer), each gets 1.
    """
    result = (1 - strength) * covariance
    result.diagonal().add_(strength * covariance.diagonal() + _floor(covariance))
    return result


def _floor(covariance: Tensor) -> float:
    mean = float(covariance.diagonal().mean())
    return 1e-6 * mean if mean > _NOTHING else 1.0
