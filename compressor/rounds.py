"""A round of pruning in memory: a network and its units in, a smaller repaired network out.

Score, plan, remove, repair: a run, a search, the studies and a library's user go by these functions. They know no
recipe, no folder and no file.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import fx, nn

from .budgets import BYTES_PER_PARAMETER, Budget, Kind
from .choices import Choices, Repairing, Scoring
from .criteria import LEARNED
from .errors import BudgetError, ModelError
from .graph import trace
from .graph.behaviour import require_function
from .graph.cost import measure_cost
from .graph.interface import answers, output_names
from .graph.lockstep import Batch
from .inputs.images import Batches
from .placement import device_of, inputs_to, release
from .planning import RankingOptions, compose, make_plan, measure_scores
from .planning.depth import order_of_branches
from .planning.likeness import Likeness
from .pruning import Structure, analyse, find_structure, identity_error, prune, slices_of
from .pruning.branches import without_branches
from .records import UNMET, Compensation, Cost, Depth, Dropped, IntArray, Plan, Scores, Slices
from .relevance import score
from .repair import compensate
from .repair.batchnorm import reestimate
from .steering import learn_scores
from .tasks import Targets, Task
from .tensors import Inputs, count

IDENTITY = 1e-9  # pruned against masked original, float64, relative: rounding through a few hundred layers
FITTED, JUDGED = 192, 64  # images that depths are repaired on, and those that tell which is best
DEPTHS = (0.0, 0.25, 0.5, 0.75, 0.95)  # of what has to go: the share of it that goes as whole branches
LabelledBatches = Sequence[tuple[Inputs, Targets]]
Progress = Callable[[float], None]
Planner = Callable[["Prunable", Scores], Plan]


def _silent(share: float) -> None:
    """Says nothing of how far a step has come."""


@dataclass(frozen=True, slots=True, eq=False)
class Prunable:
    """A traced network, the units it can lose, and which of the dense network's units it still has.

    `network` is a `torch.fx.GraphModule`, called like the model it came from. `kept` is empty for the dense network.
    """

    network: fx.GraphModule
    structure: Structure
    kept: Mapping[str, IntArray] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, eq=False)
class Round:
    """What a round came to: the network after it, its plan in units of the network before it, and what was found."""

    after: Prunable
    plan: Plan
    scores: Scores
    compensation: Compensation
    identity_error: float


def make_prunable(model: nn.Module, images: Inputs, *, keywords: Sequence[str] = (), seed: int = 0) -> Prunable:
    """A module, ready to lose units: traced, and every group of units checked in float64.

    `images` [N, ...], N >= 2, as the model takes them: a tensor, or a tuple of several, by position or, where
    `keywords` name them, by name. The model is left as it is. Raises ModelError where its
    forward can't be traced, is random, or depends on more than one image at a time.
    """
    graph = trace(model, images, keywords)
    require_function(model, graph, images, keywords)
    return Prunable(graph, find_structure(graph, images, seed))


def score_units(
    subject: Prunable,
    batches: Batches | LabelledBatches,
    *,
    scoring: Scoring = Scoring(),
    ranking: RankingOptions = RankingOptions(),
    task: Task | None = None,
    lessons: Batches | None = None,
    folder: Path | None = None,
    progress: Progress = _silent,
) -> Scores:
    """What each unit is worth: by the criterion, and by the loss measured where `scoring` asks for that.

    Batches are (inputs [N, ...], targets), decoded only as they are scored. Targets are class labels [N] (-1: the
    predicted class is taken), or what `task` takes. A learned criterion learns from `lessons`, or without them from
    the batches, in either case not from their targets, and goes on where it was stopped, by what it put aside in
    `folder`.
    """
    scores = _criterion_scores(subject, batches, scoring, task, lessons, folder, progress)
    if not scoring.measured:
        return scores
    return measure_units(subject, scores, batches, ranking, task=task, progress=progress)


def _criterion_scores(
    subject: Prunable,
    batches: Batches | LabelledBatches,
    scoring: Scoring,
    task: Task | None,
    lessons: Batches | None,
    folder: Path | None,
    progress: Progress,
) -> Scores:
    total = max(1, _image_count(batches))

    def read(criterion: str, progress: Progress) -> Scores:
        return score(
            subject.network,
            subject.structure.groups,
            batches,
            criterion=criterion,
            options=scoring.options,
            task=task,
            progress=lambda images: progress(images / total),
        )

    if scoring.criterion not in LEARNED:
        return read(scoring.criterion, progress)
    start = scoring.steering.start
    return learn_scores(
        subject.network,
        subject.structure,
        lessons or batches,
        criterion=scoring.criterion,
        options=scoring.steering,
        task=task,
        start=read(start, _silent) if start else None,
        folder=folder,
        progress=progress,
    )


def _image_count(batches: Batches | LabelledBatches) -> int:
    """Without decoding any image that is not decoded yet."""
    if isinstance(batches, Batches):
        return len(batches.images)
    return sum(count(images) for images, _ in batches)


def measure_units(
    subject: Prunable,
    scores: Scores,
    batches: Batches | Sequence[Batch],
    ranking: RankingOptions,
    *,
    task: Task | None = None,
    progress: Progress = _silent,
) -> Scores:
    """The scores made comparable: what the outputs lose when each group gives up units and its readers are repaired."""
    if not scores.values:
        return scores
    release()
    return measure_scores(subject.network, subject.structure, scores, batches, ranking, task=task, progress=progress)


def drop_branches(dense: Prunable, names: Sequence[str], images: Inputs, seed: int = 0) -> Prunable:
    """The network without those residual branches, its units found and checked anew; the dense one is left as it is.

    `images` [N, ...] are as for `make_prunable`. Raises ModelError for a name that is no branch (`pruning.branches`).
    """
    if not names:
        return dense
    network = without_branches(dense.network, names)
    return Prunable(network, find_structure(network, images, seed))


def choose_depth(
    dense: Prunable,
    budget: Budget,
    batches: Batches | LabelledBatches,
    *,
    images: Inputs,
    choices: Choices = Choices(),
    task: Task | None = None,
    planned: Planner | None = None,
    progress: Progress = _silent,
) -> Depth:
    """How many residual branches may go whole before the rest is thinned, judged by the networks they end in.

    Branches are put in the order in which the network misses them least; then the round is made with none, some and
    more of them gone (`DEPTHS`, until two in a row are worse), each at the same budget, on the first `FITTED` images,
    and what lies nearest to the dense network on the `JUDGED` images behind them is taken. `planned` makes a plan that
    meets the budget, one of time among others; without it, counted ones are met. Raises BudgetError where none can be.
    """
    lessons, judging = _lessons_and_judges(list(batches))
    counted = budget if budget.kind == "latency" else budget_of(dense.network, dense.network, budget)
    goes = 1 - counted.share
    planned = planned or _counting(dense, budget, choices.ranking)
    order = order_of_branches(
        dense.network, judging, most=max(DEPTHS) * goes, task=task, progress=lambda share: progress(0.2 * share)
    )
    likeness = Likeness.to(_answers(dense.network, judging), output_names(dense.network), task)
    numbers = sorted({_reaching(order, depth * goes) for depth in DEPTHS})

    def error_without(number: int) -> float:
        names = [branch.name for branch in order[:number]]
        network = _thinned(dense, names, planned, lessons, images=images, choices=choices, task=task)
        return likeness.error(_answers(network, judging))

    errors = _errors_of(numbers, error_without, lambda share: progress(0.2 + 0.8 * share))
    tried = numbers[: len(errors)]
    return Depth(order, tuple(tried), tuple(errors), tried[errors.index(min(errors))])


def _errors_of(numbers: Sequence[int], error_without: Callable[[int], float], progress: Progress) -> list[float]:
    """The outputs' error with so many branches gone, until two in a row are worse; `UNMET` where no plan is found.

    Raises BudgetError where none is for any number.
    """
    errors: list[float] = []
    refused: BudgetError | None = None
    for done, number in enumerate(numbers, start=1):
        try:
            errors.append(error_without(number))
        except BudgetError as error:
            refused = error
            errors.append(UNMET)
        progress(done / len(numbers))
        if min(errors[-2:]) > min(errors):  # more of them would be worse still
            break
    if refused is not None and min(errors) == UNMET:
        raise refused
    return errors


def _thinned(
    dense: Prunable,
    names: Sequence[str],
    planned: Planner,
    lessons: LabelledBatches,
    *,
    images: Inputs,
    choices: Choices,
    task: Task | None,
) -> fx.GraphModule:
    """The network without those branches, and without the units that a plan then takes, repaired."""
    base = drop_branches(dense, names, images)
    scores = score_units(base, lessons, scoring=choices.scoring, ranking=choices.ranking, task=task)
    after, slices = remove_units(base, base, planned(base, scores))
    repair_layers(dense.network, after.network, slices, lessons, repairing=choices.repairing)
    return after.network


def _counting(dense: Prunable, budget: Budget, ranking: RankingOptions) -> Planner:
    """Plans of a counted budget, which is of the dense network."""

    def planned(subject: Prunable, scores: Scores) -> Plan:
        left = budget_of(dense.network, subject.network, budget)
        return make_plan(subject.network, subject.structure, scores, left, ranking)

    return planned


def _lessons_and_judges(batches: LabelledBatches) -> tuple[list[tuple[Inputs, Targets]], list[Inputs]]:
    """The batches that teach and, after them, the inputs of those that judge; of few images a quarter judges.

    The last batch of several teaches never; one alone does both.
    """
    total = _image_count(batches)
    enough = min(FITTED, total - total // 4)
    lessons: list[tuple[Inputs, Targets]] = []
    judging: list[Inputs] = []
    taught, judged = 0, 0  # images
    for number, (inputs, targets) in enumerate(batches, start=1):
        is_last = number == len(batches)
        if taught < enough and (not is_last or not lessons):
            lessons.append((inputs, targets))
            taught += count(inputs)
        elif judged < JUDGED:
            judging.append(inputs)
            judged += count(inputs)
    return lessons, judging or [lessons[-1][0]]


def _reaching(order: Sequence[Dropped], macs: float) -> int:
    """How many branches it takes to save that share of the MACs; all of them where they save less."""
    saved = 0.0
    for number, branch in enumerate(order):
        if saved >= macs:
            return number
        saved += branch.macs
    return len(order)


@torch.no_grad()
def _answers(network: fx.GraphModule, images: Sequence[Inputs]) -> list[Inputs]:
    """What the network answers to each batch [N, ...]."""
    return [answers(network, inputs_to(batch, device_of(network))) for batch in images]


def remove_units(dense: Prunable, subject: Prunable, plan: Plan) -> tuple[Prunable, Slices]:
    """The network without the units a plan takes, nothing repaired; and what stays of the *dense* network's tensors.

    `plan` is in units of `subject`, which is `dense` or what earlier rounds left of it.
    """
    small, _ = prune(subject.network, subject.structure, plan)
    kept = compose(dict(subject.kept), plan.kept)
    structure = analyse(small, dense.structure.tied, dense.structure.frozen)
    return Prunable(small, structure, kept), slices_of(dense.network, dense.structure, kept)


def repair_layers(
    dense: fx.GraphModule,
    pruned: fx.GraphModule,
    slices: Slices,
    batches: Batches | Sequence[Batch],
    *,
    repairing: Repairing = Repairing(),
    progress: Progress = _silent,
) -> Compensation:
    """Refits the layers that lost inputs, then takes batch normalisation's statistics anew, where asked for; in place.

    Batches are inputs [N, ...], or (inputs, targets), and decoded only if asked for. Raises DataError without any.
    """
    release()
    refitted = Compensation()
    if repairing.compensation is not None:
        refitted = compensate(dense, pruned, slices, batches, options=repairing.compensation, progress=progress)
    if repairing.reestimate:
        reestimate(pruned, batches, reference=dense, slices=slices)
    return refitted


def pruning_round(
    dense: Prunable,
    subject: Prunable,
    budget: Budget,
    batches: Batches | LabelledBatches,
    *,
    images: Inputs,
    choices: Choices = Choices(),
    scores: Scores | None = None,
    task: Task | None = None,
    progress: Progress = _silent,
) -> Round:
    """Score, plan, remove and repair once.

    `budget` is of the dense network, `task` what its answer means where it is no classifier; `images` [N, ...] check
    that what remains equals the masked original, in float64. `scores` are taken where they are known already. Raises
    BudgetError where no plan meets the budget, ModelError where the check fails.
    """
    if scores is None:
        scores = score_units(
            subject, batches, scoring=choices.scoring, ranking=choices.ranking, task=task, progress=progress
        )
    left = budget_of(dense.network, subject.network, budget)
    plan = make_plan(subject.network, subject.structure, scores, left, choices.ranking)
    after, slices = remove_units(dense, subject, plan)
    error = identity_error(subject.network, after.network, subject.structure, plan.kept, images)
    if error > IDENTITY:
        raise ModelError(f"pruned and masked original differ by {error:.1e}, at most {IDENTITY:g} can be rounding")
    compensation = repair_layers(dense.network, after.network, slices, batches, repairing=choices.repairing)
    return Round(after, plan, scores, compensation, error)


def budget_of(dense: fx.GraphModule, current: fx.GraphModule, budget: Budget) -> Budget:
    """A counted budget of the dense network as one of what is left of it; an amount becomes a share."""
    before = amount_of(measure_cost(dense), budget.kind)
    now = amount_of(measure_cost(current), budget.kind)
    return replace(budget, share=budget.of(before).share / (now / before))


def amount_of(cost: Cost, kind: Kind) -> int:
    """The MACs, parameters or bytes of fp32 weights, as a counted budget's kind says."""
    if kind == "macs":
        return cost.macs
    if kind == "size":
        return cost.parameters * BYTES_PER_PARAMETER
    return cost.parameters
