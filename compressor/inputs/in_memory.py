"""What a Python caller hands over as images in, `Images` or a source's name out; what is neither is refused by name.

Takes names and paths, `Images`, a pair of arrays (images, labels), a torch `Dataset` of (image, label) or the
`DataLoader` around one. Knows no model.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TypeGuard

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from ..errors import DataError, with_article
from .datasets import Dataset, dataset_images
from .images import Images

Array = Tensor | NDArray[np.generic]

_KINDS = (
    "a folder, an .npz or another source's name (text or Path), Images, a pair of arrays (images, labels), a Dataset "
    "or a DataLoader of (image, label)"
)


def given_images(images: object) -> str | Images | None:
    """The name of a source, or the images themselves; None stays None. Raises DataError for anything else."""
    if images is None or isinstance(images, (str, Images)):
        return images
    if isinstance(images, os.PathLike):
        return str(os.fspath(images))

    name = type(images).__name__
    dataset: object = images.dataset if isinstance(images, DataLoader) else images
    if isinstance(dataset, IterableDataset):
        raise DataError(
            f"{with_article(name)} can't be read by index, as calibration does; give a Dataset with a length, or arrays"
        )
    if _is_pair_of_arrays(dataset):
        pixels, labels = dataset
        return dataset_images(f"{name} of arrays", _LabelledArrays(pixels, labels), "arrays")
    if _is_array(dataset):  # of images alone, which have no labels
        return dataset_images(name, _LabelledArrays(dataset, np.full(len(dataset), -1)), "arrays")
    if _is_dataset(dataset):
        return dataset_images(name, dataset)
    raise DataError(f"images are given as {with_article(name)}, expected {_KINDS}")


def _is_pair_of_arrays(value: object) -> TypeGuard[Sequence[Array]]:
    if not isinstance(value, (tuple, list)) or len(value) != 2:
        return False
    return all(_is_array(entry) for entry in value)


def _is_array(value: object) -> TypeGuard[Array]:
    return isinstance(value, (Tensor, np.ndarray))


def _is_dataset(value: object) -> TypeGuard[Dataset]:
    """What has a length and an index, but for Python's own collections: those would be a mistake."""
    by_index = hasattr(value, "__getitem__") and hasattr(value, "__len__")
    return by_index and not isinstance(value, (tuple, list, dict))


class _LabelledArrays:
    """Arrays [N, H, W, C] or [N, C, H, W] and labels [N] as a data set."""

    def __init__(self, images: Array, labels: Array) -> None:
        if len(images) != len(labels):
            raise DataError(f"there are {len(images)} images and {len(labels)} labels; give as many of each")
        self.images, self.targets = images, np.asarray(labels).reshape(-1)
        if self.targets.dtype.kind not in "iu":
            raise DataError(f"labels are {self.targets.dtype}, expected whole numbers")

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Array, int]:
        return self.images[index], int(self.targets[index])
