"""Which images tell the repaired network from the tuned one: labelled, and of use to neither's training.

Images that calibration and evaluation leave over, where there are enough; else a fifth of the calibration images is
kept out of the fine-tuning. The repair was fitted on those, which flatters it; they never are evaluation images.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..inputs.images import Batches, batches
from ..recipe import Recipe
from .lessons import shown_to_learned
from .reading import SEARCH_LEAST
from .work import Work

JUDGE_IMAGES = 512  # more tell two networks no better apart than the evaluation images will
HELD_SHARE = 5  # one calibration image of so many judges where none are left over


@dataclass(frozen=True, slots=True)
class Judges:
    """`lessons` train, `images` judge; `source` says in words what those are."""

    lessons: Batches
    images: Batches
    source: str


def spare_of(recipe: Recipe) -> int:
    """How many images are set apart, at most, of what calibration and evaluation leave."""
    judging = JUDGE_IMAGES if recipe.finetune_epochs or "int8" in recipe.precisions else 0
    shown = shown_to_learned(recipe)
    return JUDGE_IMAGES + shown if shown else judging


def judges_of(work: Work) -> Judges | None:
    """The images that train and those that judge; None where one calibration image would have to do both."""
    calibration, spare, size = work.splits.calibration, work.splits.search, work.recipe.batch_size
    held_out = max(1, len(calibration) // HELD_SHARE)
    if len(spare) >= min(SEARCH_LEAST, held_out):  # few spare images judge no worse than as few of calibration's
        judging = spare.subset(np.arange(min(JUDGE_IMAGES, len(spare))))
        return Judges(work.calibration, batches(judging, size), f"{len(judging)} images that served nothing else")
    if len(calibration) < 2:
        return None

    # the last ones of a stratified order, so that every class is among them in about its share
    trained_on = len(calibration) - held_out
    lessons = calibration.subset(np.arange(trained_on))
    judging = calibration.subset(np.arange(trained_on, len(calibration)))
    source = f"{held_out} calibration images kept out of the fine-tuning (the repair was fitted on them too)"
    return Judges(batches(lessons, size), batches(judging, size), source)
