"""Batches one after another, as many as steps are made, and random numbers, both by the number of the step alone.

So training that is continued in the middle meets what an uninterrupted one does.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import DataError
from ..inputs.images import Batches
from ..tensors import Inputs, count

Lessons = Batches | Sequence[tuple[Inputs, Any]]


def lessons_from(batches: Lessons, seed: int, step: int) -> Iterator[Inputs]:
    """Inputs [N, ...] of step `step` and all later ones; each pass over the images has an order of its own."""
    length = len(batches)
    if not length:
        raise DataError("there are no images to learn gates from; give some")
    for epoch in itertools.count(step // length):
        first = step % length if epoch == step // length else 0
        order = np.random.default_rng([seed, epoch])
        if isinstance(batches, Batches):
            shuffled = batches.shuffled(int(order.integers(2**31)))
            for inputs, _ in itertools.islice(shuffled, first, None):
                yield inputs
        else:
            for index in order.permutation(length)[first:].tolist():
                yield batches[index][0]


def image_count(batches: Lessons) -> int:
    """Without decoding any image that is not decoded yet."""
    if isinstance(batches, Batches):
        return len(batches.images)
    return sum(count(inputs) for inputs, _ in batches)


def uniform(seed: int, step: int, *shape: int, like: Tensor) -> Tensor:
    """Numbers in (0, 1), drawn on the CPU, so that they are the same ones wherever they go."""
    generator = torch.Generator().manual_seed(int(np.random.default_rng([seed, step]).integers(2**63)))
    drawn = torch.rand(shape, generator=generator, dtype=torch.float64).clamp(1e-12, 1 - 1e-12)
    return drawn.to(like)
