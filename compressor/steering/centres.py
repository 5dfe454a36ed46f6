"""Where the relevance of an image lies: images and the dense network's decisions in, one place for each image out.

A selector's spots begin there (LRP; Bach et al. 2015), and then go where its own loss takes them.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, fx

from ..graph.interface import input_nodes, output_names
from ..relevance.lrp import prepare
from ..tasks import Leaves, Task, class_leaf
from .masks import side_of

Centres = Callable[[Tensor, Leaves], Tensor]

_LEAST_SPREAD = 0.01  # of the side: as far apart as places are taken to lie at least


def relevant_centres(graph: fx.GraphModule, task: Task | None) -> Centres | None:
    """The mean place [N, 2] as (y, x), in pixels, of what speaks for each image's predicted class.

    It takes images [N, C, H, W] and the dense network's answers to them; None for a task that predicts no class, and
    where there are other answers beside the classes.
    """
    if (task is not None and not task.classifies) or len(output_names(graph)) > 1:
        return None
    prepared = prepare(graph)
    image = input_nodes(graph)[0].name

    def centres(images: Tensor, dense: Leaves) -> Tensor:
        _, logits = class_leaf(dense)
        relevance = prepared(images, logits.argmax(1), [image])[image]
        return mean_place(relevance.sum(1).nan_to_num(0, 0, 0).clamp_min(0))

    return centres


def mean_place(weights: Tensor) -> Tensor:
    """[N, 2] as (y, x) of weights [N, H, W] that are not negative; the middle where all of them are 0."""
    weights = weights.double()
    height, width = weights.shape[1:]
    empty = weights.sum((1, 2), keepdim=True) == 0
    weights = torch.where(empty, torch.ones_like(weights), weights)
    total = weights.sum((1, 2))
    y = weights.sum(2) @ torch.arange(height, device=weights.device, dtype=weights.dtype)
    x = weights.sum(1) @ torch.arange(width, device=weights.device, dtype=weights.dtype)
    return torch.stack([y, x], 1) / total[:, None]


def distance_between(centres: Tensor, places: Tensor, shape: tuple[int, int]) -> Tensor:
    """The mean squared distance of centres [N, 2] from places [N, 2], over how those vary: the mean place is 1 off."""
    least = (_LEAST_SPREAD * side_of(shape)) ** 2
    spread = places.var(0, unbiased=False).clamp_min(least)
    return ((centres - places.to(centres)).square() / spread.to(centres)).mean()
