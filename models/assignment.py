"""Boxes in, what each cell of a detector is to answer out, and the loss of what it does answer (Tian et al. 2019).

A box belongs to the level whose cells suit its shorter side, there to the cells whose centres lie in it and near its
own centre. Knows no network; boxes of one image must not overlap, so that no cell lies in two.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

COARSE_PX = 13.0  # shorter sides from here on are the coarser level's
NEAR_CELLS = 1.5  # so far from a box's centre along both axes
FOCUS = 2.0  # focal loss (Lin et al. 2017): its power,
PRESENT_SHARE = 0.25  # and the weight of classes that are there


class Wanted(NamedTuple):
    """For cells of all levels, the finer level's first: `labels` int64 [N, cells], -1 where there is nothing,
    `distances` [N, cells, 4] to left, top, right and bottom in pixels."""

    labels: Tensor
    distances: Tensor


def wanted(boxes: Sequence[Tensor], labels: Sequence[Tensor], strides: Sequence[int], side_px: int) -> Wanted:
    """Boxes [k, 4] and labels [k] of each image on the cells of square images."""
    centres, cell_strides = _cells(strides, side_px)
    images = [
        _of_image(image_boxes, image_labels, centres, cell_strides)
        for image_boxes, image_labels in zip(boxes, labels, strict=True)
    ]
    return Wanted(*(torch.stack(part) for part in zip(*images, strict=True)))


def _cells(strides: Sequence[int], side_px: int) -> tuple[Tensor, Tensor]:
    """Centres [cells, 2], x then y, and strides [cells]."""
    centres, cell_strides = [], []
    for stride in strides:
        places = (torch.arange(side_px // stride) + 0.5) * stride
        rows, columns = torch.meshgrid(places, places, indexing="ij")
        centres.append(torch.stack([columns, rows], dim=-1).flatten(0, 1))
        cell_strides.append(torch.full((rows.numel(),), float(stride)))
    return torch.cat(centres), torch.cat(cell_strides)


def _of_image(boxes: Tensor, labels: Tensor, centres: Tensor, strides: Tensor) -> tuple[Tensor, Tensor]:
    low, high = boxes[:, :2], boxes[:, 2:]
    is_coarse = (high - low).amin(1) >= COARSE_PX  # [k]
    is_level = (strides[:, None] > strides.min()) == is_coarse  # [cells, k]
    distances = torch.cat([centres[:, None] - low, high - centres[:, None]], dim=-1)  # [cells, k, 4]
    from_centre = (centres[:, None] - (low + high) / 2).abs().amax(-1)
    is_wanted = is_level & (distances.amin(-1) > 0) & (from_centre < NEAR_CELLS * strides[:, None])
    box = is_wanted.float().argmax(1)  # the only one, where there is one
    return labels[box].where(is_wanted.any(1), -1), distances[torch.arange(len(box)), box]


def loss(answer: Mapping[str, Sequence[Tensor]], target: Wanted) -> Tensor:
    """Focal loss of the classes, 1 - GIoU of the boxes weighted by centerness, cross-entropy of the centerness."""
    scores, distances, centerness = (_by_cell(answer[name]) for name in ("scores", "boxes", "centerness"))
    is_object = target.labels >= 0
    there, detected = target.distances[is_object], distances[is_object]  # [objects' cells, 4]
    central = _centerness(there)
    boxes = ((1 - _giou(detected, there)) * central).sum() / central.sum()
    centres = F.binary_cross_entropy_with_logits(centerness[is_object][:, 0], central)
    classes = F.one_hot(target.labels.clamp(min=0), scores.shape[-1]) * is_object[..., None]
    return _focal(scores, classes.float()) / is_object.sum() + boxes + centres


def _by_cell(levels: Sequence[Tensor]) -> Tensor:
    """[N, channels, h, w] of each level to [N, cells, channels]."""
    return torch.cat([level.flatten(2).transpose(1, 2) for level in levels], dim=1)


def _centerness(distances: Tensor) -> Tensor:
    """1 in a box's centre, towards 0 at its rim."""
    pairs = distances.unflatten(-1, (2, 2))  # [cells, (left, top) or (right, bottom), axis]
    return (pairs.amin(1) / pairs.amax(1)).prod(-1).sqrt()


def _giou(first: Tensor, second: Tensor) -> Tensor:
    """Generalised intersection over union of boxes about the same centres, given by their distances [cells, 4]."""
    shared, hull = (_area(pick(first, second)) for pick in (torch.minimum, torch.maximum))
    union = _area(first) + _area(second) - shared
    return shared / union - (hull - union) / hull


def _area(distances: Tensor) -> Tensor:
    return (distances[:, :2] + distances[:, 2:]).prod(-1)


def _focal(logits: Tensor, targets: Tensor) -> Tensor:
    """Summed over everything; a sure answer counts next to nothing."""
    entropy = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
    wrong = 1 - torch.exp(-entropy)  # the probability of what is not so
    share = torch.where(targets > 0, PRESENT_SHARE, 1 - PRESENT_SHARE)
    return (share * wrong**FOCUS * entropy).sum()
