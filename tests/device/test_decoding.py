from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from compressor.device.decoding import Detections, decode_dense, overlaps
from compressor.errors import InputError

SURE = 40.0  # a logit whose sigmoid is 1 in float32
FLOAT32 = 1e-6

Leaves = dict[str, NDArray[Any]]


def silent(count: int, classes: int, *sizes: int) -> Leaves:
    """An answer in which nothing is detected, on levels of so many cells a side."""
    leaves: Leaves = {}
    for level, size in enumerate(sizes):
        leaves[f"scores.{level}"] = np.full((count, classes, size, size), -SURE, np.float32)
        leaves[f"boxes.{level}"] = np.ones((count, 4, size, size), np.float32)
        leaves[f"centerness.{level}"] = np.full((count, 1, size, size), SURE, np.float32)
    return leaves


def decoded(leaves: Leaves, strides: tuple[int, ...] = (4, 8), **options: Any) -> list[Detections]:
    return decode_dense(leaves, **{"strides": strides, "threshold": 0.5, "iou": 0.5, "most": 100, **options})


def test_a_cell_becomes_a_box_around_its_centre() -> None:
    leaves = silent(2, 3, 8, 4)
    leaves["scores.0"][1, 2, 3, 5] = SURE  # row 3, column 5: centre (22, 14)
    leaves["boxes.0"][1, :, 3, 5] = (2, 3, 4, 5)
    leaves["scores.1"][1, 0, 1, 3] = 0.0  # sigmoid 1/2, and another with the centerness: centre (28, 12)
    leaves["centerness.1"][1, 0, 1, 3] = 0.0

    nothing, image = decoded(leaves, threshold=0.4)
    assert nothing["boxes"].shape == (0, 4)
    assert (nothing["scores"].shape, nothing["labels"].shape) == ((0,), (0,))
    assert image["boxes"].tolist() == [[20, 11, 26, 19], [27, 11, 29, 13]]
    assert image["scores"] == pytest.approx([1, 0.5])  # sqrt(1/2 * 1/2)
    assert image["labels"].tolist() == [2, 0]
    assert (image["boxes"].dtype, image["scores"].dtype, image["labels"].dtype) == (np.float32, np.float32, np.int64)


def test_what_scores_less_than_the_threshold_is_left_out() -> None:
    leaves = silent(1, 1, 4)
    leaves["scores.0"][0, 0, 0] = np.log([0.1, 0.2, 0.3, 0.4]) - np.log([0.9, 0.8, 0.7, 0.6])  # logits
    root = np.sqrt(0.3)
    assert len(decoded(leaves, (4,), threshold=root - FLOAT32)[0]["scores"]) == 2
    assert len(decoded(leaves, (4,), threshold=root + FLOAT32)[0]["scores"]) == 1


def test_boxes_that_overlap_are_left_out_within_a_class_only() -> None:
    leaves = silent(1, 2, 4)
    leaves["boxes.0"][:] = 10
    leaves["scores.0"][0, 0, 0, :2] = (2, 3)  # centres 4 px apart: (16 * 20) / (2 * 400 - 320) = 2/3
    leaves["scores.0"][0, 1, 0, 0] = 1
    assert decoded(leaves, (4,))[0]["labels"].tolist() == [0, 1]
    assert decoded(leaves, (4,))[0]["boxes"][0].tolist() == [-4, -8, 16, 12]  # not cut at the rim
    assert decoded(leaves, (4,), iou=0.67)[0]["labels"].tolist() == [0, 0, 1]
    assert decoded(leaves, (4,), iou=0.67, most=2)[0]["labels"].tolist() == [0, 0]


def slow_suppression(boxes: Any, scores: Any, threshold: float, iou: float, most: int) -> list[tuple[int, int]]:
    """(cell, class), the highest score first: every class by itself, every pair of boxes by itself."""
    kept: list[tuple[float, int, int]] = []
    for label in range(scores.shape[1]):
        in_class: list[int] = []
        for cell in sorted(range(len(boxes)), key=lambda cell: -scores[cell, label]):
            if scores[cell, label] >= threshold and all(slow_iou(boxes[cell], boxes[k]) <= iou for k in in_class):
                in_class.append(cell)
        kept += [(-scores[cell, label], cell, label) for cell in in_class]
    return [(cell, label) for _, cell, label in sorted(kept)[:most]]


def slow_iou(first: Any, second: Any) -> float:
    width = min(first[2], second[2]) - max(first[0], second[0])
    height = min(first[3], second[3]) - max(first[1], second[1])
    shared = max(width, 0) * max(height, 0)
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (first, second)]
    return float(shared / (sum(areas) - shared))


@pytest.mark.parametrize("most", [5, 1000])
@pytest.mark.parametrize("iou", [0.2, 0.6])
def test_suppression_agrees_with_a_slow_derivation(iou: float, most: int) -> None:
    random = np.random.default_rng(int(10 * iou) + most)
    leaves = silent(1, 3, 8, 4)
    for level in range(2):
        leaves[f"scores.{level}"][:] = random.normal(size=leaves[f"scores.{level}"].shape)
        leaves[f"centerness.{level}"][:] = random.normal(size=leaves[f"centerness.{level}"].shape)
        leaves[f"boxes.{level}"][:] = random.uniform(1, 12, leaves[f"boxes.{level}"].shape)

    boxes, scores = [], []
    for level, stride in enumerate((4, 8)):
        for row, column in np.ndindex(leaves[f"scores.{level}"].shape[2:]):
            left, top, right, bottom = (float(x) for x in leaves[f"boxes.{level}"][0, :, row, column])
            x, y = (column + 0.5) * stride, (row + 0.5) * stride
            boxes.append((x - left, y - top, x + right, y + bottom))
            logits = leaves[f"scores.{level}"][0, :, row, column].astype(np.float64)
            central = float(leaves[f"centerness.{level}"][0, 0, row, column])
            scores.append(1 / np.sqrt((1 + np.exp(-logits)) * (1 + np.exp(-central))))

    expected = slow_suppression(boxes, np.array(scores), 0.4, iou, most)
    detected = decoded(leaves, threshold=0.4, iou=iou, most=most)[0]
    assert 1 < len(expected) < (np.array(scores) >= 0.4).sum()
    assert detected["labels"].tolist() == [label for _, label in expected]
    assert np.abs(detected["boxes"] - np.array([boxes[cell] for cell, _ in expected])).max() < 32 * FLOAT32
    assert detected["scores"] == pytest.approx([scores[cell][label] for cell, label in expected], abs=FLOAT32)


def test_overlap_is_that_of_the_pixels() -> None:
    random = np.random.default_rng(0)
    corners = np.sort(random.integers(0, 12, (40, 2, 2)), axis=1)
    boxes = np.concatenate([corners[:, 0], corners[:, 1] + 1], axis=1).astype(np.float32)
    covered = np.zeros((40, 13, 13), np.bool_)
    for mask, (x0, y0, x1, y1) in zip(covered, boxes.astype(int), strict=True):
        mask[y0:y1, x0:x1] = True
    expected = [(covered[0] & mask).sum() / (covered[0] | mask).sum() for mask in covered]
    assert overlaps(boxes[0], boxes) == pytest.approx(expected)


def test_boxes_without_an_area_overlap_nothing() -> None:
    point = np.array([3, 3, 3, 3], np.float32)
    turned = np.array([5, 5, 2, 2], np.float32)  # its right lies left of its left
    assert overlaps(point, np.stack([point, turned])).tolist() == [0, 0]


def test_one_level_may_do_without_its_number() -> None:
    leaves = silent(1, 2, 4)
    leaves["scores.0"][0, 1, 2, 2] = SURE
    bare = {name.removesuffix(".0"): leaf for name, leaf in leaves.items()}
    assert decoded(bare, (8,))[0]["boxes"].tolist() == decoded(leaves, (8,))[0]["boxes"].tolist() == [[19, 19, 21, 21]]


def test_logits_of_any_size_give_scores() -> None:
    leaves = silent(1, 1, 2)
    leaves["scores.0"][0, 0] = [[-1e30, -100], [100, 1e30]]
    assert decoded(leaves, (4,))[0]["scores"].tolist() == [1, 1]


WRONG: dict[str, tuple[Leaves, str]] = {
    "a leaf is missing": ({"boxes.0": np.ones((1, 5, 4, 4))}, "has no 'scores.0', it has boxes.0"),
    "five distances": ({**silent(1, 2, 4, 2), "boxes.1": np.ones((1, 5, 2, 2))}, r"\[1, 5, 2, 2\], expected \[N, 4"),
    "one axis is gone": ({**silent(1, 2, 4, 2), "scores.0": np.ones((2, 4, 4))}, r"expected \[N, classes, h, w\]"),
    "another grid": ({**silent(1, 2, 4, 2), "boxes.0": np.ones((1, 4, 3, 4))}, "expected the same in each leaf"),
    "other classes": ({**silent(1, 2, 4, 2), "scores.1": np.ones((1, 3, 2, 2))}, "as many classes each"),
}


@pytest.mark.parametrize("what", WRONG)
def test_leaves_that_do_not_fit_are_refused(what: str) -> None:
    leaves, message = WRONG[what]
    with pytest.raises(InputError, match=message):
        decoded(leaves)


def test_without_a_level_nothing_is_decoded() -> None:
    with pytest.raises(InputError, match=r"scores of shapes \[\]"):
        decoded({}, ())
