"""Steps of layers, from times of known law with and without noise."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from compressor.latency.staircase import STEPS, find_step, measure_step, probe_widths


def law(widths: Sequence[int], step: int, fixed_us: float = 5.0, slope_us: float = 0.5) -> list[float]:
    return [fixed_us + slope_us * step * -(-width // step) for width in widths]


@pytest.mark.parametrize("step", STEPS[1:])
def test_a_staircase_without_noise_shows_its_step(step: int) -> None:
    widths = probe_widths(128)
    assert find_step(widths, law(widths, step)) == step


def test_of_a_slope_without_steps_the_finest_that_the_clock_can_tell_is_taken() -> None:
    widths = probe_widths(128)
    assert find_step(widths, law(widths, 1)) <= 2  # one channel of 128 is below a clock's grain


@pytest.mark.parametrize("step", [8, 16, 32])
@pytest.mark.parametrize("seed", range(5))
def test_noise_that_only_adds_leaves_it(step: int, seed: int) -> None:
    rng = np.random.default_rng(seed)

    def time(widths: Sequence[int]) -> list[float]:
        return [us * (1 + 0.3 * rng.exponential() * (rng.random() < 0.3)) for us in law(widths, step)]

    assert measure_step(128, time) == step


def test_the_unit_of_time_is_of_no_account() -> None:
    widths = probe_widths(100)
    times = law(widths, 16)
    assert find_step(widths, times) == find_step(widths, [1e6 * us for us in times]) == 16


@pytest.mark.parametrize("step", [16, 32])
@pytest.mark.parametrize("slow", [1.5, 3.0])
def test_a_width_that_takes_longer_than_a_wider_one_counts_as_that_one(step: int, slow: float) -> None:
    """Odd widths have no kernel of their own; nobody keeps them, so they say nothing of the steps."""
    widths = probe_widths(128)
    times = [us * slow if width % 4 else us for width, us in zip(widths, law(widths, step), strict=True)]
    assert find_step(widths, times) == step


def test_times_that_tell_nothing_get_the_usual_step() -> None:
    widths = probe_widths(64)
    assert find_step(widths, [7.0] * len(widths)) == 8


@pytest.mark.parametrize("width", [32, 33, 63, 64, 100, 128, 1000])
def test_probed_widths_ascend_below_the_layers_and_have_every_steps_middle(width: int) -> None:
    widths = probe_widths(width)
    assert widths == sorted(set(widths))
    assert max(widths) <= min(width, 128)
    assert min(widths) >= max(widths) // 4
    for step in (step for step in STEPS if 2 <= step <= max(widths) // 2):
        assert any(width % step for width in widths)
        assert any(width % step == 0 for width in widths)


def test_a_layer_too_narrow_to_tell_is_not_timed() -> None:
    assert probe_widths(31) == []
