"""Batches by the number of a step alone, so that a training that is continued meets what an uninterrupted one does."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
import torch

from ..errors import DataError
from ..inputs.images import Batch, Batches


def batches_from(images: Batches, seed: int, step: int) -> Iterator[Batch]:
    """(inputs, targets) of step `step` and all later ones; each pass over the images has an order of its own.

    Raises DataError without any image.
    """
    per_pass = len(images)
    if not per_pass:
        raise DataError("there are no images to recover from; give some")
    for number in itertools.count(step // per_pass):
        first = step % per_pass if number == step // per_pass else 0
        order = int(np.random.default_rng([seed, number]).integers(2**31))
        yield from itertools.islice(images.shuffled(order), first, None)


def images_in(images: Batches, steps: int) -> int:
    """How many images so many steps show; the last batch of a pass may be smaller: 20 in 16s are 16 and 4."""
    passes, rest = divmod(steps, len(images))
    return passes * images.image_count + rest * images.batch_size


def generator_at(seed: int, step: int) -> torch.Generator:
    """Draws that depend on the step and on no earlier draw."""
    number = int(np.random.default_rng([seed, step]).integers(2**63))
    return torch.Generator().manual_seed(number)
