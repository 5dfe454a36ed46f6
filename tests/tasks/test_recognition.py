"""Which task a batch speaks of, and the one table that all presets pass."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch.nn.functional import normalize

from compressor.errors import ModelError, RecipeError
from compressor.tasks import TASKS, choose_task, reference_of, task_named

from .answers import data, network

IMAGES = (4, 3, 32, 32)
NONE = torch.full((4,), -1)
INDICES = torch.tensor([0, 1, 1, 0])
BOXES = [{"boxes": torch.zeros(0, 4), "labels": torch.zeros(0)}] * 4


def leaf(*shape: int) -> torch.Tensor:
    return 0.5 + torch.randn(4, *shape, generator=torch.Generator().manual_seed(0))


CHOICES: list[tuple[dict[str, torch.Tensor], Any, str, str]] = [
    (
        {"output": leaf(10)},
        INDICES,
        "classification",
        r"one output \[4, 10\] and labels that are whole numbers; say task=",
    ),
    ({"output": leaf(10)}, NONE, "classification", "it may be an embedding"),
    ({"output": leaf(10)}, None, "classification", "no labels"),
    ({"logits": leaf(10), "hidden": leaf(5, 8)}, INDICES, "classification", r"\[4, 10\]"),
    ({"logits": leaf(10), "pooled": leaf(8)}, NONE, "classification", "'logits'"),
    ({"output": normalize(leaf(8))}, INDICES, "embedding", "rows of length one"),
    ({"output": normalize(leaf(8))}, NONE, "embedding", "rows of length one"),
    ({"output": leaf(8)}, 10 * INDICES, "embedding", "labels up to 10"),
    ({"output": leaf(1)}, INDICES, "multi-label", "0 or 1"),
    ({"output": leaf(1)}, 5 * INDICES, "regression", "up to 5"),
    ({"output": leaf(6)}, torch.ones(4, 6), "multi-label", "0 and 1"),
    ({"output": leaf(6)}, leaf(6), "regression", "of the shape"),
    ({"output": leaf(1)}, leaf(), "regression", "of the shape"),
    ({"a": leaf(5), "b": leaf(3)}, INDICES, "any", "of which output is open"),
    ({"output": leaf(5, 8, 8)}, INDICES, "any", "no output fits"),
    ({"output": leaf(5, 8, 8)}, torch.zeros(4, 32, 32, dtype=torch.int64), "segmentation", "masks"),
    ({"output": leaf(1, 8, 8)}, torch.ones(4, 1, 32, 32, dtype=torch.uint8), "segmentation", "masks"),
    ({"out": leaf(5, 8, 8), "aux": leaf(5, 8, 8)}, NONE, "segmentation", "in proportion"),
    ({"output": leaf(5, 8, 8)}, NONE, "segmentation", "map of values"),
    ({"output": leaf(3, 64, 64)}, NONE, "image-to-image", "for images"),
    ({"output": leaf(3, 64, 64)}, leaf(3, 64, 64), "image-to-image", "are images"),
    ({"output": leaf(3, 32, 32)}, torch.full((4, 3, 32, 32), 200, dtype=torch.uint8), "image-to-image", "are images"),
    ({"output": leaf(1, 32, 32)}, NONE, "regression", "in proportion"),
    ({"output": leaf(1, 32, 32)}, leaf(32, 32), "regression", "of the shape"),
    ({"output": leaf(17, 2)}, leaf(17, 2), "regression", "of the shape"),
    ({"output": leaf(84, 100)}, NONE, "any", "task='detection'"),
    ({"output": leaf(84, 100)}, BOXES, "detection", "boxes"),
    ({"boxes": leaf(9, 4), "scores": leaf(9)}, BOXES, "detection", "boxes"),
    ({"boxes": leaf(9, 4), "scores": leaf(9, 3)}, NONE, "any", "several outputs"),
    ({"output": leaf(10)}, leaf(4, 4), "any", "fit no output"),
]


@pytest.mark.parametrize(("leaves", "targets", "name", "words"), CHOICES)
def test_a_batch_speaks_of_its_task(leaves: dict[str, torch.Tensor], targets: Any, name: str, words: str) -> None:
    chosen, reason = choose_task(leaves, targets, IMAGES)
    assert chosen == name, reason
    assert reason.startswith(f"taken as {name}: ")
    assert re.search(words, reason), reason
    assert name in TASKS


def test_an_answer_of_whole_numbers_has_no_task() -> None:
    with pytest.raises(ModelError, match="expected a leaf of real numbers"):
        choose_task({"output": torch.arange(4)}, NONE, IMAGES)


def test_a_task_there_is_not_is_refused_with_its_neighbour() -> None:
    with pytest.raises(RecipeError, match=r"there is no task 'segmentaton'.*Did you mean 'segmentation'"):
        task_named("segmentaton")


FORMS: dict[str, tuple[tuple[int, ...], Any]] = {
    "classification": ((5,), INDICES),
    "multi-label": ((5,), torch.ones(4, 5)),
    "segmentation": ((5, 4, 4), torch.zeros(4, 4, 4, dtype=torch.int64)),
    "detection": ((6, 9), BOXES),
    "embedding": ((5,), INDICES),
    "image-to-image": ((3, 4, 4), torch.ones(4, 3, 4, 4)),
    "regression": ((5,), torch.ones(4, 5)),
    "any": ((5,), NONE),
}


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("labelled", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
def test_every_task_has_one_differentiable_number_a_sample(name: str, labelled: bool, dtype: torch.dtype) -> None:
    shape, targets = FORMS[name]
    values = leaf(*shape).to(dtype)
    reference = reference_of(network(output=values), data(NONE, [3, 1]))
    task = task_named(name, reference=reference)
    assert task.name == name
    for objective in (task.says, task.loss):
        answer = values.clone().requires_grad_()
        numbers = objective({"output": answer}, targets if labelled else NONE)
        (seed,) = torch.autograd.grad(numbers.sum(), answer)
        assert numbers.shape == (4,)
        assert seed.isfinite().all()
        assert seed.abs().max() > 0
        assert (task.learns or objective is task.says) or torch.equal(numbers, -task.says({"output": answer}, targets))
    answer = (values + 0.1).requires_grad_()
    distances = task.distance({"output": answer * 1.5}, {"output": values})
    (seed,) = torch.autograd.grad(distances.sum(), answer)
    assert distances.shape == (4,)
    assert (distances >= 0).all()
    assert seed.abs().max() > 0


@pytest.mark.parametrize("name", TASKS)
def test_a_task_refuses_leaves_it_can_not_serve_in_words(name: str) -> None:
    with pytest.raises(ModelError):
        task_named(name).says({"output": torch.zeros(4, dtype=torch.int64)}, NONE)
