"""Short training of a smaller graph on a few labelled images, taught by the dense one: weights change in place.

Cross-entropy plus distillation (Hinton et al., arXiv 1503.02531: temperature T, KL times T squared); a warm-up, then
a cosine to zero. Running statistics stay as they are. What a study compares with: the product trains in `recovery/`.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, fx, nn
from torch.nn import functional

from compressor.accuracy import evaluating, logits_of
from compressor.inputs.images import Batches
from compressor.placement import device_of, inputs_to, to_device
from compressor.recipe import Recipe

MAX_GRADIENT_NORM = 5.0  # a freshly pruned network's first steps can be far larger than any later one
TEMPERATURE = 4.0
WARM_UP = 0.1  # of all steps
WEIGHT_DECAY = 1e-4


def finetune(network: fx.GraphModule, teacher: fx.GraphModule, batches: Batches, recipe: Recipe) -> None:
    """Trains on batches of images [N, C, H, W] and labels [N]; a label of -1 is learned from the teacher alone.

    For the recipe's `finetune_epochs`, at its `learning_rate`; `distillation` is the teacher's share of the loss. The
    images come in another order in each epoch. The teacher lies on the network's device, and is asked once.
    """
    device = device_of(network)
    optimizer = _optimizer(network, recipe.learning_rate)
    rate = torch.optim.lr_scheduler.LambdaLR(optimizer, _schedule(len(batches) * recipe.finetune_epochs))
    answers = _answers(teacher, batches)  # [images, classes]
    with evaluating(network):
        for seed in range(recipe.seed, recipe.seed + recipe.finetune_epochs):
            taught = answers[batches.order(seed)].split(batches.batch_size)
            for (images, labels), logits in zip(batches.shuffled(seed), taught, strict=True):
                student = logits_of(network, inputs_to(images, device)).float()
                _descend(network, _loss(student, logits, to_device(labels, device), recipe.distillation), optimizer)
                rate.step()
    for parameter in network.parameters():
        parameter.grad = None


def _optimizer(network: nn.Module, learning_rate: float) -> torch.optim.Optimizer:
    """Gains and biases are not decayed."""
    trainable = [parameter for parameter in network.parameters() if parameter.requires_grad]
    weights = [parameter for parameter in trainable if parameter.dim() > 1]
    gains_and_biases = [parameter for parameter in trainable if parameter.dim() <= 1]
    groups = [{"params": weights, "weight_decay": WEIGHT_DECAY}, {"params": gains_and_biases, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=learning_rate)


def _schedule(steps: int) -> Callable[[int], float]:
    """The factor of the learning rate at each step: linear to 1, then half a cosine to 0."""
    rising = max(1, round(WARM_UP * steps))

    def factor(step: int) -> float:
        if step < rising:
            return (step + 1) / rising
        return 0.5 * (1 + math.cos(math.pi * (step - rising) / max(1, steps - rising)))

    return factor


@torch.no_grad()
def _answers(teacher: nn.Module, batches: Batches) -> Tensor:
    """Logits [images, classes], float32, in the images' order, where the teacher lies."""
    device = device_of(teacher)
    with evaluating(teacher):
        return torch.cat([logits_of(teacher, inputs_to(images, device)).float() for images, _ in batches])


def _loss(student: Tensor, teacher: Tensor, labels: Tensor, distillation: float) -> Tensor:
    """Cross-entropy over the images that have a label, and the teacher's share, over all of them; logits [N, classes].

    The share's gradients shrink with T squared, which the factor makes up for (Hinton et al., section 2).
    """
    labelled = (labels >= 0).sum().clamp(min=1)
    hard = functional.cross_entropy(student, labels.long(), ignore_index=-1, reduction="sum") / labelled
    soft = functional.kl_div(
        functional.log_softmax(student / TEMPERATURE, 1),
        functional.log_softmax(teacher.to(student.device) / TEMPERATURE, 1),
        log_target=True,
        reduction="batchmean",
    )
    return (1 - distillation) * hard + distillation * TEMPERATURE * TEMPERATURE * soft


def _descend(network: nn.Module, loss: Tensor, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    nn.utils.clip_grad_norm_(network.parameters(), MAX_GRADIENT_NORM)
    optimizer.step()
