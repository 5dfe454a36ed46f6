"""Part of scikit-learn's digits, a count and a seed in; grey canvases of several digits out, with masks and boxes.

Canvas i depends on the part, the seed and i alone: it is the same whatever the count, the library's version or the
machine. Knows neither models nor batches.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..records import FloatArray, IntArray
from .scans import digit_scans

SIDE_PX = 64
CLASSES = 11  # of a mask: background, then the ten digits
COUNTS = {"training": 2000, "evaluation": 400}  # canvases of the named sources

_DIGITS = (2, 5)  # at least and at most on a canvas
_SCAN_PX = (16, 24)  # a scan of 8 x 8 pixels is drawn two to three times as large
_INKED = 0.4  # a pixel belongs to a digit from this share of full ink on
_PAPER = (0.0, 0.25)  # brightness of the background
_INK = (0.6, 1.0)  # brightness of full ink
_NOISE = (0.0, 0.05)  # standard deviation

_Mask = NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Canvases:
    """`images` uint8 and `masks` int64 (0 background, digit + 1), both [N, 64, 64].

    Canvas i has the digits `labels[i]`, int64 [k], in `boxes[i]`, float32 [k, 4]: x0 y0 x1 y1 in pixels, the smallest
    that hold a digit's mask, so that x1 and y1 are the first column and row beyond it.
    """

    images: NDArray[np.uint8]
    masks: IntArray
    boxes: tuple[NDArray[np.float32], ...]
    labels: tuple[IntArray, ...]

    def __len__(self) -> int:
        return len(self.images)


@dataclass(frozen=True, slots=True)
class _Canvas:
    """One of `Canvases`."""

    image: NDArray[np.uint8]
    mask: IntArray
    boxes: NDArray[np.float32]
    labels: IntArray


class _Draws:
    """Random numbers made of PCG64's bits, which numpy promises to leave as they are."""

    def __init__(self, *key: object) -> None:
        digest = hashlib.sha256(":".join(map(str, key)).encode()).digest()
        self._bits = np.random.PCG64(int.from_bytes(digest[:16], "little"))

    def uniform(self, *shape: int) -> FloatArray:
        """From 0 to below 1."""
        raw = self._bits.random_raw(int(np.prod(shape))).reshape(shape)
        return (raw >> np.uint64(11)).astype(np.float64) * 2.0**-53

    def between(self, low: float, high: float) -> float:
        return low + (high - low) * float(self.uniform(1)[0])

    def whole(self, low: int, high: int) -> int:
        """From `low` to `high`, both included."""
        return low + int(self.uniform(1)[0] * (high - low + 1))

    def noise(self, *shape: int) -> FloatArray:
        """Nearly normal, variance 1: three uniform numbers have variance 3 / 12, so their sum is doubled."""
        sums: FloatArray = self.uniform(3, *shape).sum(0)
        return 2 * (sums - 1.5)


def digit_canvases(part: str, count: int, seed: int) -> Canvases:
    """Canvases of 2 to 5 digits that don't overlap, of the scans of `digits:part`; without a part, of all scans.

    Size, ink, background and noise differ from canvas to canvas. Raises DataError for a part that digits don't have.
    """
    source = digit_scans(f"digits:{part}" if part else "digits")
    scans = np.stack([np.asarray(source.read(name)) for name in source.names]) / 255  # [scans, 8, 8]

    composed = [_composed(scans, source.labels, _Draws(seed, part, index)) for index in range(count)]
    blank = np.zeros((0, SIDE_PX, SIDE_PX))  # so that no canvas has a shape too
    return Canvases(
        np.array([canvas.image for canvas in composed] or blank, np.uint8),
        np.array([canvas.mask for canvas in composed] or blank, np.int64),
        tuple(canvas.boxes for canvas in composed),
        tuple(canvas.labels for canvas in composed),
    )


def _composed(scans: FloatArray, digits: IntArray, draws: _Draws) -> _Canvas:
    ink = np.zeros((SIDE_PX, SIDE_PX))  # 0 to 1
    taken = np.zeros((SIDE_PX, SIDE_PX), np.bool_)
    mask = np.zeros((SIDE_PX, SIDE_PX), np.int64)
    boxes: list[tuple[int, int, int, int]] = []
    labels: list[int] = []
    for _ in range(draws.whole(*_DIGITS)):
        scan = draws.whole(0, len(scans) - 1)
        drawn = _cropped(_enlarged(scans[scan], draws.whole(*_SCAN_PX)))
        corner = _free_corner(taken, drawn.shape, draws)
        if corner is None and len(boxes) < _DIGITS[0]:  # beside one digit there always is room for a small one
            drawn = _cropped(_enlarged(scans[scan], _SCAN_PX[0]))
            corner = _free_corner(taken, drawn.shape, draws)
        if corner is None:
            continue

        top, left = corner
        place = slice(top, top + drawn.shape[0]), slice(left, left + drawn.shape[1])
        ink[place] = drawn
        taken[place] = True
        mask[place][drawn >= _INKED] = digits[scan] + 1
        x0, y0, x1, y1 = _bounds(drawn >= _INKED)
        boxes.append((left + x0, top + y0, left + x1, top + y1))
        labels.append(int(digits[scan]))
    return _Canvas(_photographed(ink, draws), mask, np.array(boxes, np.float32), np.array(labels, np.int64))


def _enlarged(scan: FloatArray, side: int) -> FloatArray:
    """Bilinear, [side, side]; the rim is carried on half a pixel of the scan outwards."""
    size = len(scan)
    places = np.clip((np.arange(side) + 0.5) * size / side - 0.5, 0, size - 1)
    low = np.minimum(places.astype(np.int64), size - 2)
    weights = np.zeros((side, size))
    weights[np.arange(side), low] = 1 - (places - low)
    weights[np.arange(side), low + 1] = places - low
    return weights @ scan @ weights.T


def _cropped(drawn: FloatArray) -> FloatArray:
    """Without the empty rows and columns around."""
    x0, y0, x1, y1 = _bounds(drawn > 0)
    return drawn[y0:y1, x0:x1]


def _bounds(inside: _Mask) -> tuple[int, int, int, int]:
    """x0 y0 x1 y1 of the smallest rectangle that holds all that is inside."""
    rows, columns = np.flatnonzero(inside.any(1)), np.flatnonzero(inside.any(0))
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def _free_corner(taken: _Mask, shape: tuple[int, ...], draws: _Draws) -> tuple[int, int] | None:
    """Row and column of a rectangle's corner, drawn among those where nothing is taken; None where it fits nowhere."""
    height, width = shape
    sums = np.zeros((SIDE_PX + 1, SIDE_PX + 1), np.int64)
    sums[1:, 1:] = taken.cumsum(0).cumsum(1)
    inside = sums[height:, width:] - sums[:-height, width:] - sums[height:, :-width] + sums[:-height, :-width]
    rows, columns = np.nonzero(inside == 0)
    if not len(rows):
        return None
    choice = draws.whole(0, len(rows) - 1)
    return int(rows[choice]), int(columns[choice])


def _photographed(ink: FloatArray, draws: _Draws) -> NDArray[np.uint8]:
    """Ink [64, 64] as grey values: paper and ink of some brightness, and noise."""
    paper, full = draws.between(*_PAPER), draws.between(*_INK)
    noise = draws.between(*_NOISE) * draws.noise(SIDE_PX, SIDE_PX)
    grey = paper + (full - paper) * ink + noise
    return np.round(255 * np.clip(grey, 0, 1)).astype(np.uint8)
