"""Every metric against a slow derivation of its own, and what networks are told apart from themselves."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from compressor.device.intervals import bootstrap, jackknife, mean_interval
from compressor.errors import DataError
from compressor.records import Quality
from compressor.tasks import agreement, fidelity, task_named

from .answers import data, network, unlabelled

SIZES = [4, 4, 2]
ROUNDING = 1e-12  # of float64, in numbers of about one


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def judge(name: str, leaf: Tensor, targets: object, dense: Tensor | None = None) -> Quality:
    task = task_named(name, dense=None if dense is None else network(output=dense))
    batches = unlabelled(SIZES) if targets is None else data(targets, SIZES)
    quality = task.quality(network(output=leaf), batches)
    assert quality.n == 10
    assert quality.low <= quality.value <= quality.high + ROUNDING
    return quality


def test_top1_is_counted_over_labelled_samples() -> None:
    logits = torch.eye(5)[[0, 1, 2, 3, 4, 0, 1, 2, 3, 4]]
    labels = torch.tensor([0, 1, 2, 3, 0, -1, -1, -1, 0, 4])
    quality = task_named("classification").quality(network(output=logits), data(labels, SIZES))
    assert (quality.metric, quality.value, quality.n) == ("top-1", 5 / 7, 7)
    answers, truths = [0, 1, 2, 3, 4, 3, 4], [0, 1, 2, 3, 0, 0, 4]
    by_hand = np.mean([[answer == truth for truth in truths] for answer in answers])
    assert quality.chance == pytest.approx(by_hand)


def test_mean_iou_is_that_of_sets_of_pixels() -> None:
    logits, masks = randn(10, 3, 4, 4), torch.randint(0, 3, (10, 4, 4), generator=torch.Generator().manual_seed(1))
    masks[0, 0, :2], masks[3] = 255, -1
    quality = judge("segmentation", logits, masks)
    answers = logits.argmax(1)
    ratios = []
    for label in range(3):
        answered = {tuple(p) for p in (answers == label).nonzero().tolist() if int(masks[tuple(p)]) not in (255, -1)}
        true = {tuple(p) for p in (masks == label).nonzero().tolist()}
        ratios.append(len(answered & true) / len(answered | true))
    assert (quality.metric, quality.value) == ("mIoU", pytest.approx(np.mean(ratios)))
    assert quality.low < quality.value < quality.high
    assert abs(quality.chance - quality.value) < 0.1  # the answers are random


def test_a_class_nobody_has_or_answers_does_not_count() -> None:
    masks = torch.randint(0, 2, (10, 4, 4), generator=torch.Generator().manual_seed(1))
    logits = torch.nn.functional.one_hot(masks, 5).permute(0, 3, 1, 2).float()
    assert judge("segmentation", logits, masks).value == 1


def test_psnr_is_that_of_the_mean_squared_error_and_equal_images_have_100() -> None:
    wanted = torch.rand(10, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    answers = wanted + 0.1 * randn(10, 3, 4, 4)
    by_hand = np.mean([10 * math.log10(1 / float(((a - w) ** 2).mean())) for a, w in zip(answers, wanted, strict=True)])
    quality = judge("image-to-image", answers, wanted)
    assert (quality.metric, quality.value) == ("PSNR", pytest.approx(by_hand, rel=1e-6))
    assert not quality.is_share
    assert judge("image-to-image", 255 * answers, (255 * wanted)).value == pytest.approx(by_hand, rel=1e-6)
    assert judge("image-to-image", 2 * answers - 1, 2 * wanted - 1).value == pytest.approx(by_hand, rel=1e-6)
    assert judge("image-to-image", wanted, wanted).value == 100


def test_r_squared_is_one_less_the_unexplained_share_of_the_variance() -> None:
    wanted = 5 + randn(10, 3)
    answers = wanted + 0.3 * randn(10, 3, seed=1)
    w, a = wanted.double().numpy(), answers.double().numpy()
    quality = judge("regression", answers, wanted)
    assert (quality.metric, quality.value) == (
        "R^2",
        pytest.approx(1 - ((w - a) ** 2).sum() / ((w - w.mean(0)) ** 2).sum()),
    )
    assert judge("regression", wanted.mean(0).expand(10, 3), wanted).value == pytest.approx(0, abs=1e-6)
    assert judge("regression", wanted, wanted).value == 1


def test_values_nobody_knows_do_not_count() -> None:
    wanted = 5 + randn(10, 3)
    wanted[3, 1] = float("nan")
    answers = wanted.nan_to_num(7.0) + 0.3 * randn(10, 3, seed=1)
    w, a = np.ma.masked_invalid(wanted.double().numpy()), answers.double().numpy()
    expected = 1 - ((w - a) ** 2).sum() / ((w - w.mean(0)) ** 2).sum()
    assert judge("regression", answers, wanted).value == pytest.approx(float(expected), rel=1e-6)


def test_targets_that_do_not_differ_have_a_relative_error_instead() -> None:
    wanted = torch.full((10, 1), 4.0)
    quality = judge("regression", wanted + 1, wanted)
    assert (quality.metric, quality.value) == ("1 - relative RMSE", pytest.approx(0.75))


def test_retrieval_asks_for_the_nearest_other_sample() -> None:
    rows, identities = randn(10, 4), torch.tensor([0, 0, 1, 1, 2, 2, 0, 1, 5, -1])
    cosines = torch.nn.functional.cosine_similarity(rows[:, None], rows[None], dim=2)
    right = []
    for i in range(8):  # 5 is alone, -1 is nobody
        others = [j for j in range(9) if j != i]
        nearest = max(others, key=lambda j: float(cosines[i, j]))
        right.append(bool(identities[nearest] == identities[i]))
    quality = task_named("embedding").quality(network(output=rows), data(identities, SIZES))
    assert (quality.metric, quality.value, quality.n) == ("retrieval top-1", np.mean(right), 8)
    assert quality.chance == pytest.approx((3 * 2 + 3 * 2 + 2 * 1) / 8 / 8)
    with pytest.raises(DataError, match="no identity has two samples"):
        task_named("embedding").quality(network(output=rows), data(torch.arange(10), SIZES))


def average_precision_by_hand(scores: Tensor, labels: Tensor) -> float:
    """The mean over positives of the precision at their score."""
    precisions = [float(labels[scores >= scores[i]].float().mean()) for i in labels.nonzero()[:, 0]]
    return float(np.mean(precisions))


def test_mean_average_precision_is_the_mean_precision_at_each_positive() -> None:
    pytest.importorskip("torchmetrics")
    scores, labels = randn(10, 4), torch.randint(0, 2, (10, 4), generator=torch.Generator().manual_seed(1))
    scores[0, 0] = scores[1, 0]  # a tie
    labels[:, 3] = 0  # a label nobody has
    quality = judge("multi-label", scores, labels)
    by_hand = [average_precision_by_hand(scores[:, c], labels[:, c]) for c in range(3)]
    assert (quality.metric, quality.value) == ("mean AP", pytest.approx(np.mean(by_hand)))
    assert quality.chance == pytest.approx(float(labels[:, :3].float().mean()))
    with pytest.raises(DataError, match="no sample has any of the labels"):
        judge("multi-label", scores, torch.zeros(10, 4, dtype=torch.int64))


UNLABELLED = {
    "classification": ((10, 5), "agreement"),
    "multi-label": ((10, 5), "label agreement"),
    "segmentation": ((10, 3, 4, 4), "pixel agreement"),
    "embedding": ((10, 5), "mean cosine"),
    "image-to-image": ((10, 3, 4, 4), "PSNR to dense"),
    "regression": ((10, 3), "fidelity"),
    "any": ((10, 3, 2), "fidelity"),
}


@pytest.mark.parametrize("name", UNLABELLED)
def test_without_labels_a_network_is_judged_by_the_dense_ones_answers(name: str) -> None:
    shape, metric = UNLABELLED[name]
    leaf = randn(*shape)
    same, near, far = (judge(name, leaf + noise * randn(*shape, seed=1), None, leaf) for noise in (0.0, 0.2, 3.0))
    assert {same.metric, near.metric, far.metric} == {metric}
    assert same.value == pytest.approx(100 if metric == "PSNR to dense" else 1)
    assert same.value >= near.value > far.value
    with pytest.raises(DataError, match="no labels"):
        judge(name, leaf, None)


def test_agreement_of_classes_has_chance_and_that_of_pixels_is_a_mean_over_images() -> None:
    ours, theirs = randn(10, 3), randn(10, 3, seed=1)
    quality = agreement(network(output=ours), network(output=theirs), unlabelled(SIZES))
    a, b = ours.argmax(1), theirs.argmax(1)
    assert quality.value == pytest.approx(float((a == b).double().mean()))
    assert quality.chance == pytest.approx(float((a[:, None] == b[None]).double().mean()))
    maps, others = randn(10, 3, 4, 4), randn(10, 3, 4, 4, seed=1)
    shares = (maps.argmax(1) == others.argmax(1)).double().mean()
    assert judge("segmentation", maps, None, others).value == pytest.approx(float(shares))


def test_fidelity_is_the_mean_over_leaves_of_one_less_the_relative_error() -> None:
    dense = {
        "a": 100 + 10 * randn(10, 3),
        "b": randn(10, 2, 2),
        "index": torch.arange(10),
        "constant": torch.ones(10, 2),
    }
    pruned = {**dense, "a": dense["a"] + randn(10, 3, seed=1), "b": dense["b"] * 0.7}
    errors = [0.0]
    for name in ("a", "b"):
        d, p = dense[name].double().numpy(), pruned[name].double().numpy()
        errors.append(((d - p) ** 2).sum() / ((d - d.mean(0)) ** 2).sum())
    for sizes in ([10], SIZES):
        quality = fidelity(network(**pruned), network(**dense), unlabelled(sizes))
        assert (quality.metric, quality.n) == ("fidelity", 10)
        assert quality.value == pytest.approx(1 - np.mean(errors), rel=1e-6)
    assert fidelity(network(**dense), network(**dense), unlabelled(SIZES)).value == 1
    mean = {name: leaf.double().mean(0).expand(leaf.shape) for name, leaf in dense.items() if name != "index"}
    expected = 1 / 3  # the constant leaf is met
    assert fidelity(network(**mean), network(**dense), unlabelled(SIZES)).value == pytest.approx(expected, abs=1e-5)
    broken = {**dense, "a": dense["a"] * float("nan")}
    assert fidelity(network(**broken), network(**dense), unlabelled(SIZES)).value < -1000


def test_a_leaf_without_samples_is_not_compared() -> None:
    def with_anchors(inputs: Tensor) -> dict[str, Tensor]:
        return {"output": inputs[:, None].double(), "anchors": torch.rand(50, 4)}

    assert fidelity(with_anchors, with_anchors, unlabelled(SIZES)).value == 1
    answer = with_anchors(torch.arange(10))
    assert task_named("any").distance(answer, answer).tolist() == [0.0] * 10


def test_data_without_a_batch_is_refused() -> None:
    for name in ("classification", "any"):
        with pytest.raises(DataError):
            task_named(name, dense=network(output=randn(2, 3))).quality(network(output=randn(2, 3)), [])


def test_intervals_are_as_wide_as_the_standard_error_says() -> None:
    values = np.random.default_rng(1).normal(0.5, 0.1, 400)
    wide = 2 * 1.96 * values.std() / math.sqrt(400)
    low, high = mean_interval(values)
    assert high - low == pytest.approx(wide, rel=0.2)  # 200 draws place a percentile to about a tenth
    low, high = jackknife(lambda indices: float(values[indices].mean()), 400, float(values.mean()))
    assert high - low == pytest.approx(wide, rel=0.6)  # a spread from ten blocks is sure to a quarter
    assert mean_interval(values) == mean_interval(values)
    assert bootstrap(lambda counts: 1.0, 1, 1.0) == (1.0, 1.0)


def test_lost_is_told_in_points_or_in_per_cent_of_the_dense_value() -> None:
    dense, pruned = (Quality("PSNR", value, 9, value, value, is_share=False) for value in (40.0, 30.0))
    assert dense.lost(pruned) == pytest.approx(25)
    assert Quality("mIoU", 0.8, 9, 0.7, 0.9).lost(Quality("mIoU", 0.75, 9, 0.7, 0.9)) == pytest.approx(5)
