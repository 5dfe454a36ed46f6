"""What a source stores as an image's target in, the target on that image's crop out: masks, boxes, images, values.

Targets follow their image through the same resize and crop. Knows neither files nor batches.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from ..device.cropping import Crop, cropped
from ..device.targets import IGNORED, boxes_on_crop, mask_on_crop
from .samples import BOXES, LABELS, Target, TargetKind, has_boxes


def placed_target(
    stored: object, picture: Image.Image, *, kind: TargetKind, crop: Crop, channels: int, resampling: Image.Resampling
) -> Target:
    """What is `stored` for a picture, on its crop. Raises TypeError or ValueError for what is no target of that kind.

    `channels` and `resampling` are of an image as target, which has the input's. A mask is uint8 or int32 [h, w], which
    take less memory between passes than int64, and 255 outside of the picture; an image uint8 [C, f h, f w], f times
    as large as the picture, with f a whole number.
    """
    match kind:
        case "mask":
            return _mask(stored, picture, crop)
        case "boxes":
            return _boxes(stored, picture, crop)
        case "image":
            target = _enlarged_picture(stored, picture).convert("L" if channels == 1 else "RGB")
            return pixels_of(cropped(target, crop.enlarged(target.width // picture.width), resampling))
        case _:
            return values_of(stored)


def values_of(stored: object) -> Tensor:
    """Numbers of any shape: floats as float32, everything else as int64."""
    tensor = stored.detach().cpu() if isinstance(stored, Tensor) else torch.from_numpy(np.array(stored))
    return tensor.float() if tensor.is_floating_point() else tensor.long()


def on_cpu(stored: object) -> object:
    """A tensor on the CPU without its gradient, as numpy can read it; anything else as it is."""
    if isinstance(stored, Tensor):
        return stored.detach().cpu()
    return stored


def _mask(stored: object, picture: Image.Image, crop: Crop) -> Tensor:
    indices = mask_on_crop(on_cpu(stored), picture, crop)  # [h, w]
    if indices.max(initial=0) <= IGNORED:
        indices = indices.astype(np.uint8)
    return torch.from_numpy(indices)


def _boxes(stored: object, picture: Image.Image, crop: Crop) -> dict[str, Tensor]:
    """Of {"boxes": x0 y0 x1 y1 in pixels of the picture, "labels"}; a box without a pixel on the crop is left out."""
    if not isinstance(stored, dict) or not has_boxes(stored):
        raise TypeError(f"its target is a {type(stored).__name__}, expected a dict of 'boxes' and 'labels'")
    boxes, labels = boxes_on_crop(stored[BOXES], stored[LABELS], picture, crop)
    return {BOXES: torch.from_numpy(boxes), LABELS: torch.from_numpy(labels)}


def _enlarged_picture(stored: object, picture: Image.Image) -> Image.Image:
    """The target itself, where it has a whole multiple of the picture's rows and columns."""
    if not isinstance(stored, Image.Image):
        raise TypeError(f"its target is a {type(stored).__name__}, expected an image")
    factor = stored.width // picture.width
    if factor < 1 or stored.size != (factor * picture.width, factor * picture.height):
        raise ValueError(
            f"its target has {stored.width} x {stored.height} pixels, expected a whole multiple of the image's "
            f"{picture.width} x {picture.height}"
        )
    return stored


def picture_of(pixels: NDArray[np.uint8]) -> Image.Image:
    """PIL's image of [H, W, C] with C 1 or 3."""
    if pixels.shape[-1] == 1:
        pixels = pixels[..., 0]  # PIL has grey without an axis for it
    return Image.fromarray(pixels)


def pixels_of(picture: Image.Image) -> Tensor:
    """A grey or RGB picture's values, uint8 [C, H, W]."""
    pixels = np.frombuffer(picture.tobytes(), np.uint8).reshape(picture.height, picture.width, -1)  # grey has one, too
    return torch.from_numpy(pixels.transpose(2, 0, 1).copy())  # numpy's copy, as threads of torch's own would add up
