"""Boxes against COCO's figures and a matching by hand, and what is said where a decoder goes wrong."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from compressor.errors import DataError, ModelError, TaskError
from compressor.tasks import average_precision, task_named
from compressor.tasks.detection import box_iou, matches

from .answers import corners, data, network, unlabelled


def boxes_of(images: int, count: int, seed: int = 0) -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(seed)
    corner = 40 * torch.rand(images, count, 2, generator=random)
    size = 8 + 12 * torch.rand(images, count, 2, generator=random)
    scores = 0.3 + 0.7 * torch.rand(images, count, generator=random)
    labels = torch.randint(0, 2, (images, count), generator=random)
    return {"boxes": torch.cat([corner, corner + size], 2), "scores": scores, "labels": labels}


def area_by_pixels(box: Tensor, other: Tensor) -> tuple[int, int]:
    """Pixels of both and of either, for boxes on whole pixels."""
    sets = [set(itertools.product(range(int(b[0]), int(b[2])), range(int(b[1]), int(b[3])))) for b in (box, other)]
    return len(sets[0] & sets[1]), len(sets[0] | sets[1])


def test_iou_is_the_ratio_of_counted_pixels() -> None:
    boxes = boxes_of(1, 6)["boxes"][0].round().double()
    overlaps = box_iou(boxes, boxes)
    for i, j in itertools.product(range(6), repeat=2):
        both, either = area_by_pixels(boxes[i], boxes[j])
        assert float(overlaps[i, j]) == pytest.approx(both / either)


def test_a_box_is_matched_once_and_only_with_its_label() -> None:
    box = torch.tensor([[0.0, 0.0, 10.0, 10.0]], dtype=torch.float64)
    two = {"boxes": box.repeat(2, 1), "labels": torch.tensor([1, 1])}
    assert matches(two, {"boxes": box, "labels": torch.tensor([1])}) == 1
    assert matches(two, {"boxes": box, "labels": torch.tensor([0])}) == 0
    assert matches(two, {"boxes": box[:0], "labels": torch.tensor([], dtype=torch.int64)}) == 0


def test_without_labels_boxes_are_held_against_the_dense_networks() -> None:
    dense = boxes_of(6, 4)
    task = task_named("detection", dense=network(**dense), decode=corners)
    same = task.quality(network(**dense), unlabelled([4, 2]))
    assert (same.metric, same.value, same.n) == ("box F1 to dense", 1.0, 6)
    half = {**dense, "scores": dense["scores"] * torch.tensor([1.0, 1.0, 0.0, 0.0])}
    assert task.quality(network(**half), unlabelled([4, 2])).value == pytest.approx(2 * 12 / (12 + 24))
    other = {**dense, "labels": 1 - dense["labels"]}
    assert task.quality(network(**other), unlabelled([4, 2])).value < 0.3
    shuffled = {key: values.flip(1) for key, values in dense.items()}  # a top-k in another order
    assert task.quality(network(**shuffled), unlabelled([4, 2])).value == 1
    silent = {**dense, "scores": dense["scores"] * 0}
    with pytest.raises(DataError, match="finds no box that scores"):
        task_named("detection", dense=network(**silent), decode=corners).quality(network(**dense), unlabelled([6]))


def truths_of(leaves: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
    return [{"boxes": image["boxes"], "labels": image["labels"]} for image in corners(leaves)]


def test_mean_average_precision_is_cocos() -> None:
    pytest.importorskip("pycocotools")
    dense = boxes_of(6, 4)
    truths = truths_of(dense)
    task = task_named("detection", decode=corners)
    best = task.quality(network(**dense), data(truths, [4, 2]))
    assert (best.metric, best.value, best.n) == ("mAP", pytest.approx(1), 6)
    # three boxes of one class, two labelled: hit, miss, hit gives precision 1 up to recall 1/2 and 2/3 beyond
    box = torch.tensor([[0.0, 0.0, 10.0, 10.0], [50.0, 50.0, 60.0, 60.0], [20.0, 20.0, 30.0, 30.0]])
    leaves = {
        "boxes": box[None],
        "scores": torch.tensor([[0.9, 0.8, 0.7]]),
        "labels": torch.zeros(1, 3, dtype=torch.int64),
    }
    labelled = [{"boxes": box[[0, 2]], "labels": torch.zeros(2, dtype=torch.int64)}]
    value = task.quality(network(**leaves), data(labelled, [1])).value
    assert value == pytest.approx((51 * 1 + 50 * 2 / 3) / 101, abs=1e-6)  # 101 recalls, 0 to 1
    # a box that is off by two of ten pixels: IoU 8 / 12 counts at 0.5, 0.55, 0.6 and 0.65 of ten thresholds
    off = [{"boxes": box[[0]] + torch.tensor([2.0, 0, 2.0, 0]), "labels": torch.zeros(1, dtype=torch.int64)}]
    one = {name: leaf[:, :1] for name, leaf in leaves.items()}
    assert task.quality(network(**one), data(off, [1])).value == pytest.approx(0.4, abs=1e-6)
    half = average_precision(corners, (0.5,))(network(**one), data(off, [1]))
    assert (half.metric, half.value) == ("mAP at IoU 0.5", pytest.approx(1))
    with pytest.raises(DataError, match="no image is labelled with a box"):
        task.quality(network(**one), data([{"boxes": torch.zeros(0, 4), "labels": torch.zeros(0)}], [1]))


def fails(leaves: Mapping[str, Tensor]) -> Any:
    raise ValueError("no such leaf")


@pytest.mark.parametrize(
    ("decode", "words"),
    [
        (None, "needs decode"),
        (
            fails,
            r"fails \(.*test_detection.py, line \d+\), given as decode, raises ValueError: no such leaf, at .*py:\d+",
        ),
        (lambda leaves: None, "answers with a NoneType, expected a list of 6 dicts"),
        (lambda leaves: corners(leaves)[:2], "answers with a list of 2, expected a list of 6"),
        (lambda leaves: [{"boxes": None}] * 6, "an image with boxes, expected a dict of boxes, scores, labels"),
        (lambda leaves: [{**image, "scores": torch.zeros(3)} for image in corners(leaves)], r"scores \[3\]"),
        (lambda leaves: [{**image, "scores": image["scores"] / 0} for image in corners(leaves)], "not finite"),
    ],
)
def test_a_decoder_that_goes_wrong_is_named(decode: Any, words: str) -> None:
    dense = boxes_of(6, 4)
    with pytest.raises(TaskError, match=words):
        task_named("detection", dense=network(**dense), decode=decode).quality(network(**dense), unlabelled([6]))


def test_targets_of_a_detector_are_boxes() -> None:
    dense = boxes_of(6, 4)
    task = task_named("detection", decode=corners)
    with pytest.raises(DataError, match="list of dicts"):
        task.quality(network(**dense), data(torch.arange(6), [6]))
    with pytest.raises(ModelError, match="reference"):
        task.says(corners(dense)[0], None)
