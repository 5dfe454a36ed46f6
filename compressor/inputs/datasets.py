"""`torchvision:NAME(key=value)` in, that library's data set as `Images` out, downloaded where it can be and must be.

Knows torchvision's conventions (root, download, targets, classes), no single data set.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from ..errors import DataError, did_you_mean
from ..records import IntArray
from .calls import parse_call
from .images import Images

# that many are named by their numbers; a label beyond is refused once the model's classes are known
_MOST_CLASSES = 1_000_000


def library_images(source: str, root: str) -> Images:
    """The data set's images; `root` is the folder it lies in or is put in.

    Raises DataError where torchvision has no such data set, or it can be neither read nor downloaded.
    """
    import torchvision.datasets as library

    name, arguments = parse_call(source.removeprefix("torchvision:"))
    if name not in library.__all__:
        raise DataError(f"torchvision has no data set {name!r}.{did_you_mean(name, list(library.__all__))}")
    build = getattr(library, name)
    if "root" in inspect.signature(build).parameters:
        arguments.setdefault("root", root)
    return dataset_images(source, _built(build, arguments, source))


def _built(build: Callable[..., Any], arguments: Mapping[str, Any], source: str) -> Any:
    """The data set as it lies on disk, else downloaded where the library can."""
    can_download = "download" in inspect.signature(build).parameters
    root = Path(arguments.get("root", "."))
    new_root = not root.exists()
    try:
        try:
            return build(**arguments)
        except (RuntimeError, FileNotFoundError):
            if not can_download or arguments.get("download") is False:
                raise
            return build(**{**arguments, "download": True})
    except Exception as error:
        if new_root:
            with suppress(OSError):  # the library makes the folder before it finds that it can't fill it
                root.rmdir()
        where = f" under {str(root)!r}" if "root" in arguments else ""
        remedy = "check the network, or put the files there" if can_download else "put the files there"
        raise DataError(f"{source!r} can't be read{where} ({type(error).__name__}: {error}); {remedy}") from error


def dataset_images(source: str, dataset: Any) -> Images:
    """Images of a data set of (image, label) pairs; an image is PIL's, or pixels as `as_picture` reads them.

    Raises DataError where there are none.
    """
    labels = _dataset_labels(dataset)
    if not len(labels):
        raise DataError(f"{source!r} holds no images")

    def read(name: str) -> Image.Image:
        entry = dataset[int(name)]
        return as_picture(entry[0] if isinstance(entry, (tuple, list)) else entry)

    def digest(name: str) -> str:
        image = read(name)
        return hashlib.sha256(f"{image.mode}{image.size}".encode() + image.tobytes()).hexdigest()

    width = len(str(len(labels) - 1))  # all names equally long, so that they sort as they count
    names = tuple(f"{i:0{width}d}" for i in range(len(labels)))
    counted = min(int(labels.max()) + 1, _MOST_CLASSES)
    classes = getattr(dataset, "classes", None) or [str(i) for i in range(counted)]
    class_names = tuple(_class_name(name) for name in classes)
    return Images(source, names, labels, class_names, None, read, digest)


def as_picture(pixels: Any) -> Image.Image:
    """PIL's image of one: itself, uint8 [H, W, C] or [C, H, W], or floats in [0, 1] [C, H, W], grey ones without C.

    Raises TypeError for anything else; normalised floats are among it, whose pixels are not known any more.
    """
    if isinstance(pixels, Image.Image):
        return pixels
    array = np.asarray(pixels.detach().cpu() if isinstance(pixels, Tensor) else pixels)
    if array.ndim == 2:
        array = array[None]  # [1, H, W]
    if array.ndim != 3 or not {1, 3} & {array.shape[0], array.shape[-1]}:
        raise TypeError(
            f"{type(pixels).__name__} {list(array.shape)} is no image; expected [C, H, W] with 1 or 3 channels"
        )
    if array.shape[0] in (1, 3):
        array = np.moveaxis(array, 0, -1)  # [C, H, W] to [H, W, C]
    if array.dtype.kind == "f":
        if array.size and not (array.min() >= 0 and array.max() <= 1):
            raise TypeError(
                f"floats from {array.min():.3g} to {array.max():.3g} are no pixels in [0, 1]; give images as they are "
                "before normalisation, which is done here"
            )
        array = np.round(array * 255).astype(np.uint8)
    if array.dtype != np.uint8:
        raise TypeError(f"pixels are {array.dtype}, expected uint8 or floats in [0, 1]")
    return Image.fromarray(array[..., 0] if array.shape[-1] == 1 else array)


def _class_name(name: Any) -> str:
    """ImageNet's classes are tuples of synonyms."""
    return ", ".join(name) if isinstance(name, (tuple, list)) else str(name)


def _dataset_labels(dataset: Any) -> IntArray:
    """Labels without decoding where the data set keeps them; some only tell with the image."""
    for attribute in ("targets", "labels", "_labels", "y"):
        values = getattr(dataset, attribute, None)
        if values is not None and len(values) == len(dataset):
            return np.asarray(values).astype(np.int64).reshape(-1)
    return np.array([_label_of(dataset[i]) for i in range(len(dataset))], dtype=np.int64)


def _label_of(entry: Any) -> int:
    """-1 where an entry is the image alone."""
    has_label = isinstance(entry, (tuple, list)) and len(entry) > 1
    return int(entry[1]) if has_label else -1
