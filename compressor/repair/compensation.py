"""Closed-form repair of what pruning leaves: each layer with changed inputs is refitted to the dense network.

In: the dense graph, the pruned one (same names, smaller tensors), their slices, calibration images. Out: new
weights in the pruned graph, and a record. Layers are solved in graph order on the inputs the repaired network
gives them (reconstruction as in arXiv 1707.06168, asymmetric as in 1505.06798); in front of a clamp such as
ReLU, only what it lets through counts. Knows nothing of scores.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor, fx, nn

from ..distributed import sum_count
from ..errors import DataError
from ..graph import fetch, store
from ..graph.interface import nodes_by_name, traced_count
from ..graph.lockstep import Batch, Lockstep, changed_nodes, inputs_of
from ..graph.operators import arguments
from ..graph.samples import Samples, sample_layouts
from ..placement import device_of, inputs_to
from ..records import Compensation, LayerRepair, LeftAlone, Slices
from ..tensors import Inputs, as_tuple, count, cut
from . import clamped, dual, least_squares
from .consumers import Layer, find_layers, output_scale, schedule, window_of
from .experts import experts_as_layers
from .gathering import Clamp, Fit, Gathering, Statistics, Use

RIDGES = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0, 100.0)
LEAST_HELD = 2  # rows a feature; with fewer in memory a clamp is not looked at
DEAD_OUTPUT = 1e-6  # an output scaled by less than this share of the largest does not reach the stream

Layouts = Mapping[str, Samples | None]
_Solution = TypeVar("_Solution")


@dataclass(frozen=True, slots=True)
class CompensationOptions:
    """How much is looked at.

    `ridges`: strengths to choose from, relative to the mean square of a layer's inputs; the middle one is used
    where there are too few images to hold any out. Positions of each image are sub-sampled until a layer sees
    about `rows_per_feature` rows for each entry of a row, but at least `rows_least` and at most `rows_most`. A layer
    with more features than `widest` is solved in the space of its rows, at most `rows_of_wide`. `limit_bytes` of
    live activations stay in memory, the rest waits in files; half as many of rows in front of a clamp are held, none
    without `clamps`: a quicker repair that takes no notice of them. Without `exact`, layers are solved in float32 where
    that can see the ridge, and their errors are not worked out (NaN in the record). The ridge of a layer with more
    outputs than `sketch` is judged by so many random sums of them.
    """

    ridges: tuple[float, ...] = RIDGES
    rows_per_feature: float = 16.0
    rows_least: int = 8192
    rows_most: int = 16384
    widest: int = least_squares.WIDEST
    rows_of_wide: int = 4096
    limit_bytes: int = 2 << 30
    clamps: bool = True
    exact: bool = True
    sketch: int | None = None
    seed: int = 0


class _Unfit(Exception):
    """A layer that can't be refitted, or needs no refit; the message says why."""


def _required(solution: _Solution | None) -> _Solution:
    """What a solver gives. Raises _Unfit where it gives nothing."""
    if solution is None:
        raise _Unfit("no refit is better than its own weights on held-out images")
    return solution


@dataclass(frozen=True, slots=True)
class _Images:
    """What the layers are refitted on: `folds` are those of each batch, `first` is one image, None without any.

    `count` is of all ranks together.
    """

    batches: Iterable[Inputs]
    folds: Sequence[Tensor]
    first: Inputs | None
    count: int

    @classmethod
    def of(cls, batches: Iterable[Inputs]) -> _Images:
        """Goes through the batches once."""
        folds: list[Tensor] = []
        first: Inputs | None = None
        for images in batches:
            folds.append(fold_of(images))
            if first is None:
                first = cut(images, 0, 1)
        return cls(batches, folds, first, sum_count(sum(map(len, folds))))


@dataclass(frozen=True, slots=True)
class _Refit:
    """New weights and offset as `Fit` has them; squared errors relative to the targets' variance."""

    ridge: float
    weights: Tensor
    offset: Tensor
    error_before: float
    error_after: float
    rows: int


def compensate(
    dense: fx.GraphModule,
    pruned: fx.GraphModule,
    slices: Slices,
    batches: Iterable[Batch],
    *,
    options: CompensationOptions = CompensationOptions(),
    layouts: Layouts | None = None,
    progress: Callable[[float], None] = lambda share: None,
) -> Compensation:
    """Refits the pruned graph's layers, in place, so that their outputs equal the dense ones' kept outputs.

    Where outputs enter a sum with a stream that already differs from the dense one's, they are fitted to make
    up for that difference too. Batches are [N, ...] inputs, or (inputs, targets) whose targets are not used.
    `layouts` are `layouts_of` the dense graph's layers, where they are known already. Raises DataError where no rank
    has any image.
    """
    images = _Images.of(inputs_of(batches))
    if images.count == 0:
        raise DataError(
            "there are no images to compensate on; expected at least one batch; check the calibration split"
        )
    with experts_as_layers(dense, pruned, slices) as (wide_dense, wide_pruned, wide_slices):
        return _refitted(wide_dense, wide_pruned, wide_slices, images, options, layouts or {}, progress)


def _refitted(
    dense: fx.GraphModule,
    pruned: fx.GraphModule,
    slices: Slices,
    images: _Images,
    options: CompensationOptions,
    layouts: Layouts,
    progress: Callable[[float], None],
) -> Compensation:
    """`layouts` are those of the layers where they are known already."""
    changed = changed_nodes(dense, pruned)
    layers, left_alone = find_layers(dense, changed, left=nodes_by_name(pruned))
    if images.first is not None:
        unknown = {node: layer for node, layer in layers.items() if node.name not in layouts}
        layouts = {**layouts, **layouts_of(dense, unknown, images.first)}
    order = schedule(dense, layers)
    needed = {node: _needed(layer) for node, layer in layers.items()}

    repaired: list[LayerRepair] = []
    kept: list[LeftAlone] = []
    with Lockstep(dense, pruned, order, images.batches, changed, needed, options.limit_bytes) as walk:
        for stop, node in enumerate(order):
            if node not in layers:
                continue
            fit = _fit_of(walk, layers[node], slices)
            try:
                repaired.append(_repair(walk, stop, fit, images, layouts, options))
            except _Unfit as reason:
                kept.append(LeftAlone(fit.layer.name, str(node.target), str(reason)))
            progress((stop + 1) / len(order))
    return Compensation(tuple(repaired), (*left_alone, *kept))


def _needed(layer: Layer) -> tuple[fx.Node, ...]:
    """What has to live until the layer is solved: what its uses read, and the streams whose lack it makes up for."""
    read_again = [arguments(use.node)["input"] for use in layer.again]
    return (*read_again, *layer.partners)


def layouts_of(dense: fx.GraphModule, layers: Mapping[fx.Node, Layer], images: Inputs) -> Layouts:
    """Where the inputs and outputs of layers keep the images, by node name; None where that can't be told."""
    names: set[str] = set()
    for layer in layers.values():
        for use in layer.uses:
            names |= {use.node.name, arguments(use.node)["input"].name}
    if not names:
        return {}
    return sample_layouts(dense, names, inputs_to(cut(images, 0, 1), device_of(dense)), strict=False)


def fold_of(images: Inputs) -> Tensor:
    """[N] 0 or 1 for each image, by its content: the same whichever process holds it."""
    total = torch.zeros(count(images), dtype=torch.int64)
    for tensor in as_tuple(images):
        total += tensor.contiguous().reshape(len(tensor), -1).view(torch.uint8).sum(1, dtype=torch.int64)
    return (total * 2654435761 >> 13) & 1  # Knuth's multiplicative hash; its low bits are the weak ones


def rows_wanted(features: int, options: CompensationOptions) -> int:
    """How many rows of so many features a layer looks at, over all images."""
    return min(options.rows_most, max(options.rows_least, math.ceil(options.rows_per_feature * features)))


def _fit_of(walk: Lockstep, layer: Layer, slices: Slices) -> Fit:
    weight = fetch(walk.pruned, layer.weight).detach()
    groups = window_of(walk.twin(layer.node), weight).groups
    every_output = np.arange(len(fetch(walk.dense, layer.weight)))
    outputs = slices.kept.get(layer.weight, (every_output,))[0]  # along axis 0

    scale = output_scale(walk.pruned, walk.twins, layer, weight.shape[0])
    scale = scale.reshape(groups, -1)  # [groups, outputs]
    start = weight.double().reshape(*scale.shape, -1) * scale.unsqueeze(-1)  # [groups, outputs, features]
    offset = 0 * scale
    if layer.bias:
        offset = fetch(walk.pruned, layer.bias).detach().double().reshape(scale.shape) * scale
    return Fit(layer, torch.from_numpy(outputs).to(weight.device), scale, start, offset)


def _repair(
    walk: Lockstep, stop: int, fit: Fit, images: _Images, layouts: Layouts, options: CompensationOptions
) -> LayerRepair:
    """Advances the walk to the layer and writes its new weights. Raises _Unfit where it keeps its own, as all below."""
    gathering = _gathering_of(walk, stop, fit, images, layouts, options)
    walk.advance(stop, gathering.visit)
    if gathering.obstacle:
        raise _Unfit(gathering.obstacle)

    if gathering.by_rows:
        refit = _solve_by_rows(fit, gathering.whole_sample(), options)
    else:
        refit = _solve_by_moments(fit, gathering.statistics(), options)
    _write(walk.pruned, fit, refit.weights, refit.offset)
    return LayerRepair(fit.layer.name, fit.layer.weight, refit.ridge, refit.error_before, refit.error_after, refit.rows)


def _gathering_of(
    walk: Lockstep, stop: int, fit: Fit, images: _Images, layouts: Layouts, options: CompensationOptions
) -> Gathering:
    """How the layer is looked at. Raises _Unfit where it can't be refitted."""
    layer = fit.layer
    groups, outputs, features = fit.start.shape
    uses = [_use_of(walk, use, layouts) for use in layer.uses]

    rows_per_image = sum(_rows_per_image(use, traced_count(walk.dense)) for use in layer.uses)
    wanted = rows_wanted(features, options)
    available = min(wanted, images.count * rows_per_image)
    is_wide = features > options.widest
    if is_wide and groups > 1:
        raise _Unfit(f"a row of its inputs has {features:,} entries, too many to refit (at most {options.widest:,})")
    by_rows = is_wide or (groups == 1 and available < features)
    if by_rows:
        wanted = min(wanted, options.rows_of_wide)

    row_bytes = 4 * groups * (features + 2 * outputs)  # a row, its targets and what the clamp takes, in float32
    rows_in_memory = min(wanted, options.limit_bytes // 2 // row_bytes)
    # what the clamp takes is known only where what the outputs are added to comes before the layer
    before = walk.order[:stop]
    is_clamp_input_known = all(partner in before for partner in layer.partners)
    has_enough_rows = rows_in_memory >= LEAST_HELD * features and not by_rows
    looks_at_clamp = options.clamps and is_clamp_input_known and has_enough_rows
    return Gathering(
        walk,
        fit,
        images.folds,
        uses,
        seed=options.seed,
        image_count=images.count,
        wanted_rows=math.ceil(wanted / len(uses)),
        held_rows=rows_in_memory // len(uses),
        bounds=layer.bounds if looks_at_clamp else None,
        by_rows=by_rows,
    )


def _use_of(walk: Lockstep, layer: Layer, layouts: Layouts) -> Use:
    """How a node of the layer reads its input. Raises _Unfit where its images can't be told apart."""
    input_layout = layouts.get(arguments(layer.node)["input"].name)
    output_layout = layouts.get(layer.node.name)
    if input_layout is None or output_layout is None:
        raise _Unfit("its inputs can't be told apart by image")
    if layer.channel_axis == 1 and (input_layout.axis or output_layout.axis):
        raise _Unfit("it is convolved with the images on another axis than the first")
    window = window_of(walk.twin(layer.node), fetch(walk.pruned, layer.weight))
    return Use(layer, window, input_layout, output_layout)


def _rows_per_image(layer: Layer, traced_images: int) -> int:
    """How many rows one image gives, as the graph was traced: outputs of a channel over images."""
    traced = layer.node.meta["val"].shape
    return int(math.prod(traced) // traced[layer.channel_axis] // traced_images)


def _solve_by_moments(fit: Fit, statistics: Statistics, options: CompensationOptions) -> _Refit:
    ridge, weights, offset = _solve(fit, statistics, options)
    before = after = math.nan
    if options.exact:
        variance = max(least_squares.variance_of(statistics.total), torch.finfo(torch.float64).tiny)
        before = statistics.error(fit.start, fit.offset) / variance
        after = statistics.error(weights, offset) / variance
    return _Refit(ridge, weights, offset, before, after, int(statistics.total.count))


def _solve_by_rows(fit: Fit, sample: dual.Sample, options: CompensationOptions) -> _Refit:
    start, start_offset = fit.start[0], fit.offset[0]  # only layers of one group are solved so
    solution = dual.fit(sample, options.ridges, start, start_offset, intercept=fit.has_intercept)
    ridge, weights, offset = _required(solution)
    variance = max(sample.variance(), torch.finfo(torch.float64).tiny)
    before = sample.error(start, start_offset) / variance
    after = sample.error(weights, offset) / variance
    return _Refit(ridge, weights.unsqueeze(0), offset.unsqueeze(0), before, after, len(sample.x))


def _solve(fit: Fit, statistics: Statistics, options: CompensationOptions) -> tuple[float, Tensor, Tensor]:
    """Ridge, weights and offset; with the clamp in mind where that is better on images it was not fitted on."""
    left = [least_squares.unexplained_by(fit.start, fold) for fold in statistics.folds]
    ridge = _required(
        least_squares.choose_ridge(left, options.ridges, fit.offset, intercept=fit.has_intercept, sketch=options.sketch)
    )
    problem = least_squares.problem_of(left[0] + left[1], fit.has_intercept)
    clamp = statistics.clamp
    if clamp is not None and _clamped_is_better(fit, statistics, clamp, left[0], ridge):
        solution = clamped.solve(
            statistics.total, clamp.rows, clamp.bounds, ridge, fit.start, intercept=fit.has_intercept, left=problem
        )
        return ridge, *_required(solution)

    dtype = torch.float64 if options.exact else torch.float32
    change = _required(least_squares.correction(problem, ridge, dtype))
    return ridge, fit.start + change, least_squares.intercept_of(problem, change)


def _clamped_is_better(
    fit: Fit, statistics: Statistics, clamp: Clamp, left: least_squares.Moments, ridge: float
) -> bool:
    """Both fitted on the first fold, judged on the second, each error as the clamp lets it through.

    `left` are the first fold's moments of what the layer's own weights leave unexplained.
    """
    if any(float(fold.count) == 0 for fold in statistics.folds):
        return False
    bounds = clamp.bounds
    first, second = clamp.rows.parted(clamp.rows_of_first)
    problem = least_squares.problem_of(left, fit.has_intercept)
    change = least_squares.correction(problem, ridge)
    solution = clamped.solve(
        statistics.folds[0], first, bounds, ridge, fit.start, intercept=fit.has_intercept, left=problem
    )
    if change is None or solution is None:
        return False
    offset = least_squares.intercept_of(problem, change)
    linear_error = clamped.squared_error(second, bounds, fit.start + change, offset)
    return clamped.squared_error(second, bounds, *solution) < linear_error


def _write(pruned: fx.GraphModule, fit: Fit, weights: Tensor, offset: Tensor) -> None:
    """Divides by the scale again; outputs that don't reach the stream keep their weights."""
    reaches_stream = fit.scale.abs() > DEAD_OUTPUT * fit.scale.abs().max()  # [groups, outputs]
    divisor = torch.where(reaches_stream, fit.scale, 1.0)
    old = fetch(pruned, fit.layer.weight).detach()
    old_rows = old.double().reshape(weights.shape)  # [groups, outputs, features]
    fitted = torch.where(reaches_stream.unsqueeze(-1), weights / divisor.unsqueeze(-1), old_rows)
    store_under(pruned, [use.weight for use in fit.layer.uses], fitted.reshape(old.shape).to(old.dtype))

    if fit.layer.bias:
        bias = fetch(pruned, fit.layer.bias).detach()
        new_bias = torch.where(reaches_stream, offset / divisor, bias.double().reshape(offset.shape))
        store_under(pruned, [use.bias for use in fit.layer.uses], new_bias.flatten().to(bias.dtype))
    elif fit.layer.norm is not None:
        # the normalisation subtracts its mean from the outputs: what is added to them is taken off it
        names = means_of(fit.layer)
        mean = fetch(pruned, names[0])
        shift = torch.where(reaches_stream, offset / divisor, 0.0).flatten()
        store_under(pruned, names, (mean.double() - shift).to(mean.dtype))


def means_of(layer: Layer) -> list[str]:
    """The names of the running mean behind a layer, one for each use; none where no normalisation is behind it."""
    norms = [use.norm for use in layer.uses if use.norm is not None]
    return [str(arguments(norm)["running_mean"].target) for norm in norms]


def store_under(graph: fx.GraphModule, names: Sequence[str], value: Tensor) -> None:
    """Puts one tensor in the place of all that have those names: tied ones stay tied."""
    if isinstance(fetch(graph, names[0]), nn.Parameter):
        value = nn.Parameter(value)
    for name in set(names):
        store(graph, name, value)
