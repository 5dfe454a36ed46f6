"""How good boxes are: a user's `decode` makes them of the leaves; labels or the dense network's boxes are the truth.

Boxes are [k, 4], x0 y0 x1 y1 in pixels. Mean average precision is COCO's (Lin et al. 2014, pycocotools by way of
torchmetrics); without labels the figure is the F1 of matched boxes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..device.intervals import bootstrap, jackknife
from ..distributed import joined_over_ranks
from ..errors import DataError, MissingPackageError, TaskError
from ..records import FloatArray, IntArray, Quality
from ..tensors import Inputs, count
from .calling import call, place_of
from .qualities import rows_of
from .record import Boxes, Data, Decode, Judge, Leaves, Predict, Targets

CONFIDENT = 0.25  # a dense box that scores less is no answer to be held to
MATCHED = 0.5  # intersection over union from which two boxes are one

Image = dict[str, Tensor]  # boxes [k, 4], labels [k] and, of predictions, scores [k]


def decoded(decode: Decode | None, leaves: Leaves, samples: int) -> list[Image]:
    """Each image's boxes, checked and on the CPU. Raises TaskError where `decode` fails or answers otherwise."""
    if decode is None:
        raise TaskError(
            "judging a detector needs decode(leaves), which gives one dict of boxes [k, 4], scores [k] and labels [k] "
            "an image; say decode=..., or task='any' to compare the leaves with the dense network's"
        )
    answer = call(decode, "decode", leaves)
    who = f"{place_of(decode)}, given as decode,"
    if not isinstance(answer, Sequence) or len(answer) != samples:
        size = f" of {len(answer)}" if isinstance(answer, Sequence) else ""
        raise TaskError(
            f"{who} answers with a {type(answer).__name__}{size}, expected a list of {samples} dicts, one an image"
        )
    return [_checked(image, ("boxes", "scores", "labels"), who) for image in answer]


def _checked(image: object, keys: tuple[str, ...], who: str) -> Image:
    """One image's tensors, as many rows in each, `keys` being boxes first. Raises TaskError in the name of `who`."""
    tensors = _tensors_in(image, keys, who)
    boxes = tensors["boxes"].double()
    if not boxes.numel():
        boxes = boxes.reshape(-1, 4)
    rows = boxes.shape[:1]
    has_one_each = all(tensors[key].shape == rows for key in keys[1:])
    if boxes.shape != (*rows, 4) or not has_one_each:
        listed = ", ".join(f"{key} {list(values.shape)}" for key, values in tensors.items())
        raise TaskError(f"{who} has an image of {listed}, expected boxes [k, 4] and the others [k]")
    if not all(values.double().isfinite().all() for values in tensors.values()):
        raise TaskError(f"{who} has a box or a score that is not finite")
    if bool((tensors["labels"].double() % 1).any()):
        raise TaskError(f"{who} has labels that are no whole numbers")
    return {**tensors, "boxes": boxes}


def _tensors_in(image: object, keys: tuple[str, ...], who: str) -> Image:
    """An image's entries as tensors on the CPU. Raises TaskError for what is no dict of them."""
    expected = f"expected a dict of {', '.join(keys)}"
    if not isinstance(image, Mapping):
        raise TaskError(f"{who} has an image ({type(image).__name__}), {expected}")
    if not image.keys() >= set(keys):
        raise TaskError(f"{who} has an image with {', '.join(map(str, image))}, {expected}")
    try:
        return {key: torch.as_tensor(image[key]).detach().cpu() for key in keys}
    except (TypeError, ValueError, RuntimeError) as error:
        kinds = ", ".join(f"{key} ({type(image[key]).__name__})" for key in keys)
        raise TaskError(f"{who} has an image of {kinds}, expected tensors of numbers") from error


def average_precision(decode: Decode | None, thresholds: Sequence[float] | None = None) -> Judge:
    """A judge: mean average precision over labels and over IoU thresholds, 0.5 to 0.95 in steps of 0.05 by default.

    The 95 % interval is the jackknife's over ten blocks of images. Raises DataError where no image has a box.
    """
    metric = "mAP"
    if thresholds is not None:
        metric = f"mAP at IoU {', '.join(f'{threshold:g}' for threshold in thresholds)}"

    def quality(predict: Predict, data: Data) -> Quality:
        predictions, truths = _boxes_of(decode, predict, data)
        if not any(_box_counts(truths)):
            raise DataError("no image is labelled with a box; mean average precision needs some")

        def figure(indices: IntArray) -> float:
            return _coco_average([predictions[i] for i in indices], [truths[i] for i in indices], thresholds)

        value = figure(np.arange(len(truths)))
        low, high = jackknife(figure, len(truths), value)
        return Quality(metric, value, len(truths), low, high, chance=0.0)

    return quality


def _box_counts(images: Sequence[Image]) -> list[int]:
    return [len(image["boxes"]) for image in images]


@torch.no_grad()
def _boxes_of(decode: Decode | None, predict: Predict, data: Data) -> tuple[list[Image], list[Image]]:
    """Predictions and labels of all images of all ranks, in the ranks' order."""
    predictions: list[Image] = []
    truths: list[Image] = []
    for inputs, targets in data:
        if targets is None or isinstance(targets, Tensor):
            raise DataError("a detector's targets are a list of dicts of boxes [k, 4] and labels [k], one an image")
        if len(targets) != count(inputs):
            raise DataError(f"there are targets for {len(targets)} images of a batch of {count(inputs)}")
        predictions += decoded(decode, predict(inputs), count(inputs))
        truths += [_checked(image, ("boxes", "labels"), "the data") for image in targets]
    if not truths:
        raise DataError("there are no images to judge the answers of; expected at least one batch")
    return _over_ranks(predictions), _over_ranks(truths)


def _over_ranks(images: Sequence[Image]) -> list[Image]:
    """Every rank's images, one behind the other."""
    keys = list(images[0])
    flat: dict[str, FloatArray] = {}
    for key in keys:
        flat[key] = torch.cat([image[key].double() for image in images]).numpy()
    flat["count"] = np.array(_box_counts(images), np.float64)
    joined = joined_over_ranks(flat)
    ends = np.cumsum(joined["count"].astype(np.int64))[:-1]
    columns = [map(torch.from_numpy, np.split(joined[key], ends)) for key in keys]  # of each key, image by image
    return [dict(zip(keys, tensors, strict=True)) for tensors in zip(*columns, strict=True)]


def _coco_average(predictions: Sequence[Image], truths: Sequence[Image], thresholds: Sequence[float] | None) -> float:
    steps = None if thresholds is None else list(thresholds)
    metric = _coco_metric()(iou_type="bbox", iou_thresholds=steps, sync_on_compute=False)
    metric.warn_on_many_detections = False
    metric.update(list(map(_for_coco, predictions)), list(map(_for_coco, truths)))
    value = float(metric.compute()["map"])
    return value if value >= 0 else float("nan")  # -1 stands for no labelled box


def _for_coco(image: Image) -> Image:
    floats = {key: values.float() for key, values in image.items()}
    return {**floats, "labels": image["labels"].long()}


def _coco_metric() -> Callable[..., Any]:
    """torchmetrics takes a second to import, and only this figure needs it."""
    try:
        import pycocotools.coco
        from torchmetrics.detection import MeanAveragePrecision
    except ImportError as error:
        raise MissingPackageError(
            "mean average precision of boxes needs torchmetrics and pycocotools; pip install torchmetrics pycocotools"
        ) from error
    assert pycocotools.coco
    metric: Callable[..., Any] = MeanAveragePrecision
    return metric


def matched_f1(decode: Decode | None) -> Callable[[Predict, Predict, Data], Quality]:
    """F1 of boxes matched with the dense network's: 2 matches over boxes of both.

    Boxes score 0.25 or more in both. A match has the same label and an IoU of at least 0.5, the best first. The
    interval is the bootstrap's over images. Raises DataError where the dense network finds nothing.
    """

    def quality(predict: Predict, dense_predict: Predict, data: Data) -> Quality:
        def measure(inputs: Inputs, targets: Targets) -> Mapping[str, Tensor]:
            ours = list(map(_confident, decoded(decode, predict(inputs), count(inputs))))
            theirs = list(map(_confident, decoded(decode, dense_predict(inputs), count(inputs))))
            return {
                "matches": torch.tensor(list(map(matches, ours, theirs))),
                "ours": torch.tensor(_box_counts(ours)),
                "theirs": torch.tensor(_box_counts(theirs)),
            }

        rows = rows_of(data, measure)
        if not rows["theirs"].any():
            raise DataError(
                f"the dense network finds no box that scores {CONFIDENT:g} or more; give labels, or quality=..."
            )

        def figure(counts: FloatArray) -> float:
            boxes = counts @ (rows["ours"] + rows["theirs"])
            if not boxes:
                return float("nan")
            return float(2 * (counts @ rows["matches"]) / boxes)

        value = figure(np.ones(len(rows["ours"])))
        low, high = bootstrap(figure, len(rows["ours"]), value)
        return Quality("box F1 to dense", value, len(rows["ours"]), low, high, chance=0.0)

    return quality


def _confident(image: Image) -> Image:
    """Boxes with an area and a score."""
    sides = image["boxes"][:, 2:] - image["boxes"][:, :2]
    kept = (image["scores"] >= CONFIDENT) & (sides > 0).all(1)
    return {key: values[kept] for key, values in image.items()}


def matches(image: Boxes, dense: Boxes) -> int:
    """How many pairs of boxes are one, the pair of the largest IoU first; each box is in one pair at most."""
    overlaps = box_iou(image["boxes"], dense["boxes"])  # [k, m]
    overlaps = torch.where(image["labels"][:, None] == dense["labels"][None], overlaps, 0.0)  # of one label alone
    matched = 0
    while overlaps.numel() and float(overlaps.max()) >= MATCHED:
        row, column = divmod(int(overlaps.argmax()), overlaps.shape[1])  # argmax 7 of [3, 4] is row 1, column 3
        overlaps[row, :] = 0.0
        overlaps[:, column] = 0.0
        matched += 1
    return matched


def box_iou(boxes: Tensor, others: Tensor) -> Tensor:
    """[k, m] intersection over union of [k, 4] and [m, 4], all with an area."""
    corner = torch.maximum(boxes[:, None, :2], others[None, :, :2])  # [k, m, 2]
    end = torch.minimum(boxes[:, None, 2:], others[None, :, 2:])
    overlap = (end - corner).clamp(min=0).prod(2)  # [k, m]; apart in one direction is no overlap
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(1)[:, None] + (others[:, 2:] - others[:, :2]).prod(1)[None]
    return overlap / (areas - overlap)
