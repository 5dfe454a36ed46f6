"""A model's answers and the labels they are held to in, one row of figures a sample; how good all are out.

The host's figures with numpy alone: top-1, mean IoU, COCO's mean average precision. Knows no runtime and no file.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import DataError
from ..records import Accuracy, Figure, FloatArray, IntArray, Quality
from .average_precision import Boxes, Matches, match_image, mean_average_precision
from .feeds import Array
from .intervals import bootstrap, jackknife
from .targets import IGNORED

Leaves = Mapping[str, Array]  # a model's outputs [1, ...] by name
TOP5_FROM = 6  # classes: with fewer, five guesses say little
Row = Any  # what the same measure made of one sample


@dataclass(frozen=True, slots=True)
class Measure:
    """`row(answer, truth)` of one sample, `figure(rows)` of all; `truth` is what labels are called in messages."""

    metric: str
    truth: str
    row: Callable[[Any, Any], Row]
    figure: Callable[[Sequence[Row]], Figure]


def top1_row(logits: Array, label: int) -> tuple[bool, bool, bool]:
    """Whether the label of logits [classes] is the first, among the first five, and whether five say anything.

    Raises DataError for a label that is none of the classes.
    """
    if not 0 <= label < len(logits):
        raise DataError(f"there is a label {label}, the model tells {len(logits)} classes apart; check the labels")
    ranked = np.argsort(-logits, kind="stable")[:5]
    return bool(ranked[0] == label), bool((ranked == label).any()), len(logits) >= TOP5_FROM


def top1_figure(rows: Sequence[tuple[bool, bool, bool]]) -> Accuracy:
    """The share of samples whose largest logit is the label's."""
    correct = sum(is_first for is_first, _, _ in rows)
    in_top5 = sum(is_in_top5 for _, is_in_top5, _ in rows)
    has_top5 = all(counted for _, _, counted in rows)
    return Accuracy(correct, len(rows), in_top5 if has_top5 else -1)


def pixel_classes(logits: Array, size: tuple[int, int]) -> IntArray:
    """The class [h, w] of every pixel at `size` from a map [C, h', w']; one channel is a yes or no."""
    maps = np.where(np.isfinite(logits), logits, 0).astype(np.float32)
    if len(maps) == 1:
        maps = np.concatenate([-maps / 2, maps / 2])
    answers: IntArray = resized(maps, size).argmax(0).astype(np.int64)
    return answers


def resized(maps: NDArray[np.float32], size: tuple[int, int]) -> NDArray[np.float32]:
    """[C, h, w] at another size, bilinear between the pixels' centres, as PyTorch's `align_corners=False`."""
    if maps.shape[1:] == size:
        return maps
    rows, columns = (_weights(old, new) for old, new in zip(maps.shape[1:], size, strict=True))
    return np.asarray(np.einsum("yh,chw,xw->cyx", rows, maps, columns, optimize=True), np.float32)


def _weights(old: int, new: int) -> NDArray[np.float32]:
    """[new, old]: how much of each old pixel is in a new one; 4 to 8: the second lies at 0.25."""
    places = np.clip((np.arange(new) + 0.5) * old / new - 0.5, 0, old - 1)
    low = np.floor(places).astype(np.int64)
    high = np.minimum(low + 1, old - 1)
    share = (places - low).astype(np.float32)
    weights = np.zeros((new, old), np.float32)
    np.add.at(weights, (np.arange(new), low), 1 - share)
    np.add.at(weights, (np.arange(new), high), share)
    return weights


def areas_row(logits: Array, mask: NDArray[Any]) -> dict[str, FloatArray]:
    """Pixels of each class [C] where answer and mask are it, where the answer is, and where the mask is.

    Raises DataError for a mask of classes that the map [C, h, w] does not have.
    """
    classes = max(2, len(logits))
    is_ignored = (mask == IGNORED) & (classes <= IGNORED)
    beyond = ~is_ignored & ((mask < 0) | (mask >= classes))
    if beyond.any():
        raise DataError(
            f"a mask holds {int(mask[beyond][0])}, the model answers with {classes} classes; 255 is ignored"
        )
    answers = pixel_classes(logits, (mask.shape[0], mask.shape[1]))
    counted = ~is_ignored

    def areas(labels: NDArray[Any], where: NDArray[np.bool_]) -> FloatArray:
        return np.bincount(labels[where].astype(np.int64), minlength=classes).astype(np.float64)

    return {
        "both": areas(mask, counted & (answers == mask)),
        "answered": areas(answers, counted),
        "true": areas(mask, counted),
    }


def areas_figure(rows: Sequence[Mapping[str, FloatArray]]) -> Quality:
    """Mean IoU of the rows of `areas_row`."""
    return mean_iou(_stacked(rows, "both"), _stacked(rows, "answered"), _stacked(rows, "true"))


def _stacked(rows: Sequence[Mapping[str, FloatArray]], name: str) -> FloatArray:
    """[N, C]"""
    return np.stack([row[name] for row in rows])


def mean_iou(both: FloatArray, answered: FloatArray, true: FloatArray) -> Quality:
    """Intersection over union of each class over all pixels, the mean over classes that are there or answered.

    All are pixels [N, C]; the interval is the bootstrap's over images. Raises DataError where no pixel has a class.
    """
    if not true.any():
        raise DataError("no pixel of any mask has a class; mean IoU needs some")

    def figure(counts: FloatArray) -> float:
        overlap, area = counts @ both, counts @ answered + counts @ true - counts @ both
        return float((overlap[area > 0] / area[area > 0]).mean()) if area.any() else float("nan")

    value = figure(np.ones(len(both)))
    low, high = bootstrap(figure, len(both), value)
    return Quality("mIoU", value, len(both), low, high, _chance_iou(answered.sum(0), true.sum(0)))


def _chance_iou(answered: FloatArray, true: FloatArray) -> float:
    """Mean IoU of the same answers on pixels in a random order: p t / (p + t - p t) of a class's two shares."""
    p, t = answered / answered.sum(), true / true.sum()
    there = (p + t) > 0
    return float((p * t / np.where(there, p + t - p * t, 1.0))[there].mean())


def boxes_figure(rows: Sequence[Any]) -> Quality:
    """COCO's mean average precision of the rows of `match_image`; the interval is the jackknife's over images."""
    if not any(map(_has_truths, rows)):
        raise DataError("no image is labelled with a box; mean average precision needs some")

    def figure(indices: IntArray) -> float:
        return mean_average_precision([rows[index] for index in indices])

    value = figure(np.arange(len(rows)))
    low, high = jackknife(figure, len(rows), value)
    return Quality("mAP", value, len(rows), low, high, chance=0.0)


def _has_truths(row: Mapping[int, Matches]) -> bool:
    return any(matches.truths for matches in row.values())


def _boxes_row(detected: Boxes, truth: Boxes) -> Row:
    return match_image(detected, truth)


MEASURES: Mapping[str, Measure] = {
    "classification": Measure("top-1", "class", top1_row, top1_figure),
    "segmentation": Measure("mIoU", "mask", areas_row, areas_figure),
    "detection": Measure("mAP", "boxes", _boxes_row, boxes_figure),
}
"""By task, what this room can count."""


def in_words(figure: Figure) -> str:
    """`top-1 97.20 % (95.00 to 98.50 %) of 360`: the value with its 95 % interval and the number of samples."""
    interval = f"{100 * figure.low:.2f} to {100 * figure.high:.2f} %"
    return f"{figure.metric} {100 * figure.value:.2f} % ({interval}) of {figure.n}"
