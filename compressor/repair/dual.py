"""Ridge regression where a layer has more features than rows are looked at: rows and targets in, weights out.

The weights are `start + A.mT X` with one coefficient for each row and output: `(X X.mT + n ridge s) A = E`, E what
`start` leaves of the targets, s the mean square of a feature. A matrix of n x n instead of features x features; the
same solution as `least_squares`'s (Saunders, Gammerman & Vovk 1998). Knows nothing of graphs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .least_squares import least_of


@dataclass(frozen=True, slots=True)
class Sample:
    """Rows [n, features], targets [n, outputs], and the fold of each row, 0 or 1."""

    x: Tensor
    y: Tensor
    fold: Tensor

    @classmethod
    def joined(cls, chunks: Sequence[Sample]) -> Sample:
        """One behind the other."""
        x = torch.cat([chunk.x for chunk in chunks])
        y = torch.cat([chunk.y for chunk in chunks])
        return cls(x, y, torch.cat([chunk.fold for chunk in chunks]))

    def to(self, device: torch.device) -> Sample:
        """The same there."""
        return Sample(self.x.to(device), self.y.to(device), self.fold.to(device))

    def error(self, weights: Tensor, offset: Tensor) -> float:
        """Mean squared error per row, summed over all outputs."""
        outputs = torch.addmm(offset.to(self.x), self.x, weights.to(self.x).mT)
        return float((self.y - outputs).square().sum(dtype=torch.float64)) / max(len(self.x), 1)

    def variance(self) -> float:
        """The targets' variance, summed over all outputs."""
        return float((self.y - self.y.mean(0)).square().sum(dtype=torch.float64)) / max(len(self.y), 1)


def fit(
    sample: Sample, ridges: Sequence[float], start: Tensor, offset: Tensor, *, intercept: bool
) -> tuple[float, Tensor, Tensor] | None:
    """Ridge, weights [outputs, features] and offset [outputs]; None where `start` and its `offset` err less.

    The ridge is chosen on the fold that was not fitted; the middle one where all rows are of one fold.
    """
    unexplained = sample.y - sample.x @ start.to(sample.x).mT  # [n, outputs]
    kernel = _kernel(sample.x, intercept).double()  # [n, n]
    features = sample.x.shape[1]
    folds = [torch.nonzero(sample.fold == number).flatten() for number in (0, 1)]

    ridge = sorted(ridges)[len(ridges) // 2]
    if all(map(len, folds)):
        ridge, error = _held_out_ridge(kernel, unexplained, folds, ridges, features, intercept)
        if error > _held_out_error(unexplained, offset, folds):
            return None

    mean_x, mean_y = _origin(sample.x, intercept), _origin(unexplained, intercept)
    coefficients = _solved(kernel, (unexplained - mean_y).double(), ridge, features)
    if coefficients is None:
        return None
    change = coefficients.to(sample.x).mT @ (sample.x - mean_x)  # [outputs, features]
    change = change.double()
    return ridge, start + change, mean_y.double() - change @ mean_x.double()


def _held_out_ridge(
    kernel: Tensor, unexplained: Tensor, folds: list[Tensor], ridges: Sequence[float], features: int, intercept: bool
) -> tuple[float, float]:
    """The ridge that errs least where either fold is fitted and the other judges, and that error."""
    first, second = folds
    trials = (
        _HeldOut(kernel, unexplained, first, second, features, intercept),
        _HeldOut(kernel, unexplained, second, first, features, intercept),
    )
    return least_of(sorted(ridges), lambda strength: sum(trial.error(strength) for trial in trials))


def _held_out_error(unexplained: Tensor, offset: Tensor, folds: Sequence[Tensor]) -> float:
    """What is left where nothing is refitted: squares summed over outputs, a mean over each fold's rows."""
    lacks = [unexplained[rows] - offset.to(unexplained) for rows in folds]
    return float(sum(lack.square().sum(dtype=torch.float64) / len(lack) for lack in lacks))


def _origin(rows: Tensor, intercept: bool) -> Tensor:
    """The point that rows [n, ...] are counted from: their mean where an intercept is fitted, else zero."""
    return rows.mean(0) if intercept else torch.zeros_like(rows[0])


def _kernel(x: Tensor, intercept: bool) -> Tensor:
    """[n, n] products of rows with each other, counted from their origin."""
    if intercept:
        x = x - _origin(x, intercept)
    return x @ x.mT


def _solved(kernel: Tensor, targets: Tensor, ridge: float, features: int) -> Tensor | None:
    """[n, outputs] coefficients; None where the system is numerically singular."""
    penalty = ridge * max(float(kernel.diagonal().sum()) / features, torch.finfo(torch.float32).tiny)
    system = kernel.clone()
    system.diagonal().add_(penalty)  # trace / (n features) is a feature's mean square; times n
    factor, failed = torch.linalg.cholesky_ex(system)
    return None if bool(failed) else torch.cholesky_solve(targets, factor)


class _HeldOut:
    """One fold fitted, the other judging, both counted from the fitted fold's mean."""

    def __init__(
        self, kernel: Tensor, unexplained: Tensor, fitted: Tensor, judge: Tensor, features: int, centred: bool
    ) -> None:
        """`fitted` and `judge` are the rows of either fold."""
        inner, across = kernel[fitted][:, fitted], kernel[judge][:, fitted]
        targets, judged = unexplained[fitted].double(), unexplained[judge].double()
        if centred:
            # (x - m).T (z - m) = x.T z - x.T m - m.T z + m.T m, m the fitted rows' mean: means of the kernel's entries
            column, corner = inner.mean(0), inner.mean()
            across = across - across.mean(1, keepdim=True) - column + corner
            inner = inner - column - column.unsqueeze(1) + corner
            judged, targets = judged - targets.mean(0), targets - targets.mean(0)
        self.inner, self.across, self.features = inner, across, features
        self.targets, self.judged = targets, judged

    def error(self, ridge: float) -> float:
        """Mean squared error of the judging rows, summed over all outputs; infinite where the system is singular."""
        coefficients = _solved(self.inner, self.targets, ridge, self.features)
        if coefficients is None:
            return float("inf")
        return float((self.judged - self.across @ coefficients).square().sum()) / len(self.judged)
