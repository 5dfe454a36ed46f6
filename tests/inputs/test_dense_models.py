"""The embedded U-Net and detector: their answers' shapes, and figures derived anew on canvases they never saw."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from compressor.device.decoding import Detections, decode_dense
from compressor.files import file_sha256
from compressor.inputs import models
from compressor.inputs.canvases import CLASSES, COUNTS, Canvases, digit_canvases
from compressor.inputs.images import normalised
from compressor.inputs.models import Model, load_model
from compressor.tensors import named_leaves

INDEX = json.loads((models.EMBEDDED / "index.json").read_text())
NAMES = ("digits-unet", "digits-detector")
STRIDES = (4, 8)
EMBEDDED_BYTES = 2_000_000
COUNT = 64
MEAN_IOU_FLOOR = 0.90
MAP50_FLOOR = 0.95
ROUNDED = 5e-4  # the index has four decimals; another processor's sums move single pixels and cells


@pytest.fixture(scope="module")
def canvases() -> Canvases:
    return digit_canvases("evaluation", COUNT, seed=0)


@torch.no_grad()
def answer(model: Model, images: Any) -> dict[str, Tensor]:
    assert model.preprocessing is not None
    pixels = torch.from_numpy(images)[:, None]
    return named_leaves(model.module(normalised(pixels, model.preprocessing)))


def detections(model: Model, images: Any) -> list[Detections]:
    leaves = {name: leaf.numpy() for name, leaf in answer(model, images).items()}
    return decode_dense(leaves, strides=STRIDES, threshold=0.05, iou=0.5, most=100)


def mean_iou(predicted: Any, masks: Any) -> float:
    shares = []
    for label in range(CLASSES):
        there, said = masks == label, predicted == label
        shares.append((there & said).sum() / (there | said).sum())
    return float(np.mean(shares))


def map50(found: list[Detections], canvases: Canvases) -> float:
    """COCO's average precision at an overlap of one half, detection by detection."""
    precisions = []
    for label in range(10):
        ranked = [
            (float(score), image, tuple(map(float, box)))
            for image, detected in enumerate(found)
            for box, score, said in zip(detected["boxes"], detected["scores"], detected["labels"], strict=True)
            if said == label
        ]
        free = [
            [box for box, there in zip(boxes.tolist(), labels, strict=True) if there == label]
            for boxes, labels in zip(canvases.boxes, canvases.labels, strict=True)
        ]
        precisions.append(precision_of(sorted(ranked, reverse=True), free))
    return float(np.mean(precisions))


def precision_of(ranked: list[tuple[float, int, tuple[float, ...]]], free: list[list[Any]]) -> float:
    count = sum(map(len, free))
    hits = 0
    points = []  # recall and precision after each detection
    for place, (_, image, box) in enumerate(ranked, start=1):
        best = max(free[image], key=lambda there: iou(box, there), default=None)
        if best is not None and iou(box, best) >= 0.5:
            free[image].remove(best)
            hits += 1
        points.append((hits / count, hits / place))
    at_recalls = [
        max((precision for recall, precision in points if recall >= r / 100), default=0.0) for r in range(101)
    ]
    return float(np.mean(at_recalls))


def iou(first: Any, second: Any) -> float:
    width = min(first[2], second[2]) - max(first[0], second[0])
    height = min(first[3], second[3]) - max(first[1], second[1])
    shared = max(width, 0) * max(height, 0)
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (first, second)]
    return float(shared / (sum(areas) - shared))


@pytest.mark.parametrize("name", NAMES)
def test_dense_models_are_what_the_index_says(name: str) -> None:
    entry, model = INDEX["models"][name], load_model(name)
    file = models.EMBEDDED / entry["file"]
    assert file_sha256(file) == entry["sha256"]
    assert file.stat().st_size <= EMBEDDED_BYTES
    assert 300_000 <= sum(p.numel() for p in model.module.parameters()) == entry["parameters"] <= 500_000


def test_the_unet_answers_classes_of_pixels(canvases: Canvases) -> None:
    model = load_model("digits-unet")
    assert {name: tuple(leaf.shape) for name, leaf in answer(model, canvases.images[:3]).items()} == {
        "output": (3, CLASSES, 64, 64)
    }
    assert model.module(torch.zeros(1, 1, 32, 48)).shape == (1, CLASSES, 32, 48)


def test_the_detector_answers_several_leaves(canvases: Canvases) -> None:
    leaves = answer(load_model("digits-detector"), canvases.images[:3])
    assert {name: tuple(leaf.shape) for name, leaf in leaves.items()} == {
        "scores.0": (3, 10, 16, 16),
        "scores.1": (3, 10, 8, 8),
        "boxes.0": (3, 4, 16, 16),
        "boxes.1": (3, 4, 8, 8),
        "centerness.0": (3, 1, 16, 16),
        "centerness.1": (3, 1, 8, 8),
    }
    assert min(float(leaves[name].min()) for name in ("boxes.0", "boxes.1")) >= 0


def test_the_unet_tells_digits_apart_pixel_by_pixel(canvases: Canvases) -> None:
    predicted = answer(load_model("digits-unet"), canvases.images)["output"].argmax(1).numpy()
    assert mean_iou(predicted, canvases.masks) >= MEAN_IOU_FLOOR


def test_the_detector_finds_the_digits(canvases: Canvases) -> None:
    assert map50(detections(load_model("digits-detector"), canvases.images), canvases) >= MAP50_FLOOR


@pytest.mark.slow
def test_the_figures_of_the_index_are_those_of_all_canvases() -> None:
    canvases = digit_canvases("evaluation", COUNTS["evaluation"], seed=0)
    segmented = answer(load_model("digits-unet"), canvases.images)["output"].argmax(1).numpy()
    detected = detections(load_model("digits-detector"), canvases.images)
    unet, detector = (INDEX["models"][name]["accuracy"] for name in NAMES)
    assert mean_iou(segmented, canvases.masks) == pytest.approx(unet["mean_iou"], abs=ROUNDED)
    assert map50(detected, canvases) == pytest.approx(detector["map50"], abs=ROUNDED)
