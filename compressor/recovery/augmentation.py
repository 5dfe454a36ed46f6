"""Other views of the same images: moved by up to an eighth of their sides and, in colour, mirrored.

The teacher sees what the pupil sees, so that no view needs a label that fits it, whatever the task. A grey image may
be a digit, a letter or a scan, which mirrored is something else: it is moved alone.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from ..tensors import Inputs

MOVED = 8  # one part of so many of a side
COLOUR = 3

Augment = Callable[[Inputs, torch.Generator], Inputs]


def augmented(inputs: Inputs, generator: torch.Generator) -> Inputs:
    """[N, C, H, W] images of real numbers otherwise; anything else as it is."""
    if not isinstance(inputs, Tensor) or inputs.ndim != 4 or not inputs.is_floating_point():
        return inputs
    if inputs.shape[1] == COLOUR:
        mirrored = torch.rand(len(inputs), generator=generator) < 0.5  # [N]
        inputs = torch.where(mirrored[:, None, None, None], inputs.flip(3), inputs)
    return _shifted(inputs, generator)


def _shifted(images: Tensor, generator: torch.Generator) -> Tensor:
    """Each cut anew out of its own reflection beyond the edges."""
    height, width = images.shape[2:]
    rows, columns = height // MOVED, width // MOVED
    if rows == columns == 0:  # smaller than eight pixels
        return images
    wide = functional.pad(images, (columns, columns, rows, rows), mode="reflect")
    down = torch.randint(2 * rows + 1, (len(images),), generator=generator).tolist()
    right = torch.randint(2 * columns + 1, (len(images),), generator=generator).tolist()
    moved = [wide[i, :, down[i] : down[i] + height, right[i] : right[i] + width] for i in range(len(images))]
    return torch.stack(moved)
