"""The embedded data by name: scikit-learn's scans of digits, and canvases composed of them, with masks or boxes.

`digits`, `digits-masks` and `digits-boxes`, each with the fixed, disjoint parts `:training` and `:evaluation`.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from ..errors import DataError
from .archives import images_of_array
from .canvases import COUNTS, digit_canvases
from .images import Images
from .samples import BOXES, LABELS, TargetKind
from .scans import digit_scans

NAMES = ("digits", "digits-masks", "digits-boxes")
PARTS = ("", "training", "evaluation")


def names_digits(source: str) -> bool:
    """Whether a source's name is one of these, whatever its part."""
    return source.partition(":")[0] in NAMES


def digits_images(source: str) -> Images:
    """The images of that name. Raises DataError for a part that there is not."""
    name, _, part = source.partition(":")
    if part not in PARTS:
        raise DataError(f"{source!r}: {name} has no part {part!r}; use {name}, {name}:training or {name}:evaluation")
    if name == "digits":
        return digit_scans(source)
    canvases = digit_canvases(part, COUNTS[part or "training"], seed=0)
    labels = np.full(len(canvases), -1, dtype=np.int64)
    images = replace(images_of_array(source, canvases.images[..., None], labels, ()), class_names=())
    kind: TargetKind = "mask" if name == "digits-masks" else "boxes"

    def target_of(image: str) -> object:
        index = int(image)
        if kind == "mask":
            return canvases.masks[index].astype(np.uint8)
        return {BOXES: canvases.boxes[index], LABELS: canvases.labels[index]}

    return replace(images, target_of=target_of, target_kind=kind)
