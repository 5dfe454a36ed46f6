"""The repaired network in, the one that ships out: fine-tuned where that is better on images apart."""

from __future__ import annotations

import copy
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import fx

from ..choices import tuning_of
from ..files import read_json, write_json
from ..inputs.images import Batches
from ..pruning import Structure
from ..records import Plan
from ..repair.choice import Choice, Judged, choose
from ..repair.finetune import FinetuneOptions, finetune
from ..run.checks import Checks
from ..run.fingerprints import Known
from ..run.judges import judges_of
from ..run.saved import WEIGHTS, Network, read_weights, rebuild, write_network, write_weights
from ..run.stages import Keeper, Progress
from ..run.tasking import NetworkTask
from ..run.user_code import code_sha256s
from ..run.work import Work
from ..tasks import Task
from .removal import Pruned


@dataclass(frozen=True, slots=True)
class Recovered:
    """The network that ships; where it was fine-tuned, the tuned one and why it ships or does not."""

    shipped: fx.GraphModule
    tuned: fx.GraphModule | None = None
    choice: Choice | None = None
    checks: Checks = field(default_factory=Checks)


def recover(work: Work, structure: Structure, pruned: Pruned, task: NetworkTask) -> Recovered:
    """The repaired network, or what short fine-tuning makes of it, whichever is better on images apart.

    The dense network teaches. Without epochs, or images to tell the two apart, the repaired one ships.
    """
    recipe, folder = work.recipe, work.stages.folder
    judges = judges_of(work) if recipe.finetune_epochs else None
    not_checked: tuple[str, ...] = ()
    if recipe.finetune_epochs and judges is None:
        not_checked = ("fine-tuning: one calibration image can't both train and judge, so nothing was tuned",)
    recovered = work.stages.make(
        "finetune",
        _recovered,
        _keeper_of_recovered(work.base, structure, pruned.plan),
        dense=Known(work.dense, work.stages.keys["groups"]),
        repaired=Known(pruned.network, work.stages.keys[f"repair-{recipe.rounds}"]),
        lessons=judges and judges.lessons,
        judging=judges and judges.images,
        source=judges.source if judges else "",
        options=tuning_of(recipe),
        task=task.known,
    )
    kept = dict(pruned.plan.kept)
    code = code_sha256s(recipe)
    network = Network(
        work.model.builder,
        work.inputs,
        structure.tied,
        structure.frozen,
        kept,
        work.keywords,
        code,
        branches=work.depth.names,
    )
    write_network(folder, network)
    return replace(recovered, checks=Checks(not_checked=not_checked))


def _recovered(
    dense: fx.GraphModule,
    repaired: fx.GraphModule,
    lessons: Batches | None,
    judging: Batches | None,
    source: str,
    options: FinetuneOptions,
    task: Task | None,
    progress: Progress,
) -> Recovered:
    if lessons is None or judging is None:
        return Recovered(repaired)
    tuned = copy.deepcopy(repaired)
    steps = options.epochs + 1  # the last is the choice

    def say(epoch: int, loss: float) -> None:
        progress((epoch + 1) / steps)

    finetune(tuned, lessons, options=options, teacher=dense, task=task, progress=say)
    choice = choose(repaired, tuned, judging, source=source, task=task, dense=dense)
    return Recovered(tuned if choice.shipped == "tuned" else repaired, tuned, choice)


def _keeper_of_recovered(dense: fx.GraphModule, structure: Structure, plan: Plan) -> Keeper[Recovered]:
    tuned_file, choice_file, shipped_file = "stages/tuned.safetensors", "choice.json", WEIGHTS

    def write(folder: Path, result: Recovered) -> None:
        if result.tuned is None:
            (folder / tuned_file).unlink(missing_ok=True)  # of an earlier run with other epochs
        else:
            write_weights(folder / tuned_file, result.tuned)
        choice = None if result.choice is None else asdict(result.choice)
        write_json(folder / choice_file, {"schema": "choice/1", "choice": choice})
        write_weights(folder / shipped_file, result.shipped)

    def network(path: Path) -> fx.GraphModule:
        small = rebuild(dense, structure, dict(plan.kept))
        read_weights(path, small)
        return small

    def read(folder: Path) -> Recovered:
        choice = _choice_of(read_json(folder / choice_file, "choice/1")["choice"])
        tuned = None if choice is None else network(folder / tuned_file)
        return Recovered(network(folder / shipped_file), tuned, choice)

    return Keeper(write, read)


def _choice_of(saved: dict[str, Any] | None) -> Choice | None:
    if saved is None:
        return None
    judged = {name: Judged(**saved[name]) for name in ("repaired", "tuned")}
    return Choice(saved["shipped"], saved["source"], **judged)


def name_of_shipped(recovered: Recovered) -> str:
    """`repaired` or `tuned`."""
    return recovered.choice.shipped if recovered.choice is not None else "repaired"
