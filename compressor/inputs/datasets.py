"""`torchvision:NAME(key=value)` in, that library's data set as `Images` out, downloaded where it can be and must be.

Knows torchvision's conventions (root, download, targets, classes), no single data set.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from ..device.targets import INDEX_MODES
from ..errors import DataError, did_you_mean
from ..records import IntArray
from .blame import raised
from .calls import parse_call
from .images import Images, Storage, numbered
from .samples import BOXES, LABELS, MOST_CLASSES, UNKNOWN, TargetKind, has_boxes, kind_of
from .targets import on_cpu, picture_of, values_of

# where data sets keep their labels, in torchvision and elsewhere
_LABEL_ATTRIBUTES = ("targets", "labels", "_labels", "y")


class Dataset(Protocol):
    """Pairs (image, target) by index, or images alone."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> object: ...


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


def _built(build: Callable[..., Dataset], arguments: Mapping[str, object], source: str) -> Dataset:
    """The data set as it lies on disk, else downloaded. Raises DataError where the library can do neither."""
    can_download = "download" in inspect.signature(build).parameters
    may_download = can_download and arguments.get("download") is not False
    root = Path(str(arguments.get("root", ".")))
    new_root = not root.exists()
    try:
        return _on_disk_or_downloaded(build, arguments) if may_download else build(**arguments)
    except Exception as error:
        if new_root:
            with suppress(OSError):  # the library makes the folder before it finds that it can't fill it
                root.rmdir()
        where = f" under {str(root)!r}" if "root" in arguments else ""
        remedy = "check the network, or put the files there" if can_download else "put the files there"
        raise DataError(f"{source!r} can't be read{where} ({type(error).__name__}: {error}); {remedy}") from error


def _on_disk_or_downloaded(build: Callable[..., Dataset], arguments: Mapping[str, object]) -> Dataset:
    try:
        return build(**arguments)
    except (RuntimeError, FileNotFoundError):  # what libraries raise where the files are not there
        return build(**{**arguments, "download": True})


def dataset_images(source: str, dataset: Dataset, storage: Storage = "data set") -> Images:
    """Images of a data set of (image, target) pairs; an image is PIL's, or pixels as `as_picture` reads them.

    What kind of target there is, the first entry says: a class index, a picture (of class indices where it has an
    index mode), boxes, or other numbers. Raises DataError where there are no images, and for targets of no kind.
    """
    if not len(dataset):
        raise DataError(f"{source!r} holds no images")
    labels, kind = _labels_and_kind(source, dataset)

    def read(name: str) -> Image.Image:
        return as_picture(_picture_in(dataset[int(name)]))

    def target_of(name: str) -> object:
        return _stored_target(_target_of(dataset[int(name)]))[0]

    @functools.cache  # every stage asks what its images are, and an answer decodes one
    def digest(name: str) -> str:
        image = read(name)
        content = f"{image.mode}{image.size}".encode() + image.tobytes()
        if kind != "class":
            content += _stored_bytes(target_of(name))
        return hashlib.sha256(content).hexdigest()

    counted = min(int(labels.max()) + 1, MOST_CLASSES)
    classes = getattr(dataset, "classes", None) or range(counted)
    class_names = tuple(_class_name(name) for name in classes)
    images = Images(source, numbered(len(labels)), labels, class_names, None, read, digest, storage)
    if kind == "class":
        return images
    return replace(images, target_of=target_of, target_kind=kind)


def _labels_and_kind(source: str, dataset: Dataset) -> tuple[IntArray, TargetKind]:
    """Class indices, -1 without; and what the targets are."""
    stored = dataset_labels(dataset)
    if stored is not None:
        return stored, "class"
    try:
        kind = _stored_target(_target_of(dataset[0]))[1]
        if kind != "class":
            return np.full(len(dataset), UNKNOWN), kind
        labels = [_label_of(dataset[index]) for index in range(len(dataset))]
    except Exception as error:  # the data set's own code, or a target that is none
        raise DataError(f"the targets of {source!r} can't be read: {raised(error)}; correct it there") from error
    return np.array(labels, dtype=np.int64), "class"


def _picture_in(entry: object) -> object:
    """The first of an entry, or the entry itself."""
    if isinstance(entry, (tuple, list)):
        return entry[0]
    return entry


def _target_of(entry: object) -> object:
    """None where an entry is the image alone."""
    if isinstance(entry, (tuple, list)) and len(entry) > 1:
        return entry[1]
    return None


def _stored_target(target: object) -> tuple[object, TargetKind]:
    """A target as `targets` reads it, and its kind. Raises TypeError for none of them."""
    match target:
        case None | int() | np.integer():
            return target, "class"
        case Image.Image():
            return target, "mask" if target.mode in INDEX_MODES else "image"
        case Mapping() if has_boxes(target):
            return dict(target), "boxes"
        case Tensor() | np.ndarray() | np.floating() | float() | tuple() | list():
            return _stored_values(target)
        case _:
            kind = type(target).__name__
            raise TypeError(f"a target is a {kind}, expected a class index, a picture, boxes or numbers")


def _stored_values(target: object) -> tuple[object, TargetKind]:
    """The same of an array or list: one whole number is a class, [C, H, W] a picture where it can be one."""
    values = values_of(target)
    if values.numel() == 1 and not values.is_floating_point():
        return target, "class"
    if values.ndim == 3:
        with suppress(TypeError):  # no picture: numbers
            return as_picture(target), "image"
    return target, kind_of(values)


def _stored_bytes(target: object) -> bytes:
    """What a digest takes in of a target."""
    match target:
        case Image.Image():
            return f"{target.mode}{target.size}".encode() + target.tobytes()
        case Mapping():
            return b"".join(_stored_bytes(target[key]) for key in (BOXES, LABELS))
        case _:
            values = values_of(target)
            return repr((values.dtype, *values.shape)).encode() + values.contiguous().numpy().tobytes()


def as_picture(pixels: object) -> Image.Image:
    """PIL's image of one: itself, uint8 [H, W, C] or [C, H, W], or floats in [0, 1] [C, H, W], grey ones without C.

    Raises TypeError for anything else; normalised floats are among it, whose pixels are not known any more.
    """
    if isinstance(pixels, Image.Image):
        return pixels
    array = np.asarray(on_cpu(pixels))
    if array.ndim == 2:
        array = array[None]  # [1, H, W]
    if array.ndim != 3 or not {1, 3} & {array.shape[0], array.shape[-1]}:
        raise TypeError(
            f"{type(pixels).__name__} {list(array.shape)} is no image; expected [C, H, W] with 1 or 3 channels"
        )
    if array.shape[0] in (1, 3):
        array = np.moveaxis(array, 0, -1)  # [C, H, W] to [H, W, C]
    return picture_of(_eight_bit(array))


def _eight_bit(array: NDArray[Any]) -> NDArray[np.uint8]:
    """Pixels as they are stored: 0.5 of floats is 128. Raises TypeError for what is neither."""
    if array.dtype == np.uint8:
        return array
    if array.dtype.kind != "f":
        raise TypeError(f"pixels are {array.dtype}, expected uint8 or floats in [0, 1]")
    if array.size and not 0 <= array.min() <= array.max() <= 1:  # of NaN, too
        raise TypeError(
            f"floats from {array.min():.3g} to {array.max():.3g} are no pixels in [0, 1]; give images as they are "
            "before normalisation, which is done here"
        )
    return np.round(array * 255).astype(np.uint8)


def _class_name(name: object) -> str:
    """ImageNet's classes are tuples of synonyms."""
    if isinstance(name, (tuple, list)):
        return ", ".join(name)
    return str(name)


def dataset_labels(dataset: Dataset) -> IntArray | None:
    """Class indices as the data set keeps them, without decoding an image; None where it keeps none.

    A list of files or of several values an image under the same name is none of them.
    """
    for attribute in _LABEL_ATTRIBUTES:
        values: Any = getattr(dataset, attribute, None)
        with suppress(TypeError, ValueError, RuntimeError):  # without a length, or no array
            array = np.asarray(values)
            is_one_each = len(values) == len(dataset) == array.size
            if is_one_each and _are_whole(array):
                return array.astype(np.int64).reshape(-1)
    return None


def _are_whole(values: NDArray[Any]) -> bool:
    """Whether these are whole numbers, some of them written as floats."""
    if values.dtype.kind == "f":
        return bool((values == values.round()).all())
    return values.dtype.kind in "iub"


def _label_of(entry: object) -> int:
    """-1 where an entry has none."""
    target: Any = _target_of(entry)
    if target is None:
        return UNKNOWN
    return int(target)
