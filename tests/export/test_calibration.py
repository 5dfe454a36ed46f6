"""Ranges of activations: each method against its definition on histograms made by hand."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from compressor.errors import InputError
from compressor.export.calibration import _BINS, _LEVELS, METHODS, Statistics, _divergence, ranges


def statistics_of(values: NDArray[np.float64]) -> Statistics:
    low, high = float(values.min()), float(values.max())
    return Statistics({"x": (low, high)}, {"x": np.histogram(values, bins=_BINS, range=(low, high))[0]}, 1)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shift", [0.0, 5.0, -5.0])
def test_zero_is_always_inside_and_nothing_lies_beyond_the_extremes(method: str, shift: float) -> None:
    values = np.random.default_rng(0).standard_normal(5000) + shift
    low, high = ranges(statistics_of(values), method)["x"]  # type: ignore[arg-type]
    assert low <= 0 <= high
    assert min(values.min(), 0) <= low
    assert high <= max(values.max(), 0)


@pytest.mark.parametrize("percentile", [90.0, 99.0, 99.9])
def test_by_percentile_so_many_lie_inside_with_half_of_the_rest_on_either_side(percentile: float) -> None:
    values = np.random.default_rng(0).standard_normal(20_000)
    low, high = ranges(statistics_of(values), "percentile", percentile=percentile)["x"]
    width = (values.max() - values.min()) / _BINS
    tail = (1 - percentile / 100) / 2
    one = 1 / len(values)  # a value on a bin's edge may count to either side
    assert (values < low).mean() - one <= tail <= (values <= low + width).mean() + one
    assert (values > high).mean() - one <= tail <= (values >= high - width).mean() + one


def test_all_values_lie_inside_where_all_are_asked_for() -> None:
    values = np.random.default_rng(0).standard_normal(500)
    assert ranges(statistics_of(values), "percentile", percentile=100.0) == ranges(statistics_of(values), "minmax")


def by_lists(magnitudes: list[float], bins: int) -> float:
    """Kullback-Leibler divergence of the clipped from the levelled distribution, written out."""
    reference = list(magnitudes[:bins])
    reference[-1] += sum(magnitudes[bins:])
    quantised = [0.0] * bins
    for level in range(_LEVELS):
        members = [b for b in range(bins) if b * _LEVELS // bins == level]
        filled = [b for b in members if magnitudes[b] > 0]
        for b in filled:
            quantised[b] = sum(magnitudes[m] for m in members) / len(filled)
    p = np.array(reference) / sum(reference)
    q = np.array(quantised) / sum(quantised)
    return float(sum(a * np.log(a / max(b, 1e-12)) for a, b in zip(p, q, strict=True) if a > 0))


@pytest.mark.parametrize("bins", [_LEVELS, 200, 256])
def test_the_divergence_is_the_written_out_one(bins: int) -> None:
    magnitudes = np.random.default_rng(0).integers(0, 4, 300).astype(float)
    assert _divergence(magnitudes, bins) == pytest.approx(by_lists(magnitudes.tolist(), bins), rel=1e-9)


def test_nothing_is_lost_where_there_are_no_more_bins_than_levels() -> None:
    magnitudes = np.zeros(300)
    magnitudes[:_LEVELS] = np.arange(1, _LEVELS + 1)
    assert _divergence(magnitudes, _LEVELS) == pytest.approx(0.0, abs=1e-12)
    assert _divergence(np.zeros(300), _LEVELS) == float("inf")


def test_entropy_cuts_an_outlier_off_on_both_sides_alike() -> None:
    values = np.append(np.random.default_rng(0).standard_normal(50_000), [100.0, -100.0])
    low, high = ranges(statistics_of(values), "entropy")["x"]
    assert 2 < high < 50
    assert low == pytest.approx(-high)


def test_a_constant_keeps_its_value_and_an_unknown_method_is_named() -> None:
    constant = Statistics({"x": (-3.0, -3.0)}, {"x": np.zeros(_BINS, np.int64)}, 1)
    assert [ranges(constant, method)["x"] for method in METHODS] == [(-3.0, 0.0)] * 3
    with pytest.raises(InputError, match="no calibration method 'mean'; there are minmax, percentile, entropy"):
        ranges(constant, "mean")  # type: ignore[arg-type]
