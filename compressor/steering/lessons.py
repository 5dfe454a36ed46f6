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


SAMPLED = 8  # batches that tell how far answers, or spots, lie apart


def lessons_from(batches: Lessons, seed: int, step: int) -> Iterator[Inputs]:
    """Inputs [N, ...] of step `step` and all later ones, as `batches_from` has them. Raises DataError without any."""
    if not len(batches):
        raise DataError("there are no images to learn gates from; give some")
    for inputs, _ in batches_from(batches, seed, step):
        yield inputs


def batches_from(batches: Lessons, seed: int, step: int) -> Iterator[tuple[Inputs, Any]]:
    """(inputs, targets) of step `step` and all later ones; each pass over the images has an order of its own."""
    first_pass, done = divmod(step, len(batches))
    for number in itertools.count(first_pass):
        shuffled = _in_new_order(batches, np.random.default_rng([seed, number]))
        yield from itertools.islice(shuffled, done, None)
        done = 0  # of every later pass


def first_lessons(batches: Lessons) -> Iterator[Inputs]:
    """A few of the batches."""
    return itertools.islice(lessons_from(batches, 0, 0), min(SAMPLED, len(batches)))


def _in_new_order(batches: Lessons, generator: np.random.Generator) -> Iterator[tuple[Inputs, Any]]:
    """One pass: the images of `Batches` change places between batches, of anything else whole batches do."""
    if isinstance(batches, Batches):
        return batches.shuffled(int(generator.integers(2**31)))
    return (batches[index] for index in generator.permutation(len(batches)).tolist())


def image_count(batches: Lessons) -> int:
    """Without decoding any image that is not decoded yet."""
    if isinstance(batches, Batches):
        return len(batches.images)
    return sum(count(inputs) for inputs, _ in batches)


def uniform(seed: int, step: int, *shape: int, like: Tensor) -> Tensor:
    """Numbers in (0, 1), drawn on the CPU, so that they are the same ones wherever they go."""
    drawn = torch.rand(shape, generator=generator_at(seed, step), dtype=torch.float64)
    return drawn.clamp(1e-12, 1 - 1e-12).to(like)


def generator_at(seed: int, step: int) -> torch.Generator:
    """Draws that depend on the step and on no earlier draw."""
    number = int(np.random.default_rng([seed, step]).integers(2**63))
    return torch.Generator().manual_seed(number)
