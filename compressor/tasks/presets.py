"""The tasks there are, by name: what each says, its loss, its metric with labels and without, its distance.

A task without labels is judged by the dense network's answers, and starts at how they differ from the mean answer.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from ..distributed import sum_count
from ..errors import DataError, RecipeError, did_you_mean
from ..records import Quality
from . import comparison, qualities
from .detection import average_precision, matched_f1
from .distances import class_distance, cosine_distance, leaf_distance, place_distance
from .objectives import (
    absolute_loss,
    class_loss,
    class_said,
    labels_loss,
    labels_said,
    minus,
    pixels_loss,
    pixels_said,
    places_said,
    spread_said,
)
from .record import Data, Decode, Judge, Predict, Task, class_leaf, is_labelled, map_leaf
from .reference import Reference

Comparison = Callable[[Predict, Predict, Data], Quality]


def judged(labelled: Judge | None, unlabelled: Comparison, dense: Predict | None) -> Judge:
    """A quality: by the labels where any sample of the data has one, else by the dense network's answers.

    Raises DataError where there is neither.
    """

    @torch.no_grad()
    def quality(predict: Predict, data: Data) -> Quality:
        if labelled is not None and sum_count(any(is_labelled(targets) for _, targets in data)):
            return labelled(predict, data)
        if dense is None:
            raise DataError("the data has no labels and there is no dense network to compare answers with; give one")
        return unlabelled(predict, dense, data)

    return quality


def _classification(reference: Reference | None, dense: Predict | None, decode: Decode | None) -> Task:
    quality = judged(qualities.top1, comparison.agreement, dense)
    distance = class_distance(reference, class_leaf)
    return Task("classification", class_said, class_loss, quality, distance, classifies=True)


def _multi_label(reference: Reference | None, dense: Predict | None, decode: Decode | None) -> Task:
    quality = judged(qualities.mean_average_precision, comparison.label_agreement, dense)
    distance = leaf_distance(reference, class_leaf)
    return Task("multi-label", labels_said(reference), labels_loss(reference), quality, distance)


def _segmentation(reference: Reference | None, dense: Predict | None, decode: Decode | None) -> Task:
    quality = judged(qualities.mean_iou, comparison.pixel_agreement, dense)
    return Task("segmentation", pixels_said, pixels_loss, quality, class_distance(reference, map_leaf))


def _detection(reference: Reference | None, dense: Predict | None, decode: Decode | None) -> Task:
    said = places_said(reference)
    quality = judged(average_precision(decode), matched_f1(decode), dense)
    return Task("detection", said, minus(said), quality, place_distance(reference), learns=False)


def _embedding(reference: Reference | None, dense: Predict | None, decode: Decode | None) -> Task:
    said = spread_said(reference, class_leaf)  # cosine's own gradient at the dense answer is 0
    quality = judged(qualities.retrieval_top1, comparison.mean_cosine, dense)
    return Task("embedding", said, minus(said), quality, cosine_distance(reference), learns=False)


def _image_to_image(reference: Reference | None, dense: Predict | None, decode: Decode | None) -> Task:
    said = spread_said(reference, map_leaf)
    quality = judged(qualities.psnr, comparison.psnr_to_dense, dense)
    return Task("image-to-image", said, absolute_loss(said), quality, leaf_distance(reference, map_leaf))


def _regression(reference: Reference | None, dense: Predict | None, decode: Decode | None) -> Task:
    said = spread_said(reference)
    quality = judged(qualities.r_squared, comparison.fidelity, dense)
    return Task("regression", said, absolute_loss(said), quality, leaf_distance(reference))


def _any(reference: Reference | None, dense: Predict | None, decode: Decode | None) -> Task:
    said = spread_said(reference)
    quality = judged(None, comparison.fidelity, dense)
    return Task("any", said, minus(said), quality, leaf_distance(reference), learns=False)


TASKS: dict[str, Callable[[Reference | None, Predict | None, Decode | None], Task]] = {
    "classification": _classification,
    "multi-label": _multi_label,
    "segmentation": _segmentation,
    "detection": _detection,
    "embedding": _embedding,
    "image-to-image": _image_to_image,
    "regression": _regression,
    "any": _any,
}


def task_named(
    name: str, *, reference: Reference | None = None, dense: Predict | None = None, decode: Decode | None = None
) -> Task:
    """The task of that name. Raises RecipeError for another.

    `reference` holds the mean answer and the spreads: without it what is said without labels can't be told, and a
    distance takes the spread of the answers it is given. `dense` judges where data has no labels. `decode` makes boxes
    of a detector's leaves.
    """
    if name not in TASKS:
        raise RecipeError(f"there is no task {name!r}; there are {', '.join(TASKS)}.{did_you_mean(name, list(TASKS))}")
    return TASKS[name](reference, dense, decode)


def any_task(reference: Reference, dense: Predict | None = None) -> Task:
    """The task of a network nobody said anything about: its answers are worth what they tell one image from another."""
    return task_named("any", reference=reference, dense=dense)
