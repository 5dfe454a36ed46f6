"""The dense network's answers over all calibration images, taken once: a mean and a spread for every leaf.

An unlabelled start and a distance need to know what an ordinary answer is. Taken over all images and not over a batch,
so that neither depends on how images are batched. Sums run in float64, over all ranks.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..distributed import joined_over_ranks, sum_over_ranks
from ..errors import DataError, ModelError
from ..placement import reusing_freed_memory
from ..records import FloatArray
from ..tensors import Inputs, count
from .places import entropy, probabilities, score_leaves, weights
from .record import Leaves, Predict, Targets, finite, in_words, sample_leaves

CONSTANT = 1e-10  # of the mean square: a spread below is what rounding leaves of a leaf that never changes


def scale_of(spread: float, square: float) -> float:
    """What squared distances of a leaf are divided by: its spread, its square if it never changes, else 1."""
    if spread > CONSTANT * square:
        return spread
    return square or 1.0


@dataclass(frozen=True, slots=True)
class LeafReference:
    """One leaf over all images; squares are sums over a sample's values, as means over the samples.

    `mean` is the leaf's shape without its samples, float32. `spread` is the squared distance from that mean, 0 where
    the leaf never changes; `class_spread` the one from each sample's own mean over axis 1 (classes), `unit_spread` the
    one of rows of length one from the mean row of length one: NaN where the leaf has no such axis, is no [N, D].
    `square` is the distance from 0; `low` and `high` are the smallest and the largest value. `sure_spread` is what a
    detector's leaf is off where its mean answer stands for it: of scores the divergence, of what lies at their places
    the squared distance by how sure they are there (`places`); NaN of others.
    """

    mean: Tensor
    spread: float
    class_spread: float
    unit_spread: float
    square: float
    low: float
    high: float
    sure_spread: float = np.nan

    @property
    def scale(self) -> float:
        """What squared distances of the leaf are divided by: its spread, its square if it never changes, else 1."""
        return self.spread or self.square or 1.0


@dataclass(frozen=True, slots=True)
class Reference:
    """Every leaf of real numbers by name, over `samples` samples."""

    leaves: Mapping[str, LeafReference]
    samples: int

    @property
    def varying(self) -> tuple[str, ...]:
        """The leaves that differ between images."""
        return tuple(name for name, leaf in self.leaves.items() if leaf.spread > 0)

    def entry(self, name: str, leaves: Leaves) -> LeafReference:
        """What it says of a leaf. Raises ModelError where it is of another network or size."""
        if name not in self.leaves:
            raise ModelError(f"leaf {name!r} is not among those the mean answer was taken of: {', '.join(self.leaves)}")
        entry = self.leaves[name]
        if entry.mean.shape != leaves[name].shape[1:]:
            expected, shape = _of_samples(entry.mean.shape), _of_samples(leaves[name].shape[1:])
            raise ModelError(f"leaf {name!r} is {shape}, the mean answer was taken of {expected}")
        return entry


@torch.no_grad()
@reusing_freed_memory()
def reference_of(predict: Predict, batches: Iterable[tuple[Inputs, Targets]], *, by_place: bool = False) -> Reference:
    """One pass of the dense network. Raises DataError without any image, ModelError where no leaf has samples.

    With `by_place` a detector's `sure_spread` is taken, too.

    A leaf whose first axis does not follow the samples (anchors, a scale) is left out, and so is one that is not of
    real numbers; values that are not finite count as 0.
    """
    sums: dict[str, FloatArray] = {}
    ends: dict[str, tuple[float, float]] = {}
    samples, leaves = 0, dict[str, Tensor]()
    for inputs, _ in batches:
        leaves = dict(predict(inputs))
        samples += count(inputs)
        for name, leaf in sample_leaves(leaves, count(inputs)).items():
            _add(sums, ends, name, finite(leaf).double().cpu())
        if by_place:
            _add_sureness(sums, ends, {name: leaf.cpu() for name, leaf in leaves.items() if name in ends})
    if samples == 0:
        raise DataError("there are no images to take the mean answer of; expected at least one batch")
    if not ends:
        raise ModelError(
            f"no leaf of the answer holds real numbers with one entry a sample: {in_words(leaves)}; "
            "relevance and distances need one"
        )
    ends_of_ranks = joined_over_ranks({name: np.array([pair]) for name, pair in ends.items()})  # [ranks, 2]
    totals = sum_over_ranks({**sums, "samples": np.array([samples], np.float64)})
    everyone = int(totals["samples"][0])
    return Reference({name: _leaf_reference(name, totals, everyone, ends_of_ranks[name]) for name in ends}, everyone)


def _add(sums: dict[str, FloatArray], ends: dict[str, tuple[float, float]], name: str, values: Tensor) -> None:
    """Adds a batch's [N, ...] to the sums of its leaf."""
    parts = {"sum": values.sum(0), "square": values.square().sum()}
    if values.dim() > 1:
        parts["within"] = (values - values.mean(1, keepdim=True)).square().sum()
    if values.dim() == 2:
        parts["unit"] = torch.nn.functional.normalize(values, dim=1).sum(0)
    for part, total in parts.items():
        key = f"{name}|{part}"
        if key in sums and sums[key].shape != total.shape:
            before, now = _of_samples(sums[key].shape), _of_samples(total.shape)
            raise ModelError(f"leaf {name!r} is {before} for some images and {now} for others")
        sums[key] = sums.get(key, 0.0) + total.numpy()
    low, high = ends.get(name, (np.inf, -np.inf))
    if values.numel():
        ends[name] = min(low, float(values.min())), max(high, float(values.max()))


def _add_sureness(sums: dict[str, FloatArray], ends: Mapping[str, tuple[float, float]], leaves: Leaves) -> None:
    """Adds what `sure_spread` is made of; whether scores are probabilities is told from the images so far."""
    parts: dict[str, Tensor] = {}
    for name in score_leaves(leaves):
        probability = probabilities(finite(leaves[name]).double(), *ends[name])
        parts |= {f"{name}|yes": probability.sum(0), f"{name}|entropy": entropy(probability).sum()}
    for name, weight in weights(leaves, ends).items():
        values, weight = finite(leaves[name]).double(), weight.double()
        parts |= {f"{name}|weight": weight.sum(0), f"{name}|weighted": (weight * values).sum(0)}
        parts[f"{name}|weighted square"] = (weight * values.square()).sum()
    for key, total in parts.items():
        sums[key] = sums.get(key, 0.0) + total.numpy()


def _sure_spread(name: str, totals: Mapping[str, FloatArray], mean: FloatArray, samples: int) -> float:
    if f"{name}|yes" in totals:
        of_mean = float(entropy(torch.from_numpy(np.asarray(totals[f"{name}|yes"] / samples))).sum())
        return of_mean - float(totals[f"{name}|entropy"]) / samples  # the mean divergence from the mean probability
    if f"{name}|weight" not in totals:
        return np.nan
    # sum of w (x - m)^2 = sum of w x^2 - 2 m (sum of w x) + m^2 (sum of w), each summed over the images before
    crossed = (mean * totals[f"{name}|weighted"]).sum()
    squares = totals[f"{name}|weighted square"] - 2 * crossed + (np.square(mean) * totals[f"{name}|weight"]).sum()
    return float(squares) / samples


def _leaf_reference(name: str, totals: Mapping[str, FloatArray], samples: int, ends: FloatArray) -> LeafReference:
    mean = totals[f"{name}|sum"] / samples
    square = float(totals[f"{name}|square"]) / samples
    spread = square - float(np.square(mean).sum())  # the mean of |y - m|^2 is that of |y|^2 less |m|^2
    within = totals.get(f"{name}|within", np.nan)
    units = totals.get(f"{name}|unit", np.nan)
    return LeafReference(
        mean=torch.from_numpy(np.asarray(mean, np.float32)),
        spread=spread if spread > CONSTANT * square else 0.0,
        class_spread=float(within) / samples,
        # |u - m|^2 of rows u and m of length one is 2 - 2 <u, m>, and the mean of <u, m> is the mean row's length
        unit_spread=2 - 2 * float(np.linalg.norm(units / samples)),
        square=square,
        low=float(ends[:, 0].min()),
        high=float(ends[:, 1].max()),
        sure_spread=_sure_spread(name, totals, np.asarray(mean, np.float64), samples),
    )


def _of_samples(shape: Iterable[int]) -> str:
    """`[N, 4]` of a sample's [4]."""
    return f"[{', '.join(['N', *map(str, shape)])}]"


def leaf_in(reference: Reference | None, name: str, leaves: Leaves) -> LeafReference | None:
    """What the reference says of a leaf, None without a reference. Raises ModelError where it does not fit."""
    if reference is None:
        return None
    return reference.entry(name, leaves)
