"""The rows' form of ridge regression against the features' form, weights and chosen strength alike."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from compressor.repair.dual import Sample, fit
from compressor.repair.least_squares import (
    Moments,
    MomentSums,
    correction,
    intercept_of,
    problem_of,
    unexplained_by,
)

# One matrix of rows against one of features, both float64.
EXACT = 1e-8

ROWS, FEATURES, OUTPUTS = 12, 30, 3
RIDGES = [10.0**power for power in range(-4, 3)]


def numbers(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def sample(noise: float = 0.3) -> Sample:
    x = numbers(ROWS, FEATURES, seed=0) + 1
    y = x @ numbers(FEATURES, OUTPUTS, seed=1) + 2 + noise * numbers(ROWS, OUTPUTS, seed=2)
    return Sample(x, y, torch.arange(ROWS) % 2)


def moments_of(rows: Sample) -> Moments:
    x, y = rows.x.unsqueeze(0), rows.y.unsqueeze(0)
    sums = MomentSums(1, FEATURES, OUTPUTS, torch.device("cpu"), (x.mean(1), y.mean(1)))
    sums.add(x, y)
    return sums.moments()


@pytest.mark.parametrize("intercept", [True, False])
@pytest.mark.parametrize("ridge", [1e-4, 1e-1, 10.0])
def test_rows_and_features_lead_to_the_same_weights(ridge: float, intercept: bool) -> None:
    rows, start, offset = sample(), 0.1 * numbers(OUTPUTS, FEATURES, seed=3), torch.zeros(OUTPUTS).double()
    fitted = fit(rows, [ridge], start, offset, intercept=intercept)
    assert fitted is not None
    _, weights, refitted_offset = fitted

    problem = problem_of(unexplained_by(start.unsqueeze(0), moments_of(rows)), intercept)
    change = correction(problem, ridge)
    assert change is not None
    torch.testing.assert_close(weights, start + change[0], atol=EXACT, rtol=0)
    if intercept:
        torch.testing.assert_close(refitted_offset, intercept_of(problem, change)[0], atol=EXACT, rtol=0)
    else:
        assert not refitted_offset.any()


@pytest.mark.parametrize("noise", [0.1, 3.0, 30.0])
def test_the_strength_is_the_one_that_serves_the_other_fold_best(noise: float) -> None:
    rows = sample(noise)
    halves = [rows.fold == number for number in (0, 1)]

    def held_out(ridge: float) -> float:
        """By numpy's least squares, the penalty as further rows."""
        total = 0.0
        for fitted, judge in (halves, halves[::-1]):
            x, y = (part.numpy() for part in (rows.x[fitted], rows.y[fitted]))
            penalty = np.sqrt(ridge * (x**2).mean() * len(x)) * np.eye(FEATURES)
            padded = np.concatenate([y, np.zeros((FEATURES, OUTPUTS))])
            weights = np.linalg.lstsq(np.concatenate([x, penalty]), padded, rcond=None)[0]
            total += ((rows.x[judge].numpy() @ weights - rows.y[judge].numpy()) ** 2).sum() / len(x)
        return total

    start, offset = torch.zeros(OUTPUTS, FEATURES).double(), torch.zeros(OUTPUTS).double()
    fitted = fit(rows, RIDGES, start, offset, intercept=False)
    assert fitted is not None
    assert fitted[0] == min(RIDGES, key=held_out)


def test_a_refit_lies_nearer_to_the_targets_than_the_start() -> None:
    rows, start, offset = sample(), torch.zeros(OUTPUTS, FEATURES).double(), torch.zeros(OUTPUTS).double()
    fitted = fit(rows, RIDGES, start, offset, intercept=True)
    assert fitted is not None
    _, weights, refitted_offset = fitted
    assert rows.error(weights, refitted_offset) < 0.2 * rows.error(start, offset)


def test_weights_that_are_already_right_are_not_refitted() -> None:
    weights = numbers(OUTPUTS, FEATURES, seed=3)
    x = numbers(ROWS, FEATURES, seed=0)
    noisy = Sample(x, x @ weights.mT + 1e-3 * numbers(ROWS, OUTPUTS, seed=2), torch.arange(ROWS) % 2)
    assert fit(noisy, [1e-4], weights, torch.zeros(OUTPUTS).double(), intercept=True) is None


def test_rows_of_one_fold_take_the_middle_strength() -> None:
    one_fold = Sample(sample().x, sample().y, torch.zeros(ROWS))
    fitted = fit(
        one_fold, [1.0, 1e-4, 1e-2], torch.zeros(OUTPUTS, FEATURES).double(), torch.zeros(3).double(), intercept=True
    )
    assert fitted is not None
    assert fitted[0] == 1e-2


def test_error_and_variance_are_those_of_the_rows() -> None:
    rows = sample()
    weights, offset = numbers(OUTPUTS, FEATURES, seed=3), numbers(OUTPUTS, seed=4)
    by_hand = float((rows.x @ weights.mT + offset - rows.y).square().sum(1).mean())
    assert rows.error(weights, offset) == pytest.approx(by_hand)
    assert rows.variance() == pytest.approx(float(rows.y.var(0, correction=0).sum()))


def test_chunks_are_joined_in_their_order() -> None:
    rows = sample()
    chunks = [Sample(rows.x[part], rows.y[part], rows.fold[part]) for part in (slice(0, 5), slice(5, ROWS))]
    joined = Sample.joined(chunks)
    assert torch.equal(joined.x, rows.x)
    assert torch.equal(joined.y, rows.y)
    assert torch.equal(joined.fold, rows.fold)
