"""A bundle's manifest and its model's answer in, what is said of the answer out: classes, boxes, or a line an output.

Classes where the task is classification, shares of the pixels of a map of classes, boxes where this version knows the
bundle's way of decoding, else figures.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

import numpy as np

from .answers import Answer, answers_of, area_shares, by_output
from .decoding import Detections
from .feeds import Array, Arrays
from .images import TopClass, label_of
from .manifest import Manifest


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
    answers = answers_of(manifest, outputs, top=top)
    entries = [entries_of(answer, manifest.labels) for answer in answers]
    if None in entries:
        return _figures(by_output(manifest, outputs), where)

    lines = []
    for name, answer, values in zip(_sample_names(where, len(answers)), answers, entries, strict=True):
        lines += _boxes_lines(name, values) if answer.detections is not None else [_classes_line(name, values)]
    return Summary(entries, tuple(lines))


def entries_of(answer: Answer, labels: Sequence[str]) -> Any:
    """As JSON has it: classes, boxes, or a map's classes by their share of the pixels; None where it is no such."""
    if answer.detections is not None:
        return _boxes_of(answer.detections, labels)
    if answer.mask is not None:
        return [_class_of(index, share, labels) for index, share in area_shares(answer.mask).items()]
    return list(answer.classes) or None


def _class_of(index: int, share: float, labels: Sequence[str]) -> TopClass:
    return {"index": index, "label": label_of(index, labels), "share": share}


def _classes_line(name: str, entries: Sequence[TopClass]) -> str:
    answer = ", ".join(f"{entry['label']} {entry['share']:.3f}" for entry in entries)
    return f"{name}: {answer}"


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


def _boxes_of(detected: Detections, labels: Sequence[str]) -> list[Box]:
    boxes: list[Box] = []
    for corners, score, label in zip(detected["boxes"], detected["scores"], detected["labels"], strict=True):
        index = int(label)
        entry: Box = {
            "index": index,
            "label": label_of(index, labels),
            "score": float(score),
            "box": list(map(float, corners)),
        }
        boxes.append(entry)
    return boxes


def _boxes_lines(name: str, boxes: Sequence[Box]) -> list[str]:
    return [f"{name}: {_box_line(box)}" for box in boxes] or [f"{name}: nothing detected"]


def _box_line(box: Box) -> str:
    corners = " ".join(f"{px:.1f}" for px in box["box"])
    return f"{box['label']} {box['score']:.3f} at {corners}"
