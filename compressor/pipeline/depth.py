"""The dense network in, what is left of it once the residual branches went that it misses least; a stage of its own."""

from __future__ import annotations

from dataclasses import replace

from ..budgets import Budget
from ..choices import Choices, choices_of
from ..inputs.images import Batches
from ..pruning import Structure, find_structure
from ..pruning.branches import without_branches
from ..records import Depth, InputSpec
from ..rounds import Prunable, choose_depth
from ..run.fingerprints import Known
from ..run.plans import Aim, aimed_at
from ..run.stages import Progress, kept_as_record
from ..run.tasking import NetworkTask
from ..run.work import Work
from ..tasks import Task
from ..tensors import noise_like


def lose_branches(work: Work, structure: Structure, task: NetworkTask, aim: Aim) -> tuple[Work, Structure, Aim]:
    """The work with as many whole branches gone as pay, the units of what is left, and the aim for these."""
    if work.recipe.blocks == "keep":
        return work, structure, aim
    depth = work.stages.make(
        "depth",
        _chosen,
        kept_as_record("depth.json", Depth),
        dense=Known(Prunable(work.dense, structure), work.stages.keys["groups"]),
        budget=_counted(aim.budget),
        images=work.calibration_images,
        inputs=list(work.inputs),
        choices=choices_of(work.recipe),
        task=task.known,
    )
    work = replace(work, depth=depth)
    if not depth.taken:
        return work, structure, aim
    work = replace(work, shallow=without_branches(work.dense, depth.names))
    units = find_structure(work.base, work.example, work.recipe.seed)
    return work, units, aimed_at(work, units, aim)


def _chosen(
    dense: Prunable,
    budget: Budget,
    images: Batches,
    inputs: list[InputSpec],
    choices: Choices,
    task: Task | None,
    progress: Progress,
) -> Depth:
    return choose_depth(dense, budget, images, images=noise_like(inputs), choices=choices, task=task, progress=progress)


def _counted(budget: Budget) -> Budget:
    """What depths are compared at: a share of the MACs where the budget is of time, which depth saves more of."""
    return budget if budget.kind != "latency" else Budget("macs", budget.share)
