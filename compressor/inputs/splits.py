"""Images, or other samples, and a seed in; disjoint parts out, stratified by class: calibration, search, evaluation.

Which image goes where depends on its name, its label and the seed alone, never on a random generator's
version. Knows neither models nor where images come from.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ..errors import DataError
from ..records import IntArray
from .images import Kind, Source, pixel_hashes


@dataclass(frozen=True, slots=True)
class Splits:
    """No image of one part has the pixels of an image of another; `hashes` are the parts' content hashes.

    `left_out` names repeated images that were asked for by no part: the first of equals stays.
    """

    calibration: Source
    search: Source
    evaluation: Source
    hashes: Mapping[str, str]
    left_out: tuple[str, ...] = ()


def stratified_order(names: Sequence[str], labels: IntArray, seed: int) -> IntArray:
    """Positions ordered so that every stretch of the order holds the classes in about their overall shares.

    Image j of its class's n (by sha256 of seed and name) stands at (j + 1/2) / n of the way:
    classes of 2 and 4 images interleave as b a b b a b.
    """
    keys = [hashlib.sha256(f"{seed}:{name}".encode()).hexdigest() for name in names]
    places = np.zeros(len(names))  # 0 to 1, how far along the order an image stands
    for label in np.unique(labels):
        members = sorted(np.flatnonzero(labels == label), key=lambda index: keys[index])
        places[members] = (np.arange(len(members)) + 0.5) / len(members)
    order = sorted(range(len(names)), key=lambda index: (places[index], keys[index]))
    return np.array(order, dtype=np.int64)


def split(images: Source, seed: int, *, calibration: int, search: int, evaluation: float) -> Splits:
    """Three disjoint parts of one source; `evaluation` below 1 is a share of all images.

    The evaluation part is taken first, so it stays the same whatever the others' sizes are. Raises DataError where
    there are too few different images.
    """
    held_out = _count(evaluation, len(images))
    sizes = {"evaluation": held_out, "calibration": calibration, "search": search}
    taken, left_out = _take(images, seed, sizes)
    return _splits(taken["calibration"], taken["search"], taken["evaluation"], left_out)


def split_apart(images: Source, held_out: Source, seed: int, *, calibration: int, search: int) -> Splits:
    """Calibration and search parts of `images`; all of `held_out`, given apart, is for evaluation.

    Raises DataError where there are too few different images, or one of them is among those held out.
    """
    taken, left_out = _take(images, seed, {"calibration": calibration, "search": search})
    for name in ("calibration", "search"):
        require_disjoint(taken[name], held_out)
    return _splits(taken["calibration"], taken["search"], held_out, left_out)


def require_disjoint(images: Source, held_out: Source) -> None:
    """Raises DataError when an image of `images` is also in `held_out`, by its pixels, however it is stored."""
    evaluated = dict(zip(pixel_hashes(held_out, held_out.names), held_out.names, strict=True))
    hashes = dict(zip(images.names, pixel_hashes(images, images.names), strict=True))
    twins = [(name, evaluated[pixels]) for name, pixels in hashes.items() if pixels in evaluated]
    if twins:
        named = ", ".join(f"{name!r} = {evaluated_name!r}" for name, evaluated_name in twins[:3])
        raise DataError(
            f"{len(twins)} of {len(images)} images of {images.source} are also among the evaluation images "
            f"{held_out.source} ({named}); remove them from one of the two"
        )


def _count(amount: float, available: int) -> int:
    if isinstance(amount, int):
        return amount
    if not 0 <= amount < 1:
        raise DataError(f"evaluation = {amount} is neither a number of images nor a share below 1")
    return round(amount * available)


def _take(images: Kind, seed: int, sizes: Mapping[str, int]) -> tuple[dict[str, Kind], tuple[str, ...]]:
    """Deals images out in stratified order, skipping pixels already dealt."""
    if min(sizes.values()) < 0:
        raise DataError(f"a part can't have a negative number of images: {dict(sizes)}")
    order = stratified_order(images.names, images.labels, seed)
    # the part that each image dealt out goes to: evaluation 2, search 1 is evaluation, evaluation, search
    destinations = list(Counter(sizes).elements())
    dealt: set[str] = set()
    taken: dict[str, list[int]] = {name: [] for name in sizes}
    left_out: list[str] = []
    pixel_hashes(images, [images.names[index] for index in order[: len(destinations)]])  # so many are looked at anyway
    for index in order:
        if len(dealt) == len(destinations):
            break
        pixels = images.pixel_hash(images.names[index])
        if pixels in dealt:
            left_out.append(images.names[index])
        else:
            taken[destinations[len(dealt)]].append(int(index))
            dealt.add(pixels)

    if len(dealt) < len(destinations):
        raise DataError(_too_few(images, sizes, len(dealt)))
    return {name: images.subset(chosen) for name, chosen in taken.items()}, tuple(left_out)


def _too_few(images: Source, sizes: Mapping[str, int], different: int) -> str:
    asked = ", ".join(f"{name} {size}" for name, size in sizes.items())
    return (
        f"{images.source} holds {different} different images, but {sum(sizes.values())} are asked for "
        f"({asked}); ask for fewer or give more images"
    )


def _splits(calibration: Source, search: Source, evaluation: Source, left_out: tuple[str, ...]) -> Splits:
    named = {"calibration": calibration, "search": search, "evaluation": evaluation}
    hashes = {name: images.content_hash() for name, images in named.items()}
    return Splits(calibration, search, evaluation, hashes, left_out)
