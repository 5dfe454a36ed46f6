"""A network and its groups in, the smaller one out: rounds of score, plan, removal and repair, each a stage.

What `rounds` does in memory, kept in the run's folder. A removed network is believed only once it equals the masked
original.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from torch import fx

from ..choices import Repairing, measuring_of, repairing_of, scoring_of
from ..criteria import LEARNED
from ..files import read_record, write_record
from ..graph.cost import measure_cost
from ..inputs.images import Batches
from ..planning import compose
from ..pruning import Structure, analyse, identity_error, prune, slices_of
from ..records import Compensation, IntArray, Plan, Scores, Slices
from ..rounds import Prunable, measure_units, repair_layers, score_units
from ..run.checks import Checks, gate, require_passed
from ..run.fingerprints import Known
from ..run.judges import judging_of
from ..run.lessons import lessons_of
from ..run.plans import Aim, kept_of, make_step, set_aim, summary_of_budgets, warn_below, words_of
from ..run.saved import read_weights, write_weights
from ..run.stages import Keeper, Progress, kept_as_record
from ..run.tasking import NetworkTask
from ..run.work import Work, own_share
from ..steering import learned_in
from ..tensors import from_arrays
from .weights import keep_inputs

IDENTITY_IMAGES = 4


@dataclass(frozen=True, slots=True, eq=False)
class Pruned:
    """What the rounds came to: the plan in units of the dense network, and the network without them, repaired.

    `budget_facts` say how the budgets were met, for the summary, `budget` in words.
    """

    plan: Plan
    network: fx.GraphModule
    checks: Checks
    budget_facts: Mapping[str, object]
    budget: str = ""


def remove_and_repair(work: Work, structure: Structure, task: NetworkTask, aim: Aim | None = None) -> Pruned:
    """Rounds of score, plan, removal and repair; `structure` is the base network's, `aim` the recipe's if not given.

    Raises GateError where a network is not the masked original.
    """
    recipe, folder = work.recipe, work.stages.folder
    aim = aim or set_aim(work, structure)
    current, units = work.base, structure
    kept: dict[str, IntArray] = {}
    checks = Checks()
    budget_facts: dict[str, object] = {}
    for r in range(1, recipe.rounds + 1):
        scores = find_scores(work, r, current, units, task)
        step = make_step(work, r, current, units, scores, aim)
        kept = compose(kept, step.plan.kept)

        removed, _ = prune(current, units, step.plan)
        identity = identity_gate(work, current, removed, units, step.plan)
        require_passed(work.stages, identity)
        current = _stage_repair(work, r, structure, kept, removed)
        units = analyse(current, structure.tied, structure.frozen)

        checks += step.checks + identity
        budget_facts |= step.facts

    keep_inputs(work)
    plan = Plan(kept, measure_cost(work.dense).macs, measure_cost(current).macs, recipe.budget, work.depth.names)
    write_record(folder / "plan.json", plan)
    kept_shares = kept_of(aim.budgets, work.dense, current, step.measured)
    checks += warn_below(kept_shares, recipe.multiple)
    return Pruned(plan, current, checks, budget_facts | summary_of_budgets(kept_shares), words_of(kept_shares))


def find_scores(work: Work, r: int, graph: fx.GraphModule, units: Structure, task: NetworkTask) -> Scores:
    """What round r ranks by; a finished stage's if there is one, whatever the budget."""
    origin = _origin(work, r)
    subject = Known(Prunable(graph, units), origin)
    scoring, folder = scoring_of(work.recipe), work.stages.folder
    # a learned criterion trains in one process: split batches would round to another selector
    images = work.calibration_images if scoring.criterion in LEARNED else own_share(work.calibration_images)
    scores = work.stages.make(
        f"scores-{r}",
        score_units,
        kept_as_record(f"scores-{r}.json", Scores),
        subject=subject,
        batches=images,
        lessons=lessons_of(work, len(judging_of(work.recipe, work.splits.search))),
        scoring=replace(scoring, measured=False),  # read alike whether it is measured afterwards or not
        task=task.known,
        folder=Known(folder / learned_in(r), "the round's own"),
    )
    if not scoring.measured:
        return scores
    return work.stages.make(
        f"measured-{r}",
        measure_units,
        kept_as_record(f"measured-{r}.json", Scores),
        together=True,
        subject=subject,
        scores=Known(scores, work.stages.keys[f"scores-{r}"]),
        batches=work.calibration_images,
        ranking=measuring_of(work.recipe),
        task=task.known,
    )


def _origin(work: Work, r: int) -> str:
    """The key of the stage that made the network which round r starts from."""
    keys = work.stages.keys
    base = keys["depth"] if work.depth.taken else keys["groups"]
    return keys.get(f"repair-{r - 1}", base)


@dataclass(frozen=True, slots=True)
class Repaired:
    """A network after its repair, and what that refitted."""

    network: fx.GraphModule
    compensation: Compensation


def _stage_repair(
    work: Work, r: int, structure: Structure, kept: dict[str, IntArray], removed: fx.GraphModule
) -> fx.GraphModule:
    """The network that round r left, repaired; `kept` are the dense network's units that it still has."""
    record, weights = f"repair-{r}.json", f"stages/repaired-{r}.safetensors"

    def write(folder: Path, result: Repaired) -> None:
        write_record(folder / record, result.compensation)
        write_weights(folder / weights, result.network)

    def read(folder: Path) -> Repaired:
        network = copy.deepcopy(removed)
        compensation = read_record(folder / record, Compensation)
        read_weights(folder / weights, network)
        return Repaired(network, compensation)

    origin = _origin(work, r)
    images = own_share(work.calibration_images)
    repaired = work.stages.make(
        f"repair-{r}",
        _repaired,
        Keeper(write, read),
        dense=Known(work.dense, work.stages.keys["groups"]),
        removed=Known(removed, [origin, kept]),
        slices=slices_of(work.base, structure, kept),
        images=images,
        repairing=repairing_of(work.recipe),
    )
    return repaired.network


def _repaired(
    dense: fx.GraphModule,
    removed: fx.GraphModule,
    slices: Slices,
    images: Batches,
    repairing: Repairing,
    progress: Progress,
) -> Repaired:
    network = copy.deepcopy(removed)
    return Repaired(network, repair_layers(dense, network, slices, images, repairing=repairing, progress=progress))


def identity_gate(work: Work, graph: fx.GraphModule, raw: fx.GraphModule, units: Structure, step: Plan) -> Checks:
    """The first thing believed of a pruned network: it is the original without the removed units."""
    images = from_arrays(work.sample(IDENTITY_IMAGES))
    return gate(
        "identity: removed = masked original",
        identity_error(graph, raw, units, step.kept, images),
        limit=work.recipe.max_identity_error,
        remedy="this is a defect of the pruner: please report the model; `--units` can leave the failing kind of unit "
        "out",
    )
