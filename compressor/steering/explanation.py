"""What gates are to keep of an explanation: the spot that the selector draws from the gated network's own features."""

from __future__ import annotations

import torch
from torch import Tensor

from ..placement import device_of, inputs_to
from ..tensors import Inputs
from .gates import Lost
from .gating import Gated
from .lessons import Lessons, first_lessons
from .masks import SMALL, Spots, side_of
from .objectives import Distance
from .selector import Selector, find_spots, question_of

_LEAST = 0.01  # of the side: how far spots at least lie apart
PAPERS_WEIGHT = 10.0


def both_lost(
    run: Gated, selector: Selector, lessons: Lessons, distance: Distance, *, share: float, as_paper: bool
) -> Lost:
    """What is lost of the spots, `share` of it, and of the answers the rest.

    Spots' three numbers count over how they vary from image to image (1 is as far off as the mean spot), or as in the
    paper, ten times their squares in pixels of a side of 32.
    """
    graph = run.gating.graph
    scale = _scale(selector, graph_spots(run, selector, lessons), as_paper)

    def lost(inputs: Inputs, gates: Tensor) -> Tensor:
        with torch.no_grad():
            expected, dense = find_spots(selector, graph, inputs)
        leaves = run.answers(inputs, gates)
        drawn: Spots = selector(run.kept, question_of(dense))
        explained: Tensor = ((drawn.parameters - expected.parameters) * scale).square().mean()
        answered = distance(leaves, dense) if share < 1 else explained.new_zeros(())
        return share * explained + (1 - share) * answered

    return lost


def graph_spots(run: Gated, selector: Selector, lessons: Lessons) -> Tensor:
    """[images, 3] the dense network's spots of the first batches."""
    graph = run.gating.graph
    parameters = []
    with torch.no_grad():
        for inputs in first_lessons(lessons):
            spots, _ = find_spots(selector, graph, inputs_to(inputs, device_of(graph)))
            parameters.append(spots.parameters)
    return torch.cat(parameters)


def _scale(selector: Selector, spots: Tensor, as_paper: bool) -> Tensor:
    """[3] what differences are multiplied by before they are squared."""
    side = side_of(selector.shape)
    if as_paper:
        return spots.new_full((3,), PAPERS_WEIGHT**0.5 * SMALL / side)
    return 1 / spots.std(0, unbiased=False).clamp_min(_LEAST * side)
