"""A folder in, its image files by name out; tables that name files, and JSON, are read within limits.

A file that is named anywhere lies in its folder. Knows neither labels nor what targets mean. Standard library only.
"""

from __future__ import annotations

import json
import posixpath
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import DataError, first_line

SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm", ".pbm"}
_MOST_JSON_BYTES = 1 << 30


def image_files(folder: Path, *, deep: bool = True) -> list[Path]:
    """Every image, at any depth where `deep`, in the order of paths; hidden files are some system's own."""
    paths = folder.rglob("*") if deep else folder.iterdir()
    return sorted(filter(_is_image, paths))


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in SUFFIXES and not path.name.startswith(".")


def files_in(folder: Path, endings: Collection[str]) -> list[Path]:
    """Every file right below whose name ends so, in small letters, in the order of paths."""
    return [path for path in sorted(folder.iterdir()) if path.suffix.lower() in endings and path.is_file()]


def folders_in(folder: Path) -> list[Path]:
    """Every folder right below, in the order of paths, but for hidden ones."""
    return [path for path in sorted(folder.iterdir()) if path.is_dir() and not path.name.startswith(".")]


def names_below(folder: Path, paths: Iterable[Path]) -> tuple[str, ...]:
    """`a/b.png` of `folder/a/b.png`, for each path."""
    return tuple(path.relative_to(folder).as_posix() for path in paths)


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
    if len(text) > 80:
        text = text[:77] + "..."
    return repr(text)


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
