"""The repaired network and the one that recovery taught in, the better of both out, judged on images apart.

Right answers decide, or the task's own quality; of equals, the lower cross-entropy, or distance to the dense network;
of equals, the repaired one. Knows neither where the images come from nor what else they served: that is the caller's
to say.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, fx, nn
from torch.nn import functional

from ..accuracy import LabelledBatches, evaluating, logits_of
from ..errors import DataError
from ..graph.interface import answers, output_names
from ..placement import device_of, inputs_to
from ..tasks import Task, relative_error
from ..tensors import Inputs

Candidate = Literal["repaired", "tuned"]


@dataclass(frozen=True, slots=True)
class Judged:
    """Quality and loss of one network over `n` images; a loss that is not finite counts as the worst.

    `value` is the share of right answers, `correct` their number, and `loss` the mean cross-entropy; of another task
    the value is its metric's, `correct` is -1, and the loss the mean distance to the dense network.
    """

    value: float
    n: int
    loss: float
    correct: int = -1
    metric: str = "top-1"


@dataclass(frozen=True, slots=True)
class Choice:
    """Which of the two ships; `source` says in words which images were looked at."""

    shipped: Candidate
    source: str
    repaired: Judged
    tuned: Judged


def choose(
    repaired: nn.Module,
    tuned: nn.Module,
    batches: LabelledBatches,
    *,
    source: str,
    task: Task | None = None,
    dense: fx.GraphModule | None = None,
) -> Choice:
    """The better of the two on `batches`, which are gone through more than once: by quality, of equal ones by loss.

    With a `task`, both are traced graphs and so is `dense`, whose answers theirs are compared with. Raises DataError
    where there is no image to judge on.
    """
    if task is None:
        judged_repaired, judged_tuned = judge(repaired, batches), judge(tuned, batches)
    else:
        judged_repaired = _judged(repaired, dense, batches, task)
        judged_tuned = _judged(tuned, dense, batches, task)
    shipped: Candidate = "tuned" if _key(judged_tuned) > _key(judged_repaired) else "repaired"
    return Choice(shipped, source, judged_repaired, judged_tuned)


@torch.no_grad()
def judge(network: nn.Module, batches: LabelledBatches) -> Judged:
    """A classifier's right answers and mean cross-entropy over inputs [N, ...] and labels [N], in evaluation mode.

    Raises DataError where there is no image.
    """
    correct, loss, seen = 0, 0.0, 0
    device = device_of(network)
    with evaluating(network):
        for images, labels in batches:
            logits = logits_of(network, inputs_to(images, device)).float().cpu()  # [N, classes]
            truths = labels.cpu().long()
            correct += int((logits.argmax(1) == truths).sum())
            loss += float(functional.cross_entropy(logits, truths, reduction="sum"))
            seen += len(labels)
    if not seen:
        raise DataError("there are no images to tell the repaired from the tuned network; give more images")
    return Judged(correct / seen, seen, _bounded(loss / seen), correct)


@torch.no_grad()
def _judged(network: nn.Module, dense: fx.GraphModule | None, batches: LabelledBatches, task: Task) -> Judged:
    """The task's quality of a graph's answers over the batches, and their mean distance to the dense graph's."""
    assert isinstance(network, fx.GraphModule)
    assert dense is not None
    names, device = output_names(network), device_of(network)

    def leaves_of(graph: fx.GraphModule, images: Inputs) -> dict[str, Tensor]:
        leaves = (leaf.cpu() for leaf in answers(graph, inputs_to(images, device)))
        return dict(zip(names, leaves, strict=True))

    with evaluating(network):
        quality = task.quality(lambda images: leaves_of(network, images), batches)
        pairs = ((leaves_of(network, images), leaves_of(dense, images)) for images, _ in batches)
        distance = relative_error(task, pairs)
    return Judged(quality.value, quality.n, _bounded(distance), metric=quality.metric)


def _bounded(loss: float) -> float:
    return float(torch.nan_to_num(torch.tensor(loss), nan=_WORST, posinf=_WORST))


_WORST = float(torch.finfo(torch.float32).max)  # a finite loss, which JSON can hold


def _key(judged: Judged) -> tuple[float, float]:
    """Larger is better."""
    return judged.value, -judged.loss


def text_of(choice: Choice) -> str:
    """The choice in a sentence or two, with what decided it."""
    rejected = "repaired" if choice.shipped == "tuned" else "tuned"
    better: Judged = getattr(choice, choice.shipped)
    worse: Judged = getattr(choice, rejected)
    if better.correct < 0:
        return (
            f"The {choice.shipped} network ships: on {choice.source} its {better.metric} is {better.value:.4f}, the "
            f"{rejected} one's {worse.value:.4f}; distances to the dense network {better.loss:.3g} and "
            f"{worse.loss:.3g}."
        )
    beginning = (
        f"The {choice.shipped} network ships: of {choice.source} it is right on {better.correct}, "
        f"the {rejected} one on "
    )
    if better.correct != worse.correct:
        return f"{beginning}{worse.correct}."
    return f"{beginning}as many; cross-entropy decides, {better.loss:.3g} against {worse.loss:.3g}."
