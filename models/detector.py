"""Anchor-free detector (FCOS, Tian et al. 2019) on two levels in plain PyTorch: [N, C, H, W], H and W whole eighths.

Answers for every level [N, classes, h, w] logits of classes, [N, 4, h, w] distances in pixels from the centre of a cell
to the left, top, right and bottom of its box, and [N, 1, h, w] logits of how central the cell is. Knows nothing of
pruning; `compressor/device/decoding.py` makes boxes of the answer.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional as F

STRIDES = (4, 8)  # pixels from cell to cell, of each level
RARE = 0.01  # share of cells that hold an object, as the untrained network takes it
BOX_CELLS = 2.0  # and how far a box reaches to each side of a cell


class Stage(nn.Module):
    """Half the resolution, then a residual block."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.halve = nn.Conv2d(inputs, outputs, 3, 2, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(outputs)
        self.conv1 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn(self.halve(x)))
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + x)


class Tower(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.conv2(F.relu(self.conv1(x))))


class Head(nn.Module):
    """Shared by all levels, as in the paper, so that it has no batch statistics."""

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        self.class_tower, self.box_tower = Tower(width), Tower(width)
        self.scores = nn.Conv2d(width, classes, 3, padding=1)
        self.boxes = nn.Conv2d(width, 4, 3, padding=1)
        self.centerness = nn.Conv2d(width, 1, 3, padding=1)
        for layer, bias in ((self.scores, math.log(RARE / (1 - RARE))), (self.boxes, BOX_CELLS)):
            nn.init.normal_(layer.weight, std=0.01)
            nn.init.constant_(layer.bias, bias)

    def forward(self, x: Tensor, stride: int) -> tuple[Tensor, Tensor, Tensor]:
        located = self.box_tower(x)
        distances = F.softplus(self.boxes(located)) * stride  # nowhere flat, unlike ReLU: a box can't be lost
        return self.scores(self.class_tower(x)), distances, self.centerness(located)


class Detector(nn.Module):
    def __init__(self, widths: Sequence[int], width: int, channels: int, classes: int) -> None:
        """`widths` of the stem and of the two stages with the strides of the levels; `width` of the levels."""
        super().__init__()
        stem, fine, coarse = widths
        self.stem = nn.Conv2d(channels, stem, 3, 2, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(stem)
        self.fine = Stage(stem, fine)
        self.coarse = Stage(fine, coarse)
        self.lateral = nn.ModuleList(nn.Conv2d(inputs, width, 1) for inputs in (fine, coarse))
        self.smooth = nn.Conv2d(width, width, 3, padding=1)
        self.head = Head(width, classes)

    def forward(self, x: Tensor) -> dict[str, list[Tensor]]:
        fine = self.fine(F.relu(self.bn(self.stem(x))))
        coarse = self.lateral[1](self.coarse(fine))
        enlarged = F.interpolate(coarse, scale_factor=2.0, mode="nearest")
        levels = self.smooth(self.lateral[0](fine) + enlarged), coarse
        answers = [self.head(level, stride) for level, stride in zip(levels, STRIDES, strict=True)]
        scores, boxes, centerness = (list(leaves) for leaves in zip(*answers, strict=True))
        return {"scores": scores, "boxes": boxes, "centerness": centerness}


def digits_detector() -> Detector:
    """For digits on grey 64 x 64 pixel canvases: 0.38 million parameters, cells of 4 and of 8 pixels."""
    return Detector((24, 48, 96), width=48, channels=1, classes=10)
