"""Latency samples in, percentiles that have standing out: LoadGen's early-stopping rule, in pure math.

With n samples, take the largest t with P(at most t of n exceed the percentile) <= 1 - confidence, drop the t - 1
slowest, report the slowest left. t = 0 means n is too small. Source: MLPerf LoadGen early_stopping (d = 0).
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from functools import lru_cache

CONFIDENCE = 0.99


def estimate(samples_ms: Sequence[float], percentile: float, confidence: float = CONFIDENCE) -> float | None:
    """The percentile (0.9 for p90) in ms, or None when there are too few samples."""
    n = len(samples_ms)
    allowed = allowed_overruns(n, percentile, confidence)
    if allowed == 0:
        return None
    return sorted(samples_ms)[n - allowed]


@lru_cache(maxsize=256)
def allowed_overruns(n: int, percentile: float, confidence: float = CONFIDENCE) -> int:
    """The largest t >= 1 with P(X <= t) <= 1 - confidence for X ~ Binomial(n, 1 - percentile), else 0.

    P(X <= t) is the regularised incomplete beta function I_percentile(n - t, t + 1).
    """
    budget = 1 - confidence
    tail = 0.0  # P(X <= t)
    t = -1  # not even t = 0 is within the budget yet
    while t + 1 < n:
        tail += _binomial(n, t + 1, 1 - percentile)
        if tail > budget:
            break
        t += 1
    return max(t, 0)


@lru_cache(maxsize=64)
def least_samples(percentile: float, confidence: float = CONFIDENCE) -> int:
    """How many samples the percentile needs: 11 for p50, 64 for p90, 662 for p99."""
    enough = 2
    while allowed_overruns(enough, percentile, confidence) == 0:
        enough *= 2
    # its half is too few, and from the first that is enough on all are
    numbers = range(enough + 1)
    return bisect_left(numbers, 1, lo=enough // 2, key=lambda n: allowed_overruns(n, percentile, confidence))


def _binomial(n: int, k: int, p: float) -> float:
    """P(X = k), through logarithms: the factors over- and underflow long before their product does."""
    choose = math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)
    return math.exp(choose + k * math.log(p) + (n - k) * math.log1p(-p))


def describe(samples_ms: Sequence[float], percentile: float) -> str:
    """`12.31 ms`, or what is missing for it."""
    value = estimate(samples_ms, percentile)
    if value is None:
        return f"n too small ({len(samples_ms)} of {least_samples(percentile)})"
    return f"{value:.3f} ms"
