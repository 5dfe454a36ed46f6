"""A data set of Hugging Face's package `datasets`, or a folder that its `save_to_disk` wrote, in; `Images` out.

Images are read one by one when they are asked for, labels as a column. A data set of one's own is decoded by the
library, a folder's images here, from the bytes it holds: what names a file or an address is not followed. The package
is optional. Knows its columns and features, no single data set.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, TypeGuard, cast

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageOps

from ..device.listings import read_json_object, shown
from ..errors import DataError, MissingPackageError, did_you_mean
from .blame import raised
from .calls import SPLITS, names_split
from .datasets import dataset_images
from .images import Images
from .samples import UNKNOWN

_STATE, _INFO = "state.json", "dataset_info.json"
_LABELS = ("label", "labels", "target", "targets")


def saved_images(source: str) -> Images | None:
    """The images of a folder that `save_to_disk` wrote, or of `FOLDER:split` of one with several; None for others.

    Raises DataError where a split is missing or there is none, a file lies outside or is damaged, or no column holds
    images; MissingPackageError without the package.
    """
    folder = _split_folder(source) if names_split(source) else Path(source).expanduser()
    if (folder / SPLITS).is_file():
        splits = _splits(folder)
        raise DataError(f"{source!r} holds the splits {', '.join(splits)}; name one: {source.rstrip('/')}:{splits[0]}")
    if not ((folder / _STATE).is_file() and (folder / _INFO).is_file()):
        return None
    _require_files_inside(folder)
    library = _library(source)
    try:
        table = _undecoded(library, folder)
    except Exception as error:  # the library's and Arrow's are of every kind
        raise DataError(f"{source!r} can't be read as a saved data set: {raised(error)}; save it again") from error
    images = table_images(source, table)
    if images is None:
        raise DataError(
            f"{source!r} has the columns {', '.join(table.column_names)}, expected one of images, and whole numbers in "
            f"one called {_LABELS[0]!r}"
        )
    return images


def _undecoded(library: ModuleType, folder: Path) -> Any:
    """The table that lies in a folder, its images as the bytes that they were saved as."""
    table = library.load_from_disk(str(folder)).with_format(None)
    for name in _columns(table, "Image"):
        mode = getattr(table.features[name], "mode", None)
        table = table.cast_column(name, library.Image(mode=mode, decode=False))
    return table


def _splits(folder: Path) -> Sequence[str]:
    names = read_json_object(folder / SPLITS).get("splits")
    if not isinstance(names, list) or not names or not all(isinstance(name, str) and name for name in names):
        raise DataError(f"{str(folder / SPLITS)!r} names no splits; save the data set again")
    return names


def _split_folder(source: str) -> Path:
    place, _, name = source.rpartition(":")
    folder = Path(place).expanduser()
    splits = _splits(folder)
    if name not in splits or Path(name).name != name:
        raise DataError(
            f"{place!r} has no split {name!r}, it has {', '.join(splits)}.{did_you_mean(name, list(splits))}"
        )
    return folder / name


def _require_files_inside(folder: Path) -> None:
    files = read_json_object(folder / _STATE).get("_data_files")
    for entry in files or ():
        name = entry.get("filename") if isinstance(entry, dict) else None
        if not _is_file_in(folder, name):
            raise DataError(
                f"{str(folder / _STATE)!r} names {shown(str(name))}, which is no file beside it; save the data set "
                "again"
            )


def _is_file_in(folder: Path, name: object) -> bool:
    """Whether it is the bare name of a file there."""
    if not isinstance(name, str) or Path(name).name != name:
        return False
    return (folder / name).is_file()


def _library(source: str) -> ModuleType:
    try:
        import datasets
    except ImportError as error:
        raise MissingPackageError(
            f"{source!r} was saved by the package datasets, which is not installed: pip install 'compressor[datasets]'"
        ) from error
    return cast(ModuleType, datasets)


def is_table(data: object) -> TypeGuard[Any]:
    """Whether it has columns with features, as that library's data sets, also those that are streamed."""
    return isinstance(getattr(data, "features", None), Mapping) and hasattr(data, "column_names")


def table_images(source: str, table: object) -> Images | None:
    """The images of a data set with one column of them, and of whole numbers if any; None for everything else.

    Raises DataError for several splits at once, one that is streamed, and several columns of classes.
    """
    if isinstance(table, Mapping):
        _require_no_splits(source, table)
    if not is_table(table):
        return None
    if not hasattr(table, "__len__"):
        raise DataError(f"{source} is streamed, and images are read by number; load it without streaming=True")
    pictures = _columns(table, "Image")
    label = _label_column(source, table)
    if len(pictures) != 1:
        return None
    if label and not _is_whole(table.features[label]):
        return None
    return dataset_images(source, _rows(table, pictures[0], label))


def _require_no_splits(source: str, tables: Mapping[Any, object]) -> None:
    """Raises DataError for a dict of tables alone."""
    if tables and all(is_table(part) for part in tables.values()):
        names = ", ".join(map(str, tables))
        raise DataError(f"{source} has the splits {names}; give one of them: data[{next(iter(tables))!r}]")


def _columns(table: Any, kind: str) -> list[str]:
    """The columns whose feature is of that class of the library's."""
    return [name for name, feature in table.features.items() if type(feature).__name__ == kind]


def _label_column(source: str, table: Any) -> str:
    """By its name, else the only one of classes; empty without either."""
    named = next((name for name in _LABELS if name in table.features), "")
    if named:
        return named
    classes = _columns(table, "ClassLabel")
    if len(classes) > 1:
        raise DataError(
            f"{source} has the classes {', '.join(classes)}; rename the column that is meant: "
            f"data.rename_column({classes[0]!r}, 'label')"
        )
    return next(iter(classes), "")


def _is_whole(feature: object) -> bool:
    """Whether a column holds class indices; several of them a sample, and floats, are other targets."""
    match type(feature).__name__:
        case "ClassLabel":
            return True
        case "Value":
            return "int" in str(getattr(feature, "dtype", ""))
        case _:
            return False


@dataclass(frozen=True, slots=True)
class _Rows:
    """A table as a data set of (image, class index), which are [images]; `classes` as torchvision's have them."""

    table: Any
    column: str
    targets: NDArray[np.int64]
    classes: Sequence[str] | None

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[object, int]:
        feature = self.table.features[self.column]
        return _picture(self.table[index][self.column], getattr(feature, "mode", None)), int(self.targets[index])


def _rows(table: Any, column: str, label: str) -> _Rows:
    if not label:
        return _Rows(table, column, np.full(len(table), UNKNOWN), ())
    values = table[label][:]
    targets = np.array([UNKNOWN if value is None else int(value) for value in values], np.int64)
    return _Rows(table, column, targets, getattr(table.features[label], "names", None))


def _picture(value: object, mode: str | None) -> object:
    """An image that is not decoded yet, as the library decodes it: upright, and in the column's mode."""
    if not isinstance(value, Mapping):
        return value
    content = value.get("bytes")
    if not content:
        raise ValueError(f"it is the path {shown(str(value.get('path')))} alone, without its bytes")
    picture: Image.Image = Image.open(io.BytesIO(content))
    picture.load()
    if picture.getexif().get(ExifTags.Base.Orientation) is not None:
        picture = ImageOps.exif_transpose(picture)
    if not mode or picture.mode == mode:
        return picture
    return picture.convert(mode)
