"""How sure a detector's dense answer is at each place: the weights of what it says of boxes there.

Leaves in, for each leaf of boxes (distances, offsets, centers) its weights out. What a network answers beside an object
is anything: nobody reads a box whose score is low, and a distance that counted it would spend the network on noise.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from .record import Leaves, finite, float_leaves

SCORE_NAMES = re.compile(r"score|cls|class|logit|conf|obj|heat|prob", re.IGNORECASE)
FLOOR = 0.02  # what a place counts where the network sees nothing, next to 1 where it is sure


def score_leaves(leaves: Leaves) -> tuple[str, ...]:
    """The leaves [N, C, ...] or [N, ..., C] of scores, by their names: `scores.0`, `cls_logits`, `objectness`."""
    return tuple(name for name, leaf in float_leaves(leaves).items() if leaf.dim() >= 3 and SCORE_NAMES.search(name))


def are_probabilities(low: float, high: float) -> bool:
    """Whether scores, of which these are the lowest and the highest, lie within 0 and 1."""
    return low >= 0 and high <= 1


def even_score(low: float, high: float) -> float:
    """The score from which a yes is the likelier answer: of probabilities a half, of logits 0."""
    if are_probabilities(low, high):
        return 0.5
    return 0.0


def probabilities(scores: Tensor, low: float, high: float) -> Tensor:
    """Of scores within 0 and 1 (the lowest and highest of all images) themselves, of others the sigmoid."""
    if are_probabilities(low, high):
        return scores.clamp(0, 1)
    return scores.sigmoid()


def weights(leaves: Leaves, ends: Mapping[str, tuple[float, float]]) -> dict[str, Tensor]:
    """For each leaf that lies at the places of a leaf of scores, [N, ...] with 1 for its channels: the largest
    probability there, and `FLOOR` more. `ends` are the lowest and highest score of all images.
    """
    likely = {}  # scores as probabilities, by the leaf's name
    for name in score_leaves(leaves):
        likely[name] = probabilities(finite(leaves[name]), *ends[name])
    sure: dict[str, Tensor] = {}
    others = {name: leaf for name, leaf in float_leaves(leaves).items() if name not in likely}
    for name, leaf in others.items():
        weight = _weight_of(leaf, likely.values())
        if weight is not None:
            sure[name] = weight
    return sure


def _weight_of(leaf: Tensor, likely: Iterable[Tensor]) -> Tensor | None:
    """By the first scores that lie at the leaf's places, None where none do."""
    for probability in likely:
        channels = _channel_axis(leaf, probability)
        if channels is not None:
            return probability.amax(channels, keepdim=True) + FLOOR
    return None


def _channel_axis(leaf: Tensor, scores: Tensor) -> int | None:
    """The axis but for which both have the same sizes, the first behind the samples or the last; None where none is."""
    if leaf.dim() != scores.dim():
        return None
    for axis in (1, leaf.dim() - 1):
        if _without(leaf.shape, axis) == _without(scores.shape, axis):
            return axis
    return None


def _without(shape: Sequence[int], axis: int) -> tuple[int, ...]:
    """[N, 4, h, w] without its axis 1 is N, h, w."""
    return (*shape[:axis], *shape[axis + 1 :])


def entropy(probability: Tensor) -> Tensor:
    """Of a yes with this probability, in nats, entry by entry."""
    nats: Tensor = torch.special.entr(probability) + torch.special.entr(1 - probability)
    return nats


def divergence(ours: Tensor, theirs: Tensor) -> Tensor:
    """Kullback-Leibler's of two probabilities of a yes, `theirs` being the truth, entry by entry, in nats."""
    ours = ours.clamp(1e-7, 1 - 1e-7)
    cross = -(theirs * ours.log() + (1 - theirs) * (1 - ours).log())
    return (cross - entropy(theirs)).clamp(min=0)
