"""Ridge regression from streamed sums against numpy on the rows themselves, and the choice of its strength."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from compressor.repair.least_squares import (
    Moments,
    MomentSums,
    choose_ridge,
    correction,
    factor_of,
    intercept_of,
    least_of,
    own_error,
    problem_of,
    sketched,
    spread_evenly,
    squared_error,
    unexplained_by,
    variance_of,
)

# Systems of six well-conditioned unknowns in float64.
EXACT = 1e-9

GROUPS, FEATURES, OUTPUTS, ROWS = 2, 6, 3, 40


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def rows_and_targets(seed: int = 0, rows: int = ROWS) -> tuple[Tensor, Tensor]:
    """Rows with a mean and targets with an intercept: [groups, rows, features] and [groups, rows, outputs]."""
    x = numbers(GROUPS, rows, FEATURES, seed=seed) + torch.arange(FEATURES)
    y = x @ numbers(GROUPS, FEATURES, OUTPUTS, seed=7) + 3 + 0.1 * numbers(GROUPS, rows, OUTPUTS, seed=seed + 1)
    return x, y


def moments_of(x: Tensor, y: Tensor, *, shift: float = 0.0, batches: int = 4) -> Moments:
    origin = (x.mean(1) + shift, y.mean(1) - shift)
    sums = MomentSums(len(x), x.shape[2], y.shape[2], torch.device("cpu"), origin)
    for rows, targets in zip(x.chunk(batches, 1), y.chunk(batches, 1), strict=True):
        sums.add(rows, targets)
    return sums.moments()


def ridge_by_hand(x: Tensor, y: Tensor, ridge: float, *, intercept: bool) -> tuple[Tensor, Tensor]:
    """Numpy's least squares on rows with the penalty as further rows: [outputs, features] and [outputs]."""
    mean_x = x.mean(0) if intercept else torch.zeros(x.shape[1], dtype=x.dtype)
    mean_y = y.mean(0) if intercept else torch.zeros(y.shape[1], dtype=y.dtype)
    centred = (x - mean_x).numpy()
    penalty = np.sqrt(ridge * (centred**2).mean() * len(x))
    rows = np.concatenate([centred, penalty * np.eye(x.shape[1])])
    targets = np.concatenate([(y - mean_y).numpy(), np.zeros((x.shape[1], y.shape[1]))])
    weights = torch.from_numpy(np.linalg.lstsq(rows, targets, rcond=None)[0].T.copy())
    return weights, mean_y - weights @ mean_x


@pytest.mark.parametrize("shift", [0.0, 5.0])
def test_sums_do_not_depend_on_where_they_are_counted_from_nor_on_batches(shift: float) -> None:
    x, y = rows_and_targets()
    moments = moments_of(x, y, shift=shift, batches=7)
    torch.testing.assert_close(moments.x, x.sum(1), atol=EXACT, rtol=0)
    torch.testing.assert_close(moments.xx, x.mT @ x, atol=1e3 * EXACT, rtol=0)
    torch.testing.assert_close(moments.xy, x.mT @ y, atol=1e3 * EXACT, rtol=0)
    torch.testing.assert_close(moments.yy, y.square().sum(1), atol=1e3 * EXACT, rtol=0)


def test_two_folds_add_up_to_the_whole() -> None:
    x, y = rows_and_targets()
    halves = moments_of(x[:, :15], y[:, :15]) + moments_of(x[:, 15:], y[:, 15:])
    for part, whole in zip(halves.tensors(), moments_of(x, y).tensors(), strict=True):
        torch.testing.assert_close(part, whole, atol=1e3 * EXACT, rtol=0)


@pytest.mark.parametrize("intercept", [True, False])
@pytest.mark.parametrize("ridge", [1e-8, 1e-2, 10.0])
def test_the_solution_is_numpys_with_the_penalty_as_rows(ridge: float, intercept: bool) -> None:
    x, y = rows_and_targets()
    problem = problem_of(moments_of(x, y), intercept)
    weights = correction(problem, ridge)
    assert weights is not None
    offset = intercept_of(problem, weights)
    for group in range(GROUPS):
        expected, expected_offset = ridge_by_hand(x[group], y[group], ridge, intercept=intercept)
        torch.testing.assert_close(weights[group], expected, atol=1e2 * EXACT, rtol=0)
        torch.testing.assert_close(offset[group], expected_offset, atol=1e3 * EXACT, rtol=0)


def test_an_error_from_sums_is_the_rows_own() -> None:
    x, y = rows_and_targets()
    weights, offset = numbers(GROUPS, OUTPUTS, FEATURES, seed=3), numbers(GROUPS, OUTPUTS, seed=4)
    by_rows = float((x @ weights.mT + offset.unsqueeze(1) - y).square().sum() / ROWS)
    moments = moments_of(x, y)
    assert squared_error(moments, weights, offset) == pytest.approx(by_rows, rel=EXACT)
    assert own_error(unexplained_by(weights, moments), offset) == pytest.approx(by_rows, rel=EXACT)


def test_what_weights_leave_unexplained_is_the_moments_of_the_differences() -> None:
    x, y = rows_and_targets()
    start = numbers(GROUPS, OUTPUTS, FEATURES, seed=3)
    left, by_rows = unexplained_by(start, moments_of(x, y)), moments_of(x, y - x @ start.mT)
    for part, whole in zip(left.tensors(), by_rows.tensors(), strict=True):
        torch.testing.assert_close(part, whole, atol=1e4 * EXACT, rtol=0)


def test_the_variance_is_of_the_targets() -> None:
    x, y = rows_and_targets()
    assert variance_of(moments_of(x, y)) == pytest.approx(float(y.var(1, correction=0).sum()), rel=1e2 * EXACT)


def test_a_group_without_any_input_keeps_the_others_solvable() -> None:
    x, y = rows_and_targets()
    x[0] = 0
    problem = problem_of(moments_of(x, y), intercept=True)
    assert factor_of(problem, 1e-3) is not None
    weights = correction(problem, 1e-3)
    assert weights is not None
    assert weights[0].abs().max() < 1e-6
    assert factor_of(problem, 0.0) is None


@pytest.mark.parametrize("intercept", [True, False])
def test_the_chosen_strength_has_the_least_error_on_the_other_fold(intercept: bool) -> None:
    ridges = [10.0**power for power in range(-6, 3)]
    x, y = rows_and_targets(rows=16)
    y = y + 4 * numbers(GROUPS, 16, OUTPUTS, seed=9)  # so noisy that a strong ridge pays
    halves = [slice(0, 8), slice(8, 16)]

    def held_out(ridge: float) -> float:
        total = 0.0
        for fitted, judge in (halves, halves[::-1]):
            for group in range(GROUPS):
                weights, offset = ridge_by_hand(x[group, fitted], y[group, fitted], ridge, intercept=intercept)
                total += float((x[group, judge] @ weights.T + offset - y[group, judge]).square().sum() / 8)
        return total

    zero = torch.zeros(GROUPS, OUTPUTS, dtype=torch.float64)
    folds = [moments_of(x[:, part], y[:, part], batches=1) for part in halves]
    assert choose_ridge(folds, ridges, zero, intercept=intercept) == min(ridges, key=held_out)


def test_mixtures_of_outputs_have_the_products_of_all_of_them_on_average() -> None:
    xy = numbers(GROUPS, FEATURES, 3000, seed=1)
    few = sketched(xy, 1000)
    assert few.shape == (GROUPS, FEATURES, 1000)
    torch.testing.assert_close(few @ few.mT / 3000, xy @ xy.mT / 3000, atol=0.15, rtol=0)  # 5 times 1000 ** -0.5
    assert torch.equal(few, sketched(xy, 1000))


@pytest.mark.parametrize("noise", [0.1, 3.0, 30.0])
def test_some_mixtures_of_many_outputs_choose_the_strength_that_all_of_them_do(noise: float) -> None:
    outputs, ridges = 300, [10.0**power for power in range(-6, 3)]
    x = numbers(1, 24, 8, seed=3)
    y = x @ numbers(1, 8, outputs, seed=4) + noise * numbers(1, 24, outputs, seed=5)
    zero = torch.zeros(1, outputs, dtype=torch.float64)
    folds = [moments_of(x[:, part], y[:, part], batches=1) for part in (slice(0, 12), slice(12, 24))]
    of_all = choose_ridge(folds, ridges, zero, intercept=True)
    assert choose_ridge(folds, ridges, zero, intercept=True, sketch=100) == of_all
    assert choose_ridge(folds, ridges, zero, intercept=True, sketch=300) == of_all


@pytest.mark.parametrize("noise", [1.0, 3.0, 30.0])
def test_some_groups_choose_the_strength_that_all_of_them_do(noise: float) -> None:
    groups, ridges = 60, [10.0**power for power in range(-6, 3)]
    x = numbers(groups, 24, 8, seed=3)
    y = x @ numbers(groups, 8, 5, seed=4) + noise * numbers(groups, 24, 5, seed=5)
    zero = torch.zeros(groups, 5, dtype=torch.float64)
    folds = [moments_of(x[:, part], y[:, part], batches=1) for part in (slice(0, 12), slice(12, 24))]
    of_all = choose_ridge(folds, ridges, zero, intercept=True)
    assert choose_ridge(folds, ridges, zero, intercept=True, sketch=100) == of_all

    of_20_groups = [fold.of_groups(spread_evenly(groups, 20)) for fold in folds]
    assert choose_ridge(of_20_groups, ridges, zero[:20], intercept=True) == of_all


@pytest.mark.parametrize(
    ("count", "most", "places"), [(8, 2, [2, 6]), (5, 2, [1, 3]), (3, 9, [0, 1, 2]), (1, 1, [0]), (16, 1, [8])]
)
def test_places_lie_evenly(count: int, most: int, places: list[int]) -> None:
    assert spread_evenly(count, most).tolist() == places


def test_own_weights_that_are_better_stay_and_one_fold_alone_takes_the_middle() -> None:
    x, y = rows_and_targets()
    exact = y - y  # nothing is left unexplained: any change of the weights is noise
    noisy = exact + 1e-3 * numbers(GROUPS, ROWS, OUTPUTS, seed=5)
    zero = torch.zeros(GROUPS, OUTPUTS, dtype=torch.float64)
    folds = [moments_of(x[:, :8], noisy[:, :8], batches=1), moments_of(x[:, 8:16], noisy[:, 8:16], batches=1)]
    assert choose_ridge(folds, [1e-8], zero, intercept=True) is None
    empty = MomentSums(GROUPS, FEATURES, OUTPUTS, torch.device("cpu"), (x.mean(1), y.mean(1))).moments()
    assert choose_ridge([folds[0], empty], [1.0, 1e-4, 1e-2], zero, intercept=True) == 1e-2


@pytest.mark.parametrize("best", range(7))
def test_a_valley_is_found_from_the_middle_and_few_are_asked(best: int) -> None:
    asked: list[float] = []

    def error(ridge: float) -> float:
        asked.append(ridge)
        return abs(ridge - best)

    assert least_of(range(7), error) == (best, 0.0)
    assert len(asked) == len(set(asked)) <= abs(best - 3) + 3


def test_strengths_that_leave_a_singular_system_are_passed_over() -> None:
    assert least_of(range(7), lambda ridge: math.inf if ridge < 5 else float(ridge)) == (5, 5.0)
    assert math.isinf(least_of(range(3), lambda ridge: math.inf)[1])
