"""The device's figures, counted with numpy, against the host's: average precision, mean IoU, top-1, a resized map."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch.nn import functional

from compressor.device.average_precision import match_image, mean_average_precision
from compressor.device.scoring import (
    areas_figure,
    areas_row,
    boxes_figure,
    in_words,
    pixel_classes,
    resized,
    top1_figure,
    top1_row,
)
from compressor.errors import DataError
from compressor.records import Accuracy
from compressor.tasks.detection import average_precision
from compressor.tasks.qualities import mean_iou

COCO_ABS = 1e-7  # the host's value is rounded to float32
MAP_ABS = 1e-5  # two orders of adding four float32 products

Boxes = dict[str, NDArray[Any]]


def drawn_boxes(seed: int) -> tuple[list[Boxes], list[Boxes]]:
    """Detections and truths of 12 images: whole pixels, so that overlaps meet thresholds exactly, and equal scores."""
    draw = np.random.default_rng(seed)
    detections, truths = [], []
    for _ in range(12):
        there = int(draw.integers(0, 5))
        corner, sides = draw.integers(0, 40, (there, 2)), draw.integers(5, 20, (there, 2))
        truth = np.concatenate([corner, corner + sides], 1).astype(np.float32)
        found = int(draw.integers(0, 8))
        near = truth[draw.integers(0, there, found)] if there else np.tile(np.float32([[0, 0, 5, 5]]), (found, 1))
        moved = near + draw.integers(-2, 3, (found, 4)) * (1 if seed % 2 else 0.7)
        moved[:, 2:] = np.maximum(moved[:, 2:], moved[:, :2] + 1)
        scores = (draw.integers(0, 10, found) / 10).astype(np.float32)
        detections.append({"boxes": moved.astype(np.float32), "labels": draw.integers(0, 4, found), "scores": scores})
        truths.append({"boxes": truth, "labels": draw.integers(0, 3, there)})
    return detections, truths


@pytest.mark.parametrize("seed", [0, 1, 2, 3])
def test_average_precision_is_the_hosts(seed: int) -> None:
    detections, truths = drawn_boxes(seed)
    images = torch.zeros(len(truths), 1)
    host = average_precision(lambda leaves: detections)(lambda inputs: {}, [(images, truths)])
    ours = boxes_figure([match_image(*pair) for pair in zip(detections, truths, strict=True)])
    assert 0.001 < ours.value < 1
    assert ours.value == pytest.approx(host.value, abs=COCO_ABS)
    assert (ours.low, ours.high) == pytest.approx((host.low, host.high), abs=10 * COCO_ABS)
    assert (ours.metric, ours.n) == (host.metric, host.n)


def test_of_more_than_a_hundred_detections_the_surest_count() -> None:
    box = np.float32([[0, 0, 10, 10]])
    truth = {"boxes": box, "labels": np.zeros(1, np.int64)}
    wrong = np.tile(np.float32([[50, 50, 60, 60]]), (100, 1))
    detected = {
        "boxes": np.concatenate([wrong, box]),
        "labels": np.zeros(101, np.int64),
        "scores": np.linspace(1, 0.1, 101),
    }
    assert mean_average_precision([match_image(detected, truth)]) == 0
    assert np.isnan(mean_average_precision([match_image(detected, {name: a[:0] for name, a in truth.items()})]))


def test_no_box_anywhere_is_no_figure() -> None:
    nothing = {"boxes": np.zeros((0, 4)), "labels": np.zeros(0, np.int64), "scores": np.zeros(0)}
    with pytest.raises(DataError, match="no image is labelled with a box"):
        boxes_figure([match_image(nothing, nothing)])


@pytest.mark.parametrize("classes", [1, 4])
def test_mean_iou_is_the_hosts_also_where_the_map_is_smaller(classes: int) -> None:
    draw = np.random.default_rng(classes)
    logits = draw.standard_normal((6, classes, 5, 7)).astype(np.float32)
    masks = draw.integers(0, max(2, classes), (6, 13, 16))
    masks[:, :2] = 255
    data = [(torch.zeros(6, 1), torch.from_numpy(masks))]
    host = mean_iou(lambda inputs: {"output": torch.from_numpy(logits)}, data)
    ours = areas_figure([areas_row(*pair) for pair in zip(logits, masks, strict=True)])
    assert (ours.value, ours.low, ours.high, ours.n) == (host.value, host.low, host.high, host.n)


@pytest.mark.parametrize("size", [(5, 7), (13, 16), (3, 4), (1, 20)])
def test_a_map_is_resized_as_pytorch_does(size: tuple[int, int]) -> None:
    maps = np.random.default_rng(0).standard_normal((3, 5, 7)).astype(np.float32)
    expected = functional.interpolate(torch.from_numpy(maps)[None], size=size, mode="bilinear", align_corners=False)[0]
    np.testing.assert_allclose(resized(maps, size), expected.numpy(), atol=MAP_ABS)


def test_what_is_not_finite_is_no_class() -> None:
    logits = np.float32([[[np.nan, 1]], [[0.5, -1]]])
    np.testing.assert_array_equal(pixel_classes(logits, (1, 2)), [[1, 0]])


@pytest.mark.parametrize("value", [-1, 4, 254])
def test_a_class_that_the_model_does_not_have_is_refused(value: int) -> None:
    mask = np.zeros((2, 2), np.int32)
    mask[0, 0] = value
    with pytest.raises(DataError, match=f"holds {value}, the model answers with 4 classes"):
        areas_row(np.zeros((4, 2, 2), np.float32), mask)
    with pytest.raises(DataError, match="label 4, the model tells 4 classes apart"):
        top1_row(np.zeros(4), 4)


def test_top1_and_top5_are_counted() -> None:
    rows = [top1_row(np.arange(7.0), label) for label in (6, 5, 2, 1)]
    assert top1_figure(rows) == Accuracy(1, 4, 3)
    assert top1_figure([top1_row(np.arange(5.0), 4)]) == Accuracy(1, 1, -1)
    assert in_words(Accuracy(360, 400)) == "top-1 90.00 % (86.67 to 92.57 %) of 400"
