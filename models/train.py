"""Trains the embedded models on scikit-learn's digits and writes their checkpoints and index.json.

    python models/train.py [digits-resnet] [digits-vit]

Sees the part `digits:training` alone; the held-out part is used once, for the accuracy in the index.
No early stopping, no choice among checkpoints. Same seed, same machine: same weights.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from checkpoints import prepared_as, record, saved
from resnet import digits_resnet
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from vit import digits_vit

from compressor.inputs.images import Images, Preprocessing, batches
from compressor.inputs.sources import load_images

PREPROCESSING = Preprocessing((16, 16), (16,), "bilinear", (0.305,), (0.376,))
BATCH = 64
SMOOTHING = 0.1
EMA_DECAY = 0.99


@dataclass(frozen=True, slots=True)
class Course:
    """How one model is trained; rotation in degrees, shift in pixels of 16."""

    build: Callable[[], nn.Module]
    architecture: str
    epochs: int
    rate: float
    weight_decay: float
    rotation: float = 12.0
    shift: float = 1.5
    scale: float = 0.12
    seed: int = 0


COURSES = {
    "digits-resnet": Course(
        digits_resnet, "ResNet-20, widths 16/32/64, strided 1x1 projections, 1x16x16 input", 100, 4e-3, 0.02
    ),
    "digits-vit": Course(
        digits_vit, "ViT, 4 blocks, 4 heads, width 96, patch 4, class token, 1x16x16 input", 120, 1.5e-3, 0.05
    ),
}


def augmented(x: Tensor, course: Course, generator: torch.Generator) -> Tensor:
    """Rotated, scaled and shifted at random, each image by itself; the background is carried on at the edges."""
    n = len(x)

    def uniform(limit: float) -> Tensor:
        return (torch.rand(n, generator=generator) * 2 - 1) * limit

    angle, scale = uniform(math.radians(course.rotation)), 1 + uniform(course.scale)
    move = 2 * course.shift / x.shape[-1]
    theta = torch.stack(
        [scale * angle.cos(), -angle.sin(), uniform(move), angle.sin(), scale * angle.cos(), uniform(move)], dim=1
    ).view(n, 2, 3)
    grid = F.affine_grid(theta, list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, padding_mode="border", align_corners=False)


def train(course: Course, images: Images) -> nn.Module:
    """The exponential moving average of the weights (and batch statistics) after the last epoch."""
    torch.manual_seed(course.seed)
    generator = torch.Generator().manual_seed(course.seed)
    model = course.build()
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(EMA_DECAY), use_buffers=True)
    data = batches(images, BATCH)
    optimizer = torch.optim.AdamW(model.parameters(), lr=course.rate, weight_decay=course.weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, course.rate, total_steps=course.epochs * len(data))
    for epoch in range(course.epochs):
        model.train()
        for x, y in data.shuffled(course.seed + epoch):
            loss = F.cross_entropy(model(augmented(x, course, generator)), y, label_smoothing=SMOOTHING)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            average.update_parameters(model)
        if epoch % 10 == 9:
            print(f"epoch {epoch + 1}/{course.epochs}: loss {loss.item():.3f}", flush=True)
    return average.module.eval()


@torch.no_grad()
def correct(model: nn.Module, images: Images) -> int:
    return sum(int((model(x).argmax(1) == y).sum()) for x, y in batches(images, 256))


def entry(name: str, course: Course, model: nn.Module, held_out: Images, training: Images) -> dict[str, object]:
    """What index.json says of one checkpoint, just written."""
    right = correct(model, held_out)
    return {
        **saved(name, model, course.build),
        "architecture": course.architecture,
        "preprocessing": prepared_as(PREPROCESSING),
        "accuracy": {"correct": right, "n": len(held_out), "top1": round(right / len(held_out), 4)},
        "training": {
            "command": f"python models/train.py {name}",
            "seed": course.seed,
            "epochs": course.epochs,
            "images": len(training),
            "training_hash": training.content_hash(),
            "evaluation_hash": held_out.content_hash(),
        },
        "licence": "Apache-2.0",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", default=list(COURSES), help=f"of {', '.join(COURSES)}")
    names = parser.parse_args().names
    torch.set_num_threads(1)
    training, held_out = (load_images(f"digits:{part}").prepared(PREPROCESSING) for part in ("training", "evaluation"))
    for name in names:
        started = time.monotonic()
        model = train(COURSES[name], training)
        described = entry(name, COURSES[name], model, held_out, training)
        print(f"{name}: {described['accuracy']} in {time.monotonic() - started:.0f} s", flush=True)
        record(name, described)


if __name__ == "__main__":
    main()
