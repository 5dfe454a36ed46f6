"""What one step follows: the distance of the answers, of the features in front of the head, and labels where asked.

Both networks see the same view of the same images. Distances are over their spreads, so that 1 is the mean answer's.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from ..distributed import from_first
from ..graph.interface import output_names
from ..inputs.images import Batches
from ..placement import device_of, inputs_to
from ..records import Slices
from ..tasks import Task, is_labelled
from ..tensors import Inputs, as_tuple
from .heads import Feature, features_of, watched
from .options import RecoveryOptions
from .pace import PLAIN, Pace, first_that_bears, paces_on

SPREAD_BATCHES = 4  # tell how far features lie from their mean
LEAST_SPREAD = 1e-12

Seen = tuple[dict[str, Tensor], tuple[Tensor, ...]]  # the leaves of an answer by name, and the head's inputs


class Teaching:
    """The dense network, the one that learns (`pupil` shares its tensors and trains by itself), and what joins them."""

    def __init__(
        self,
        dense: fx.GraphModule,
        network: fx.GraphModule,
        task: Task,
        lessons: Batches,
        *,
        slices: Slices | None,
        options: RecoveryOptions,
    ) -> None:
        self.task, self.options = task, options
        self.names, self.device = output_names(network), device_of(network)
        self.features: Sequence[Feature] = features_of(dense, network, slices) if options.features else ()
        self.teacher, self.pupil = watched(dense, self.features), watched(network, self.features)
        self.pace = PLAIN  # until a faster one is found, and where none is borne
        self.spreads = self._spreads(lessons)
        if options.precision == "auto":
            self.pace = self._fastest(next(iter(lessons))[0])

    @torch.no_grad()
    def _spreads(self, lessons: Batches) -> list[float]:
        """Of each feature: the squared distance from its mean over the first images."""
        if not self.features:
            return []
        by_batch = [self._taught(inputs)[1] for inputs, _ in itertools.islice(lessons, SPREAD_BATCHES)]
        by_feature = [torch.cat(batches).double() for batches in zip(*by_batch, strict=True)]
        return [max(_square(feature - feature.mean(0)), LEAST_SPREAD) for feature in by_feature]

    def _fastest(self, inputs: Inputs) -> Pace:
        """The fastest pace that both networks bear, by these images; all ranks take the first one's."""
        learned = [parameter for parameter in self.pupil.parameters() if parameter.requires_grad]
        with torch.no_grad():
            exact, answers = (self._seen(network, inputs)[0] for network in (self.teacher, self.pupil))
            to_learn = float(self.task.distance(answers, exact).mean())

        def noise_of(pace: Pace) -> float:
            """Of the dense network's answers, as a share of how far the pupil's are off."""
            self.pace = pace
            torch.autograd.grad(self.loss(inputs, None), learned, allow_unused=True)  # the way back may not bear it
            noisy, _ = self._taught(inputs)
            return float(self.task.distance(noisy, exact).mean()) / max(to_learn, LEAST_SPREAD)

        return from_first(first_that_bears(paces_on(self.device, inputs), noise_of))

    def loss(self, inputs: Inputs, targets: Any) -> Tensor:
        """The mean over a batch, on the network's device."""
        dense_answers, dense_features = self._taught(inputs)
        answers, features = self._seen(self.pupil, inputs)
        loss = self.task.distance(answers, dense_answers).mean()
        for feature, dense_feature, spread in zip(features, dense_features, self.spreads, strict=True):
            distance = (feature - dense_feature).square().flatten(1).sum(1).mean()
            loss = loss + self.options.features * distance / spread
        if self._follows(targets):
            share = self.options.labels
            loss = (1 - share) * loss + share * self.task.loss(answers, targets).mean()
        return loss

    def _follows(self, targets: Any) -> bool:
        """Whether labels are asked for, and there."""
        return bool(self.options.labels) and self.task.learns and is_labelled(targets)

    def allows_views(self, targets: Any) -> bool:
        """Whether an image may be moved: a class stays, but labels of places that are followed would lie elsewhere."""
        return not self._follows(targets) or _are_classes(targets)

    def _seen(self, network: fx.GraphModule, inputs: Inputs) -> Seen:
        """What one of the two networks makes of the images, computed at this training's pace."""
        with self.pace.arithmetic(self.device):
            answers, features = network(*as_tuple(self.pace.laid_out(inputs_to(inputs, self.device))))
        leaves = dict(zip(self.names, map(_exact, answers), strict=True))
        return leaves, tuple(map(_exact, features))

    @torch.no_grad()
    def _taught(self, inputs: Inputs) -> Seen:
        """What the dense network makes of them, of its features the channels that are left."""
        answers, dense_inputs = self._seen(self.teacher, inputs)
        pairs = zip(self.features, dense_inputs, strict=True)
        return answers, tuple(feature.of_dense(dense_input) for feature, dense_input in pairs)


def _exact(values: Tensor) -> Tensor:
    """In float32 what was computed in less."""
    return values.float() if values.dtype is torch.bfloat16 else values


def _square(values: Tensor) -> float:
    """[N, ...]: the mean over samples of the sum over everything that one has."""
    return float(values.square().flatten(1).sum(1).mean())


def _are_classes(targets: Any) -> bool:
    return isinstance(targets, Tensor) and targets.dim() == 1 and not targets.is_floating_point()
