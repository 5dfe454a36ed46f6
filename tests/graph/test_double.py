"""Answers in float64, and how far those in float32 are from them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from compressor.graph import trace
from compressor.graph.double import Double, in_both_widths, parameters_late


class Cancelling(nn.Module):
    """Adds a large number and takes it away: float32 keeps 24 bits, so what is left of x is a multiple of 2 ** -3."""

    def __init__(self, large: float) -> None:
        super().__init__()
        self.large = large

    def forward(self, x: Tensor) -> Tensor:
        return ((x + self.large) - self.large).mean((2, 3))


@pytest.mark.parametrize(("large", "least", "most"), [(0.0, 0.0, 1e-6), (2.0**21, 1e-2, 1.0)])
def test_rounding_is_what_float32_loses(large: float, least: float, most: float) -> None:
    images = torch.rand(4, 3, 1, 1, generator=torch.Generator().manual_seed(0))
    (rounded,), (exact,) = in_both_widths(trace(Cancelling(large), images[:2]), images)
    assert (rounded.dtype, exact.dtype) == (torch.float32, torch.float64)
    assert least <= float((rounded - exact).abs().max() / exact.abs().max()) <= most


def test_what_a_graph_makes_itself_is_in_float64_too() -> None:
    class Made(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.mean((2, 3)) + torch.full((x.shape[0], 1), 1 / 3, dtype=torch.float32)

    x = torch.rand(2, 3, 4, 4)
    answers = Double(parameters_late(trace(Made(), x))).run(x.double())
    assert answers.dtype == torch.float64
