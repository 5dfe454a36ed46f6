"""How near a network is to the dense one on held-out images, again and again: the dense answers are taken once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import fx

from ..accuracy import evaluating
from ..errors import DataError
from ..graph.interface import answers, output_names
from ..inputs.images import Batches
from ..placement import device_of, inputs_to
from ..tasks import Leaves, Task, fidelity, reference_of, relative_error, task_named
from ..tensors import Inputs, count

FARTHEST = 1e9  # a distance that is not finite, as JSON can hold it


@dataclass(frozen=True, slots=True)
class Judgement:
    """`distance` is the task's mean over images, `fidelity` of all leaves, `quality` the task's own measure."""

    distance: float
    fidelity: float
    quality: float


class Judge:
    """Held-out batches and the dense network's answers to them. Without a `task` the network is a classifier.

    Raises DataError without any image.
    """

    def __init__(self, dense: fx.GraphModule, held: Batches, task: Task | None) -> None:
        self.data: Sequence[tuple[Inputs, Any]] = list(held)
        if not self.data:
            raise DataError("there are no held-out images to tell when a recovery is to end; give more images")
        self.images = sum(count(inputs) for inputs, _ in self.data)
        self.dense = _answers(dense, self.data)
        self.task = task or task_named(
            "classification", reference=reference_of(self.dense_answers, self.data), dense=self.dense_answers
        )
        self.metric = self.task.quality(self.dense_answers, self.data).metric

    def dense_answers(self, inputs: Inputs) -> Leaves:
        """Of one of the held-out batches, told by being that very object."""
        return self.dense[id(inputs)]

    def judge(self, network: fx.GraphModule) -> Judgement:
        """The network in evaluation mode; what is not finite is as far off as can be."""
        theirs = _answers(network, self.data)
        pairs = ((theirs[id(inputs)], self.dense[id(inputs)]) for inputs, _ in self.data)
        distance = relative_error(self.task, pairs)
        near = fidelity(lambda inputs: theirs[id(inputs)], self.dense_answers, self.data)
        quality = self.task.quality(lambda inputs: theirs[id(inputs)], self.data)
        return Judgement(float(np.clip(distance, 0, FARTHEST)), near.value, quality.value)


@torch.no_grad()
def _answers(network: fx.GraphModule, data: Sequence[tuple[Inputs, Any]]) -> dict[int, Leaves]:
    """On the CPU, by the identity of the batch."""
    names, device = output_names(network), device_of(network)
    found: dict[int, Leaves] = {}
    with evaluating(network):
        for inputs, _ in data:
            leaves = answers(network, inputs_to(inputs, device))
            found[id(inputs)] = {name: leaf.cpu() for name, leaf in zip(names, leaves, strict=True)}
    return found
