"""scikit-learn's scans of digits, by part: 1,797 of 8 x 8 pixels with 17 grey levels, each with its digit."""

from __future__ import annotations

import numpy as np

from ..errors import DataError, MissingPackageError
from .archives import images_of_array
from .images import Images
from .splits import stratified_order

DIGITS_HELD_OUT = 0.4  # share of the scans that the embedded models never saw
DIGITS_SEED = 0


def digit_scans(source: str) -> Images:
    """`digits`, or its disjoint parts `digits:training` and `digits:evaluation`. Raises DataError for another."""
    _, _, part = source.partition(":")
    if part not in ("", "training", "evaluation"):
        raise DataError(f"{source!r}: digits has no part {part!r}; use digits, digits:training or digits:evaluation")
    try:
        from sklearn.datasets import load_digits  # brings scipy, and only this source needs it
    except ImportError as error:
        raise MissingPackageError("'digits' comes with scikit-learn; pip install 'compressor[compress]'") from error
    scans = load_digits()
    pixels = np.round(scans.images * (255 / 16)).astype(np.uint8)[..., None]  # 0-16 to 0-255, [N, 8, 8, 1]
    images = images_of_array(source, pixels, scans.target.astype(np.int64), ())
    if not part:
        return images
    order = stratified_order(images.names, images.labels, DIGITS_SEED)
    held_out = round(DIGITS_HELD_OUT * len(images))
    chosen = order[:held_out] if part == "evaluation" else order[held_out:]
    return images.subset(np.sort(chosen))
