"""A recipe in, what it keeps at each budget out: scored, planned, really removed, repaired, counted.

Trials look at few images and repair from fewer rows, finalists at all of them as a run would. Knows no study.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from torch import Tensor, fx

from ..accuracy import evaluate
from ..budgets import Budget
from ..choices import ranking_of, repairing_of, scoring_of
from ..files import content_hash
from ..inputs.images import Batches, Source, batches
from ..placement import inputs_to
from ..planning import make_plan
from ..planning.budget import least_share
from ..pruning import Structure, prune
from ..recipe import Recipe
from ..records import Figure, Plan, Scores
from ..relevance import score
from ..repair import CompensationOptions
from ..rounds import Prunable, measure_units, repair_layers
from ..run.tasking import metric_of, predict_of
from ..run.work import Work
from ..tasks import Targets, Task
from ..tensors import Inputs, as_tuple, count, cut
from .options import USUAL_BUDGETS

Batch = tuple[Inputs, Targets]
PROBE_IMAGES = 4


@dataclass(frozen=True, slots=True)
class Kept:
    """How good a network with at most `budget` of the MACs is on `n` images; `macs` is the share that stayed.

    `quality` is the task's, of which more is better: a classifier's is the share of right answers. Where `is_share`,
    1 is the best there is.
    """

    budget: float
    macs: float
    quality: float
    n: int
    is_share: bool = True


def area(points: Sequence[Kept]) -> float:
    """Mean height of the straight lines through quality over budget; of one budget, its quality.

    0.6 at 0.4, 0.8 at 0.5, 0.9 at 0.8: (0.07 + 0.255) / 0.4 = 0.8125.
    """
    ordered = sorted(points, key=lambda point: point.budget)
    if len(ordered) == 1:
        return ordered[0].quality
    x = np.array([point.budget for point in ordered])
    y = np.array([point.quality for point in ordered])
    return float((np.diff(x) * (y[1:] + y[:-1]) / 2).sum() / (x[-1] - x[0]))


def light(seed: int) -> CompensationOptions:
    """A trial's repair, of half the rows and three strengths.

    It takes a third of the time; accuracies are a few points lower, the order of recipes is the same.
    """
    return CompensationOptions(ridges=(1e-4, 1e-2, 1.0), rows_per_feature=8.0, rows_least=4096, seed=seed)


@dataclass(frozen=True, slots=True)
class Bench:
    """What all trials share. A trial is scored and repaired on batches of `score_images`, judged on `trial_images`.

    Both are (inputs [N, ...], targets), of the calibration and of the search images. `task` says what an answer means,
    None where the network is a classifier. `judged` holds the quality of every plan that was made once, by the hash of
    what it keeps.
    """

    work: Work
    structure: Structure
    score_images: tuple[Batch, ...]
    trial_images: tuple[Batch, ...]
    task: Task | None = None
    judged: dict[str, Figure] = field(default_factory=dict)

    @property
    def trial_image_count(self) -> int:
        """How many images judge a trial."""
        return sum(count(inputs) for inputs, _ in self.trial_images)

    def within_reach(self, shares: Sequence[float]) -> tuple[float, ...]:
        """Rising: the hardest comes first, as there recipes differ most. Without any, the usual ones that can be met.

        Raises BudgetError where no recipe can keep as little as is asked for.
        """
        recipe = self.work.recipe
        scores = self.scores(replace(recipe, criterion="random"), [])  # what is left at least depends on no score
        if shares:
            self.plan(recipe, scores, min(shares))  # raises where it can't be met
            return tuple(sorted(shares))

        least = least_share(self.work.dense, self.structure, scores, "macs", ranking_of(recipe))
        usual = tuple(share for share in USUAL_BUDGETS if share >= least)
        if not usual:
            self.plan(recipe, scores, max(USUAL_BUDGETS))  # raises, naming the least that can be asked for
        return usual

    def scores(self, recipe: Recipe, images: Sequence[Batch]) -> Scores:
        """The criterion's own, as the recipe reads them. Raises CompressorError's subclasses for what it refuses."""
        scoring = scoring_of(recipe)
        groups = self.structure.groups
        return score(
            self.work.dense, groups, images, criterion=scoring.criterion, options=scoring.options, task=self.task
        )

    def comparable(self, recipe: Recipe, images: Sequence[Batch]) -> Scores:
        """What plans are made of; probes need scores alone."""
        scores = self.scores(recipe, images)
        if not scoring_of(recipe).measured:
            return scores
        subject = Prunable(self.work.dense, self.structure)
        return measure_units(subject, scores, images, ranking_of(recipe), task=self.task)

    def probe(self, recipe: Recipe) -> Scores:
        """A few images; a classifier's with wrong labels, so that the labelled and the predicted class differ."""
        inputs, targets = self.score_images[0]
        inputs, targets = cut(inputs, 0, PROBE_IMAGES), None if targets is None else targets[:PROBE_IMAGES]
        if self.task is None and isinstance(targets, Tensor):
            logits = self.work.dense(*as_tuple(inputs_to(self.work.example, self.work.device)))
            targets = (targets + 1) % int(logits.shape[1])
        return self.scores(recipe, [(inputs, targets)])

    def plan(self, recipe: Recipe, scores: Scores, share: float) -> Plan:
        """Any plan below the line will do: rankings are compared under the same limit."""
        return make_plan(self.work.dense, self.structure, scores, Budget("macs", share, 1.0), ranking_of(recipe))

    def judge(self, recipe: Recipe, scores: Scores, share: float) -> Kept:
        """A trial's step; rankings that agree on what goes are judged once."""
        plan = self.plan(recipe, scores, share)
        key = content_hash(plan.kept, recipe.seed)
        if key not in self.judged:
            network = self.reduced(plan, self.score_images, light(recipe.seed))
            self.judged[key] = self.quality(network, self.trial_images)
        return _kept(share, plan, self.judged[key])

    def quality(self, network: fx.GraphModule, images: Batches | Sequence[Batch]) -> Figure:
        """By the task's measure, on images that may be gone through again."""
        if self.task is None:
            return evaluate(network, images, metric=metric_of(self.work.chosen))
        return self.task.quality(predict_of(network), images)

    def reduced(
        self, plan: Plan, images: Sequence[Batch], options: CompensationOptions | None = None
    ) -> fx.GraphModule:
        """The pruned network, repaired as a run's is unless options say otherwise."""
        network, slices = prune(self.work.dense, self.structure, plan)
        repairing = repairing_of(self.work.recipe)
        if options is not None and repairing.compensation is not None:
            repairing = replace(repairing, compensation=options)
        repair_layers(self.work.dense, network, slices, images, repairing=repairing)
        return network

    def check(
        self, recipe: Recipe, shares: Sequence[float], images_by_split: Mapping[str, Batches]
    ) -> Iterator[dict[str, Kept]]:
        """A finalist at each budget as a run would make it, judged on each split of the images, by its name."""
        calibration = list(self.work.calibration)
        scores = self.comparable(recipe, calibration)
        for share in shares:
            plan = self.plan(recipe, scores, share)
            network = self.reduced(plan, calibration)
            figures = {split: self.quality(network, images) for split, images in images_by_split.items()}
            yield {split: _kept(share, plan, figure) for split, figure in figures.items()}


def _kept(share: float, plan: Plan, figure: Figure) -> Kept:
    return Kept(share, plan.macs_kept / plan.macs_dense, figure.value, figure.n, figure.is_share)


def first_images(images: Source, count: int, batch_size: int) -> tuple[Batch, ...]:
    """The first `count` of a split (0: all), prepared once; any stretch of a split holds the classes alike."""
    chosen = images.subset(np.arange(min(count, len(images)))) if count else images
    return tuple(batches(chosen, batch_size))
