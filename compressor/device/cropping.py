"""The size of a picture in, where its crop lies out; pictures and boxes moved there alike.

An image, its mask and its boxes go through one `Crop`, so that they stay on each other. Knows no pre-processing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from PIL import Image


@dataclass(frozen=True, slots=True)
class Crop:
    """A picture is resized to (height, width), then `size` (height, width) is cut out from row `top`, column `left`.

    All in pixels. Below zero the crop starts outside of the picture.
    """

    height: int
    width: int
    top: int
    left: int
    size: tuple[int, int]

    def enlarged(self, factor: int) -> Crop:
        """The same part of a picture with `factor` times as many rows and columns."""
        height, width = self.size
        return Crop(
            factor * self.height,
            factor * self.width,
            factor * self.top,
            factor * self.left,
            (factor * height, factor * width),
        )


def crop_of(picture: Image.Image, size: tuple[int, int], resize: Sequence[int]) -> Crop:
    """The centred crop of that `size`; `resize` of one entry is the shorter side before it, of two both sides."""
    height, width = (resize[0], resize[1]) if len(resize) == 2 else _shorter_side(picture, resize[0])
    return Crop(height, width, _margin(height, size[0]), _margin(width, size[1]), size)


def _shorter_side(picture: Image.Image, length: int) -> tuple[int, int]:
    """500 x 375 with the shorter side at 256 is 341 x 256: the longer side is cut off, not rounded."""
    if picture.height <= picture.width:
        return length, int(length * picture.width / picture.height)
    return int(length * picture.height / picture.width), length


def _margin(length: int, crop: int) -> int:
    """Where a centred crop starts; below zero where it is larger than the image and its rim stays black."""
    return round((length - crop) / 2) if crop <= length else -((crop - length) // 2)


def cropped(picture: Image.Image, crop: Crop, resampling: Image.Resampling) -> Image.Image:
    """The picture resized and cut; what lies outside of it is zero."""
    if (picture.height, picture.width) != (crop.height, crop.width):
        picture = picture.resize((crop.width, crop.height), resampling)  # PIL says width first
    height, width = crop.size
    if (crop.height, crop.width) != crop.size:
        picture = picture.crop((crop.left, crop.top, crop.left + width, crop.top + height))
    return picture


def moved_boxes(boxes: NDArray[np.float32], picture: Image.Image, crop: Crop) -> NDArray[np.float32]:
    """Boxes [k, 4] as they lie on the crop: x0 y0 x1 y1, of pixels of the picture before and of the crop then.

    They are cut off at its rim, and empty beyond it.
    """
    height, width = crop.size
    scale = np.array([crop.width / picture.width, crop.height / picture.height] * 2, np.float32)
    moved = boxes * scale - np.array([crop.left, crop.top] * 2, np.float32)
    inside: NDArray[np.float32] = np.clip(moved, 0, np.array([width, height] * 2, np.float32))
    return inside
