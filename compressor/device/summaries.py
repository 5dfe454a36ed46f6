"""A bundle's manifest and its model's answer in, what is said of the answer out: classes, boxes, or a line an output.

Classes where the task is classification, boxes where this version knows the bundle's way of decoding, else figures.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

import numpy as np

from ..errors import CompressorError, GateError
from . import fields
from .feeds import Array, Arrays, as_tuple
from .images import top_classes
from .manifest import CLASSIFICATION, Decode, Manifest

_MOST_LEVELS = 64
_MOST_STRIDE_PX = 1 << 14
_MOST_BOXES = 10_000

Decoder = Callable[[Mapping[str, Array]], Sequence[Mapping[str, Array]]]  # of each image boxes, scores and labels


@dataclass(frozen=True, slots=True)
class Summary:
    """Of one file's answer: `values` as JSON has them, and the lines that are printed instead."""

    values: Sequence[Any]
    lines: tuple[str, ...]


class Box(TypedDict):
    """What is detected at a place, for JSON; `box` is x0, y0, x1, y1 in pixels of the model's input."""

    index: int
    label: str
    score: float
    box: list[float]


class Figures(TypedDict):
    """An output as a whole, for JSON."""

    output: str
    dtype: str
    shape: list[int]
    min: float
    mean: float
    max: float


def summarise_answer(manifest: Manifest, outputs: Arrays, where: str, *, top: int) -> Summary:
    """Of the answer to the file `where`; `top` classes of each sample.

    Raises GateError where the bundle's parameters of decoding are of no kind that its decoder takes.
    """
    named = by_output(manifest, outputs)
    logits = _logits(manifest, named)
    if logits is not None:
        return _classes(logits, manifest.labels, where, top)
    decoder = _decoder(manifest.decode) if manifest.decode else None
    return _figures(named, where) if decoder is None else _boxes(decoder, named, manifest.labels, where)


def by_output(manifest: Manifest, outputs: Arrays) -> dict[str, Array]:
    """The arrays by the outputs' names."""
    names = [leaf.name for leaf in manifest.outputs] or ["output"]
    return dict(zip(names, as_tuple(outputs), strict=True))


def _logits(manifest: Manifest, outputs: Mapping[str, Array]) -> Array | None:
    """Of a classifier the only output, or of several the first of a row of floats for each sample; else None."""
    if manifest.task != CLASSIFICATION:
        return None
    if len(outputs) == 1:
        (only,) = outputs.values()
        return only if only.ndim > 1 else None
    return next((array for array in outputs.values() if array.ndim == 2 and array.dtype.kind == "f"), None)


def _classes(logits: Array, labels: Sequence[str], where: str, top: int) -> Summary:
    samples = [top_classes(row, labels, top) for row in logits]
    lines = []
    for name, entries in zip(_sample_names(where, len(samples)), samples, strict=True):
        answer = ", ".join(f"{entry['label']} {entry['share']:.3f}" for entry in entries)
        lines.append(f"{name}: {answer}")
    return Summary(samples, tuple(lines))


def _sample_names(where: str, samples: int) -> list[str]:
    """In a file of several, samples are named by their index."""
    return [where] if samples == 1 else [f"{where}[{index}]" for index in range(samples)]


def _figures(outputs: Mapping[str, Array], where: str) -> Summary:
    rows = [_figures_of(name, array) for name, array in outputs.items()]
    lines = [
        f"{where}: {row['output']} {row['dtype']} {row['shape']}, "
        f"min {row['min']:.6g}, mean {row['mean']:.6g}, max {row['max']:.6g}"
        for row in rows
    ]
    return Summary(rows, tuple(lines))


def _figures_of(name: str, array: Array) -> Figures:
    return {
        "output": name,
        "dtype": array.dtype.name,
        "shape": list(array.shape),
        "min": float(array.min()),
        "mean": float(array.mean(dtype=np.float64)),
        "max": float(array.max()),
    }


def _boxes(decoder: Decoder, outputs: Mapping[str, Array], labels: Sequence[str], where: str) -> Summary:
    samples = [_boxes_of(detected, labels) for detected in _decoded(decoder, outputs)]
    lines = []
    for name, boxes in zip(_sample_names(where, len(samples)), samples, strict=True):
        lines += [f"{name}: {_box_line(box)}" for box in boxes] or [f"{name}: nothing detected"]
    return Summary(samples, tuple(lines))


def _boxes_of(detected: Mapping[str, Array], labels: Sequence[str]) -> list[Box]:
    boxes: list[Box] = []
    for corners, score, label in zip(detected["boxes"], detected["scores"], detected["labels"], strict=True):
        index = int(label)
        name = labels[index] if 0 <= index < len(labels) else str(index)
        boxes.append({"index": index, "label": name, "score": float(score), "box": [float(px) for px in corners]})
    return boxes


def _box_line(box: Box) -> str:
    corners = " ".join(f"{px:.1f}" for px in box["box"])
    return f"{box['label']} {box['score']:.3f} at {corners}"


def _decoded(decoder: Decoder, outputs: Mapping[str, Array]) -> Sequence[Mapping[str, Array]]:
    try:
        return decoder(outputs)
    except CompressorError as error:
        raise GateError(f"the model's outputs can't be decoded as the bundle says: {error}") from error


def _decoder(decode: Decode) -> Decoder | None:
    """By the bundle's parameters; None for a kind that this version does not know."""
    if decode.kind != "dense":
        return None
    try:
        decode_dense = importlib.import_module("compressor.device.decoding").decode_dense
    except ModuleNotFoundError:
        return None
    parameters = _dense_parameters(decode.parameters)
    return lambda outputs: decode_dense(outputs, **parameters)


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
