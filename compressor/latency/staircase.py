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
    """Widths worth timing to find the step of a layer that has `width` channels; empty where there are too few."""
    top = min(width, 128)
    top -= top % max(s for s in STEPS if s <= top)
    return sorted(top - o for o in _OFFSETS if top - o >= top // 4) if width >= _LEAST_WIDTH else []


def find_step(widths: Sequence[int], times: Sequence[float]) -> int:
    """The step, a power of two from 1 to 64 of which two fit below the widest; `widths` ascend."""
    times = np.minimum.accumulate(np.asarray(times)[::-1])[::-1].tolist()
    steps = [s for s in STEPS if 2 * s <= max(widths)]
    left = {s: _left(widths, times, s) for s in steps}
    grain = len(widths) * (EXACT * max(times)) ** 2
    limit = max(ABOUT_AS_WELL * min(left.values()), grain)
    return min((s for s in steps if left[s] <= limit), key=lambda s: (abs(log2(s / USUAL)), -s))


def measure_step(width: int, time: Callable[[Sequence[int]], Sequence[float]]) -> int:
    """Three measurements, of which each width's fastest counts: what disturbs only ever adds."""
    widths = probe_widths(width)
    return find_step(widths, np.min([time(widths) for _ in range(3)], axis=0).tolist())


def _left(widths: Sequence[int], times: Sequence[float], step: int) -> float:
    """The sum of squares that a line over the rounded widths leaves."""
    rounded = -(-np.asarray(widths) // step) * step
    line = np.stack([np.ones(len(rounded)), rounded], axis=1).astype(np.float64)
    wanted = np.asarray(times, dtype=np.float64)
    fitted, *_ = np.linalg.lstsq(line, wanted, rcond=None)
    return float(((line @ fitted - wanted) ** 2).sum())
