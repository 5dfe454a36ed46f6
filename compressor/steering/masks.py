"""Masks of images with one round spot each, and what one costs: centres and widths in, [N, 1, H, W] in 0 to 1 out.

Lengths are in pixels. The paper gives them for images of 32 and of 224 pixels; in between, and beyond, a length is the
power of the side that meets both (Ganjdanesh, Gao, Huang, ECCV 2022, arXiv 2209.02869).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

SMALL, LARGE = 32.0, 224.0
DISC = 1 - 1 / math.e  # a number that shows where a spot is above 1/e: a disc as large as the spot's sum, 2 pi sigma^2
LEAST_WIDTH = 1e-8  # of a spot, whose square is divided by
_BASE = 5e-4  # added to a mask before its root is taken, whose slope at 0 has no end


def length_at(side: float, small: float, large: float) -> float:
    """What is `small` on images of 32 pixels and `large` on 224."""
    power = math.log(large / small) / math.log(LARGE / SMALL)
    return float(small * (side / SMALL) ** power)


def margin_at(side: float) -> float:
    """How near a centre comes to the border: 2 of 32 pixels, 4 of 224."""
    return length_at(side, 2.0, 4.0)


def papers_widths_at(side: float) -> tuple[float, float]:
    """The narrowest and the widest spot that a predictor learns from: 5 to 11 of 32 pixels, 80 to 100 of 224."""
    return length_at(side, 5.0, 80.0), length_at(side, 11.0, 100.0)


def first_width_at(side: float) -> float:
    """The width that a selector begins with: 10 of 32 pixels, 100 of 224."""
    return length_at(side, 10.0, 100.0)


def side_of(shape: Sequence[int]) -> float:
    """One length for a height and a width: of the square of the same area."""
    height, width = shape
    return math.sqrt(height * width)


@dataclass(frozen=True, slots=True)
class Spots:
    """One spot for each image: `centre` [N, 2] as (y, x), `sigma` [N], of images of `shape` (height, width)."""

    centre: Tensor
    sigma: Tensor
    shape: tuple[int, int]

    @property
    def parameters(self) -> Tensor:
        """[N, 3] in pixels."""
        return torch.cat([self.centre, self.sigma[:, None]], 1)

    def map(self) -> Tensor:
        """[N, 1, H, W] exp(-d^2 / (2 sigma^2)), 1 at the centre."""
        height, width = self.shape
        y = torch.arange(height, device=self.sigma.device, dtype=self.sigma.dtype)
        x = torch.arange(width, device=self.sigma.device, dtype=self.sigma.dtype)
        from_y = (y[None] - self.centre[:, :1]).square()  # [N, H]
        from_x = (x[None] - self.centre[:, 1:]).square()  # [N, W]
        squares = from_y[:, :, None] + from_x[:, None, :]
        return (-squares / (2 * self.sigma.square().clamp_min(LEAST_WIDTH)[:, None, None])).exp()[:, None]


def centre_of(offsets: Tensor, shape: Sequence[int]) -> Tensor:
    """[N, 2] offsets from the middle, which no number takes out of the image: c tanh(p / c) + middle."""
    sides = offsets.new_tensor([float(side) for side in shape])
    reach = sides / 2 - offsets.new_tensor([margin_at(float(side)) for side in shape])
    return reach * (offsets / reach).tanh() + sides / 2


def sigma_of(numbers: Tensor, least: float = LEAST_WIDTH) -> Tensor:
    """softplus(p) + 1e-8, or another `least` width."""
    return functional.softplus(numbers) + least


def random_spots(numbers: Tensor, shape: tuple[int, int], widths: tuple[float, float]) -> Spots:
    """Spots anywhere but at the border, of a width between those, in pixels, from uniform numbers [N, 3]."""
    sides = numbers.new_tensor([float(side) for side in shape])
    margins = numbers.new_tensor([margin_at(float(side)) for side in shape])
    low, high = widths
    return Spots(margins + numbers[:, :2] * (sides - 2 * margins), low + numbers[:, 2] * (high - low), shape)


def drawn_mask(probabilities: Tensor, numbers: Tensor, temperature: float) -> Tensor:
    """A relaxed Bernoulli draw (Maddison et al. 2017) for each pixel, from uniform numbers in (0, 1)."""
    inside = probabilities.clamp(1e-6, 1 - 1e-6)
    return ((inside.logit() + numbers.logit()) / temperature).sigmoid()


def area(mask: Tensor, power: float) -> Tensor:
    """mean((s + 5e-4)^a): what is shown, a root of it, so that the last bit costs most."""
    return (mask + _BASE).pow(power).mean()


def roughness(mask: Tensor) -> Tensor:
    """(TV^2 + 0.3 border^2) / (2 N): squares of neighbours' differences, and of what is shown at the border."""
    down = (mask[:, :, 1:] - mask[:, :, :-1]).square().sum()
    across = (mask[:, :, :, 1:] - mask[:, :, :, :-1]).square().sum()
    rows = mask[:, :, [0, -1]].square().sum()
    columns = mask[:, :, :, [0, -1]].square().sum()
    return (down + across + 0.3 * (rows + columns)) / (2 * len(mask))


def width_price(spots: Spots) -> Tensor:
    """The mean width over the image's side: it goes on rising where the image is open already."""
    return spots.sigma.mean() / side_of(spots.shape)


def overlap(mask: Tensor, another: Tensor) -> Tensor:
    """[N] what two masks [N, 1, H, W] share of what either shows: 1 for the same, 0 for masks that do not meet."""
    least, most = torch.minimum(mask, another), torch.maximum(mask, another)
    return least.flatten(1).sum(1) / most.flatten(1).sum(1).clamp_min(LEAST_WIDTH)
