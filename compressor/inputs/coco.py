"""A file of COCO's annotations in, `Images` with boxes out; `device.annotations` reads the file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from ..device.annotations import Annotations, read_annotations
from .folders import images_of_files, with_targets
from .images import Images
from .samples import BOXES, LABELS, UNKNOWN


def coco_images(file: Path, classes: Sequence[str] | None = None) -> Images:
    """The images that a file of annotations names, with their boxes; one without a box is an image of nothing.

    Raises DataError for what is no such file, and for images that are not there.
    """
    return _images(read_annotations(file, classes))


def _images(annotations: Annotations) -> Images:
    files, boxes, labels = annotations.files, annotations.boxes, annotations.labels
    targets: dict[str, dict[str, NDArray[Any]]] = {
        name: {BOXES: corners, LABELS: indices} for name, corners, indices in zip(files, boxes, labels, strict=True)
    }
    images = images_of_files(annotations.folder, files, [UNKNOWN] * len(files), annotations.class_names)
    return with_targets(
        images,
        "boxes",
        targets.__getitem__,
        lambda name: b"".join(targets[name][key].tobytes() for key in (BOXES, LABELS)),
    )
