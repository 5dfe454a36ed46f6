"""What each group's units are worth to the whole network, measured: scores in, comparable scores out.

A group alone loses growing shares of its units, those first whose work the others can take over; the layers that
read it are repaired in closed form, and the distance of the network's outputs is measured on images that served
no repair. The slope of that curve is every unit's new score, so ranking per MAC needs no normalisation. What
layers further on make up for, which is the more the earlier a loss is, is measured too and does not count.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor, fx

from ..distributed import alone, each, own_share, rank, shares_out, world
from ..errors import DataError
from ..graph import fetch
from ..graph.interface import output_names
from ..graph.lockstep import (
    Batch,
    Values,
    at_inputs,
    changed_nodes,
    drop_spent,
    images_of,
    inputs_of,
    last_uses,
    run_node,
)
from ..graph.neighbours import computed_operands, is_stored
from ..inputs.images import Batches
from ..inputs.images import batches as batches_of
from ..placement import device_of, release
from ..pruning import Structure, prune
from ..records import FloatArray, Group, IntArray, Scores, Slices
from ..repair.compensation import CompensationOptions, Layouts, compensate, layouts_of, means_of, store_under
from ..repair.consumers import Layer, find_layers
from ..repair.experts import as_stored, experts_convolved, slices_side_by_side
from ..tasks import Task
from ..tensors import Inputs as NetworkInputs
from ..tensors import count, cut, joined, parted
from .budget import kept_after
from .covariance import Inputs, collect, features_of, stable_factor
from .likeness import Likeness
from .ranking import Chunk, RankingOptions, bundles_of, channels_per_unit, importance, order_of_removal
from .redundancy import consumers_of, counts_of, order_of_loss

LEVELS = (0.1, 0.3, 0.6, 1.0)  # of the units that may go
LOST = 0.5  # of the outputs' square; a network that far off is not one to go on from
LEAST_LEFT = 0.1  # of an error; less says more about the images than about the layers
LIGHT = CompensationOptions(
    rows_per_feature=8.0,
    rows_least=4096,
    widest=2048,
    rows_of_wide=2048,
    limit_bytes=1 << 30,
    clamps=False,
    exact=False,
    sketch=128,
)
ALONE = 0.6  # of the time goes into groups alone, the rest into stretches
COLLECTED = 0.3  # of a group's time into what its readers' inputs have in common
Progress = Callable[[float], None]
_Images: TypeAlias = "Batches | list[NetworkInputs]"  # images of which not all need be in memory, or all are
Mend = Callable[[fx.GraphModule, Slices], object]


@dataclass(frozen=True, slots=True)
class SensitivityOptions:
    """`probes` images, at most a fifth of all, measure; the others' covariances repair.

    `limit_bytes` of covariances are held at a time; groups that need more go in several passes. What layers further
    on make up for is measured for `stretches` of neighbouring groups, with `repairing` images; not at all with 0.
    """

    probes: int = 32
    limit_bytes: int = 3 << 29
    stretches: int = 8
    repairing: int = 128


@dataclass(frozen=True, slots=True)
class _Curve:
    """A group's chunks (and those coupled with it) as they go, and the errors when so many are gone; both from 0."""

    chunks: Sequence[Chunk]
    stops: IntArray
    errors: FloatArray

    @property
    def second(self) -> int:
        """Where the second level stands among the stops; the last one where a group is too small to have two."""
        return min(2, len(self.stops) - 1)


def measure_scores(
    graph: fx.GraphModule,
    structure: Structure,
    scores: Scores,
    batches: Iterable[Batch],
    ranking: RankingOptions,
    *,
    options: SensitivityOptions = SensitivityOptions(),
    task: Task | None = None,
    progress: Progress = lambda share: None,
) -> Scores:
    """Scores [1, units] a group: the rise of the relative squared error of the outputs per unit that goes.

    Errors are those of a group alone whose readers are refitted, times the share of them that remains where all
    layers behind it are.

    `scores` say what a layer's outputs count for within the layer; groups without any are left without.
    Batches are inputs [N, ...], alone or with targets that are not used, the same ones on every rank: ranks share the
    images that covariances are made of, then the groups. How far answers lie apart is for `task` to
    say, without one the network is a classifier. Rank the scores with normalisation "none", per_cost 1.
    """
    pool: _Images = batches if isinstance(batches, Batches) else [images_of(batch) for batch in batches]
    probing, fitting = _parts(pool, options.probes)
    bench = _Bench(graph, structure, probing, task)
    material = _Material(
        readers=consumers_of(structure, bench.layers, bench.experts),
        images=fitting,
        layouts=layouts_of(bench.spelled, bench.layers, probing[0]),
        scores=scores,
        worth=_worth_of(bench, scores),
        ranking=ranking,
    )
    curves = _curves_alone(bench, material, options.limit_bytes, progress)
    factors = _remaining(bench, curves, material, options, progress)
    slopes: dict[str, FloatArray] = {}
    for curve, factor in zip(curves, factors, strict=True):
        _enter(curve, factor, structure, slopes)
    if curves:
        progress(1.0)
    return Scores(f"{scores.criterion}, measured", slopes, scores.samples, scores.unscored, scores.uncovered)


@dataclass(frozen=True, slots=True)
class _Material:
    """What every group is measured with: the layers that read it, images to fit those on, and who goes first.

    `worth[node name]` is what each of a layer's outputs counts for, `layouts` are those of `layouts_of`.
    """

    readers: Mapping[str, Mapping[fx.Node, IntArray]]
    images: _Images
    layouts: Layouts
    scores: Scores
    worth: Mapping[str, FloatArray]
    ranking: RankingOptions


def _worth_of(bench: _Bench, scores: Scores) -> dict[str, FloatArray]:
    """What each output of a layer is worth, by its node's name; a mixture's is that of the convolution in its place."""
    worth = counts_of(scores, bench.structure.groups.groups)
    for node, layer in bench.layers.items():
        mixture = bench.experts.get(layer.weight)
        if mixture is not None and mixture.result.name in worth:
            worth[node.name] = worth[mixture.result.name]
    return worth


def _curves_alone(bench: _Bench, material: _Material, limit_bytes: int, progress: Progress) -> list[_Curve]:
    """The curve of every scored group, or of all that are coupled with it, as many at a time as the limit allows."""
    scores, kinds = material.scores, material.ranking.kinds
    groups = [g for g in bench.structure.groups.groups if g.name in scores.values and g.kind in kinds]
    bundles = bundles_of(groups, bench.structure.coupled)
    curves: list[_Curve] = []
    done = 0
    for pack in _packs(bundles, material.readers, bench, limit_bytes):

        def say(share: float, before: int = done, size: int = len(pack)) -> None:
            progress(ALONE * (before + size * share) / len(groups))

        curves += _curves_of(bench, pack, material, say)
        done += len(pack)
        release()  # the pack's covariances are gone; the next ones are as large
    return curves


def _curves_of(bench: _Bench, pack: Sequence[Group], material: _Material, progress: Progress) -> list[_Curve]:
    """The curves of groups whose readers' covariances are held at the same time, and no longer."""
    readers, ranking = material.readers, material.ranking
    reading = {node: bench.layers[node] for node in _nodes_reading(pack, readers)}
    inputs = _collected(bench.spelled, reading, material, lambda share: progress(COLLECTED * share))

    def ordered(group: Group) -> FloatArray:
        order = order_of_loss(bench.spelled, group, readers.get(group.name, {}), bench.layers, inputs, material.worth)
        return importance(group, material.scores, ranking) if order is None else order

    names = [group.name for group in pack]
    orders = dict(zip(names, each(pack, ordered), strict=True))
    chunks_by_group = list(_chunks_of(pack, orders, ranking, bench.structure))
    done = 0

    def measured(chunks: Sequence[Chunk]) -> _Curve:
        nonlocal done
        curve = _measured(bench, chunks, inputs)
        done += 1
        progress(COLLECTED + (1 - COLLECTED) * done / len(own_share(chunks_by_group)))
        return curve

    return each(chunks_by_group, measured)


def _collected(
    graph: fx.GraphModule, reading: Mapping[fx.Node, Layer], material: _Material, progress: Progress
) -> Mapping[fx.Node, Inputs]:
    """Each rank looks at its share of the batches; where there are fewer than ranks, at all of them."""
    images, layouts = material.images, material.layouts
    total = _image_count(images)
    if not shares_out(len(images)):
        with alone():
            return collect(graph, reading, inputs_of(images), layouts=layouts, image_count=total, progress=progress)
    share = images.share(rank(), world()) if isinstance(images, Batches) else own_share(images)
    return collect(graph, reading, inputs_of(share), layouts=layouts, image_count=total, progress=progress)


def _image_count(images: _Images) -> int:
    """Without decoding any."""
    return images.image_count if isinstance(images, Batches) else sum(map(count, images))


def _parts(images: _Images, probes: int) -> tuple[list[NetworkInputs], _Images]:
    """Images that measure and images that repair; the same where there are too few to part."""
    total = _image_count(images)
    if not total:
        raise DataError("no image was given to measure losses on; expected at least one: check the calibration images")
    measuring = min(probes, total // 5)
    if measuring == 0:
        return list(inputs_of(images)), images
    return list(inputs_of(_between(images, 0, measuring))), _between(images, measuring, total)


def _between(images: _Images, start: int, stop: int) -> _Images:
    """The images from `start` to before `stop`, in batches of the same size."""
    if isinstance(images, Batches):
        stop = min(stop, len(images.images))
        return batches_of(images.images.subset(np.arange(start, stop)), images.batch_size)
    return parted(cut(joined(images), start, stop), count(images[0]))


def _packs(
    bundles: Sequence[list[Group]], readers: Mapping[str, Mapping[fx.Node, IntArray]], bench: _Bench, limit: int
) -> Iterator[list[Group]]:
    """Neighbours whose readers' covariances fit the limit; one bundle at least."""
    pack: list[Group] = []
    nodes: set[fx.Node] = set()
    for bundle in bundles:
        more = set(_nodes_reading(bundle, readers))
        # a covariance and its inverse, 8 bytes an entry each
        size = sum(16 * features_of(bench.spelled, bench.layers[node]) ** 2 for node in nodes | more)
        if pack and size > limit:
            yield pack
            pack, nodes = [], set()
        pack.extend(bundle)
        nodes |= more
    if pack:
        yield pack


def _nodes_reading(groups: Sequence[Group], readers: Mapping[str, Mapping[fx.Node, IntArray]]) -> list[fx.Node]:
    """The layers that read any of the groups, each once."""
    by_group = (readers.get(group.name, {}) for group in groups)
    return list(dict.fromkeys(itertools.chain.from_iterable(by_group)))


def _chunks_of(
    pack: Sequence[Group], orders: Mapping[str, FloatArray], ranking: RankingOptions, structure: Structure
) -> Iterator[list[Chunk]]:
    """Each group's units, one by one (or a row's at a time), in the order in which they go."""
    fine = replace(ranking, scope="global", per_cost=0.0, multiple=1, steps={}, normalisation="none", reduction="sum")
    ranked = Scores("order", {name: order[None] for name, order in orders.items()}, 0)
    by_group: dict[str, list[Chunk]] = {}
    for chunk in order_of_removal(pack, ranked, fine, spans=structure.spans, coupled=structure.coupled):
        by_group.setdefault(chunk.group, []).append(chunk)
    yield from by_group.values()


def _measured(bench: _Bench, chunks: Sequence[Chunk], inputs: Mapping[fx.Node, Inputs]) -> _Curve:
    """Errors with growing shares of the group's units gone, the layers that read it refitted each time."""

    def mend(small: fx.GraphModule, slices: Slices) -> None:
        slices = slices_side_by_side(bench.experts, slices)
        for node in inputs:
            if loses_inputs(bench.spelled, bench.layers[node], slices):
                repair(bench.spelled, small, bench.layers[node], slices, inputs[node], bench.experts)

    # of 20 chunks 2, 6, 12 and 20 go; of 3 chunks 1, 2 and 3, as two levels are the same there
    stops = sorted({max(1, round(level * len(chunks))) for level in LEVELS})
    errors = [bench.error(kept_after(bench.structure.groups, chunks[:stop]), mend) for stop in stops]
    return _Curve(chunks, np.array([0, *stops]), np.array([0.0, *errors]))


def _remaining(
    bench: _Bench,
    curves: Sequence[_Curve],
    material: _Material,
    options: SensitivityOptions,
    progress: Progress,
) -> FloatArray:
    """[curves] what of a group's error remains, at the second level, where all layers behind it are refitted.

    Neighbours share one figure: the error of their going together, over the sum of theirs alone; 1 at most.
    """
    factors = np.ones(len(curves))
    stretch_count = min(options.stretches, len(curves))
    if not stretch_count:
        return factors
    # every rank has the first images: a stretch is one rank's
    first_images = _between(material.images, 0, options.repairing)
    targetless = [(inputs, None) for inputs in inputs_of(first_images)]

    def mend(small: fx.GraphModule, slices: Slices) -> None:
        compensate(bench.graph, small, slices, targetless, options=LIGHT, layouts=material.layouts)

    def remaining(places: IntArray) -> float:
        stretch = [curves[place] for place in places]
        separately = sum(float(curve.errors[curve.second]) for curve in stretch)
        if separately <= 0:
            return 1.0
        chunks = [chunk for curve in stretch for chunk in curve.chunks[: curve.stops[curve.second]]]
        together = bench.error(kept_after(bench.structure.groups, chunks), mend)
        progress(ALONE + (1 - ALONE) * (places[-1] + 1) / len(curves))
        return float(np.clip(together / separately, LEAST_LEFT, 1.0))

    stretches = np.array_split(np.arange(len(curves)), stretch_count)
    for places, factor in zip(stretches, each(stretches, remaining), strict=True):
        factors[places] = factor
    return factors


def _enter(curve: _Curve, factor: float, structure: Structure, scores: dict[str, FloatArray]) -> None:
    """Enters the slopes of one group's curve (and of those coupled with it) as its units' scores."""
    names = (curve.chunks[0].group, *(name for name, _ in curve.chunks[0].also))
    groups = {name: structure.groups[name] for name in names}
    channels = {name: channels_per_unit(group) for name, group in groups.items()}
    scores |= {name: np.full((1, group.size), np.inf) for name, group in groups.items()}  # [1, units]

    for chunk, slope in zip(curve.chunks, factor * slope_of_each(curve.stops, curve.errors), strict=True):
        members = ((chunk.group, chunk.units), *chunk.also)
        unit_count = sum(len(units) for _, units in members)
        for name, units in members:
            scores[name][0, units] = slope / unit_count / channels[name]

    for name in names:
        values = scores[name]
        values[np.isinf(values)] = values[np.isfinite(values)].max()  # units that always stay


def slope_of_each(stops: IntArray, errors: FloatArray) -> FloatArray:
    """[stops[-1]] what one more unit costs, rising from unit to unit, so that units keep their order.

    Errors at stops 0, 2, 6 give two slopes, at their middles 1 and 4; units 0 to 5 stand at 0.5 to 5.5.
    """
    turns = np.arange(stops[-1]) + 0.5
    middles = (stops[1:] + stops[:-1]) / 2
    slopes: FloatArray = np.interp(turns, middles, rising_slopes(stops, errors))
    least_rise = 1e-6 * max(float(slopes.max()), float(np.finfo(np.float32).tiny))
    slopes += least_rise * turns / stops[-1]
    return slopes


def rising_slopes(stops: IntArray, errors: FloatArray) -> FloatArray:
    """Slopes of a convex curve through the measured one, one for each interval; none is negative.

    Dents are bridged by the largest convex curve below, but not from where `LOST` is reached: a stream's first tenth
    may cost everything and the rest nothing more, and the average over all of it would be a promise that a budget
    which stops in between does not keep.
    """
    reached = np.maximum.accumulate(errors)
    blocks: list[tuple[float, float, int]] = []  # rise, width, intervals
    for rise, width, error in zip(np.diff(reached), np.diff(stops), reached[:-1], strict=True):
        blocks.append((float(rise), float(width), 1))
        # rises 2 over 1 unit, then 1 over 1: a dent, bridged by 3 over 2
        while error < LOST and len(blocks) > 1 and _falls(blocks[-2], blocks[-1]):
            last = blocks.pop()
            before = blocks.pop()
            blocks.append((before[0] + last[0], before[1] + last[1], before[2] + last[2]))
    slopes = np.concatenate([np.full(intervals, rise / width) for rise, width, intervals in blocks])
    rising: FloatArray = np.maximum.accumulate(slopes)
    return rising


def _falls(before: tuple[float, float, int], after: tuple[float, float, int]) -> bool:
    """Whether the slope of the second block is no larger than that of the first, without dividing by a width."""
    return before[0] * after[1] >= after[0] * before[1]


class _Bench:
    """The network with some units gone and the layers behind them repaired, against the whole one.

    `layers` are those of `spelled`, in which a convolution stands for each mixture of `experts`.
    """

    def __init__(
        self,
        graph: fx.GraphModule,
        structure: Structure,
        images: Sequence[NetworkInputs],
        task: Task | None,
    ) -> None:
        self.graph, self.structure = graph, structure
        self.spelled, self.experts = experts_convolved(graph)
        self.layers, _ = find_layers(self.spelled, set(self.spelled.graph.nodes))
        self.walk = _Walk(graph, images)
        whole = [self.walk.finish(graph, values) for values in self.walk.just_before(0)]
        self.likeness = Likeness.to(whole, output_names(graph), task)

    def error(self, kept: Mapping[str, IntArray], mend: Mend) -> float:
        """How far the outputs are off without the units that go, as `Likeness` counts it."""
        small, slices = prune(self.graph, self.structure, kept, share=True)
        mend(small, slices)
        changed = changed_nodes(self.graph, small)
        first = next((i for i, node in enumerate(self.walk.nodes) if node in changed), len(self.walk.nodes) - 1)
        return self.likeness.error(self.walk.finish(small, values) for values in self.walk.just_before(first))


class _Walk:
    """The whole network's live values before one of its nodes, so that what comes before a cut is computed once."""

    def __init__(self, graph: fx.GraphModule, images: Sequence[NetworkInputs]) -> None:
        self.graph, self.images = graph, images
        self.nodes = [node for node in graph.graph.nodes if not is_stored(node)]
        self.last_use = last_uses(self.nodes)
        self._at, self._values = 0, [self._start(part) for part in images]

    def _start(self, images: NetworkInputs) -> Values:
        return at_inputs(self.nodes, images, device_of(self.graph))

    def just_before(self, index: int) -> list[Values]:
        """For every batch; cheapest where the index only rises."""
        if index < self._at:
            self._at, self._values = 0, [self._start(part) for part in self.images]
        for values in self._values:
            self._run(self.graph, values, self._at, index)
        self._at = index
        return self._values

    def finish(self, graph: fx.GraphModule, values: Values) -> Any:
        """The outputs of a graph with the same nodes, from where the whole one's values stand."""
        return self._run(graph, dict(values), self._at, len(self.nodes))

    @torch.no_grad()
    def _run(self, graph: fx.GraphModule, values: Values, begin: int, end: int) -> Any:
        twins = [node for node in graph.graph.nodes if not is_stored(node)]
        for index in range(begin, end):
            node, twin = self.nodes[index], twins[index]
            if node.op == "output":
                return fx.map_arg(node.args[0], values.__getitem__)
            if node.op != "placeholder":
                inputs = {theirs: values[ours] for ours, theirs in _pairs(node, twin)}
                values[node] = run_node(graph, twin, inputs)
            drop_spent(values, (*node.all_input_nodes, node), self.last_use, index)
        return None


def _pairs(node: fx.Node, twin: fx.Node) -> Iterator[tuple[fx.Node, fx.Node]]:
    """Inputs of one name; a size that a cut reshape finds by itself is no input of the twin any more."""
    twins = {theirs.name: theirs for theirs in twin.all_input_nodes}
    return ((ours, twins[ours.name]) for ours in computed_operands(node) if ours.name in twins)


def loses_inputs(graph: fx.GraphModule, layer: Layer, slices: Slices) -> bool:
    """Whether not all of a layer's inputs stayed."""
    kept = slices.kept.get(layer.weight)
    return kept is not None and len(kept[1]) < fetch(graph, layer.weight).shape[1]


@torch.no_grad()
def repair(
    graph: fx.GraphModule,
    small: fx.GraphModule,
    layer: Layer,
    slices: Slices,
    inputs: Inputs,
    experts: Collection[str] = (),
) -> None:
    """Gives the inputs that stayed the part of the others' work that they can take over: of a layer that lost some.

    `experts` are the weights that stand side by side in `graph` and in `slices`, and not in `small`.
    """
    weight = fetch(graph, layer.weight).detach()  # [outputs, inputs, *kernel]
    kept_outputs, kept_inputs = map(torch.from_numpy, slices.kept[layer.weight][:2])
    rows = weight.double().flatten(1)  # [outputs, features], a feature for each input and place of the kernel
    outputs = kept_outputs.to(rows.device)
    is_kept = torch.zeros(weight.shape[1], weight[0, 0].numel(), dtype=torch.bool)
    is_kept[kept_inputs] = True
    is_kept = is_kept.flatten().to(rows.device)  # [features]
    stays, goes = is_kept.nonzero().flatten(), (~is_kept).nonzero().flatten()

    fitted = rows[:, stays] + taken_over(rows[:, goes], inputs, stays, goes)
    shift = rows @ inputs.mean - fitted @ inputs.mean[stays]  # [outputs]: with it the outputs' means stay
    old = fetch(small, layer.weight)
    stored = fitted[outputs]
    if layer.weight in experts:
        stored = as_stored(stored, old.shape)
    store_under(small, [use.weight for use in layer.uses], stored.reshape(old.shape).to(old))
    if layer.bias:
        bias = fetch(small, layer.bias)
        store_under(small, [use.bias for use in layer.uses], bias + shift[outputs].to(bias))
    elif layer.norm is not None:
        names = means_of(layer)
        mean = fetch(small, names[0])
        store_under(small, names, mean - shift[outputs].to(mean))


def taken_over(weights: Tensor, inputs: Inputs, stays: Tensor, goes: Tensor) -> Tensor:
    """[outputs, stays] what least squares adds to the features that stay, for `weights` [outputs, goes] of the others.

    The best guess of x_g from x_s is `C_gs C_ss^-1 x_s`, which with P = C^-1 is `-P_gg^-1 P_gs x_s`: whichever of
    the two blocks is smaller is solved.
    """
    if len(goes) <= len(stays):
        across = inputs.inverse[goes]
        factor = stable_factor(across[:, goes])
        return -torch.cholesky_solve(weights.mT, factor).mT @ across[:, stays].double()
    factor = stable_factor(inputs.covariance[stays][:, stays])
    return torch.cholesky_solve(inputs.covariance[stays][:, goes] @ weights.mT, factor).mT
