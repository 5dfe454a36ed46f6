"""Trains the embedded U-Net and detector on canvases of digits and writes their checkpoints and rows of index.json.

    python models/train_canvases.py [digits-unet] [digits-detector]

Sees canvases of the scans in `digits:training` alone, new ones every epoch; those of held-out scans serve once, for
the figures in the index. No early stopping, no choice among checkpoints. Same seed, same machine: same weights.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from assignment import loss as detector_loss
from assignment import wanted
from checkpoints import prepared_as, record, saved
from detector import STRIDES, digits_detector
from measures import COCO_OVERLAPS, average_precision, mean_iou
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from unet import digits_unet

from compressor.device.decoding import decode_dense
from compressor.inputs.canvases import CLASSES, COUNTS, SIDE_PX, Canvases, digit_canvases
from compressor.inputs.images import Preprocessing, normalised
from compressor.inputs.sources import load_images
from compressor.tensors import named_leaves

PREPROCESSING = Preprocessing((SIDE_PX, SIDE_PX), (SIDE_PX,), "bilinear", (0.196,), (0.177,))
BATCH = 32
EMA_DECAY = 0.99
DETECTION: dict[str, Any] = {"strides": STRIDES, "threshold": 0.05, "iou": 0.5, "most": 100}
EVALUATION_SEED = 0

Indices = Tensor  # int64 [batch], of canvases


@dataclass(frozen=True, slots=True)
class Course:
    """How one model is trained; epoch e sees the canvases of seed `seed` + e.

    `loss` takes an answer, the canvases and which of them were shown; `figures` are of canvases never trained on.
    `decode` is how boxes are made of the answer, as the index says it.
    """

    build: Callable[[], nn.Module]
    architecture: str
    loss: Callable[[Any, Canvases, Indices], Tensor]
    figures: Callable[[nn.Module, Canvases], dict[str, float]]
    epochs: int
    rate: float
    weight_decay: float = 0.02
    most_gradient: float = math.inf  # norm over all parameters
    seed: int = 0
    decode: dict[str, Any] | None = None


def masks_loss(logits: Tensor, canvases: Canvases, shown: Indices) -> Tensor:
    return F.cross_entropy(logits, torch.from_numpy(canvases.masks[shown.numpy()]))


def boxes_loss(answer: dict[str, list[Tensor]], canvases: Canvases, shown: Indices) -> Tensor:
    boxes = [torch.from_numpy(canvases.boxes[i]) for i in shown.tolist()]
    labels = [torch.from_numpy(canvases.labels[i]) for i in shown.tolist()]
    return detector_loss(answer, wanted(boxes, labels, STRIDES, SIDE_PX))


def masks_figures(model: nn.Module, canvases: Canvases) -> dict[str, float]:
    predicted = np.concatenate([answer.argmax(1).numpy() for answer in answers(model, canvases)])
    return {
        "mean_iou": mean_iou(predicted, canvases.masks, CLASSES),
        "pixels": float((predicted == canvases.masks).mean()),
    }


def boxes_figures(model: nn.Module, canvases: Canvases) -> dict[str, float]:
    detections = []
    for answer in answers(model, canvases):
        leaves = {name: leaf.numpy() for name, leaf in named_leaves(answer).items()}
        detections += decode_dense(leaves, **DETECTION)
    precisions = [average_precision(detections, canvases.boxes, canvases.labels, iou) for iou in COCO_OVERLAPS]
    return {"map50": precisions[0], "map50_95": float(np.mean(precisions))}


COURSES = {
    "digits-unet": Course(
        digits_unet,
        "U-Net, widths 16/32/64/96, transposed convolutions, 1x64x64 input, 11 classes a pixel",
        masks_loss,
        masks_figures,
        epochs=12,
        rate=6e-3,
    ),
    "digits-detector": Course(
        digits_detector,
        "FCOS-like detector, strides 4 and 8, shared head, 1x64x64 input, 10 classes",
        boxes_loss,
        boxes_figures,
        epochs=24,
        rate=2e-3,
        most_gradient=5.0,
        decode={"kind": "dense", "parameters": DETECTION},
    ),
}


def shown_to(model: nn.Module, images: np.ndarray[Any, np.dtype[np.uint8]]) -> Any:
    """What the model answers to uint8 images [N, 64, 64]; channels last is the faster on CPUs."""
    x = normalised(torch.from_numpy(images)[:, None], PREPROCESSING)
    return model(x.to(memory_format=torch.channels_last))


@torch.no_grad()
def answers(model: nn.Module, canvases: Canvases) -> Iterator[Any]:
    for start in range(0, len(canvases), BATCH):
        yield shown_to(model, canvases.images[start : start + BATCH])


def train(course: Course) -> nn.Module:
    """The exponential moving average of the weights (and batch statistics) after the last epoch."""
    torch.manual_seed(course.seed)
    model = course.build().to(memory_format=torch.channels_last)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(EMA_DECAY), use_buffers=True)
    count = COUNTS["training"]
    steps = course.epochs * (count // BATCH)
    optimizer = torch.optim.AdamW(model.parameters(), lr=course.rate, weight_decay=course.weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, course.rate, total_steps=steps)
    model.train()
    for epoch in range(course.epochs):
        canvases = digit_canvases("training", count, course.seed + epoch)
        for shown in torch.arange(count).split(BATCH)[: count // BATCH]:  # canvases come in no order
            loss = course.loss(shown_to(model, canvases.images[shown.numpy()]), canvases, shown)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), course.most_gradient)
            optimizer.step()
            schedule.step()
            average.update_parameters(model)
        print(f"epoch {epoch + 1}/{course.epochs}: loss {loss.item():.3f}", flush=True)
    return average.module.eval()


def entry(name: str, course: Course, model: nn.Module) -> dict[str, object]:
    """What index.json says of one checkpoint, just written."""
    canvases = digit_canvases("evaluation", COUNTS["evaluation"], EVALUATION_SEED)
    figures = {metric: round(value, 4) for metric, value in course.figures(model, canvases).items()}
    scans = {part: load_images(f"digits:{part}") for part in ("training", "evaluation")}
    return {
        **saved(name, model, course.build),
        "architecture": course.architecture,
        "preprocessing": prepared_as(PREPROCESSING),
        "accuracy": {**figures, "n": len(canvases)},
        "training": {
            "command": f"python models/train_canvases.py {name}",
            "seed": course.seed,
            "epochs": course.epochs,
            "images": course.epochs * COUNTS["training"],
            "training_hash": scans["training"].content_hash(),
            "evaluation_hash": scans["evaluation"].content_hash(),
        },
        "licence": "Apache-2.0",
        **({"decode": course.decode} if course.decode else {}),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", default=list(COURSES), help=f"of {', '.join(COURSES)}")
    names = parser.parse_args().names
    torch.set_num_threads(1)
    for name in names:
        started = time.monotonic()
        model = train(COURSES[name])
        described = entry(name, COURSES[name], model)
        print(f"{name}: {described['accuracy']} in {time.monotonic() - started:.0f} s", flush=True)
        record(name, described)


if __name__ == "__main__":
    main()
