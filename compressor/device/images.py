"""Image files or arrays in, a model's input batch out: the pre-processing a bundle states, with numpy.

Pillow is needed for image files only. Same geometry as the usual evaluation transform: resize, centre crop, divide
by 255, subtract mean, divide by std. What a file says of its size is held to limits before memory is taken for it.
"""

from __future__ import annotations

import importlib.util
import io
import math
import warnings
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict

import numpy as np
from numpy.typing import NDArray

from ..errors import DataError, GateError, MissingPackageError, first_line
from . import fields
from .arrays import read_npy, read_npz
from .cropping import Crop, crop_of, cropped
from .feeds import Array, has_rows
from .listings import SUFFIXES, files_in

if TYPE_CHECKING:
    import PIL.Image

Images = NDArray[np.float32]
INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "lanczos", "box", "hamming")
ARRAY_FILES = (".npy", ".npz")
IMAGE_FILES = tuple(sorted(SUFFIXES))
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
    files = files_in(path, endings)
    if not files:
        raise DataError(f"the folder {path} holds no image and no array ({', '.join(endings)}); name the files")
    return tuple(files)


def load_inputs(path: Path, preprocessing: Preprocessing) -> Images:
    """[N, C, H, W] from an image file, an .npy or an .npz (`images`, or its only array).

    uint8 arrays are [N, H, W, C] of the model's size and get normalised; float32 arrays are taken as they are.
    """
    require_file(path)
    if path.suffix.lower() in ARRAY_FILES:
        return normalised(_load_array(path), preprocessing, str(path))
    return picture_inputs(picture_file(path), preprocessing, str(path))


def picture_inputs(picture: PIL.Image.Image, preprocessing: Preprocessing, where: str) -> Images:
    """[1, C, H, W] from one picture of any size."""
    return normalised(pixels_of(picture, preprocessing, where)[None], preprocessing, where)


def require_file(path: Path) -> None:
    """Raises DataError where no file is."""
    if path.is_dir():
        raise DataError(f"{path} is a folder; files are wanted: images, .npy or .npz")
    if not path.is_file():
        raise DataError(f"no input at {path}")


def require_finite(array: Array, where: str) -> None:
    """Raises DataError for an input that holds NaN or infinity."""
    if not _is_finite(array):
        raise DataError(f"{where} holds NaN or infinity; the model takes finite numbers")


def _is_finite(array: Array) -> bool:
    return array.dtype.kind != "f" or bool(np.isfinite(array).all())


def normalised(array: Array, preprocessing: Preprocessing, where: str) -> Images:
    """float32 [N, C, H, W] from uint8 pixels [N, H, W, C] of the model's size, or from itself.

    `where` names the array in errors. Raises DataError for any other array, one without images or of NaN.
    """
    if array.ndim != 4 or array.dtype not in (np.uint8, np.float32):
        raise DataError(
            f"{where} holds {array.dtype} of shape {list(array.shape)}, expected uint8 [N, H, W, C] pixels "
            "or float32 [N, C, H, W] ready for the model"
        )
    if array.size == 0:
        raise DataError(f"{where} holds no image: its shape is {list(array.shape)}")
    if array.dtype == np.float32:
        require_finite(array, where)
        return array

    expected = (*preprocessing.size, len(preprocessing.mean))  # [H, W, C]
    if array.shape[1:] != expected:
        raise DataError(f"{where} holds pixels of shape {list(array.shape[1:])}, the model takes {list(expected)}")
    if 4 * array.size > MOST_BYTES:
        raise DataError(f"{where} holds {len(array)} images, more than {MOST_BYTES} bytes of input; split the file")

    scaled = array.astype(np.float32)  # [N, H, W, C]
    scaled /= np.float32(255)  # in place: a second array of this size would double the memory
    scaled -= np.array(preprocessing.mean, np.float32)
    scaled /= np.array(preprocessing.std, np.float32)
    return np.ascontiguousarray(scaled.transpose(0, 3, 1, 2))  # [N, C, H, W]


def checked_outputs(outputs: Array, images: Array, where: str) -> Array:
    """The model's answers [N, classes] for `images`; GateError when they are none."""
    if outputs.dtype.kind not in "fiu" or not has_rows(outputs, len(images)):
        raise GateError(
            f"the model answers {where} with {outputs.dtype} of shape {list(outputs.shape)}, expected a row of numbers "
            f"for each of {len(images)} images; it is no classifier, or not this bundle's"
        )
    require_finite_answer(outputs, where)
    return outputs


def require_finite_answer(outputs: Array, where: str) -> None:
    """Raises GateError for a model's answer that holds NaN or infinity."""
    if not _is_finite(outputs):
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
    for index in np.argsort(-values, kind="stable")[:count].tolist():
        entries.append({"index": index, "label": label_of(index, labels), "share": float(shares[index])})
    return entries


def label_of(index: int, labels: Sequence[str]) -> str:
    """The class's name, or its index where it has none."""
    return labels[index] if 0 <= index < len(labels) else str(index)


def _load_array(path: Path) -> Array:
    def choose(names: Sequence[str]) -> Sequence[str]:
        if "images" in names:
            return ["images"]
        if len(names) == 1 and names[0]:
            return names
        listed = fields.shown(", ".join(names))
        raise DataError(f"{path} holds {listed or 'nothing'}; expected one array, or one named 'images'")

    (array,) = read_array_file(path, choose)
    return array


def read_array_file(path: Path, choose: Callable[[Sequence[str]], Sequence[str]]) -> tuple[Array, ...]:
    """The array of an .npy file, or of an .npz those whose names `choose` picks; DataError for what is neither."""
    try:
        with path.open("rb") as file:
            if path.suffix.lower() == ".npy":
                return (read_npy(file, most_bytes=MOST_BYTES),)
            return tuple(read_npz(file, choose, most_bytes=MOST_BYTES).values())
    except (OSError, ValueError) as error:
        raise DataError(f"{path} can't be read as a numpy file: it {error}") from error


def picture_file(path: Path, modes: Collection[str] = EIGHT_BIT) -> PIL.Image.Image:
    """Pillow's image of a file, decoded, of one of `modes`. Raises DataError for what is none, or is too large."""
    require_file(path)
    if path.stat().st_size > _MOST_FILE_BYTES:
        raise DataError(f"{path} is longer than {_MOST_FILE_BYTES} bytes; make the image smaller first")
    # From memory: asked for what a damaged length says, a file would first allocate that much.
    return decoded_picture(path.read_bytes(), str(path), modes)


def decoded_picture(
    content: bytes, where: str, modes: Collection[str] = EIGHT_BIT, *, most_pixels: float = math.inf
) -> PIL.Image.Image:
    """Pillow's image of a file's content, as far as the host decodes it.

    `where` names it in errors; with `most_pixels`, one that declares more is refused before its pixels are made. Raises
    DataError, and MissingPackageError without Pillow.
    """
    require_pillow(where)
    from PIL import Image

    try:  # decoders fail in many ways on damaged files
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # below the size Pillow refuses, and tags it does not know
            with Image.open(io.BytesIO(content)) as image:
                _require_size(image, where, most_pixels)
                image.load()
    except DataError:
        raise
    except Exception as error:
        raise DataError(f"{where} can't be read as an image: {_decoding_fault(error)}") from error
    if image.mode not in modes:
        expected = "8 bits a channel" if modes is EIGHT_BIT else f"one of {', '.join(modes)}"
        raise DataError(f"{where} has pixel format {image.mode!r}, expected {expected}; convert it")
    if image.mode == "LAB":  # which turns into grey by way of RGB only
        return image.convert("RGB")
    return image


def _decoding_fault(error: Exception) -> str:
    from PIL import Image, UnidentifiedImageError

    match error:
        case UnidentifiedImageError():
            return "it is of no format that Pillow knows"
        case Image.DecompressionBombError():
            return f"{error}; make it smaller first"
        case MemoryError():
            return "there is not memory enough; make it smaller"
    return first_line(error)


def _require_size(image: PIL.Image.Image, where: str, most_pixels: float) -> None:
    if image.width * image.height > most_pixels:
        raise DataError(f"{where} has {image.width} x {image.height} pixels, more than {most_pixels}; make it smaller")


def array_picture(pixels: Array, where: str) -> PIL.Image.Image:
    """Pillow's image of uint8 pixels [H, W], [H, W, 1] or [H, W, 3], as a camera gives them; DataError for others."""
    channels = pixels.shape[2:]  # () of [H, W]
    has_axes = pixels.ndim >= 2 and channels in ((), (1,), (3,))
    if pixels.dtype != np.uint8 or not has_axes or not pixels.size:
        raise DataError(
            f"{where} is {pixels.dtype} of shape {list(pixels.shape)}, expected uint8 pixels [H, W, 3] or [H, W]"
        )
    require_pillow(where)
    from PIL import Image

    if channels == (1,):
        pixels = pixels[..., 0]  # [H, W, 1] to [H, W]
    return Image.fromarray(pixels)


def require_pillow(where: str) -> None:
    """Raises MissingPackageError where an image can't be read or resized for the lack of it."""
    if importlib.util.find_spec("PIL") is None:
        name = Path(where).name
        raise MissingPackageError(f"reading {name} needs Pillow: pip install pillow, or pass the pixels as .npy / .npz")


def crop_for(picture: PIL.Image.Image, preprocessing: Preprocessing) -> Crop:
    """Where the part of the picture that the model sees lies."""
    return crop_of(picture, preprocessing.size, preprocessing.resize)


def pixels_of(picture: PIL.Image.Image, preprocessing: Preprocessing, where: str) -> NDArray[np.uint8]:
    """Pixels [H, W, C] of the model's size; `where` names the picture in errors."""
    from PIL import Image

    channels = {1: "L", 3: "RGB"}.get(len(preprocessing.mean))
    if channels is None:
        raise DataError(f"the model takes {len(preprocessing.mean)} channels; pass its input as .npy or .npz")
    if preprocessing.interpolation not in INTERPOLATIONS:
        raise DataError(f"interpolation {preprocessing.interpolation!r} is none of {', '.join(INTERPOLATIONS)}")

    crop = crop_for(picture, preprocessing)
    if crop.width * crop.height > MOST_PIXELS:
        raise DataError(
            f"{where} is {picture.width} x {picture.height} pixels, resized for the model {crop.width} x "
            f"{crop.height}: more than {MOST_PIXELS} pixels; crop the image first"
        )

    method = Image.Resampling[preprocessing.interpolation.upper()]
    converted = picture if picture.mode == channels else picture.convert(channels)
    height, width = preprocessing.size
    return np.asarray(cropped(converted, crop, method)).reshape(height, width, -1)  # grey, [H, W], gets its channel
