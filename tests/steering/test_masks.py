"""Spots, what is drawn from them and what a mask costs: closed forms, borders, numbers without end."""

from __future__ import annotations

import math

import pytest
import torch

from compressor.steering.masks import (
    DISC,
    Spots,
    area,
    centre_of,
    drawn_mask,
    first_width_at,
    length_at,
    margin_at,
    overlap,
    papers_widths_at,
    random_spots,
    roughness,
    sigma_of,
    width_price,
)

LATTICE = 0.03  # pixels in or out of a disc at its edge: it is not round


def test_lengths_are_the_papers_at_32_and_at_224_pixels_and_rise_in_between() -> None:
    assert (length_at(32, 5, 80), length_at(224, 5, 80)) == (pytest.approx(5), pytest.approx(80))
    assert [margin_at(side) for side in (32, 224)] == pytest.approx([2, 4])
    assert papers_widths_at(224) == pytest.approx((80, 100))
    assert first_width_at(32) == pytest.approx(10)
    lengths = [length_at(side, 5, 80) for side in (8, 16, 64, 128, 512)]
    assert lengths == sorted(lengths)
    assert lengths[0] > 0


def test_a_spot_is_a_gaussian_that_is_1_at_its_centre() -> None:
    spots = Spots(torch.tensor([[1.0, 2.0]]), torch.tensor([1.5]), (4, 5))
    mask = spots.map()
    assert mask.shape == (1, 1, 4, 5)
    assert float(mask[0, 0, 1, 2]) == 1
    assert float(mask[0, 0, 3, 3]) == pytest.approx(math.exp(-(4 + 1) / (2 * 1.5**2)))


def test_a_width_of_nothing_shows_one_pixel_and_has_a_gradient() -> None:
    sigma = torch.tensor([1e-8], requires_grad=True)
    mask = Spots(torch.tensor([[1.0, 1.0]]), sigma, (3, 3)).map()
    assert float(mask.detach().sum()) == 1
    mask.sum().backward()
    assert bool(torch.isfinite(sigma.grad).all())


@pytest.mark.parametrize(("side", "reach", "middle"), [(32, 14, 16), (224, 108, 112)])
def test_no_number_takes_a_centre_out_of_the_image(side: int, reach: float, middle: float) -> None:
    offsets = torch.tensor([[0.0, 1.0], [1e6, -1e6]])
    centre = centre_of(offsets, (side, side))
    assert centre[0].tolist() == pytest.approx([middle, reach * math.tanh(1 / reach) + middle], rel=1e-5)
    assert centre[1].tolist() == pytest.approx([middle + reach, middle - reach], rel=1e-5)


def test_widths_are_above_zero_whatever_the_number() -> None:
    widths = sigma_of(torch.tensor([-200.0, 0.0, 200.0]))
    assert widths.tolist() == pytest.approx([1e-8, math.log(2), 200])
    assert sigma_of(torch.tensor([-200.0, 0.0]), 2.0).tolist() == pytest.approx([2, 2 + math.log(2)])


def test_random_spots_lie_within_the_margins_and_widths() -> None:
    spots = random_spots(torch.tensor([[0.0, 0.0, 0.0], [1.0, 1.0, 1.0]]), (32, 32), papers_widths_at(32))
    assert spots.centre.tolist() == [pytest.approx([2, 2]), pytest.approx([30, 30])]
    assert spots.sigma.tolist() == pytest.approx([5, 11])


def test_a_draw_is_nearly_0_or_1_and_as_often_1_as_is_said() -> None:
    generator = torch.Generator().manual_seed(0)
    numbers = torch.rand(20000, generator=generator).clamp(1e-6, 1 - 1e-6)
    for chance in (0.2, 0.7):
        drawn = drawn_mask(torch.full((20000,), chance), numbers, 0.1)
        assert float((drawn > 0.5).float().mean()) == pytest.approx(chance, abs=0.015)  # 4 standard errors
        assert float(((drawn > 0.1) & (drawn < 0.9)).float().mean()) < 0.15
    closed = drawn_mask(torch.tensor([0.0, 1.0]), torch.tensor([0.5, 0.5]), 1.0)
    assert closed.tolist() == pytest.approx([0, 1], abs=1e-5)


def test_a_disc_is_as_large_as_its_spots_sum() -> None:
    spots = Spots(torch.tensor([[31.5, 31.5]]), torch.tensor([8.0]), (64, 64))
    disc = drawn_mask(spots.map(), torch.full((1, 1, 64, 64), DISC), 0.1)
    assert float((disc > 0.5).sum()) == pytest.approx(float(spots.map().sum()), rel=LATTICE)
    assert float((disc > 0.5).sum()) == pytest.approx(2 * math.pi * 64, rel=LATTICE)
    assert bool((disc[:, :, 31, 21:43] > 0.5).all())  # 10.5 from the centre at most: its radius is 11.3
    assert bool((disc[:, :, 31, :20] < 0.5).all())


def test_the_papers_prices_are_their_closed_forms() -> None:
    mask = torch.tensor([[[[1.0, 0.0, 0.0], [0.0, 0.0, 0.0]]], [[[0.0, 0.0, 0.0], [0.0, 0.0, 0.0]]]])
    assert float(area(mask, 0.3)) == pytest.approx((1.0005**0.3 + 11 * 5e-4**0.3) / 12)
    # two neighbours of the corner differ by 1; of the border the corner is in its row and in its column
    assert float(roughness(mask)) == pytest.approx((2 + 0.3 * 2) / 4)
    assert float(area(torch.ones(1, 1, 2, 2), 0.5)) == pytest.approx(1.0005**0.5)


def test_masks_overlap_by_what_both_show_of_what_either_does() -> None:
    one, other = torch.tensor([[[[1.0, 0.5]]]]), torch.tensor([[[[0.5, 1.0]]]])
    assert overlap(one, other).tolist() == [0.5]
    assert overlap(one, one).tolist() == [1]
    assert overlap(one, 1 - one.ceil()).tolist() == [0]


def test_an_open_mask_still_pays_for_more_width_where_its_area_does_not() -> None:
    sigma = torch.tensor([400.0], requires_grad=True)
    spots = Spots(torch.tensor([[16.0, 16.0]]), sigma, (32, 32))
    (of_width,) = torch.autograd.grad(width_price(spots), sigma)
    (of_area,) = torch.autograd.grad(area(spots.map(), 0.3), sigma)
    assert float(of_width) == pytest.approx(1 / 32)
    assert float(of_area) < 1e-4
