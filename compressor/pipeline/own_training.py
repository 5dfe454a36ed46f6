"""A run's folder and weights that its owner trained in, what ships with them out: same plan, same gates.

The run stays as it is; all is read and checked before anything is written.
"""

from __future__ import annotations

import copy
import os
from dataclasses import dataclass, replace
from pathlib import Path

from torch import fx, nn

from ..delivery import Outcome
from ..files import read_json, read_record, write_record
from ..graph.cost import measure_cost
from ..inputs.checkpoints import state_hash
from ..inputs.models import model_in_hand
from ..pruning import Structure, analyse
from ..pruning.branches import without_branches
from ..recipe import Recipe
from ..records import Accuracy, Depth, Plan, Quality, figure_of
from ..run.checks import Checks, require_passed
from ..run.finished import Finished, read_finished, require_same, require_trusted_code
from ..run.judges import spare_of
from ..run.saved import Network, rebuild, write_network
from ..run.stages import Notify, copy_stages, open_run, recorded_files, require_finished
from ..run.task_choice import UserParts
from ..run.tasking import make_task
from ..run.trained import state_of, with_trained
from ..run.work import Request, Work, read_work
from .quality import measure_nearness, measure_networks
from .removal import identity_gate
from .units import keep_units
from .weights import keep_inputs, keep_trained

FIGURE_NOISE = 1e-6  # of a figure that is counted again on the same images: sums in another order


@dataclass(frozen=True, slots=True)
class Asked:
    """Which run's network ships with weights trained afterwards, and where to; None for `out`: beside the run.

    `entry` is where in a checkpoint the weights lie. `recipe` stands in place of the folder's; of the folder's, `data`
    and `evaluation_data` may be replaced where images have moved.
    """

    folder: Path
    out: str | os.PathLike[str] | None = None
    entry: str = ""
    trust: bool = False
    recipe: Recipe | None = None
    data: str = ""
    evaluation_data: str = ""


@dataclass(frozen=True, slots=True, eq=False)
class Shipping:
    """All that ships with new weights, read and checked.

    `bare` is the dense network without the removed units, `trained` the same with the weights of the training, and
    `structure` None where nothing was removed.
    """

    work: Work
    finished: Finished
    structure: Structure | None
    bare: fx.GraphModule
    trained: fx.GraphModule


def read_shipping(
    asked: Asked, trained: object, module: nn.Module | None, data: object, parts: UserParts, notify: Notify
) -> Shipping:
    """The run, the model and data it was made from, and the trained weights in its network; nothing is written.

    Raises InputError's subclasses for what is not the run's or does not fit, FolderError for a run that is not finished
    or a folder that holds others.
    """
    finished = _finished(asked)
    if asked.recipe is None:  # what a folder says: that of a run in hand is the user's own
        in_hand = set(parts.functions)
        if asked.data or data is not None:
            in_hand.add("data")
        if asked.evaluation_data:
            in_hand.add("evaluation_data")
        require_trusted_code(finished, model=module is not None, in_hand=in_hand, trust=asked.trust)
    recipe = finished.recipe
    state = state_of(trained, asked.entry)  # before anything long
    model = None if module is None else model_in_hand(module)
    work = read_work(Request(recipe, model, data, parts, spare=spare_of(recipe)), notify)
    require_same(finished, work)

    work = _without_branches(work, finished)
    structure = _structure_of(work, finished)
    kept = dict(finished.network.kept)
    bare = copy.deepcopy(work.base) if structure is None else rebuild(work.base, structure, kept)
    network = with_trained(bare, state, work.model.module)
    identity = {**work.stages.identity, "trained": state_hash(network)}
    stages = open_run(recipe.folder, identity, notify)
    work = replace(work, stages=stages, warnings=(*work.warnings, *state.notes))
    return Shipping(work, finished, structure, bare, network)


def _finished(asked: Asked) -> Finished:
    """The run, its recipe for the folder that is shipped to."""
    finished = read_finished(asked.folder, asked.recipe)
    out = asked.out
    if out is None:
        folder = asked.folder
        if folder.name in ("", ".."):  # `.` and the like, which are no name to put another beside
            folder = folder.resolve()
        out = folder.with_name(f"{folder.name}-trained")
    recipe = replace(finished.recipe, out=str(Path(out)))
    if asked.data:
        recipe = replace(recipe, data=asked.data)
    if asked.evaluation_data:
        recipe = replace(recipe, evaluation_data=asked.evaluation_data)
    return replace(finished, recipe=recipe)


def _structure_of(work: Work, finished: Finished) -> Structure | None:
    """The dense network's groups as the run's check left them; None where nothing was removed."""
    if not finished.network.kept:
        return None
    return analyse(work.base, finished.network.tied, finished.network.frozen)


def _without_branches(work: Work, finished: Finished) -> Work:
    """The work with the residual branches gone that went in the run."""
    names = finished.network.branches
    if not names:
        return work
    depth = read_record(finished.folder / "depth.json", Depth)
    return replace(work, depth=depth, shallow=without_branches(work.dense, names))


def trained_outcome(shipping: Shipping) -> Outcome:
    """All that a run does once its network is there, with the trained one, up to what is delivered of it."""
    work, finished = shipping.work, shipping.finished
    copy_stages(finished.folder, work.stages.folder, ("groups", "mean answer", *finished.stages))
    require_finished(work.stages.folder, finished.stages, remedy="delete that folder, and ship again")
    checks, plan = Checks(warnings=work.warnings), None
    if shipping.structure is not None:
        plan, identity = _removed_again(shipping, shipping.structure)
        checks += identity
    network = _keep_network(shipping)

    origin = work.stages.keys["trained"]
    dense_origin = work.stages.keys.get("groups", origin)
    task = make_task(work.stages, work.chosen, work.dense, work.calibration_images, dense_origin)
    accuracy = measure_networks(work, {"dense": work.dense, "trained": network}, origin, task)
    earlier, note = _earlier_figures(finished.folder, accuracy["dense"])
    near_dense = measure_nearness(work, {"trained": network}, origin)
    figures = {"dense": accuracy["dense"], **earlier, "trained": accuracy["trained"], "shipped": accuracy["trained"]}
    return Outcome(
        shipping.structure,
        plan,
        network,
        figures,
        {**near_dense, "shipped": near_dense["trained"]},
        task,
        checks=checks + note,
        shipped="trained",
    )


def _removed_again(shipping: Shipping, structure: Structure) -> tuple[Plan, Checks]:
    """The run's groups and plan to this folder. Raises GateError where the network is not the masked original."""
    work = shipping.work
    keep_units(work, structure)
    plan = Plan(
        dict(shipping.finished.network.kept),
        macs_dense=measure_cost(work.dense).macs,
        macs_kept=measure_cost(shipping.trained).macs,
        budget=work.recipe.budget,
        branches=work.depth.names,
    )
    write_record(work.stages.folder / "plan.json", plan)
    identity = identity_gate(work, work.base, shipping.bare, structure, plan)
    require_passed(work.stages, identity)
    return plan, identity


def _keep_network(shipping: Shipping) -> fx.GraphModule:
    """The trained network to this folder, with what rebuilds it, and as it lies there."""
    work, replayed = shipping.work, shipping.finished.network
    keep_inputs(work)
    trained = keep_trained(work, shipping.trained)
    network = Network(
        work.model.builder,
        work.inputs,
        replayed.tied,
        replayed.frozen,
        dict(replayed.kept),
        work.keywords,
        branches=replayed.branches,
    )
    write_network(work.stages.folder, network)
    return trained


def _earlier_figures(folder: Path, dense: Accuracy | Quality) -> tuple[dict[str, Accuracy | Quality], Checks]:
    """What the run's own networks came to on the same images; none, and a warning, where its dense figure is another.

    Empty where the run has not come so far.
    """
    path = folder / "accuracy.json"
    if not path.is_file() or "accuracy.json" not in recorded_files(folder):
        return {}, Checks()
    rows = read_json(path, "figures/1")["networks"]
    figures = {name: figure_of(fields) for name, fields in rows.items()}
    before = figures.pop("dense")
    counts_alike = (before.metric, before.n) == (dense.metric, dense.n)
    if not counts_alike or not abs(before.value - dense.value) <= FIGURE_NOISE:  # NaN is near nothing
        text = (
            f"the dense network's {dense.metric} is {dense.value:.4g} on {dense.n} images, and was {before.metric} "
            f"{before.value:.4g} on {before.n} in {folder}: what that run's networks came to is left out"
        )
        return {}, Checks(warnings=(text,))
    earlier = {name: figure for name, figure in figures.items() if name in ("removed", "repaired", "tuned")}
    return earlier, Checks()


def budget_facts(folder: Path) -> dict[str, object]:
    """How the run's budgets were met, which training changes nothing of; empty where a gate ended the run."""
    path = folder / "summary.json"
    if not path.is_file():
        return {}
    summary = read_json(path, "summary/2")
    return {"budgets": summary["budgets"]} if "budgets" in summary else {}
