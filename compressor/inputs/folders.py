"""Files of a folder by name in, `Images` of them out, with what belongs to each as its target.

Knows neither labels nor what targets mean.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image

from ..errors import DataError
from ..files import file_sha256
from .images import Images
from .samples import UNKNOWN, TargetKind


def images_of_files(folder: Path, names: Sequence[str], labels: Sequence[int], classes: Sequence[str]) -> Images:
    digests: dict[str, str] = {}

    def digest(name: str) -> str:
        if name not in digests:
            try:
                digests[name] = file_sha256(folder / name)
            except OSError as error:
                raise DataError(f"image {name!r} of {str(folder)!r} can't be read ({error.strerror})") from error
        return digests[name]

    def read(name: str) -> Image.Image:
        # from memory: of a damaged file a decoder would take as much as it declares, and leave it open
        return Image.open(io.BytesIO((folder / name).read_bytes()))

    return Images(str(folder), tuple(names), np.array(labels, dtype=np.int64), tuple(classes), None, read, digest)


def with_targets(
    images: Images, kind: TargetKind, target_of: Callable[[str], object], stored: Callable[[str], bytes]
) -> Images:
    """The images with targets that are no class indices; `stored` is what the source holds of one, for the digest."""

    def digest(name: str) -> str:
        return hashlib.sha256(images.digest(name).encode() + stored(name)).hexdigest()

    unlabelled = np.full(len(images), UNKNOWN)
    return replace(images, labels=unlabelled, digest=digest, target_of=target_of, target_kind=kind)


def with_target_files(images: Images, kind: TargetKind, folder: Path, files: Mapping[str, str]) -> Images:
    """The images with a picture each as the target; `files` are names in the folder, by the image's."""

    def target_of(name: str) -> Image.Image:
        picture = Image.open(folder / files[name])
        picture.load()
        return picture

    def stored(name: str) -> bytes:
        try:
            return file_sha256(folder / files[name]).encode()
        except OSError as error:
            raise DataError(f"{files[name]!r} of {str(folder)!r} can't be read ({error.strerror})") from error

    return with_targets(images, kind, target_of, stored)
