"""Image files or arrays in, a model's input batch out: the pre-processing a bundle states, with numpy.

Pillow is needed for image files only. Same geometry as the usual evaluation transform: resize, centre crop, divide
by 255, subtract mean, divide by std. What a file says of its size is held to limits before memory is taken for it.
"""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict

import numpy as np
from numpy.typing import NDArray

from ..errors import DataError, GateError, MissingPackageError
from . import fields
from .arrays import read_npy, read_npz, short_reason
from .feeds import Array

if TYPE_CHECKING:
    import PIL.Image

Images = NDArray[np.float32]
INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "lanczos", "box", "hamming")
ARRAY_FILES = (".npy", ".npz")
IMAGE_FILES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
MOST_BYTES = 1 << 30  # of one file's images as float32
MOST_PIXELS = 1 << 25  # of an image as it is resized, and of a model's input: 5792 x 5792

# What has 8 bits a channel, Pillow's names. Wider pixels would be cut to white where they are converted.
EIGHT_BIT = {"1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "LAB", "HSV"}
_MOST_CHANNELS = 64
_MOST_FILE_BYTES = 1 << 29
_MOST_SIDE_PX = 1 << 14


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


class TopClass(TypedDict):
    """A class as a network answers it, for JSON; `share` is its softmax."""

    index: int
    label: str
    share: float


def checked_preprocessing(
    *,
    interpolation: str,
    size: Sequence[object],
    resize: Sequence[object],
    mean: Sequence[object],
    std: Sequence[object],
) -> Preprocessing:
    """A pre-processing from elsewhere; ValueError for what could not be computed with."""
    if len(size) != 2 or len(resize) not in (1, 2) or not 1 <= len(mean) == len(std) <= _MOST_CHANNELS:
        raise ValueError("the pre-processing needs a size of two entries, a resize of one or two, mean and std alike")
    if interpolation not in INTERPOLATIONS:
        raise ValueError(f"interpolation {fields.shown(interpolation)} is none of {', '.join(INTERPOLATIONS)}")

    height, width, *resized_px = (
        fields.as_whole(side, "a side of the images", least=1, most=_MOST_SIDE_PX) for side in (*size, *resize)
    )
    if max(height * width, math.prod(resized_px)) > MOST_PIXELS:
        raise ValueError(f"its images have more than {MOST_PIXELS} pixels")

    return Preprocessing(
        size=(height, width),
        resize=tuple(resized_px),
        interpolation=interpolation,
        mean=tuple(fields.as_number(value, "a mean", least=-1e6, most=1e6) for value in mean),
        std=tuple(fields.as_number(value, "a std", least=1e-6, most=1e6) for value in std),
    )


def input_files(path: Path) -> tuple[Path, ...]:
    """The path itself, or where it is a folder the images and arrays that lie in it, by name.

    Raises DataError for a folder that holds neither.
    """
    if not path.is_dir():
        return (path,)
    endings = (*ARRAY_FILES, *IMAGE_FILES)
    files = tuple(file for file in sorted(path.iterdir()) if file.suffix.lower() in endings and file.is_file())
    if not files:
        raise DataError(f"the folder {path} holds no image and no array ({', '.join(endings)}); name the files")
    return files


def load_inputs(path: Path, preprocessing: Preprocessing) -> Images:
    """[N, C, H, W] from an image file, an .npy or an .npz (`images`, or its only array).

    uint8 arrays are [N, H, W, C] of the model's size and get normalised; float32 arrays are taken as they are.
    """
    require_file(path)
    if path.suffix.lower() in ARRAY_FILES:
        return normalised(_load_array(path), preprocessing, str(path))
    pixels = _decode(path, preprocessing)
    return normalised(pixels[None], preprocessing, str(path))


def require_file(path: Path) -> None:
    """Raises DataError where no file is."""
    if path.is_dir():
        raise DataError(f"{path} is a folder; files are wanted: images, .npy or .npz")
    if not path.is_file():
        raise DataError(f"no input at {path}")


def require_finite(array: Array, where: str) -> None:
    """Raises DataError for an input that holds NaN or infinity."""
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise DataError(f"{where} holds NaN or infinity; the model takes finite numbers")


def normalised(array: Array, preprocessing: Preprocessing, where: str) -> Images:
    """float32 [N, C, H, W] from uint8 pixels [N, H, W, C] of the model's size, or from itself.

    `where` names the array in errors. Raises DataError for any other array, one without images or of NaN.
    """
    if array.ndim == 4 and array.size == 0:
        raise DataError(f"{where} holds no image: its shape is {list(array.shape)}")
    if array.dtype == np.float32 and array.ndim == 4:
        require_finite(array, where)
        return array
    if array.dtype != np.uint8 or array.ndim != 4:
        raise DataError(
            f"{where} holds {array.dtype} of shape {list(array.shape)}, expected uint8 [N, H, W, C] pixels "
            "or float32 [N, C, H, W] ready for the model"
        )
    if array.shape[1:3] != preprocessing.size or array.shape[3] != len(preprocessing.mean):
        expected = [*preprocessing.size, len(preprocessing.mean)]
        raise DataError(f"{where} holds pixels of shape {list(array.shape[1:])}, the model takes {expected}")
    if 4 * array.size > MOST_BYTES:
        raise DataError(f"{where} holds {len(array)} images, more than {MOST_BYTES} bytes of input; split the file")

    scaled = array.astype(np.float32)  # [N, H, W, C]
    scaled /= np.float32(255)  # in place: a second array of this size would double the memory
    scaled -= np.array(preprocessing.mean, np.float32)
    scaled /= np.array(preprocessing.std, np.float32)
    return np.ascontiguousarray(scaled.transpose(0, 3, 1, 2))  # [N, C, H, W]


def checked_outputs(outputs: Array, images: Array, where: str) -> Array:
    """The model's answers [N, classes] for `images`; GateError when they are none."""
    if outputs.dtype.kind not in "fiu" or outputs.ndim < 2 or len(outputs) != len(images) or outputs.size == 0:
        raise GateError(
            f"the model answers {where} with {outputs.dtype} of shape {list(outputs.shape)}, expected a row of numbers "
            f"for each of {len(images)} images; it is no classifier, or not this bundle's"
        )
    require_finite_answer(outputs, where)
    return outputs


def require_finite_answer(outputs: Array, where: str) -> None:
    """Raises GateError for a model's answer that holds NaN or infinity."""
    if outputs.dtype.kind == "f" and not np.isfinite(outputs).all():
        raise GateError(
            f"the model answers {where} with NaN or infinity; check the bundle with `compressor verify`, and that "
            "the input is of the scale the model takes"
        )


def top_classes(logits: Array, labels: Sequence[str], count: int = 5) -> list[TopClass]:
    """The `count` largest of one row of logits, largest first."""
    values = logits.astype(np.float64).ravel()
    shares = np.exp(values - values.max())  # less the largest: exp of large logits would overflow
    shares /= shares.sum()

    entries: list[TopClass] = []
    for index in np.argsort(-values, kind="stable")[:count]:
        label = labels[index] if index < len(labels) else str(index)
        entries.append({"index": int(index), "label": label, "share": float(shares[index])})
    return entries


def _load_array(path: Path) -> Array:
    def choose(names: Sequence[str]) -> Sequence[str]:
        if "images" in names:
            return ["images"]
        if len(names) == 1 and names[0]:
            return names
        listed = fields.shown(", ".join(names))
        raise DataError(f"{path} holds {listed or 'nothing'}; expected one array, or one named 'images'")

    try:
        with path.open("rb") as file:
            if path.suffix.lower() == ".npy":
                return read_npy(file, most_bytes=MOST_BYTES)
            (array,) = read_npz(file, choose, most_bytes=MOST_BYTES).values()
            return array
    except (OSError, ValueError) as error:
        raise DataError(f"{path} can't be read as a numpy file: it {error}") from error


def _decode(path: Path, preprocessing: Preprocessing) -> NDArray[np.uint8]:
    """Pixels [H, W, C] of the model's size, from an image file."""
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
    image = _opened(path)
    scaled_size = _scaled_size(image.size, preprocessing.resize)
    if math.prod(scaled_size) > MOST_PIXELS:
        raise DataError(
            f"{path} is {image.width} x {image.height} pixels, resized for the model {scaled_size[0]} x "
            f"{scaled_size[1]}: more than {MOST_PIXELS} pixels; crop the image first"
        )

    height, width = preprocessing.size
    pixels = image if image.mode == channels else image.convert(channels)
    scaled = pixels.resize(scaled_size, method)
    return np.asarray(_crop(scaled, height, width)).reshape(height, width, -1)  # grey, [H, W], gets its channel


def _opened(path: Path) -> PIL.Image.Image:
    """Pillow's image, decoded as far as the host's; its decoders fail in many ways on damaged files."""
    from PIL import Image, UnidentifiedImageError

    if path.stat().st_size > _MOST_FILE_BYTES:
        raise DataError(f"{path} is longer than {_MOST_FILE_BYTES} bytes; make the image smaller first")

    # From memory: asked for what a damaged length says, a file would first allocate that much.
    content = io.BytesIO(path.read_bytes())
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # below the size Pillow refuses, and tags it does not know
            with Image.open(content) as image:
                image.load()
    except UnidentifiedImageError as error:
        raise DataError(f"{path} can't be read as an image: it is of no format that Pillow knows") from error
    except Image.DecompressionBombError as error:
        raise DataError(f"{path} can't be read as an image: {error}; make it smaller first") from error
    except MemoryError as error:
        raise DataError(f"{path} can't be read as an image: there is not memory enough; make it smaller") from error
    except Exception as error:
        raise DataError(f"{path} can't be read as an image: {short_reason(error)}") from error
    if image.mode not in EIGHT_BIT:
        raise DataError(f"{path} has pixel format {image.mode!r}, expected 8 bits a channel; convert it")
    return image


def _scaled_size(size: tuple[int, int], resize: tuple[int, ...]) -> tuple[int, int]:
    """Pillow's (width, height); 500 x 375 with the shorter side at 256 is 341 x 256: cut off, not rounded."""
    if len(resize) == 2:
        return resize[1], resize[0]
    width, height = size
    if height <= width:
        return int(resize[0] * width / height), resize[0]
    return resize[0], int(resize[0] * height / width)


def _crop(image: PIL.Image.Image, height: int, width: int) -> PIL.Image.Image:
    """The centre; a crop larger than the image gets a black rim."""
    left, top = _crop_start(image.width, width), _crop_start(image.height, height)
    return image.crop((left, top, left + width, top + height))


def _crop_start(image_px: int, crop_px: int) -> int:
    """Where a crop begins on one axis, negative in the rim: as torchvision has it, 5 of 8 from 2, 8 of 5 from -1."""
    if crop_px <= image_px:
        return round((image_px - crop_px) / 2)  # halves to the even side: 1.5 to 2, 2.5 to 2
    return -((crop_px - image_px) // 2)
