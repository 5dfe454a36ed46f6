"""Parity: each figure against its definition, and limits that fail when they should."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from typing import Any

import numpy as np
import pytest

from compressor.device.parity import LIMITS, MOST_RELATIVE, Limits, compare, failures, limits_around
from compressor.errors import GateError

# Closed forms in float64 on a handful of numbers.
EXACT = 1e-12


def test_figures_are_their_definitions() -> None:
    reference = np.array([[3.0, 4.0], [1.0, 0.0]])
    output = np.array([[4.0, 3.0], [1.0, 0.5]])
    found = compare(reference, output)
    assert found.max_abs == 1.0
    assert found.mean_abs == pytest.approx(2.5 / 4, abs=EXACT)
    assert found.cosine == pytest.approx(1 / math.sqrt(1.25), abs=EXACT)  # the second row's; the first has 24/25
    assert found.sqnr_db == pytest.approx(10 * math.log10(26 / 2.25), abs=EXACT)
    assert found.top1_agreement == 0.5
    assert found.reference_max_abs == 4.0


def test_equal_outputs_pass_every_limit_and_go_into_json() -> None:
    values = np.random.default_rng(0).standard_normal((4, 10))
    found = compare(values, values)
    assert failures(found, Limits(relative=0.0, cosine=1 - 1e-9, top1_agreement=1.0)) == ()
    json.dumps(asdict(found), allow_nan=False)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_fails_and_goes_into_json(bad: float) -> None:
    reference = np.ones((2, 3))
    output = reference.copy()
    output[1, 2] = bad
    found = compare(reference, output)
    assert len(failures(found, LIMITS["int8"])) >= 2
    json.dumps(asdict(found), allow_nan=False)


@pytest.mark.parametrize(
    ("limits", "words"),
    [
        (Limits(relative=0.19, cosine=0), "max"),
        (Limits(relative=9, cosine=0.999), "cosine"),
        (Limits(9, 0, 1.0), "top-1"),
    ],
)
def test_every_limit_can_fail_alone(limits: Limits, words: str) -> None:
    found = compare(np.array([[3.0, 4.0], [5.0, 0.0]]), np.array([[4.0, 3.0], [5.0, 0.0]]))
    assert [words in line for line in failures(found, limits)] == [True]


def test_of_several_outputs_the_worst_counts() -> None:
    scores = np.array([[3.0, 4.0], [1.0, 0.0]])
    maps = np.full((2, 3, 2, 2), 100.0)
    off_by_one = np.array([[4.0, 3.0], [1.0, 0.0]])
    alone = compare(scores, off_by_one)
    found = compare((maps, scores), (maps + 2, off_by_one))  # 2 % of 100 and 25 % of 4
    assert (found.max_abs, found.mean_abs, found.reference_max_abs) == (1.0, 0.5, 4.0)
    assert (found.cosine, found.sqnr_db, found.top1_agreement) == (alone.cosine, alone.sqnr_db, 0.5)
    assert compare((maps,), (maps + 2,)) == compare(maps, maps + 2)

    # the largest difference and the least of each other figure need not be one output's
    shifted = compare((maps, scores), (maps + 60, off_by_one))
    assert (shifted.max_abs, shifted.reference_max_abs) == (60.0, 100.0)
    assert (shifted.cosine, shifted.top1_agreement) == (alone.cosine, 0.5)


def test_whole_numbers_are_equal_or_not() -> None:
    reference = np.array([900, 2, 5, 7])
    found = compare(reference, np.array([901, 2, 5, 7]))
    assert (found.max_abs, found.mean_abs, found.reference_max_abs) == (0.25, 0.25, 1.0)
    assert (found.cosine, found.top1_agreement) == (1.0, 0.75)
    assert found.sqnr_db == pytest.approx(10 * math.log10(4), abs=EXACT)
    equal = compare(reference, reference)
    assert (equal.max_abs, equal.top1_agreement) == (0.0, 1.0)
    masks = np.zeros((2, 4, 4), bool)
    assert compare(masks, ~masks).max_abs == 1.0
    assert compare(masks, ~masks).top1_agreement == 1.0  # of pixels, not of classes
    assert failures(compare((reference, masks), (reference, ~masks)), LIMITS["fp32"])


def test_only_a_row_of_numbers_is_of_classes() -> None:
    maps = np.random.default_rng(0).standard_normal((3, 4, 2, 2))
    assert compare(maps, -maps).top1_agreement == 1.0
    assert compare(maps[:, :, :1, :1], -maps[:, :, :1, :1]).top1_agreement == 0.0


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_one_output_that_is_not_finite_is_the_worst(bad: float) -> None:
    values, odd = np.ones((2, 3)), np.ones((2, 3, 2))
    odd[1, 2, 0] = bad
    found = compare((values, np.ones((2, 3, 2))), (values, odd))
    assert len(failures(found, LIMITS["int8"])) >= 2
    json.dumps(asdict(found), allow_nan=False)


@pytest.mark.parametrize(
    ("reference", "output", "words"),
    [
        ((), (), "there are no outputs, so nothing was compared"),
        ((np.ones((2, 3)),) * 2, (np.ones((2, 3)),) * 3, "there are 3 outputs, the reference has 2"),
        (
            (np.ones((2, 3)), np.ones(2)),
            (np.ones((2, 3)), np.ones(3)),
            r"^output 1 \(best\): the outputs have shape \[3",
        ),
        ((np.ones((2, 3)), np.ones((2, 0))), (np.ones((2, 3)), np.ones((2, 0))), r"^output 1 .*nothing was compared"),
    ],
)
def test_outputs_that_do_not_go_together_are_no_parity(reference: Any, output: Any, words: str) -> None:
    with pytest.raises(GateError, match=words):
        compare(reference, output, ("scores", "best"))


def _boxes_and_scores(axis: int) -> tuple[np.ndarray, np.ndarray]:
    """Two boxes' sides in pixels and two scores, 200 samples of each, and the same with 0.03 more on the last score."""
    generator = np.random.default_rng(0)
    columns = [640 * generator.random((20, 10)), 320 * generator.random((20, 10)), *generator.random((2, 20, 10))]
    shifted = [*columns[:3], columns[3] + 0.03]
    return np.stack(columns, axis), np.stack(shifted, axis)


@pytest.mark.parametrize("axis", [1, 2])
def test_channels_of_different_units_are_compared_each_by_its_spread(axis: int) -> None:
    reference, output = _boxes_and_scores(axis)
    found = compare((np.ones((20, 2)), reference), (np.ones((20, 2)), output), ("fixed", "places"))
    spread = np.ptp(np.moveaxis(reference, axis, 0)[3])
    assert found.channel_relative == pytest.approx(0.03 / spread, abs=EXACT)
    assert found.channel == f"output 1 (places): channel 3 of axis {axis}"
    assert failures(found, Limits(relative=1e-3, cosine=0.99999)) == ()  # over the whole it is nothing
    (line,) = failures(found, LIMITS["fp32"])
    assert "output 1 (places): channel 3 of axis" in line
    json.dumps(asdict(found), allow_nan=False)


def test_rounding_of_the_whole_is_no_fault_of_a_small_channel() -> None:
    reference, _ = _boxes_and_scores(1)
    reference[:, 3] *= 1e-7
    assert failures(compare(reference, reference + 5e-7 * 640), LIMITS["fp32"]) == ()
    assert failures(compare(reference, reference + 2e-6 * 640), LIMITS["fp32"]) != ()


def test_channels_of_one_unit_are_left_to_the_whole() -> None:
    values = np.random.default_rng(0).standard_normal((8, 5, 4, 4))
    assert compare(values, values + 0.1).channel_relative is None
    assert compare(0 * values, values).channel_relative is None
    assert compare(values, np.full_like(values, np.nan)).channel_relative is None


def test_a_device_is_held_to_the_channels_too() -> None:
    reference, output = _boxes_and_scores(1)
    near, far = compare(reference, reference + 1e-4), compare(reference, output)
    assert limits_around(near).channel == 0.05  # other formats than the reference's
    assert failures(far, limits_around(near)) == ()
    assert failures(compare(reference, output + 0.03), limits_around(near)) != ()
    assert limits_around(far).channel == pytest.approx(2 * far.channel_relative, abs=EXACT)
    assert limits_around(compare(np.ones((2, 3)), np.ones((2, 3)))).channel is None


def test_answers_that_hardly_vary_keep_to_the_limit_made_from_them() -> None:
    """Random weights: channels spread 1e-4 and 1e-2 of their magnitude, and int8 moves all by twenty of the first."""
    reference = 1 + np.linspace(0, 1, 8)[:, None] * np.array([1e-4, 1e-2])  # [N, C]
    moved = compare(reference, reference + 2e-3)
    assert moved.channel_relative is not None
    assert moved.channel_relative > MOST_RELATIVE
    limits = limits_around(moved)
    assert failures(moved, limits) == ()
    assert failures(compare(reference, reference + 5e-3), limits) != ()


def test_other_shapes_are_no_parity() -> None:
    with pytest.raises(GateError, match=r"\[2, 3\].*\[2, 4\]"):
        compare(np.ones((2, 4)), np.ones((2, 3)))


def test_limits_around_a_parity_allow_it_with_slack_and_no_more() -> None:
    reference = np.array([[3.0, 4.0], [5.0, 0.0]])
    found = compare(reference, reference + np.array([[0.1, -0.1], [0, 0]]))
    twice = compare(reference, reference + np.array([[0.25, -0.25], [0, 0]]))
    limits = limits_around(found, slack=2.0)
    assert failures(found, limits) == ()
    assert len(failures(twice, limits)) == 2
