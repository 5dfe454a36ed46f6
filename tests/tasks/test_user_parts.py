"""A user's own functions: what they may answer, and one clear message where they don't."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from compressor.errors import DataError, InputError, TaskError
from compressor.records import Accuracy, Quality
from compressor.relevance.starts import Objective
from compressor.tasks import Task, class_leaf, task_named, with_user_parts

from .answers import corners, data, network, unlabelled

LEAF = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
LABELS = torch.tensor([0, 1, 2, 0, 1])


def judged(quality: Callable[..., object]) -> Quality:
    task = with_user_parts(task_named("classification"), quality=quality)
    return task.quality(network(output=LEAF), data(LABELS, [3, 2]))


def my_metric(predict: Any, batches: Any) -> float:
    right = sum(int((predict(inputs)["output"].argmax(1) == targets).sum()) for inputs, targets in batches)
    return right / 5


class MyMetric:
    def __call__(self, predict: Any, batches: Any, value: object = 0.5) -> object:
        return value


def test_a_number_is_a_quality_without_an_interval() -> None:
    right = int((LEAF.argmax(1) == LABELS).sum())
    assert judged(my_metric) == Quality("my_metric", right / 5, 5, right / 5, right / 5)
    assert judged(lambda predict, batches: torch.tensor(7.0)).is_share is False
    assert judged(MyMetric()).metric == "MyMetric"
    assert judged(partial(MyMetric(), value=1)) == Quality("MyMetric", 1.0, 5, 1.0, 1.0)
    full = Quality("mine", 3.0, 2, 2.0, 4.0, is_share=False)
    assert judged(lambda predict, batches: full) == full
    assert judged(lambda predict, batches: Accuracy(4, 5)).metric == "top-1"
    assert judged(lambda predict, batches: len(batches) / 2).value == 1


def test_a_users_quality_counts_samples_even_where_it_does_not_look_at_them() -> None:
    assert judged(lambda predict, batches: 0.5).n == 5
    assert judged(lambda predict, batches: float(len(next(iter(batches))[0]))).n == 3


def broken(predict: Any, batches: Any) -> float:
    raise KeyError("out")


@pytest.mark.parametrize(
    ("quality", "words"),
    [
        (
            broken,
            r"broken \(.*test_user_parts.py, line \d+\), given as quality, raises KeyError: 'out', at .*_parts.py:\d+",
        ),
        (lambda predict, batches: float("nan"), "answers with nan, expected a finite number"),
        (lambda predict, batches: Quality("q", float("inf"), 1, 0, 1), "answers with inf"),
        (lambda predict, batches: None, "answers with a NoneType, expected a number or a Quality"),
        (lambda predict, batches: True, "answers with a bool"),
        (lambda predict, batches: torch.tensor(True), r"answers with a tensor \[\] of bool"),
        (lambda predict, batches: torch.ones(2), r"answers with a tensor \[2\] of float32"),
        (partial(MyMetric(), value="0.5"), r"MyMetric \(.*test_user_parts.py, line \d+\), .*answers with a str"),
    ],
)
def test_a_quality_that_goes_wrong_is_named(quality: Callable[..., object], words: str) -> None:
    with pytest.raises(TaskError, match=words):
        judged(quality)


def test_the_products_own_errors_pass_and_every_task_error_is_the_inputs() -> None:
    def refuses(predict: Any, batches: Any) -> float:
        raise DataError("no images")

    with pytest.raises(DataError, match=r"^no images$"):
        judged(refuses)
    assert issubclass(TaskError, InputError)


def said(task: Task, role: str) -> Tensor:
    leaf = LEAF.clone().requires_grad_()
    if role == "distance":
        return task.distance({"output": leaf}, {"output": LEAF})
    return getattr(task, role)({"output": leaf}, LABELS)


@pytest.mark.parametrize("role", ["says", "loss", "distance"])
def test_an_objective_is_one_finite_number_a_sample(role: str) -> None:
    def with_part(function: Callable[..., Any]) -> Task:
        return with_user_parts(task_named("any"), **{role: function})

    assert said(with_part(lambda leaves, other: leaves["output"].square().sum(1)), role).shape == (5,)
    for function, words in {
        (
            lambda leaves, other: leaves["output"].sum()
        ): r"answers with a tensor \[\] of float32, expected one real number",
        (lambda leaves, other: leaves["output"]): r"a tensor \[5, 3\]",
        (lambda leaves, other: 1.0): "answers with a float",
        (lambda leaves, other: leaves["output"].sum(1) / 0): "is not finite for 5 of 5 samples",
        (lambda leaves, other: leaves["nothing"]): "raises KeyError",
    }.items():
        with pytest.raises(TaskError, match=f"given as {role}, .*{words}|given as {role}, {words}"):
            said(with_part(function), role)
    with pytest.raises(TaskError, match="has no gradient"):
        said(with_part(lambda leaves, other: leaves["output"].detach().sum(1)), role)


def test_a_distance_is_not_negative() -> None:
    task = with_user_parts(task_named("any"), distance=lambda leaves, dense: -leaves["output"].square().sum(1))
    with pytest.raises(TaskError, match=r"given as distance, answers with -\d.*; expected squared distances"):
        said(task, "distance")


@pytest.mark.parametrize("role", ["says", "loss", "distance"])
def test_a_classifier_with_a_function_of_a_users_is_no_plain_one(role: str) -> None:
    """Whoever takes a short way for plain classifiers would drop the function."""
    task = task_named("classification")
    assert task.classifies
    assert with_user_parts(task, quality=my_metric).classifies
    assert not with_user_parts(task, **{role: lambda leaves, other: leaves["output"].sum(1)}).classifies


def test_a_distance_to_a_broken_network_may_be_infinite() -> None:
    task = with_user_parts(
        task_named("any"), distance=lambda leaves, dense: (leaves["output"] - dense["output"]).square().sum(1)
    )
    assert not task.distance({"output": LEAF / 0}, {"output": LEAF}).isfinite().any()


def test_tuning_follows_a_users_loss_and_a_users_decoder_judges() -> None:
    task = task_named("any")
    assert not task.learns
    assert with_user_parts(task, loss=lambda leaves, targets: leaves["output"].sum(1)).learns
    boxes = {
        "boxes": torch.tensor([[[0.0, 0.0, 4.0, 4.0]]] * 2),
        "scores": torch.ones(2, 1),
        "labels": torch.zeros(2, 1, dtype=torch.int64),
    }
    task = with_user_parts(task, decode=corners, dense=network(**boxes))
    assert task.quality(network(**boxes), unlabelled([2])).metric == "box F1 to dense"


def test_relevance_of_a_classifier_starts_where_a_user_says() -> None:
    task = with_user_parts(task_named("classification"), says=lambda leaves, targets: leaves["output"].square().sum(1))
    (seed,) = Objective(task, ("output",)).seeds([LEAF], LABELS, "one")
    assert seed is not None
    assert torch.equal(seed, 2 * LEAF)


def test_of_several_leaves_the_logits_are_counted() -> None:
    leaves = {"pooled": LEAF.flip(1), "logits": LEAF}
    assert class_leaf(leaves)[0] == "logits"
    assert class_leaf({"pooled": LEAF, "maps": LEAF[..., None]})[0] == "pooled"
