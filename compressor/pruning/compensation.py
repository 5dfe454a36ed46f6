"""Closed-form repair of what pruning leaves: each layer with changed inputs is refitted to the dense network.

In: the dense graph, the pruned one (same names, smaller tensors), their slices, calibration images. Out: new
weights in the pruned graph, and a record. Layers are solved in graph order on the inputs the repaired network
gives them (reconstruction as in arXiv 1707.06168, asymmetric as in 1505.06798); in front of a clamp such as
ReLU, only what it lets through counts. Knows nothing of scores.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, fx

from ..distributed import joined_over_ranks, sum_count, sum_over_ranks
from ..errors import DataError
from ..graph import arguments, fetch, store
from ..lockstep import Batch, Lockstep, Values, changed_nodes, images_of, run_node
from ..placement import device_of, to_device
from ..records import Compensation, LayerRepair, LeftAlone, Slices
from ..samples import Samples, sample_layouts
from ..windows import Window, position_count, rows_of, targets_of
from . import clamped, dual, gram
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
    about `rows_per_feature` rows for each entry of a row, but at least `rows_least` and at most `rows_most`. A layer
    with more features than `widest` is solved in the space of its rows, at most `rows_of_wide`. `limit_bytes` of
    live activations stay in memory, the rest waits in files; half as many of rows in front of a clamp are held, none
    without `clamps`: a quicker repair that takes no notice of them.
    """

    ridges: tuple[float, ...] = RIDGES
    rows_per_feature: float = 16.0
    rows_least: int = 8192
    rows_most: int = 16384
    widest: int = gram.WIDEST
    rows_of_wide: int = 4096
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


@dataclass
class _Seen:
    """What a layer's rows and targets add up to, in two folds of images; the rows too where a clamp follows."""

    folds: tuple[gram.Moments, gram.Moments]
    bounds: clamped.Bounds | None = None
    rows: clamped.Rows | None = None
    of_first: int = 0  # so many of the rows are the first fold's

    @functools.cached_property
    def total(self) -> gram.Moments:
        return self.folds[0] + self.folds[1]

    def error(self, weights: Tensor, offset: Tensor) -> float:
        if self.bounds is None or self.rows is None:
            return gram.squared_error(self.total, weights, offset)
        return clamped.squared_error(self.rows, self.bounds, weights, offset)


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
    up for that difference too. Batches are [N, C, H, W] images, or (images, labels) whose labels are not used.
    `layouts` are `layouts_of` the dense graph's layers, where they are known already.
    """
    images = [images_of(batch) for batch in batches]
    if sum_count(sum(len(batch) for batch in images)) == 0:
        raise DataError(
            "there are no images to compensate on; expected at least one batch; check the calibration split"
        )
    changed = changed_nodes(dense, pruned)
    layers, left = find_layers(dense, changed)
    if layouts is None:
        layouts = layouts_of(dense, layers, images[0])
    order = schedule(dense, layers)
    uses = {node: (layer.partner,) for node, layer in layers.items() if layer.partner is not None}
    folds = [fold_of(batch) for batch in images]
    repaired: list[LayerRepair] = []
    with Lockstep(dense, pruned, order, images, changed, uses, options.limit_bytes) as walk:
        for stop, node in enumerate(order):
            if node in layers:
                done = _repair(walk, stop, _fit_of(walk, layers[node], slices), folds, layouts, options)
                if isinstance(done, LayerRepair):
                    repaired.append(done)
                else:
                    left = (*left, done)
                progress((stop + 1) / len(order))
    return Compensation(tuple(repaired), left)


Layouts = Mapping[str, Samples | None]


def layouts_of(dense: fx.GraphModule, layers: Iterable[fx.Node], images: Tensor) -> Layouts:
    """Where the inputs and outputs of layers keep the images, by node name; None where that can't be told."""
    nodes = {name for node in layers for name in (node.name, arguments(node)["input"].name)}
    return sample_layouts(dense, nodes, to_device(images[:1], device_of(dense)), strict=False) if nodes else {}


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
    walk: Lockstep,
    stop: int,
    fit: _Fit,
    folds: Sequence[Tensor],
    layouts: Layouts,
    options: CompensationOptions,
) -> LayerRepair | LeftAlone:
    gathering = _Gathering.of(walk, stop, fit, folds, layouts, options)
    if isinstance(gathering, str):
        return LeftAlone(fit.layer.name, str(fit.layer.node.target), gathering)
    walk.advance(stop, gathering.visit)
    if gathering.obstacle:
        return LeftAlone(fit.layer.name, str(fit.layer.node.target), gathering.obstacle)
    if gathering.sample is not None:
        found = _solve_by_rows(fit, gathering.whole_sample(), options)
    else:
        found = _solve_by_moments(fit, gathering.seen(), options)
    if found is None:
        why = "no refit is better than its own weights on held-out images"
        return LeftAlone(fit.layer.name, str(fit.layer.node.target), why)
    ridge, weights, offset, before, after, rows = found
    _write(walk.pruned, fit, weights, offset)
    return LayerRepair(fit.layer.name, fit.layer.weight, ridge, before, after, rows)


_Found = tuple[float, Tensor, Tensor, float, float, int]  # ridge, weights, offset, errors before and after, rows


def _solve_by_moments(fit: _Fit, seen: _Seen, options: CompensationOptions) -> _Found | None:
    solved = _solve(fit, seen, options)
    if solved is None:
        return None
    ridge, weights, offset = solved
    variance = max(gram.variance_of(seen.total), torch.finfo(torch.float64).tiny)
    before, after = (seen.error(*w) / variance for w in ((fit.start, fit.offset), (weights, offset)))
    return ridge, weights, offset, before, after, int(seen.total.count)


def _solve_by_rows(fit: _Fit, sample: dual.Sample, options: CompensationOptions) -> _Found | None:
    start, offset = fit.start[0], fit.offset[0]
    solved = dual.fit(sample, options.ridges, start, offset, intercept=fit.movable)
    if solved is None:
        return None
    variance = max(sample.variance(), torch.finfo(torch.float64).tiny)
    before, after = (sample.error(*w) / variance for w in ((start, offset), solved[1:]))
    return solved[0], solved[1].unsqueeze(0), solved[2].unsqueeze(0), before, after, len(sample.x)


def _solve(fit: _Fit, seen: _Seen, options: CompensationOptions) -> tuple[float, Tensor, Tensor] | None:
    """Ridge, weights and offset; with the clamp in mind where that is better on images it was not fitted on."""
    ridge = gram.choose_ridge(seen.folds, options.ridges, fit.start, fit.offset, intercept=fit.movable)
    if ridge is None:
        return None
    bounds, rows = seen.bounds, seen.rows
    if bounds is not None and rows is not None and _clamped_is_better(fit, seen, bounds, rows, ridge):
        found = clamped.solve(seen.total, rows, bounds, ridge, fit.start, intercept=fit.movable)
        return None if found is None else (ridge, *found)
    problem = gram.problem_of(seen.total, fit.movable)
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


@dataclass
class _Gathering:
    """Sums or keeps a layer's rows and targets while both graphs pass it, in two folds of images.

    `folds` [N] has each batch's. `count` images are seen by all ranks, of which a layer looks at `wanted` rows and
    keeps `held` of them in front of a clamp.
    """

    walk: Lockstep
    fit: _Fit
    folds: Sequence[Tensor]
    layouts: tuple[Samples, Samples]  # of the input and of the output
    options: CompensationOptions
    count: int
    wanted: int
    held: int
    bounds: clamped.Bounds | None
    sample: list[dual.Sample] | None  # instead of sums, where rows are fewer than features
    obstacle: str = ""
    sums: list[gram.MomentSums] = field(default_factory=list)
    parts: tuple[list[clamped.Rows], list[clamped.Rows]] = field(default_factory=lambda: ([], []))

    @classmethod
    def of(
        cls,
        walk: Lockstep,
        stop: int,
        fit: _Fit,
        folds: Sequence[Tensor],
        layouts: Layouts,
        options: CompensationOptions,
    ) -> _Gathering | str:
        """Ready to visit; a text where this layer can't be refitted."""
        layer = fit.layer
        groups, outputs, features = fit.start.shape
        source = arguments(layer.node)["input"]
        where = layouts.get(source.name), layouts.get(layer.node.name)
        if where[0] is None or where[1] is None:
            return "its inputs can't be told apart by image"
        if layer.channel_axis == 1 and (where[0].axis or where[1].axis):
            return "it is convolved with the images on another axis than the first"
        count = sum_count(sum(map(len, folds)))
        wanted = rows_wanted(features, options)
        rows = min(wanted, count * _positions_of(layer))
        few = groups == 1 and (features > options.widest or rows < features)
        held = min(wanted, options.limit_bytes // 2 // (4 * groups * (features + 2 * outputs)))
        if not few and features > options.widest:
            return f"a row of its inputs has {features:,} entries, too many to refit (at most {options.widest:,})"
        known = layer.partner is None or layer.partner in walk.order[:stop]
        bounds = layer.bounds if options.clamps and known and held >= LEAST_HELD * features and not few else None
        wanted = min(wanted, options.rows_of_wide) if few else wanted
        places = (where[0], where[1])
        return cls(walk, fit, folds, places, options, count, wanted, held, bounds, [] if few else None)

    def visit(self, batch: int, dense: Values, pruned: Values) -> None:
        """Takes in one batch."""
        walk, fit, layer, window = self.walk, self.fit, self.fit.layer, self.fit.window
        axis, n = layer.channel_axis, len(self.folds[batch])
        y = dense[layer.node] = run_node(walk.dense, layer.node, dense)
        made, source = pruned[arguments(layer.node)["input"]], dense[arguments(layer.node)["input"]]
        if _positions(made, axis) != _positions(source, axis):
            self.obstacle = "its positions change with what was removed"
        if self.obstacle:
            return
        target = self._by_image(y.index_select(axis, fit.kept), n)
        lack = given = None
        if layer.partner in dense and layer.partner in pruned:
            lack = self._by_image(_difference(dense[layer.partner], pruned[layer.partner], fit.kept, axis), n)
        if self.bounds is not None:
            given = self._by_image(_given_to_the_clamp(walk, layer, dense).index_select(axis, fit.kept), n)
        x = self.layouts[0].images_first(made, n)
        if window.linear:  # windows and the like are positions among others
            x, target = (value.reshape(n, -1, value.shape[-1]) for value in (x, target))
            lack = None if lack is None else lack.reshape(n, -1, lack.shape[-1])
            given = None if given is None else given.reshape(n, -1, given.shape[-1])
        entries = len(x) // n  # windows or frames of one image that lie on the first axis
        available, images = position_count(x, window), self.count * entries
        positions = sampled_positions(available, self.wanted, images, self.options.seed).to(x.device)
        of_held = torch.isin(positions, sampled_positions(available, self.held, images, self.options.seed).to(x.device))
        fold = self.folds[batch].to(x.device).repeat_interleave(entries)
        step = max(1, ROW_ENTRIES // (len(positions) * fit.start.shape[0] * fit.start.shape[-1]))
        for begin in range(0, len(x), step):
            part = slice(begin, begin + step)
            rows = rows_of(x[part], window, positions)
            targets = targets_of(target[part], window, positions) * fit.scale[:, None, None].to(target)
            if lack is not None:
                targets = targets + targets_of(lack[part], window, positions)
            reached = None if given is None else targets_of(given[part], window, positions)
            self._take(rows, targets, reached, fold[part], of_held)

    def _by_image(self, value: Tensor, n: int) -> Tensor:
        return self.layouts[1].images_first(value, n)

    def _take(self, rows: Tensor, targets: Tensor, reached: Tensor | None, fold: Tensor, of_held: Tensor) -> None:
        """Rows and targets [groups, entries, positions, features or outputs]; the fold of each entry."""
        if self.sample is not None:
            of_row = fold.repeat_interleave(rows.shape[2])
            self.sample.append(dual.Sample(rows[0].flatten(0, 1), targets[0].flatten(0, 1), of_row))
            return
        if not self.sums:
            self.sums = _empty_sums(rows.flatten(1, 2), targets.flatten(1, 2))
        for number, sums in enumerate(self.sums):
            chosen = fold == number
            if bool(chosen.any()):
                sums.add(rows[:, chosen].flatten(1, 2), targets[:, chosen].flatten(1, 2))
            if reached is not None:
                few = [t[:, chosen][:, :, of_held].flatten(1, 2).float() for t in (rows, targets, reached)]
                self.parts[number].append(clamped.Rows(*few))

    def whole_sample(self) -> dual.Sample:
        """The rows of all ranks."""
        mine = dual.Sample.joined(self.sample or [self._no_rows()])
        named = {name: getattr(mine, name).cpu().numpy() for name in ("x", "y", "fold")}
        return dual.Sample(*(torch.as_tensor(part).to(mine.x.device) for part in joined_over_ranks(named).values()))

    def _no_rows(self) -> dual.Sample:
        _, outputs, features = self.fit.start.shape
        device = self.fit.start.device
        return dual.Sample(*(torch.zeros(0, *sizes, device=device) for sizes in ((features,), (outputs,), ())))

    def seen(self) -> _Seen:
        """What was taken in by all ranks."""
        groups, outputs, features = self.fit.start.shape
        device = self.fit.start.device
        sums = self.sums or _empty_sums(*(torch.zeros(groups, 1, n, device=device) for n in (features, outputs)))
        totals = _over_ranks(sums[0].moments()), _over_ranks(sums[1].moments())
        if self.bounds is None:
            return _Seen(totals)
        empty = clamped.Rows.empty(groups, features, outputs, device)
        rows = clamped.Rows.joined([empty, *self.parts[0], *self.parts[1]])
        return _Seen(totals, self.bounds, rows, sum(part.x.shape[1] for part in self.parts[0]))


def _positions_of(layer: Layer) -> int:
    """How many rows one image gives, as the graph was traced: outputs of a channel over images."""
    traced = layer.node.meta["val"].shape
    placeholder = next(node for node in layer.node.graph.nodes if node.op == "placeholder")
    return int(math.prod(traced) // traced[layer.channel_axis] // placeholder.meta["val"].shape[0])


def _empty_sums(rows: Tensor, targets: Tensor) -> list[gram.MomentSums]:
    """For two folds, counted from the mean of these rows and targets [groups, n, ...]."""
    groups, _, features = rows.shape
    origin = rows.mean(1), targets.mean(1)
    return [gram.MomentSums(groups, features, targets.shape[-1], rows.device, origin) for _ in range(2)]


def _positions(value: Tensor, channel_axis: int) -> list[int]:
    """The value's shape without its channels."""
    sizes = list(value.shape)
    del sizes[channel_axis]
    return sizes


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
    return min(options.rows_most, max(options.rows_least, math.ceil(options.rows_per_feature * features)))


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
