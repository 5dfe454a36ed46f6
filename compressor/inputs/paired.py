"""A folder of images and of pictures that belong to them in, `Images` with masks or with images as targets out.

`device.pairs` says which folders are such.
"""

from __future__ import annotations

from pathlib import Path

from ..device.pairs import read_pairs
from .folders import images_of_files, with_target_files
from .images import Images
from .samples import UNKNOWN


def paired_images(folder: Path) -> Images | None:
    """The folder's images with what belongs to them; None where it is no such folder.

    Raises DataError for an image without its other half, the other way about, and for one with two.
    """
    pairs = read_pairs(folder)
    if pairs is None:
        return None
    images = images_of_files(folder, pairs.files, [UNKNOWN] * len(pairs.files), ())
    return with_target_files(images, pairs.kind, folder, dict(zip(pairs.files, pairs.targets, strict=True)))
