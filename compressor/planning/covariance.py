"""What a layer's inputs have in common: traced graph and images in, the covariance of every layer's input rows out.

Rows are the patches or tokens the repair fits on, so a layer's outputs are exactly `weights @ row + bias`.
Covariances are shrunk towards their diagonal, for there may be fewer rows than features (the strength is the
oracle-approximating estimator of Chen et al. 2010, on correlations). Knows no groups, no scores, no plan.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx

from ..distributed import from_first, in_turns, sum_count, sum_over_ranks, world
from ..graph import Watcher, fetch
from ..graph.operators import arguments
from ..graph.samples import Samples
from ..graph.windows import position_count, rows_of
from ..placement import device_of, inputs_to
from ..repair import least_squares
from ..repair.compensation import CompensationOptions, Layouts, layouts_of, rows_wanted
from ..repair.consumers import Layer, window_of
from ..repair.gathering import sampled_positions
from ..tensors import Inputs as NetworkInputs
from ..tensors import as_tuple, count

ROWS = CompensationOptions(rows_per_feature=4.0, rows_least=4096)  # shrinkage makes up for what more would tell
_NOTHING = 1e-60  # mean variance of the inputs of a layer that gets the same from every image
FEW = 0.5  # rows for each feature: fewer are kept, for products of rows with each other are the smaller matrix
ROUGH = 5e-3  # shrunk by so much, no direction of the correlations is too thin for an inverse in float32


@dataclass(frozen=True, slots=True)
class FewRows:
    """A covariance as `rows.mT @ rows + diag(ridge)`, of far fewer rows [n, features] than features."""

    rows: Tensor
    ridge: Tensor

    def inverse(self, precision: torch.dtype) -> Tensor:
        """[features, features] by Woodbury's identity, `E - E X.T (I + X E X.T)^-1 X E` with E the ridge's inverse."""
        rows, ridge = self.rows.double(), self.ridge.double()
        scaled = rows / ridge  # [n, features]
        inner = scaled @ rows.mT  # [n, n]
        inner.diagonal().add_(1)
        root = torch.linalg.solve_triangular(stable_factor(inner), scaled, upper=False).to(precision)
        inverse: Tensor = -(root.mT @ root)
        inverse.diagonal().add_((1 / ridge).to(precision))
        return inverse


@dataclass(frozen=True, slots=True)
class Inputs:
    """A layer's input rows: mean [features] and shrunk covariance [features, features], float64."""

    mean: Tensor
    covariance: Tensor
    precision: torch.dtype = torch.float64  # of the inverse
    few: FewRows | None = None  # the same covariance, where there are few rows
    _inverse: list[Tensor] = field(default_factory=list, compare=False, repr=False)

    @property
    def inverse(self) -> Tensor:
        """[features, features], made once: orders and repairs of every group the layer reads stand on it."""
        if not self._inverse:
            self._inverse.append(self._inverted())
        return self._inverse[0]

    def _inverted(self) -> Tensor:
        if self.few is not None:
            return self.few.inverse(self.precision)
        return _inverse_of(self.covariance, self.precision)


def _inverse_of(covariance: Tensor, precision: torch.dtype) -> Tensor:
    """Of a positive definite matrix, by the Cholesky factor of its correlations: `C^-1 = D^-1 R^-1 D^-1`."""
    deviation = covariance.diagonal().sqrt()  # D; correlations R are all of one size, whatever the inputs' are
    correlation = (covariance / deviation.outer(deviation)).to(precision)
    factor, failed = torch.linalg.cholesky_ex(correlation)
    if bool(failed):
        factor = stable_factor(correlation)
    root = torch.linalg.solve_triangular(factor, torch.eye(len(factor)).to(factor), upper=False)
    inverse = torch.zeros_like(root)  # R^-1 = L^-1.T L^-1
    least_squares.add_lower_product(inverse, root)
    deviation = deviation.to(inverse)
    return least_squares.mirrored(inverse) / deviation.outer(deviation)


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
    if features > least_squares.WIDEST or window_of(layer.node, weight).groups > 1:
        return 0
    return features


@torch.no_grad()
def collect(
    graph: fx.GraphModule,
    layers: Mapping[fx.Node, Layer],
    images: Iterable[NetworkInputs],
    *,
    options: CompensationOptions = ROWS,
    layouts: Layouts | None = None,
    image_count: int | None = None,
    progress: Callable[[float], None] = lambda share: None,
) -> Mapping[fx.Node, Inputs]:
    """One pass over the images; sums over ranks, each of which has batches of its own, dealt out in turns.

    `image_count` is that of all ranks; where it is not known, `images` are gone through twice. Layers whose
    `features_of` is 0, or whose inputs can't be told apart by image, are left out. `layouts` are `layouts_of` the
    graph's layers, where they are known already.
    """
    if image_count is None:
        image_count = sum_count(sum(map(count, images)))
    if layouts is None:
        first = next(iter(images), None)
        layouts = {} if first is None else layouts_of(graph, layers, first)
    uses = _uses_of(graph, layers, layouts)
    sums = {use.layer.node: use.sums for use in uses.values()}
    collector = _Collector(graph, uses, image_count, options)
    done = 0
    for batch in images:
        collector.add(batch)
        if not done:
            _settle_origins(sums)
        done += count(batch)
        progress(min(1.0, world() * done / image_count))  # ranks are about as far
    if not done:
        _settle_origins(sums)
    for rows in sums.values():
        rows.add_others(device_of(graph))
    return _Finished(sums)


@dataclass(frozen=True, slots=True)
class _Use:
    """A node that a layer's weights are used at: how its input keeps the images, and the layer's sums."""

    layer: Layer
    samples: Samples
    sums: _Sums


def _uses_of(graph: fx.GraphModule, layers: Mapping[fx.Node, Layer], layouts: Layouts) -> dict[fx.Node, _Use]:
    """Every node that uses a layer; none where rows are not looked at, or an input's images can't be told apart."""
    uses: dict[fx.Node, _Use] = {}
    for layer in layers.values():
        features = features_of(graph, layer)
        samples_at = {use.node: layouts.get(arguments(use.node)["input"].name) for use in layer.uses}
        told = {node: samples for node, samples in samples_at.items() if samples is not None}
        if features and len(told) == len(samples_at):
            sums = _Sums(features, len(layer.uses))
            uses |= {node: _Use(layer, samples, sums) for node, samples in told.items()}
    return uses


class _Collector:
    """Batches run through the graph; rows of what its layers read are added to their sums on the way."""

    def __init__(
        self, graph: fx.GraphModule, uses: Mapping[fx.Node, _Use], image_count: int, options: CompensationOptions
    ) -> None:
        self.graph, self.uses = graph, uses
        self.image_count, self.options = image_count, options
        self.walk = Watcher(graph, self._watch)
        self.device = device_of(graph)
        self.n = 0  # images of the batch that passes

    def add(self, batch: NetworkInputs) -> None:
        """Takes in the rows of one batch [n, ...]."""
        self.n = count(batch)
        self.walk.run(*as_tuple(inputs_to(batch, self.device)))

    def _watch(self, node: fx.Node, value: object) -> object:
        if node in self.uses:
            self._look_at(node, self.uses[node])
        return value

    def _look_at(self, node: fx.Node, use: _Use) -> None:
        """Adds rows of what one use of a layer reads of this batch."""
        window = window_of(node, fetch(self.graph, use.layer.weight))
        x = use.samples.images_first(self.walk.env[arguments(node)["input"]], self.n)  # [n * entries, ...]
        if window.linear:
            x = x.reshape(self.n, -1, x.shape[-1])  # [n, tokens, width]: windows are positions among others
        wanted = math.ceil(rows_wanted(use.sums.features, self.options) / len(use.layer.uses))
        entries = len(x) // self.n  # windows or frames of one image that lie on the first axis
        all_entries = self.image_count * entries
        positions = sampled_positions(position_count(x, window), wanted, all_entries, self.options.seed)
        rows = rows_of(x, window, positions.to(self.device))  # [1, n * entries, positions, features]
        use.sums.add(rows.flatten(0, 2))  # [rows, features]


class _Finished(Mapping[fx.Node, Inputs]):
    """A layer's covariance is worked out when it is asked for: of several processes each asks for those it needs."""

    def __init__(self, sums: Mapping[fx.Node, _Sums]) -> None:
        self._nodes, self._waiting = tuple(sums), dict(sums)
        self._inputs: dict[fx.Node, Inputs] = {}

    def __getitem__(self, node: fx.Node) -> Inputs:
        if node not in self._inputs:
            self._inputs[node] = self._waiting.pop(node).inputs()  # its rows and sums are not needed again
        return self._inputs[node]

    def __iter__(self) -> Iterator[fx.Node]:
        return iter(self._nodes)

    def __len__(self) -> int:
        return len(self._nodes)


def _settle_origins(sums: Mapping[fx.Node, _Sums]) -> None:
    """Every rank counts its rows from where the first one does, so that a batch's product is the same on any."""
    origins = from_first({node.name: rows.first_mean for node, rows in sums.items()})
    for node, rows in sums.items():
        rows.count_from(origins[node.name])


class _Sums:
    """Rows counted from the first ones' mean: products in the rows' own precision, sums in float64.

    A batch gives rows for each of the layer's `uses`.
    """

    def __init__(self, features: int, uses: int = 1) -> None:
        self.features, self.uses = features, uses
        self.dtype = torch.float64
        self.count = 0
        self.origin: Tensor | None = None  # not known before the first batch has passed
        self.x = self.xx = torch.zeros(0)
        self.rows: list[Tensor] = []  # those that `xx` does not hold yet, as they were added

    @property
    def first_mean(self) -> Tensor:
        """[features] of the first rows, on the CPU; 0 without any."""
        if not self.rows:
            return torch.zeros(self.features, dtype=torch.float64)
        return self.rows[0].double().mean(0).cpu()

    def count_from(self, origin: Tensor) -> None:
        """Takes in what was added before."""
        waiting, self.rows = self.rows, []
        self.origin = origin.to(waiting[0].device) if waiting else origin
        self.x = torch.zeros_like(self.origin)
        for rows in waiting:
            self.add(rows)

    def add(self, rows: Tensor) -> None:
        """Takes in rows [n, features]."""
        if self.origin is None:
            self.dtype = rows.dtype
            self.rows.append(rows)
            return
        rows = rows - self.origin.to(rows)
        self.count += len(rows)
        self.x += rows.sum(0, dtype=torch.float64)
        self.rows.append(rows)
        if self.count > FEW * self.features:
            self._multiply()

    def _multiply(self) -> None:
        """Brings `xx` up to date."""
        if not len(self.xx):
            self.xx = self.x.new_zeros(self.features, self.features)
        for rows in self.rows:
            least_squares.add_lower_product(self.xx, rows)
        self.rows = []

    def add_others(self, device: torch.device) -> None:
        """Takes in what the other ranks saw: their rows where all are few, else their sums."""
        if sum_count(self.count) <= FEW * self.features:
            self._take_in_others()
            return
        self._multiply()
        self._sum_up(device)

    def inputs(self) -> Inputs:
        """Mean and shrunk covariance of the rows that were taken in."""
        if self.origin is None:
            self.count_from(self.first_mean)
        assert self.origin is not None
        if self.rows:
            return self._of_few()
        if not len(self.xx):
            self._multiply()

        count = max(float(self.count), 1.0)
        mean = (self.x + count * self.origin) / count
        shift = mean - self.origin
        # E (x - a)(x - a).T less (m - a)(m - a).T is the covariance, wherever a lies
        covariance = least_squares.mirrored(self.xx) / count - shift.outer(shift)
        strength = shrinkage(covariance, count)
        return Inputs(mean, shrunk(covariance, strength), self._precision_at(strength))

    def _take_in_others(self) -> None:
        """All ranks' rows, batch by batch in the order that they had before they were dealt out."""
        if world() == 1:
            return
        on_cpu = [rows.cpu() for rows in self.rows]
        by_batch = [on_cpu[begin : begin + self.uses] for begin in range(0, len(on_cpu), self.uses)]
        in_order = itertools.chain.from_iterable(in_turns(by_batch))
        self.rows = [rows.to(self.x.device) for rows in in_order]
        self.count = sum(map(len, self.rows))
        self.x = torch.zeros_like(self.x)
        for rows in self.rows:
            self.x += rows.sum(0, dtype=torch.float64)

    def _sum_up(self, device: torch.device) -> None:
        if world() == 1:
            return
        seen_here = {"n": torch.tensor(float(self.count)), "x": self.x, "xx": self.xx}
        totals = sum_over_ranks({name: value.cpu().numpy() for name, value in seen_here.items()})
        self.count = int(totals["n"])
        self.x, self.xx = (torch.as_tensor(totals[name]).to(device) for name in ("x", "xx"))

    def _of_few(self) -> Inputs:
        assert self.origin is not None
        shift = self.x / self.count
        rows = torch.cat(self.rows)  # [n, features]
        rows = rows - shift.to(rows)  # about their mean
        covariance = (rows.mT @ rows).double() / self.count
        strength = shrinkage(covariance, self.count)
        ridge = strength * covariance.diagonal() + _floor(covariance)
        few = FewRows(rows * math.sqrt((1 - strength) / self.count), ridge)
        return Inputs(self.origin + shift, shrunk(covariance, strength), self._precision_at(strength), few)

    def _precision_at(self, strength: float) -> torch.dtype:
        """Of the inverse of a covariance so strongly shrunk."""
        is_rough = self.dtype == torch.float32 and strength >= ROUGH
        return torch.float32 if is_rough else torch.float64


def shrinkage(covariance: Tensor, rows: float) -> float:
    """The strength of the oracle-approximating estimator: 1 for a single row, towards 0 as rows outnumber the features.

    `((1 - 2/p) tr R^2 + p^2) / ((n + 1 - 2/p) (tr R^2 - p))`, R the correlations of p features over n rows.
    """
    deviation = covariance.diagonal().clamp(min=_floor(covariance)).sqrt()
    p = len(deviation)
    squares = float((covariance / deviation.outer(deviation)).square().sum())  # tr R^2
    spread = (rows + 1 - 2 / p) * (squares - p)
    if spread <= 0:
        return 1.0
    return min(1.0, ((1 - 2 / p) * squares + p * p) / spread)


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
