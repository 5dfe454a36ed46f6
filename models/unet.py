"""U-Net (Ronneberger et al. 2015) in plain PyTorch: [N, C, H, W] to logits [N, classes, H, W], H and W whole eighths.

Every stage is two convolutions with batch normalisation; on the way up a transposed convolution doubles the
resolution and the stage of the way down with the same one is put beside it. Knows nothing of pruning.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Stage(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(x)))


class UNet(nn.Module):
    def __init__(self, widths: Sequence[int], channels: int, classes: int) -> None:
        """`widths` of the stages on the way down, the highest resolution first."""
        super().__init__()
        self.down = nn.ModuleList(map(Stage, (channels, *widths[:-1]), widths))
        pairs = list(zip(widths[:0:-1], widths[-2::-1], strict=True))  # 16, 32, 64 give (64, 32), (32, 16)
        self.enlarge = nn.ModuleList(nn.ConvTranspose2d(deep, width, 2, 2) for deep, width in pairs)
        self.up = nn.ModuleList(Stage(2 * width, width) for _, width in pairs)
        self.head = nn.Conv2d(widths[0], classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        skips = []
        for index, stage in enumerate(self.down):
            x = stage(F.max_pool2d(x, 2) if index else x)
            skips.append(x)
        for enlarge, stage, skip in zip(self.enlarge, self.up, skips[-2::-1], strict=True):
            x = stage(torch.cat([skip, enlarge(x)], dim=1))
        return self.head(x)


def digits_unet() -> UNet:
    """Four stages for grey 64 x 64 pixel canvases of digits: 0.39 million parameters, background and ten digits."""
    return UNet((16, 32, 64, 96), channels=1, classes=11)
