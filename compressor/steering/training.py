"""Training of a few tensors that can be ended anywhere and gone on with; what counts is chosen on images kept out.

Steps, a loss and a judgement in, the best state out. Knows neither networks nor masks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..errors import DataError
from ..inputs.images import Batches, batches
from ..tensors import count, cut
from .checkpoints import Checkpoint, State, optimiser_state, restore_optimiser
from .lessons import Lessons, image_count

HELD_SHARE = 5  # one image of so many is kept out
_BEST = "best."


@dataclass(frozen=True, slots=True)
class TrainingOptions:
    """Adam's steps; `judgements` of them are followed by one, alike apart."""

    steps: int
    rate: float = 1e-4
    weight_decay: float = 1e-4
    judgements: int = 8


def parted(lessons: Lessons) -> tuple[Lessons, Lessons]:
    """Images to learn from and those kept out, which share none: the last fifth of the order that they lie in."""
    if isinstance(lessons, Batches):
        images = lessons.images
        learned = _learned(len(images))
        first, second = images.subset(np.arange(learned)), images.subset(np.arange(learned, len(images)))
        return batches(first, lessons.batch_size), batches(second, lessons.batch_size)
    if len(lessons) > 1:
        learned = _learned(len(lessons))
        return list(lessons[:learned]), list(lessons[learned:])
    learned = _learned(image_count(lessons))
    ((inputs, _),) = lessons
    return [(cut(inputs, 0, learned), None)], [(cut(inputs, learned, count(inputs)), None)]


def _learned(total: int) -> int:
    """How many of all images, or batches, are learned from. Raises DataError where that is none."""
    learned = total - max(1, total // HELD_SHARE)
    if learned < 1:
        raise DataError("one image can't both train and judge a selector; give at least two (--calibration)")
    return learned


def train(
    tensors: Mapping[str, Tensor],
    loss: Callable[[int], Tensor],
    judge: Callable[[], float],
    *,
    options: TrainingOptions,
    checkpoint: Checkpoint,
    also: Mapping[str, Tensor],
    progress: Callable[[float], None],
) -> float:
    """Trains the tensors in place and leaves the best of what was judged in them; gives its judgement, less is better.

    `loss(step)` may change the tensors `also`, which belong to the training. What it began with is judged too.
    """
    parameters = [tensor.requires_grad_() for tensor in tensors.values()]
    optimiser = torch.optim.Adam(parameters, lr=options.rate, weight_decay=options.weight_decay)
    resumed = _resumed(tensors, also, optimiser, checkpoint)
    if resumed is None:
        resumed = 0, _number(judge()), _cloned(tensors)
    done, best, best_state = resumed

    for step in range(done, options.steps):
        optimiser.zero_grad(set_to_none=True)
        loss(step).backward()  # type: ignore[no-untyped-call]
        optimiser.step()
        if _is_judged(step + 1, options):
            judged = _number(judge())
            if judged < best:
                best, best_state = judged, _cloned(tensors)
        state = {**tensors, **also} | {_BEST + name: tensor for name, tensor in best_state.items()}
        state |= {"judged": torch.tensor(best, dtype=torch.float64), **optimiser_state(optimiser)}
        checkpoint.write(step + 1, state, due=step + 1 == options.steps)
        progress((step + 1) / options.steps)
    _copy(tensors, best_state)
    for parameter in parameters:
        parameter.requires_grad_(False)
    return best


def _resumed(
    tensors: Mapping[str, Tensor], also: Mapping[str, Tensor], optimiser: torch.optim.Optimizer, checkpoint: Checkpoint
) -> tuple[int, float, State] | None:
    """Puts everything as it was put aside; the steps that are done, the best judgement and its state."""
    earlier = checkpoint.read()
    if earlier is None:
        return None
    done, state = earlier
    _copy(tensors, state)
    _copy(also, state)
    restore_optimiser(optimiser, state)
    return done, float(state["judged"]), {name: state[_BEST + name] for name in tensors}


def _number(judged: float) -> float:
    """What is no number is worse than any, so that the first that is one takes its place."""
    return math.inf if math.isnan(judged) else judged


def _is_judged(step: int, options: TrainingOptions) -> bool:
    every = max(1, options.steps // options.judgements)
    return step % every == 0 or step == options.steps


def _cloned(tensors: Mapping[str, Tensor]) -> State:
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


@torch.no_grad()
def _copy(tensors: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        tensor.copy_(state[name])
