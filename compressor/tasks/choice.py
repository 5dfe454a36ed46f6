"""Which task a network has, read off one batch: its leaves, its targets and the shape of its images; and why, in words.

A guess is told as one: the reason ends in how to say otherwise.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import ModelError
from .objectives import IGNORED
from .record import Leaves, Targets, float_leaves, in_words, is_labelled, leaf_like

SCALES = (1, 2, 4)  # of an answered image to the one that went in
UNIT = 1e-3  # how far from 1 the length of a normalised row may be, in half precision too


def choose_task(leaves: Leaves, targets: Targets, image_shape: Sequence[int]) -> tuple[str, str]:
    """A task's name and why it was taken; `image_shape` is that of the first input, its samples first.

    Raises ModelError where no leaf is of real numbers.
    """
    reals = float_leaves(leaves)
    if not reals:
        raise ModelError(f"the network answers with {in_words(leaves)}, expected a leaf of real numbers")
    if not is_labelled(targets):
        name, because, doubt = _unlabelled(reals, image_shape)
    elif not isinstance(targets, Tensor):
        name, because, doubt = "detection", "targets are boxes", ""
    else:
        name, because, doubt = _labelled(reals, targets, image_shape)
    otherwise = f"; {doubt}say task=... otherwise" if doubt or name != "detection" else ""
    return name, f"taken as {name}: {because}{otherwise}"


def _labelled(leaves: dict[str, Tensor], targets: Tensor, image_shape: Sequence[int]) -> tuple[str, str, str]:
    whole = not targets.is_floating_point()
    if whole and targets.dim() == 1:
        return _of_indices(leaves, targets)
    if targets.dim() == 2 and _are_flags(targets):
        for leaf in leaves.values():
            if leaf.shape == targets.shape:
                return "multi-label", f"one output {list(leaf.shape)} and labels of 0 and 1 of that shape", ""
    if whole and targets.dim() >= 3:
        for leaf in leaves.values():
            if leaf.dim() >= 4 and _are_masks(targets, leaf):
                return "segmentation", f"one output {list(leaf.shape)} and masks {list(targets.shape)}", ""
    try:
        _, leaf = leaf_like(leaves, targets)
    except ModelError:
        because = f"targets {list(targets.shape)} fit no output, there are {in_words(leaves)}"
        return "any", because, "labels are not used; "
    if _is_image(leaf, image_shape):
        return "image-to-image", f"outputs and targets are images {list(leaf.shape)}", ""
    return "regression", f"targets {list(targets.shape)} of the shape of an output", ""


def _of_indices(leaves: dict[str, Tensor], labels: Tensor) -> tuple[str, str, str]:
    """Of one whole number a sample: a class, an identity, or a flag."""
    heads = _heads(leaves)
    if not heads:
        return (
            "any",
            f"labels are one whole number a sample, which no output fits: {in_words(leaves)}",
            "labels are not used; ",
        )
    if len(heads) > 1:
        return (
            "any",
            f"labels are one whole number a sample, of which output is open: {in_words(leaves)}",
            "labels are not used; ",
        )
    (leaf,) = heads.values()
    size, highest = list(leaf.shape), int(labels.max())
    if leaf.shape[1] == 1:
        if highest <= 1:
            return "multi-label", f"one output {size} and labels that are 0 or 1", ""
        return "regression", f"one output {size} and labels up to {highest}", ""
    if _are_unit_rows(leaf):
        return "embedding", f"one output {size}, rows of length one, and labels that are identities", ""
    if highest >= leaf.shape[1]:
        return (
            "embedding",
            f"one output {size} and labels up to {highest}, which are no classes of it but identities",
            "",
        )
    return "classification", f"one output {size} and labels that are whole numbers", ""


def _unlabelled(leaves: dict[str, Tensor], image_shape: Sequence[int]) -> tuple[str, str, str]:
    heads = _heads(leaves)
    maps = [leaf for leaf in leaves.values() if leaf.dim() == 4]
    if len(leaves) > 1:
        if len(heads) == 1 and "logits" in heads:
            return "classification", f"an output 'logits' {list(heads['logits'].shape)}, no labels", ""
        if len(maps) == len(leaves) and len({leaf.shape for leaf in maps}) == 1:
            leaves = dict([next(iter(leaves.items()))])  # an answer and its auxiliary one
        else:
            return "any", f"several outputs, {in_words(leaves)}, and no labels", ""
    (leaf,) = leaves.values()
    size = list(leaf.shape)
    if leaf.dim() == 2 and leaf.shape[1] > 1:
        if _are_unit_rows(leaf):
            return "embedding", f"one output {size} with rows of length one, no labels", ""
        return "classification", f"one output {size}, no labels", "it may be an embedding or a vector: "
    if leaf.dim() <= 2:
        return "regression", f"one output {size}, no labels", ""
    if _is_image(leaf, image_shape):
        return "image-to-image", f"one output {size} for images {list(image_shape)}, no labels", ""
    if leaf.dim() == 4 and leaf.shape[1] not in (1, 3) and _is_in_proportion(leaf, image_shape):
        return (
            "segmentation",
            f"one output {size} in proportion to the images, no labels",
            "it may be a map of values: ",
        )
    if leaf.dim() == 4 and _is_in_proportion(leaf, image_shape):
        return "regression", f"one output {size} in proportion to the images, no labels", ""
    return "any", f"one output {size}, no labels", "where it holds boxes, task='detection' with decode=...; "


def _heads(leaves: dict[str, Tensor]) -> dict[str, Tensor]:
    """The leaves [N, C]; of several the one called logits alone."""
    heads = {name: leaf for name, leaf in leaves.items() if leaf.dim() == 2}
    return {"logits": heads["logits"]} if "logits" in heads else heads


def _are_flags(targets: Tensor) -> bool:
    values = targets.double()
    return bool(((values == 0) | (values == 1) | (values == -1)).all())


def _are_masks(targets: Tensor, leaf: Tensor) -> bool:
    """Whether whole numbers [N, h, w] or [N, 1, h, w] can be classes of a leaf [N, C, h', w']."""
    is_flat = targets.dim() == leaf.dim() - 1 or (targets.dim() == leaf.dim() and targets.shape[1] == 1)
    if not is_flat or not _is_in_proportion(leaf, targets.shape):
        return False
    values = targets.long()
    classes = max(2, leaf.shape[1])  # one channel alone tells two classes
    return bool(((values < classes) | (values == IGNORED[0])).all())


def _are_unit_rows(leaf: Tensor) -> bool:
    return bool((torch.linalg.vector_norm(leaf.detach().double(), dim=1) - 1).abs().max() < UNIT)


def _is_in_proportion(leaf: Tensor, shape: Sequence[int]) -> bool:
    """Whether a map's height and width are to each other as those of a shape, but for rounding to whole pixels."""
    if len(shape) < 3 or leaf.dim() < 4:
        return False
    (height, width), (full_height, full_width) = leaf.shape[-2:], tuple(shape)[-2:]
    stride = full_height / height
    return abs(full_width / stride - width) <= 1


def _is_image(leaf: Tensor, image_shape: Sequence[int]) -> bool:
    """Whether a leaf is what went in, as often grey or RGB as that, once, twice or four times as large."""
    if leaf.dim() != 4 or len(image_shape) != 4 or leaf.shape[1] != image_shape[1] or leaf.shape[1] not in (1, 3):
        return False
    return any(list(leaf.shape[2:]) == [scale * side for side in image_shape[2:]] for scale in SCALES)
