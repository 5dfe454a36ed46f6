"""Two networks' answers to one image in, how each is drawn out: bars, masks, boxes, images, maps or a curve, by task.

Both are drawn on the dense answer's scale. Knows no network and no file.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

from ..records import FloatArray, IntArray
from ..report.views import Bars, Boxes, Curve, Heat, Masks, Shown, View
from ..tasks import Decode, Leaves
from ..tasks.comparison import pixels_of
from ..tasks.detection import CONFIDENT, decoded
from ..tasks.record import class_leaf, finite, float_leaves, map_leaf

TOP = 3
MOST_BOXES = 20
SHOWS = {
    "classification": "the three likeliest classes",
    "multi-label": "the three likeliest labels",
    "segmentation": "the class of every pixel, as a colour",
    "detection": "boxes with their labels",
    "image-to-image": "the images themselves",
}
ELSE = "the largest output, a map as its mean over channels, a vector as a line"


@dataclass(frozen=True, slots=True)
class Pair:
    """The leaves of both answers to one image, [1, ...] each, and what their classes are called."""

    dense: Leaves
    shipped: Leaves
    names: tuple[str, ...] = ()
    decode: Decode | None = None


Drawn = tuple[View, View]


def views_of(task: str, pair: Pair) -> tuple[Drawn, str]:
    """How the dense and the shipped answer are drawn, and what that shows in words."""
    way = _WAYS.get(task)
    if way is None or (task == "detection" and pair.decode is None):
        return _whatever(pair), ELSE
    return way(pair), SHOWS[task]


def _classes(pair: Pair) -> Drawn:
    return _bars(_logits(pair.dense).softmax(0), pair.names), _bars(_logits(pair.shipped).softmax(0), pair.names)


def _labels(pair: Pair) -> Drawn:
    """Scores of a dense answer within 0 and 1 are taken for probabilities."""
    dense, shipped = _logits(pair.dense), _logits(pair.shipped)
    if float(dense.min()) < 0 or float(dense.max()) > 1:
        dense, shipped = dense.sigmoid(), shipped.sigmoid()
    return _bars(dense, pair.names), _bars(shipped, pair.names)


def _logits(leaves: Leaves) -> Tensor:
    """[classes]"""
    return finite(class_leaf(leaves)[1])[0]


def _bars(shares: Tensor, names: tuple[str, ...]) -> Bars:
    largest = shares.topk(min(TOP, len(shares)))
    return Bars(tuple(_name(names, int(index)) for index in largest.indices), largest.values.double().numpy())


def _name(names: tuple[str, ...], index: int) -> str:
    return names[index] if 0 <= index < len(names) else str(index)


def _masks(pair: Pair) -> Drawn:
    dense, shipped = (Masks(_plane(pixels_of(leaves)[0]), pair.names) for leaves in (pair.dense, pair.shipped))
    return dense, shipped


def _plane(values: Tensor) -> IntArray:
    """[h, w]; of classes in space, [d, h, w], the middle slice; of a line one row."""
    while values.dim() > 2:
        values = values[len(values) // 2]
    plane: IntArray = values.long().reshape(-1, values.shape[-1]).numpy()
    return plane


def _boxes(pair: Pair) -> Drawn:
    return _found(pair, pair.dense), _found(pair, pair.shipped)


def _found(pair: Pair, leaves: Leaves) -> Boxes:
    """The boxes that score enough to be an answer, the best ones where there are many."""
    (image,) = decoded(pair.decode, leaves, 1)
    order = image["scores"].argsort(descending=True)[:MOST_BOXES]
    order = order[image["scores"][order] >= CONFIDENT]
    kinds = image["labels"][order].long()
    labels = tuple(
        f"{_name(pair.names, int(kind))} {float(score):.0%}"
        for kind, score in zip(kinds, image["scores"][order], strict=True)
    )
    return Boxes(image["boxes"][order].double().numpy(), labels, kinds.numpy())


def _images(pair: Pair) -> Drawn:
    dense, shipped = (finite(map_leaf(leaves)[1])[0].double() for leaves in (pair.dense, pair.shipped))  # [C, h, w]
    if dense.dim() != 3 or len(dense) not in (1, 3):
        return _whatever(pair)
    low, high = _ends(dense)
    return _shown(dense, low, high), _shown(shipped, low, high)


def _shown(image: Tensor, low: float, high: float) -> Shown:
    pixels = ((image - low) / (high - low)).clamp(0, 1).expand(3, -1, -1)
    return Shown(pixels.permute(1, 2, 0).numpy())


def _whatever(pair: Pair) -> Drawn:
    """The dense answer's largest leaf, in both."""
    reals = float_leaves(pair.dense)
    name = max(reals, key=lambda leaf: reals[leaf].numel())
    dense, shipped = (_flat(finite(leaves[name])[0].double()) for leaves in (pair.dense, pair.shipped))
    if dense.dim() < 2:
        values: FloatArray = dense.numpy()
        return Curve(values), Curve(shipped.numpy(), values)
    low, high = _ends(dense)
    return Heat(dense.numpy(), low, high), Heat(shipped.numpy(), low, high)


def _flat(values: Tensor) -> Tensor:
    """[n], or [h, w]: the mean over what comes before."""
    while values.dim() > 2:
        values = values.mean(0)
    return values if values.dim() else values[None]


def _ends(values: Tensor) -> tuple[float, float]:
    """The smallest and the largest value; apart from each other where all are the same."""
    low, high = float(values.min()), float(values.max())
    return (low, high) if high > low else (low, low + 1.0)


_WAYS: Mapping[str, Callable[[Pair], Drawn]] = {
    "classification": _classes,
    "multi-label": _labels,
    "segmentation": _masks,
    "detection": _boxes,
    "image-to-image": _images,
}
