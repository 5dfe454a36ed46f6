"""Short training of a smaller network on a few labelled images, taught by the dense one: weights change in place.

Cross-entropy with label smoothing plus distillation (Hinton et al., arXiv 1503.02531: temperature T, KL times
T squared); a warm-up, then a cosine to zero. An error or an interrupt puts the old weights back.
Knows neither where images come from nor how the network got small.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Literal, Protocol, runtime_checkable

import torch
from torch import Tensor, fx, nn
from torch.nn import functional

from ..accuracy import LabelledBatches, evaluating, logits_of
from ..errors import DataError
from ..graph.interface import answers as graph_answers
from ..graph.interface import output_names
from ..graph.program import modes_kept
from ..graph.training import set_training
from ..placement import device_of, inputs_to, to_device
from ..tasks import Targets, Task, is_labelled
from ..tensors import Inputs, count, named_leaves
from .batchnorm import reestimate

MAX_GRADIENT_NORM = 5.0  # a freshly pruned network's first steps can be far larger than any later one
Augment = Callable[[Tensor, torch.Generator], Tensor]
Progress = Callable[[int, float], bool | None]


@runtime_checkable
class Shuffled(Protocol):
    """Batches that can be had in another order each time.

    `order` [N] says which image, counted as they lie, comes when; `shuffled` gives (inputs, targets) in that order.
    """

    def order(self, seed: int) -> Tensor: ...

    def shuffled(self, seed: int) -> Iterator[tuple[Inputs, Targets]]: ...


@dataclass(frozen=True, slots=True)
class FinetuneOptions:
    """How long, how fast, and whom to believe.

    `distillation` is the teacher's share of the loss. `norms`: "frozen" keeps running statistics as they are
    (right for folded normalisations and small batches), "batch" trains on each batch's own and re-estimates
    them on the training images at the end. `warm_up` is a share of all steps.
    """

    epochs: int = 10
    learning_rate: float = 3e-4
    optimizer: Literal["adamw", "sgd"] = "adamw"
    weight_decay: float = 1e-4
    label_smoothing: float = 0.0
    distillation: float = 0.9
    temperature: float = 4.0
    norms: Literal["frozen", "batch"] = "frozen"
    warm_up: float = 0.1
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Finetuning:
    """Mean loss of each epoch that was trained; `stopped` when the progress callback ended it early."""

    losses: tuple[float, ...]
    steps: int
    stopped: bool = False


def finetune(
    network: nn.Module,
    batches: LabelledBatches,
    *,
    options: FinetuneOptions = FinetuneOptions(),
    teacher: nn.Module | None = None,
    task: Task | None = None,
    augment: Augment | None = None,
    progress: Progress | None = None,
) -> Finetuning:
    """Trains on (inputs [N, ...], targets) batches; a label of -1 is learned from the teacher alone.

    Without a `task`, or for classification, targets are [N] classes and the loss is cross-entropy and distillation.
    Any other task brings its own loss, and its distance to the teacher's answers, which is all of the loss where there
    are no targets.

    `progress(epoch, mean loss)` may return False to stop there. The network's mode is put back. The teacher lies
    on the network's device. Raises DataError where there is no batch.
    """
    old_state = {name: tensor.detach().clone() for name, tensor in network.state_dict(keep_vars=True).items()}
    device = device_of(network)
    drawing_devices = [device] if device.type == "cuda" else []
    with modes_kept(network), torch.random.fork_rng(drawing_devices):  # the caller's draws stay its own
        torch.manual_seed(options.seed)
        try:
            lesson = _Lesson(network, options, teacher, None if _classifies(task) else task)
            return _train(lesson, batches, augment, progress)
        except BaseException:
            _restore(network, old_state)
            raise
        finally:
            _set_norms(network, training=False)
            for parameter in network.parameters():
                parameter.grad = None


def _restore(network: nn.Module, old_state: dict[str, Tensor]) -> None:
    """Into the tensors that are there: whoever holds them sees the old values."""
    with torch.no_grad():
        for name, tensor in network.state_dict(keep_vars=True).items():
            tensor.copy_(old_state[name])


def _classifies(task: Task | None) -> bool:
    return task is None or task.classifies


@dataclass(frozen=True, slots=True, eq=False)
class _Lesson:
    """Who learns what from whom; `task` is None where classes are learned."""

    network: nn.Module
    options: FinetuneOptions
    teacher: nn.Module | None
    task: Task | None

    def loss(self, images: Inputs, labels: Targets, taught: Tensor | None) -> Tensor:
        """A batch's, on the network's device; `taught` are the teacher's logits, where they are known already."""
        device = device_of(self.network)
        images = inputs_to(images, device)
        if self.task is not None:
            return self._of_the_task(self.task, images, labels)
        assert isinstance(labels, Tensor)
        if taught is None and self.teacher is not None:
            taught = _answer(self.teacher, images)
        return _loss(self.network, taught, images, to_device(labels, device), self.options)

    def _of_the_task(self, task: Task, images: Inputs, targets: Targets) -> Tensor:
        leaves = _leaves(self.network, images)
        share = self.options.distillation if task.learns and is_labelled(targets) else 1.0
        terms = []
        if self.teacher is not None and share:
            terms.append(share * task.distance(leaves, _taught_leaves(self.teacher, images)).mean())
        if share < 1:
            terms.append((1 - share) * task.loss(leaves, targets).mean())
        if not terms:
            raise DataError(
                f"there is nothing to fine-tune towards: for {task.name} no label is followed, and the dense network's "
                "share is 0; say --distillation 0.9, or --loss file.py:function"
            )
        return torch.stack(terms).sum()


def _leaves(network: nn.Module, images: Inputs) -> dict[str, Tensor]:
    """The tensors of the network's answer by name, as the task takes them."""
    if isinstance(network, fx.GraphModule):
        return dict(zip(output_names(network), graph_answers(network, images), strict=True))
    tensors = images if isinstance(images, tuple) else (images,)
    return named_leaves(network(*tensors))


@torch.no_grad()
def _taught_leaves(teacher: nn.Module, images: Inputs) -> dict[str, Tensor]:
    with evaluating(teacher):
        return _leaves(teacher, images)


def _train(lesson: _Lesson, batches: LabelledBatches, augment: Augment | None, progress: Progress | None) -> Finetuning:
    network, options = lesson.network, lesson.options
    if not options.distillation:
        lesson = replace(lesson, teacher=None)  # without a share of the loss it need not be asked
    taught = None if augment is not None else _taught_once(lesson, batches)
    steps_per_epoch = sum(1 for _ in batches) if taught is None else len(taught)
    if steps_per_epoch == 0:
        raise DataError("there are no images to fine-tune on; expected at least one batch; check the calibration split")

    optimizer = _optimizer(network, options)
    rate = torch.optim.lr_scheduler.LambdaLR(optimizer, _schedule(options, steps_per_epoch * options.epochs))
    generator = torch.Generator().manual_seed(options.seed)
    losses: list[float] = []
    stopped = False
    for epoch in range(options.epochs):
        _set_modes(network, options)
        total = 0.0
        for images, labels, answers in _in_new_order(batches, taught, options.seed + epoch):
            if augment is not None:
                assert isinstance(images, Tensor)
                images = augment(images, generator)
            loss = lesson.loss(images, labels, answers)
            _descend(network, loss, optimizer)
            rate.step()
            total += float(loss.detach())

        losses.append(total / steps_per_epoch)
        if progress is not None and progress(epoch, losses[-1]) is False:
            stopped = True
            break

    if options.norms == "batch":
        _set_norms(network, training=False)
        reestimate(network, (images for images, _ in batches))
    return Finetuning(tuple(losses), len(losses) * steps_per_epoch, stopped)


def _taught_once(lesson: _Lesson, batches: LabelledBatches) -> list[Tensor] | None:
    """The teacher's logits of every batch, for epochs that all show the same images; None where it has to be asked."""
    teacher = lesson.teacher
    if teacher is None or lesson.task is not None:
        return None
    return [_answer(teacher, images) for images, _ in batches]


def _descend(network: nn.Module, loss: Tensor, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad(set_to_none=True)
    loss.backward()  # type: ignore[no-untyped-call]
    nn.utils.clip_grad_norm_(network.parameters(), MAX_GRADIENT_NORM)
    optimizer.step()


def _optimizer(network: nn.Module, options: FinetuneOptions) -> torch.optim.Optimizer:
    """Gains and biases are not decayed."""
    trainable = [parameter for parameter in network.parameters() if parameter.requires_grad]
    weights = [parameter for parameter in trainable if parameter.dim() > 1]
    gains_and_biases = [parameter for parameter in trainable if parameter.dim() <= 1]
    groups = [
        {"params": weights, "weight_decay": options.weight_decay},
        {"params": gains_and_biases, "weight_decay": 0.0},
    ]
    if options.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=options.learning_rate, momentum=0.9, nesterov=True)
    return torch.optim.AdamW(groups, lr=options.learning_rate)


def _schedule(options: FinetuneOptions, steps: int) -> Callable[[int], float]:
    """The factor of the learning rate at each step: linear to 1, then half a cosine to 0."""
    rising = max(1, round(options.warm_up * steps))

    def factor(step: int) -> float:
        if step < rising:
            return (step + 1) / rising
        return 0.5 * (1 + math.cos(math.pi * (step - rising) / max(1, steps - rising)))

    return factor


@torch.no_grad()
def _answer(teacher: nn.Module, images: Inputs) -> Tensor:
    """Logits [N, classes], float32, where the teacher lies."""
    with evaluating(teacher):
        return logits_of(teacher, inputs_to(images, device_of(teacher))).float()


def _in_new_order(
    batches: LabelledBatches, taught: list[Tensor] | None, seed: int
) -> Iterator[tuple[Inputs, Targets, Tensor | None]]:
    """Images, labels and, where they are there, the teacher's logits for them.

    What can be shuffled gives other batches in every epoch; of anything else whole batches come in another order.
    """
    if isinstance(batches, Shuffled):
        answers = None if taught is None else torch.cat(taught)[batches.order(seed)]  # [images, classes]
        start = 0
        for images, labels in batches.shuffled(seed):
            end = start + count(images)
            yield images, labels, None if answers is None else answers[start:end]
            start = end
        return

    listed = list(batches)
    order = torch.randperm(len(listed), generator=torch.Generator().manual_seed(seed))
    for i in order.tolist():
        images, labels = listed[i]
        yield images, labels, None if taught is None else taught[i]


def _loss(
    network: nn.Module, taught: Tensor | None, images: Inputs, labels: Tensor, options: FinetuneOptions
) -> Tensor:
    """Cross-entropy over the images that have a label, and the teacher's share, over all of them.

    Its gradients shrink with T squared, which the factor makes up for (Hinton et al., section 2).
    """
    logits = logits_of(network, images).float()  # [N, classes]
    labelled = labels >= 0
    hard = functional.cross_entropy(
        logits, labels.long(), ignore_index=-1, reduction="sum", label_smoothing=options.label_smoothing
    ) / labelled.sum().clamp(min=1)
    if taught is None:
        return hard

    temperature = options.temperature
    soft = functional.kl_div(
        functional.log_softmax(logits / temperature, 1),
        functional.log_softmax(taught.to(logits.device) / temperature, 1),
        log_target=True,
        reduction="batchmean",
    )
    return (1 - options.distillation) * hard + options.distillation * temperature * temperature * soft


def _set_modes(network: nn.Module, options: FinetuneOptions) -> None:
    for module in network.modules():
        module.training = True  # not .train(): an exported graph refuses it
    _set_norms(network, training=options.norms == "batch")


def _set_norms(network: nn.Module, *, training: bool) -> None:
    """Of modules the batch normalisations alone; of a traced graph its dropouts, too, which have no other mode."""
    for module in network.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.training = training
        elif isinstance(module, fx.GraphModule):
            set_training(module, training)
