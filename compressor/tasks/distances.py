"""How far one answer is from another, over how far the mean answer is.

Both networks' leaves in, [N] squared distances out, differentiable in the first. Divided by spreads that a `Reference`
holds, their mean over the same images is the share of the dense answers' variance that is lost: 0 for equal answers,
1 for the mean answer. With other images (probes) the spread stays that of the reference's.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from ..distributed import sum_over_ranks
from ..errors import DataError, ModelError
from .places import divergence, probabilities, score_leaves, weights
from .record import (
    Distance,
    Leaves,
    Pick,
    Task,
    class_leaf,
    finite,
    float_leaves,
    in_words,
    per_sample,
    real,
    sample_leaves,
)
from .reference import CONSTANT, Reference, leaf_in, scale_of


@torch.no_grad()
def relative_error(task: Task, pairs: Iterable[tuple[Leaves, Leaves]]) -> float:
    """The mean of the task's distance over all samples of (answers, dense answers) and all ranks; inf if not finite."""
    total, samples = 0.0, 0
    for leaves, dense in pairs:
        distances = task.distance(leaves, dense)  # [N]
        total += float(distances.double().sum())
        samples += len(distances)
    sums = sum_over_ranks({"distance": np.array([total, samples], np.float64)})["distance"]
    if sums[1] == 0:
        raise DataError("there are no answers to compare; expected at least one batch")
    error = float(sums[0] / sums[1])
    return error if np.isfinite(error) else np.inf


def leaf_distance(reference: Reference | None, pick: Pick | None = None) -> Distance:
    """[N]: squared distance over the leaf's spread about the mean answer, the mean over leaves (or the picked one).

    Where the dense leaf is not finite nothing is compared; where only the other is not, the distance is not. Without a
    reference the spread is that of the dense leaves of the call.
    """

    def distance(leaves: Leaves, dense: Leaves) -> Tensor:
        names = _compared(dense, reference, pick)
        if not names:
            raise ModelError(f"no leaf of real numbers is there to compare: {in_words(dense)}")
        terms = []
        for name in names:
            scale = _scale(reference, name, dense)
            terms.append(_squares(leaves, dense, name) / scale)
        return torch.stack(terms).mean(0)

    return distance


def _compared(dense: Leaves, reference: Reference | None, pick: Pick | None) -> list[str]:
    """The picked leaf, else the reference's, else all with as many entries as the first has."""
    if pick is not None:
        return [pick(dense)[0]]
    if reference is not None:
        return list(reference.leaves)
    samples = next((len(leaf) for leaf in float_leaves(dense).values()), 0)
    return list(sample_leaves(dense, samples))


def both(leaves: Leaves, dense: Leaves, name: str) -> tuple[Tensor, Tensor]:
    """A leaf of both answers, 0 in both where the dense one is not finite. Raises ModelError where forms differ."""
    if name not in leaves or leaves[name].shape != dense[name].shape:
        raise ModelError(f"answers differ in form: {in_words(leaves)}; expected {in_words(dense)}")
    theirs = real(dense[name]).detach()
    ours = real(leaves[name]).to(theirs.dtype)
    usable = theirs.isfinite()  # where the dense answer is none there is nothing to be held to
    return torch.where(usable, ours, 0.0), torch.where(usable, theirs, 0.0)


def _squares(leaves: Leaves, dense: Leaves, name: str) -> Tensor:
    ours, theirs = both(leaves, dense, name)
    return per_sample((ours - theirs).square())


def _scale(reference: Reference | None, name: str, dense: Leaves) -> float:
    """What a leaf's squares are divided by: the reference's scale, without one that of the leaf itself."""
    if reference is not None:
        return reference.entry(name, dense).scale
    values = finite(dense[name]).double()
    square = float(per_sample(values.square()).mean())
    spread = float(per_sample((values - values.mean(0)).square()).mean())
    return scale_of(spread, square)


def place_distance(reference: Reference | None) -> Distance:
    """[N]: a detector's. Scores differ by the divergence of their probabilities, boxes count by how sure those are.

    Each leaf is over its `sure_spread`, so that 1 is the mean answer's; the mean over leaves. Leaves of other forms are
    compared as by `leaf_distance`, and so are all of a network that calls none of them scores.
    """
    plain = leaf_distance(reference)
    if reference is None:
        return plain

    def distance(leaves: Leaves, dense: Leaves) -> Tensor:
        entries = {name: reference.entry(name, dense) for name in reference.leaves}
        sure = {name: entry for name, entry in entries.items() if entry.sure_spread > CONSTANT}
        scores = sure.keys() & score_leaves(dense)
        if not scores:
            return plain(leaves, dense)
        ends = {name: (entry.low, entry.high) for name, entry in sure.items()}
        seen = weights({name: dense[name].detach() for name in sure}, ends)  # by the dense scores: ours may not move it
        terms = []
        for name, entry in entries.items():
            ours, theirs = both(leaves, dense, name)
            if name in scores:
                likely = probabilities(ours, *ends[name]), probabilities(theirs, *ends[name])
                terms.append(per_sample(divergence(*likely)) / entry.sure_spread)
            elif name in seen:
                terms.append(per_sample(seen[name] * (ours - theirs).square()) / entry.sure_spread)
            else:
                terms.append(per_sample((ours - theirs).square()) / entry.scale)
        return torch.stack(terms).mean(0)

    return distance


def class_distance(reference: Reference | None, pick: Pick) -> Distance:
    """[N]: squared distance of the logits less their mean over classes (axis 1), over the dense ones' own square.

    A constant more on all classes changes no answer. One channel alone is no class and keeps its mean.
    """
    plain = leaf_distance(reference, pick)

    def distance(leaves: Leaves, dense: Leaves) -> Tensor:
        name, _ = pick(dense)
        if dense[name].shape[1] == 1:
            return plain(leaves, dense)
        entry = leaf_in(reference, name, dense)
        # [N, C, ...]; what all classes of a place have in common goes
        ours, theirs = (values - values.mean(1, keepdim=True) for values in both(leaves, dense, name))
        scale = float(per_sample(theirs.double().square()).mean()) if entry is None else entry.class_spread
        return per_sample((ours - theirs).square()) / (scale or 1.0)

    return distance


def cosine_distance(reference: Reference | None) -> Distance:
    """[N]: squared distance of rows of length one, 2 - 2 cos, over that of the mean row of length one."""

    def distance(leaves: Leaves, dense: Leaves) -> Tensor:
        name, _ = class_leaf(dense)
        entry = leaf_in(reference, name, dense)
        ours, theirs = (functional.normalize(values, dim=1) for values in both(leaves, dense, name))
        # the distance to the mean row of length one is 2 - 2 <row, mean row>, whose mean is the mean row's length
        scale = 2 - 2 * float(theirs.double().mean(0).norm()) if entry is None else entry.unit_spread
        return per_sample((ours - theirs).square()) / (scale if scale > CONSTANT else 1.0)

    return distance
