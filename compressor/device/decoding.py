"""A dense detector's answer in, boxes in pixels, scores and classes out: the best cells, overlaps left out.

Cells are those of FCOS (Tian et al. 2019): cell (i, j) of a level with stride s has its centre at ((j + 1/2) s,
(i + 1/2) s), its score is sqrt(sigmoid(class) sigmoid(centerness)). Needs numpy alone; knows no runtime and no file.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypedDict

import numpy as np
from numpy.typing import NDArray

from ..errors import InputError

_LEAVES = {"scores": "classes", "boxes": "4", "centerness": "1"}  # and how many channels each has


class Detections(TypedDict):
    """Of one image, the highest score first: `boxes` float32 [k, 4], x0 y0 x1 y1 in pixels of the network's input,
    `scores` float32 [k] and `labels` int64 [k]."""

    boxes: NDArray[np.float32]
    scores: NDArray[np.float32]
    labels: NDArray[np.int64]


class _Level(NamedTuple):
    """What the cells of one level answer, [N, classes, h, w], [N, 4, h, w] and [N, 1, h, w]."""

    scores: NDArray[Any]
    boxes: NDArray[Any]
    centerness: NDArray[Any]


def decode_dense(
    leaves: Mapping[str, NDArray[Any]], *, strides: Sequence[int], threshold: float, iou: float, most: int
) -> list[Detections]:
    """What is detected on each of N images.

    `leaves` holds for level i of `strides` (pixels) `scores.i` [N, classes, h, w], logits, `boxes.i` [N, 4, h, w],
    distances in pixels from a cell's centre to the left, top, right and bottom, and `centerness.i` [N, 1, h, w],
    logits; with one level the names may stand alone. Boxes are not cut at the image's rim. A score below `threshold` is
    left out, as is a box that overlaps one of the same class with a higher score by more than `iou`; then the `most`
    highest stay. Raises InputError for leaves that are missing or don't fit each other.
    """
    levels = [_level(leaves, index, len(strides)) for index in range(len(strides))]
    if len({level.scores.shape[:2] for level in levels}) != 1:
        shapes = [list(level.scores.shape) for level in levels]
        raise InputError(f"scores of shapes {shapes}: expected [N, classes, h, w] with one N and as many classes each")

    level_scores, level_boxes = zip(*map(_cells, levels, strides), strict=True)
    scores = np.concatenate(level_scores, axis=1)  # [N, cells, classes]
    boxes = np.concatenate(level_boxes, axis=1)  # [N, cells, 4]
    return [_detected(*image, threshold, iou, most) for image in zip(scores, boxes, strict=True)]


def _level(leaves: Mapping[str, NDArray[Any]], index: int, levels: int) -> _Level:
    arrays = []
    for name, channels in _LEAVES.items():
        alone = levels == 1 and name in leaves
        full_name = name if alone else f"{name}.{index}"
        if full_name not in leaves:
            raise InputError(f"the answer has no {full_name!r}, it has {', '.join(leaves)}; check the strides")
        array = np.asarray(leaves[full_name])
        if array.ndim != 4 or channels not in ("classes", str(array.shape[1])):
            raise InputError(f"{full_name!r} has shape {list(array.shape)}, expected [N, {channels}, h, w]")
        arrays.append(array)

    grids = {(len(array), *array.shape[2:]) for array in arrays}
    if len(grids) > 1:
        raise InputError(
            f"level {index} has images and cells (N, h, w) {sorted(grids)}, expected the same in each leaf"
        )
    return _Level(*arrays)


def _cells(level: _Level, stride: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Scores [N, cells, classes] and boxes [N, cells, 4] of one level."""
    count, classes, height, width = level.scores.shape
    scores = np.sqrt(_sigmoid(level.scores) * _sigmoid(level.centerness))
    rows, columns = np.meshgrid(np.arange(height), np.arange(width), indexing="ij")
    x, y = (columns + 0.5) * stride, (rows + 0.5) * stride  # [h, w]
    left, top, right, bottom = level.boxes.astype(np.float32).swapaxes(0, 1)  # of each [N, h, w]
    boxes = np.stack([x - left, y - top, x + right, y + bottom], axis=-1)
    flat_scores = scores.reshape(count, classes, height * width).swapaxes(1, 2)
    return flat_scores.astype(np.float32), boxes.reshape(count, height * width, 4).astype(np.float32)


def _sigmoid(x: NDArray[Any]) -> NDArray[np.float32]:
    """Through tanh, which overflows nowhere."""
    half = np.float32(0.5)
    sigmoid: NDArray[np.float32] = half + half * np.tanh(half * x.astype(np.float32))
    return sigmoid


def _detected(
    scores: NDArray[np.float32], boxes: NDArray[np.float32], threshold: float, iou: float, most: int
) -> Detections:
    """Of one image: scores [cells, classes], boxes [cells, 4]."""
    cells, labels = np.nonzero(scores >= threshold)
    order = np.argsort(-scores[cells, labels], kind="stable")  # of equal ones the finer level's first cell leads
    cells, labels = cells[order], labels[order].astype(np.int64)
    kept = _apart(boxes[cells], labels, iou, most)
    return Detections(boxes=boxes[cells[kept]], scores=scores[cells[kept], labels[kept]], labels=labels[kept])


def _apart(boxes: NDArray[np.float32], labels: NDArray[np.int64], iou: float, most: int) -> NDArray[np.int64]:
    """Greedy suppression: positions of at most `most` boxes [k, 4], in their order."""
    kept: list[int] = []
    left = np.arange(len(boxes))
    while len(left) and len(kept) < most:
        first, others = left[0], left[1:]
        kept.append(int(first))
        is_covered = (labels[others] == labels[first]) & (overlaps(boxes[first], boxes[others]) > iou)
        left = others[~is_covered]
    return np.array(kept, np.int64)


def overlaps(box: NDArray[np.float32], boxes: NDArray[np.float32]) -> NDArray[np.float32]:
    """Intersection over union of one box [4] with each of [k, 4]; 0 where both are empty."""
    corners_low, corners_high = np.maximum(box[:2], boxes[:, :2]), np.minimum(box[2:], boxes[:, 2:])
    shared = np.maximum(corners_high - corners_low, 0).prod(1)
    areas = np.maximum(boxes[:, 2:] - boxes[:, :2], 0).prod(1) + np.maximum(box[2:] - box[:2], 0).prod()
    union = areas - shared
    share: NDArray[np.float32] = np.divide(shared, union, out=np.zeros_like(shared), where=union > 0)
    return share
