"""A folder per class, or a folder with labels.csv, in; image files with class indices out.

What looks like labels and is none is refused in words. Knows no image and no model. Standard library only.
"""

from __future__ import annotations

import csv
import posixpath
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import DataError, did_you_mean
from .listings import SUFFIXES, files_in, folders_in, image_files, names_below, require_files, shown

TABLE = "labels.csv"
UNKNOWN = -1
"""The class index of a sample whose class is not known."""
MOST_CLASSES = 1_000_000
"""More are ids or hashes that were taken for class indices."""

_PARTS = {"train", "training", "val", "valid", "validation", "test", "testing", "eval", "evaluation", "calibration"}
_FILE_COLUMNS = ("filename", "file", "path", "filepath", "image", "name")
_LABEL_COLUMNS = ("label", "class", "index", "target", "class_name", "category")

_LONGEST_NAME = 1000  # characters of a class name
_WHOLE = re.compile(r"[+-]?[0-9]+")


def too_large_label(label: str, where: str) -> str:
    return (
        f"{where!r} has label {label}, expected class indices from 0 to the number of classes, at most "
        f"{MOST_CLASSES:,}; is it a column of ids? Give indices or class names"
    )


@dataclass(frozen=True, slots=True)
class ClassLabels:
    """Image files of a folder by name, and the class index of each, -1 where it is not known."""

    files: tuple[str, ...]
    labels: tuple[int, ...]
    class_names: tuple[str, ...] = ()


def class_folders(folder: Path, classes: Sequence[str] | None = None) -> ClassLabels:
    """Of a folder for each class; of images without such folders all are unknown. Raises DataError without images.

    `classes` fixes which class name has which index; without it class folders count in alphabetical order.
    """
    files_of = {path.name: image_files(path) for path in folders_in(folder)}
    _require_images(folder, files_of)
    if not any(files_of.values()):
        return _unlabelled(folder)
    _require_classes(folder, files_of)

    class_names = tuple(classes or files_of)
    names: list[str] = []
    labels: list[int] = []
    for class_name, files in files_of.items():
        names += names_below(folder, files)
        labels += [_index(class_name, class_names, folder)] * len(files)
    return ClassLabels(tuple(names), tuple(labels), class_names)


def _unlabelled(folder: Path) -> ClassLabels:
    files = image_files(folder)
    if not files:
        raise DataError(
            f"folder {str(folder)!r} holds no images; expected one folder per class, or images with labels.csv, "
            f"of the kinds {', '.join(sorted(SUFFIXES))}"
        )
    return ClassLabels(names_below(folder, files), (UNKNOWN,) * len(files))


def _require_images(folder: Path, files_of: Mapping[str, Sequence[Path]]) -> None:
    """An empty class would be passed over in silence, and the classes behind it would move up."""
    empty = [name for name, files in files_of.items() if not files]
    if 0 < len(empty) < len(files_of):
        named = ", ".join(map(repr, empty[:3]))
        if len(empty) > 3:
            named += ", ..."
        raise DataError(
            f"{len(empty)} of {len(files_of)} class folders of {str(folder)!r} hold no images ({named}); put images of "
            f"the kinds {', '.join(sorted(SUFFIXES))} there, or remove those folders"
        )


def _require_classes(folder: Path, files_of: Mapping[str, Sequence[Path]]) -> None:
    """Folders that are no classes, and images that would be passed over, are refused."""
    if _PARTS.issuperset(map(str.lower, files_of)):
        raise DataError(
            f"folder {str(folder)!r} holds the parts {', '.join(files_of)}, not classes; give one of them as the "
            "images and another as the evaluation images"
        )
    loose = files_in(folder, SUFFIXES)
    if loose:
        raise DataError(
            f"{len(loose)} images (first: {loose[0].name!r}) lie beside the class folders of {str(folder)!r}; "
            "move them into a class or elsewhere"
        )


def _index(name: str, classes: Sequence[str], where: Path) -> int:
    if name not in classes:
        raise DataError(
            f"class {name!r} in {str(where)!r} is not among the {len(classes)} classes "
            f"of the model.{did_you_mean(name, list(classes))} Rename it or give labels.csv with class indices"
        )
    return classes.index(name)


def labelled_files(folder: Path, classes: Sequence[str] | None = None) -> ClassLabels:
    """Of the folder's labels.csv. Raises DataError for what is no such table, and for files that are not there."""
    table = folder / TABLE
    try:
        with table.open(newline="", encoding="utf-8-sig") as file:
            rows = list(csv.DictReader(file, restval=""))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{str(table)!r} is not a table in UTF-8 ({error}); save it as CSV") from error
    if not rows:
        raise DataError(f"{str(table)!r} has no rows below its header; expected one line per image")

    file_column = _column(rows[0], _FILE_COLUMNS, table)
    label_column = _column(rows[0], _LABEL_COLUMNS, table)
    files = [row[file_column] for row in rows]
    texts = [row[label_column].strip() for row in rows]
    require_files(folder, files, table)
    labels, names = _labels(texts, classes, table)
    _require_agreement(files, labels, table)
    return ClassLabels(tuple(files), tuple(labels), names)


def _require_agreement(files: Sequence[str], labels: Sequence[int], table: Path) -> None:
    """No file has two labels."""
    first_label: dict[str, int] = {}
    for name, label in zip(files, labels, strict=True):
        path = posixpath.normpath(name)  # `a/../b.png` is `b.png`
        if first_label.setdefault(path, label) != label:
            raise DataError(
                f"{str(table)!r} gives {shown(name)} the labels {first_label[path]} and {label}; keep one row of each "
                "image"
            )


def _column(row: Mapping[str, object], accepted: Sequence[str], table: Path) -> str:
    """The name, as the table spells it, of the first accepted column that it has."""
    columns = {name.strip().lower(): name for name in row if name}
    for name in accepted:
        if name in columns:
            return columns[name]
    expected = " or ".join(accepted[:3])
    raise DataError(f"{str(table)!r} has columns {', '.join(columns)}; expected one named {expected}")


def _labels(texts: Sequence[str], classes: Sequence[str] | None, table: Path) -> tuple[list[int], tuple[str, ...]]:
    """Whole numbers are indices, -1 and empty mean unknown; anything else is a class name."""
    written = list(filter(None, dict.fromkeys(texts)))  # each once, in the table's order
    for text in written:
        _require_label(text, table)
    if all(map(_WHOLE.fullmatch, written)):
        indices = [int(text or UNKNOWN) for text in texts]
        return indices, _names_of_indices(indices, classes, table)

    names = tuple(classes or sorted(written))
    index_of = {text: _index(text, names, table) for text in written}
    return [index_of.get(text, UNKNOWN) for text in texts], names


def _names_of_indices(indices: Sequence[int], classes: Sequence[str] | None, table: Path) -> tuple[str, ...]:
    """The model's classes, else the numbers themselves as names; every index must have one."""
    names = tuple(classes or map(str, range(max(indices) + 1)))
    for index in indices:
        if not UNKNOWN <= index < len(names):
            raise DataError(f"{str(table)!r} has label {index}, outside 0 to {len(names) - 1}; correct the row")
    return names


def _require_label(text: str, table: Path) -> None:
    """An index of a size that classes have, or a name; what looks like a number and is no index is refused."""
    if _WHOLE.fullmatch(text):
        digits = text.lstrip("+-0")
        # counted before they are read: Python refuses to read thousands of them
        if len(digits) > len(str(MOST_CLASSES)) or int(digits or 0) >= MOST_CLASSES:
            raise DataError(too_large_label(repr(text[:20]), str(table)))
    elif len(text) > _LONGEST_NAME:
        raise DataError(f"{str(table)!r} has a class name of {len(text)} characters; correct the row of {shown(text)}")
    elif _is_number(text):
        raise DataError(
            f"{str(table)!r} has label {shown(text)}, which is neither a class index (0, 1, ...) nor a class name; "
            "correct the row"
        )


def _is_number(text: str) -> bool:
    """`1.0`, `--1`, `1e9`, `²`: digits and what stands around them in numbers, and nothing else."""
    digits = set(filter(str.isdigit, text))
    others = set(text) - digits
    return bool(digits) and others <= set("+-.,eE")
