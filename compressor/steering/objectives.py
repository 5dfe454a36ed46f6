"""What gates are to keep: the dense network's answers, as their task tells two apart."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor, fx
from torch.nn import functional

from ..graph.interface import answers, output_names
from ..placement import device_of, inputs_to
from ..tasks import Leaves, Task, class_leaf
from ..tensors import Inputs
from .gates import Lost
from .gating import Gated
from .lessons import Lessons, lessons_from

_BATCHES = 8  # tell how far answers lie apart
_LEAST = 1e-12  # of that, so that answers which are all alike are no reason to divide by nothing


def answers_lost(run: Gated, lessons: Lessons, task: Task | None) -> Lost:
    """How far the gated network's answers are from the dense one's, the mean over images; the mean answer is 1 off.

    For classes that is KL(dense || gated), for any other task its own distance.
    """
    graph = run.gating.graph
    classifies = task is None or task.classifies
    scale = spread_of(graph, lessons) if classifies else 1.0

    def lost(inputs: Inputs, gates: Tensor) -> Tensor:
        dense = answers_of(graph, inputs)
        leaves = run.answers(inputs, gates)
        if task is None or task.classifies:
            return divergence(class_leaf(leaves)[1], class_leaf(dense)[1]) / scale
        return task.distance(leaves, dense).mean()

    return lost


@torch.no_grad()
def answers_of(graph: fx.GraphModule, inputs: Inputs) -> Leaves:
    """The dense network's answer by name."""
    return dict(zip(output_names(graph), answers(graph, inputs), strict=True))


def spread_of(graph: fx.GraphModule, lessons: Lessons) -> float:
    """KL(dense || mean answer) in the mean over the first batches: what an answer that knows no image would lose."""
    device = device_of(graph)
    logits = [
        class_leaf(answers_of(graph, inputs_to(inputs, device)))[1]
        for inputs in itertools.islice(lessons_from(lessons, 0, 0), min(_BATCHES, len(lessons)))
    ]
    dense = torch.cat(logits).double()
    mean = dense.softmax(1).mean(0, keepdim=True).clamp_min(1e-12).log()
    return max(float(divergence(mean.expand_as(dense), dense)), _LEAST)


def divergence(logits: Tensor, dense: Tensor) -> Tensor:
    """KL(dense || other) of the classes' probabilities, the mean over images."""
    return functional.kl_div(
        functional.log_softmax(logits, 1), functional.log_softmax(dense, 1), log_target=True, reduction="batchmean"
    )
