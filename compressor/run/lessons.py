"""The images that learned criteria (`steering/`) learn from: calibration's, and those that neither evaluate nor judge.

Labels are not asked for. As many are set apart as the longest of the trainings shows.
"""

from __future__ import annotations

import numpy as np

from ..choices import steering_of
from ..criteria import LEARNED
from ..inputs.images import batches
from ..recipe import Recipe
from .fingerprints import Known
from .work import Work


def shown_to_learned(recipe: Recipe) -> int:
    """How many images a learned criterion's longest training sees, each as often as it comes; 0 for the others."""
    if recipe.criterion not in LEARNED:
        return 0
    options = steering_of(recipe)
    steps = [options.gates.steps]
    if recipe.criterion == "isp":
        steps += [options.selector.predictor_steps, options.selector.steps]
    return max(steps) * recipe.batch_size


def lessons_of(work: Work, judging: int) -> Known | None:
    """The calibration images and the spare ones behind the first `judging`, as a stage's input; None where no criterion
    learns."""
    if work.recipe.criterion not in LEARNED:
        return None
    calibration, spare = work.splits.calibration, work.splits.search
    unused = spare.subset(np.arange(min(judging, len(spare)), len(spare)))
    images = batches(calibration.joined(unused), work.recipe.batch_size)
    hashes = work.splits.hashes
    sources = [hashes["calibration"], hashes["search"], len(unused)]
    return Known(images, [*sources, images.batch_size, work.prepared_as])
