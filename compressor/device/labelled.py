"""A folder or a file in, its image files with what is known of each out, as the host reads it.

Forms: labels.csv, COCO's annotations, masks beside images, a folder per class. Knows no model's answers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ..errors import DataError, first_line
from .annotations import annotations_of, read_annotations
from .cropping import Crop
from .images import ARRAY_FILES, picture_file
from .labels import TABLE, ClassLabels, class_folders, labelled_files
from .listings import SUFFIXES, files_in, folders_in
from .pairs import Pairs, read_pairs
from .targets import INDEX_MODES, boxes_on_crop, mask_on_crop

if TYPE_CHECKING:
    import PIL.Image

Kind = Literal["class", "mask", "boxes"]
KIND_OF: dict[str, Kind] = {"classification": "class", "segmentation": "mask", "detection": "boxes"}
"""What a task's answers are held to."""


@dataclass(frozen=True, slots=True)
class Labelled:
    """Image files and what is stored for each: a class index (-1 unknown), a mask's file, or boxes and labels."""

    kind: Kind
    files: tuple[Path, ...]
    stored: tuple[Any, ...]


def read_labelled(path: Path, task: str, classes: Sequence[str]) -> Labelled | None:
    """The labelled images of a folder or a file of annotations, in words of `classes`; None where it is no such.

    Raises DataError for labels that can't be read, or are of another kind than the task's answers.
    """
    labelled = _read(path, task, classes)
    if labelled is None or labelled.kind == KIND_OF.get(task):
        return labelled
    judged = f"{task} is judged by the host alone"
    if task in KIND_OF:
        judged = f"a {task} is held to a {KIND_OF[task]}"
    raise DataError(f"{path} has a {labelled.kind} for each image; {judged}: give its images alone")


def _read(path: Path, task: str, classes: Sequence[str]) -> Labelled | None:
    if path.suffix.lower() == ".json" and path.is_file():
        return _of_annotations(path, classes)
    if not path.is_dir():
        return None
    if (path / TABLE).is_file():
        return _of_classes(path, labelled_files(path, classes))

    annotations = annotations_of(path)
    if annotations is not None:
        return _of_annotations(annotations, classes)
    pairs = read_pairs(path)
    if pairs is not None:
        return _of_pairs(path, pairs)
    if task == "classification" and _holds_folders_alone(path):
        return _of_classes(path, class_folders(path, classes))
    return None


def _of_annotations(file: Path, classes: Sequence[str]) -> Labelled:
    annotations = read_annotations(file, classes)
    stored = tuple(zip(annotations.boxes, annotations.labels, strict=True))
    return Labelled("boxes", _below(annotations.folder, annotations.files), stored)


def _of_classes(folder: Path, labels: ClassLabels) -> Labelled:
    return Labelled("class", _below(folder, labels.files), labels.labels)


def _of_pairs(folder: Path, pairs: Pairs) -> Labelled:
    if pairs.kind != "mask":
        raise DataError(f"{folder} holds pairs of images, which are judged by the host alone; give its images alone")
    return Labelled("mask", _below(folder, pairs.files), _below(folder, pairs.targets))


def _below(folder: Path, names: Sequence[str]) -> tuple[Path, ...]:
    return tuple(map(folder.joinpath, names))


def _holds_folders_alone(folder: Path) -> bool:
    """Whether there are folders in it, and no samples beside them."""
    return not files_in(folder, {*SUFFIXES, *ARRAY_FILES}) and bool(folders_in(folder))


def truth_of(labelled: Labelled, index: int, picture: PIL.Image.Image, crop: Crop) -> Any:
    """What the answer to a picture's crop is held to: a class index, a mask [h, w], or boxes and labels; None: unknown.

    Raises DataError for a mask or boxes that don't fit the picture.
    """
    stored = labelled.stored[index]
    if labelled.kind == "class":
        return None if stored < 0 else stored
    try:
        if labelled.kind == "mask":
            return mask_on_crop(picture_file(stored, INDEX_MODES), picture, crop)
        corners, indices = stored
        boxes, labels = boxes_on_crop(corners, indices, picture, crop)
    except (TypeError, ValueError) as error:
        raise DataError(f"{labelled.files[index]} has no usable target: {first_line(error)}; correct it") from error
    return {"boxes": boxes, "labels": labels}
