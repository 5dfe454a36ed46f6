"""Where a detector's dense answer says something: how sure its scores are at each place.

Leaves in, for each leaf of boxes (distances, offsets, centers) its weights out. What a network answers beside an object
is anything: nobody reads a box whose score is low, and a distance that counted it would spend the network on noise.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from .record import Leaves, finite, float_leaves

SCORE_NAMES = re.compile(r"score|cls|class|logit|conf|obj|heat|prob", re.IGNORECASE)
FLOOR = 0.02  # what a place counts where the network sees nothing, next to 1 where it is sure


def score_leaves(leaves: Leaves) -> tuple[str, ...]:
    """The leaves [N, C, ...] or [N, ..., C] of scores, by their names: `scores.0`, `cls_logits`, `objectness`."""
    return tuple(name for name, leaf in float_leaves(leaves).items() if leaf.dim() >= 3 and SCORE_NAMES.search(name))


def probabilities(scores: Tensor, low: float, high: float) -> Tensor:
    """Of scores within 0 and 1 (the lowest and highest of all images) themselves, of others the sigmoid."""
    return scores.clamp(0, 1) if low >= 0 and high <= 1 else scores.sigmoid()


def weights(leaves: Leaves, ends: Mapping[str, tuple[float, float]]) -> dict[str, Tensor]:
    """For each leaf that lies at the places of a leaf of scores, [N, ...] with 1 for its channels: the largest
    probability there, and `FLOOR` more. `ends` are the lowest and highest score of all images.
    """
    sure: dict[str, Tensor] = {}
    scores = score_leaves(leaves)
    for name, leaf in float_leaves(leaves).items():
        if name in scores:
            continue
        for score in scores:
            channels = _channel_axis(leaf, leaves[score])
            if channels is not None:
                sure[name] = probabilities(finite(leaves[score]), *ends[score]).amax(channels, keepdim=True) + FLOOR
                break
    return sure


def _channel_axis(leaf: Tensor, scores: Tensor) -> int | None:
    """The axis but for which both have the same sizes, the first behind the samples or the last; None where none is."""
    if leaf.dim() != scores.dim():
        return None
    for axis in (1, leaf.dim() - 1):
        places = [size for i, size in enumerate(leaf.shape) if i != axis]
        if places == [size for i, size in enumerate(scores.shape) if i != axis]:
            return axis
    return None


def entropy(probability: Tensor) -> Tensor:
    """Of a yes with this probability, in nats, entry by entry."""
    nats: Tensor = torch.special.entr(probability) + torch.special.entr(1 - probability)
    return nats


def divergence(ours: Tensor, theirs: Tensor) -> Tensor:
    """Kullback-Leibler's of two probabilities of a yes, `theirs` being the truth, entry by entry, in nats."""
    ours = ours.clamp(1e-7, 1 - 1e-7)
    cross = -(theirs * ours.log() + (1 - theirs) * (1 - ours).log())
    return (cross - entropy(theirs)).clamp(min=0)
