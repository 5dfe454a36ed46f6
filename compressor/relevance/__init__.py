"""Who matters: a traced graph, its groups and labelled images in, `Scores` out, by any criterion.

Those that are learned lie in `steering/`; `compressor/criteria.py` is the table of all.
Streams over batches in bounded memory, sums in float64 and over ranks. Knows no budget and no plan.
"""

from __future__ import annotations

import zlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, fx

from ..criteria import AtNodes, AtRandom, OnWeights, Place, Sign
from ..distributed import sum_count, sum_over_ranks
from ..errors import DataError, ModelError
from ..graph.samples import sample_layouts
from ..placement import device_of, inputs_to, reusing_freed_memory, within_memory
from ..records import FloatArray, Group, Groups, Scores
from ..tasks import Targets, Task
from ..tensors import Inputs, count
from . import weights
from .criteria import FindFeeds, FindUncovered, Prepare, criterion_named, function_named
from .feeding import Feed
from .options import ScoreOptions
from .starts import objective_of, targets_of
from .units import Reading, place_of, read_units, readings

__all__ = ["ScoreOptions", "score"]

Batches = Iterable[tuple[Inputs, Targets]]


@reusing_freed_memory()
def score(
    graph: fx.GraphModule,
    groups: Groups,
    batches: Batches,
    *,
    criterion: str = "lrp",
    options: ScoreOptions | None = None,
    task: Task | None = None,
    progress: Callable[[int], None] = lambda images: None,
) -> Scores:
    """Relevance of every unit at every site, `values[group]` [sites, units] in float64; higher is kept longer.

    Batches are (inputs [N, ...], targets): class labels [N], -1 unknown, or what `task` takes, whose start relevance
    has; without a task the network is a classifier. A site the criterion cannot read (no weights
    of its own) repeats the mean of the group's others; a group with no readable site is in `unscored`.
    Every rank of a distributed run passes its own share of the images and gets the same scores. Batches go to
    where the graph lies; `progress` gets how many images are done. Raises RecipeError for an unknown criterion,
    DataError where there are no images, ModelError where a score is no finite number.
    """
    row = criterion_named(criterion)
    batches = _Counted(batches, progress)
    options = replace(options or ScoreOptions(), objective=objective_of(graph, task))
    if isinstance(row, AtRandom):
        return Scores(criterion, {group.name: _draw(group, options.seed) for group in groups.groups}, 0)
    uncovered: tuple[str, ...] = ()
    if isinstance(row, AtNodes):
        site_scores, samples = _at_nodes(graph, groups, batches, row, options)
        uncovered = _uncovered(graph, row, options)
    else:
        site_scores, samples = _on_weights(graph, groups, batches, row, options)

    values: dict[str, FloatArray] = {}
    unscored: list[str] = []
    for group in groups.groups:
        by_site = site_scores[group.name]
        if by_site:
            values[group.name] = _at_every_site(group, by_site)
        else:
            unscored.append(group.name)
    _require_finite(values, criterion)
    return Scores(criterion, values, samples, tuple(unscored), uncovered)


def _uncovered(graph: fx.GraphModule, row: AtNodes, options: ScoreOptions) -> tuple[str, ...]:
    """The operations that the criterion has no rule for."""
    if not row.uncovered:
        return ()
    find_uncovered: FindUncovered = function_named(row.uncovered)
    return find_uncovered(graph, options)


def _require_finite(values: Mapping[str, FloatArray], criterion: str) -> None:
    for name, scores in values.items():
        finite = np.isfinite(scores)
        if not finite.all():
            raise ModelError(
                f"criterion {criterion!r} gives {np.count_nonzero(~finite)} non-finite scores in group "
                f"{name!r}; look for infinities in the model's weights and images, or choose another criterion"
            )


class _Counted:
    """The same batches, as often as they are iterated; says how many images were done once one asks for more."""

    def __init__(self, batches: Batches, progress: Callable[[int], None]) -> None:
        self.batches, self.progress = batches, progress

    def __iter__(self) -> Iterator[tuple[Inputs, Targets]]:
        done = 0
        for images, labels in self.batches:
            yield images, labels
            done += count(images)
            self.progress(done)


# by group and the site's place in it, the scores of the group's units
SiteScores = Mapping[str, Mapping[int, FloatArray]]
_SIGNED: Mapping[Sign, Callable[[FloatArray], FloatArray]] = {
    "absolute": np.abs,
    "squared": np.square,
    "signed": np.array,
}


def _at_every_site(group: Group, by_site: Mapping[int, FloatArray]) -> FloatArray:
    """[sites, units]; a site that could not be read repeats the mean of those that could."""
    mean = np.mean(list(by_site.values()), axis=0)  # [readable sites, units] -> [units]
    return np.stack([by_site.get(i, mean) for i in range(len(group.sites))])


def _draw(group: Group, seed: int) -> FloatArray:
    """[sites, units], the same at every site; does not depend on which other groups there are."""
    # crc32, for Python's own hash of a text is another in every process
    draw = np.random.default_rng([seed, zlib.crc32(group.name.encode())]).random(group.size)
    return np.tile(draw, (len(group.sites), 1))


def _at_nodes(
    graph: fx.GraphModule, groups: Groups, batches: Batches, row: AtNodes, options: ScoreOptions
) -> tuple[SiteScores, int]:
    options = replace(options, start=options.start or row.start)
    sign = options.sign or row.sign
    per = options.per or row.per
    readings_at, site_of = _plan_readings(graph, groups, batches, options.place or row.place)
    prepare: Prepare = function_named(row.prepare)
    measure = prepare(graph, sorted(readings_at), options)

    sums: dict[str, Tensor] = {}
    samples = 0
    for images, targets in _with_targets(graph, batches, options):

        def take(node: str, tensor: Tensor, n: int = count(images)) -> None:
            for key, reading in readings_at[node]:
                units = read_units(tensor, reading, n, sign=sign, per=per)  # [N, units]
                weights.add_into(sums, key, units.sum(0))

        measure(images, targets, take)
        samples += count(images)

    total, samples = _over_ranks(sums, samples)
    if per == "all":  # the sign is taken once the last rank's last image is in the sum
        total = {key: _SIGNED[sign](unsigned) for key, unsigned in total.items()}
    return _by_group(groups, total, site_of, _divisor(options, samples)), samples


def _plan_readings(
    graph: fx.GraphModule, groups: Groups, batches: Batches, place: Place
) -> tuple[dict[str, list[tuple[str, Reading]]], dict[str, tuple[str, int]]]:
    """By node what is read there, as (key of its sum, reading); and by key the group and the site's place in it."""
    nodes: set[str] = set()
    for group in groups.groups:
        nodes.update(place_of(graph, site, place).name for site in group.sites)
    layouts = sample_layouts(graph, nodes, inputs_to(_first_images(batches), device_of(graph)))
    readings_at: defaultdict[str, list[tuple[str, Reading]]] = defaultdict(list)
    site_of: dict[str, tuple[str, int]] = {}
    for group in groups.groups:
        for i, reading in readings(graph, group, place, layouts).items():
            key = f"{group.name}\n{i}"  # one string, as sums over ranks are named by strings
            readings_at[reading.node].append((key, reading))
            site_of[key] = (group.name, i)
    return readings_at, site_of


def _on_weights(
    graph: fx.GraphModule, groups: Groups, batches: Batches, row: OnWeights, options: ScoreOptions
) -> tuple[SiteScores, int]:
    weigh: weights.Weigh = function_named(row.weigh)
    find_feeds: FindFeeds = function_named(row.feeds)
    feeds_of = {group.name: find_feeds(graph, group, options) for group in groups.groups}
    names = _weight_names(feeds_of)
    tensors = weights.evaluated(graph, names)
    collected, samples = _collect(graph, batches, row, names, options)

    scores: dict[str, dict[int, FloatArray]] = {}
    for group in groups.groups:
        scores[group.name] = {}
        for i, site_feeds in feeds_of[group.name].items():
            rows = weights.unit_rows(tensors, site_feeds, group.size)
            collected_rows = weights.unit_rows(collected, site_feeds, group.size) if collected else []
            scores[group.name][i] = weigh(rows, collected_rows).cpu().numpy()
    return scores, samples


def _weight_names(feeds_of: Mapping[str, Mapping[int, tuple[Feed, ...]]]) -> list[str]:
    """The weights that any feed reads, each once, sorted so that every rank collects in one order."""
    names: set[str] = set()
    for by_site in feeds_of.values():
        for site_feeds in by_site.values():
            names.update(feed.weight for feed in site_feeds)
    return sorted(names)


def _collect(
    graph: fx.GraphModule, batches: Batches, row: OnWeights, names: Sequence[str], options: ScoreOptions
) -> tuple[dict[str, Tensor], int]:
    """What the criterion collects, by name of the weight, and over how many images; nothing where it needs none."""
    if not row.collect:
        return {}, 0
    collect: weights.Collect = function_named(row.collect)
    collected: dict[str, Tensor] = {}
    samples = 0
    for images, targets in _with_targets(graph, batches, options):
        for name, of_batch in collect(graph, images, targets, names, options.objective).items():
            weights.add_into(collected, name, of_batch)
        samples += count(images)
    sums, samples = _over_ranks(collected, samples)
    divisor = _divisor(options, samples)
    return {name: torch.from_numpy(total / divisor) for name, total in sums.items()}, samples


def _with_targets(graph: fx.GraphModule, batches: Batches, options: ScoreOptions) -> Iterator[tuple[Inputs, Targets]]:
    """The images where the graph lies, as many at a time as memory takes, with the targets relevance starts from."""
    predicted = options.target == "predicted"
    for images, labels in within_memory(batches, graph):
        yield images, targets_of(graph, images, labels, predicted=predicted, objective=options.objective)


def _divisor(options: ScoreOptions, samples: int) -> int:
    """What a sum over samples is divided by."""
    return samples if options.over == "mean" else 1


def _first_images(batches: Batches) -> Inputs:
    for images, _ in batches:
        return images
    raise DataError("there are no calibration images, this criterion needs at least one; give some or choose 'l1'")


def _over_ranks(sums: Mapping[str, Tensor], samples: int) -> tuple[dict[str, FloatArray], int]:
    arrays = {key: tensor.cpu().numpy().astype(np.float64) for key, tensor in sums.items()}
    return sum_over_ranks(arrays), sum_count(samples)


def _by_group(
    groups: Groups, sums: Mapping[str, FloatArray], site_of: Mapping[str, tuple[str, int]], divisor: int
) -> SiteScores:
    scores: dict[str, dict[int, FloatArray]] = {group.name: {} for group in groups.groups}
    for key, total in sums.items():
        name, i = site_of[key]
        scores[name][i] = total / divisor
    return scores
