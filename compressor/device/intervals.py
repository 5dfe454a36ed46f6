"""How sure a figure is: 95 % intervals over samples that are drawn anew, or left out in turns.

Shares that are counted have Wilson's (`records.wilson`). Figures that are cheap to make again from one row a sample
have the bootstrap's percentiles (Efron 1979); the others a normal approximation from the jackknife over blocks
(Quenouille 1956, Tukey 1958). Both depend on a seed alone, so every rank gets the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from ..records import FloatArray, IntArray

DRAWS = 200
BLOCKS = 10
_SEED = 0


def bootstrap(figure: Callable[[FloatArray], float], samples: int, value: float) -> tuple[float, float]:
    """2.5 to 97.5 % of `figure` for random counts [N] of the samples, `value` always inside.

    `figure` is given how often each sample counts: all ones give `value`. Draws whose figure is not finite are left.
    """
    if samples < 2:
        return value, value
    random = np.random.default_rng(_SEED)
    even = np.full(samples, 1 / samples)
    figures = np.array([figure(random.multinomial(samples, even).astype(np.float64)) for _ in range(DRAWS)])
    usable = figures[np.isfinite(figures)]
    if not len(usable) or not math.isfinite(value):
        return value, value
    low, high = np.percentile(usable, [2.5, 97.5])
    return min(value, float(low)), max(value, float(high))


def mean_interval(values: FloatArray) -> tuple[float, float]:
    """The bootstrap's interval of the mean of [N]."""
    return bootstrap(lambda counts: float(counts @ values / len(values)), len(values), float(values.mean()))


def jackknife(figure: Callable[[IntArray], float], samples: int, value: float) -> tuple[float, float]:
    """1.96 standard errors around a `value` between 0 and 1, from `figure` without one of ten blocks of samples each.

    `figure` is given the indices that stay. The variance is (b - 1) / b times the sum of squares about their mean.
    """
    blocks = min(BLOCKS, samples)
    if blocks < 2:
        return value, value
    order = np.random.default_rng(_SEED).permutation(samples)
    remaining = [np.sort(np.delete(order, np.s_[block::blocks])) for block in range(blocks)]
    figures = np.array([figure(indices) for indices in remaining])
    figures = figures[np.isfinite(figures)]
    if len(figures) < 2:
        return value, value
    error = math.sqrt((len(figures) - 1) / len(figures) * float(np.square(figures - figures.mean()).sum()))
    return max(0.0, value - 1.96 * error), min(1.0, value + 1.96 * error)
