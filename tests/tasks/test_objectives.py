"""What is said and lost: gradients against closed forms, and no dependence on batches."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from compressor.errors import DataError, ModelError
from compressor.tasks import Reference, Task, any_task, reference_of, relative_error, task_named

from .answers import network, unlabelled

ROUNDING = 1e-5  # of float32, in numbers of about one


def gradient(task: Task, leaf: Tensor, targets: object, name: str = "output") -> Tensor:
    leaf = leaf.clone().requires_grad_()
    (seed,) = torch.autograd.grad(task.says({name: leaf}, targets).sum(), leaf)
    return seed


def test_a_class_is_said_by_its_logit_and_the_predicted_one_where_none_is_labelled() -> None:
    logits = torch.tensor([[1.0, 3.0, 2.0], [0.0, 5.0, 1.0]])
    seed = gradient(task_named("classification"), logits, torch.tensor([2, -1]))
    assert seed.tolist() == [[0, 0, 1], [0, 1, 0]]


def test_cross_entropy_is_minus_the_logarithm_of_the_softmax() -> None:
    logits = torch.tensor([[1.0, 3.0, 2.0], [0.0, 5.0, 1.0]])
    losses = task_named("classification").loss({"output": logits}, torch.tensor([2, -1]))
    by_hand = [
        -math.log(math.exp(2) / sum(map(math.exp, (1, 3, 2)))),
        -math.log(math.exp(5) / sum(map(math.exp, (0, 5, 1)))),
    ]
    assert losses.tolist() == pytest.approx(by_hand, abs=ROUNDING)


def test_labels_say_the_sum_of_their_scores_and_the_best_one_where_there_is_none() -> None:
    scores = torch.tensor([[1.0, -3.0, 2.0], [-2.0, -1.0, -4.0]])
    task = task_named("multi-label")
    assert gradient(task, scores, torch.tensor([[1, 1, 0], [0, 0, 0]])).tolist() == [[1, 1, 0], [0, 1, 0]]
    assert gradient(task, scores, torch.tensor([-1, -1])).tolist() == [[1, 0, 1], [0, 1, 0]]


def test_unknown_labels_cost_nothing_and_probabilities_are_seen_as_such() -> None:
    scores = torch.tensor([[1.0, -3.0, 2.0]])
    labels = torch.tensor([[1, -1, 0]])
    by_hand = (math.log1p(math.exp(-1)) + math.log1p(math.exp(2))) / 2
    task = task_named("multi-label")
    assert task.loss({"output": scores}, labels).tolist() == pytest.approx([by_hand], abs=ROUNDING)
    assert task.loss({"output": scores.sigmoid()}, labels).tolist() == pytest.approx([by_hand], abs=ROUNDING)


def test_a_mask_says_the_mean_of_its_pixels_logits_without_those_of_no_class() -> None:
    logits = torch.randn(2, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    masks = torch.tensor([[[0, 2], [255, -1]], [[255, 255], [255, 255]]])
    seed = gradient(task_named("segmentation"), logits, masks)
    expected = torch.zeros_like(logits)
    expected[0, 0, 0, 0] = expected[0, 2, 0, 1] = 0.5
    expected[1] = functional.one_hot(logits[1].argmax(0), 3).permute(2, 0, 1) / 4
    assert torch.allclose(seed, expected)
    loss = task_named("segmentation").loss({"output": logits}, masks)
    pixels = logits[0].log_softmax(0)
    assert float(loss[0]) == pytest.approx(float(-(pixels[0, 0, 0] + pixels[2, 0, 1]) / 2), abs=ROUNDING)


def test_one_channel_alone_has_the_cross_entropy_of_two_classes() -> None:
    logits = torch.randn(2, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    masks = torch.randint(0, 2, (2, 2, 2), generator=torch.Generator().manual_seed(1))
    expected = functional.binary_cross_entropy_with_logits(logits[:, 0], masks.float(), reduction="none").mean((1, 2))
    assert torch.allclose(task_named("segmentation").loss({"output": logits}, masks), expected, atol=ROUNDING)


def test_a_small_map_is_judged_at_the_size_of_the_masks() -> None:
    logits = torch.randn(1, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    large = functional.interpolate(logits, (4, 4), mode="bilinear")
    masks = torch.ones(1, 4, 4, dtype=torch.int64)
    assert float(task_named("segmentation").says({"output": logits}, masks)) == pytest.approx(float(large[:, 1].mean()))


@pytest.mark.parametrize(
    ("name", "shape", "targets", "words"),
    [
        ("classification", (2, 3), torch.tensor([0, 3]), "a label is 3, the network answers with 3 classes"),
        ("classification", (2, 3), torch.zeros(2, 2, dtype=torch.int64), "expected one class index a sample"),
        ("multi-label", (2, 3), torch.zeros(2, 4), "answers with \\[2, 3\\] labels"),
        ("segmentation", (2, 3, 2, 2), torch.full((2, 2, 2), 7), "a mask holds 7 to 7"),
        (
            "segmentation",
            (2, 3, 2, 2),
            torch.zeros(2, 2, dtype=torch.int64),
            "masks are \\[2, 2\\], .* a class index for each pixel",
        ),
    ],
)
def test_targets_that_do_not_fit_are_refused(name: str, shape: tuple[int, ...], targets: Tensor, words: str) -> None:
    with pytest.raises(DataError, match=words):
        task_named(name).says({"output": torch.randn(shape)}, targets)


def test_regression_goes_by_the_absolute_difference_from_targets_that_are_finite() -> None:
    leaf, wanted = torch.tensor([[1.0, 2.0], [3.0, 5.0]]), torch.tensor([[0.0, float("nan")], [1.0, 1.0]])
    leaf.requires_grad_()
    loss = task_named("regression").loss({"output": leaf}, wanted)
    assert loss.tolist() == [1.0, 3.0]
    loss.sum().backward()
    assert leaf.grad is not None
    assert leaf.grad.tolist() == [[1.0, 0.0], [0.5, 0.5]]


def leaves_of_two(samples: int = 7) -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(0)
    boxes = 100 + 30 * torch.randn(samples, 4, 2, generator=random)
    return {"boxes": boxes, "scores": torch.randn(samples, 5, generator=random), "index": torch.arange(samples)}


def reference_in(leaves: dict[str, Tensor], sizes: list[int]) -> Reference:
    return reference_of(network(**leaves), unlabelled(sizes))


def test_the_unlabelled_start_is_the_deviation_from_the_mean_answer_over_its_spread() -> None:
    leaves = leaves_of_two()
    task = any_task(reference_in(leaves, [7]))
    for name in ("boxes", "scores"):
        values = leaves[name].numpy().astype(np.float64)
        spread = np.mean([np.sum((row - values.mean(0)) ** 2) for row in values])
        (seed,) = torch.autograd.grad(
            task.says({**leaves, name: (leaf := leaves[name].clone().requires_grad_())}, torch.full((7,), -1)).sum(),
            leaf,
        )
        assert np.allclose(seed.numpy(), (values - values.mean(0)) / spread, atol=ROUNDING)


def test_the_unlabelled_start_depends_on_no_batching() -> None:
    leaves = leaves_of_two()
    whole, parted = (any_task(reference_in(leaves, sizes)) for sizes in ([7], [3, 3, 1]))
    none = torch.full((7,), -1)
    said = whole.says(leaves, none)
    by_parts = [
        parted.says({name: leaf[i : i + 2] for name, leaf in leaves.items()}, none[i : i + 2]) for i in (0, 2, 4, 6)
    ]
    assert torch.allclose(said, torch.cat(by_parts), atol=ROUNDING)
    assert {"boxes", "scores"} == set(reference_in(leaves, [7]).leaves)


def test_values_that_are_not_finite_say_nothing() -> None:
    leaves = leaves_of_two()
    leaves["scores"][2, 3] = float("-inf")
    reference = reference_in(leaves, [4, 3])
    leaf = leaves["scores"].clone().requires_grad_()
    said = any_task(reference).says({**leaves, "scores": leaf}, torch.full((7,), -1))
    (seed,) = torch.autograd.grad(said.sum(), leaf)
    assert said.isfinite().all()
    assert seed.isfinite().all()
    assert seed[2, 3] == 0


def test_an_answer_that_never_changes_says_nothing_and_that_is_told() -> None:
    constant = {"output": torch.ones(3, 4)}
    with pytest.raises(ModelError, match="no leaf of the answer tells one image from another"):
        any_task(reference_in(constant, [3])).says(constant, torch.full((3,), -1))
    with pytest.raises(ModelError, match="one entry a sample"):
        reference_in({"index": torch.arange(3)}, [3])
    with pytest.raises(DataError, match="no images"):
        reference_of(network(), [])
    with pytest.raises(ModelError, match="give a reference"):
        task_named("any").says(constant, torch.full((3,), -1))


def test_a_leaf_without_samples_is_left_out() -> None:
    def predict(inputs: Tensor) -> dict[str, Tensor]:
        return {"scores": inputs[:, None].double(), "anchors": torch.ones(50, 4)}

    assert list(reference_of(predict, unlabelled([3, 2])).leaves) == ["scores"]


SHAPES = {
    "classification": (6, 5),
    "multi-label": (6, 5),
    "segmentation": (6, 4, 3, 3),
    "detection": (6, 4, 9),
    "embedding": (6, 5),
    "image-to-image": (6, 3, 4, 4),
    "regression": (6, 3, 3),
    "any": (6, 2, 7),
}


@pytest.mark.parametrize("name", SHAPES)
def test_distance_is_none_for_equal_answers_and_one_for_the_mean_answer(name: str) -> None:
    leaf = 3 + torch.randn(SHAPES[name], generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    dense = {"output": leaf}
    task = task_named(name, reference=reference_in(dense, [4, 2]))
    ordinary = leaf.mean(0, keepdim=True).expand_as(leaf)
    if name in ("classification", "segmentation"):
        ordinary = leaf.mean(1, keepdim=True).expand_as(leaf)
    if name == "embedding":
        ordinary = functional.normalize(leaf, dim=1).mean(0, keepdim=True).expand_as(leaf)
    assert task.distance(dense, dense).tolist() == [0.0] * 6
    assert task.distance(dense, dense).shape == (6,)
    assert relative_error(task, [({"output": ordinary}, dense)]) == pytest.approx(1.0, abs=ROUNDING)
    # without a reference the spread is that of the same samples
    assert relative_error(task_named(name), [({"output": ordinary}, dense)]) == pytest.approx(1.0, abs=ROUNDING)


def test_measured_loss_of_classes_is_the_centred_square_over_its_own() -> None:
    random = torch.Generator().manual_seed(0)
    dense, pruned = (torch.randn(6, 5, generator=random, dtype=torch.float64) for _ in range(2))
    task = task_named("classification", reference=reference_in({"output": dense}, [6]))
    ours, theirs = (values - values.mean(1, keepdim=True) for values in (pruned, dense))
    by_hand = float((ours - theirs).square().sum() / theirs.square().sum())
    pairs = [({"output": pruned[part]}, {"output": dense[part]}) for part in (slice(0, 4), slice(4, 6))]
    assert relative_error(task, pairs) == pytest.approx(by_hand, rel=1e-12)


def test_distance_weighs_leaves_alike_and_sees_a_broken_one() -> None:
    leaves = leaves_of_two()
    task = any_task(reference_in(leaves, [7]))
    ordinary = {**leaves, "boxes": leaves["boxes"].mean(0, keepdim=True).expand(7, 4, 2)}
    assert relative_error(task, [(ordinary, leaves)]) == pytest.approx(0.5, abs=ROUNDING)
    assert relative_error(task, [({**leaves, "boxes": leaves["boxes"] * float("nan")}, leaves)]) == math.inf
    with pytest.raises(ModelError, match="differ in form"):
        task.distance({"boxes": leaves["boxes"]}, leaves)
