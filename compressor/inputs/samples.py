"""One sample as it is kept between passes, and several of them put together to a batch.

Knows neither where samples come from nor what their targets mean.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from ..device.labels import MOST_CLASSES as MOST_CLASSES
from ..device.labels import UNKNOWN as UNKNOWN
from ..device.targets import IGNORED as IGNORED
from ..errors import DataError
from ..tensors import Inputs, as_tuple

# class: an index; mask: an index a pixel; boxes: with their labels; image: another image; values: any other numbers
TargetKind = Literal["class", "mask", "boxes", "image", "values"]
Target: TypeAlias = "Tensor | dict[str, Tensor]"
Targets: TypeAlias = "Tensor | list[dict[str, Tensor]]"

BOXES, LABELS = "boxes", "labels"  # keys of a detection target


@dataclass(frozen=True, slots=True)
class Sample:
    """`inputs` and `target` without the batch's axis.

    A target is a class index (int64 [], -1 unknown), a tensor of any other shape, or {"boxes": float32 [k, 4] x0 y0 x1
    y1 in pixels of the input, "labels": int64 [k]}.
    """

    inputs: Inputs
    target: Target

    @property
    def nbytes(self) -> int:
        """What its tensors take in memory."""
        return sum(tensor.nbytes for tensor in (*as_tuple(self.inputs), *tensors_of(self.target)))


def unknown_class() -> Tensor:
    """The target of a sample that has none."""
    return torch.tensor(UNKNOWN)


def tensors_of(target: Target) -> tuple[Tensor, ...]:
    """A target's tensors, those of boxes in the order of their keys."""
    if isinstance(target, Tensor):
        return (target,)
    return tuple(target[key] for key in sorted(target))


def has_boxes(target: Collection[object]) -> bool:
    """Whether a dict, or its keys, has what a detection target is made of."""
    return BOXES in target and LABELS in target


def kind_of(target: Target) -> TargetKind:
    """What a tensor's shape and type say; images can't be told from other numbers."""
    if isinstance(target, dict):
        return "boxes"
    if target.is_floating_point():
        return "values"
    return {0: "class", 2: "mask"}.get(target.ndim, "values")  # type: ignore[return-value]


def class_index(target: Target) -> int:
    """The class index that a target is; -1 of any other kind."""
    if isinstance(target, dict) or kind_of(target) != "class":
        return UNKNOWN
    return int(target)


def stacked_inputs(samples: Sequence[Sample]) -> Inputs:
    """The samples' inputs with the batch's axis in front, one tensor or as many as a sample has."""
    columns = zip(*(as_tuple(sample.inputs) for sample in samples), strict=True)  # [samples, inputs] to [inputs, ...]
    stacked = tuple(map(torch.stack, columns))
    if isinstance(samples[0].inputs, Tensor):
        return stacked[0]
    return stacked


def stacked_targets(samples: Sequence[Sample], source: str) -> Targets:
    """One tensor with the batch's axis in front, or a list of boxes. Raises DataError where shapes or kinds differ."""
    tensors = [sample.target for sample in samples if isinstance(sample.target, Tensor)]
    boxes = [sample.target for sample in samples if isinstance(sample.target, dict)]
    if tensors and boxes:
        raise DataError(f"{source} has boxes as targets of some samples and tensors of others; give one kind")
    if boxes:
        return boxes
    shapes = distinct_shapes(tensors)
    if len(shapes) > 1:
        raise DataError(f"{source} has targets of the shapes {shapes[0]} and {shapes[1]}; give targets of one shape")
    return torch.stack(tensors)


def distinct_shapes(tensors: Iterable[Tensor]) -> list[list[int]]:
    """Each shape there is once, in the order in which they come."""
    return list(map(list, dict.fromkeys(tensor.shape for tensor in tensors)))
