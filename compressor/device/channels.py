"""An output whose channels are of different units (boxes in pixels beside class scores): its distance by channels.

Over the whole output a fault among small numbers hides behind the large ones. Here a difference counts as a share of
the spread (largest less smallest reference) of its own channel: whatever axis the channels lie on.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

# Below it a limit of 1e-3 of the whole output's magnitude is the stricter one, where a channel's is 1e-2 of its spread.
MIXED_RATIO = 10.0
# Rounding is of the output's magnitude where channels are sums of others' terms: a spread counts for at least such a
# share of it, so that 1e-6 of the output's largest number is never a fault (fp32 in another order differs by as much).
LEAST_SPREAD = 1e-4


@dataclass(frozen=True, slots=True)
class ChannelDistance:
    """Largest difference as a share of its channel's spread, and which channel's it is."""

    relative: float
    place: str


def channel_distance(reference: Floats, difference: Floats) -> ChannelDistance | None:
    """Of finite numbers [N, ...] and their absolute differences, the worst channel; None where no axis mixes units."""
    magnitude = float(np.abs(reference).max())
    if magnitude == 0:
        return None
    distances = []
    for axis in range(1, reference.ndim):
        others = tuple(other for other in range(reference.ndim) if other != axis)
        spreads = np.ptp(reference, axis=others).clip(min=LEAST_SPREAD * magnitude)  # [channels]
        if spreads.max() >= MIXED_RATIO * spreads.min():
            relative = difference.max(axis=others) / spreads
            worst = int(relative.argmax())
            distances.append(ChannelDistance(float(relative[worst]), f"channel {worst} of axis {axis}"))
    return max(distances, key=lambda distance: distance.relative, default=None)
