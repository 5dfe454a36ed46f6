"""One run: a recipe in, a smaller verified network, its files, report and bundle out.

Every stage's result lies in the run's folder; a stage is done again only when its inputs changed.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from torch import fx, nn

from ..budgets import parse_budgets
from ..delivery import Delivered, Outcome, deliver
from ..delivery.summary import stage_costs
from ..distributed import by_first, process_group, rank
from ..files import write_json
from ..inputs.models import Model
from ..placement import computing
from ..recipe import Recipe
from ..recovery import text_of as recovery_text
from ..repair.better_of_two import text_of
from ..run.checks import Checks
from ..run.judges import spare_of
from ..run.plans import require_reachable, set_aim
from ..run.saved import load_module, load_saved
from ..run.stages import Notify
from ..run.task_choice import NO_PARTS, UserParts
from ..run.tasking import make_task
from ..run.work import Request, Work, own_share, prepare
from .depth import lose_branches
from .own_training import Asked, budget_facts, read_shipping, trained_outcome
from .quality import measure_accuracy, measure_fidelity, measure_networks
from .recovery import name_of_shipped, recover
from .removal import remove_and_repair
from .units import find_units, keep_units
from .weights import keep_network

VARIANTS = ("dense", "removed", "repaired", "tuned", "trained", "shipped")


@dataclass(frozen=True, slots=True)
class Run:
    """A finished run. `summary` is the command's last line; `network()` rebuilds the network that ships.

    `dense` is the module that `compress` was given, where it was given one: the folder alone can't rebuild that. `data`
    and `parts`, of the task, are what it was given in memory beside it.
    """

    folder: Path
    recipe: Recipe
    summary: dict[str, Any]
    dense: nn.Module | None = field(default=None, repr=False, compare=False)
    data: object = field(default=None, repr=False, compare=False)
    parts: UserParts = field(default=NO_PARTS, repr=False, compare=False)

    def network(self, model: nn.Module | None = None, *, trust: bool = False) -> fx.GraphModule:
        """The network that ships, rebuilt from the folder; `model` in place of `dense` (see `load`)."""
        return load_saved(self.folder, self.dense if model is None else model, trust=trust)

    def module(self, model: nn.Module | None = None, *, trust: bool = False) -> nn.Module:
        """The same in the model's own class, where its code can follow (ModelError where not)."""
        return load_module(self.folder, self.dense if model is None else model, trust=trust)

    def ship(
        self,
        trained: object,
        *,
        out: str | os.PathLike[str] | None = None,
        entry: str = "",
        notify: Notify | None = None,
    ) -> Run:
        """The network with the weights of your own training, shipped as this run's was: see `compressor.ship`."""
        asked = Asked(self.folder, out, entry, recipe=self.recipe)
        return ship_trained(asked, trained, self.dense, self.data, self.parts, notify or silent)


def run(
    recipe: Recipe,
    *,
    notify: Notify | None = None,
    model: Model | None = None,
    data: object = None,
    parts: UserParts = NO_PARTS,
) -> Run:
    """One run from a recipe, continued where an earlier one in the same folder stopped.

    `model`, `data` and `parts` of the task are in memory, in place of what the recipe names. Raises RecipeError for the
    budget of a sweep.
    """
    parse_budgets(recipe.budget)
    with process_group(), computing(), _own_folder(recipe) as recipe_here:
        request = Request(recipe_here, model, data, parts, spare=spare_of(recipe))
        if notify is None or rank() > 0:
            notify = silent
        summary = _run(request, notify)
    return Run(recipe.folder, recipe, summary, data=data, parts=parts)


@contextmanager
def _own_folder(recipe: Recipe) -> Iterator[Recipe]:
    """The recipe with a folder that is this process's alone: of several the first has the user's."""
    if rank() == 0:
        yield recipe
        return
    with tempfile.TemporaryDirectory(prefix="compressor-") as folder:
        yield replace(recipe, out=f"{folder}/run")


def silent(stage: str, share: float) -> None:
    """Says nothing of how far a run has come."""


def _run(request: Request, notify: Notify) -> dict[str, Any]:
    """The run's summary."""
    work = prepare(request, notify)
    if request.recipe.as_it_is:
        return _ship_as_it_is(work)
    structure, spent = find_units(work)
    if request.recipe.blocks == "keep":  # else no one knows yet how far the rest has to go
        require_reachable(work.dense, structure, request.recipe)
    with work.stages.begun():
        keep_units(work, structure, spent)
        origin = work.stages.keys["groups"]
        task = make_task(work.stages, work.chosen, work.dense, own_share(work.calibration_images), origin)
        aim = set_aim(work, structure)
        work, structure, aim = lose_branches(work, structure, task, aim)
        pruned = remove_and_repair(work, structure, task, aim)
        recovered = recover(work, structure, pruned, task)
        accuracy = measure_accuracy(work, structure, pruned, recovered, task)
        near_dense = measure_fidelity(work, pruned, recovered)
        checks = Checks(warnings=work.warnings) + pruned.checks + recovered.checks
        outcome = Outcome(
            structure,
            pruned.plan,
            recovered.shipped,
            accuracy,
            near_dense,
            task,
            recovered.choice,
            checks,
            budget=pruned.budget,
            shipped=name_of_shipped(recovered),
            recovery=recovered.recovery,
        )
        return by_first(lambda: finish(work, outcome, deliver(work, outcome), pruned.budget_facts))


def _ship_as_it_is(work: Work) -> dict[str, Any]:
    """The dense network exported, checked, built, timed and bundled; nothing is scored, removed, repaired or tuned."""
    with work.stages.begun():
        keep_network(work)
        origin = work.stages.keys["network"]
        task = make_task(work.stages, work.chosen, work.dense, own_share(work.calibration_images), origin)
        accuracy = measure_networks(work, {"dense": work.dense}, origin, task)
        checks = Checks(warnings=work.warnings)
        outcome = Outcome(None, None, work.dense, accuracy, {}, task, checks=checks, shipped="dense")
        return by_first(lambda: finish(work, outcome, deliver(work, outcome)))


def finish(
    work: Work,
    outcome: Outcome,
    delivered: Delivered,
    budget_facts: Mapping[str, object] = MappingProxyType({}),
) -> dict[str, Any]:
    """The run's summary, written and returned."""
    shipped, choice = outcome.shipped, outcome.choice
    accuracy = {**outcome.accuracy, "shipped": outcome.accuracy[shipped]}
    values = {name: round(figure.value, 4) for name, figure in accuracy.items()}
    near_dense = outcome.fidelity.get("shipped")
    summary = {
        "model": work.recipe.model,
        "run_dir": str(work.stages.folder),
        "task": work.chosen.name,
        "metric": accuracy["dense"].metric,
        "is_share": accuracy["dense"].is_share,
        **{f"accuracy_{name}": values.get(name) for name in VARIANTS},
        "fidelity_shipped": 1.0 if near_dense is None else round(near_dense.value, 4),
        "shipped": shipped,
        "choice": choice and text_of(choice),
        "recovery": outcome.recovery and recovery_text(outcome.recovery),
        "evaluation_images": accuracy["dense"].n,
        "device": str(work.device),
        "blocks_dropped": len(work.depth.gone),
        **budget_facts,
        **delivered.summary,
        "gates": {gate.name: gate.state for gate in delivered.checks.gates},
        "warnings": list(delivered.checks.warnings),
        **stage_costs(work.stages),
    }
    write_json(work.stages.folder / "summary.json", {"schema": "summary/2", **summary})
    return summary


def ship_trained(
    asked: Asked, trained: object, module: nn.Module | None, data: object, parts: UserParts, notify: Notify
) -> Run:
    """A run's network with the weights of its owner's training, shipped as that run's was.

    `module`, `data` and `parts` are what the run was given in memory. Raises as `compressor.ship` says.
    """
    with computing():
        shipping = read_shipping(asked, trained, module, data, parts, notify)
        work = shipping.work
        with work.stages.begun():
            outcome = trained_outcome(shipping)
            summary = finish(work, outcome, deliver(work, outcome), budget_facts(shipping.finished.folder))
    dense = None if module is None else work.model.module
    return Run(work.stages.folder, work.recipe, summary, dense, data, parts)
