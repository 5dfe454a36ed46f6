"""What a source stores as an image's target in, the target on that image's crop out: masks, boxes, images, values.

Targets follow their image through the same resize and crop. Knows neither files nor batches.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from .cropping import Crop, cropped, moved_boxes
from .samples import BOXES, IGNORED, LABELS, Target, TargetKind

INDEX_MODES = ("P", "L", "1", "I")  # of pictures whose values are class indices
_MOST_INDEX = 65_535  # a mask with more holds something else


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


def _mask(stored: object, picture: Image.Image, crop: Crop) -> Tensor:
    mask = _index_picture(stored)
    if mask.size != picture.size:
        raise ValueError(
            f"its mask has {mask.width} x {mask.height} pixels, the image {picture.width} x {picture.height}"
        )
    indices = np.array(cropped(mask, crop, Image.Resampling.NEAREST), dtype=np.int32)  # [h, w]
    outside = np.ones(crop.size, dtype=bool)
    outside[max(0, -crop.top) : crop.height - crop.top, max(0, -crop.left) : crop.width - crop.left] = False
    indices[outside] = IGNORED
    return torch.from_numpy(indices.astype(np.uint8) if indices.max(initial=0) <= IGNORED else indices)


def _index_picture(stored: object) -> Image.Image:
    """Class indices as a picture that can be resized: a PIL image in an index mode, or whole numbers [H, W]."""
    if isinstance(stored, Image.Image):
        if stored.mode not in INDEX_MODES:
            raise TypeError(f"its mask has the pixel format {stored.mode!r}, expected class indices (P or L)")
        array: NDArray[Any] = np.array(stored)
    else:
        array = np.asarray(stored.detach().cpu() if isinstance(stored, Tensor) else stored)
    if array.ndim == 3 and array.shape[0] == 1:
        array = array[0]  # [1, H, W] to [H, W]
    if array.ndim != 2 or array.dtype.kind not in "iub":
        raise TypeError(f"its mask is {array.dtype} {list(array.shape)}, expected whole numbers [H, W]")
    if array.size and not 0 <= int(array.min()) <= int(array.max()) <= _MOST_INDEX:
        raise ValueError(
            f"its mask holds values from {array.min()} to {array.max()}, expected class indices from 0 on, and 255 for "
            "what is ignored"
        )
    return Image.fromarray(array.astype(np.int32))


def _boxes(stored: object, picture: Image.Image, crop: Crop) -> dict[str, Tensor]:
    """Of {"boxes": x0 y0 x1 y1 in pixels of the picture, "labels"}; a box without a pixel on the crop is left out."""
    if not isinstance(stored, dict) or BOXES not in stored or LABELS not in stored:
        raise TypeError(f"its target is a {type(stored).__name__}, expected a dict of 'boxes' and 'labels'")
    boxes = np.asarray(stored[BOXES], dtype=np.float32).reshape(-1, 4)  # [k, 4]
    labels = np.asarray(stored[LABELS], dtype=np.int64).reshape(-1)
    if len(boxes) != len(labels):
        raise ValueError(f"it has {len(boxes)} boxes and {len(labels)} labels")
    require_boxes(torch.from_numpy(boxes))
    beyond = (boxes[:, :2] > (picture.width, picture.height)).any(1) | (boxes[:, 2:] < 0).any(1)
    if beyond.any():
        raise ValueError(
            f"it has the box {in_words(boxes[beyond][0])}, outside of {picture.width} x {picture.height} pixels; "
            "expected x0 y0 x1 y1 in pixels of the image"
        )
    moved = moved_boxes(boxes, picture, crop)
    remains = (moved[:, 2] > moved[:, 0]) & (moved[:, 3] > moved[:, 1])
    return {BOXES: torch.from_numpy(moved[remains]), LABELS: torch.from_numpy(labels[remains])}


def require_boxes(boxes: Tensor) -> None:
    """Raises ValueError for a box of [k, 4] that is not finite, or ends before it begins."""
    if not bool(boxes.isfinite().all()):
        raise ValueError("it has a box with NaN or infinity")
    turned = (boxes[:, 2:] < boxes[:, :2]).any(1)
    if bool(turned.any()):
        raise ValueError(
            f"it has the box {in_words(boxes[turned][0].numpy())}, which ends before it begins; expected x0 y0 x1 y1, "
            "not centres or sizes"
        )


def in_words(box: NDArray[np.float32]) -> str:
    """`4 1 1 4`."""
    return " ".join(f"{value:g}" for value in box.tolist())


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


def pixels_of(picture: Image.Image) -> Tensor:
    """A grey or RGB picture's values, uint8 [C, H, W]."""
    channels = len(picture.getbands())
    array = np.array(picture, dtype=np.uint8).reshape(picture.height, picture.width, channels)  # a grey one is [H, W]
    return torch.from_numpy(array).permute(2, 0, 1).contiguous()
