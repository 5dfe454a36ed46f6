"""The network that learns, one step at a time, at a given rate, on another view of the images in each step."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from ..distributed import rank, sum_tensor, world
from ..graph.training import set_training
from ..inputs.images import Batch, Batches
from ..steering.lessons import generator_at
from ..tensors import Inputs, count, mapped
from .augmentation import augmented
from .optimiser import MuonOrAdam
from .options import Setting
from .teaching import Teaching

WARM_UP = 0.05  # of all steps
MAX_GRADIENT_NORM = 5.0  # the first steps of a freshly repaired network can be far larger than later ones

State = dict[str, Tensor]


class Pupil:
    """A network in training with one setting after another; `tensors` are all that changes, by name."""

    def __init__(self, network: fx.GraphModule, teaching: Teaching, lessons: Batches, seed: int) -> None:
        self.network, self.teaching, self.lessons, self.seed = network, teaching, lessons, seed
        self.tensors: Mapping[str, Tensor] = {
            name: tensor for name, tensor in network.state_dict(keep_vars=True).items() if isinstance(tensor, Tensor)
        }

    def begin(self, setting: Setting) -> MuonOrAdam:
        """A fresh optimiser, the normalisations as the setting says."""
        set_training(self.teaching.pupil, setting.norms == "batch")
        return MuonOrAdam(self._parameters(), setting.rate)

    def _parameters(self) -> list[nn.Parameter]:
        return [parameter for parameter in self.network.parameters() if parameter.requires_grad]

    def learn(self, batch: Batch, step: int, optimiser: torch.optim.Optimizer, rate: float) -> None:
        """One step; the view of the images follows from its number."""
        inputs, targets = batch
        if self.teaching.allows_views(targets):
            inputs = augmented(inputs, generator_at(self.seed, step))
        for group in optimiser.param_groups:
            group["lr"] = rate
        optimiser.zero_grad(set_to_none=True)
        self._follow(inputs, targets)
        nn.utils.clip_grad_norm_(self._parameters(), MAX_GRADIENT_NORM)
        optimiser.step()

    def _follow(self, inputs: Inputs, targets: Any) -> None:
        """The gradient of the batch's mean loss, of which each rank works out the part of its own images.

        Rank 1 of 2 has images 1, 3, ... of the view that all of them make. Statistics of a batch that normalisations
        move are the mean of the ranks'.
        """
        ranks = world()
        share = slice(rank(), None, ranks)
        images = mapped(lambda tensor: tensor[share], inputs)
        if count(images):
            their_targets = None if targets is None else targets[share]
            loss = self.teaching.loss(images, their_targets) * (count(images) / count(inputs))
            loss.backward()  # type: ignore[no-untyped-call]
        if ranks > 1:
            self._join(ranks)

    @torch.no_grad()
    def _join(self, ranks: int) -> None:
        """Sums gradients over all ranks, and takes the mean of the tensors that are no parameters."""
        gradients = [
            torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            for parameter in self._parameters()
        ]
        buffers = [buffer for buffer in self.network.buffers() if buffer.is_floating_point()]
        addends = [*gradients, *(buffer / ranks for buffer in buffers)]
        flat = torch.cat([addend.flatten() for addend in addends])
        sum_tensor(flat)  # all in one message
        sums = iter(torch.split(flat, [addend.numel() for addend in addends]))
        for parameter, gradient in zip(self._parameters(), gradients, strict=True):
            parameter.grad = next(sums).view_as(gradient)
        for buffer in buffers:
            buffer.copy_(next(sums).view_as(buffer))

    def state(self) -> State:
        """A copy of the tensors as they are."""
        return {name: tensor.detach().clone() for name, tensor in self.tensors.items()}

    @torch.no_grad()
    def restore(self, state: Mapping[str, Any]) -> None:
        """The tensors as they were; whoever holds them sees it."""
        for name, tensor in self.tensors.items():
            tensor.copy_(state[name])


def rate_factor(way: float) -> float:
    """Of the highest rate, when that share of the steps is done: up in a line, then half a cosine down to 0."""
    if way < WARM_UP:
        return min(1.0, (way + WARM_UP / 10) / WARM_UP)
    return 0.5 * (1 + math.cos(math.pi * (way - WARM_UP) / (1 - WARM_UP)))
