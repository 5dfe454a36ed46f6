"""The chosen task fitted to the dense network: the mean and spread of its answers, measured once, as a stage.

Which it is is known at the start; what it needs to know of the dense network's answers (their mean, their spread) is a
stage of its own. A user's functions take the place of its own ones here.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from ..files import write_bytes
from ..graph.interface import answers, output_names
from ..inputs.images import Batches
from ..placement import device_of, inputs_to
from ..tasks import LeafReference, Leaves, Predict, Reference, Task, reference_of, task_named, with_user_parts
from ..tensors import Inputs
from .fingerprints import Known
from .stages import Keeper, Progress, Stages
from .task_choice import CLASSES, Chosen


def metric_of(chosen: Chosen) -> str:
    """What a classifier's share of right answers is called: without labels, right is what the dense network says."""
    return "top-1" if chosen.labelled else "agreement"


def predict_of(network: fx.GraphModule) -> Predict:
    """A traced network's answers by name, on the CPU."""
    names, device = output_names(network), device_of(network)

    @torch.no_grad()
    def predict(inputs: Inputs) -> Leaves:
        leaves = answers(network, inputs_to(inputs, device))
        return {name: leaf.cpu() for name, leaf in zip(names, leaves, strict=True)}

    return predict


@dataclass(frozen=True, slots=True, eq=False)
class NetworkTask:
    """The task of a run's network: what was chosen, and what it knows of the dense network's answers.

    `key` stands for all of it in stages' keys.
    """

    chosen: Chosen
    reference: Reference | None
    dense: fx.GraphModule
    key: object

    @property
    def task(self) -> Task | None:
        """Judged by the dense network where data have no targets; None where nothing but classes are told apart."""
        return None if self.chosen.classifies else self.against(predict_of(self.dense))

    @property
    def known(self) -> Known:
        """The task as a stage's input."""
        return Known(self.task, self.key)

    @property
    def itself(self) -> Known:
        """All of it as a stage's input."""
        return Known(self, self.key)

    def against(self, predict: Predict) -> Task:
        """The task's record, with another network's answers for the dense one's."""
        functions: dict[str, Any] = dict(self.chosen.parts.functions)
        task = task_named(self.chosen.name, reference=self.reference, dense=predict)
        if not self.chosen.alone:
            task = replace(task, classifies=False)
        return with_user_parts(task, dense=predict, **functions)


def make_task(stages: Stages, chosen: Chosen, dense: fx.GraphModule, images: Known, origin: str) -> NetworkTask:
    """What the run's network is judged by: the chosen task and, unless classes alone are told apart, the mean answer.

    The mean is over `images`. `origin` is the key of the stage that stands for the dense network.
    """
    if chosen.classifies:
        return NetworkTask(chosen, None, dense, [CLASSES, chosen.labelled])
    reference = stages.make(
        "mean answer",
        _referenced,
        Keeper(_write_reference, _read_reference),
        dense=Known(dense, origin),
        images=images,
        by_place=chosen.name == "detection",
    )
    return NetworkTask(chosen, reference, dense, [chosen.name, chosen.parts.prints, stages.keys["mean answer"]])


def task_in_memory(chosen: Chosen, dense: fx.GraphModule, images: Batches) -> Task | None:
    """The task without a stage: what it needs to know of the dense network's answers is taken of the images now."""
    if chosen.classifies:
        return None
    reference = reference_of(predict_of(dense), images, by_place=chosen.name == "detection")
    return NetworkTask(chosen, reference, dense, None).task


def remembered(predict: Predict, data: Sequence[tuple[Inputs, Any]]) -> Predict:
    """The same answers, computed once for each of the batches, which are told by being the very same objects."""
    answers_by_batch = {id(inputs): predict(inputs) for inputs, _ in data}
    return lambda inputs: answers_by_batch[id(inputs)]


def _referenced(dense: fx.GraphModule, images: Batches, by_place: bool, progress: Progress) -> Reference:
    return reference_of(predict_of(dense), images, by_place=by_place)


_FIGURES = ("spread", "class_spread", "unit_spread", "square", "low", "high", "sure_spread")


def _write_reference(folder: Path, reference: Reference) -> None:
    arrays: dict[str, Any] = {"samples": np.array(reference.samples), "names": np.array(list(reference.leaves))}
    for index, leaf in enumerate(reference.leaves.values()):
        arrays[f"mean_{index}"] = leaf.mean.numpy()
        arrays[f"figures_{index}"] = np.array([getattr(leaf, figure) for figure in _FIGURES])
    archive = io.BytesIO()
    np.savez(archive, **arrays)
    write_bytes(folder / "stages" / "mean-answer.npz", archive.getvalue())


def _read_reference(folder: Path) -> Reference:
    leaves: dict[str, LeafReference] = {}
    with np.load(folder / "stages" / "mean-answer.npz", allow_pickle=False) as arrays:
        for index, name in enumerate(arrays["names"].tolist()):
            figures = dict(zip(_FIGURES, arrays[f"figures_{index}"].tolist(), strict=True))
            mean: Tensor = torch.from_numpy(arrays[f"mean_{index}"])
            leaves[name] = LeafReference(mean=mean, **figures)
        return Reference(leaves, int(arrays["samples"]))
