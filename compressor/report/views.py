"""What is drawn of a network's answer to one image: plain arrays, a record for each way of drawing.

In: nothing. Out: `Comparison`, two networks' answers to one image, and what it is made of. Knows no task.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

from ..records import FloatArray, IntArray


@dataclass(frozen=True, slots=True)
class Bars:
    """The few most likely classes and their shares of one, the largest first."""

    names: tuple[str, ...]
    shares: FloatArray


@dataclass(frozen=True, slots=True)
class Masks:
    """[h, w] classes of places, and the classes' names by number; a class beyond these has its number."""

    classes: IntArray
    names: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Boxes:
    """[k, 4] corners x0 y0 x1 y1 in pixels of the image, and a label for each; `kinds` [k] part them by colour."""

    corners: FloatArray
    labels: tuple[str, ...]
    kinds: IntArray


@dataclass(frozen=True, slots=True)
class Shown:
    """An answer that is an image itself: [h, w, 3] in 0-1."""

    pixels: FloatArray


@dataclass(frozen=True, slots=True)
class Heat:
    """[h, w] values, coloured from `low` to `high`."""

    values: FloatArray
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Curve:
    """[n] values of a vector; `dense` are the dense network's to compare with, where these are another's."""

    values: FloatArray
    dense: FloatArray | None = None


View: TypeAlias = "Bars | Masks | Boxes | Shown | Heat | Curve"


@dataclass(frozen=True, slots=True)
class Comparison:
    """One image [H, W, 3] in 0-1, both answers, and the relevance [H, W] of its pixels in both networks.

    Masks [H, W] in 0-1 are what a learned selector shows of it, by both networks. None where the input is no image,
    and where there is no relevance or no selector.
    """

    image: FloatArray | None
    dense: View
    shipped: View
    relevance_dense: FloatArray | None = None
    relevance_shipped: FloatArray | None = None
    mask_dense: FloatArray | None = None
    mask_shipped: FloatArray | None = None
