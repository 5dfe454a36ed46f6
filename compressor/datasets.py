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

from .calls import parse_call
from .errors import DataError, did_you_mean
from .images import Images
from .records import IntArray


def library_images(source: str, root: str) -> Images:
    """The data set's images; `root` is the folder it lies in or is put in."""
    import torchvision.datasets as library

    name, arguments = parse_call(source.removeprefix("torchvision:"))
    if name not in library.__all__:
        raise DataError(f"torchvision has no data set {name!r}.{did_you_mean(name, list(library.__all__))}")
    build = getattr(library, name)
    if "root" in inspect.signature(build).parameters:
        arguments.setdefault("root", root)
    return _of_dataset(source, _built(build, arguments, source))


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


def _of_dataset(source: str, dataset: Any) -> Images:
    labels = _dataset_labels(dataset)
    if not len(labels):
        raise DataError(f"{source!r} holds no images")
    width = len(str(len(labels) - 1))

    def read(name: str) -> Image.Image:
        image = dataset[int(name)][0]
        if not isinstance(image, Image.Image):
            raise TypeError(f"the data set gives {type(image).__name__}, not an image")
        return image

    def digest(name: str) -> str:
        image = read(name)
        return hashlib.sha256(f"{image.mode}{image.size}".encode() + image.tobytes()).hexdigest()

    classes = getattr(dataset, "classes", None) or [str(i) for i in range(int(labels.max()) + 1)]
    names = tuple(f"{i:0{width}d}" for i in range(len(labels)))
    return Images(source, names, labels, tuple(_plain(c) for c in classes), None, read, digest)


def _plain(name: Any) -> str:
    return ", ".join(name) if isinstance(name, (tuple, list)) else str(name)


def _dataset_labels(dataset: Any) -> IntArray:
    """Labels without decoding where the data set keeps them; some only tell with the image."""
    for attribute in ("targets", "labels", "_labels", "y"):
        values = getattr(dataset, attribute, None)
        if values is not None and len(values) == len(dataset):
            return np.asarray(values).astype(np.int64).reshape(-1)
    return np.array([int(dataset[i][1]) for i in range(len(dataset))], dtype=np.int64)
