"""The repaired and the tuned network in, the better of the two out, judged on labelled images.

Right answers decide; of equally many, the lower cross-entropy; of equals, the repaired one. Knows neither where the
images come from nor what else they served: that is the caller's to say.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn
from torch.nn import functional

from ..accuracy import LabelledBatches, evaluating, logits_of
from ..errors import DataError
from ..placement import device_of, inputs_to

Candidate = Literal["repaired", "tuned"]


@dataclass(frozen=True, slots=True)
class Judged:
    """Right answers of `n` images and mean cross-entropy of one network; what is not finite counts as the worst."""

    correct: int
    n: int
    loss: float


@dataclass(frozen=True, slots=True)
class Choice:
    """Which of the two ships; `source` says in words which images were looked at."""

    shipped: Candidate
    source: str
    repaired: Judged
    tuned: Judged


def choose(repaired: nn.Module, tuned: nn.Module, batches: LabelledBatches, *, source: str) -> Choice:
    """Iterates over `batches` twice; raises DataError where there is no image to judge on."""
    judged_repaired, judged_tuned = judge(repaired, batches), judge(tuned, batches)
    shipped: Candidate = "tuned" if _key(judged_tuned) > _key(judged_repaired) else "repaired"
    return Choice(shipped, source, judged_repaired, judged_tuned)


@torch.no_grad()
def judge(network: nn.Module, batches: LabelledBatches) -> Judged:
    """In evaluation mode, over [N, C, H, W] images and [N] labels. Raises DataError where there is no image."""
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
    mean = torch.tensor(loss / seen)
    return Judged(correct, seen, float(torch.nan_to_num(mean, nan=_WORST, posinf=_WORST)))


_WORST = float(torch.finfo(torch.float32).max)  # a finite loss, which JSON can hold


def _key(judged: Judged) -> tuple[int, float]:
    """Larger is better."""
    return judged.correct, -judged.loss


def text_of(choice: Choice) -> str:
    """The choice in a sentence or two, with what decided it."""
    rejected = "repaired" if choice.shipped == "tuned" else "tuned"
    better: Judged = getattr(choice, choice.shipped)
    worse: Judged = getattr(choice, rejected)
    beginning = (
        f"The {choice.shipped} network ships: of {choice.source} it is right on {better.correct}, "
        f"the {rejected} one on "
    )
    if better.correct != worse.correct:
        return f"{beginning}{worse.correct}."
    return f"{beginning}as many; cross-entropy decides, {better.loss:.3g} against {worse.loss:.3g}."
