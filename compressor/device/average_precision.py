"""Boxes that were detected and boxes that are there, of each image, in; COCO's mean average precision out.

As pycocotools counts it by way of torchmetrics (Lin et al. 2014): per class and IoU threshold, detections of all images
by falling score, each taking the free true box it overlaps most; precision made falling, its mean over 101 recalls.
Numpy alone; crowds, sizes of boxes and other than 100 detections an image and class are not known here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..records import FloatArray, IntArray

Boxes = Mapping[str, NDArray[Any]]  # boxes [k, 4], x0 y0 x1 y1; labels [k]; of detections also scores [k]

MOST_DETECTIONS = 100
_TINY = float(np.spacing(1))


def _even(start: float, end: float, count: int) -> FloatArray:
    """From start to end as torch steps there in float32, from both ends to the middle.

    So an overlap or a recall that is 0.55 exactly is judged as the host judges it.
    """
    step = np.float32(end - start) / np.float32(count - 1)
    up = np.float32(start) + step * np.arange(count, dtype=np.float32)
    down = np.float32(end) - step * np.arange(count - 1, -1, -1, dtype=np.float32)
    return np.where(np.arange(count) < count // 2, up, down).astype(np.float64)


THRESHOLDS = _even(0.5, 0.95, 10)
RECALLS = _even(0, 1, 101)


@dataclass(frozen=True, slots=True)
class Matches:
    """Of one image and class: `scores` [d] falling, `matched` [thresholds, d], and how many boxes are there."""

    scores: FloatArray
    matched: NDArray[np.bool_]
    truths: int


def match_image(detected: Boxes, truth: Boxes) -> dict[int, Matches]:
    """By class, for each that is detected or there."""
    matches = {}
    all_scores, labels = np.asarray(detected["scores"], np.float64), np.asarray(detected["labels"])
    for label in map(int, np.union1d(labels, truth["labels"])):
        scores = all_scores[labels == label]
        matches[label] = _match_class(_boxes_of(detected, label), scores, _boxes_of(truth, label))
    return matches


def mean_average_precision(images: Sequence[Mapping[int, Matches]]) -> float:
    """The mean over thresholds and classes that some image has; NaN where none has any."""
    labels: set[int] = set().union(*images)
    counted = []
    for label in sorted(labels):
        precisions = _average_precisions([image[label] for image in images if label in image])
        if precisions is not None:
            counted.append(precisions)
    return float(np.mean(counted)) if counted else float("nan")


def _boxes_of(image: Boxes, label: int) -> FloatArray:
    """Boxes [k, 4] of one class."""
    is_label = np.asarray(image["labels"]) == label
    boxes: FloatArray = np.asarray(image["boxes"], np.float32).reshape(-1, 4)[is_label].astype(np.float64)
    return boxes


def _match_class(boxes: FloatArray, scores: FloatArray, truths: FloatArray) -> Matches:
    order = np.argsort(-scores, kind="stable")[:MOST_DETECTIONS]
    overlaps = _overlaps(boxes[order], truths)  # [d, g]
    matched = np.stack([_matched(overlaps, threshold) for threshold in THRESHOLDS])
    return Matches(scores[order], matched, len(truths))


def _matched(overlaps: FloatArray, threshold: float) -> NDArray[np.bool_]:
    """Which of the detections [d], best score first, find a free box that they overlap at least so much."""
    is_free = np.ones(overlaps.shape[1], np.bool_)
    matched = np.zeros(len(overlaps), np.bool_)
    for detection, row in enumerate(overlaps):
        free = np.where(is_free, row, -1.0)
        if free.max(initial=-1.0) < threshold:
            continue
        best = len(free) - 1 - int(np.argmax(free[::-1]))  # of equal ones the last, as pycocotools has it
        is_free[best] = False
        matched[detection] = True
    return matched


def _overlaps(boxes: FloatArray, truths: FloatArray) -> FloatArray:
    """[d, g] intersection over union; 0 where the union is empty."""
    corners = np.maximum(boxes[:, None, :2], truths[None, :, :2])
    ends = np.minimum(boxes[:, None, 2:], truths[None, :, 2:])
    shared = np.maximum(ends - corners, 0).prod(2)
    union = _areas(boxes)[:, None] + _areas(truths)[None] - shared
    overlaps: FloatArray = np.divide(shared, union, out=np.zeros_like(shared), where=union > 0)
    return overlaps


def _areas(boxes: FloatArray) -> FloatArray:
    areas: FloatArray = (boxes[:, 2:] - boxes[:, :2]).prod(1)
    return areas


def _average_precisions(images: Sequence[Matches]) -> FloatArray | None:
    """Of one class, at each threshold; None where no image has it."""
    truths = sum(image.truths for image in images)
    if not truths:
        return None
    scores = np.concatenate([image.scores for image in images])
    order = np.argsort(-scores, kind="stable")
    matched = np.concatenate([image.matched for image in images], axis=1)[:, order]  # [thresholds, detections]
    return np.array([_average_precision(row, truths) for row in matched.astype(np.int64)])


def _average_precision(matched: IntArray, truths: int) -> float:
    """Of detections [d] by falling score that are right (1) or not (0)."""
    right = np.cumsum(matched)
    recall = right / truths
    precision = right / (np.arange(1, len(matched) + 1) + _TINY)
    falling = np.maximum.accumulate(precision[::-1])[::-1]  # at a recall, the best at that or any higher
    places = np.searchsorted(recall, RECALLS, side="left")
    reached = places < len(falling)
    return float(falling[places[reached]].sum() / len(RECALLS))
