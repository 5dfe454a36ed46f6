"""What one step follows: the distance of the answers, of the features in front of the head, and labels where asked.

Both networks see the same view of the same images. Distances are over their spreads, so that 1 is the mean answer's.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from ..graph.interface import output_names
from ..inputs.images import Batches
from ..placement import device_of, inputs_to
from ..records import Slices
from ..tasks import Task, is_labelled
from ..tensors import Inputs, as_tuple
from .heads import Feature, features_of, watched
from .options import RecoveryOptions

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
        self.spreads = self._spreads(lessons)

    @torch.no_grad()
    def _spreads(self, lessons: Batches) -> list[float]:
        """Of each feature: the squared distance from its mean over the first images."""
        if not self.features:
            return []
        by_batch = [self._taught(inputs)[1] for inputs, _ in itertools.islice(lessons, SPREAD_BATCHES)]
        by_feature = [torch.cat(batches).double() for batches in zip(*by_batch, strict=True)]
        return [max(_square(feature - feature.mean(0)), LEAST_SPREAD) for feature in by_feature]

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
        """What one of the two networks makes of the images."""
        answers, features = network(*as_tuple(inputs_to(inputs, self.device)))
        return dict(zip(self.names, answers, strict=True)), features

    @torch.no_grad()
    def _taught(self, inputs: Inputs) -> Seen:
        """What the dense network makes of them, of its features the channels that are left."""
        answers, dense_inputs = self._seen(self.teacher, inputs)
        pairs = zip(self.features, dense_inputs, strict=True)
        return answers, tuple(feature.of_dense(dense_input) for feature, dense_input in pairs)


def _square(values: Tensor) -> float:
    """[N, ...]: the mean over samples of the sum over everything that one has."""
    return float(values.square().flatten(1).sum(1).mean())


def _are_classes(targets: Any) -> bool:
    return isinstance(targets, Tensor) and targets.dim() == 1 and not targets.is_floating_point()
