"""The repaired network in, the one that ships out: recovered where that is better on images apart."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import fx

from ..choices import recovering_of
from ..distributed import alone
from ..files import read_json, write_json
from ..pruning import Structure, slices_of
from ..records import Plan, Slices
from ..recovery import Moment, Recovery, RecoveryOptions, Setting, Trial
from ..recovery import recover as recover_network
from ..repair.better_of_two import Choice, Judged, choose
from ..run.checks import Checks
from ..run.fingerprints import Known, fingerprint
from ..run.judges import Judges, judges_of
from ..run.saved import WEIGHTS, Network, read_weights, rebuild, write_network, write_weights
from ..run.stages import Keeper, Progress
from ..run.tasking import NetworkTask
from ..run.user_code import code_sha256s
from ..run.work import Work
from ..tasks import Task
from .removal import Pruned


@dataclass(frozen=True, slots=True)
class Recovered:
    """The network that ships; where it was taught further, the tuned one, how, and why it ships or does not."""

    shipped: fx.GraphModule
    tuned: fx.GraphModule | None = None
    choice: Choice | None = None
    recovery: Recovery | None = None
    checks: Checks = field(default_factory=Checks)


def recover(work: Work, structure: Structure, pruned: Pruned, task: NetworkTask) -> Recovered:
    """The repaired network, or what the dense one's teaching makes of it, whichever is better on images apart.

    Without minutes or passes, or images to tell the two apart, the repaired one ships.
    """
    recipe = work.recipe
    judges, options, checks = None, None, Checks()
    if recipe.recovers:
        judges, options = judges_of(work), recovering_of(recipe)
        if judges is None:
            lacking = "recovery: so few calibration images can't both teach and judge, so nothing was trained"
            checks = Checks(not_checked=(lacking,))
    recovered = work.stages.make(
        "finetune",
        _recovered,
        _keeper_of_recovered(work.base, structure, pruned.plan),
        together=True,
        dense=Known(work.dense, work.stages.keys["groups"]),
        repaired=Known(pruned.network, work.stages.keys[f"repair-{recipe.rounds}"]),
        slices=slices_of(work.base, structure, pruned.plan),
        judges=judges and Known(judges, [judges.source, *map(fingerprint, judges.parts)]),
        options=options,
        task=task.known,
        folder=work.stages.output,
    )
    network = Network(
        work.model.builder,
        work.inputs,
        structure.tied,
        structure.frozen,
        dict(pruned.plan.kept),
        work.keywords,
        code_sha256s(recipe),
        branches=work.depth.names,
    )
    write_network(work.stages.folder, network)
    return replace(recovered, checks=checks)


def _recovered(
    dense: fx.GraphModule,
    repaired: fx.GraphModule,
    slices: Slices,
    judges: Judges | None,
    options: RecoveryOptions | None,
    task: Task | None,
    folder: Path,
    progress: Progress,
) -> Recovered:
    if judges is None or options is None:
        return Recovered(repaired)
    tuned, recovery = recover_network(
        dense,
        repaired,
        judges.lessons,
        judges.held,
        slices=slices,
        task=task,
        options=options,
        folder=folder / "stages",
        progress=progress,
    )
    with alone():  # few images, and every process sees all of them
        choice = choose(repaired, tuned, judges.images, source=judges.source, task=task, dense=dense)
    shipped = tuned if choice.shipped == "tuned" else repaired
    return Recovered(shipped, tuned, choice, recovery)


def _keeper_of_recovered(dense: fx.GraphModule, structure: Structure, plan: Plan) -> Keeper[Recovered]:
    tuned_file, choice_file, recovery_file = "stages/tuned.safetensors", "choice.json", "recovery.json"

    def write(folder: Path, result: Recovered) -> None:
        if result.tuned is None:
            (folder / tuned_file).unlink(missing_ok=True)  # of an earlier run with other epochs
        else:
            write_weights(folder / tuned_file, result.tuned)
        choice = None if result.choice is None else asdict(result.choice)
        write_json(folder / choice_file, {"schema": "choice/1", "choice": choice})
        recovery = None if result.recovery is None else asdict(result.recovery)
        write_json(folder / recovery_file, {"schema": "recovery/1", "recovery": recovery})
        write_weights(folder / WEIGHTS, result.shipped)

    def network(path: Path) -> fx.GraphModule:
        small = rebuild(dense, structure, dict(plan.kept))
        read_weights(path, small)
        return small

    def read(folder: Path) -> Recovered:
        choice = _choice_of(read_json(folder / choice_file, "choice/1")["choice"])
        tuned = None if choice is None else network(folder / tuned_file)
        recovery = _recovery_of(read_json(folder / recovery_file, "recovery/1")["recovery"])
        return Recovered(network(folder / WEIGHTS), tuned, choice, recovery)

    return Keeper(write, read)


def _choice_of(saved: dict[str, Any] | None) -> Choice | None:
    if saved is None:
        return None
    judged = {name: Judged(**saved[name]) for name in ("repaired", "tuned")}
    return Choice(saved["shipped"], saved["source"], **judged)


def _recovery_of(saved: dict[str, Any] | None) -> Recovery | None:
    if saved is None:
        return None
    moments = tuple(Moment(**moment) for moment in saved["moments"])
    trials = tuple(Trial(Setting(**trial["setting"]), trial["distance"]) for trial in saved["trials"])
    return Recovery(**{**saved, "moments": moments, "trials": trials, "setting": Setting(**saved["setting"])})


def name_of_shipped(recovered: Recovered) -> str:
    """`repaired` or `tuned`."""
    if recovered.choice is None:
        return "repaired"
    return recovered.choice.shipped
