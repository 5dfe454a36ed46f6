"""What gates are to keep: the dense network's answers, as their task tells two apart."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, fx
from torch.nn import functional

from ..graph.interface import answers, output_names
from ..placement import device_of, inputs_to
from ..tasks import Leaves, Task, class_leaf
from ..tensors import Inputs
from .gates import Lost
from .gating import Gated
from .lessons import Lessons, first_lessons

Distance = Callable[[Leaves, Leaves], Tensor]

_LEAST = 1e-12  # of how far answers lie apart, so that answers which are all alike are no reason to divide by nothing


def answers_lost(run: Gated, lessons: Lessons, task: Task | None) -> Lost:
    """How far the gated network's answers are from the dense one's, the mean over images; the mean answer is 1 off.

    For classes that is KL(dense || gated), for any other task its own distance.
    """
    graph = run.gating.graph
    distance = distance_of(graph, lessons, task)

    def lost(inputs: Inputs, gates: Tensor) -> Tensor:
        return distance(run.answers(inputs, gates), answers_of(graph, inputs))

    return lost


def distance_of(graph: fx.GraphModule, lessons: Lessons, task: Task | None) -> Distance:
    """How far leaves are from the dense network's, differentiable in the first; the mean answer is about 1 off."""
    if task is not None and not task.classifies:
        distance = task.distance

        def by_task(leaves: Leaves, dense: Leaves) -> Tensor:
            return distance(leaves, dense).mean()

        return by_task
    scale = spread_of(graph, lessons)

    def by_class(leaves: Leaves, dense: Leaves) -> Tensor:
        return divergence(class_leaf(leaves)[1], class_leaf(dense)[1]) / scale

    return by_class


def leaves_of(graph: fx.GraphModule, inputs: Inputs) -> Leaves:
    """A network's answer by name."""
    return dict(zip(output_names(graph), answers(graph, inputs), strict=True))


@torch.no_grad()
def answers_of(graph: fx.GraphModule, inputs: Inputs) -> Leaves:
    """The same, without a gradient."""
    return leaves_of(graph, inputs)


def spread_of(graph: fx.GraphModule, lessons: Lessons) -> float:
    """KL(dense || mean answer) in the mean over the first batches: what an answer that knows no image would lose."""
    device = device_of(graph)
    logits: list[Tensor] = []
    for inputs in first_lessons(lessons):
        _, of_batch = class_leaf(answers_of(graph, inputs_to(inputs, device)))
        logits.append(of_batch)
    dense = torch.cat(logits).double()
    mean = dense.softmax(1).mean(0, keepdim=True).clamp_min(1e-12).log()
    return max(float(divergence(mean.expand_as(dense), dense)), _LEAST)


def divergence(logits: Tensor, dense: Tensor) -> Tensor:
    """KL(dense || gated) of the classes' probabilities, the mean over images; both are logits [N, classes]."""
    return functional.kl_div(
        functional.log_softmax(logits, 1), functional.log_softmax(dense, 1), log_target=True, reduction="batchmean"
    )
