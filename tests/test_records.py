"""Derived figures of the records, against their definitions."""

from __future__ import annotations

import math

import numpy as np
import pytest

from compressor.records import Accuracy, Cost, Group, Groups, Quality, lost

ROUNDING = 1e-12  # of float64, in numbers of about one


@pytest.mark.parametrize("n", [1, 10, 100, 1000])
@pytest.mark.parametrize("share", [0.0, 0.3, 0.9, 1.0])
def test_the_interval_ends_where_wilsons_equation_holds(n: int, share: float) -> None:
    """Wilson 1927: the bounds are the p whose distance from the observed share is 1.96 of their own errors."""
    accuracy = Accuracy(round(share * n), n)
    low, high = accuracy.interval
    assert 0 <= low <= accuracy.top1 + ROUNDING
    assert accuracy.top1 - ROUNDING <= high <= 1
    for bound in (low, high):
        error = math.sqrt(bound * (1 - bound) / n)
        if 1e-9 < bound < 1 - 1e-9:
            assert abs(bound - accuracy.top1) == pytest.approx(1.959963984540054 * error, rel=1e-6)


def test_more_images_narrow_the_interval_and_it_is_never_empty() -> None:
    widths = [high - low for low, high in (Accuracy(9 * n // 10, n).interval for n in (10, 100, 1000, 10_000))]
    assert widths == sorted(widths, reverse=True)
    assert Accuracy(10, 10).interval[0] < 1
    assert Accuracy(0, 10).interval[1] > 0


@pytest.mark.parametrize(
    ("accuracy", "above"),
    [
        (Accuracy(90, 100, chance=0.1), True),
        (Accuracy(12, 100, chance=0.1), False),
        (Accuracy(0, 100, chance=0.0), False),
        (Accuracy(100, 100, chance=1.0), False),
        (Accuracy(0, 100), True),  # chance was not counted
    ],
)
def test_above_chance_is_the_whole_interval(accuracy: Accuracy, above: bool) -> None:
    assert accuracy.is_above_chance == above


def test_chance_does_not_make_accuracies_different() -> None:
    assert Accuracy(9, 10, chance=0.1) == Accuracy(9, 10, chance=0.2)
    assert Accuracy(9, 10, 10) != Accuracy(9, 10, 9)


def test_an_accuracy_is_a_quality_of_top1() -> None:
    dense, pruned = Accuracy(9, 10, chance=0.1), Accuracy(8, 10, chance=0.1)
    assert (dense.metric, dense.value, dense.n, dense.is_share) == ("top-1", 0.9, 10, True)
    assert (dense.low, dense.high) == dense.interval
    assert dense.lost(pruned) == lost(dense, pruned) == 100 * (dense.top1 - pruned.top1)


def test_what_is_no_share_is_lost_in_per_cent_of_the_dense_value() -> None:
    dense, pruned = (Quality("PSNR", value, 9, value, value, is_share=False) for value in (40.0, 30.0))
    nothing = Quality("PSNR", 0.0, 9, 0.0, 0.0, is_share=False)
    assert dense.lost(pruned) == 25
    assert (nothing.lost(nothing), nothing.lost(dense)) == (0, -math.inf)
    assert Quality("mIoU", 0.75, 9, 0.5, 0.9).lost(Quality("mIoU", 0.5, 9, 0.4, 0.6)) == 25
    assert dense == Quality("PSNR", 40.0, 9, 40.0, 40.0, is_share=False)


def test_a_quality_is_above_chance_with_its_whole_interval() -> None:
    assert Quality("mIoU", 0.5, 9, 0.4, 0.6, chance=0.3).is_above_chance
    assert not Quality("mIoU", 0.5, 9, 0.4, 0.6, chance=0.45).is_above_chance
    assert Quality("PSNR", 0.5, 9, 0.4, 0.6).is_above_chance  # nobody counted it


def test_a_mac_is_two_flops_and_a_group_is_found_by_name() -> None:
    assert Cost(21, 1, 1).flops == 42
    group = Group("b", "channel", 2, (), np.zeros(2, dtype=np.int64))
    groups = Groups((Group("a", "channel", 2, (), np.zeros(2, dtype=np.int64)), group))
    assert groups["b"] is group
    with pytest.raises(KeyError, match="c"):
        groups["c"]
