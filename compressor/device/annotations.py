"""COCO's annotations (JSON) in, image files with their boxes out.

https://cocodataset.org/#format-data says what is in there.

Labels count from 0 in the order of the categories' ids, or are the model's classes by name. Crowds are left out.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import DataError
from ..records import IntArray
from .labels import MOST_CLASSES
from .listings import is_file, names_below, read_json_object, require_files, shown

_PATTERNS = ("annotations.json", "_annotations.coco.json", "instances*.json", "annotations/instances*.json")
_LARGEST_PX = 1e7  # of a box's coordinate


@dataclass(frozen=True, slots=True)
class Annotations:
    """Image files of `folder` by name.

    Image i has `boxes[i]`, float32 [k, 4], x0 y0 x1 y1 in its pixels, of the classes `labels[i]`, int64 [k].
    """

    folder: Path
    files: tuple[str, ...]
    class_names: tuple[str, ...]
    boxes: tuple[NDArray[np.float32], ...]
    labels: tuple[IntArray, ...]


def annotations_of(folder: Path) -> Path | None:
    """The folder's file of annotations, None without one. Raises DataError where there are several."""
    files: list[Path] = []
    for pattern in _PATTERNS:
        files += filter(Path.is_file, sorted(folder.glob(pattern)))
    if len(files) > 1:
        listed = ", ".join(names_below(folder, files[:3]))
        raise DataError(f"folder {str(folder)!r} holds several files of annotations ({listed}); give one of them")
    return files[0] if files else None


def read_annotations(file: Path, classes: Sequence[str] | None = None) -> Annotations:
    """What a file of annotations says; an image without a box is an image of nothing.

    Raises DataError for what is no such file, and for images that are not there.
    """
    table = read_json_object(file)
    category_names = {_id(row, file): str(row.get("name", "")) for row in _rows(table, "categories", file)}
    class_names, index_of = _classes(category_names, classes, file)
    names = {_id(row, file): _file_name(row, file) for row in _rows(table, "images", file)}
    if not names:
        raise DataError(f"{str(file)!r} names no images")
    files = tuple(dict.fromkeys(names.values()))  # each once: a file may be listed under two ids
    folder = _folder_of(file, files[0])
    require_files(folder, list(names.values()), file)

    boxes: dict[str, list[tuple[float, ...]]] = defaultdict(list)
    labels: dict[str, list[int]] = defaultdict(list)
    for row in _rows(table, "annotations", file):
        name = names[_reference(row, "image_id", names, file)]
        category = _reference(row, "category_id", index_of, file)
        corners = _corners(row.get("bbox"), file)
        if _has_area(corners) and not row.get("iscrowd"):
            boxes[name].append(corners)
            labels[name].append(index_of[category])
    return Annotations(
        folder,
        files,
        class_names,
        boxes=tuple(np.array(boxes[name], np.float32).reshape(-1, 4) for name in files),  # of no box, [0, 4]
        labels=tuple(np.array(labels[name], np.int64) for name in files),
    )


def _has_area(corners: tuple[float, float, float, float]) -> bool:
    x0, y0, x1, y1 = corners
    return x1 > x0 and y1 > y0


def _rows(table: Mapping[str, Any], key: str, file: Path) -> Sequence[Mapping[str, Any]]:
    """The objects listed under a key."""
    rows = table.get(key)
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise DataError(f"{str(file)!r} has no list of {key}; expected COCO's images, annotations and categories")
    return rows


def _id(row: Mapping[str, Any], file: Path) -> int:
    identity = row.get("id")
    if not isinstance(identity, int):
        raise DataError(
            f"{str(file)!r} has an image or a category whose id is {identity!r:.20}, expected a whole number"
        )
    return identity


def _file_name(row: Mapping[str, Any], file: Path) -> str:
    name = row.get("file_name")
    if not isinstance(name, str) or not name:
        raise DataError(f"{str(file)!r} has an image whose file_name is {shown(str(name))}, expected a path")
    return name


def _reference(row: Mapping[str, Any], key: str, rows: Mapping[int, object], file: Path) -> int:
    """The id of an image or a category that an annotation is of."""
    identity = row.get(key)
    if not isinstance(identity, int) or identity not in rows:
        raise DataError(f"{str(file)!r} has an annotation whose {key} is {shown(str(identity))}, which is not in it")
    return identity


def _classes(
    category_names: Mapping[int, str], classes: Sequence[str] | None, file: Path
) -> tuple[tuple[str, ...], Mapping[int, int]]:
    """Names of classes, and which of them a category is."""
    if len(category_names) > MOST_CLASSES:
        raise DataError(f"{str(file)!r} has {len(category_names)} categories, expected at most {MOST_CLASSES:,}")
    names_by_id = dict(sorted(category_names.items()))
    if not classes:
        return tuple(names_by_id.values()), {identity: index for index, identity in enumerate(names_by_id)}
    index_of = {}
    for identity, name in names_by_id.items():
        if name not in classes:
            raise DataError(
                f"category {shown(name)} of {str(file)!r} is not among the {len(classes)} classes of the model; "
                "rename it"
            )
        index_of[identity] = classes.index(name)
    return tuple(classes), index_of


def _corners(box: Any, file: Path) -> tuple[float, float, float, float]:
    """[x, y, width, height] as x0 y0 x1 y1."""
    match box:
        case [x, y, width, height] if all(map(_is_coordinate, box)):
            return float(x), float(y), float(x) + float(width), float(y) + float(height)
        case _:
            raise DataError(f"{str(file)!r} has the bbox {shown(str(box))}, expected [x, y, width, height] in pixels")


def _is_coordinate(side: object) -> bool:
    """A number of pixels that an image may have; neither NaN nor infinity is, nor JSON's true."""
    return type(side) in (int, float) and abs(side) < _LARGEST_PX  # type: ignore[arg-type]


def _folder_of(file: Path, first: str) -> Path:
    """Where the images lie: beside the annotations, or as COCO has them, `val2017/` for `instances_val2017.json`."""
    part = file.stem.removeprefix("instances_")
    above = [file.parent]
    if file.parent.name == "annotations":
        above.append(file.parent.parent)
    for folder, name in itertools.product(above, ("", "images", part, f"images/{part}")):
        if is_file(folder / name / first):
            return folder / name
    return file.parent
