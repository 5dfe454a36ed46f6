"""The studies' fine-tuning learns, follows its teacher, and takes the teacher's answer to each image."""

from __future__ import annotations

import copy
import functools
import importlib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor, fx, nn

from compressor.accuracy import evaluate
from compressor.graph import trace
from compressor.recipe import Recipe

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
RECIPE = Recipe(model="digits-resnet", finetune_epochs=10, learning_rate=1e-2, distillation=0.9)
IMAGES = 90  # the last of six batches is smaller
FLOAT32_TOLERANCE = 2e-5
LEARNED = 0.95  # the mean of each seed is far from this


@pytest.fixture
def finetuning(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("finetuning")


@functools.cache
def graph(seed: int = 0) -> fx.GraphModule:
    torch.manual_seed(seed)
    layers = (nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten())
    return trace(nn.Sequential(*layers, nn.Dropout(0.1), nn.Linear(32, 2)), images_and_labels()[0][:2])


@functools.cache
def images_and_labels() -> tuple[Tensor, Tensor]:
    """Two classes: the bright half is above or below."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 2, (IMAGES,), generator=generator)
    images = torch.randn(IMAGES, 1, 8, 8, generator=generator)
    images[labels == 0, :, :4] += 1
    images[labels == 1, :, 4:] += 1
    return images, labels


class Batches:
    """As a data set's: shuffled, the images change places between batches."""

    batch_size = 16

    def __init__(self, *, labelled: bool = True) -> None:
        self.labelled = labelled

    def __len__(self) -> int:
        return len(list(iter(self)))

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return self._in_order(torch.arange(IMAGES))

    def order(self, seed: int) -> Tensor:
        return torch.randperm(IMAGES, generator=torch.Generator().manual_seed(seed))

    def shuffled(self, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        return self._in_order(self.order(seed))

    def _in_order(self, order: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        images, labels = (tensor[order] for tensor in images_and_labels())
        if not self.labelled:
            labels = torch.full_like(labels, -1)
        return iter(list(zip(images.split(self.batch_size), labels.split(self.batch_size), strict=True)))


def finetuned(finetuning: ModuleType, teacher: fx.GraphModule, batches: Batches, recipe: Recipe) -> fx.GraphModule:
    student = copy.deepcopy(graph())
    finetuning.finetune(student, teacher, batches, recipe)
    assert all(parameter.grad is None for parameter in student.parameters())
    return student


def test_a_graph_learns_from_labels_and_another_from_it_alone(finetuning: ModuleType) -> None:
    by_labels = Recipe(model="digits-resnet", finetune_epochs=10, learning_rate=1e-2, distillation=0.0)
    teacher = finetuned(finetuning, graph(1), Batches(), by_labels)
    assert evaluate(teacher, Batches()).top1 > LEARNED
    assert torch.equal(graph().get_buffer("1.running_mean"), teacher.get_buffer("1.running_mean"))

    state = copy.deepcopy(teacher.state_dict())
    student = finetuned(finetuning, teacher, Batches(labelled=False), RECIPE)
    assert evaluate(student, Batches()).top1 > LEARNED
    assert all(torch.equal(state[name], tensor) for name, tensor in teacher.state_dict().items())


def test_the_answers_go_to_the_right_images(finetuning: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """A student that is its own teacher, and stays as it is, answers the same."""
    follows = Recipe(model="digits-resnet", finetune_epochs=2, learning_rate=1e-12, distillation=1.0)
    distances = []
    original = finetuning._loss

    def loss(student: Tensor, teacher: Tensor, labels: Tensor, distillation: float) -> Tensor:
        distances.append(float((student.detach() - teacher).abs().max()))
        result: Tensor = original(student, teacher, labels, distillation)
        return result

    monkeypatch.setattr(finetuning, "_loss", loss)
    finetuned(finetuning, graph(), Batches(), follows)
    assert len(distances) == 2 * 6
    assert max(distances) < FLOAT32_TOLERANCE


def test_the_same_seed_gives_the_same_network(finetuning: ModuleType) -> None:
    weights = []
    for seed in (1, 1, 2):
        recipe = Recipe(model="digits-resnet", finetune_epochs=1, learning_rate=1e-2, seed=seed)
        weights.append(finetuned(finetuning, graph(1), Batches(), recipe).get_parameter("0.weight").detach())
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
