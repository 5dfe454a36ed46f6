"""The network that learns, one step at a time: Adam at a given rate, on another view of the images in each step."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from ..graph.training import set_training
from ..inputs.images import Batch, Batches
from .augmentation import augmented
from .lessons import generator_at
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

    def begin(self, setting: Setting) -> torch.optim.Adam:
        """A fresh optimiser, the normalisations as the setting says."""
        set_training(self.teaching.pupil, setting.norms == "batch")
        return torch.optim.Adam(self._parameters(), lr=setting.rate)

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
        loss = self.teaching.loss(inputs, targets)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(self._parameters(), MAX_GRADIENT_NORM)
        optimiser.step()

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
