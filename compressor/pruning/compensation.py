"""Closed-form repair of what pruning leaves: each layer with changed inputs is refitted to the dense network.

In: the dense graph, the pruned one (same names, smaller tensors), their slices, calibration images. Out: new
weights in the pruned graph, and a record. Layers are solved in graph order on the inputs the repaired network
gives them (reconstruction as in arXiv 1707.06168, asymmetric as in 1505.06798); in front of a clamp such as
ReLU, only what it lets through counts. Knows nothing of scores.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, fx

from ..distributed import sum_count, sum_over_ranks
from ..errors import DataError
from ..graph import fetch, store
from ..lockstep import Batch, Lockstep, Values, arguments, changed_nodes, images_of, run_node
from ..records import Compensation, LayerRepair, LeftAlone, Slices
from ..windows import Window, position_count, rows_of, targets_of
from . import clamped, gram
from .consumers import Layer, find_layers, output_scale, schedule, window_of

RIDGES = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0, 100.0)
ROW_ENTRIES = 1 << 23  # rows are unfolded so many numbers at a time: 64 MB in float64
LEAST_HELD = 2  # rows a feature; with fewer in memory a clamp is not looked at
DEAD_OUTPUT = 1e-6  # an output scaled by less than this share of the largest does not reach the stream


@dataclass(frozen=True, slots=True)
class CompensationOptions:
    """How much is looked at.

    `ridges`: strengths to choose from, relative to the mean square of a layer's inputs; the middle one is used
    where there are too few images to hold any out. Positions of each image are sub-sampled until a layer sees
    about `rows_per_feature` rows for each entry of a row, but at least `rows_least`. `limit_bytes` of live
    activations stay in memory, the rest waits in files; half as many of rows in front of a clamp are held, none
    without `clamps`: a quicker repair that takes no notice of them.
    """

    ridges: tuple[float, ...] = RIDGES
    rows_per_feature: float = 16.0
    rows_least: int = 8192
    limit_bytes: int = 2 << 30
    clamps: bool = True
    seed: int = 0


@dataclass(frozen=True, slots=True)
class _Fit:
    """A layer as the solver sees it: [groups, outputs, features] weights, outputs times `scale`."""

    layer: Layer
    window: Window
    kept: Tensor
    scale: Tensor
    start: Tensor
    offset: Tensor

    @property
    def movable(self) -> bool:
        """Whether a constant can be added to the outputs: by a bias, or by the normalisation behind them."""
        return bool(self.layer.bias) or self.layer.norm is not None


@dataclass(slots=True)
class _Seen:
    """What a layer's rows and targets add up to, in two folds of images; the rows too where a clamp follows."""

    folds: tuple[gram.Moments, gram.Moments]
    bounds: clamped.Bounds | None = None
    rows: clamped.Rows | None = None
    of_first: int = 0  # so many of the rows are the first fold's

    def error(self, weights: Tensor, offset: Tensor) -> float:
        if self.bounds is None or self.rows is None:
            return gram.squared_error(self.folds[0] + self.folds[1], weights, offset)
        return clamped.squared_error(self.rows, self.bounds, weights, offset)


def compensate(
    dense: fx.GraphModule,
    pruned: fx.GraphModule,
    slices: Slices,
    batches: Iterable[Batch],
    *,
    options: CompensationOptions = CompensationOptions(),
) -> Compensation:
    """Refits the pruned graph's layers, in place, so that their outputs equal the dense ones' kept outputs.

    Where outputs enter a sum with a stream that already differs from the dense one's, they are fitted to make
    up for that difference too. Batches are [N, C, H, W] images, or (images, labels) whose labels are not used.
    """
    images = [images_of(batch) for batch in batches]
    if sum_count(sum(len(batch) for batch in images)) == 0:
        raise DataError(
            "there are no images to compensate on; expected at least one batch; check the calibration split"
        )
    changed = changed_nodes(dense, pruned)
    layers, left = find_layers(dense, changed)
    order = schedule(dense, layers)
    uses = {node: (layer.partner,) for node, layer in layers.items() if layer.partner is not None}
    folds = [fold_of(batch) for batch in images]
    repaired: list[LayerRepair] = []
    with Lockstep(dense, pruned, order, images, changed, uses, options.limit_bytes) as walk:
        for stop, node in enumerate(order):
            if node in layers:
                done = _repair(walk, stop, _fit_of(walk, layers[node], slices), folds, options)
                if isinstance(done, LayerRepair):
                    repaired.append(done)
                else:
                    left = (*left, done)
    return Compensation(tuple(repaired), left)


def _fit_of(walk: Lockstep, layer: Layer, slices: Slices) -> _Fit:
    weight = fetch(walk.pruned, layer.weight).detach()
    window = window_of(walk.twin(layer.node), weight)
    indices = slices.kept.get(layer.weight)
    width = fetch(walk.dense, layer.weight).shape[0]
    kept = torch.arange(width) if indices is None else torch.from_numpy(indices[0])
    scale = output_scale(walk.pruned, walk.twins, layer, weight.shape[0]).reshape(window.groups, -1)
    start = weight.double().reshape(*scale.shape, -1) * scale.unsqueeze(-1)
    offset = fetch(walk.pruned, layer.bias).detach().double().reshape(scale.shape) * scale if layer.bias else 0 * scale
    return _Fit(layer, window, kept.to(weight.device), scale, start, offset)


def _repair(
    walk: Lockstep, stop: int, fit: _Fit, folds: Sequence[Tensor], options: CompensationOptions
) -> LayerRepair | LeftAlone:
    features = fit.start.shape[-1]
    if features > gram.WIDEST:
        why = f"a row of its inputs has {features:,} entries, too many to refit (at most {gram.WIDEST:,})"
        return LeftAlone(fit.layer.name, str(fit.layer.node.target), why)
    seen = _gather(walk, stop, fit, folds, options)
    solved = _solve(fit, seen, options)
    if solved is None:
        target = str(fit.layer.node.target)
        return LeftAlone(fit.layer.name, target, "no refit is better than its own weights on held-out images")
    ridge, weights, offset = solved
    total = seen.folds[0] + seen.folds[1]
    variance = max(gram.variance_of(total), torch.finfo(torch.float64).tiny)
    before, after = (seen.error(*w) / variance for w in ((fit.start, fit.offset), (weights, offset)))
    _write(walk.pruned, fit, weights, offset)
    return LayerRepair(fit.layer.name, fit.layer.weight, ridge, before, after, int(total.count))


def _solve(fit: _Fit, seen: _Seen, options: CompensationOptions) -> tuple[float, Tensor, Tensor] | None:
    """Ridge, weights and offset; with the clamp in mind where that is better on images it was not fitted on."""
    ridge = gram.choose_ridge(seen.folds, options.ridges, fit.start, fit.offset, intercept=fit.movable)
    if ridge is None:
        return None
    total = seen.folds[0] + seen.folds[1]
    bounds, rows = seen.bounds, seen.rows
    if bounds is not None and rows is not None and _clamped_is_better(fit, seen, bounds, rows, ridge):
        found = clamped.solve(total, rows, bounds, ridge, fit.start, intercept=fit.movable)
        return None if found is None else (ridge, *found)
    problem = gram.problem_of(total, fit.movable)
    weights = gram.solve(problem, ridge, fit.start)
    return None if weights is None else (ridge, weights, gram.intercept_of(problem, weights))


def _clamped_is_better(fit: _Fit, seen: _Seen, bounds: clamped.Bounds, rows: clamped.Rows, ridge: float) -> bool:
    if any(float(fold.count) == 0 for fold in seen.folds):
        return False
    first, second = rows.part(slice(seen.of_first)), rows.part(slice(seen.of_first, None))
    problem = gram.problem_of(seen.folds[0], fit.movable)
    linear = gram.solve(problem, ridge, fit.start)
    found = clamped.solve(seen.folds[0], first, bounds, ridge, fit.start, intercept=fit.movable)
    if linear is None or found is None:
        return False
    without = clamped.squared_error(second, bounds, linear, gram.intercept_of(problem, linear))
    return clamped.squared_error(second, bounds, *found) < without


def _gather(walk: Lockstep, stop: int, fit: _Fit, folds: Sequence[Tensor], options: CompensationOptions) -> _Seen:
    """Brings both graphs to the layer and sums its rows and targets, in two folds of images, over all ranks.

    `folds` [N] has each batch's.
    """
    layer, window, axis = fit.layer, fit.window, fit.layer.channel_axis
    groups, outputs, features = fit.start.shape
    sums = tuple(gram.Moments.empty(groups, features, outputs, fit.start.device) for _ in range(2))
    count = sum_count(sum(map(len, folds)))
    wanted = rows_wanted(features, options)
    held = min(wanted, options.limit_bytes // 2 // (4 * groups * (features + 2 * outputs)))
    known = layer.partner is None or layer.partner in walk.order[:stop]
    bounds = layer.bounds if options.clamps and known and held >= LEAST_HELD * features else None
    parts = tuple([clamped.Rows.empty(groups, features, outputs, fit.start.device)] for _ in range(2))
    source = arguments(layer.node)["input"]

    def visit(batch: int, dense: Values, pruned: Values) -> None:
        y = dense[layer.node] = run_node(walk.dense, layer.node, dense)
        target = y.index_select(axis, fit.kept)
        lack = None
        if layer.partner in dense and layer.partner in pruned:
            lack = _difference(dense[layer.partner], pruned[layer.partner], fit.kept, axis)
        given = None if bounds is None else _given_to_the_clamp(walk, layer, dense)
        available = position_count(pruned[source], window)
        positions = sampled_positions(available, wanted, count, options.seed).to(y.device)
        of_held = torch.isin(positions, sampled_positions(available, held, count, options.seed).to(y.device))
        fold = folds[batch].to(y.device)
        step = max(1, ROW_ENTRIES // (len(positions) * groups * features))
        for begin in range(0, len(y), step):
            part = slice(begin, begin + step)
            rows = rows_of(pruned[source][part], window, positions)
            targets = targets_of(target[part], window, positions).double() * fit.scale[:, None, None]
            if lack is not None:
                targets += targets_of(lack[part], window, positions)
            for number, moments in enumerate(sums):
                chosen = fold[part] == number
                if bool(chosen.any()):
                    moments.add(rows[:, chosen].flatten(1, 2), targets[:, chosen].flatten(1, 2))
                if given is not None:
                    reached = targets_of(given.index_select(axis, fit.kept)[part], window, positions)
                    few = [t[:, chosen][:, :, of_held].flatten(1, 2).float() for t in (rows, targets, reached)]
                    parts[number].append(clamped.Rows(*few))

    walk.advance(stop, visit)
    totals = _over_ranks(sums[0]), _over_ranks(sums[1])
    if bounds is None:
        return _Seen(totals)
    return _Seen(totals, bounds, clamped.Rows.joined([*parts[0], *parts[1]]), sum(p.x.shape[1] for p in parts[0]))


def _given_to_the_clamp(walk: Lockstep, layer: Layer, dense: Values) -> Tensor:
    """What the dense network's clamp behind the layer takes."""
    values, at = dict(dense), layer.node
    for node in layer.chain:
        values[node] = run_node(walk.dense, node, values)
        at = node
    found: Tensor = values[at]
    return found if layer.partner is None else found + dense[layer.partner]


def _difference(dense: Tensor, pruned: Tensor, kept: Tensor, axis: int) -> Tensor:
    """What the pruned stream lacks."""
    return (dense if dense.shape == pruned.shape else dense.index_select(axis, kept)) - pruned


def fold_of(images: Tensor) -> Tensor:
    """0 or 1 for each image, by its content: the same whichever process holds it."""
    total = images.contiguous().flatten(1).view(torch.uint8).sum(1, dtype=torch.int64)
    return (total * 2654435761 >> 13) & 1  # Knuth's multiplicative hash; its low bits are the weak ones


def rows_wanted(features: int, options: CompensationOptions) -> int:
    return max(options.rows_least, math.ceil(options.rows_per_feature * features))


def sampled_positions(available: int, rows: int, images: int, seed: int) -> Tensor:
    """The flat output positions looked at, the same in every image, so that no rank needs to know another's."""
    count = min(available, math.ceil(rows / images))
    generator = torch.Generator().manual_seed(seed)
    return torch.randperm(available, generator=generator)[:count].sort().values


def _over_ranks(moments: gram.Moments) -> gram.Moments:
    named = {str(i): tensor.cpu().numpy() for i, tensor in enumerate(moments.tensors())}
    sums = sum_over_ranks(named)
    device = moments.x.device
    return gram.Moments(*(torch.from_numpy(np.asarray(sums[name])).to(device) for name in named))


def _write(pruned: fx.GraphModule, fit: _Fit, weights: Tensor, offset: Tensor) -> None:
    """Divides by the scale again; outputs that don't reach the stream keep their weights."""
    alive = fit.scale.abs() > DEAD_OUTPUT * fit.scale.abs().max()
    divisor = torch.where(alive, fit.scale, 1.0)
    old = fetch(pruned, fit.layer.weight).detach()
    own = old.double().reshape(weights.shape)
    fitted = torch.where(alive.unsqueeze(-1), weights / divisor.unsqueeze(-1), own)
    store(pruned, fit.layer.weight, fitted.reshape(old.shape).to(old.dtype))
    if not fit.movable:
        return
    if fit.layer.bias:
        bias = fetch(pruned, fit.layer.bias).detach()
        moved = torch.where(alive, offset / divisor, bias.double().reshape(offset.shape))
        store(pruned, fit.layer.bias, moved.flatten().to(bias.dtype))
    elif fit.layer.norm is not None:
        name = str(arguments(fit.layer.norm)["running_mean"].target)
        mean = fetch(pruned, name)
        shift = torch.where(alive, offset / divisor, 0.0).flatten()
        store(pruned, name, (mean.double() - shift).to(mean.dtype))
