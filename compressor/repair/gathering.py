"""What the solver sees of a layer: rows of its inputs and what its outputs ought to be, taken in batch by batch.

In: a layer, and the values of dense and pruned graph while both pass it (`lockstep`). Out: second moments of rows
and targets in two folds of images, the rows themselves where a clamp follows, or nothing but rows where there are
fewer of them than features. Knows neither the repair's options nor its solvers.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, fx

from ..distributed import from_first, in_turns, sum_over_ranks
from ..graph.lockstep import Lockstep, Values, run_node
from ..graph.operators import arguments
from ..graph.samples import Samples
from ..graph.windows import Window, position_count, rows_of, targets_of
from ..placement import CPU
from . import clamped, dual, least_squares
from .consumers import Layer

ROW_ENTRIES = 1 << 23  # rows are unfolded so many numbers at a time: 64 MB in float64


@dataclass(frozen=True, slots=True)
class Use:
    """One node of a layer: how it reads its input, and where its input and its output keep the images."""

    layer: Layer
    window: Window
    input_layout: Samples
    output_layout: Samples

    def inputs_by_image(self, inputs: Tensor, n: int) -> Tensor:
        """The node's input for `n` images as [N * entries, ...], or [N, tokens, width] of a linear layer."""
        return self._by_image(inputs, self.input_layout, n)

    def outputs_by_image(self, outputs: Tensor, n: int) -> Tensor:
        """The same of a value that lies as the node's outputs do."""
        return self._by_image(outputs, self.output_layout, n)

    def _by_image(self, value: Tensor, layout: Samples, n: int) -> Tensor:
        value = layout.images_first(value, n)
        if self.window.linear:  # windows and the like are positions among others
            value = value.reshape(n, -1, value.shape[-1])
        return value


@dataclass(frozen=True, slots=True)
class Fit:
    """A layer as the solver sees it: outputs times `scale` [groups, outputs] are what reaches the stream.

    `kept` are the dense layer's outputs that stayed, in the order of the pruned one's; `start`
    [groups, outputs, features] and `offset` [groups, outputs] its own weights and bias, times the scale, in float64.
    """

    layer: Layer
    kept: Tensor
    scale: Tensor
    start: Tensor
    offset: Tensor

    @property
    def has_intercept(self) -> bool:
        """Whether a constant can be added to the outputs: by a bias, or by the normalisation behind them."""
        return bool(self.layer.bias) or self.layer.norm is not None


@dataclass(frozen=True, slots=True)
class Clamp:
    """Where what follows a layer is flat, and rows in front of it, of which the first ones are the first fold's."""

    bounds: clamped.Bounds
    rows: clamped.Rows
    rows_of_first: int


@dataclass
class Statistics:
    """What a layer's rows and targets add up to, in two folds of images; the rows too where a clamp follows."""

    folds: tuple[least_squares.Moments, least_squares.Moments]
    clamp: Clamp | None = None

    @functools.cached_property
    def total(self) -> least_squares.Moments:
        """Both folds together."""
        return self.folds[0] + self.folds[1]

    def error(self, weights: Tensor, offset: Tensor) -> float:
        """Mean squared error per row, summed over all outputs; without what a clamp cuts off again."""
        if self.clamp is None:
            return least_squares.squared_error(self.total, weights, offset)
        return clamped.squared_error(self.clamp.rows, self.clamp.bounds, weights, offset)


@dataclass
class Gathering:
    """Sums or keeps a layer's rows and targets while both graphs pass it, in two folds of images.

    Those of all its `uses` are rows of one problem, for they have one weight. `folds` [N] has each batch's.
    `image_count` images are seen by all ranks, of which each use looks at `wanted_rows` and keeps `held_rows` of them
    in front of a clamp. `by_rows`: the rows themselves are kept instead of sums, where they are fewer than features.
    After `visit`, an `obstacle` that is not empty says why the layer can't be refitted.
    """

    walk: Lockstep
    fit: Fit
    folds: Sequence[Tensor]
    uses: Sequence[Use]
    seed: int
    image_count: int
    wanted_rows: int
    held_rows: int
    bounds: clamped.Bounds | None
    by_rows: bool
    obstacle: str = ""
    samples: list[list[dual.Sample]] = field(default_factory=list)  # of each batch
    sums: list[least_squares.MomentSums] = field(default_factory=list)
    clamped_rows: tuple[list[clamped.Rows], list[clamped.Rows]] = field(default_factory=lambda: ([], []))

    def visit(self, batch: int, dense: Values, pruned: Values) -> None:
        """Takes in one batch."""
        self.samples.append([])
        for use in self.uses:
            if not self.obstacle:
                self._take_in(use, batch, dense, pruned)

    def _take_in(self, use: Use, batch: int, dense: Values, pruned: Values) -> None:
        node, axis = use.layer.node, use.layer.channel_axis
        outputs = dense[node] = run_node(self.walk.dense, node, dense)
        source = arguments(node)["input"]
        if _without_channels(pruned[source], axis) != _without_channels(dense[source], axis):
            self.obstacle = "its positions change with what was removed"
            return

        n = len(self.folds[batch])
        target = use.outputs_by_image(outputs.index_select(axis, self.fit.kept), n)
        lack = self._lack_of_the_stream(use, dense, pruned, n)
        clamp_input = self._clamp_input(use, dense, n)
        x = use.inputs_by_image(pruned[source], n)
        self._take_chunks(use.window, x, target, lack, clamp_input, self.folds[batch])

    def _lack_of_the_stream(self, use: Use, dense: Values, pruned: Values, n: int) -> Tensor | None:
        """What the pruned stream, which the outputs are added to, lacks; None where there is none to make up for."""
        partner = use.layer.partner
        if partner in dense and partner in pruned:
            lack = _difference(dense[partner], pruned[partner], self.fit.kept, use.layer.channel_axis)
            return use.outputs_by_image(lack, n)
        return None

    def _clamp_input(self, use: Use, dense: Values, n: int) -> Tensor | None:
        """What the dense network's clamp behind the layer takes; None where no clamp is looked at."""
        if self.bounds is None:
            return None
        clamp_input = _input_of_the_clamp(self.walk, use.layer, dense)
        return use.outputs_by_image(clamp_input.index_select(use.layer.channel_axis, self.fit.kept), n)

    def _take_chunks(
        self,
        window: Window,
        x: Tensor,
        target: Tensor,
        lack: Tensor | None,
        clamp_input: Tensor | None,
        folds: Tensor,
    ) -> None:
        """Unfolds a batch's inputs [N * entries, ...] into rows, so many at a time that they stay small."""
        groups, _, features = self.fit.start.shape
        entries = len(x) // len(folds)  # windows or frames of one image that lie on the first axis
        fold = folds.to(x.device).repeat_interleave(entries)  # [N * entries]

        available, images = position_count(x, window), self.image_count * entries
        positions = sampled_positions(available, self.wanted_rows, images, self.seed).to(x.device)
        # of the same permutation, so that rows in front of a clamp are some of the rows that are summed
        held_positions = sampled_positions(available, self.held_rows, images, self.seed).to(x.device)
        is_held = torch.isin(positions, held_positions)

        step = max(1, ROW_ENTRIES // (len(positions) * groups * features))
        for begin in range(0, len(x), step):
            chunk = slice(begin, begin + step)
            rows = rows_of(x[chunk], window, positions)  # [groups, entries, positions, features]
            targets = targets_of(target[chunk], window, positions) * self.fit.scale[:, None, None].to(target)
            if lack is not None:
                targets = targets + targets_of(lack[chunk], window, positions)  # it is the stream's, behind the scale
            clamp_inputs = None
            if clamp_input is not None:
                clamp_inputs = targets_of(clamp_input[chunk], window, positions)
            self._take(rows, targets, clamp_inputs, fold[chunk], is_held)

    def _take(self, rows: Tensor, targets: Tensor, clamp_inputs: Tensor | None, fold: Tensor, is_held: Tensor) -> None:
        """Rows and targets [groups, entries, positions, features or outputs]; the fold of each entry.

        `is_held` [positions] says which are kept in front of a clamp.
        """
        if self.by_rows:  # one group only
            fold_of_row = fold.repeat_interleave(rows.shape[2])
            self.samples[-1].append(dual.Sample(rows[0].flatten(0, 1), targets[0].flatten(0, 1), fold_of_row))
            return

        if not self.sums:
            self.sums = _empty_sums(rows.flatten(1, 2), targets.flatten(1, 2))
        for number, sums in enumerate(self.sums):
            chosen = fold == number
            if bool(chosen.any()):
                sums.add(rows[:, chosen].flatten(1, 2), targets[:, chosen].flatten(1, 2))
            if clamp_inputs is not None:
                x, y, inputs = (_chosen(tensor, chosen, is_held) for tensor in (rows, targets, clamp_inputs))
                self.clamped_rows[number].append(clamped.Rows(x, y, inputs))

    def whole_sample(self) -> dual.Sample:
        """The rows of all ranks, in the order of the batches."""
        device = self.fit.start.device
        on_cpu = [[chunk.to(CPU) for chunk in chunks] for chunks in self.samples]
        every_chunk = itertools.chain.from_iterable(in_turns(on_cpu))
        return dual.Sample.joined(list(every_chunk)).to(device)

    def statistics(self) -> Statistics:
        """What was taken in by all ranks; of the rows in front of a clamp each rank keeps its own."""
        groups, outputs, features = self.fit.start.shape
        device = self.fit.start.device
        sums = self.sums
        if not sums:  # a rank may have no image
            zero_row, zero_target = (torch.zeros(groups, 1, width, device=device) for width in (features, outputs))
            sums = _empty_sums(zero_row, zero_target)
        for fold in sums:
            _sum_up(fold)
        totals = sums[0].moments(), sums[1].moments()
        if self.bounds is None:
            return Statistics(totals)

        first, second = self.clamped_rows
        empty = clamped.Rows.empty(groups, features, outputs, device)
        rows = clamped.Rows.joined([empty, *first, *second])
        return Statistics(totals, Clamp(self.bounds, rows, sum(chunk.x.shape[1] for chunk in first)))


def _chosen(tensor: Tensor, entries: Tensor, positions: Tensor) -> Tensor:
    """[groups, entries, positions, ...] at those of them that are true, as rows [groups, n, ...] in float32."""
    return tensor[:, entries][:, :, positions].flatten(1, 2).float()


def _empty_sums(rows: Tensor, targets: Tensor) -> list[least_squares.MomentSums]:
    """For two folds, counted from the mean of these rows and targets [groups, n, ...], on every rank the first one's.

    So a batch's products are the same on whichever rank it lies.
    """
    groups, _, features = rows.shape
    firsts = from_first((rows.mean(1).cpu(), targets.mean(1).cpu()))
    origin = firsts[0].to(rows.device), firsts[1].to(rows.device)
    return [least_squares.MomentSums(groups, features, targets.shape[-1], rows.device, origin) for _ in range(2)]


def _without_channels(value: Tensor, channel_axis: int) -> list[int]:
    """The value's shape without its channels."""
    sizes = list(value.shape)
    del sizes[channel_axis]
    return sizes


def _input_of_the_clamp(walk: Lockstep, layer: Layer, dense: Values) -> Tensor:
    """What the dense network's clamp behind the layer takes: the end of the layer's chain, or its sum with the partner.

    The chain is run here, as the walk stands at the layer itself.
    """
    values = dict(dense)
    end: fx.Node = layer.node
    for node in layer.chain:
        values[node] = run_node(walk.dense, node, values)
        end = node
    outputs: Tensor = values[end]
    if layer.partner is not None:
        outputs = outputs + dense[layer.partner]
    return outputs


def _difference(dense: Tensor, pruned: Tensor, kept: Tensor, axis: int) -> Tensor:
    """What the pruned stream lacks."""
    if dense.shape != pruned.shape:  # the stream lost the same channels as the layer's outputs
        dense = dense.index_select(axis, kept)
    return dense - pruned


def sampled_positions(available: int, rows: int, images: int, seed: int) -> Tensor:
    """The flat output positions looked at, ascending: enough of `available` for `rows` rows of all `images`.

    The same in every image, so that no rank needs to know another's.
    """
    count = min(available, math.ceil(rows / images))
    generator = torch.Generator().manual_seed(seed)
    return torch.randperm(available, generator=generator)[:count].sort().values


def _sum_up(sums: least_squares.MomentSums) -> None:
    """Takes in what the other ranks saw, all of which count from the same point.

    Entries are sums of products in float32, which float64 adds without rounding: the order makes no difference yet.
    """
    names = ("x", "y", "yy", "xx", "xy")
    of_this_rank = {name: getattr(sums, name).cpu().numpy() for name in names}
    totals = sum_over_ranks({**of_this_rank, "count": np.array(float(sums.count))})
    sums.count = int(totals["count"])
    for name in names:
        setattr(sums, name, torch.from_numpy(np.asarray(totals[name])).to(sums.x.device))
