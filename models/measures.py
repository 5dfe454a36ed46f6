"""What masks and boxes are worth, against those that are there: mean IoU over classes, COCO's average precision.

COCO's is the mean over classes of the precision, made never to rise, at 101 recalls (Lin et al. 2014). numpy alone.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from compressor.device.decoding import Detections, overlaps

COCO_OVERLAPS = tuple(np.arange(10) * 0.05 + 0.5)  # 0.5 to 0.95
RECALLS = np.linspace(0, 1, 101)


def mean_iou(predicted: NDArray[np.int64], masks: NDArray[np.int64], classes: int) -> float:
    """Of [N, H, W] class indices: every class counts the same, however few its pixels."""
    pairs = np.bincount(masks.ravel() * classes + predicted.ravel(), minlength=classes**2)
    confusion = pairs.reshape(classes, classes)  # [there, predicted]
    union = confusion.sum(0) + confusion.sum(1) - confusion.diagonal()
    return float((confusion.diagonal() / union).mean())


def average_precision(
    detections: Sequence[Detections],
    boxes: Sequence[NDArray[np.float32]],
    labels: Sequence[NDArray[np.int64]],
    iou: float,
) -> float:
    """Of images' detections, given the boxes and labels that are there; mean over the classes among `labels`."""
    present = np.unique(np.concatenate(labels))
    return float(np.mean([_class_precision(detections, boxes, labels, int(label), iou) for label in present]))


def _class_precision(
    detections: Sequence[Detections],
    boxes: Sequence[NDArray[np.float32]],
    labels: Sequence[NDArray[np.int64]],
    label: int,
    iou: float,
) -> float:
    scores, is_right = [], []
    for image, image_boxes, image_labels in zip(detections, boxes, labels, strict=True):
        chosen = image["labels"] == label
        scores.append(image["scores"][chosen])
        is_right += _matched(image["boxes"][chosen], image_boxes[image_labels == label], iou)

    order = np.argsort(-np.concatenate(scores), kind="stable")
    hits = np.array(is_right, np.float64)[order].cumsum()
    precision = hits / np.arange(1, len(hits) + 1)
    never_rising = np.maximum.accumulate(precision[::-1])[::-1]
    recall = hits / sum(int((image_labels == label).sum()) for image_labels in labels)
    reached = np.searchsorted(recall, RECALLS, side="left")
    return float(np.append(never_rising, 0.0)[reached].mean())


def _matched(detected: NDArray[np.float32], there: NDArray[np.float32], iou: float) -> list[bool]:
    """Whether each box, the best first, overlaps one that is there and not matched yet by at least `iou`."""
    is_free = np.ones(len(there), np.bool_)
    hits = []
    for box in detected:
        shares = np.where(is_free, overlaps(box, there), 0)
        best = int(shares.argmax()) if len(there) else -1
        hits.append(best >= 0 and bool(shares[best] >= iou))
        if hits[-1]:
            is_free[best] = False
    return hits
