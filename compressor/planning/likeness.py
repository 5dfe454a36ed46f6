"""How far a network's answers lie from another's on the same images, as one number for all tasks."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from ..distributed import sum_over_ranks
from ..tasks import Task
from ..tensors import Inputs, as_tuple

WORST = 1e6  # an error so many times the outputs themselves tells nothing more


@dataclass(frozen=True, slots=True, eq=False)
class Likeness:
    """The answers that others are compared with: `expected` holds each batch's leaves [N, ...], `names` theirs.

    Without a task, or with one that tells classes, the answers are logits [N, classes]: a constant more on all classes
    makes no difference there.
    """

    names: tuple[str, ...]
    expected: tuple[tuple[Tensor, ...], ...]
    task: Task | None = None

    @classmethod
    def to(cls, answers: Sequence[Inputs], names: Sequence[str], task: Task | None) -> Likeness:
        """That to these answers, one for each batch."""
        if task is not None and task.classifies:
            task = None
        return cls(tuple(names), tuple(_leaves(answer, task) for answer in answers), task)

    def error(self, answers: Iterable[Inputs]) -> float:
        """Squared distance over the expected answers' own square; what is not finite counts as `WORST`.

        A task's distance counts every image's answer as 1.
        """
        off = whole = 0.0
        for answer, expected in zip(answers, self.expected, strict=True):
            off += self._squared_distance(_leaves(answer, self.task), expected)
            whole += self._own_square(expected)
        # over all ranks before the quotient, for each may have images of its own
        sums = sum_over_ranks({"off": np.array(off), "whole": np.array(whole)})
        relative = float(sums["off"]) / max(float(sums["whole"]), float(np.finfo(np.float64).tiny))
        if not np.isfinite(relative):
            return WORST
        return min(relative, WORST)

    def _squared_distance(self, answer: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
        """Summed over the images of a batch."""
        if self.task is None:
            return sum(float((a - b).square().sum()) for a, b in zip(answer, expected, strict=True))
        named = dict(zip(self.names, answer, strict=True))
        named_expected = dict(zip(self.names, expected, strict=True))
        return float(self.task.distance(named, named_expected).double().sum())

    def _own_square(self, expected: Sequence[Tensor]) -> float:
        """What an answer that says nothing is off by."""
        if self.task is None:
            return sum(float(leaf.square().sum()) for leaf in expected)
        return float(len(expected[0]))


def _leaves(answer: Inputs, task: Task | None) -> tuple[Tensor, ...]:
    """The tensors of an answer; without a task they are logits, which a constant more on all classes leaves alike."""
    leaves = tuple(leaf.detach() for leaf in as_tuple(answer))
    if task is None:
        return tuple(map(_centred, leaves))
    return leaves


def _centred(leaf: Tensor) -> Tensor:
    """[N, ...] in float64, less its mean over the classes where it has several."""
    if leaf.dim() > 1 and leaf.shape[1] > 1:
        leaf = leaf - leaf.mean(1, keepdim=True)
    return leaf.double()
