"""The name of a source in, `Images` or `Examples` out.

Sources: a folder per class, a folder with labels.csv, images with masks, boxes or other images (`paired`, `coco`), an
.npz (`archives`), `torchvision:NAME(key=value)`, `file.py:loader`, and `digits[:training|:evaluation]`, scikit-learn's
scans. Knows neither models nor recipes.
"""

from __future__ import annotations

import csv
import posixpath
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from ..errors import DataError, did_you_mean
from .archives import npz_data, too_large_label
from .calls import names_code
from .coco import annotations_of, coco_images
from .data import given_data
from .datasets import library_images
from .digits import digits_images, names_digits
from .entries import ANY_SIGNATURE, Signature
from .examples import Examples
from .folders import SUFFIXES, image_files, images_of_files, require_files, shown
from .images import Images, Source, Storage
from .loaders import called_loader
from .paired import paired_images
from .samples import MOST_CLASSES

_PARTS = {"train", "training", "val", "valid", "validation", "test", "testing", "eval", "evaluation", "calibration"}
_FILE_COLUMNS = ("filename", "file", "path", "filepath", "image", "name")
_LABEL_COLUMNS = ("label", "class", "index", "target", "class_name", "category")

_LONGEST_NAME = 1000  # characters of a class name
_WHOLE = re.compile(r"[+-]?[0-9]+")

# how images of each kind are given their labels
_LABELLED: Mapping[Storage, str] = {
    "files": "sort them into one folder per class or add labels.csv",
    "npz": "store 'labels' in the .npz, the class index of each image",
    "arrays": "give a pair of arrays (images, labels)",
    "data set": "let the data set give pairs (image, label)",
}


def load_images(source: str, *, classes: Sequence[str] | None = None, root: str = "data") -> Images:
    """The images of a source, none decoded yet (an .npz is read whole).

    `classes` fixes which class name has which index; without it class folders and names count in
    alphabetical order, as in torchvision's ImageFolder. `root` is where torchvision keeps its data sets.
    Raises DataError for a source that is not there, holds no images or labels them wrongly.
    """
    images = load_source(source, classes=classes, root=root)
    if isinstance(images, Examples):
        raise DataError(f"{source!r} holds tensors as a network takes them, expected images")
    return images


def load_source(
    source: str,
    signature: Signature = ANY_SIGNATURE,
    *,
    classes: Sequence[str] | None = None,
    root: str = "data",
) -> Images | Examples:
    """As `load_images`, and sources of tensors, of which `signature` says how a network takes them.

    Runs the user's code where the source names it (`file.py:loader`); `trust` says when that may be.
    """
    if names_digits(source):
        return digits_images(source)
    if source.startswith("torchvision:"):
        return library_images(source, root)
    path = Path(source).expanduser()
    if not path.exists():
        return _of_code(source, signature, classes, root)
    if not path.is_file():
        return _folder_images(path, classes)
    if path.suffix.lower() == ".json":
        return coco_images(path, classes)
    return npz_data(path, signature)


def _folder_images(folder: Path, classes: Sequence[str] | None) -> Images:
    """By what lies in it: a table of labels, boxes, masks or other images, else a folder for each class."""
    if (folder / "labels.csv").is_file():
        return _labelled_folder(folder, classes)
    annotations = annotations_of(folder)
    if annotations is not None:
        return coco_images(annotations, classes)
    return paired_images(folder) or _class_folders(folder, classes)


def _of_code(source: str, signature: Signature, classes: Sequence[str] | None, root: str) -> Images | Examples:
    if not names_code(source):
        raise DataError(
            f"{source!r} is neither a folder nor a file here; give a folder of images, an .npz, 'digits', "
            "'torchvision:NAME' or file.py:loader"
        )
    data = given_data(called_loader(source), signature)
    if isinstance(data, str) and not names_code(data):  # a loader may name a folder; one that names a loader has no end
        return load_source(data, signature, classes=classes, root=root)
    if data is None or isinstance(data, str):
        raise DataError(f"{source!r} gave {data!r}, expected a loader, a Dataset, arrays or the name of a folder")
    return data


def require_labels(images: Source, outputs: int) -> None:
    """Raises DataError unless every image has a label that a model of that many outputs can give."""
    unknown = np.flatnonzero(images.labels < 0)
    if unknown.size:
        raise DataError(
            f"{unknown.size} of {len(images)} images of {images.source} have no label "
            f"(first: {images.names[unknown[0]]!r}); {_LABELLED[images.storage]}"
        )
    beyond = np.flatnonzero(images.labels >= outputs)
    if beyond.size:
        first = beyond[0]
        raise DataError(
            f"image {images.names[first]!r} of {images.source} has label {images.labels[first]}, but the model tells "
            f"{outputs} classes apart (0 to {outputs - 1}); check the labels or the model's number of classes"
        )


def _class_folders(folder: Path, classes: Sequence[str] | None) -> Images:
    inner = [path for path in sorted(folder.iterdir()) if path.is_dir() and not path.name.startswith(".")]
    files_of = {path.name: image_files(path) for path in inner}
    _require_images(folder, files_of)
    if not any(files_of.values()):
        return _unlabelled_folder(folder)
    _require_classes(folder, files_of)

    class_names = tuple(classes or files_of)
    names: list[str] = []
    labels: list[int] = []
    for class_name, files in files_of.items():
        names += [path.relative_to(folder).as_posix() for path in files]
        labels += [_index(class_name, class_names, folder)] * len(files)
    return images_of_files(folder, names, labels, class_names)


def _unlabelled_folder(folder: Path) -> Images:
    files = image_files(folder)
    if not files:
        raise DataError(
            f"folder {str(folder)!r} holds no images; expected one folder per class, or images with labels.csv, "
            f"of the kinds {', '.join(sorted(SUFFIXES))}"
        )
    return images_of_files(folder, [path.relative_to(folder).as_posix() for path in files], [-1] * len(files), ())


def _require_images(folder: Path, files_of: Mapping[str, Sequence[Path]]) -> None:
    """An empty class would be passed over in silence, and the classes behind it would move up."""
    empty = [name for name, files in files_of.items() if not files]
    if empty and len(empty) < len(files_of):
        named = ", ".join(repr(name) for name in empty[:3])
        if len(empty) > 3:
            named += ", ..."
        raise DataError(
            f"{len(empty)} of {len(files_of)} class folders of {str(folder)!r} hold no images ({named}); put images of "
            f"the kinds {', '.join(sorted(SUFFIXES))} there, or remove those folders"
        )


def _require_classes(folder: Path, files_of: Mapping[str, Sequence[Path]]) -> None:
    """Folders that are no classes, and images that would be passed over, are refused."""
    if _PARTS.issuperset(name.lower() for name in files_of):
        raise DataError(
            f"folder {str(folder)!r} holds the parts {', '.join(files_of)}, not classes; give one of them as the "
            "images and another as the evaluation images"
        )
    loose = [path.name for path in folder.iterdir() if path.is_file() and path.suffix.lower() in SUFFIXES]
    if loose:
        raise DataError(
            f"{len(loose)} images (first: {loose[0]!r}) lie beside the class folders of {str(folder)!r}; "
            "move them into a class or elsewhere"
        )


def _index(name: str, classes: Sequence[str], where: Path) -> int:
    if name not in classes:
        raise DataError(
            f"class {name!r} in {str(where)!r} is not among the {len(classes)} classes "
            f"of the model.{did_you_mean(name, list(classes))} Rename it or give labels.csv with class indices"
        )
    return list(classes).index(name)


def _labelled_folder(folder: Path, classes: Sequence[str] | None) -> Images:
    table = folder / "labels.csv"
    try:
        with table.open(newline="", encoding="utf-8-sig") as file:
            rows = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{str(table)!r} is not a table in UTF-8 ({error}); save it as CSV") from error
    if not rows:
        raise DataError(f"{str(table)!r} has no rows below its header; expected one line per image")

    file_column = _column(rows[0], _FILE_COLUMNS, table)
    label_column = _column(rows[0], _LABEL_COLUMNS, table)
    files = [row[file_column] or "" for row in rows]
    texts = [(row[label_column] or "").strip() for row in rows]
    require_files(folder, files, table)
    labels, names = _labels(texts, classes, table)
    _require_agreement(files, labels, table)
    return images_of_files(folder, files, labels, names)


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
    spelled = [columns[name] for name in accepted if name in columns]
    if not spelled:
        expected = " or ".join(accepted[:3])
        raise DataError(f"{str(table)!r} has columns {', '.join(columns)}; expected one named {expected}")
    return spelled[0]


def _labels(texts: Sequence[str], classes: Sequence[str] | None, table: Path) -> tuple[list[int], tuple[str, ...]]:
    """Whole numbers are indices, -1 and empty mean unknown; anything else is a class name."""
    for text in texts:
        _require_label(text, table)
    if all(_WHOLE.fullmatch(text) or not text for text in texts):
        indices = [int(text or "-1") for text in texts]
        return indices, _names_of_indices(indices, classes, table)
    names = tuple(classes or sorted(set(texts) - {""}))
    return [_index(text, names, table) if text else -1 for text in texts], names


def _names_of_indices(indices: Sequence[int], classes: Sequence[str] | None, table: Path) -> tuple[str, ...]:
    """The model's classes, else the numbers themselves as names; every index must have one."""
    names = tuple(classes or map(str, range(max(indices) + 1)))
    wrong = [i for i in indices if not -1 <= i < len(names)]
    if wrong:
        raise DataError(f"{str(table)!r} has label {wrong[0]}, outside 0 to {len(names) - 1}; correct the row")
    return names


def _require_label(text: str, table: Path) -> None:
    """An index of a size that classes have, or a name; what looks like a number and is no index is refused."""
    if _WHOLE.fullmatch(text):
        too_long = len(text.lstrip("+-0")) > len(str(MOST_CLASSES))  # Python refuses to read thousands of digits
        if too_long or abs(int(text)) >= MOST_CLASSES:
            raise DataError(too_large_label(repr(text[:20]), str(table)))
    elif len(text) > _LONGEST_NAME:
        raise DataError(f"{str(table)!r} has a class name of {len(text)} characters; correct the row of {shown(text)}")
    elif text and _is_number(text):
        raise DataError(
            f"{str(table)!r} has label {shown(text)}, which is neither a class index (0, 1, ...) nor a class name; "
            "correct the row"
        )


def _is_number(text: str) -> bool:
    """`1.0`, `--1`, `1e9`, `²`: digits and what stands around them in numbers, and nothing else."""
    characters = set(text)
    digits = {character for character in characters if character.isdigit()}
    return bool(digits) and characters - digits <= set("+-.,eE")
