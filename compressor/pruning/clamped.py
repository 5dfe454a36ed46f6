"""Least squares in front of a clamp: what ReLU and its like cut off need not be right, only be cut off again.

In: a layer's moments, some of its rows with what the dense network gives the clamp there, a ridge. Out: weights.
Where the dense network is at a bound, every output beyond that bound is as good as its own (the rectified
response of arXiv 1505.06798). The loss is convex; each step moves such targets to where the fit already is and
solves again with the same factor (majorisation, accelerated as by Nesterov). Knows nothing of graphs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from ..distributed import sum_over_ranks
from . import gram

STEPS = 10  # thirty gain nothing more
CHUNK_ENTRIES = 1 << 22


@dataclass(frozen=True, slots=True)
class Bounds:
    """Outputs at or below `low` are all alike behind the clamp, and so are those at or above `high`."""

    low: float
    high: float


@dataclass(slots=True)
class Rows:
    """Rows [groups, n, features], targets and what the dense network's clamp is given [groups, n, outputs]."""

    x: Tensor
    targets: Tensor
    given: Tensor

    @classmethod
    def empty(cls, groups: int, features: int, outputs: int, device: torch.device) -> Rows:
        return cls(*(torch.zeros(groups, 0, width, device=device) for width in (features, outputs, outputs)))

    @classmethod
    def joined(cls, parts: list[Rows]) -> Rows:
        return cls(*(torch.cat([getattr(part, name) for part in parts], 1) for name in ("x", "targets", "given")))

    def part(self, which: slice) -> Rows:
        return Rows(self.x[:, which], self.targets[:, which], self.given[:, which])


def squared_error(rows: Rows, bounds: Bounds, weights: Tensor, offset: Tensor) -> float:
    """Mean squared error per row, summed over all outputs; what the clamp cuts off again does not count."""
    squares = sum((float(lack.square().sum()) for _, _, lack in _lacks(rows, bounds, weights, offset)), 0.0)
    sums = sum_over_ranks({"squares": np.array(squares), "rows": np.array(float(rows.x.shape[1]))})
    return float(sums["squares"]) / max(float(sums["rows"]), 1.0)


def solve(
    moments: gram.Moments, rows: Rows, bounds: Bounds, ridge: float, start: Tensor, *, intercept: bool
) -> tuple[Tensor, Tensor] | None:
    """Weights [groups, outputs, features] and offset [groups, outputs]; None where it is numerically singular.

    The moments hold all rows, linearly; `rows` say by how much targets may move.
    """
    problem = gram.problem_of(moments, intercept)
    left = problem.xy - problem.xx @ start.mT  # what `start` leaves to explain, before any target moves
    factor = gram.factor_in(rows.x.dtype, problem, ridge)
    if factor is None:
        return None

    def refitted(moved: Tensor | float, by: Tensor | float) -> tuple[Tensor, Tensor]:
        weights = start + torch.cholesky_solve((left + moved).to(factor), factor).mT.double()
        return weights, gram.intercept_of(replace(problem, mean_y=problem.mean_y + by), weights)

    weights, offset = before, offset_before = refitted(0.0, 0.0)
    for step in range(STEPS):
        ahead = step / (step + 3)
        at = weights + ahead * (weights - before), offset + ahead * (offset - offset_before)
        xd, d = _moves(rows, bounds, *at, problem.mean_x)
        before, offset_before = weights, offset
        weights, offset = refitted(xd, d if intercept else 0.0)
    return weights, offset


def _moves(rows: Rows, bounds: Bounds, weights: Tensor, offset: Tensor, mean: Tensor) -> tuple[Tensor, Tensor]:
    """How targets move to where the clamp makes no difference: times the centred rows, and by themselves; means."""
    xd, d = torch.zeros_like(weights.mT), torch.zeros_like(offset)
    for part, made, lack in _lacks(rows, bounds, weights, offset):
        moves = made + lack - rows.targets[:, part]
        xd += ((rows.x[:, part] - mean.to(rows.x).unsqueeze(1)).mT @ moves).double()
        d += moves.double().sum(1)
    sums = sum_over_ranks({"xd": xd.cpu().numpy(), "d": d.cpu().numpy(), "rows": np.array(float(rows.x.shape[1]))})
    n = max(float(sums["rows"]), 1.0)
    return torch.as_tensor(sums["xd"]).to(xd) / n, torch.as_tensor(sums["d"]).to(d) / n


def _lacks(rows: Rows, bounds: Bounds, weights: Tensor, offset: Tensor) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """A few rows at a time, their outputs [groups, few, outputs], and what those lack."""
    groups, n, features = rows.x.shape
    few = max(1, CHUNK_ENTRIES // (groups * (features + weights.shape[1])))
    for begin in range(0, n, few):
        part = slice(begin, begin + few)
        targets, given = rows.targets[:, part], rows.given[:, part]
        made = torch.baddbmm(offset.to(rows.x).unsqueeze(1), rows.x[:, part], weights.to(rows.x).mT)
        lack = targets - made
        lack = torch.where(given <= bounds.low, (lack + bounds.low - given).clamp(max=0), lack)
        yield part, made, torch.where(given >= bounds.high, (lack + bounds.high - given).clamp(min=0), lack)
