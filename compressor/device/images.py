"""Image files or arrays in, a model's input batch out: the pre-processing a bundle states, with numpy.

Pillow is needed for image files only. Same geometry as the usual evaluation transform: resize, centre crop, divide
by 255, subtract mean, divide by std.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import DataError, MissingPackageError

Images = NDArray[np.float32]
INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "lanczos", "box", "hamming")


@dataclass(frozen=True, slots=True)
class Preprocessing:
    """How an image becomes a tensor. `size` is the (height, width) of the crop.

    `resize` of one entry is the length the shorter side gets before it, of two the exact (height, width).
    `mean` and `std` are for values 0-1, one entry for grey, three for RGB.
    """

    size: tuple[int, int]
    resize: tuple[int, ...]
    interpolation: str
    mean: tuple[float, ...]
    std: tuple[float, ...]


def load_inputs(path: Path, preprocessing: Preprocessing) -> Images:
    """[N, C, H, W] from an image file, an .npy or an .npz (`images`, or its only array).

    uint8 arrays are [N, H, W, C] of the model's size and get normalised; float32 arrays are taken as they are.
    """
    if not path.is_file():
        raise DataError(f"no input at {path}")
    if path.suffix.lower() in (".npy", ".npz"):
        return normalised(_load_array(path), preprocessing, str(path))
    pixels = _decode(path, preprocessing)
    return normalised(pixels[None], preprocessing, str(path))


def normalised(array: NDArray[Any], preprocessing: Preprocessing, where: str) -> Images:
    if array.dtype == np.float32 and array.ndim == 4:
        return array
    if array.dtype != np.uint8 or array.ndim != 4:
        raise DataError(
            f"{where} holds {array.dtype} of shape {list(array.shape)}, expected uint8 [N, H, W, C] pixels "
            "or float32 [N, C, H, W] ready for the model"
        )
    if array.shape[1:3] != preprocessing.size or array.shape[3] != len(preprocessing.mean):
        expected = [*preprocessing.size, len(preprocessing.mean)]
        raise DataError(f"{where} holds pixels of shape {list(array.shape[1:])}, the model takes {expected}")
    mean, std = np.array(preprocessing.mean, np.float32), np.array(preprocessing.std, np.float32)
    scaled = (array.astype(np.float32) / np.float32(255) - mean) / std
    return np.ascontiguousarray(scaled.transpose(0, 3, 1, 2))


def top_classes(logits: NDArray[Any], labels: Sequence[str], count: int = 5) -> list[dict[str, Any]]:
    """The `count` largest of one row of logits with their softmax, largest first."""
    values = logits.astype(np.float64).ravel()
    shares = np.exp(values - values.max())
    shares /= shares.sum()
    order = np.argsort(-values, kind="stable")[:count]
    return [
        {"index": int(i), "label": labels[i] if i < len(labels) else str(i), "share": float(shares[i])} for i in order
    ]


def _load_array(path: Path) -> NDArray[Any]:
    try:
        content = np.load(path, allow_pickle=False)
        if path.suffix.lower() == ".npy":
            return np.asarray(content)
        names = list(content.files)
        name = "images" if "images" in names else names[0] if len(names) == 1 else ""
        if not name:
            raise DataError(f"{path} holds {', '.join(names)}; expected one array, or one named 'images'")
        return np.asarray(content[name])
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"{path} can't be read as a numpy file: {error}") from error


def _decode(path: Path, preprocessing: Preprocessing) -> NDArray[np.uint8]:
    try:
        from PIL import Image
    except ImportError as error:
        raise MissingPackageError(
            f"reading {path.name} needs Pillow: pip install pillow, or pass the pixels as .npy / .npz"
        ) from error
    channels = {1: "L", 3: "RGB"}.get(len(preprocessing.mean))
    if channels is None:
        raise DataError(f"the model takes {len(preprocessing.mean)} channels; pass its input as .npy or .npz")
    if preprocessing.interpolation not in INTERPOLATIONS:
        raise DataError(f"interpolation {preprocessing.interpolation!r} is none of {', '.join(INTERPOLATIONS)}")
    method = Image.Resampling[preprocessing.interpolation.upper()]
    try:
        with Image.open(path) as file:
            image = file.convert(channels)
    except (OSError, ValueError) as error:
        raise DataError(f"{path} can't be read as an image: {error}") from error
    height, width = preprocessing.size
    scaled = image.resize(_scaled_size(image.size, preprocessing.resize), method)
    return np.asarray(_crop(scaled, height, width)).reshape(height, width, -1)


def _scaled_size(size: tuple[int, int], resize: tuple[int, ...]) -> tuple[int, int]:
    """Pillow's (width, height); 500 x 375 with the shorter side at 256 is 341 x 256: cut off, not rounded."""
    if len(resize) == 2:
        return resize[1], resize[0]
    width, height = size
    if height <= width:
        return int(resize[0] * width / height), resize[0]
    return resize[0], int(resize[0] * height / width)


def _crop(image: Any, height: int, width: int) -> Any:
    """The centre; a crop larger than the image gets a black rim."""
    left, top = (
        round((have - want) / 2) if want <= have else -((want - have) // 2)
        for have, want in ((image.width, width), (image.height, height))
    )
    return image.crop((left, top, left + width, top + height))
