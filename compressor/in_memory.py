"""What a Python caller hands over as images in, `Images` or a source's name out; what is neither is refused by name.

Takes names and paths, `Images`, a pair of arrays (images, labels), a torch `Dataset` of (image, label) or the
`DataLoader` around one. Knows no model.
"""

from __future__ import annotations

import os
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from .datasets import dataset_images
from .errors import DataError
from .images import Images

_KINDS = (
    "a folder, an .npz or another source's name (text or Path), Images, a pair of arrays (images, labels), a Dataset "
    "or a DataLoader of (image, label)"
)


def given_images(given: Any) -> str | Images | None:
    """The name of a source, or the images themselves; None stays None. Raises DataError for anything else."""
    if given is None or isinstance(given, (str, Images)):
        return given
    if isinstance(given, os.PathLike):
        return str(os.fspath(given))
    name = type(given).__name__
    if isinstance(given, DataLoader):
        given = given.dataset
    if isinstance(given, IterableDataset):
        raise DataError(
            f"a {name} can't be read by index, as calibration does; give a Dataset with a length, or a folder"
        )
    if isinstance(given, (tuple, list)) and len(given) == 2 and all(_is_array(part) for part in given):
        return dataset_images(f"{name} of arrays", _pairs(*given))
    if hasattr(given, "__getitem__") and hasattr(given, "__len__") and not isinstance(given, (tuple, list, dict)):
        return dataset_images(name, _with_labels(given))
    raise DataError(f"images are given as a {name}, expected {_KINDS}")


def _is_array(value: Any) -> bool:
    return isinstance(value, (Tensor, np.ndarray))


class _pairs:
    """Arrays [N, H, W, C] or [N, C, H, W] and labels [N] as a data set."""

    def __init__(self, images: Any, labels: Any) -> None:
        if len(images) != len(labels):
            raise DataError(f"there are {len(images)} images and {len(labels)} labels; give as many of each")
        self.images, self.targets = images, np.asarray(labels).reshape(-1)
        if self.targets.dtype.kind not in "iu":
            raise DataError(f"labels are {self.targets.dtype}, expected whole numbers")

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        return self.images[index], int(self.targets[index])


def _with_labels(dataset: Any) -> Any:
    """The data set itself; an array of images alone has no labels."""
    return _pairs(dataset, np.full(len(dataset), -1)) if _is_array(dataset) else dataset
