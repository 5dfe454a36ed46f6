"""Ridge regression where a layer has more features than rows are looked at: rows and targets in, weights out.

The weights are `start + A.mT X` with one coefficient for each row and output: `(X X.mT + n ridge s) A = E`, E what
`start` leaves of the targets, s the mean square of a feature. A matrix of n x n instead of features x features; the
same solution as `gram`'s (Saunders, Gammerman & Vovk 1998). Knows nothing of graphs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .gram import least_of


@dataclass(frozen=True, slots=True)
class Sample:
    """Rows [n, features], targets [n, outputs], and the fold of each row, 0 or 1."""

    x: Tensor
    y: Tensor
    fold: Tensor

    @classmethod
    def joined(cls, parts: Sequence[Sample]) -> Sample:
        return cls(*(torch.cat([getattr(part, name) for part in parts]) for name in ("x", "y", "fold")))

    def error(self, weights: Tensor, offset: Tensor) -> float:
        """Mean squared error per row, summed over all outputs."""
        made = torch.addmm(offset.to(self.x), self.x, weights.to(self.x).mT)
        return float((self.y - made).square().sum(dtype=torch.float64)) / max(len(self.x), 1)

    def variance(self) -> float:
        """The targets' variance, summed over all outputs."""
        return float((self.y - self.y.mean(0)).square().sum(dtype=torch.float64)) / max(len(self.y), 1)


def fit(
    sample: Sample, ridges: Sequence[float], start: Tensor, offset: Tensor, *, intercept: bool
) -> tuple[float, Tensor, Tensor] | None:
    """Ridge, weights [outputs, features] and offset [outputs]; None where `start` and its `offset` err less.

    The ridge is chosen on the fold that was not fitted; the middle one where all rows are of one fold.
    """
    left = sample.y - sample.x @ start.to(sample.x).mT  # [n, outputs]
    kernel = _kernel(sample.x, intercept).double()
    rows = [torch.nonzero(sample.fold == number).flatten() for number in (0, 1)]
    features = sample.x.shape[1]
    ridge = sorted(ridges)[len(ridges) // 2]
    if all(len(part) for part in rows):
        trials = [_HeldOut(kernel, left, fitted, judge, features, intercept) for fitted, judge in (rows, rows[::-1])]
        sizes = [len(judge) for judge in (rows[1], rows[0])]

        def error(strength: float) -> float:
            return sum(trial.error(strength) / n for trial, n in zip(trials, sizes, strict=True))

        ridge, least = least_of(sorted(ridges), error)
        unchanged = [(left[part] - offset.to(left)).square().sum(dtype=torch.float64) / len(part) for part in rows]
        if least > float(sum(unchanged)):
            return None
    mean = left.mean(0) if intercept else torch.zeros_like(left[0])
    coefficients = _solved(kernel, (left - mean).double(), ridge, features)
    if coefficients is None:
        return None
    middle = sample.x.mean(0) if intercept else torch.zeros_like(sample.x[0])
    change = coefficients.to(sample.x).mT @ (sample.x - middle)
    weights = start + change.double()
    moved = mean.double() - change.double() @ middle.double() if intercept else offset * 0
    return ridge, weights, moved


def _kernel(x: Tensor, centred: bool) -> Tensor:
    """[n, n] products of rows with each other, counted from their mean where `centred`."""
    x = x - x.mean(0) if centred else x
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
        self, kernel: Tensor, left: Tensor, fitted: Tensor, judge: Tensor, features: int, centred: bool
    ) -> None:
        inner, across = kernel[fitted][:, fitted], kernel[judge][:, fitted]
        targets, judged = left[fitted].double(), left[judge].double()
        if centred:
            column, corner = inner.mean(0), inner.mean()
            across = across - across.mean(1, keepdim=True) - column + corner
            inner = inner - column - column.unsqueeze(1) + corner
            judged, targets = judged - targets.mean(0), targets - targets.mean(0)
        self.inner, self.across, self.targets, self.judged, self.features = inner, across, targets, judged, features

    def error(self, ridge: float) -> float:
        """Squared error over all judging rows."""
        coefficients = _solved(self.inner, self.targets, ridge, self.features)
        if coefficients is None:
            return float("inf")
        return float((self.judged - self.across @ coefficients).square().sum())
