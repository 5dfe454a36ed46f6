"""Rows under a window against torch's own convolutions and `unfold`: what the repair and the rounding multiply."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from compressor.graph.windows import Window, position_count, rows_of, targets_of

# Sums of at most 100 products in float64.
EXACT = 1e-10

WINDOWS = [
    Window((3, 3), (1, 1), ((1, 1), (1, 1)), (1, 1)),
    Window((3, 2), (2, 1), ((0, 1), (2, 0)), (1, 1)),
    Window((3, 3), (1, 2), ((2, 2), (2, 2)), (2, 2), groups=2),
    Window((1, 1), (2, 2), ((0, 0), (0, 0)), (1, 1), groups=4),
]


def numbers(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def convolved(x: Tensor, weight: Tensor, window: Window) -> Tensor:
    (top, bottom), (left, right) = window.padding
    padded = functional.pad(x, (left, right, top, bottom))
    return functional.conv2d(padded, weight, None, window.stride, 0, window.dilation, window.groups)


@pytest.mark.parametrize("window", WINDOWS)
def test_weights_times_rows_are_the_convolution(window: Window) -> None:
    x, weight = numbers(2, 4, 7, 8), numbers(8, 4 // window.groups, *window.kernel)
    outputs = convolved(x, weight, window)
    positions = torch.arange(position_count(x, window))
    assert len(positions) == outputs.shape[2:].numel()
    rows = rows_of(x, window, positions)  # [groups, B, positions, features]
    by_group = weight.reshape(window.groups, -1, rows.shape[-1])
    products = torch.einsum("gbpf,gof->gbpo", rows, by_group)
    torch.testing.assert_close(products, targets_of(outputs, window, positions), atol=EXACT, rtol=0)


@pytest.mark.parametrize("window", WINDOWS)
def test_chosen_positions_are_those_of_all_rows(window: Window) -> None:
    x = numbers(2, 4, 7, 8)
    all_rows = rows_of(x, window, torch.arange(position_count(x, window)))
    chosen = torch.tensor([3, 0, 5])
    assert torch.equal(rows_of(x, window, chosen), all_rows[:, :, chosen])


def test_a_linear_layer_reads_the_last_axis_whatever_lies_before() -> None:
    x, weight = numbers(3, 2, 5, 4), numbers(6, 4)
    window, positions = Window(), torch.arange(10)
    assert window.linear
    assert position_count(x, window) == 10
    rows, targets = rows_of(x, window, positions), targets_of(x @ weight.T, window, positions)
    assert rows.shape == (1, 3, 10, 4)
    torch.testing.assert_close(rows @ weight.T, targets, atol=EXACT, rtol=0)


def test_images_that_are_rows_have_one_position() -> None:
    assert position_count(numbers(3, 4), Window()) == 1
    assert rows_of(numbers(3, 4), Window(), torch.arange(1)).shape == (1, 3, 1, 4)


def test_a_window_over_one_and_over_three_axes() -> None:
    for axes, convolution in ((1, functional.conv1d), (3, functional.conv3d)):
        window = Window((3,) * axes, (2,) * axes, ((1, 1),) * axes, (1,) * axes)
        x, weight = numbers(2, 3, *[5] * axes), numbers(4, 3, *[3] * axes)
        outputs = convolution(x, weight, stride=2, padding=1)
        positions = torch.arange(position_count(x, window))
        rows = rows_of(x, window, positions)
        products = rows @ weight.reshape(4, -1).T
        torch.testing.assert_close(products, targets_of(outputs, window, positions), atol=EXACT, rtol=0)
