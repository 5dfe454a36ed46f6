"""How near a network is to the dense one on held-out images, again and again, in one pass and without labels."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, fx

from ..accuracy import evaluating
from ..distributed import alone, rank, shares_out, sum_over_ranks, world
from ..errors import DataError
from ..graph.interface import answers, output_names
from ..inputs.images import Batches
from ..placement import device_of, inputs_to
from ..tasks import Leaves, Task, class_leaf, fidelity, reference_of, task_named
from ..tensors import Inputs

FARTHEST = 1e9  # no distance is more: one that is not finite, as JSON can hold it
MOST_BYTES = 1 << 28  # of the dense network's answers that are kept between judgements
AGREEMENT, FIDELITY = "agreement", "fidelity"


@dataclass(frozen=True, slots=True)
class Judgement:
    """`distance` is the task's mean over images, `fidelity` of all leaves.

    `quality` is the share of images on which a classifier decides as the dense one does, of others the fidelity.
    """

    distance: float
    fidelity: float
    quality: float


@dataclass
class _Tally:
    """Sums over a pass; `dense` are the dense network's answers to the batch that is looked at."""

    distance: float = 0.0
    alike: int = 0
    batch: int = 0
    dense: Leaves | None = None


class Judge:
    """Held-out batches and the dense network. Without a `task` the network is a classifier.

    The dense network's answers are kept where they are small. Raises DataError without any image.
    """

    def __init__(self, dense: fx.GraphModule, held_out: Batches, task: Task | None) -> None:
        if not len(held_out.images):
            raise DataError("there are no held-out images to tell when a recovery is to end; give more images")
        self.dense, self.images = dense, len(held_out.images)
        self.is_shared = shares_out(len(held_out))  # else every rank looks at all of them
        self.held_out = held_out.share(rank(), world()) if self.is_shared else held_out
        self.classifies = task is None or task.classifies
        self.metric = AGREEMENT if self.classifies else FIDELITY
        self._kept: dict[int, Leaves] = {}
        self._kept_bytes = 0
        if task is None:
            with self._together():
                task = task_named("classification", reference=reference_of(self._answered_by_dense, self.held_out))
        self.task = task

    def _together(self) -> AbstractContextManager[None]:
        """Sums go over all ranks inside, where each has a share of the images."""
        return nullcontext() if self.is_shared else alone()

    def _answered_by_dense(self, inputs: Inputs) -> Leaves:
        return _answers(self.dense, inputs)

    def judge(self, network: fx.GraphModule) -> Judgement:
        """The network in evaluation mode; what is not finite is as far off as can be."""
        tally = _Tally()

        def predict(inputs: Inputs) -> Leaves:
            leaves, tally.dense = _answers(network, inputs), self._dense_of(tally.batch, inputs)
            tally.batch += 1
            tally.distance += float(self.task.distance(leaves, tally.dense).double().sum())
            if self.classifies:
                tally.alike += int((_decided(leaves) == _decided(tally.dense)).sum())
            return leaves

        def dense_predict(inputs: Inputs) -> Leaves:
            assert tally.dense is not None  # `fidelity` asks the network first
            return tally.dense

        with evaluating(network), torch.no_grad(), self._together():
            near = fidelity(predict, dense_predict, self.held_out).value
            sums = sum_over_ranks({"distance": np.array(tally.distance), "alike": np.array(float(tally.alike))})
        distance = float(np.nan_to_num(float(sums["distance"]) / self.images, nan=FARTHEST))
        quality = float(sums["alike"]) / self.images if self.classifies else near
        return Judgement(min(distance, FARTHEST), near, quality)

    def _dense_of(self, batch: int, inputs: Inputs) -> Leaves:
        """The batches come in the same order in every pass."""
        if batch in self._kept:
            return self._kept[batch]
        leaves = self._answered_by_dense(inputs)
        size = sum(leaf.numel() * leaf.element_size() for leaf in leaves.values())
        if self._kept_bytes + size <= MOST_BYTES:
            self._kept[batch] = leaves
            self._kept_bytes += size
        return leaves


@torch.no_grad()
def _answers(network: fx.GraphModule, inputs: Inputs) -> Leaves:
    """By name, on the CPU."""
    leaves = answers(network, inputs_to(inputs, device_of(network)))
    return {name: leaf.cpu() for name, leaf in zip(output_names(network), leaves, strict=True)}


def _decided(leaves: Leaves) -> Tensor:
    """[N] the class."""
    return class_leaf(leaves)[1].argmax(1)
