"""Who matters: a traced graph, its groups and labelled images in, `Scores` out, by any criterion of the table.

Streams over batches in bounded memory, sums in float64 and over ranks. Knows no budget and no plan.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, fx

from ..distributed import sum_count, sum_over_ranks
from ..errors import DataError, ModelError
from ..placement import device_of, to_device, within_memory
from ..records import FloatArray, Group, Groups, Scores
from ..samples import sample_layouts
from . import weights
from .criteria import CRITERIA, AtNodes, AtRandom, OnWeights, criterion_named
from .options import ScoreOptions, Sign
from .tape import targets_of
from .units import Reading, place_of, read_units, readings

__all__ = ["CRITERIA", "ScoreOptions", "score"]

Batches = Iterable[tuple[Tensor, Tensor]]


def score(
    graph: fx.GraphModule,
    groups: Groups,
    batches: Batches,
    *,
    criterion: str = "lrp",
    options: ScoreOptions | None = None,
    progress: Callable[[int], None] = lambda images: None,
) -> Scores:
    """Relevance of every unit at every site; higher is kept longer.

    Batches are (images [N, C, H, W], labels [N], -1 unknown). A site the criterion cannot read (no weights
    of its own) repeats the mean of the group's others; a group with no readable site is in `unscored`.
    Every rank of a distributed run passes its own share of the images and gets the same scores. Batches go to
    where the graph lies; `progress` gets how many images are done.
    """
    row = criterion_named(criterion)
    batches = _counted(batches, progress)
    options = options or ScoreOptions()
    if isinstance(row, AtRandom):
        return Scores(criterion, {g.name: _draw(g, options.seed) for g in groups.groups}, 0)
    if isinstance(row, AtNodes):
        found, samples = _at_nodes(graph, groups, batches, row, options)
    else:
        found, samples = _on_weights(graph, groups, batches, row, options)
    values = {g.name: _whole(g, found[g.name]) for g in groups.groups if found[g.name]}
    for name, scores in values.items():
        if not np.isfinite(scores).all():
            raise ModelError(
                f"criterion {criterion!r} gives {np.count_nonzero(~np.isfinite(scores))} non-finite scores in group "
                f"{name!r}; look for infinities in the model's weights and images, or choose another criterion"
            )
    unscored = tuple(g.name for g in groups.groups if g.name not in values)
    uncovered = row.uncovered(graph, options) if isinstance(row, AtNodes) and row.uncovered else ()
    return Scores(criterion, values, samples, unscored, uncovered)


class _counted:
    """The same batches, as often as they are iterated; says how many images were done once one asks for more."""

    def __init__(self, batches: Batches, progress: Callable[[int], None]) -> None:
        self.batches, self.progress = batches, progress

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        done = 0
        for images, labels in self.batches:
            yield images, labels
            done += len(images)
            self.progress(done)


Found = Mapping[str, Mapping[int, FloatArray]]
_SIGNED: Mapping[Sign, Callable[[FloatArray], FloatArray]] = {
    "absolute": np.abs,
    "squared": np.square,
    "signed": np.array,
}


def _whole(group: Group, found: Mapping[int, FloatArray]) -> FloatArray:
    mean = np.mean(list(found.values()), axis=0)
    return np.stack([found.get(i, mean) for i in range(len(group.sites))])


def _draw(group: Group, seed: int) -> FloatArray:
    """Does not depend on which other groups there are."""
    draw = np.random.default_rng([seed, zlib.crc32(group.name.encode())]).random(group.size)
    return np.tile(draw, (len(group.sites), 1))


def _at_nodes(
    graph: fx.GraphModule, groups: Groups, batches: Batches, row: AtNodes, options: ScoreOptions
) -> tuple[Found, int]:
    options = replace(options, start=options.start or row.start)
    sign, per, place = options.sign or row.sign, options.per or row.per, options.place or row.place
    wanted = {place_of(graph, site, place).name for group in groups.groups for site in group.sites}
    layouts = sample_layouts(graph, wanted, to_device(_first_images(batches), device_of(graph)))
    plan: dict[str, list[tuple[str, Reading]]] = {}
    for group in groups.groups:
        for i, reading in readings(graph, group, place, layouts).items():
            plan.setdefault(reading.node, []).append((f"{group.name}\n{i}", reading))
    measure = row.prepare(graph, sorted(plan), options)
    sums: dict[str, Tensor] = {}
    samples = 0
    for images, labels in within_memory(batches, graph):

        def take(node: str, tensor: Tensor, n: int = len(images)) -> None:
            for key, reading in plan[node]:
                part = read_units(tensor, reading, n, sign=sign, per=per).sum(0)
                sums[key] = sums[key] + part if key in sums else part

        measure(images, targets_of(graph, images, labels, predicted=options.target == "predicted"), take)
        samples += len(images)
    total, samples = _over_ranks(sums, samples)
    if per == "all":
        total = {key: _SIGNED[sign](value) for key, value in total.items()}
    return _by_group(groups, total, 1 if options.over == "sum" else samples), samples


def _on_weights(
    graph: fx.GraphModule, groups: Groups, batches: Batches, row: OnWeights, options: ScoreOptions
) -> tuple[Found, int]:
    fed = {group.name: row.feeds(graph, group, options) for group in groups.groups}
    names = sorted({feed.weight for sites in fed.values() for some in sites.values() for feed in some})
    tensors = weights.evaluated(graph, names)
    collected: dict[str, Tensor] = {}
    samples = 0
    for images, labels in within_memory(batches if row.collect else (), graph):
        assert row.collect is not None
        targets = targets_of(graph, images, labels, predicted=options.target == "predicted")
        for name, part in row.collect(graph, images, targets, names).items():
            collected[name] = collected[name].add_(part) if name in collected else part
        samples += len(images)
    if row.collect:
        sums, samples = _over_ranks(collected, samples)
        scale = 1 if options.over == "sum" else samples
        collected = {name: torch.from_numpy(value / scale) for name, value in sums.items()}
    found: dict[str, dict[int, FloatArray]] = {}
    for group in groups.groups:
        found[group.name] = {}
        for i, some in fed[group.name].items():
            rows = weights.unit_rows(tensors, some, group.size)
            extra = weights.unit_rows(collected, some, group.size) if collected else []
            found[group.name][i] = row.weigh(rows, extra).cpu().numpy()
    return found, samples


def _first_images(batches: Batches) -> Tensor:
    for images, _ in batches:
        return images
    raise DataError("there are no calibration images, this criterion needs at least one; give some or choose 'l1'")


def _over_ranks(sums: Mapping[str, Tensor], samples: int) -> tuple[dict[str, FloatArray], int]:
    return sum_over_ranks({k: v.cpu().numpy().astype(np.float64) for k, v in sums.items()}), sum_count(samples)


def _by_group(groups: Groups, sums: Mapping[str, FloatArray], scale: int) -> Found:
    found: dict[str, dict[int, FloatArray]] = {group.name: {} for group in groups.groups}
    for key, value in sums.items():
        name, _, site = key.rpartition("\n")
        found[name][int(site)] = value / scale
    return found
