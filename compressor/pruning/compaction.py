"""A tensor, where its classes lie and which are gone in; what remains of it, or the shape of that, out.

What remains must be a box: rows may lose different coordinates, but each the same number. Knows no graph.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from ..records import IntArray
from .structure import Keep, Lying

Cut = tuple[tuple[int, ...], Keep]  # axes of a tensor, and which coordinates on them stay


class RaggedError(Exception):
    """What would remain of a tensor is not a box; the check turns it into a finding at `node`."""

    node = ""


def is_cut(lying: Sequence[Lying], gone: Keep) -> bool:
    """Whether a tensor loses anything."""
    return any(gone[classes].any() for _, classes in lying)


def cut_axes(lying: Sequence[Lying], gone: Keep) -> set[int]:
    """The axes along which a tensor loses anything."""
    losing = (over for over, classes in lying if gone[classes].any())
    return set(itertools.chain.from_iterable(losing))


def compact(tensor: Tensor, lying: Sequence[Lying], gone: Keep) -> Tensor:
    """The tensor without the coordinates whose classes are gone. Raises RaggedError when that is not a box."""
    for over, keep in _cuts(lying, gone):
        if len(over) == 1:
            index = torch.from_numpy(np.flatnonzero(keep))
            tensor = tensor.index_select(over[0], index.to(tensor.device))
        else:
            tensor = _squeeze_rows(tensor, over, keep)
    return tensor


def compact_shape(shape: Sequence[int], lying: Sequence[Lying], gone: Keep) -> tuple[int, ...]:
    """The sizes `compact` would give, for a tensor of that shape; no tensor is made."""
    sizes = list(shape)
    for over, keep in _cuts(lying, gone):
        sizes[over[-1]] = _count_of_rows(keep)
    return tuple(sizes)


def kept_of_axes(shape: Sequence[int], lying: Sequence[Lying], gone: Keep) -> tuple[IntArray, ...]:
    """The coordinates that stay on each axis."""
    stays = [np.ones(size, dtype=bool) for size in shape]
    for over, classes in lying:
        if len(over) == 1:
            stays[over[0]] &= ~gone[classes]
    return tuple(map(np.flatnonzero, stays))


def _cuts(lying: Sequence[Lying], gone: Keep) -> Iterator[Cut]:
    """What stays, cut after cut: of a whole axis, or of the last of several axes, row by row.

    3 heads of 4 dimensions on axes (1, 3), of which go head 1, dimension 0 of head 0 and dimension 2 of head 2:

        keep  0 1 1 1        first ((1,), [1, 0, 1]),  then ((1, 3), [0 1 1 1])
              0 0 0 0        the whole head                          [1 1 0 1]
              1 1 0 1
    """
    waiting = [(over, ~gone[classes]) for over, classes in lying if gone[classes].any()]
    while waiting:
        (over, keep), *waiting = waiting
        for position, axis in enumerate(over):  # whole slices first
            stays = _stays_along(keep, position)
            if stays.all():
                continue
            yield (axis,), stays
            # from here on the tensor is shorter along the axis, and so is what is known of it
            index = np.flatnonzero(stays)
            keep = np.take(keep, index, axis=position)
            waiting = [_shortened(cut, axis, index) for cut in waiting]
        if not keep.all():
            yield over, keep
            _require_apart(waiting, over[-1])


def _stays_along(keep: Keep, position: int) -> Keep:
    """[size] whether anything stays at each coordinate of one axis of `keep`."""
    across = tuple(p for p in range(keep.ndim) if p != position)
    return np.asarray(keep.any(axis=across))


def _shortened(cut: Cut, axis: int, index: IntArray) -> Cut:
    over, keep = cut
    if axis not in over:
        return cut
    return over, np.take(keep, index, axis=over.index(axis))


def _require_apart(waiting: Sequence[Cut], axis: int) -> None:
    if any(axis in over for over, _ in waiting):
        raise RaggedError("one axis is thinned row by row and also as a whole")


def _squeeze_rows(tensor: Tensor, over: tuple[int, ...], keep: Keep) -> Tensor:
    """Rows that lose different coordinates of the last axis they lie on, the same number each."""
    count = _count_of_rows(keep)
    # what stays in front, in its order: a row of keep 1 0 1 1 is sorted to 0 2 3 1, of which the first 3
    order = np.argsort(~keep, axis=-1, kind="stable")[..., :count]
    index = torch.from_numpy(order.copy()).to(tensor.device)  # [*rows, count]
    sizes = list(tensor.shape)
    sizes[over[-1]] = count
    return tensor.gather(over[-1], laid(index, over, tensor.ndim).expand(sizes))


def laid(tensor: Tensor, over: Sequence[int], rank: int) -> Tensor:
    """A tensor on some axes of one of that rank: [heads, d] on axes (1, 3) of four is [1, heads, 1, d]."""
    shape = [1] * rank
    for axis, size in zip(over, tensor.shape, strict=True):
        shape[axis] = size
    return tensor.reshape(shape)


def _count_of_rows(keep: Keep) -> int:
    """How many coordinates of the last axis each row keeps; of one axis alone, how many it keeps."""
    if keep.ndim == 1:
        return int(np.count_nonzero(keep))
    counts = np.unique(keep.sum(axis=-1))
    if len(counts) > 1:
        raise RaggedError(f"rows would keep {counts.min()} to {counts.max()} units; they must keep equal counts")
    return int(counts[0])
