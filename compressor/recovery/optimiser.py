"""The optimiser of a recovery: Muon for weights that are matrices, Adam for all others.

Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon) moves a matrix by its momentum with all singular
values made alike, by five steps of Newton and Schulz, so that directions with small gradients are learned as fast as
those with large ones. Steps are as large as Adam's (Liu et al., arXiv 2502.16982): one rate serves both.
`torch.optim.Muon` takes two axes alone; here a convolution is the matrix of its filters.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

MOMENTUM = 0.95
QUINTIC = (3.4445, -4.7750, 2.0315)  # Jordan's coefficients: a x + b x^3 + c x^5, repeated, brings x near 1
ITERATIONS = 5
ADAM_RMS = 0.2  # of Adam's usual steps, over the rate
LEAST_SIDE = 8  # a narrower matrix has few directions to level
LEAST_NORM = 1e-12


class MuonOrAdam(torch.optim.Adam):
    """PyTorch's Adam, but for matrices, whose gradients a step uses up."""

    def __init__(self, parameters: Iterable[nn.Parameter], rate: float) -> None:
        super().__init__(parameters, lr=rate)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One step of every parameter that has a gradient."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None and is_matrix(parameter):
                    parameter.sub_(_muon(parameter.grad, self.state[parameter]), alpha=group["lr"])
                    parameter.grad = None  # Adam passes by what has none
        super().step()


def is_matrix(weight: Tensor) -> bool:
    """Whether [out, ...] filters are enough, and large enough, to be seen as a matrix."""
    return weight.ndim > 1 and min(len(weight), weight[0].numel()) >= LEAST_SIDE


def _muon(gradient: Tensor, state: dict[str, Any]) -> Tensor:
    """Nesterov's momentum, levelled."""
    momentum: Tensor = state.setdefault("momentum", torch.zeros_like(gradient))
    momentum.lerp_(gradient, 1 - MOMENTUM)
    matrix = levelled(gradient.lerp(momentum, MOMENTUM).flatten(1))
    return matrix.reshape(gradient.shape) * (ADAM_RMS * math.sqrt(max(matrix.shape)))


def levelled(matrix: Tensor) -> Tensor:
    """[out, in] with the same singular vectors and singular values between about 0.7 and 1.2."""
    is_tall = matrix.shape[0] > matrix.shape[1]
    wide: Tensor = (matrix.t() if is_tall else matrix) / matrix.norm().clamp(min=LEAST_NORM)
    a, b, c = QUINTIC
    for _ in range(ITERATIONS):
        square = wide @ wide.t()
        wide = torch.addmm(wide, torch.addmm(square, square, square, beta=b, alpha=c), wide, beta=a)
    return wide.t() if is_tall else wide
