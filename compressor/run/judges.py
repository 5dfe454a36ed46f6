"""Which images serve what after the repair: some teach, some tell when to end, some judge what ships.

All that `--data` leaves beside calibration and evaluation teaches, as many as the time can make use of, and so do the
calibration images. What judges served neither repair nor recovery, where enough is left over: else some of the
calibration images are kept out of the recovery. The repair was fitted on those, which flatters it. Evaluation images
serve nothing. Few judge, as every image that teaches brings the network nearer.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from ..inputs.images import Batches, Source, batches
from ..recipe import Recipe
from .lessons import shown_to_learned
from .reading import SEARCH_LEAST
from .work import Work

JUDGE_IMAGES = 512  # more tell two networks no better apart than the evaluation images will
FEW_SHARE, MANY_SHARE = 5, 10  # one calibration image of so many judges where none are left over, by how many there are
SPARE_SHARE = 5  # one image of so many of those left over judges, and as many tell when to end
IMAGES_PER_MINUTE = 4000  # are read for a recovery: more could hardly be shown once in the time
ENOUGH = 4 * SEARCH_LEAST  # spare images, from which on they judge, tell when to end and teach


@dataclass(frozen=True, slots=True)
class Judges:
    """`lessons` teach, `held` tell when to end, `images` judge; `source` says in words what those are."""

    lessons: Batches
    held: Batches
    images: Batches
    source: str

    @property
    def parts(self) -> tuple[Batches, Batches, Batches]:
        """The images of each service."""
        return self.lessons, self.held, self.images


def spare_of(recipe: Recipe) -> int:
    """How many images are set apart, at most, of what calibration and evaluation leave."""
    spare = JUDGE_IMAGES if "int8" in recipe.precisions else 0
    if recipe.recovers:
        spare = 2 * JUDGE_IMAGES + math.ceil(IMAGES_PER_MINUTE * recipe.recovery_minutes)
    shown = shown_to_learned(recipe)
    return max(spare, JUDGE_IMAGES + shown) if shown else spare


def judging_of(recipe: Recipe, spare: Source) -> Source:
    """The spare images that judge: the first ones, all where too few are left for anything else to be made of them."""
    count = len(spare)
    if recipe.recovers and count >= ENOUGH:
        count = _apart_of(count)
    return spare.subset(np.arange(min(JUDGE_IMAGES, count)))


def _apart_of(spare: int) -> int:
    """How many of so many spare images judge, and how many of them tell when to end."""
    return min(JUDGE_IMAGES, max(SEARCH_LEAST, spare // SPARE_SHARE))


def judges_of(work: Work) -> Judges | None:
    """The images that teach and those that judge; None where too few calibration images would have to do both."""
    calibration, spare, size = work.splits.calibration, work.splits.search, work.recipe.batch_size
    kept_out = _kept_out_of(calibration)
    if len(spare) < min(SEARCH_LEAST, kept_out):  # few spare images judge no worse than as few of calibration's
        return _of_calibration(calibration, size)
    judging = judging_of(work.recipe, spare)
    _, left = _split_at(spare, len(judging))
    if len(left) >= ENOUGH // 2:
        validation, unused = _split_at(left, _apart_of(len(spare)))
        taught = calibration.joined(unused)
    elif len(calibration) > 1:
        taught, validation = _split_at(calibration, len(calibration) - kept_out)
    else:
        return None
    source = f"{len(judging)} images that served nothing else"
    return Judges(batches(taught, size), batches(validation, size), batches(judging, size), source)


def _of_calibration(calibration: Source, size: int) -> Judges | None:
    """The last ones of a stratified order judge, so that every class is among them in about its share."""
    if len(calibration) < 3:
        return None
    kept_out = _kept_out_of(calibration)
    teaching, judging = _split_at(calibration, len(calibration) - kept_out)
    taught, validation = _split_at(teaching, len(teaching) - _kept_out_of(teaching))
    source = f"{kept_out} calibration images kept out of the recovery (the repair was fitted on them too)"
    return Judges(batches(taught, size), batches(validation, size), batches(judging, size), source)


def _kept_out_of(images: Source) -> int:
    """How many of them do not teach: a fifth of few, a tenth of many."""
    few = min(SEARCH_LEAST, len(images) // FEW_SHARE)
    return min(JUDGE_IMAGES, max(1, few, len(images) // MANY_SHARE))


def _split_at(images: Source, first: int) -> tuple[Source, Source]:
    """The first ones, and those behind them."""
    return images.subset(np.arange(first)), images.subset(np.arange(first, len(images)))
