"""A task tried on the dense network's answers before anything long: targets that fit, and a user's functions that work.

Nothing is written and nothing is kept: what a function answers here is only looked at.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from ..errors import DataError
from ..inputs.images import Batches, batches
from ..tasks import Leaves, Targets, Task, is_labelled, task_named, with_user_parts
from ..tasks.fitting import require_answer, require_targets
from ..tensors import as_tuple
from .task_choice import CLASSES, Chosen
from .tasking import predict_of

REHEARSED_IMAGES = 256  # of the evaluation images that a quality is tried on


def rehearse(chosen: Chosen, dense: fx.GraphModule, calibration: Batches, evaluation: Batches) -> None:
    """Raises ModelError, DataError or TaskError for an answer, targets or a user's function that the run would end at.

    A plain classifier's labels are checked where its classes are.
    """
    if chosen.classifies:
        return
    functions: dict[str, Any] = dict(chosen.parts.functions)
    predict = predict_of(dense)
    inputs, targets = next(iter(calibration))
    leaves, image_shape = predict(inputs), as_tuple(inputs)[0].shape
    # where a user's functions take all its places, a task reads nothing, which may then have any form
    reads_answers = not {"says", "distance", "quality"} <= functions.keys()
    reads_targets = not {"says", "loss", "quality"} <= functions.keys()
    if reads_answers:
        require_answer(chosen.name, leaves)
    if chosen.labelled and chosen.name != CLASSES and reads_targets:
        for _, labels in chain(calibration, evaluation):
            require_targets(chosen.name, leaves, labels, image_shape)

    task = with_user_parts(task_named(chosen.name, dense=predict), dense=predict, **functions)
    _try_objectives(task, functions, leaves, targets)
    _try_quality(task, dense, evaluation)


def _try_objectives(task: Task, functions: Mapping[str, Any], leaves: Leaves, targets: Targets) -> None:
    """A user's own, on one batch; the distance also of answers that are another sample's."""
    with torch.enable_grad():
        if "says" in functions:
            task.says(_learning(leaves), targets)
        if "loss" in functions and is_labelled(targets):
            task.loss(_learning(leaves), targets)
        if "distance" in functions:
            shifted = {name: _next_samples(leaf) for name, leaf in leaves.items()}
            task.distance(_learning(shifted), leaves)


def _next_samples(leaf: Tensor) -> Tensor:
    """[N, ...] with every sample's answer at another's place; a number for all samples as it is."""
    return leaf.roll(1, 0) if leaf.dim() else leaf


def _learning(leaves: Leaves) -> dict[str, Tensor]:
    return {name: leaf.detach().clone().requires_grad_(leaf.is_floating_point()) for name, leaf in leaves.items()}


def _try_quality(task: Task, dense: fx.GraphModule, evaluation: Batches) -> None:
    """Of the dense network on some evaluation images; what only some images lack is left to the run."""
    count = min(REHEARSED_IMAGES, len(evaluation.images))
    some_images = batches(evaluation.images.subset(np.arange(count)), evaluation.batch_size)
    try:
        quality = task.quality(predict_of(dense), some_images)
        if not math.isfinite(quality.value):
            raise DataError(f"the dense network's {quality.metric} is {quality.value} on {count} images, which is none")
    except DataError:
        if count == len(evaluation.images):
            raise
