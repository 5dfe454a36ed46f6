"""What a network's answer means, as a record of four functions, and how its leaves are told apart.

A leaf is one tensor of the answer, [N, ...] with the samples first, under the name the traced graph gives it; what is
not of real numbers (indices, masks) has no say. Knows no metric and no network.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from ..errors import ModelError
from ..records import Quality
from ..tensors import Inputs

Leaves: TypeAlias = Mapping[str, Tensor]
Boxes: TypeAlias = Mapping[str, Any]  # one image's boxes [k, 4] (x0 y0 x1 y1 in pixels), labels [k], scores [k]
Targets: TypeAlias = "Tensor | Sequence[Boxes] | None"
Predict: TypeAlias = Callable[[Inputs], Leaves]
Data: TypeAlias = Iterable[tuple[Inputs, Targets]]
Objective: TypeAlias = Callable[[Leaves, Targets], Tensor]
Distance: TypeAlias = Callable[[Leaves, Leaves], Tensor]
Pick: TypeAlias = Callable[[Leaves], tuple[str, Tensor]]  # the leaf that carries the answer, and its name
Decode: TypeAlias = Callable[[Leaves], Sequence[Boxes]]
Judge: TypeAlias = Callable[[Predict, Data], Quality]


@dataclass(frozen=True, slots=True)
class Task:
    """What an answer means.

    says: [N], differentiable; relevance starts at its gradient.
    loss: [N]; relevance's other start, and what tuning follows where `learns` and the targets are labels.
    quality: one number for a network on re-iterable data, more is better.
    distance: [N], squared, each leaf over its spread, from the second leaves (the dense network's); 1 is as far off as
    the mean answer. Its mean over samples is the relative error that measured loss and tuning go by.
    learns: whether following `loss` brings the answer nearer to the labels; else tuning follows `distance`.
    classifies: whether the answer is one [N, classes] alone and what it says, loses and differs by is a classifier's
    own; relevance, measured loss and tuning then take a classifier's shorter ways, which come to the same.
    """

    name: str
    says: Objective
    loss: Objective
    quality: Judge
    distance: Distance
    learns: bool = True
    classifies: bool = False


def is_labelled(targets: Targets) -> bool:
    """Whether any sample of a batch has a target: [N] of -1 alone, and None, are none."""
    if targets is None:
        return False
    if not isinstance(targets, Tensor):
        return True
    if targets.dim() == 1 and not targets.is_floating_point():
        return bool((targets >= 0).any())
    return targets.numel() > 0


def float_leaves(leaves: Leaves) -> dict[str, Tensor]:
    """The leaves of real numbers with samples on their first axis."""
    return {name: leaf for name, leaf in leaves.items() if leaf.is_floating_point() and leaf.dim() > 0}


def sample_leaves(leaves: Leaves, samples: int) -> dict[str, Tensor]:
    """The leaves of real numbers with one entry a sample: others (anchors, a scale) have no samples."""
    return {name: leaf for name, leaf in float_leaves(leaves).items() if len(leaf) == samples}


def class_leaf(leaves: Leaves) -> tuple[str, Tensor]:
    """The leaf [N, C] called logits, else the first one, and its name. Raises ModelError where there is none."""
    logits = float_leaves(leaves).get("logits")
    if logits is not None and logits.dim() == 2:
        return "logits", logits
    return _first(leaves, lambda leaf: leaf.dim() == 2, "[N, classes] or [N, features]")


def map_leaf(leaves: Leaves) -> tuple[str, Tensor]:
    """The first leaf [N, C, ...] with places behind its classes or channels, and its name. Raises ModelError."""
    return _first(leaves, lambda leaf: leaf.dim() >= 3, "[N, C, height, width]")


def leaf_like(leaves: Leaves, targets: Tensor) -> tuple[str, Tensor]:
    """The first leaf with as many values a sample as the targets have, and its name. Raises ModelError."""
    shape = f"of {list(targets.shape)}, as the targets are, and"
    return _first(leaves, lambda leaf: _squeezed(leaf) == _squeezed(targets), shape)


def _squeezed(tensor: Tensor) -> list[int]:
    """[8, 1, 4, 4] and [8, 4, 4] are alike: the sizes a sample has beside 1."""
    return [size for size in tensor.shape[1:] if size != 1]


def _first(leaves: Leaves, suits: Callable[[Tensor], bool], shape: str) -> tuple[str, Tensor]:
    for name, leaf in float_leaves(leaves).items():
        if suits(leaf):
            return name, leaf
    raise ModelError(
        f"the task needs a leaf {shape} of real numbers, the network answers with {in_words(leaves)}; "
        "say another task, or give the task's functions yourself"
    )


def in_words(leaves: Leaves) -> str:
    """`out [2, 21, 8, 8], aux [2, 21, 8, 8]`."""
    shapes = []
    for name, leaf in leaves.items():
        kind = str(leaf.dtype).removeprefix("torch.")
        shapes.append(f"{name} {list(leaf.shape)} ({kind})")
    return ", ".join(shapes) or "nothing"


def real(leaf: Tensor) -> Tensor:
    """At least float32, gradients kept."""
    if leaf.dtype in (torch.float16, torch.bfloat16):
        return leaf.float()
    return leaf


def finite(leaf: Tensor) -> Tensor:
    """At least float32; what is not finite counts as 0, and has no gradient."""
    values = real(leaf)
    return torch.where(values.isfinite(), values, torch.zeros_like(values))


def per_sample(values: Tensor) -> Tensor:
    """[N, ...] to [N]: the sum over everything that a sample has."""
    if values.dim() <= 1:
        return values
    return values.flatten(1).sum(1)
