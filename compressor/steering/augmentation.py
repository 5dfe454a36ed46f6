"""Images as they might have been taken as well: moved by a few pixels, mirrored. Inputs in, as many of them out.

What is drawn depends on the seed and the step alone. Inputs that are no image stay as they are.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from ..tensors import Inputs
from .lessons import uniform

_SEED = 5_000  # added to a training's own, whose numbers draw masks and gates


@dataclass(frozen=True, slots=True)
class Augmentation:
    """`shift` is the farthest way along each side, as a share of it; `flip` mirrors every other image, left and right.

    What reads left from right, digits and words, must not be mirrored.
    """

    shift: float = 1 / 16
    flip: bool = False


def varied(inputs: Inputs, augmentation: Augmentation, seed: int, step: int) -> Inputs:
    """[N, C, H, W] moved and mirrored one by one; what a shift bares repeats the border."""
    if not isinstance(inputs, Tensor) or inputs.ndim != 4 or not inputs.is_floating_point():
        return inputs
    numbers = uniform(seed + _SEED, step, len(inputs), 3, like=torch.zeros((), dtype=torch.float64))
    if augmentation.flip:
        mirrored = (numbers[:, 2] < 0.5).to(inputs.device)
        inputs = torch.where(mirrored[:, None, None, None], inputs.flip(3), inputs)
    height, width = inputs.shape[2:]
    reach = torch.tensor([round(augmentation.shift * height), round(augmentation.shift * width)])
    if not reach.any():
        return inputs
    y, x = reach.tolist()
    # 2 pixels of reach: 0 to 4 of a border of 2, of which 2 is the image where it was
    corners = (numbers[:, :2] * (2 * reach + 1)).long().tolist()
    wide = functional.pad(inputs, (x, x, y, y), mode="replicate")
    windows = zip(wide, corners, strict=True)
    return torch.stack([image[:, top : top + height, left : left + width] for image, (top, left) in windows])
