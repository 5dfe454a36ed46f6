"""What belongs to a picture as it is stored, the picture and its crop in; the same on that crop out: masks, boxes.

Both go through the same resize and crop as their picture, masks by the nearest pixel. Knows no file.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..records import IntArray
from .cropping import Crop, cropped, moved_boxes

if TYPE_CHECKING:
    from PIL import Image

INDEX_MODES = ("P", "L", "1", "I")  # of pictures whose values are class indices
IGNORED = 255
"""What a mask holds where a pixel counts for nothing."""
_MOST_INDEX = 65_535  # a mask with more holds something else


def mask_on_crop(stored: object, picture: Image.Image, crop: Crop) -> NDArray[np.int32]:
    """Class indices [h, w], 255 outside of the picture, of a PIL image in an index mode or whole numbers [H, W].

    Raises TypeError or ValueError for what is no mask of the picture.
    """
    from PIL import Image

    mask = _index_picture(stored)
    if mask.size != picture.size:
        raise ValueError(
            f"its mask has {mask.width} x {mask.height} pixels, the image {picture.width} x {picture.height}"
        )
    indices = np.array(cropped(mask, crop, Image.Resampling.NEAREST), dtype=np.int32)  # [h, w]
    outside = np.ones(crop.size, dtype=bool)
    outside[max(0, -crop.top) : crop.height - crop.top, max(0, -crop.left) : crop.width - crop.left] = False
    indices[outside] = IGNORED
    return indices


def _index_picture(stored: object) -> Image.Image:
    """Class indices as a picture that can be resized."""
    from PIL import Image

    if isinstance(stored, Image.Image) and stored.mode not in INDEX_MODES:
        raise TypeError(f"its mask has the pixel format {stored.mode!r}, expected class indices (P or L)")
    array: NDArray[Any] = np.asarray(stored)
    if array.shape[:-2] == (1,):
        array = array[0]  # [1, H, W] to [H, W]
    if array.ndim != 2 or array.dtype.kind not in "iub":
        raise TypeError(f"its mask is {array.dtype} {list(array.shape)}, expected whole numbers [H, W]")
    if not 0 <= int(array.min(initial=0)) <= int(array.max(initial=0)) <= _MOST_INDEX:
        raise ValueError(
            f"its mask holds values from {array.min()} to {array.max()}, expected class indices from 0 on, and 255 for "
            "what is ignored"
        )
    return Image.fromarray(array.astype(np.int32))


def boxes_on_crop(
    boxes: object, labels: object, picture: Image.Image, crop: Crop
) -> tuple[NDArray[np.float32], IntArray]:
    """Boxes [k, 4] and labels [k] of x0 y0 x1 y1 in pixels of the picture, in pixels of the crop.

    A box without a pixel on the crop is left out. Raises ValueError for what are no boxes of the picture.
    """
    corners = np.asarray(boxes, dtype=np.float32).reshape(-1, 4)  # [k, 4]
    indices = np.asarray(labels, dtype=np.int64).reshape(-1)
    if len(corners) != len(indices):
        raise ValueError(f"it has {len(corners)} boxes and {len(indices)} labels")
    require_boxes(corners)
    beyond = (corners[:, :2] > (picture.width, picture.height)).any(1) | (corners[:, 2:] < 0).any(1)
    if beyond.any():
        raise ValueError(
            f"it has the box {in_words(corners[beyond][0])}, outside of {picture.width} x {picture.height} pixels; "
            "expected x0 y0 x1 y1 in pixels of the image"
        )
    moved = moved_boxes(corners, picture, crop)
    remains = (moved[:, 2] > moved[:, 0]) & (moved[:, 3] > moved[:, 1])
    return moved[remains], indices[remains]


def require_boxes(boxes: NDArray[Any]) -> None:
    """Raises ValueError for a box of [k, 4] that is not finite, or ends before it begins."""
    if not np.isfinite(boxes).all():
        raise ValueError("it has a box with NaN or infinity")
    turned = (boxes[:, 2:] < boxes[:, :2]).any(1)
    if turned.any():
        raise ValueError(
            f"it has the box {in_words(boxes[turned][0])}, which ends before it begins; expected x0 y0 x1 y1, "
            "not centres or sizes"
        )


def in_words(box: NDArray[Any]) -> str:
    """`4 1 1 4`."""
    return " ".join(f"{value:g}" for value in box.tolist())
