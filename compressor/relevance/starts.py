"""What is propagated back from a network's answer: its tensors and the targets in, a seed for each of them out.

For a classifier the seed is 1 at a class, its logit, or the cross-entropy's gradient; for any other task it is the
gradient of what the task says, or of its loss, at the answer. Knows no criterion and no rule.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx
from torch.nn import functional

from ..criteria import Start
from ..errors import ModelError
from ..graph.interface import output_names
from ..tasks import Targets, Task
from ..tensors import Inputs, as_tuple

Seeds = tuple[Tensor | None, ...]


@dataclass(frozen=True, slots=True)
class Objective:
    """What a task makes of the answer `names` [outputs]; without a task, the answer is one [N, classes]."""

    task: Task | None = None
    names: tuple[str, ...] = ()

    @property
    def classifies(self) -> bool:
        """Whether relevance starts at a class."""
        return self.task is None or self.task.classifies

    def seeds(self, answer: Sequence[Tensor], targets: Targets, start: Start) -> Seeds:
        """One for each tensor of the answer, of its shape; None for one that the start does not depend on.

        `targets` are class indices [N] of a classifier (see `targets_of`), else whatever the task's own are. Raises
        ModelError where a classifier does not answer with one [N, classes], or the start depends on no output.
        """
        if self.classifies:
            logits = require_logits(answer)
            assert isinstance(targets, Tensor)
            return (seed(logits, targets, start),)
        return self._by_gradient(answer, targets, start)

    def _by_gradient(self, answer: Sequence[Tensor], targets: Targets, start: Start) -> Seeds:
        assert self.task is not None
        with torch.enable_grad():
            leaves = [leaf.detach().requires_grad_(leaf.is_floating_point()) for leaf in answer]
            named = dict(zip(self.names, leaves, strict=True))
            start_of = self.task.loss if start == "loss" else self.task.says
            origin = start_of(named, targets)
            if not origin.requires_grad:
                raise ModelError(
                    f"what the task '{self.task.name}' starts relevance from depends on no output of the network "
                    f"({', '.join(self.names)}); its `says` must be differentiable"
                )
            differentiable = [leaf for leaf in leaves if leaf.requires_grad]
            torch.autograd.backward(origin.sum(), inputs=differentiable)

        seeds = [leaf.grad for leaf in leaves]
        if start == "logit":
            seeds = [None if leaf.grad is None else leaf.grad * leaf.detach() for leaf in leaves]
        return tuple(seeds)


CLASSES = Objective()
"""The objective of a classifier."""


def objective_of(graph: fx.GraphModule, task: Task | None) -> Objective:
    """The task's objective for a traced graph."""
    return Objective(task, output_names(graph))


def require_logits(answer: Sequence[Tensor]) -> Tensor:
    """[N, classes]. Raises ModelError where the answer is anything but that."""
    if len(answer) == 1 and answer[0].ndim == 2:
        return answer[0]
    shapes = ", ".join(str(list(tensor.shape)) for tensor in answer)
    raise ModelError(
        f"the network answers with {shapes}, a classifier's relevance starts at one [N, classes]; name the task "
        "(--task), or wrap the model so that its forward returns class scores"
    )


def seed(logits: Tensor, targets: Tensor, start: Start) -> Tensor:
    """What is propagated back from a classifier's output, [N, classes]."""
    logits = logits.detach()
    one_hot = functional.one_hot(targets.to(logits.device), logits.shape[1]).to(logits)
    if start == "loss":
        # gradient of the cross-entropy summed over samples: a mean's would be N times smaller in a batch of N
        return logits.softmax(1) - one_hot
    if start == "logit":
        return one_hot * logits
    return one_hot


@torch.no_grad()
def targets_of(
    graph: fx.GraphModule, images: Inputs, labels: Targets, *, predicted: bool, objective: Objective = CLASSES
) -> Targets:
    """[N] the class that relevance starts from: the label, or the predicted class where it is unknown (-1).

    With `predicted` it is always the predicted one. A forward pass is made only where one is needed. Targets of an
    objective that is no classifier's come back as they are.
    """
    if not objective.classifies:
        return labels
    assert isinstance(labels, Tensor)
    if not predicted and bool((labels >= 0).all()):
        return labels
    answer = graph(*as_tuple(images))
    predictions = require_logits(as_tuple(answer)).argmax(1)
    return predictions if predicted else torch.where(labels < 0, predictions, labels)
