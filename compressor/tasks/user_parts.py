"""A user's own functions in place of a task's, held to what they must answer with whenever they are called.

An answer of another form, or one that is not finite, is a TaskError that names the function, its file and its line.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from numbers import Real

import torch
from torch import Tensor

from ..errors import TaskError
from ..records import Accuracy, Quality
from ..tensors import Inputs, count
from .calling import call, name_of, place_of
from .detection import average_precision, matched_f1
from .presets import judged
from .record import Data, Decode, Distance, Judge, Leaves, Objective, Predict, Targets, Task

UserQuality = Callable[[Predict, Data], object]


def with_user_parts(
    task: Task,
    *,
    quality: UserQuality | None = None,
    loss: Objective | None = None,
    says: Objective | None = None,
    distance: Distance | None = None,
    decode: Decode | None = None,
    dense: Predict | None = None,
) -> Task:
    """The task with a user's functions in place of its own, each checked whenever it is called.

    A `quality` may answer with a number: the metric then has the function's name and no interval, and is taken for a
    share where it lies within 0 and 1. A `loss` of a user's is one that tuning follows. With `decode` a network is
    judged by its boxes, without labels by those of `dense`.
    """
    if decode is not None:
        task = replace(task, quality=judged(average_precision(decode), matched_f1(decode), dense))
    if quality is not None:
        task = replace(task, quality=_user_quality(quality))
    if loss is not None:
        task = replace(task, loss=_user_objective(loss, "loss"), learns=True, classifies=False)
    if says is not None:
        task = replace(task, says=_user_objective(says, "says"), classifies=False)
    if distance is not None:
        task = replace(task, distance=_user_distance(distance), classifies=False)
    return task


@dataclass
class _Counted:
    """Data that counts the samples of its passes."""

    data: Data
    samples: int = 0

    def __iter__(self) -> Iterator[tuple[Inputs, Targets]]:
        samples = 0
        for inputs, targets in self.data:
            samples += count(inputs)
            self.samples = max(self.samples, samples)
            yield inputs, targets

    def __len__(self) -> int:
        return len(self.data)  # type: ignore[arg-type]  # raises TypeError where the data has no length


def _user_quality(quality: UserQuality) -> Judge:
    def judged(predict: Predict, data: Data) -> Quality:
        counted = _Counted(data)
        answer = _figure_in(call(quality, "quality", predict, counted), quality)
        value = answer.value if isinstance(answer, Quality) else answer
        if not math.isfinite(value):
            raise TaskError(f"{place_of(quality)}, given as quality, answers with {value}, expected a finite number")
        if isinstance(answer, Quality):
            return answer
        samples = counted.samples or sum(count(inputs) for inputs, _ in data)
        return Quality(name_of(quality), value, samples, value, value, is_share=0 <= value <= 1)

    return judged


def _figure_in(answer: object, quality: UserQuality) -> Quality | float:
    """The figure that a user's quality answers with. Raises TaskError for what is none."""
    if isinstance(answer, Tensor) and answer.numel() == 1 and answer.dtype != torch.bool:
        answer = answer.item()
    if isinstance(answer, Quality):
        return answer
    if isinstance(answer, Accuracy):
        return Quality(answer.metric, answer.value, answer.n, answer.low, answer.high, answer.chance)
    if isinstance(answer, Real) and not isinstance(answer, bool):
        return float(answer)
    raise TaskError(
        f"{place_of(quality)}, given as quality, answers with a {_kind(answer)}, expected a number or a Quality"
    )


def _user_objective(objective: Objective, role: str) -> Objective:
    def checked(leaves: Leaves, targets: Targets) -> Tensor:
        answer = call(objective, role, leaves, targets)
        values = _per_sample(answer, _samples(leaves, targets), objective, role)
        _require_gradient(values, leaves, objective, role)
        _refuse_not_finite(values, objective, role)
        return values

    return checked


def _user_distance(distance: Distance) -> Distance:
    def checked(leaves: Leaves, dense: Leaves) -> Tensor:
        answer = call(distance, "distance", leaves, dense)
        values = _per_sample(answer, _samples(dense, None), distance, "distance")
        _require_gradient(values, leaves, distance, "distance")
        if all(bool(leaf.isfinite().all()) for leaf in leaves.values()):  # a broken network may be infinitely far off
            _refuse_not_finite(values, distance, "distance")
        if bool((values < 0).any()):
            raise TaskError(
                f"{place_of(distance)}, given as distance, answers with {values.min().item():.3g}; expected squared "
                "distances, which are 0 or more"
            )
        return values

    return checked


def _samples(leaves: Leaves, targets: Targets) -> int:
    if targets is not None:
        return len(targets)
    return next((len(leaf) for leaf in leaves.values() if leaf.dim()), 0)


def _per_sample(answer: object, samples: int, function: Callable[..., object], role: str) -> Tensor:
    if not isinstance(answer, Tensor) or answer.shape != (samples,) or not answer.is_floating_point():
        raise TaskError(
            f"{place_of(function)}, given as {role}, answers with a {_kind(answer)}, expected one real number a "
            f"sample, a tensor [{samples}] (of torch's losses, those with reduction='none')"
        )
    return answer


def _require_gradient(values: Tensor, leaves: Leaves, function: Callable[..., object], role: str) -> None:
    if any(leaf.requires_grad for leaf in leaves.values()) and not values.requires_grad:
        raise TaskError(
            f"{place_of(function)}, given as {role}, has no gradient; expected torch operations on the leaves, "
            "without detach, numpy or no_grad"
        )


def _refuse_not_finite(values: Tensor, function: Callable[..., object], role: str) -> None:
    broken = int((~values.isfinite()).sum())
    if broken:
        raise TaskError(
            f"{place_of(function)}, given as {role}, is not finite for {broken} of {len(values)} samples; "
            "expected finite numbers"
        )


def _kind(answer: object) -> str:
    if isinstance(answer, Tensor):
        return f"tensor {list(answer.shape)} of {str(answer.dtype).removeprefix('torch.')}"
    return type(answer).__name__
