"""Percentiles with standing: the guarantee itself in exact arithmetic, and numbers published for LoadGen."""

from __future__ import annotations

from fractions import Fraction
from math import comb

import numpy as np
import pytest

from compressor.device.percentiles import CONFIDENCE, allowed_overruns, describe, estimate, least_samples

SIZES = [11, 64, 100, 200]


def at_most(t: int, n: int, percent: int) -> Fraction:
    """P(X <= t) for X ~ Binomial(n, 1 - percent / 100), as a fraction."""
    miss = 1 - Fraction(percent, 100)
    return sum((comb(n, k) * miss**k * (1 - miss) ** (n - k) for k in range(t + 1)), Fraction(0))


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("percent", [50, 75, 90, 95])
def test_the_true_percentile_lies_above_the_estimate_once_in_a_hundred_at_most(n: int, percent: int) -> None:
    """The value at rank n - t is too small only if fewer than t samples lie above the percentile."""
    value = estimate(list(map(float, range(n))), percent / 100)
    if value is None:
        assert at_most(1, n, percent) > Fraction(1, 100)
        return
    above = n - 1 - int(value)  # samples slower than the one that is reported
    assert at_most(above, n, percent) <= Fraction(1, 100)
    assert at_most(above + 2, n, percent) > Fraction(1, 100)  # one more could not have been dropped


def test_less_confidence_allows_more_overruns_and_more_samples_never_fewer() -> None:
    for percentile in (0.5, 0.9):
        by_confidence = [allowed_overruns(300, percentile, confidence) for confidence in (0.999, 0.99, 0.9, 0.5)]
        assert by_confidence == sorted(by_confidence)
        assert by_confidence[0] < by_confidence[-1]
        by_size = [allowed_overruns(n, percentile) for n in range(2, 400)]
        assert by_size == sorted(by_size)


@pytest.mark.parametrize(("percentile", "confidence"), [(0.5, 0.99), (0.9, 0.99), (0.9, 0.9), (0.97, 0.99)])
def test_the_least_number_of_samples_is_the_first_that_is_enough(percentile: float, confidence: float) -> None:
    least = least_samples(percentile, confidence)
    assert [allowed_overruns(n, percentile, confidence) > 0 for n in (least - 1, least)] == [False, True]


def test_many_samples_neither_overflow_nor_lose_the_share() -> None:
    """The share allowed tends to one tenth; the normal approximation says how fast: 2.326 standard deviations."""
    n = 200_000
    expected = 0.1 * n - 2.326 * np.sqrt(n * 0.1 * 0.9)
    assert allowed_overruns(n, 0.9) == pytest.approx(expected, abs=3)


def test_no_sample_has_no_percentile() -> None:
    assert allowed_overruns(0, 0.5) == 0
    assert estimate([], 0.9) is None
    assert describe([], 0.9) == f"n too small (0 of {least_samples(0.9, CONFIDENCE)})"


def test_the_order_of_samples_is_of_no_account_and_they_stay_as_they_are() -> None:
    samples = [float(value) for value in np.random.default_rng(0).permutation(200)]
    before = list(samples)
    assert estimate(samples, 0.9) == estimate(sorted(samples), 0.9)
    assert samples == before


def test_a_percentile_is_written_in_milliseconds() -> None:
    assert describe([1.0] * 10 + [2.0], 0.5) == "2.000 ms"
    assert describe([1.23456] * 11, 0.5) == "1.235 ms"
