"""Fine-tuning learns, follows its teacher, can be stopped, and leaves nothing half-done."""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, fx, nn

from compressor.accuracy import batch_norms, evaluate
from compressor.errors import DataError
from compressor.graph import trace
from compressor.repair.batchnorm import reestimate
from compressor.repair.finetune import FinetuneOptions, finetune

SHORT = FinetuneOptions(epochs=6, learning_rate=1e-2)
# The mean of each seed is far from this.
LEARNED = 0.95
FLOAT32_TOLERANCE = 2e-5


def network(width: int = 8) -> nn.Module:
    torch.manual_seed(0)
    layers = (nn.Conv2d(1, width, 3), nn.BatchNorm2d(width), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten())
    return nn.Sequential(*layers, nn.Dropout(0.1), nn.Linear(4 * width, 2))


@functools.cache
def batches() -> list[tuple[Tensor, Tensor]]:
    """Two classes: the bright half is above or below."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 2, (96,), generator=generator)
    images = torch.randn(96, 1, 8, 8, generator=generator)
    images[labels == 0, :, :4] += 1
    images[labels == 1, :, 4:] += 1
    return list(zip(images.split(16), labels.split(16), strict=True))


def graph() -> fx.GraphModule:
    return trace(network(), batches()[0][0][:2])


@pytest.mark.parametrize("norms", ["frozen", "batch"])
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_a_graph_learns(norms: str, optimizer: str) -> None:
    student = graph()
    rate = 0.1 if optimizer == "sgd" else 0.01
    options = FinetuneOptions(epochs=12, learning_rate=rate, optimizer=optimizer, norms=norms)  # type: ignore[arg-type]
    before = student.get_buffer("1.running_mean").clone()
    found = finetune(student, batches(), options=options)
    assert evaluate(student, batches()).top1 > LEARNED
    assert found.losses[-1] < found.losses[0]
    assert found.steps == 12 * 6
    assert torch.equal(before, student.get_buffer("1.running_mean")) == (norms == "frozen")
    assert not any(node.args[5] for node in batch_norms(student))


def test_batch_statistics_are_those_of_the_images_in_the_end() -> None:
    student = graph()
    finetune(student, batches(), options=FinetuneOptions(epochs=2, norms="batch"))
    again = copy.deepcopy(student)
    reestimate(again, batches())
    assert (
        float((again.get_buffer("1.running_var") - student.get_buffer("1.running_var")).abs().max()) < FLOAT32_TOLERANCE
    )


def test_a_module_learns_and_its_modes_are_put_back() -> None:
    student = network().train()
    student[5].eval()
    finetune(student, batches(), options=SHORT)
    assert [student.training, student[1].training, student[5].training] == [True, True, False]
    assert evaluate(student, batches()).top1 > LEARNED
    assert all(parameter.grad is None for parameter in student.parameters())


def test_without_labels_the_teacher_alone_is_learned_from() -> None:
    teacher = network(16)
    finetune(teacher, batches(), options=SHORT)
    unknown = [(images, torch.full_like(labels, -1)) for images, labels in batches()]
    state = copy.deepcopy(teacher.state_dict())
    student = graph()
    finetune(student, unknown, options=FinetuneOptions(epochs=10, learning_rate=1e-2), teacher=teacher)
    assert evaluate(student, batches()).top1 > LEARNED
    assert all(torch.equal(state[name], tensor) for name, tensor in teacher.state_dict().items())


@pytest.mark.parametrize("shuffled", [True, False])
def test_a_teacher_is_asked_once_and_its_answers_go_to_the_right_images(shuffled: bool) -> None:
    """Oracle: augmentation that changes nothing has the teacher answer anew in every step."""
    given = Mixed() if shuffled else batches()
    taught = []
    for augment in (None, lambda images, generator: images):
        student, teacher = graph(), Counting()
        options = FinetuneOptions(epochs=3, learning_rate=1e-2)
        finetune(student, given, options=options, teacher=teacher, augment=augment)
        taught.append((student.get_parameter("0.weight").detach(), teacher.asked))
    assert torch.equal(taught[0][0], taught[1][0])
    assert [asked for _, asked in taught] == [6, 18]


class Mixed:
    """Batches whose images change places between them, as a data set's do."""

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return iter(batches())

    def order(self, seed: int) -> Tensor:
        return torch.randperm(96, generator=torch.Generator().manual_seed(seed))

    def shuffled(self, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        images, labels = (torch.cat(part)[self.order(seed)] for part in zip(*batches(), strict=True))
        return zip(images.split(16), labels.split(16), strict=True)


class Counting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.asked = network(16), 0

    def forward(self, x: Tensor) -> Tensor:
        self.asked += 1
        answer: Tensor = self.inner(x)
        return answer


def test_the_same_seed_gives_the_same_network_and_leaves_the_generator() -> None:
    results = []
    torch.manual_seed(5)
    state = torch.random.get_rng_state()
    for seed in (1, 1, 2):
        student = network()
        torch.random.set_rng_state(state)
        finetune(student, batches(), options=FinetuneOptions(epochs=1, seed=seed), augment=noisy)
        assert torch.equal(torch.random.get_rng_state(), state)
        results.append(student[0].weight.detach().clone())
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


def noisy(images: Tensor, generator: torch.Generator) -> Tensor:
    return images + 0.1 * torch.randn(images.shape, generator=generator)


def test_progress_can_end_it() -> None:
    seen: list[int] = []
    found = finetune(graph(), batches(), options=SHORT, progress=lambda epoch, loss: seen.append(epoch) or epoch < 1)
    assert seen == [0, 1]
    assert found.stopped
    assert len(found.losses) == 2


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
def test_an_interrupt_puts_everything_back(error: type[BaseException]) -> None:
    student = graph()
    before = copy.deepcopy(student.state_dict())

    def stop(epoch: int, loss: float) -> None:
        assert not torch.equal(before["0.weight"], student.get_parameter("0.weight"))
        raise error

    with pytest.raises(error):
        finetune(student, batches(), options=FinetuneOptions(norms="batch"), progress=stop)
    assert all(torch.equal(before[name], tensor) for name, tensor in student.state_dict().items())
    assert not any(node.args[5] for node in batch_norms(student))


def test_no_images_is_an_error() -> None:
    with pytest.raises(DataError, match="no images"):
        finetune(network(), [])
