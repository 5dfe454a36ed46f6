"""Which task a network has, read off one batch: its leaves, its targets and the shape of its images; and why, in words.

A guess is told as one: the reason ends in how to say otherwise.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import ModelError
from .objectives import IGNORED
from .record import Leaves, Targets, float_leaves, in_words, is_labelled, leaf_like

SCALES = (1, 2, 4)  # of an answered image to the one that went in
UNIT = 1e-3  # how far from 1 the length of a normalised row may be, in half precision too


@dataclass(frozen=True, slots=True)
class _Guess:
    """A task's name, what speaks for it, and in words that end in a colon or semicolon what may be otherwise."""

    name: str
    because: str
    doubt: str = ""


def choose_task(leaves: Leaves, targets: Targets, image_shape: Sequence[int]) -> tuple[str, str]:
    """A task's name and why it was taken; `image_shape` is that of the first input, its samples first.

    Raises ModelError where no leaf is of real numbers.
    """
    reals = float_leaves(leaves)
    if not reals:
        raise ModelError(f"the network answers with {in_words(leaves)}, expected a leaf of real numbers")
    if not is_labelled(targets):
        guess = _unlabelled(reals, image_shape)
    elif not isinstance(targets, Tensor):
        return "detection", "taken as detection: targets are boxes"
    else:
        guess = _labelled(reals, targets, image_shape)
    return guess.name, f"taken as {guess.name}: {guess.because}; {guess.doubt}say task=... otherwise"


def _labelled(leaves: dict[str, Tensor], targets: Tensor, image_shape: Sequence[int]) -> _Guess:
    is_whole = not targets.is_floating_point()
    if is_whole and targets.dim() == 1:
        return _of_indices(leaves, targets)
    size = list(targets.shape)
    if targets.dim() == 2 and _are_flags(targets) and _has_leaf(leaves, targets.shape):
        return _Guess("multi-label", f"one output {size} and labels of 0 and 1 of that shape")
    if is_whole:
        answer = next((leaf for leaf in leaves.values() if _are_masks(targets, leaf)), None)
        if answer is not None:
            return _Guess("segmentation", f"one output {list(answer.shape)} and masks {size}")
    try:
        _, leaf = leaf_like(leaves, targets)
    except ModelError:
        because = f"targets {size} fit no output, there are {in_words(leaves)}"
        return _Guess("any", because, "labels are not used; ")
    if _is_image(leaf, image_shape):
        return _Guess("image-to-image", f"outputs and targets are images {list(leaf.shape)}")
    return _Guess("regression", f"targets {size} of the shape of an output")


def _of_indices(leaves: dict[str, Tensor], labels: Tensor) -> _Guess:
    """Of one whole number a sample: a class, an identity, or a flag."""
    heads = _heads(leaves)
    if len(heads) != 1:
        open_question = "of which output is open" if heads else "which no output fits"
        because = f"labels are one whole number a sample, {open_question}: {in_words(leaves)}"
        return _Guess("any", because, "labels are not used; ")
    (leaf,) = heads.values()
    size, highest = list(leaf.shape), int(labels.max())
    has_one_channel = leaf.shape[1] == 1
    if has_one_channel and highest <= 1:
        return _Guess("multi-label", f"one output {size} and labels that are 0 or 1")
    if has_one_channel:
        return _Guess("regression", f"one output {size} and labels up to {highest}")
    if _are_unit_rows(leaf):
        return _Guess("embedding", f"one output {size}, rows of length one, and labels that are identities")
    if highest >= leaf.shape[1]:
        because = f"one output {size} and labels up to {highest}, which are no classes of it but identities"
        return _Guess("embedding", because)
    return _Guess("classification", f"one output {size} and labels that are whole numbers")


def _unlabelled(leaves: dict[str, Tensor], image_shape: Sequence[int]) -> _Guess:
    heads = _heads(leaves)
    first = next(iter(leaves.values()))
    if len(leaves) == 1:
        return _unlabelled_leaf(first, image_shape)
    if "logits" in heads:
        return _Guess("classification", f"an output 'logits' {list(heads['logits'].shape)}, no labels")
    shapes = {leaf.shape for leaf in leaves.values()}
    if first.dim() == 4 and len(shapes) == 1:
        return _unlabelled_leaf(first, image_shape)  # the others are auxiliary ones
    return _Guess("any", f"several outputs, {in_words(leaves)}, and no labels")


def _unlabelled_leaf(leaf: Tensor, image_shape: Sequence[int]) -> _Guess:
    size = list(leaf.shape)
    if leaf.dim() == 2:
        return _unlabelled_rows(leaf)
    if leaf.dim() < 2:
        return _Guess("regression", f"one output {size}, no labels")
    if _is_image(leaf, image_shape):
        return _Guess("image-to-image", f"one output {size} for images {list(image_shape)}, no labels")
    if leaf.dim() == 4 and _is_in_proportion(leaf, image_shape):
        because = f"one output {size} in proportion to the images, no labels"
        if leaf.shape[1] in (1, 3):
            return _Guess("regression", because)
        return _Guess("segmentation", because, "it may be a map of values: ")
    return _Guess("any", f"one output {size}, no labels", "where it holds boxes, task='detection' with decode=...; ")


def _unlabelled_rows(leaf: Tensor) -> _Guess:
    """Of one leaf [N, C]."""
    size = list(leaf.shape)
    if leaf.shape[1] <= 1:
        return _Guess("regression", f"one output {size}, no labels")
    if _are_unit_rows(leaf):
        return _Guess("embedding", f"one output {size} with rows of length one, no labels")
    return _Guess("classification", f"one output {size}, no labels", "it may be an embedding or a vector: ")


def _heads(leaves: dict[str, Tensor]) -> dict[str, Tensor]:
    """The leaves [N, C]; of several the one called logits alone."""
    heads = {name: leaf for name, leaf in leaves.items() if leaf.dim() == 2}
    if "logits" in heads:
        return {"logits": heads["logits"]}
    return heads


def _has_leaf(leaves: dict[str, Tensor], shape: Sequence[int]) -> bool:
    return any(leaf.shape == shape for leaf in leaves.values())


def _are_flags(targets: Tensor) -> bool:
    values = targets.double()
    return bool(((values == 0) | (values == 1) | (values == -1)).all())


def _are_masks(targets: Tensor, leaf: Tensor) -> bool:
    """Whether whole numbers [N, h, w] or [N, 1, h, w] can be classes of a leaf [N, C, h', w']."""
    is_flat = targets.dim() == leaf.dim() - 1
    has_one_channel = targets.dim() == leaf.dim() and targets.shape[1] == 1
    if not (is_flat or has_one_channel) or not _is_in_proportion(leaf, targets.shape):
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
    if len(image_shape) != 4:
        return False
    _, channels, height, width = image_shape
    sizes = [(channels, scale * height, scale * width) for scale in SCALES]
    return channels in (1, 3) and leaf.shape[1:] in sizes
