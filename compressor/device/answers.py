"""One sample's answer: what the bundle says it means, as classes, boxes or the class of each pixel, and the raw leaves.

Knows no runtime and no file; `summaries` makes lines and JSON of it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import repeat
from typing import Any

import numpy as np

from ..errors import CompressorError, GateError
from ..records import IntArray
from . import fields
from .decoding import Detections, decode_dense
from .feeds import Array, Arrays, as_tuple
from .images import TopClass, top_classes
from .manifest import CLASSIFICATION, Decode, Manifest
from .scoring import pixel_classes

SEGMENTATION = "segmentation"
_MOST_LEVELS = 64
_MOST_STRIDE_PX = 1 << 14
_MOST_BOXES = 10_000


@dataclass(frozen=True, slots=True)
class Answer:
    """To one sample. `outputs` are the model's own, by name, without the batch axis.

    `classes` are a classifier's, the likeliest first. `detections` are `boxes` float32 [k, 4] (x0 y0 x1 y1 in pixels
    of the model's input), `scores` [k] and `labels` [k], the highest score first; None where the bundle says no way of
    decoding that is known here. `mask` is the class of each pixel, int64 [h, w], None where the answer is no such map.
    """

    outputs: Mapping[str, Array]
    classes: tuple[TopClass, ...] = ()
    detections: Detections | None = None
    mask: IntArray | None = field(default=None)


def answers_of(manifest: Manifest, outputs: Arrays, *, top: int = 5) -> tuple[Answer, ...]:
    """Of every sample of the model's outputs [N, ...]; `top` classes each.

    Raises GateError where the bundle's way of decoding can't be followed.
    """
    named = by_output(manifest, outputs)
    leaves = [dict(zip(named, sample, strict=True)) for sample in zip(*named.values(), strict=True)]
    detections = decoded(manifest.decode, named) or repeat(None)
    return tuple(map(Answer, leaves, _classes(manifest, named, top), detections, _masks(manifest, named)))


def _classes(manifest: Manifest, outputs: Mapping[str, Array], top: int) -> Iterable[tuple[TopClass, ...]]:
    """Of each sample; none of any where no output is of classes."""
    logits = logits_of(manifest, outputs)
    if logits is None:
        return repeat(())
    return [tuple(top_classes(row, manifest.labels, top)) for row in logits]


def _masks(manifest: Manifest, outputs: Mapping[str, Array]) -> Iterable[IntArray | None]:
    """Of each sample; None of any where no output is a map of classes."""
    maps = maps_of(manifest, outputs)
    if maps is None:
        return repeat(None)
    return [pixel_classes(scores, scores.shape[1:]) for scores in maps]  # each [C, h, w]


def by_output(manifest: Manifest, outputs: Arrays) -> dict[str, Array]:
    """The arrays by the outputs' names."""
    return dict(zip(manifest.output_names, as_tuple(outputs), strict=True))


def logits_of(manifest: Manifest, outputs: Mapping[str, Array]) -> Array | None:
    """Of a classifier the only output, or of several the first of a row of floats for each sample; else None."""
    if manifest.task != CLASSIFICATION:
        return None
    if len(outputs) > 1:
        return _first_floats(outputs, axes=2)
    (only,) = outputs.values()
    return only if only.ndim > 1 else None


def maps_of(manifest: Manifest, outputs: Mapping[str, Array]) -> Array | None:
    """Of a segmentation the first output of a map of floats, [N, C, h, w]; else None."""
    if manifest.task != SEGMENTATION:
        return None
    return _first_floats(outputs, axes=4)


def _first_floats(outputs: Mapping[str, Array], *, axes: int) -> Array | None:
    wanted = (axes, "f")
    return next((array for array in outputs.values() if (array.ndim, array.dtype.kind) == wanted), None)


def decoded(decode: Decode | None, outputs: Mapping[str, Array]) -> list[Detections] | None:
    """Of each sample; None for a kind of decoding that this version does not know."""
    if decode is None or decode.kind != "dense":
        return None
    parameters = _dense_parameters(decode.parameters)
    try:
        return decode_dense(outputs, **parameters)
    except CompressorError as error:
        raise GateError(f"the model's outputs can't be decoded as the bundle says: {error}") from error


def _dense_parameters(content: fields.Object) -> dict[str, Any]:
    try:
        fields.only(content, ("strides", "threshold", "iou", "most"), "the decoding")
        strides = fields.entries(content, "strides", least=1, most=_MOST_LEVELS)
        return {
            "strides": [fields.as_whole(side, "a stride", least=1, most=_MOST_STRIDE_PX) for side in strides],
            "threshold": fields.number(content, "threshold", least=0, most=1),
            "iou": fields.number(content, "iou", least=0, most=1),
            "most": fields.whole(content, "most", least=1, most=_MOST_BOXES),
        }
    except ValueError as error:
        raise GateError(f"the bundle's parameters of decoding are no use: {error}") from error


def area_shares(mask: IntArray) -> dict[int, float]:
    """The share of the pixels that each class has, the largest first."""
    labels, counts = np.unique(mask, return_counts=True)
    order = np.argsort(-counts, kind="stable")
    return {int(labels[place]): float(counts[place] / mask.size) for place in order}
