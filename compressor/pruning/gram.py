"""Streaming least squares for convolutions and linear layers: rows of a layer's input in, weights out.

A layer is `targets = weights @ row + intercept` for each group of its channels, rows as `windows` reads them.
Knows nothing of graphs, plans or which layers deserve repair.
Ridge regression in centred form, strength chosen by two-fold validation: Hoerl & Kennard 1970.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

WIDEST = 12288  # entries of a row; one matrix of its second moments then takes 1.2 GB


@dataclass(slots=True)
class Moments:
    """Sums of rows x and targets y, per group of channels, in float64; [groups, ...] but for the count."""

    count: Tensor
    x: Tensor
    y: Tensor
    xx: Tensor
    xy: Tensor
    yy: Tensor

    @classmethod
    def empty(cls, groups: int, features: int, outputs: int, device: torch.device) -> Moments:
        matrices = ((groups, features, features), (groups, features, outputs))
        shapes: tuple[tuple[int, ...], ...] = ((), (groups, features), (groups, outputs), *matrices, (groups, outputs))
        return cls(*(torch.zeros(shape, dtype=torch.float64, device=device) for shape in shapes))

    def add(self, x: Tensor, y: Tensor) -> None:
        """Takes in rows [groups, n, features] and targets [groups, n, outputs]."""
        x64, y64 = x.double(), y.double()
        self.count += x.shape[1]
        self.x += x64.sum(1)
        self.y += y64.sum(1)
        self.yy += y64.square().sum(1)
        self.xx.baddbmm_(x64.mT, x64)
        self.xy.baddbmm_(x64.mT, y64)

    def tensors(self) -> tuple[Tensor, ...]:
        return self.count, self.x, self.y, self.xx, self.xy, self.yy

    def __add__(self, other: Moments) -> Moments:
        return Moments(*(a + b for a, b in zip(self.tensors(), other.tensors(), strict=True)))


@dataclass(frozen=True, slots=True)
class Problem:
    """Mean second moments, centred where an intercept may be fitted: what the weights are solved from."""

    xx: Tensor
    xy: Tensor
    yy: Tensor
    mean_x: Tensor
    mean_y: Tensor


def problem_of(moments: Moments, intercept: bool) -> Problem:
    n = moments.count.clamp(min=1)
    mean_x, mean_y = moments.x / n, moments.y / n
    if not intercept:
        mean_x, mean_y = torch.zeros_like(mean_x), torch.zeros_like(mean_y)
    xx = moments.xx / n - mean_x.unsqueeze(-1) * mean_x.unsqueeze(-2)
    xy = moments.xy / n - mean_x.unsqueeze(-1) * mean_y.unsqueeze(-2)
    return Problem(xx, xy, moments.yy / n - mean_y.square(), mean_x, mean_y)


def solve(problem: Problem, ridge: float, start: Tensor) -> Tensor | None:
    """Ridge weights [groups, outputs, features] shrunk towards `start`; None where it is numerically singular."""
    factor = factor_of(problem, ridge)
    return None if factor is None else solve_with(problem, factor, start)


def factor_of(problem: Problem, ridge: float) -> Tensor | None:
    """The Cholesky factor of the second moments and the ridge; None where they are numerically singular."""
    diagonal = problem.xx.diagonal(dim1=-2, dim2=-1)
    scale = diagonal.mean(-1, keepdim=True)
    penalty = ridge * torch.maximum(scale, 1e-6 * diagonal.mean() + torch.finfo(torch.float64).tiny)
    factor, failed = torch.linalg.cholesky_ex(problem.xx + torch.diag_embed(penalty.expand_as(diagonal)))
    return None if bool(failed.any()) else factor


def solve_with(problem: Problem, factor: Tensor, start: Tensor) -> Tensor:
    residual = problem.xy - problem.xx @ start.mT
    return start + torch.cholesky_solve(residual, factor).mT


def intercept_of(problem: Problem, weights: Tensor) -> Tensor:
    """The intercept [groups, outputs] that makes the mean error zero (zero for an uncentred problem)."""
    return problem.mean_y - (weights @ problem.mean_x.unsqueeze(-1)).squeeze(-1)


def squared_error(moments: Moments, weights: Tensor, intercept: Tensor) -> float:
    """Mean squared error per row, summed over all outputs."""
    quadratic = ((weights @ moments.xx) * weights).sum(-1) - 2 * (weights * moments.xy.mT).sum(-1)
    linear = 2 * intercept * ((weights @ moments.x.unsqueeze(-1)).squeeze(-1) - moments.y)
    total = moments.yy + quadratic + linear + moments.count * intercept.square()
    return float(total.sum() / moments.count.clamp(min=1))


def variance_of(moments: Moments) -> float:
    """The targets' variance, summed over all outputs."""
    n = moments.count.clamp(min=1)
    return float((moments.yy / n - (moments.y / n).square()).sum())


def choose_ridge(
    folds: Sequence[Moments], ridges: Sequence[float], start: Tensor, offset: Tensor, *, intercept: bool
) -> float | None:
    """The strength with the least error on images it was not fitted on; None where `start` itself has less.

    Without images in every fold nothing can be held out, and the middle strength is the answer.
    """
    if any(float(fold.count) == 0 for fold in folds):
        return sorted(ridges)[len(ridges) // 2]
    errors = dict.fromkeys(ridges, 0.0)
    unchanged = sum(squared_error(fold, start, offset) for fold in folds)
    for held_out, fold in enumerate(folds):
        others = [other for index, other in enumerate(folds) if index != held_out]
        problem = problem_of(sum(others[1:], others[0]), intercept)
        for ridge in ridges:
            weights = solve(problem, ridge, start)
            if weights is None:
                errors[ridge] = math.inf
            else:
                errors[ridge] += squared_error(fold, weights, intercept_of(problem, weights))
    best = min(errors, key=lambda ridge: errors[ridge])
    return best if errors[best] <= unchanged else None
