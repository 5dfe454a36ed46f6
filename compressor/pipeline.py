"""The whole flow: a recipe in, a smaller verified network, its files, report and bundle out.

`run` reads as the README does: trace, group, score, plan, remove, repair, recover, export, gate, measure,
report, ship. Every stage's result lies in the run's folder; a stage is done again only when its inputs changed.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import fx, nn

from .accuracy import evaluate
from .budgets import parse_budgets
from .choices import Repairing, measuring_of, repairing_of, scoring_of, tuning_of
from .delivery import Delivered, Outcome, deliver
from .delivery.summary import stage_costs
from .device import feeds, usage
from .device.usage import Usage
from .errors import BudgetError, GateError, ModelError, RecipeError, with_article
from .files import content_hash, read_json, read_record, write_json, write_record, write_text
from .graph.cost import measure_cost
from .graph.interface import answers
from .graph.wrappers import plain
from .inputs.checkpoints import state_hash
from .inputs.images import Batches, batches
from .inputs.models import Model
from .placement import code_of, computing
from .planning import compose
from .pruning import Structure, analyse, find_structure, identity_error, prune, slices_of
from .recipe import Recipe, RecipeFields, make_recipe, read_recipe, to_toml
from .records import Accuracy, Compensation, IntArray, Plan, Quality, Scores, Slices, figure_fields, figure_of
from .repair.choice import Choice, Judged, choose, text_of
from .repair.finetune import FinetuneOptions, finetune
from .rounds import Prunable, measure_units, repair_layers, score_units
from .run.checks import Checks, gate, require_passed
from .run.choosing import NO_PARTS, UserParts, parted_options
from .run.fingerprints import Known
from .run.finished import Finished, kept_facts, read_finished, require_same, require_trusted_code
from .run.judges import judges_of, spare_of
from .run.plans import kept_of, make_step, require_reachable, set_aim, summary_of_budgets, warn_below, words_of
from .run.saved import (
    WEIGHTS,
    Network,
    load_graph,
    load_module,
    load_saved,
    read_network,
    read_weights,
    rebuild,
    write_network,
    write_weights,
)
from .run.stages import Keeper, Notify, copy_stages, kept_as_record, open_run, recorded_files, require_finished
from .run.tasking import NetworkTask, make_task, metric_of, predict_of
from .run.trained import state_of, with_trained
from .run.user_code import code_sha256s
from .run.work import Work, prepare, read_work
from .sweeping import Ended, is_sweep, recipes_of, require_free, share, summarise, write_page
from .tasks import Task, fidelity

if TYPE_CHECKING:  # Python 3.10 has it in an extension that only type checkers need here
    from typing_extensions import Unpack

IDENTITY_IMAGES = 4
FIGURE_NOISE = 1e-6  # of a figure that is counted again on the same images: sums in another order
FIDELITY_IMAGES = 256  # of the evaluation images; more would cost as much again as the accuracy does
Progress = Callable[[float], None]
Watch = Callable[[Recipe], AbstractContextManager[Notify]]
VARIANTS = ("dense", "removed", "repaired", "tuned", "trained", "shipped")
READING = ("criterion", "composite", "start", "start_class", "sign", "per", "place")


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
        with computing():
            return _ship(asked, trained, self.dense, self.data, self.parts, notify or _silent)


@dataclass(frozen=True, slots=True)
class Sweep:
    """Finished runs of one model at several budgets. `summary` is the command's last line: a row for each budget.

    A run that a budget or a gate ended is a row with its reason, and none of `runs`.
    """

    folder: Path
    recipe: Recipe
    runs: tuple[Run, ...]
    summary: dict[str, Any]


def compress(
    model: str | nn.Module | None = None,
    images: object = None,
    *,
    notify: Notify | None = None,
    **options: Unpack[RecipeFields],
) -> Run | Any:
    """Compresses a model; `options` are the recipe's fields, of which `model` and `images` are the first.

    Gives a `Run`; a `Sweep` where the budget names several figures, such as `macs 0.7,0.5`.
    `model` may be a module of yours (its run can't be rebuilt without it). `images` is a source's name or path, arrays,
    a `Dataset`, a `DataLoader`, batches or a function that returns one of these (see `inputs.data.given_data`): inputs
    alone, or with targets. Of the task, `quality(predict, data)`, `loss`, `says`, `distance` and `decode` may be
    functions of yours. Raises CompressorError's subclasses (see compressor.errors).
    """
    asked: dict[str, Any] = dict(options)
    parts, asked = parted_options(asked)
    if isinstance(images, (str, os.PathLike)):
        asked["data"] = os.fspath(images)
        images = None

    if isinstance(model, nn.Module):
        asked.setdefault("out", "runs/model")
        asked = {name: value for name, value in asked.items() if value is not None}
        ready = plain(model)
        recipe = make_recipe({**asked, "model": type(ready.module).__name__})
        in_hand = Model(ready.module, "", "given", None, None, state_hash(ready.module), ready.notes)
        if is_sweep(recipe):
            swept = sweep(recipe, watch=_watched_by(notify), model=in_hand, data=images, parts=parts)
            return replace(swept, runs=tuple(replace(point, dense=ready.module) for point in swept.runs))
        return replace(run(recipe, notify=notify, model=in_hand, data=images, parts=parts), dense=ready.module)

    if model is not None:
        asked["model"] = require_name(model)
    recipe = read_recipe(None, **asked)
    if is_sweep(recipe):
        return sweep(recipe, watch=_watched_by(notify), data=images, parts=parts)
    return run(recipe, notify=notify, data=images, parts=parts)


def require_name(model: object) -> str:
    """Raises ModelError for what is neither a module nor a name; nothing is taken in its place."""
    if isinstance(model, str):
        return model
    if isinstance(model, type) and issubclass(model, nn.Module):
        raise ModelError(
            f"the model is the class {model.__name__}, expected a module made of it: {model.__name__}(...)"
        )
    kind = with_article(type(model).__name__)
    remedy = "call it and give its result" if callable(model) else "give the torch.nn.Module, or a name"
    raise ModelError(
        f"the model is {kind}, expected a torch.nn.Module or a name (torchvision:NAME, timm:NAME, file.py:factory); "
        f"{remedy}"
    )


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
    with computing():
        return replace(_run(recipe, notify or _silent, model, data, parts), data=data, parts=parts)


def _silent(stage: str, share: float) -> None:
    """Says nothing of how far a run has come."""


def _watched_by(notify: Notify | None) -> Watch:
    """Every run of a sweep by one and the same function."""
    return lambda recipe: nullcontext(notify or _silent)


def sweep(
    recipe: Recipe,
    *,
    watch: Watch | None = None,
    model: Model | None = None,
    data: object = None,
    parts: UserParts = NO_PARTS,
) -> Sweep:
    """A run for each figure of the budget, below the recipe's folder; groups and scores are found once.

    `watch` gives a run's `notify` while it lasts; `model`, `data` and `parts` as in `run`. A run that its budget or a
    gate ends does not end the others. Raises the first one's error where none is left.
    """
    points = recipes_of(recipe)
    require_free(recipe, points)
    runs: list[Run] = []
    ended: list[Ended] = []
    for point in points:
        share([earlier.recipe for earlier in ended], point)
        try:
            with (watch or _watched_by(None))(point) as notify:
                runs.append(run(point, notify=notify, model=model, data=data, parts=parts))
        except (BudgetError, GateError) as error:
            ended.append(Ended(point, error=error))
        else:
            ended.append(Ended(point, runs[-1].summary))

    first_error = ended[0].error
    if not runs and first_error is not None:
        raise first_error
    summary = summarise(recipe, ended)
    write_page(recipe, summary)
    return Sweep(recipe.folder, recipe, tuple(runs), summary)


def _run(recipe: Recipe, notify: Notify, model: Model | None, data: object, parts: UserParts) -> Run:
    work = prepare(recipe, notify, model, data, parts=parts, spare=spare_of(recipe))
    if recipe.as_it_is:
        return _ship_as_it_is(work)
    structure, spent = find_units(work)
    require_reachable(work.dense, structure, recipe)
    with work.stages.begun():
        keep_units(work, structure, spent)
        origin = work.stages.keys["groups"]
        task = make_task(work.stages, work.chosen, work.dense, work.calibration_images, origin)
        pruned = remove_and_repair(work, structure, task)
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
        )
        return finish(work, outcome, deliver(work, outcome), pruned.budget_facts)


def _ship_as_it_is(work: Work) -> Run:
    """The dense network exported, checked, built, timed and bundled; nothing is scored, removed, repaired or tuned."""
    with work.stages.begun():
        keep_network(work)
        origin = work.stages.keys["network"]
        task = make_task(work.stages, work.chosen, work.dense, work.calibration_images, origin)
        accuracy = _stage_accuracy(work, {"dense": work.dense}, origin, task)
        checks = Checks(warnings=work.warnings)
        outcome = Outcome(None, None, work.dense, accuracy, {}, task, checks=checks, shipped="dense")
        return finish(work, outcome, deliver(work, outcome))


def keep_network(work: Work) -> None:
    """The dense network as the one that ships, to disk, with what rebuilds it."""

    def write(folder: Path, network: fx.GraphModule) -> None:
        write_weights(folder / WEIGHTS, network)

    work.stages.make(
        "network",
        _unchanged,
        Keeper(write, lambda folder: work.dense),
        dense=Known(work.dense, _group_inputs(work)),
    )
    _keep_inputs(work)
    code = code_sha256s(work.recipe)
    write_network(work.stages.folder, Network(work.model.builder, work.inputs, (), (), {}, work.keywords, code))


def _unchanged(dense: fx.GraphModule, progress: Progress) -> fx.GraphModule:
    return dense


def _keep_inputs(work: Work) -> None:
    """The resolved recipe, and hashes of the images, for a reader of the folder."""
    folder = work.stages.folder
    write_text(folder / "recipe.toml", to_toml(work.recipe))
    write_json(folder / "splits.json", kept_facts(work))


def find_units(work: Work) -> tuple[Structure, Usage]:
    """Groups of the traced graph, each checked, and what that took; a finished stage's if there is one."""
    path = work.stages.folder / "check.json"
    meter = usage.begin()
    if work.stages.holds("groups", _group_inputs(work)) and path.is_file():
        findings = read_json(path, "check/1")
        return analyse(work.dense, tuple(findings["tied"]), tuple(findings["frozen"])), meter.read()
    work.stages.notify("groups", 0.0)
    structure = find_structure(work.dense, work.example, work.recipe.seed)
    return structure, meter.read()


def _group_inputs(work: Work) -> list[object]:
    return [work.model.sha256, code_of(work.dense), list(work.inputs), work.recipe.seed]


def keep_units(work: Work, structure: Structure, spent: Usage | None = None) -> None:
    """The groups to disk; of the check its findings, not the labels. `spent` is what finding them took."""
    folder = work.stages.folder

    def write() -> None:
        write_record(folder / "groups.json", structure.groups)
        findings = {"schema": "check/1", "tied": list(structure.tied), "frozen": list(structure.frozen)}
        write_json(folder / "check.json", findings)

    work.stages.do("groups", _group_inputs(work), write, lambda: None, spent=spent)


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


def remove_and_repair(work: Work, structure: Structure, task: NetworkTask) -> Pruned:
    """Rounds of score, plan, removal and repair. Raises GateError where a network is not the masked original."""
    recipe, folder = work.recipe, work.stages.folder
    aim = set_aim(work, structure)
    current, units = work.dense, structure
    kept: dict[str, IntArray] = {}
    checks = Checks()
    budget_facts: dict[str, object] = {}
    for r in range(1, recipe.rounds + 1):
        scores = find_scores(work, r, current, units, task)
        step = make_step(work, r, current, units, scores, aim)
        kept = compose(kept, step.plan.kept)

        removed, _ = prune(current, units, step.plan)
        identity = _identity_gate(work, current, removed, units, step.plan)
        require_passed(work.stages, identity)
        current = _stage_repair(work, r, structure, kept, removed)
        units = analyse(current, structure.tied, structure.frozen)

        checks += step.checks + identity
        budget_facts |= step.facts

    _keep_inputs(work)
    plan = Plan(kept, measure_cost(work.dense).macs, measure_cost(current).macs, recipe.budget)
    write_record(folder / "plan.json", plan)
    kept_shares = kept_of(aim.budgets, work.dense, current, step.measured)
    checks += warn_below(kept_shares, recipe.multiple)
    return Pruned(plan, current, checks, budget_facts | summary_of_budgets(kept_shares), words_of(kept_shares))


def find_scores(work: Work, r: int, graph: fx.GraphModule, units: Structure, task: NetworkTask) -> Scores:
    """What round r ranks by; a finished stage's if there is one, whatever the budget."""
    origin = work.stages.keys.get(f"repair-{r - 1}", work.stages.keys["groups"])
    subject = Known(Prunable(graph, units), origin)
    scoring = scoring_of(work.recipe)
    scores = work.stages.make(
        f"scores-{r}",
        score_units,
        kept_as_record(f"scores-{r}.json", Scores),
        subject=subject,
        batches=work.calibration_images,
        scoring=replace(scoring, measured=False),  # read alike whether it is measured afterwards or not
        task=task.known,
        folder=work.stages.output,
    )
    if not scoring.measured:
        return scores
    return work.stages.make(
        f"measured-{r}",
        measure_units,
        kept_as_record(f"measured-{r}.json", Scores),
        subject=subject,
        scores=Known(scores, work.stages.keys[f"scores-{r}"]),
        batches=work.calibration_images,
        ranking=measuring_of(work.recipe),
        task=task.known,
    )


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

    origin = work.stages.keys.get(f"repair-{r - 1}", work.stages.keys["groups"])
    repaired = work.stages.make(
        f"repair-{r}",
        _repaired,
        Keeper(write, read),
        dense=Known(work.dense, work.stages.keys["groups"]),
        removed=Known(removed, [origin, kept]),
        slices=slices_of(work.dense, structure, kept),
        images=work.calibration_images,
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


def _identity_gate(work: Work, graph: fx.GraphModule, raw: fx.GraphModule, units: Structure, step: Plan) -> Checks:
    """The first thing believed of a pruned network: it is the original without the removed units."""
    images = tuple(torch.from_numpy(array) for array in feeds.as_tuple(work.sample(IDENTITY_IMAGES)))
    return gate(
        "identity: removed = masked original",
        identity_error(graph, raw, units, step.kept, images),
        limit=work.recipe.max_identity_error,
        remedy="this is a defect of the pruner: please report the model; `--units` can leave the failing kind of unit "
        "out",
    )


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
        _keeper_of_recovered(work.dense, structure, pruned.plan),
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
    network = Network(work.model.builder, work.inputs, structure.tied, structure.frozen, kept, work.keywords, code)
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


def measure_accuracy(
    work: Work, structure: Structure, pruned: Pruned, recovered: Recovered, task: NetworkTask
) -> dict[str, Accuracy | Quality]:
    """Held-out quality of every network, dense to shipped, by the task's measure; the shipped one's loss is a gate."""
    removed = rebuild(work.dense, structure, dict(pruned.plan.kept))
    networks = {"dense": work.dense, "removed": removed, "repaired": pruned.network}
    if recovered.tuned is not None:
        networks["tuned"] = recovered.tuned
    accuracy = _stage_accuracy(work, networks, work.stages.keys["finetune"], task)
    return {**accuracy, "shipped": accuracy[name_of_shipped(recovered)]}


def _stage_accuracy(
    work: Work, networks: Mapping[str, fx.GraphModule], origin: str, task: NetworkTask
) -> dict[str, Accuracy | Quality]:
    """Of each network by its name, on the evaluation images; `origin` is the key of the stage that made the last."""

    return work.stages.make(
        "accuracy",
        _measured,
        _kept_as_figures("accuracy.json", list(networks)),
        networks=Known(networks, [origin, list(networks)]),
        images=work.evaluation_images,
        task=task.itself,
    )


def _kept_as_figures(file: str, names: Sequence[str]) -> Keeper[dict[str, Accuracy | Quality]]:
    """One figure for each network, as JSON."""

    def write(folder: Path, figures: dict[str, Accuracy | Quality]) -> None:
        rows = {name: figure_fields(figure) for name, figure in figures.items()}
        write_json(folder / file, {"schema": "figures/1", "networks": rows})

    def read(folder: Path) -> dict[str, Accuracy | Quality]:
        rows = read_json(folder / file, "figures/1")["networks"]
        return {name: figure_of(rows[name]) for name in names}

    return Keeper(write, read)


def _measured(
    networks: Mapping[str, fx.GraphModule], images: Batches, task: NetworkTask, progress: Progress
) -> dict[str, Accuracy | Quality]:
    total = len(networks) * max(1, len(images.images))
    figures: dict[str, Accuracy | Quality] = {}
    judge = task.task
    for index, (name, network) in enumerate(networks.items()):
        before = index * len(images.images)

        def say(done: int, before: int = before) -> None:
            progress((before + done) / total)

        if judge is None:
            figures[name] = evaluate(network, images, metric=metric_of(task.chosen), progress=say)
        else:
            say(0)
            figures[name] = judge.quality(predict_of(network), images)
    return figures


def measure_fidelity(work: Work, pruned: Pruned, recovered: Recovered) -> dict[str, Accuracy | Quality]:
    """How near the repaired and the tuned network's answers are to the dense one's, on some evaluation images.

    It needs no labels, so it stands beside every other figure.
    """
    networks = {"repaired": pruned.network}
    if recovered.tuned is not None:
        networks["tuned"] = recovered.tuned
    near_dense = _stage_fidelity(work, networks, work.stages.keys["finetune"])
    return {**near_dense, "shipped": near_dense[name_of_shipped(recovered)]}


def _stage_fidelity(work: Work, networks: Mapping[str, fx.GraphModule], origin: str) -> dict[str, Accuracy | Quality]:
    """Of each network by its name; `origin` is the key of the stage that made the last."""
    count = min(FIDELITY_IMAGES, len(work.splits.evaluation))
    some_images = batches(work.splits.evaluation.subset(np.arange(count)), work.recipe.batch_size)
    return work.stages.make(
        "fidelity",
        _compared,
        _kept_as_figures("fidelity.json", list(networks)),
        dense=Known(work.dense, work.stages.keys.get("groups", origin)),
        networks=Known(networks, [origin, list(networks)]),
        images=Known(some_images, [work.evaluation_images.stands_for, count]),
    )


def _compared(
    dense: fx.GraphModule, networks: Mapping[str, fx.GraphModule], images: Batches, progress: Progress
) -> dict[str, Accuracy | Quality]:
    figures: dict[str, Accuracy | Quality] = {}
    for index, (name, network) in enumerate(networks.items()):
        progress(index / len(networks))
        figures[name] = fidelity(predict_of(network), predict_of(dense), images)
    return figures


def name_of_shipped(recovered: Recovered) -> str:
    return recovered.choice.shipped if recovered.choice is not None else "repaired"


def finish(
    work: Work,
    outcome: Outcome,
    delivered: Delivered,
    budget_facts: Mapping[str, object] = MappingProxyType({}),
) -> Run:
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
        "evaluation_images": accuracy["dense"].n,
        "device": str(work.device),
        **budget_facts,
        **delivered.summary,
        "gates": {gate.name: gate.state for gate in delivered.checks.gates},
        "warnings": list(delivered.checks.warnings),
        **stage_costs(work.stages),
    }
    write_json(work.stages.folder / "summary.json", {"schema": "summary/2", **summary})
    return Run(work.stages.folder, work.recipe, summary)


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


def ship(
    folder: str | os.PathLike[str],
    trained: object,
    *,
    model: nn.Module | None = None,
    images: object = None,
    out: str | os.PathLike[str] | None = None,
    entry: str = "",
    evaluation_data: str = "",
    trust: bool = False,
    notify: Notify | None = None,
    **parts: Callable[..., Any],
) -> Run:
    """Ships a run's network with the weights of your own training: same plan, dense reference, precisions and gates.

    `trained` is what `Run.network` or `Run.module` gave, trained, or their state dict, or a training loop's checkpoint
    (`entry` names what to take of one that holds several, such as `state_dict_ema`). `model`, `images` and `parts` of
    the task (`quality=...`) are those that `compress` was given in memory. Everything is written to `out`, beside the
    run (`RUN-trained`) by default; the run stays as it is. The same call goes on where an earlier one stopped. Raises
    ModelError for weights that don't fit, FolderError for a run that is not finished or an `out` that holds others.
    """
    functions, others = parted_options(parts)
    if others:
        raise RecipeError(f"ship takes no {next(iter(others))!r}; what a run was asked for stays as it was")
    data = os.fspath(images) if isinstance(images, (str, os.PathLike)) else ""
    asked = Asked(Path(folder), out, entry, trust, data=data, evaluation_data=evaluation_data)
    with computing():
        return _ship(asked, trained, model, None if data else images, functions, notify or _silent)


def _ship(
    asked: Asked, trained: object, module: nn.Module | None, data: object, parts: UserParts, notify: Notify
) -> Run:
    finished = _finished(asked)
    if asked.recipe is None:  # what a folder says: that of a run in hand is the user's own
        in_hand = {
            *parts.functions,
            *(("data",) if asked.data or data is not None else ()),
            *(("evaluation_data",) if asked.evaluation_data else ()),
        }
        require_trusted_code(finished, model=module is not None, in_hand=in_hand, trust=asked.trust)
    recipe = finished.recipe
    state = state_of(trained, asked.entry)  # before anything long
    model = None
    if module is not None:
        ready = plain(module)
        model = Model(ready.module, "", "given", None, None, state_hash(ready.module), ready.notes)
    work = read_work(recipe, notify, model, data, parts=parts, spare=spare_of(recipe))
    require_same(finished, work)

    structure = _structure_of(work, finished)
    kept = dict(finished.network.kept)
    bare = copy.deepcopy(work.dense) if structure is None else rebuild(work.dense, structure, kept)
    network = with_trained(bare, state, work.model.module)
    identity = {**work.stages.identity, "trained": state_hash(network)}
    work = replace(
        work,
        stages=open_run(recipe.folder, identity, notify),
        warnings=(*work.warnings, *state.notes),
    )
    with work.stages.begun():
        shipped = _shipped_with(work, finished, structure, bare, network)
    return replace(shipped, dense=None if module is None else work.model.module, data=data, parts=parts)


def _finished(asked: Asked) -> Finished:
    """The run, its recipe for the folder that is shipped to."""
    finished = read_finished(asked.folder, asked.recipe)
    folder = asked.folder if asked.folder.name not in ("", "..") else asked.folder.resolve()
    out = Path(asked.out) if asked.out is not None else folder.with_name(f"{folder.name}-trained")
    recipe = replace(finished.recipe, out=str(out))
    if asked.data:
        recipe = replace(recipe, data=asked.data)
    if asked.evaluation_data:
        recipe = replace(recipe, evaluation_data=asked.evaluation_data)
    return replace(finished, recipe=recipe)


def _structure_of(work: Work, finished: Finished) -> Structure | None:
    """The dense network's groups as the run's check left them; None where nothing was removed."""
    if not finished.network.kept:
        return None
    return analyse(work.dense, finished.network.tied, finished.network.frozen)


def _shipped_with(
    work: Work,
    finished: Finished,
    structure: Structure | None,
    bare: fx.GraphModule,
    network: fx.GraphModule,
) -> Run:
    """All that a run does once its network is there, with `network`; `bare` is the dense one without the units."""
    folder, kept = work.stages.folder, dict(finished.network.kept)
    again = ("groups", "mean answer", *finished.stages)
    copy_stages(finished.folder, folder, again)
    require_finished(folder, finished.stages, remedy="delete that folder, and ship again")
    checks, plan = Checks(warnings=work.warnings), None
    if structure is not None:
        keep_units(work, structure)
        plan = Plan(kept, measure_cost(work.dense).macs, measure_cost(network).macs, work.recipe.budget)
        write_record(folder / "plan.json", plan)
        identity = _identity_gate(work, work.dense, bare, structure, plan)
        require_passed(work.stages, identity)
        checks += identity
    _keep_inputs(work)
    network = _stage_trained(work, network)
    replayed = finished.network
    write_network(
        folder,
        Network(work.model.builder, work.inputs, replayed.tied, replayed.frozen, kept, work.keywords),
    )

    origin = work.stages.keys["trained"]
    dense_origin = work.stages.keys.get("groups", origin)
    task = make_task(work.stages, work.chosen, work.dense, work.calibration_images, dense_origin)
    accuracy = _stage_accuracy(work, {"dense": work.dense, "trained": network}, origin, task)
    earlier, note = _earlier_figures(finished.folder, accuracy["dense"])
    near_dense = _stage_fidelity(work, {"trained": network}, origin)
    figures = {"dense": accuracy["dense"], **earlier, "trained": accuracy["trained"], "shipped": accuracy["trained"]}
    outcome = Outcome(
        structure,
        plan,
        network,
        figures,
        {**near_dense, "shipped": near_dense["trained"]},
        task,
        checks=checks + note,
        shipped="trained",
    )
    return finish(work, outcome, deliver(work, outcome), _budget_facts(finished.folder))


def _stage_trained(work: Work, network: fx.GraphModule) -> fx.GraphModule:
    """The trained network to disk, and as it lies there."""

    def write(folder: Path, result: fx.GraphModule) -> None:
        write_weights(folder / WEIGHTS, result)

    def read(folder: Path) -> fx.GraphModule:
        again = copy.deepcopy(network)
        read_weights(folder / WEIGHTS, again)
        return again

    of_dense = work.stages.keys.get("groups", content_hash(_group_inputs(work)))
    return work.stages.make(
        "trained",
        _unchanged,
        Keeper(write, read),
        dense=Known(network, [of_dense, work.stages.identity["trained"]]),
    )


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
    same = (before.metric, before.n) == (dense.metric, dense.n) and abs(before.value - dense.value) <= FIGURE_NOISE
    if not same:
        text = (
            f"the dense network's {dense.metric} is {dense.value:.4g} on {dense.n} images, and was {before.metric} "
            f"{before.value:.4g} on {before.n} in {folder}: what that run's networks came to is left out"
        )
        return {}, Checks(warnings=(text,))
    return {name: figure for name, figure in figures.items() if name in ("removed", "repaired", "tuned")}, Checks()


def _budget_facts(folder: Path) -> dict[str, object]:
    """How the run's budgets were met, which training changes nothing of; empty where a gate ended the run."""
    path = folder / "summary.json"
    summary = read_json(path, "summary/2") if path.is_file() else {}
    return {"budgets": summary["budgets"]} if "budgets" in summary else {}


def replay(folder: str | Path, *, trust: bool = False) -> dict[str, Any]:
    """A run's network rebuilt in this process: its size and a hash of its outputs on fixed noise."""
    network = load_graph(folder, trust=trust)
    example = read_network(Path(folder)).example
    with torch.inference_mode():
        outputs = [leaf.numpy() for leaf in answers(network, example)]
    parameters = sum(p.numel() for p in network.parameters())
    return {"run_dir": str(folder), "parameters": parameters, "outputs_sha256": content_hash(*outputs)}


load = load_saved
