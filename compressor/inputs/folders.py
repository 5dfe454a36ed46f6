"""A folder in, its image files by name out, and `Images` of them; other files are read within limits.

A file that is named anywhere lies in its folder. Knows neither labels nor what targets mean.
"""

from __future__ import annotations

import hashlib
import json
import posixpath
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..errors import DataError, first_line
from ..files import file_sha256
from .images import Images
from .samples import UNKNOWN, TargetKind

SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm", ".pbm"}
_MOST_JSON_BYTES = 1 << 30


def image_files(folder: Path, *, deep: bool = True) -> list[Path]:
    """Every image, at any depth where `deep`, in the order of paths; hidden files are some system's own."""
    paths = folder.rglob("*") if deep else folder.iterdir()
    images = (path for path in paths if path.suffix.lower() in SUFFIXES)
    return sorted(path for path in images if not path.name.startswith("."))


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
        return Image.open(folder / name)

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


def require_files(folder: Path, files: Sequence[str], table: Path) -> None:
    """Every named file lies in the folder."""
    for name in files:
        if posixpath.isabs(name) or posixpath.normpath(name).split("/")[0] == "..":
            raise DataError(
                f"{str(table)!r} names {shown(name)}, which lies outside its folder; move the images there and name "
                "them relative to it"
            )
    missing = [name for name in files if not is_file(folder / name)]
    if missing:
        raise DataError(
            f"{len(missing)} of {len(files)} files named in {str(table)!r} don't exist (first: {shown(missing[0])}); "
            f"paths are relative to the folder of {table.name}"
        )


def is_file(path: Path) -> bool:
    """False also for what no file can be called."""
    try:
        return path.is_file()
    except (OSError, ValueError):  # a name longer than a file's can be, or with a zero in it
        return False


def shown(text: str) -> str:
    return repr(text if len(text) <= 80 else text[:77] + "...")


def read_json_object(path: Path) -> Mapping[str, Any]:
    """The object that a JSON file holds. Raises DataError for a file that is no such, or larger than 1 GB."""
    try:
        if path.stat().st_size > _MOST_JSON_BYTES:
            raise DataError(f"{str(path)!r} has more than {_MOST_JSON_BYTES >> 30} GB; give a part of it")
        value = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{str(path)!r} is not JSON ({first_line(error)}); write it again") from error
    if not isinstance(value, dict):
        raise DataError(f"{str(path)!r} holds a {type(value).__name__}, expected an object")
    return value
