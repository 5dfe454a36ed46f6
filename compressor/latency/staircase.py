"""Times at a few widths in, the step at which a layer gets faster out: 16 where 49 to 64 channels cost the same.

A width that takes longer than a wider one counts as that one: nobody would keep it. Each step then explains
the times by a line over widths rounded up to it; the one that explains them best is the layer's. Where several do
about as well (noise, a layer too small to tell) the one nearest to 8 is taken, which suits most runtimes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import log2

import numpy as np

STEPS = (1, 2, 4, 8, 16, 32, 64)
USUAL = 8
ABOUT_AS_WELL = 1.25  # times the squares that the best step leaves
EXACT = 0.003  # of the time: what is left below that is the clock's own grain
_OFFSETS = (0, 1, 2, 4, 6, 8, 12, 16, 20, 24, 32, 40, 48, 64, 80, 96)  # below the widest: every step has its middle
_LEAST_WIDTH = 32


def probe_widths(width: int) -> list[int]:
    """Widths worth timing to find the step of a layer that has `width` channels, ascending; empty where too few.

    The widest is a multiple of the largest step below it: of 100 channels 64, 63, 62, 60, ... and 16 are timed.
    """
    if width < _LEAST_WIDTH:
        return []
    top = min(width, 128)
    top -= top % max(step for step in STEPS if step <= top)
    return sorted(top - offset for offset in _OFFSETS if top - offset >= top // 4)


def find_step(widths: Sequence[int], times: Sequence[float]) -> int:
    """The step, a power of two from 1 to 64 of which two fit below the widest; `widths` ascend.

    `times` may have any unit: only their ratios count.
    """
    # from the widest down, none takes longer than a wider one
    times = np.minimum.accumulate(np.asarray(times)[::-1])[::-1].tolist()
    steps = [step for step in STEPS if 2 * step <= max(widths)]
    residuals = {step: _residual(widths, times, step) for step in steps}

    grain = len(widths) * (EXACT * max(times)) ** 2
    limit = max(ABOUT_AS_WELL * min(residuals.values()), grain)
    fitting = [step for step in steps if residuals[step] <= limit]
    # the nearest to 8, in octaves; of two as near (4 and 16), the larger
    return min(fitting, key=lambda step: (abs(log2(step / USUAL)), -step))


def measure_step(width: int, time: Callable[[Sequence[int]], Sequence[float]]) -> int:
    """Three measurements of all widths, of which each width's fastest counts: what disturbs only ever adds."""
    widths = probe_widths(width)
    times = [time(widths) for _ in range(3)]  # [3, widths]
    return find_step(widths, np.min(times, axis=0).tolist())


def _residual(widths: Sequence[int], times: Sequence[float], step: int) -> float:
    """The sum of squares that a line over the rounded widths leaves."""
    rounded = -(-np.asarray(widths) // step) * step  # up: 49 to 64 at a step of 16
    line = np.stack([np.ones(len(rounded)), rounded], axis=1).astype(np.float64)  # [widths, 2]
    measured = np.asarray(times, dtype=np.float64)
    coefficients, *_ = np.linalg.lstsq(line, measured, rcond=None)
    return float(((line @ coefficients - measured) ** 2).sum())
