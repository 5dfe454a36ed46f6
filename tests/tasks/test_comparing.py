"""Answers held against answers: decisions, distances and means by hand, and what is not finite, alone or not there."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from compressor.errors import DataError, ModelError, TaskError
from compressor.records import Quality
from compressor.tasks import (
    Reference,
    agreement,
    average_precision,
    class_leaf,
    fidelity,
    is_labelled,
    matched_f1,
    reference_of,
    relative_error,
    task_named,
)
from compressor.tasks.calling import call, name_of, place_of
from compressor.tasks.comparison import WORST, labels_of, pixels_of
from compressor.tasks.detection import decoded, matches
from compressor.tasks.objectives import masks_of, sized_like
from compressor.tasks.places import divergence, entropy
from compressor.tasks.qualities import chance_of, decibels
from compressor.tasks.record import finite, leaf_like, map_leaf, per_sample

from .answers import corners, data, network, unlabelled

NAN, INF = float("nan"), float("inf")
ROUNDING = 1e-6  # of float32, in numbers of about one


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def without_labels(name: str, ours: Tensor, theirs: Tensor, sizes: list[int]) -> Quality:
    return task_named(name, dense=network(output=theirs)).quality(network(output=ours), unlabelled(sizes))


def test_labels_are_given_above_even_which_is_a_half_of_probabilities() -> None:
    assert labels_of({"output": torch.tensor([[0.2, 0.6]])}).tolist() == [[0, 1]]
    assert labels_of({"output": torch.tensor([[0.2, 1.6]])}).tolist() == [[1, 1]]
    assert labels_of({"output": torch.tensor([[0.0, -0.1]])}).tolist() == [[0, 0]]
    maps = torch.tensor([[[[-1.0, 0.0, 0.4]]]])
    assert pixels_of({"output": maps}).tolist() == [[[0, 0, 1]]]
    assert pixels_of({"output": torch.cat([maps, -maps], 1)}).tolist() == [[[1, 0, 0]]]  # of equals the first


def test_label_agreement_depends_on_no_batching() -> None:
    """Two logits of a batch alone may lie within 0 and 1, and be no probabilities."""
    theirs = torch.tensor([[0.9, 0.3], [0.2, 0.6], [-3.0, 4.0]])
    ours = torch.tensor([[0.4, 1.3], [0.1, -0.6], [0.3, 0.4]])
    shares = ((ours > 0) == (theirs > 0)).double().mean(1)
    for sizes in ([3], [1, 1, 1], [2, 1]):
        quality = without_labels("multi-label", ours, theirs, sizes)
        assert (quality.value, quality.n) == (pytest.approx(float(shares.mean())), 3)
    probable = without_labels("multi-label", ours.sigmoid(), theirs.sigmoid(), [2, 1])
    assert probable.value == pytest.approx(float(shares.mean()))
    over = without_labels("multi-label", ours.sigmoid() + 0.3, theirs.sigmoid(), [3])  # theirs say what scores are
    assert over.value == pytest.approx(float(((ours.sigmoid() > 0.2) == (theirs > 0)).double().mean()))


def test_answers_of_other_forms_are_not_compared() -> None:
    for name, shape in (("multi-label", (3, 4)), ("segmentation", (3, 5, 4, 4)), ("image-to-image", (3, 3, 4, 4))):
        theirs = randn(*shape)
        with pytest.raises(ModelError, match="answers differ in form"):
            without_labels(name, theirs[..., :3], theirs, [3])


def test_one_image_has_a_figure_and_no_interval() -> None:
    for name, shape in {"segmentation": (1, 3, 4, 4), "embedding": (1, 5), "regression": (1, 3)}.items():
        leaf = randn(*shape)
        quality = without_labels(name, leaf, leaf, [1])
        assert (quality.value, quality.n) == (pytest.approx(1), 1)
        assert quality.low == quality.value == quality.high


def test_a_broken_image_is_black_to_psnr_and_its_figure_is_finite() -> None:
    theirs = torch.rand(3, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    for broken in (NAN, INF, -INF):
        ours = torch.cat([theirs[:2] * 0.9, torch.full((1, 1, 4, 4), broken)])
        errors = torch.cat([(theirs[:2] * 0.1), theirs[2:]]).double().square().flatten(1).mean(1)
        quality = without_labels("image-to-image", ours, theirs, [2, 1])
        assert quality.value == pytest.approx(float((-10 * errors.log10()).mean()), rel=1e-4)
        assert math.isfinite(quality.low)


@pytest.mark.parametrize(
    ("low", "high", "peak"),
    [(0, 1, 1), (0.2, 1.04, 1), (-0.04, 1, 1), (0, 250, 255), (0, 1.2, 255), (0, 300, 300), (-1, 1, 2), (-3, 2, 5)],
)
def test_the_peak_is_what_the_targets_range_tells(low: float, high: float, peak: float) -> None:
    rows = {"error": np.array([4.0, 0.0]), "low": np.array([low, low]), "high": np.array([0.0, high])}
    assert decibels("PSNR", rows).value == pytest.approx((20 * math.log10(peak / 2) + 100) / 2)


def test_a_cosine_is_of_rows_whatever_their_length_and_0_of_none() -> None:
    theirs = torch.tensor([[1.0, 0.0], [3.0, 4.0], [1.0, 1.0]])
    ours = torch.tensor([[5.0, 0.0], [4.0, -3.0], [NAN, NAN]])
    assert without_labels("embedding", ours, theirs, [2, 1]).value == pytest.approx(1 / 3)


def test_no_sample_is_farther_off_than_the_worst_and_one_alone_does_not_hide_the_others() -> None:
    theirs = randn(4, 3)
    ours = theirs.clone()
    ours[1, 2] = INF
    quality = fidelity(network(output=ours), network(output=theirs), unlabelled([3, 1]))
    assert quality.value == pytest.approx(1 - WORST / 4)
    assert math.isfinite(quality.low)
    theirs[0, 0] = NAN  # nothing is compared there
    assert fidelity(network(output=theirs), network(output=theirs.nan_to_num(7)), unlabelled([4])).value < 0
    huge = fidelity(network(output=1e9 * ours[:1]), network(output=0.001 * ours[:1]), unlabelled([1]))
    assert huge.value == 1 - WORST
    with pytest.raises(ModelError, match="no leaf of real numbers"):
        fidelity(network(index=torch.arange(4)), network(index=torch.arange(4)), unlabelled([4]))


def test_labels_anywhere_in_the_data_judge_and_else_the_dense_network() -> None:
    logits = torch.eye(3)[[0, 1, 2, 0]]
    task = task_named("classification", dense=network(output=logits))
    late = task.quality(network(output=logits), data(torch.tensor([-1, -1, 1, 0]), [2, 2]))
    assert (late.metric, late.value, late.n) == ("top-1", 0.5, 2)
    assert task.quality(network(output=logits), unlabelled([2, 2])).metric == "agreement"


def test_chance_is_what_a_random_order_meets() -> None:
    answers, truths = np.array([0.0, 0, 1, 2]), np.array([0.0, 1, 1, 3])
    by_hand = np.mean([[answer == truth for truth in truths] for answer in answers])
    assert chance_of(answers, truths) == pytest.approx(by_hand)
    constant = agreement(network(output=torch.eye(2)[[0] * 4]), network(output=torch.eye(2)[[0] * 4]), unlabelled([4]))
    assert (constant.value, constant.chance) == (1, 1)  # an answer that never changes is worth nothing


@pytest.mark.parametrize("unknown", [0, 3])
def test_a_classifiers_figures_are_torchmetrics(unknown: int) -> None:
    metrics = pytest.importorskip("torchmetrics.functional.classification")
    scores, masks = randn(10, 4), torch.randint(0, 4, (10, 5, 5), generator=torch.Generator().manual_seed(1))
    labels, flags = masks[:, 0, 0].clone(), (randn(10, 4, seed=2) > 0).long()
    maps = randn(10, 4, 5, 5, seed=3)
    labels[:unknown], masks[:unknown], flags[:unknown] = -1, 255, -1
    top1 = task_named("classification").quality(network(output=scores), data(labels, [4, 6]))
    assert top1.value == pytest.approx(float((scores.argmax(1) == labels)[unknown:].double().mean()))
    known = slice(unknown, None)
    precision = metrics.multilabel_average_precision(scores[known].sigmoid(), flags[known], 4)
    assert task_named("multi-label").quality(network(output=scores), data(flags, [4, 6])).value == pytest.approx(
        float(precision), abs=ROUNDING
    )
    jaccard = metrics.multiclass_jaccard_index(maps[known], masks[known], 4)
    assert task_named("segmentation").quality(network(output=maps), data(masks, [4, 6])).value == pytest.approx(
        float(jaccard), abs=ROUNDING
    )


def test_targets_that_nobody_knows_are_no_data() -> None:
    regression, masks = task_named("regression"), torch.full((3, 4, 4), 255)
    with pytest.raises(DataError, match="every target is 0 or not finite"):
        regression.quality(network(output=randn(3, 2)), data(torch.full((3, 2), NAN), [3]))
    with pytest.raises(DataError, match="no pixel of any mask has a class"):
        task_named("segmentation").quality(network(output=randn(3, 2, 4, 4)), data(masks, [3]))


def reference_in(leaf: Tensor, sizes: list[int]) -> Reference:
    return reference_of(network(output=leaf), unlabelled(sizes))


@pytest.mark.parametrize("sizes", [[5], [4, 1], [1, 1, 1, 1, 1]])
def test_a_reference_holds_the_mean_the_spreads_and_the_ends(sizes: list[int]) -> None:
    leaf = 2 + randn(5, 3)
    entry = reference_in(leaf, sizes).leaves["output"]
    rows = leaf.double().numpy()
    units = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    mean_unit = units.mean(0) / np.linalg.norm(units.mean(0))
    assert np.allclose(entry.mean, rows.mean(0))
    assert entry.spread == pytest.approx(np.square(rows - rows.mean(0)).sum(1).mean())
    assert entry.class_spread == pytest.approx(np.square(rows - rows.mean(1, keepdims=True)).sum(1).mean())
    assert entry.unit_spread == pytest.approx(np.square(units - mean_unit).sum(1).mean())
    assert (entry.low, entry.high) == (rows.min(), rows.max())
    assert entry.scale == entry.spread


def test_what_never_changes_is_scaled_by_its_square_and_zeros_by_one() -> None:
    assert reference_in(torch.full((3, 2), 3.0), [3]).leaves["output"].scale == pytest.approx(18)
    assert reference_in(torch.zeros(3, 2), [2, 1]).leaves["output"].scale == 1
    assert math.isnan(reference_in(randn(3), [3]).leaves["output"].class_spread)  # no axis of classes
    constant = {"output": torch.full((3, 2), 3.0)}
    distance = task_named("any", reference=reference_in(constant["output"], [3])).distance
    assert distance({"output": constant["output"] + 3}, constant).tolist() == pytest.approx([1.0] * 3)


def test_a_reference_of_other_leaves_is_told() -> None:
    task = task_named("any", reference=reference_in(randn(3, 2), [3]))
    for leaves, words in (
        ({"output": randn(3, 4)}, r"leaf 'output' is \[N, 4\], the mean answer was taken of \[N, 2\]"),
        ({"other": randn(3, 2)}, "the answer has no leaf 'output'"),
    ):
        with pytest.raises(ModelError, match=words):
            task.says(leaves, None)
    ragged = [{"output": randn(2, 3)}, {"output": randn(2, 4)}]
    with pytest.raises(ModelError, match=r"leaf 'output' is \[N, 3\] for some images and \[N, 4\] for others"):
        reference_of(lambda inputs: ragged[int(inputs[0]) // 2], unlabelled([2, 2]))


@pytest.mark.parametrize("name", ["any", "regression", "classification", "embedding"])
def test_nothing_is_compared_where_the_dense_answer_is_not_finite(name: str) -> None:
    dense = randn(4, 3)
    dense[1, 2] = NAN
    task = task_named(name, reference=reference_in(dense, [4]))
    same = task.distance({"output": dense.nan_to_num(50.0)}, {"output": dense})
    assert same.tolist() == pytest.approx([0] * 4, abs=ROUNDING)
    broken = dense.clone()
    broken[0, 0] = NAN
    off = task.distance({"output": broken}, {"output": dense})
    assert [math.isfinite(value) for value in off.tolist()] == [False, True, True, True]
    assert relative_error(task, [({"output": broken}, {"output": dense})]) == INF


def test_an_error_over_uneven_batches_counts_every_sample_alike() -> None:
    dense, task = randn(7, 3), task_named("any", reference=reference_in(randn(7, 3), [7]))
    other = dense + randn(7, 3, seed=1)
    parts = [slice(0, 6), slice(6, 7)]
    pairs = [({"output": other[part]}, {"output": dense[part]}) for part in parts]
    assert relative_error(task, pairs) == pytest.approx(
        float(task.distance({"output": other}, {"output": dense}).mean())
    )
    with pytest.raises(DataError, match="no answers to compare"):
        relative_error(task, [])


def test_a_constant_on_all_classes_changes_no_answer_but_one_channel_is_no_class() -> None:
    dense = randn(4, 3)
    task = task_named("classification")
    assert task.distance({"output": dense + 5}, {"output": dense}).tolist() == pytest.approx([0] * 4, abs=ROUNDING)
    maps = task_named("segmentation", reference=reference_in(randn(4, 1, 2, 2), [4]))
    assert maps.distance({"output": randn(4, 1, 2, 2) + 5}, {"output": randn(4, 1, 2, 2)}).min() > 1


def test_entropy_and_divergence_are_those_of_a_coin() -> None:
    assert entropy(torch.tensor([0.5, 0.0, 1.0])).tolist() == pytest.approx([math.log(2), 0, 0])
    ours, theirs = torch.tensor([0.25, 0.5, 0.0, 1.0]), torch.tensor([0.5, 0.5, 0.0, 0.0])
    by_hand = [0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75), 0, 0, 7 * math.log(10)]
    assert divergence(ours, theirs).tolist() == pytest.approx(by_hand, abs=0.2)  # float32 rounds 1 - 1e-7
    assert divergence(ours, theirs)[:3].tolist() == pytest.approx(by_hand[:3], abs=ROUNDING)


def test_255_is_a_class_where_there_are_as_many() -> None:
    masks = torch.tensor([[[255, 254, -1]]])
    assert masks_of(torch.zeros(1, 256, 1, 3), masks).tolist() == [[[255, 254, -1]]]  # type: ignore[union-attr]
    assert masks_of(torch.zeros(1, 255, 1, 3), masks).tolist() == [[[-1, 254, -1]]]  # type: ignore[union-attr]


@pytest.mark.parametrize("sides", [(3,), (3, 4), (2, 3, 4)])
def test_maps_of_one_two_and_three_sides_are_enlarged(sides: tuple[int, ...]) -> None:
    ramp = torch.zeros(2, 1, *sides) + torch.arange(float(sides[-1]))
    large = sized_like(ramp, torch.zeros(2, *(2 * side for side in sides)))
    assert large.shape == (2, 1, *(2 * side for side in sides))
    inner = large.flatten(0, -2)[0, 1:-1]
    assert torch.allclose(inner, torch.arange(len(inner)) / 2 + 0.25)


def test_leaves_are_told_apart_by_their_form() -> None:
    leaves = {"index": torch.arange(2), "row": randn(2, 3), "map": randn(2, 1, 4, 4), "logits": randn(2, 5, 2)}
    assert class_leaf(leaves)[0] == "row"  # logits [N, C] alone go first
    assert map_leaf(leaves)[0] == "map"
    assert leaf_like(leaves, torch.zeros(2, 4, 4))[0] == "map"
    assert leaf_like(leaves, torch.zeros(2, 5, 2, 1))[0] == "logits"
    with pytest.raises(ModelError, match=r"answers with index \[2\] \(int64\), row"):
        leaf_like(leaves, torch.zeros(2, 6))
    half = torch.tensor([1.0, NAN, INF]).half()
    assert (finite(half).dtype, finite(half).tolist()) == (torch.float32, [1, 0, 0])
    assert per_sample(torch.ones(2, 3, 4)).tolist() == [12, 12]
    assert per_sample(torch.ones(2)).tolist() == [1, 1]


@pytest.mark.parametrize(
    ("targets", "labelled"),
    [
        (None, False), (torch.tensor([-1, -1]), False), (torch.tensor([-1, 0]), True), (torch.tensor([-1.0]), True),
        (torch.full((2, 3), -1), True), (torch.zeros(0, 4), False), ([{}], True),
    ],
)  # fmt: skip
def test_minus_one_alone_is_no_label(targets: Any, labelled: bool) -> None:
    assert is_labelled(targets) is labelled


BOX = torch.tensor([[0.0, 0.0, 10.0, 10.0]])


def test_the_pair_of_the_largest_overlap_is_one_first() -> None:
    """By rows the first box would take the second's only match."""
    ours = torch.cat([BOX + torch.tensor([1.0, 0, 1.0, 0]), BOX]).double()
    theirs = torch.cat([BOX, BOX + torch.tensor([4.0, 0, 4.0, 0])]).double()
    labels = torch.zeros(2)
    assert matches({"boxes": ours, "labels": labels}, {"boxes": theirs, "labels": labels}) == 2
    half = {"boxes": torch.tensor([[0.0, 0.0, 10.0, 5.0]]).double(), "labels": labels[:1]}
    assert matches(half, {"boxes": BOX.double(), "labels": labels[:1]}) == 1  # exactly a half is enough
    thin = {"boxes": torch.tensor([[0.0, 0.0, 10.0, 4.9]]).double(), "labels": labels[:1]}
    assert matches(thin, {"boxes": BOX.double(), "labels": labels[:1]}) == 0


def test_f1_counts_boxes_with_an_area_and_a_quarter_of_certainty() -> None:
    dense = {"boxes": BOX.expand(2, 3, 4), "scores": torch.tensor([[0.25, 0.2, 0.0], [0.9, 0.1, 0.1]])}
    dense["labels"] = torch.zeros(2, 3)
    ours = {**dense, "scores": torch.tensor([[0.3, 0.3, 0.1], [0.1, 0.1, 0.9]])}
    empty = torch.tensor([0.0, 0.0, 0.0, 10.0])
    ours["boxes"] = torch.stack([torch.stack([BOX[0], BOX[0], BOX[0]]), torch.stack([BOX[0], BOX[0], empty])])
    quality = matched_f1(corners)(network(**ours), network(**dense), unlabelled([1, 1]))
    assert quality.value == pytest.approx(2 * 1 / (2 + 2))  # two of ours on one of theirs; none on the other


@pytest.mark.parametrize(
    ("image", "words"),
    [
        ({"scores": torch.tensor(0.5)}, r"scores \[\], labels \[1\], expected boxes \[k, 4\] and the others \[k\]"),
        ({"scores": torch.tensor([[0.5]])}, r"scores \[1, 1\]"),
        ({"boxes": BOX[0]}, r"boxes \[4\]"),
        ({"boxes": torch.zeros(1, 5)}, r"boxes \[1, 5\]"),
        ({"labels": torch.tensor([0.5])}, "labels that are no whole numbers"),
        ({"labels": ["cat"]}, r"an image of boxes \(Tensor\), scores \(Tensor\), labels \(list\), expected tensors"),
    ],
)
def test_an_image_of_another_form_is_told(image: dict[str, Any], words: str) -> None:
    whole = {"boxes": BOX, "scores": torch.ones(1), "labels": torch.zeros(1)}
    with pytest.raises(TaskError, match=words):
        decoded(lambda leaves: [{**whole, **image}], {}, 1)
    assert decoded(lambda leaves: [{**whole, "labels": [1]}], {}, 1)[0]["labels"].tolist() == [1]
    (none,) = decoded(lambda leaves: [{"boxes": [], "scores": [], "labels": []}], {}, 1)
    assert none["boxes"].shape == (0, 4)


def test_every_image_of_a_batch_has_its_boxes() -> None:
    leaves = {"boxes": BOX[None], "scores": torch.ones(1, 1), "labels": torch.zeros(1, 1)}
    truth = {"boxes": BOX, "labels": torch.zeros(1)}
    with pytest.raises(DataError, match="targets for 2 images of a batch of 1"):
        average_precision(corners)(network(**leaves), [(torch.arange(1), [truth, truth])])
    with pytest.raises(DataError, match="no images to judge"):
        average_precision(corners)(network(**leaves), [])


class Callable_:
    def __call__(self, leaves: object) -> object:
        raise ValueError("bad")


def test_a_function_is_placed_through_partials_and_objects_and_without_a_line_by_its_name() -> None:
    made = partial(partial(Callable_(), 1))
    line = Callable_.__call__.__code__.co_firstlineno
    assert place_of(made) == f"Callable_ ({__file__}, line {line})"
    assert (name_of(made), place_of(math.sqrt)) == ("Callable_", "sqrt")
    with pytest.raises(TaskError, match=r"Callable_ \(.*, given as loss, raises ValueError: bad"):
        call(made, "loss")

    def exhausted() -> None:
        raise torch.OutOfMemoryError("full")

    with pytest.raises(torch.OutOfMemoryError, match="full"):  # whoever halves batches waits for it
        call(exhausted, "loss")


def test_what_is_lost_without_labels_is_what_is_not_said() -> None:
    leaf, none = randn(4, 3), torch.full((4,), -1)
    for name in ("regression", "embedding", "any"):
        task = task_named(name, reference=reference_in(leaf, [4]))
        assert torch.equal(task.loss({"output": leaf}, none), -task.says({"output": leaf}, none))
    task = task_named("multi-label")  # its own decisions stand for labels: of a probability p those of p or 1 - p
    loss = task.loss({"output": leaf}, none)
    assert torch.allclose(loss, functional.softplus(-leaf.abs()).mean(1))
