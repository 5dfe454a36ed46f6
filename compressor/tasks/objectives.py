"""What a network says about its samples, and how far that is from their labels.

Leaves and targets in, [N] out, differentiable. What is said without labels: with y a leaf, m its mean over all images
and s its spread, the sum over leaves of <y, stop_gradient(y - m)> / s, whose gradient is how an answer differs from an
ordinary one (the plain energy |y|^2 / 2 has none where answers are normalised).
"""

from __future__ import annotations

from typing import TypeGuard

import torch
from torch import Tensor
from torch.nn import functional

from ..errors import DataError, ModelError
from .places import FLOOR, are_probabilities, even_score, probabilities, score_leaves, weights
from .record import (
    Leaves,
    Objective,
    Pick,
    Targets,
    class_leaf,
    finite,
    in_words,
    is_labelled,
    leaf_like,
    map_leaf,
    per_sample,
    real,
)
from .reference import Reference

IGNORED = (255, -1)  # entries of a mask that belong to no class
INTERPOLATION = {3: "linear", 4: "bilinear", 5: "trilinear"}  # by the axes of [N, C, ...]


def labels_or_answers(logits: Tensor, targets: Targets) -> Tensor:
    """int64 [N]: the labelled class, where it is -1 the predicted one. Raises DataError for a class there is not."""
    answers = logits.argmax(1)
    if not isinstance(targets, Tensor):
        return answers
    labels = targets.to(logits.device).long()
    if labels.shape != answers.shape:
        raise DataError(f"labels are {list(labels.shape)}, expected one class index a sample, {list(answers.shape)}")
    if (labels >= logits.shape[1]).any():
        raise DataError(f"a label is {int(labels.max())}, the network answers with {logits.shape[1]} classes")
    return torch.where(labels >= 0, labels, answers)


def class_said(leaves: Leaves, targets: Targets) -> Tensor:
    """The logit of the labelled, else of the predicted class."""
    logits = finite(class_leaf(leaves)[1])  # [N, C]
    return logits.gather(1, labels_or_answers(logits, targets)[:, None])[:, 0]


def class_loss(leaves: Leaves, targets: Targets) -> Tensor:
    """Cross-entropy with the labelled, else with the predicted class."""
    logits = real(class_leaf(leaves)[1])
    return functional.cross_entropy(logits, labels_or_answers(logits, targets), reduction="none")


def multi_hot(scores: Tensor, targets: Targets) -> Tensor | None:
    """[N, C] of 0, 1 and, where nobody knows, -1; None without labels."""
    if not _are_labels(targets):
        return None
    labels = targets.to(scores.device)
    if labels.dim() == 1 and scores.shape[1] == 1:
        labels = labels[:, None]
    if labels.shape != scores.shape:
        raise DataError(f"labels are {list(labels.shape)}, the network answers with {list(scores.shape)} labels")
    return labels.to(scores.dtype)


def _are_labels(targets: Targets) -> TypeGuard[Tensor]:
    """Whether the targets are a tensor, and any sample has one."""
    return isinstance(targets, Tensor) and is_labelled(targets)


def _ends(leaves: Leaves, name: str, reference: Reference | None) -> tuple[float, float]:
    """A leaf's lowest and highest value: over all calibration images where a reference tells, else in this batch."""
    if reference is not None:
        entry = reference.entry(name, leaves)
        return entry.low, entry.high
    leaf = leaves[name].detach()
    return float(leaf.min()), float(leaf.max())


def labels_said(reference: Reference | None) -> Objective:
    """The sum of the scores of the labelled classes, without labels of those above even; of the best where none is."""

    def said(leaves: Leaves, targets: Targets) -> Tensor:
        name, leaf = class_leaf(leaves)
        scores = finite(leaf)  # [N, C]
        labels = multi_hot(scores, targets)
        even = even_score(*_ends(leaves, name, reference))
        chosen = scores > even if labels is None else labels > 0
        best = functional.one_hot(scores.argmax(1), scores.shape[1]).bool()
        chosen = torch.where(chosen.any(1, keepdim=True), chosen, best)  # a sample of no class would say nothing
        return (scores * chosen).sum(1)

    return said


def labels_loss(reference: Reference | None) -> Objective:
    """Binary cross-entropy, the mean over labels that are known; without any, with the network's own decisions."""

    def loss(leaves: Leaves, targets: Targets) -> Tensor:
        name, leaf = class_leaf(leaves)
        scores = real(leaf)
        ends = _ends(leaves, name, reference)
        labels = multi_hot(scores, targets)
        if labels is None:
            labels = (scores > even_score(*ends)).to(scores.dtype)
        certain = are_probabilities(*ends)
        unlike = functional.binary_cross_entropy if certain else functional.binary_cross_entropy_with_logits
        terms = unlike(scores, labels.clamp(0, 1), reduction="none")  # [N, C]
        weights = (labels >= 0).to(scores.dtype)
        return (terms * weights).sum(1) / weights.sum(1).clamp(min=1)

    return loss


def pixel_logits(leaves: Leaves) -> Tensor:
    """[N, C, ...] of the map; one channel alone, z, becomes two classes, -z/2 and z/2, which have its cross-entropy."""
    logits = finite(map_leaf(leaves)[1])
    if logits.shape[1] == 1:
        return torch.cat([-logits / 2, logits / 2], 1)  # [N, 1, ...] to [N, 2, ...]
    return logits


def masks_of(logits: Tensor, targets: Targets) -> Tensor | None:
    """int64 [N, ...], -1 where no class is said; None without labels. Raises DataError for a class there is not."""
    if not _are_labels(targets):
        return None
    masks = targets.to(logits.device).long()
    if masks.dim() == logits.dim() and masks.shape[1] == 1:
        masks = masks[:, 0]  # [N, 1, h, w] to [N, h, w]
    if masks.dim() != logits.dim() - 1 or len(masks) != len(logits):
        raise DataError(
            f"masks are {list(targets.shape)}, the network answers with {list(logits.shape)}, and segmentation takes a "
            "class index for each pixel, [N, H, W]; give those, or say another task"
        )
    classes = logits.shape[1]
    for entry in IGNORED:
        if not 0 <= entry < classes:  # of a network with 300 classes 255 is one of them
            masks = torch.where(masks == entry, -1, masks)
    is_valid = (masks >= -1) & (masks < classes)
    if not is_valid.all():
        raise DataError(
            f"a mask holds {int(masks.min())} to {int(masks.max())}, the network answers with {classes} classes; "
            "255 and -1 stand for pixels of no class"
        )
    return masks


def sized_like(logits: Tensor, masks: Tensor | None) -> Tensor:
    """The map at the size of the masks, bilinear, as networks that answer at a quarter of the size are judged."""
    if masks is None or logits.shape[2:] == masks.shape[1:]:
        return logits
    mode = INTERPOLATION[logits.dim()]
    return functional.interpolate(logits, size=masks.shape[1:], mode=mode, align_corners=False)


def _pixels(leaves: Leaves, targets: Targets) -> tuple[Tensor, Tensor]:
    """The map and the class of every pixel: the labelled one, in an image without any label the predicted one."""
    small = pixel_logits(leaves)
    masks = masks_of(small, targets)
    logits = sized_like(small, masks)
    answers = logits.argmax(1)
    if masks is None:
        return logits, answers
    empty = (masks < 0).flatten(1).all(1).view(-1, *[1] * (masks.dim() - 1))  # [N, 1, 1]
    return logits, torch.where(empty, answers, masks)


def _pixel_mean(values: Tensor, classes: Tensor) -> Tensor:
    """[N]: the mean of [N, ...] over pixels that have a class."""
    counted = (classes >= 0).to(values.dtype)
    return per_sample(values * counted) / per_sample(counted).clamp(min=1)


def pixels_said(leaves: Leaves, targets: Targets) -> Tensor:
    """The mean over pixels of the logit of the labelled, else of the predicted class."""
    logits, classes = _pixels(leaves, targets)
    return _pixel_mean(logits.gather(1, classes.clamp(min=0)[:, None])[:, 0], classes)


def pixels_loss(leaves: Leaves, targets: Targets) -> Tensor:
    """Cross-entropy, the mean over pixels that have a class."""
    logits, classes = _pixels(leaves, targets)
    terms = functional.cross_entropy(logits, classes.clamp(min=0), reduction="none")
    return _pixel_mean(terms, classes)


def spread_said(reference: Reference | None, pick: Pick | None = None) -> Objective:
    """What is said without labels: of every leaf, or of the one that `pick` chooses."""

    def said(leaves: Leaves, targets: Targets) -> Tensor:
        if reference is None:
            raise ModelError(
                "what the network says without labels needs the mean answer over the images; give a reference"
            )
        chosen = reference.varying if pick is None else (pick(leaves)[0],)
        names = [name for name in chosen if name in reference.varying]
        if not names:
            raise ModelError(
                f"no leaf of the answer tells one image from another: {in_words(leaves)} never changes over "
                f"{reference.samples} images; give more images, trained weights, or says=..."
            )
        return torch.stack([_deviation(reference, name, leaves) for name in names]).sum(0)

    return said


def places_said(reference: Reference | None) -> Objective:
    """What a detector says without labels: as above, each place by how sure the scores are there.

    Each leaf is over what it says of the batch on the whole, which weighs leaves alike. Without a leaf called scores it
    is what is said of every leaf.
    """
    plain = spread_said(reference)
    if reference is None:
        return plain

    def said(leaves: Leaves, targets: Targets) -> Tensor:
        varying = {name: leaves[name] for name in reference.varying if name in leaves}
        if not score_leaves(varying):
            return plain(leaves, targets)
        ends = {name: (entry.low, entry.high) for name, entry in reference.leaves.items()}
        constants = {name: leaf.detach() for name, leaf in varying.items()}
        sure = weights(constants, ends)
        sure |= {name: probabilities(finite(constants[name]), *ends[name]) + FLOOR for name in score_leaves(varying)}
        terms = []
        for name, leaf in varying.items():
            entry = reference.entry(name, leaves)
            values = finite(leaf)
            from_mean = (values - entry.mean.to(values)).detach()
            weight = sure.get(name, torch.ones_like(values))  # a leaf at no scores' places counts the same everywhere
            scale = per_sample(weight * from_mean.square()).mean()
            terms.append(per_sample(values * weight * from_mean) / scale.clamp(min=1e-30))
        return torch.stack(terms).sum(0)

    return said


def _deviation(reference: Reference, name: str, leaves: Leaves) -> Tensor:
    """[N]: <y, stop_gradient(y - m)> / s of one leaf."""
    if name not in leaves:
        raise ModelError(
            f"the answer has no leaf {name!r}, there are {in_words(leaves)}; the mean answer is another network's"
        )
    entry = reference.entry(name, leaves)
    values = finite(leaves[name])
    return per_sample(values * (values - entry.mean.to(values)).detach()) / entry.spread


def minus(said: Objective) -> Objective:
    """A loss where no label says what is right: less of what is said. A start for relevance; tuning goes elsewhere."""
    return lambda leaves, targets: -said(leaves, targets)


def absolute_loss(said: Objective) -> Objective:
    """The mean absolute difference from targets of the same shape (finite ones); without any, less of what is said."""

    def loss(leaves: Leaves, targets: Targets) -> Tensor:
        if not _are_labels(targets):
            return -said(leaves, targets)
        leaf = real(leaf_like(leaves, targets)[1])
        wanted = targets.to(leaf).reshape(leaf.shape)
        known = wanted.isfinite()
        terms = (leaf - torch.where(known, wanted, leaf.detach())).abs()
        return per_sample(terms) / per_sample(known.to(leaf.dtype)).clamp(min=1)

    return loss
