"""Least squares in front of a clamp: what ReLU and its like cut off need not be right, only be cut off again.

In: a layer's moments, some of its rows with what the dense network gives the clamp there, a ridge. Out: weights.
Where the dense network is at a bound, every output beyond that bound is as good as its own (the rectified
response of arXiv 1505.06798). The loss is convex; each step moves such targets to where the fit already is and
solves again with the same factor (majorisation, accelerated as by Nesterov). Knows nothing of graphs.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from ..distributed import sum_over_ranks
from . import least_squares

STEPS = 10  # thirty gain nothing more
CHUNK_ENTRIES = 1 << 22  # numbers of rows and outputs at a time


@dataclass(frozen=True, slots=True)
class Bounds:
    """Outputs at or below `low` are all alike behind the clamp, and so are those at or above `high`."""

    low: float
    high: float


@dataclass(slots=True)
class Rows:
    """Rows x [groups, n, features], targets and what the dense network's clamp takes [groups, n, outputs].

    `blocks` are the numbers of rows that came together, n in all. Products are of one block at a time, so that they are
    the same on whichever rank it lies.
    """

    x: Tensor
    targets: Tensor
    clamp_inputs: Tensor
    blocks: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        self.blocks = self.blocks or (self.x.shape[1],)

    @classmethod
    def empty(cls, groups: int, features: int, outputs: int, device: torch.device) -> Rows:
        """No rows of such a layer, for `joined` where a rank has none."""
        x, targets = (torch.zeros(groups, 0, width, device=device) for width in (features, outputs))
        return cls(x, targets, targets.clone())

    @classmethod
    def joined(cls, chunks: list[Rows]) -> Rows:
        """One behind the other."""
        x = torch.cat([chunk.x for chunk in chunks], 1)
        targets = torch.cat([chunk.targets for chunk in chunks], 1)
        clamp_inputs = torch.cat([chunk.clamp_inputs for chunk in chunks], 1)
        blocks = itertools.chain.from_iterable(chunk.blocks for chunk in chunks)
        return cls(x, targets, clamp_inputs, tuple(blocks))

    def parted(self, first: int) -> tuple[Rows, Rows]:
        """The first rows, which end with a block, and the others, as views."""
        ends = np.cumsum(self.blocks)
        count = int(np.searchsorted(ends, first, side="right"))  # blocks that lie before the cut
        before = self._chosen(slice(first), self.blocks[:count])
        return before, self._chosen(slice(first, None), self.blocks[count:])

    def _chosen(self, rows: slice, blocks: tuple[int, ...]) -> Rows:
        return Rows(self.x[:, rows], self.targets[:, rows], self.clamp_inputs[:, rows], blocks)


def squared_error(rows: Rows, bounds: Bounds, weights: Tensor, offset: Tensor) -> float:
    """Mean squared error per row, summed over all outputs; what the clamp cuts off again does not count."""
    squares = [float(lack.square().sum()) for _, _, lack in _lacks(rows, bounds, weights, offset)]
    sums = sum_over_ranks({"squares": np.array(sum(squares, 0.0)), "rows": np.array(float(rows.x.shape[1]))})
    return float(sums["squares"]) / max(float(sums["rows"]), 1.0)


def solve(
    moments: least_squares.Moments,
    rows: Rows,
    bounds: Bounds,
    ridge: float,
    start: Tensor,
    *,
    intercept: bool,
    left: least_squares.Problem | None = None,
) -> tuple[Tensor, Tensor] | None:
    """Weights [groups, outputs, features] and offset [groups, outputs]; None where it is numerically singular.

    The moments hold all rows, linearly; `rows` say by how much targets may move. `left` is the problem of what `start`
    leaves unexplained of them, where it is known.
    """
    if left is None:
        left = least_squares.problem_of(least_squares.unexplained_by(start, moments), intercept)
    problem = left
    if intercept:
        problem = replace(left, mean_y=moments.y / moments.count.clamp(min=1))
    unexplained = left.xy  # [groups, features, outputs], before any target moves
    factor = least_squares.factor_in(rows.x.dtype, problem, ridge)
    if factor is None:
        return None

    def refitted(moves_x: Tensor | float, moves: Tensor | float) -> tuple[Tensor, Tensor]:
        """For targets moved by so much: only the right-hand side changes, so the factor serves every step."""
        weights = start + torch.cholesky_solve((unexplained + moves_x).to(factor), factor).mT.double()
        return weights, least_squares.intercept_of(replace(problem, mean_y=problem.mean_y + moves), weights)

    weights, offset = weights_before, offset_before = refitted(0.0, 0.0)
    for step in range(STEPS):
        momentum = step / (step + 3)
        weights_ahead = weights + momentum * (weights - weights_before)
        offset_ahead = offset + momentum * (offset - offset_before)
        moves_x, moves = _moves(rows, bounds, weights_ahead, offset_ahead, problem.mean_x)
        weights_before, offset_before = weights, offset
        weights, offset = refitted(moves_x, moves if intercept else 0.0)
    return weights, offset


def _moves(rows: Rows, bounds: Bounds, weights: Tensor, offset: Tensor, mean_x: Tensor) -> tuple[Tensor, Tensor]:
    """How targets move to where the clamp makes no difference: times the centred rows, and by themselves.

    Means over the rows of all ranks, [groups, features, outputs] and [groups, outputs].
    """
    moves_x, moves = torch.zeros_like(weights.mT), torch.zeros_like(offset)
    for chunk, outputs, lack in _lacks(rows, bounds, weights, offset):
        move = outputs + lack - rows.targets[:, chunk]  # [groups, few, outputs]
        moves_x += ((rows.x[:, chunk] - mean_x.to(rows.x).unsqueeze(1)).mT @ move).double()
        moves += move.double().sum(1)
    row_count = np.array(float(rows.x.shape[1]))
    sums = sum_over_ranks({"moves": moves.cpu().numpy(), "rows": row_count, "x_moves": moves_x.cpu().numpy()})
    n = max(float(sums["rows"]), 1.0)
    return torch.as_tensor(sums["x_moves"]).to(moves_x) / n, torch.as_tensor(sums["moves"]).to(moves) / n


def _lacks(rows: Rows, bounds: Bounds, weights: Tensor, offset: Tensor) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """A few rows at a time, their outputs [groups, few, outputs], and what those lack."""
    groups, _, features = rows.x.shape
    few = max(1, CHUNK_ENTRIES // (groups * (features + weights.shape[1])))
    ends = np.cumsum(rows.blocks)
    for block_end, size in zip(ends.tolist(), rows.blocks, strict=True):
        for begin in range(block_end - size, block_end, few):
            yield _lack_of(rows, bounds, weights, offset, slice(begin, min(begin + few, block_end)))


def _lack_of(rows: Rows, bounds: Bounds, weights: Tensor, offset: Tensor, chunk: slice) -> tuple[slice, Tensor, Tensor]:
    targets, clamp_input = rows.targets[:, chunk], rows.clamp_inputs[:, chunk]
    outputs = torch.baddbmm(offset.to(rows.x).unsqueeze(1), rows.x[:, chunk], weights.to(rows.x).mT)
    lack = targets - outputs
    # Our clamp takes `clamp_input - lack`. Where the dense one's input is at -3 and the bound at 0, a lack of
    # -2 leaves ours at -1, which is cut off again and counts 0; one of -4 leaves it at 1 and counts -1.
    lack = torch.where(clamp_input <= bounds.low, (lack + bounds.low - clamp_input).clamp(max=0), lack)
    lack = torch.where(clamp_input >= bounds.high, (lack + bounds.high - clamp_input).clamp(min=0), lack)
    return chunk, outputs, lack
