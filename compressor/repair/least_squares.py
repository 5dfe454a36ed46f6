"""Streaming least squares for convolutions and linear layers: rows of a layer's input in, weights out.

A layer is `targets = weights @ row + intercept` for each group of its channels, rows as `windows` reads them.
Knows nothing of graphs, plans or which layers deserve repair.
Ridge regression in centred form, strength chosen by two-fold validation: Hoerl & Kennard 1970.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

WIDEST = 6144  # entries of a row; one matrix of its second moments then takes 300 MB
BLOCK = 1024  # columns of a symmetric product that are made at a time, so that only one half of it is
NARROW_RIDGE = 1e-6  # a weaker ridge than this can't be seen in float32


@dataclass(frozen=True, slots=True)
class Moments:
    """Sums of rows x and targets y, per group of channels, in float64."""

    count: Tensor  # [] how many rows
    x: Tensor  # [groups, features]
    y: Tensor  # [groups, outputs]
    xx: Tensor  # [groups, features, features]
    xy: Tensor  # [groups, features, outputs]
    yy: Tensor  # [groups, outputs] squares; products of outputs with each other are never needed

    def tensors(self) -> tuple[Tensor, ...]:
        """In the order of the fields."""
        return self.count, self.x, self.y, self.xx, self.xy, self.yy

    def __add__(self, other: Moments) -> Moments:
        return Moments(*(a + b for a, b in zip(self.tensors(), other.tensors(), strict=True)))

    def of_groups(self, places: Tensor) -> Moments:
        """Those of some groups."""
        count, *by_group = self.tensors()
        return Moments(count, *(tensor[places] for tensor in by_group))


class MomentSums:
    """Collects `Moments` batch by batch: products in the rows' own precision, sums in float64.

    Rows and targets are counted from a point near their mean, so that a feature whose mean is far above its
    spread loses nothing to float32; `moments` puts the point back.
    """

    def __init__(
        self, groups: int, features: int, outputs: int, device: torch.device, origin: tuple[Tensor, Tensor]
    ) -> None:
        """`origin`: points [groups, features] and [groups, outputs] that rows and targets are counted from."""

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float64, device=device)

        self.origin = origin
        self.count = 0
        self.x, self.y, self.yy = zeros(groups, features), zeros(groups, outputs), zeros(groups, outputs)
        self.xx, self.xy = zeros(groups, features, features), zeros(groups, features, outputs)

    def add(self, x: Tensor, y: Tensor) -> None:
        """Takes in rows [groups, n, features] and targets [groups, n, outputs]."""
        x = x - self.origin[0].to(x).unsqueeze(1)
        y = y - self.origin[1].to(y).unsqueeze(1)
        self.count += x.shape[1]
        self.x += x.sum(1, dtype=torch.float64)
        self.y += y.sum(1, dtype=torch.float64)
        self.yy += y.square().sum(1, dtype=torch.float64)
        add_lower_product(self.xx, x)
        self.xy += x.mT @ y.to(x.dtype)

    def moments(self) -> Moments:
        """The sums of the rows and targets as they were given, counted from zero again."""
        n = torch.tensor(float(self.count), dtype=torch.float64, device=self.x.device)
        a, b = (point.double() for point in self.origin)
        x, y = self.x + n * a, self.y + n * b
        # sum (x + a)(x + a).T = sum x x.T + a (sum x + n a).T + (sum x) a.T, and so on
        xx = _with_outer(mirrored(self.xx), (a, x), (self.x, a))
        xy = _with_outer(self.xy, (a, y), (self.x, b))
        yy = self.yy + 2 * b * self.y + n * b.square()
        return Moments(n, x, y, xx, xy, yy)


def _with_outer(total: Tensor, *factors: tuple[Tensor, Tensor], share: float = 1.0, sign: float = 1.0) -> Tensor:
    """`share` of a matrix [groups, m, n], and the outer products of so many pairs [groups, m], [groups, n].

    In one pass over the matrix: as sums of outer products it would be several.
    """
    left = torch.stack([a for a, _ in factors], -1)  # [groups, m, pairs]
    right = torch.stack([b for _, b in factors], -2)  # [groups, pairs, n]
    return torch.baddbmm(total, left, right, beta=share, alpha=sign)


def add_lower_product(total: Tensor, x: Tensor) -> None:
    """Adds the lower half of `x.mT @ x`, [groups, n, features], to `total`; `mirrored` completes it."""
    features = x.shape[-1]
    for begin in range(0, features, BLOCK):
        columns = x[..., begin : begin + BLOCK]
        total[..., begin:, begin : begin + BLOCK] += x[..., begin:].mT @ columns


def mirrored(lower: Tensor) -> Tensor:
    """The symmetric matrix whose lower half is given."""
    whole = lower.tril()
    whole += lower.tril(-1).mT
    return whole


@dataclass(frozen=True, slots=True)
class Problem:
    """Mean second moments, centred where an intercept may be fitted: what the weights are solved from.

    Shapes as in `Moments`; `mean_x` and `mean_y` are the points that they are counted from, zero without an intercept.
    """

    xx: Tensor
    xy: Tensor
    yy: Tensor
    mean_x: Tensor
    mean_y: Tensor

    def to(self, dtype: torch.dtype) -> Problem:
        """The same in another precision."""
        tensors = (self.xx, self.xy, self.yy, self.mean_x, self.mean_y)
        return Problem(*(tensor.to(dtype) for tensor in tensors))


def problem_of(moments: Moments, intercept: bool) -> Problem:
    """About the means where an intercept is fitted, else about zero."""
    n = moments.count.clamp(min=1)
    mean_x, mean_y = moments.x / n, moments.y / n
    if not intercept:
        mean_x, mean_y = torch.zeros_like(mean_x), torch.zeros_like(mean_y)
    return _centred_at(moments, mean_x, mean_y)


def _centred_at(moments: Moments, at_x: Tensor, at_y: Tensor) -> Problem:
    """Mean second moments about the points `at_x` [groups, features] and `at_y` [groups, outputs]."""
    n = max(float(moments.count), 1.0)
    mean_x, mean_y = moments.x / n, moments.y / n
    # E (x - a)(x - a).T = E x x.T - m a.T - a (m - a).T, m the mean
    xx = _with_outer(moments.xx, (mean_x, at_x), (at_x, mean_x - at_x), share=1 / n, sign=-1.0)
    xy = _with_outer(moments.xy, (mean_x, at_y), (at_x, mean_y - at_y), share=1 / n, sign=-1.0)
    yy = moments.yy / n - 2 * mean_y * at_y + at_y.square()
    return Problem(xx, xy, yy, at_x, at_y)


def correction(left: Problem, ridge: float, dtype: torch.dtype = torch.float64) -> Tensor | None:
    """What a ridge adds to the own weights [groups, outputs, features], from what they leave unexplained.

    Solved in that precision where it is exact enough. None where the system is numerically singular.
    """
    factor = factor_in(dtype, left, ridge)
    return None if factor is None else torch.cholesky_solve(left.xy.to(factor), factor).mT.double()


def factor_of(problem: Problem, ridge: float) -> Tensor | None:
    """The Cholesky factor of the second moments and the ridge; None where they are numerically singular."""
    diagonal = problem.xx.diagonal(dim1=-2, dim2=-1)  # [groups, features]
    scale = diagonal.mean(-1, keepdim=True)
    # a group whose inputs are all zero gets a millionth of what the others have, so that its factor exists
    penalty = ridge * torch.maximum(scale, 1e-6 * diagonal.mean() + torch.finfo(torch.float32).tiny)
    system = problem.xx.clone()
    system.diagonal(dim1=-2, dim2=-1).add_(penalty)
    factor, failed = torch.linalg.cholesky_ex(system)
    return None if bool(failed.any()) else factor


def factor_in(dtype: torch.dtype, problem: Problem, ridge: float) -> Tensor | None:
    """The same in that precision, in float64 where that would not be exact enough."""
    factor: Tensor | None = None
    if ridge >= NARROW_RIDGE:
        factor = factor_of(problem.to(dtype), ridge)
    if factor is None:
        factor = factor_of(problem, ridge)
    return factor


def intercept_of(problem: Problem, weights: Tensor) -> Tensor:
    """The intercept [groups, outputs] that makes the mean error zero (zero for an uncentred problem)."""
    return problem.mean_y - (weights @ problem.mean_x.unsqueeze(-1)).squeeze(-1)


def squared_error(moments: Moments, weights: Tensor, intercept: Tensor) -> float:
    """Mean squared error per row, summed over all outputs."""
    # sum (w x + b - y)^2 = sum w xx w - 2 w xy + 2 b (w x - y) + n b^2 + yy, for each output
    quadratic = ((weights @ moments.xx) * weights).sum(-1) - 2 * (weights * moments.xy.mT).sum(-1)
    linear = 2 * intercept * ((weights @ moments.x.unsqueeze(-1)).squeeze(-1) - moments.y)
    total = moments.yy + quadratic + linear + moments.count * intercept.square()  # [groups, outputs]
    return float(total.sum() / moments.count.clamp(min=1))


def variance_of(moments: Moments) -> float:
    """The targets' variance, summed over all outputs."""
    n = moments.count.clamp(min=1)
    return float((moments.yy / n - (moments.y / n).square()).sum())


def unexplained_by(start: Tensor, moments: Moments) -> Moments:
    """The same sums with what `start` leaves of the targets, `e = y - start x`, in their place.

    The one product as large as features x features x outputs that a layer's refit needs of each fold: the choice of a
    ridge, the solution and the errors are all had from what is left.
    """
    left = moments.y - (start @ moments.x.unsqueeze(-1)).squeeze(-1)  # [groups, outputs]
    x_left = moments.xy - moments.xx @ start.mT  # [groups, features, outputs]
    # sum e^2 = sum y^2 - 2 start sum x y + start (sum x x.T) start.T, the last two in one
    squares = moments.yy - (start.mT * (moments.xy + x_left)).sum(-2)
    return replace(moments, y=left, xy=x_left, yy=squares)


def own_error(left: Moments, offset: Tensor) -> float:
    """Mean squared error per row of the weights that `left` was made with, and `offset` [groups, outputs]."""
    total = left.yy - 2 * offset * left.y + left.count * offset.square()  # sum (e - b)^2
    return float(total.sum() / left.count.clamp(min=1))


class _HeldOut:
    """One fold fitted, the other judging: the error of any ridge, of what the own weights leave unexplained.

    With the correction `d` that a ridge gives, the judge's error is that of `e - d x`: all terms are of the size of
    the improvement, so float32 is exact enough wherever the ridge itself is.
    """

    def __init__(self, fitted: Moments, judge: Moments, *, intercept: bool, sketch: int | None) -> None:
        """So many random sums of outputs, `sketch`, stand for all of them where there are more outputs than that."""
        self.fitted, self.judge, self.intercept, self.sketch = fitted, judge, intercept, sketch
        precise = self._problems()
        self.rough = precise[0].to(torch.float32), precise[1].to(torch.float32)

    def _problems(self) -> tuple[Problem, Problem]:
        """Both folds counted from the fitted one's means."""
        problem = problem_of(self.fitted, self.intercept)
        judged = _centred_at(self.judge, problem.mean_x, problem.mean_y)
        if self.sketch is None or problem.xy.shape[-1] <= self.sketch:
            return problem, judged
        # what an output varies by, `yy`, is no product with anything that a ridge changes: it stays
        return (
            replace(problem, xy=sketched(problem.xy, self.sketch)),
            replace(judged, xy=sketched(judged.xy, self.sketch)),
        )

    def error(self, ridge: float) -> float:
        """Mean squared error of the judging rows, summed over all outputs; infinite where there is no factor."""
        for fitted, judged in self._attempts(ridge):
            factor = factor_of(fitted, ridge)
            if factor is not None:
                change = torch.cholesky_solve(fitted.xy, factor)  # [groups, features, outputs]
                # E (e - d x)^2 = E e^2 - d (2 E x e - E x x.T d)
                gained = (change * (2 * judged.xy - judged.xx @ change)).sum(dtype=torch.float64)
                return float(judged.yy.sum(dtype=torch.float64) - gained)
        return math.inf

    def _attempts(self, ridge: float) -> Iterator[tuple[Problem, Problem]]:
        """In float32 where that can see the ridge; in float64 where it can't, or finds the system singular."""
        if ridge >= NARROW_RIDGE:
            yield self.rough
        yield self._problems()


def sketched(xy: Tensor, count: int) -> Tensor:
    """[groups, features, count] sums over the outputs of `xy` [groups, features, outputs] with random signs.

    Divided so that `sketched @ sketched.mT` is on average `xy @ xy.mT` (Johnson-Lindenstrauss, with the signs of
    Achlioptas 2003); the same signs for every `xy` of as many outputs.
    """
    generator = torch.Generator().manual_seed(0)
    signs = 2.0 * torch.randint(2, (xy.shape[-1], count), generator=generator) - 1.0  # [outputs, count]
    return xy @ (signs / math.sqrt(count)).to(xy)


def choose_ridge(
    left: Sequence[Moments],
    ridges: Sequence[float],
    offset: Tensor,
    *,
    intercept: bool,
    sketch: int | None = None,
) -> float | None:
    """The strength with the least error on images it was not fitted on; None where the own weights have less.

    `left` are the folds' moments of what those leave, by `unexplained_by`. Without images in every fold nothing can be
    held out, and the middle strength is the answer. Of a layer with more outputs than `sketch` some groups are looked
    at that have as many, and of a group with more of them so many random sums (`sketched`): errors are then right to
    some ten per cent, for every strength alike.
    """
    if any(float(fold.count) == 0 for fold in left):
        return sorted(ridges)[len(ridges) // 2]
    if sketch is not None:
        groups, outputs = left[0].y.shape
        seen = spread_evenly(groups, math.ceil(sketch / outputs))
        if len(seen) < groups:
            left, offset = [fold.of_groups(seen) for fold in left], offset[seen]
    first, second = left
    trials = [
        _HeldOut(fitted, judge, intercept=intercept, sketch=sketch)
        for fitted, judge in ((first, second), (second, first))
    ]
    best, error = least_of(sorted(ridges), lambda ridge: sum(trial.error(ridge) for trial in trials))
    error_without = sum(own_error(fold, offset) for fold in left)
    return best if error <= error_without else None


def spread_evenly(count: int, most: int) -> Tensor:
    """[min(count, most)] places among `count`, each in the middle of its part: 2 and 6 of 8 where 2 are asked."""
    chosen = min(count, most)
    return ((torch.arange(chosen) + 0.5) * count / chosen).long()


def least_of(ridges: Sequence[float], error_of: Callable[[float], float]) -> tuple[float, float]:
    """The rising strengths' best and its error, found from the middle downhill: errors have one valley."""
    errors: dict[int, float] = {}

    def error_at(index: int) -> float:
        if not 0 <= index < len(ridges):
            return math.inf
        if index not in errors:
            errors[index] = error_of(ridges[index])
        return errors[index]

    best = len(ridges) // 2
    while math.isinf(error_at(best)) and best + 1 < len(ridges):  # numerically singular: only stronger ones can help
        best += 1
    for step in (-1, 1):
        while error_at(best + step) < error_at(best):
            best += step
    return ridges[best], error_at(best)
