"""Batches by the number of a step alone, so that a training that is continued meets what an uninterrupted one does."""

from __future__ import annotations

from collections.abc import Iterator

from ..errors import DataError
from ..inputs.images import Batch, Batches
from ..steering import lessons


def batches_from(images: Batches, seed: int, step: int) -> Iterator[Batch]:
    """(inputs, targets) of step `step` and all later ones; each pass over the images has an order of its own.

    Raises DataError without any image.
    """
    if not len(images):
        raise DataError("there are no images to recover from; give some")
    return lessons.batches_from(images, seed, step)


def images_in(images: Batches, steps: int) -> int:
    """How many images so many steps show; the last batch of a pass may be smaller: 20 in 16s are 16 and 4."""
    passes, further = divmod(steps, len(images))
    return passes * images.image_count + further * images.batch_size
