"""COCO's annotations (JSON) in, `Images` with boxes out; https://cocodataset.org/#format-data says what is in there.

Labels count from 0 in the order of the categories' ids, or are the model's classes by name. Crowds are left out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import DataError
from ..records import IntArray
from .folders import images_of_files, is_file, read_json_object, require_files, shown, with_targets
from .images import Images
from .samples import BOXES, LABELS, MOST_CLASSES, UNKNOWN

_NAMES = ("annotations.json", "_annotations.coco.json")
_PATTERNS = ("instances*.json", "annotations/instances*.json")
_LARGEST_PX = 1e7  # of a box's coordinate

_Boxes = dict[str, NDArray[np.float32] | IntArray]


def annotations_of(folder: Path) -> Path | None:
    """The folder's file of annotations, None without one. Raises DataError where there are several."""
    files = [folder / name for name in _NAMES if (folder / name).is_file()]
    for pattern in _PATTERNS:
        files += sorted(folder.glob(pattern))
    if len(files) > 1:
        listed = ", ".join(path.relative_to(folder).as_posix() for path in files[:3])
        raise DataError(f"folder {str(folder)!r} holds several files of annotations ({listed}); give one of them")
    return files[0] if files else None


def coco_images(file: Path, classes: Sequence[str] | None = None) -> Images:
    """The images that a file of annotations names, with their boxes; one without a box is an image of nothing.

    Raises DataError for what is no such file, and for images that are not there.
    """
    table = read_json_object(file)
    category_names = {_id(row, file): str(row.get("name", "")) for row in _rows(table, "categories", file)}
    class_names, index_of = _classes(category_names, classes, file)
    names = {_id(row, file): _file_name(row, file) for row in _rows(table, "images", file)}
    if not names:
        raise DataError(f"{str(file)!r} names no images")
    folder = _folder_of(file, next(iter(names.values())))
    require_files(folder, list(names.values()), file)

    boxes: dict[str, list[tuple[float, ...]]] = {name: [] for name in names.values()}
    labels: dict[str, list[int]] = {name: [] for name in names.values()}
    for row in _rows(table, "annotations", file):
        image, category = _reference(row, "image_id", names, file), _reference(row, "category_id", index_of, file)
        corners = _corners(row.get("bbox"), file)
        if corners[2] > corners[0] and corners[3] > corners[1] and not row.get("iscrowd"):
            boxes[names[image]].append(corners)
            labels[names[image]].append(index_of[category])
    targets = {name: _target(boxes[name], labels[name]) for name in boxes}
    images = images_of_files(folder, list(boxes), [UNKNOWN] * len(boxes), class_names)
    return with_targets(
        images,
        "boxes",
        targets.__getitem__,
        lambda name: b"".join(targets[name][key].tobytes() for key in (BOXES, LABELS)),
    )


def _target(boxes: Sequence[tuple[float, ...]], labels: Sequence[int]) -> _Boxes:
    return {BOXES: np.array(boxes, np.float32).reshape(-1, 4), LABELS: np.array(labels, np.int64)}


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
    ids = sorted(category_names)
    if not classes:
        return tuple(category_names[identity] for identity in ids), {identity: i for i, identity in enumerate(ids)}
    missing = [name for _, name in sorted(category_names.items()) if name not in classes]
    if missing:
        raise DataError(
            f"category {shown(missing[0])} of {str(file)!r} is not among the {len(classes)} classes of the model; "
            "rename it"
        )
    return tuple(classes), {identity: list(classes).index(category_names[identity]) for identity in ids}


def _corners(box: Any, file: Path) -> tuple[float, float, float, float]:
    """[x, y, width, height] as x0 y0 x1 y1."""
    match box:
        case [x, y, width, height] if all(_is_coordinate(side) for side in box):
            return float(x), float(y), float(x) + float(width), float(y) + float(height)
        case _:
            raise DataError(f"{str(file)!r} has the bbox {shown(str(box))}, expected [x, y, width, height] in pixels")


def _is_coordinate(side: object) -> bool:
    """A number of pixels that an image may have; neither NaN nor infinity is, nor JSON's true."""
    return type(side) in (int, float) and abs(side) < _LARGEST_PX  # type: ignore[arg-type]


def _folder_of(file: Path, first: str) -> Path:
    """Where the images lie: beside the annotations, or as COCO has them, `val2017/` for `instances_val2017.json`."""
    part = file.stem.removeprefix("instances_")
    above = [file.parent, file.parent.parent] if file.parent.name == "annotations" else [file.parent]
    places = [folder / name for folder in above for name in ("", "images", part, f"images/{part}")]
    return next((place for place in places if is_file(place / first)), file.parent)
