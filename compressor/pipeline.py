"""The whole flow: a recipe in, a smaller verified network, its files, report and bundle out.

`run` reads as the README does: trace, group, score, plan, remove, repair, recover, export, gate, measure,
report, ship. Every stage's result lies in the run's folder; a stage is done again only when its inputs changed.
"""

from __future__ import annotations

import copy
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from .behaviour import require_function
from .checkpoints import state_hash
from .cost import measure_cost
from .delivery import Delivered, deliver
from .delivery.precisions import JUDGE_IMAGES
from .delivery.summary import stage_costs
from .device import usage
from .device.usage import Usage
from .errors import ModelError
from .files import content_hash, read_json, read_record, write_json, write_record, write_text
from .graph import trace
from .images import Images, overridden
from .in_memory import images_of
from .models import Model, load_model
from .placement import code_of, computing
from .plans import comparable_scores, make_step, ranking_here, require_reachable, set_aim
from .pruning import (
    Structure,
    analyse,
    compose,
    find_structure,
    identity_error,
    make_plan,
    parse_budget,
    prune,
)
from .recipe import Recipe, make_recipe, read_recipe, to_toml
from .records import Accuracy, Compensation, Groups, IntArray, Plan, Scores
from .recovery.evaluate import evaluate
from .recovery.finetune import FinetuneOptions, finetune
from .relevance import ScoreOptions, score
from .relevance.lrp import LrpOptions
from .relevance.spelling import composite_of
from .repair import repair
from .saved import (
    Network,
    example_of,
    load_module,
    load_saved,
    read_network,
    read_weights,
    rebuild,
    write_network,
    write_weights,
)
from .stages import Notify
from .work import Work, given_preprocessing, prepare, ranking_of, require_known
from .wrappers import plain

IDENTITY_IMAGES = 4
READING = ("criterion", "composite", "start", "start_class", "sign", "per", "place")


@dataclass(frozen=True, slots=True)
class Run:
    """A finished run. `summary` is the command's last line; `network()` rebuilds the network that ships."""

    folder: Path
    recipe: Recipe
    summary: dict[str, Any]

    def network(self, model: nn.Module | None = None, *, trust: bool = False) -> fx.GraphModule:
        return load_saved(self.folder, model, trust=trust)

    def module(self, model: nn.Module | None = None, *, trust: bool = False) -> nn.Module:
        """The same in the model's own class, where its code can follow (ModelError where not)."""
        return load_module(self.folder, model, trust=trust)


def compress(
    model: str | nn.Module | None = None,
    images: Any = None,
    *,
    notify: Notify | None = None,
    **options: Any,
) -> Run:
    """Compresses a model; `options` are the recipe's fields, of which `model` and `images` are the first.

    `model` may be a module of yours (its run can't be rebuilt without it). `images` is a source's name or path,
    `Images`, arrays, a `Dataset` or a `DataLoader` (see `in_memory.images_of`). Raises CompressorError's subclasses
    (see compressor.errors).
    """
    given = images_of(images)
    if isinstance(given, str):
        options["data"] = given
    in_memory = given if isinstance(given, Images) else None
    if isinstance(model, nn.Module):
        options.setdefault("out", "runs/model")
        options = {name: value for name, value in options.items() if value is not None}
        ready = plain(model)
        recipe = make_recipe({**options, "model": type(ready.module).__name__})
        known = Model(ready.module, "", "given", None, None, state_hash(ready.module), ready.notes)
        return run(recipe, notify=notify, model=known, images=in_memory)
    if model is not None:
        options["model"] = _model_name(model)
    return run(read_recipe(None, **options), notify=notify, images=in_memory)


def _model_name(model: Any) -> str:
    """Raises ModelError for what is neither a module nor a name; nothing is taken in its place."""
    if isinstance(model, str):
        return model
    if isinstance(model, type) and issubclass(model, nn.Module):
        raise ModelError(
            f"the model is the class {model.__name__}, expected a module made of it: {model.__name__}(...)"
        )
    kind = type(model).__name__
    remedy = "call it and give its result" if callable(model) else "give the torch.nn.Module, or a name"
    raise ModelError(
        f"the model is a {kind}, expected a torch.nn.Module or a name (torchvision:NAME, timm:NAME, file.py:factory); "
        f"{remedy}"
    )


def run(
    recipe: Recipe, *, notify: Notify | None = None, model: Model | None = None, images: Images | None = None
) -> Run:
    """One run from a recipe, continued where an earlier one in the same folder stopped."""
    with computing():
        return _run(recipe, notify, model, images)


def _run(recipe: Recipe, notify: Notify | None, model: Model | None, images: Images | None) -> Run:
    spare = JUDGE_IMAGES if "int8" in recipe.precisions else 0
    work = prepare(recipe, notify or (lambda stage, share: None), model, images, spare=spare)
    structure, spent = find_units(work)
    require_reachable(work.dense, structure, recipe)
    with work.stages.begun():
        keep_units(work, structure, spent)
        plan, pruned = remove_and_repair(work, structure)
        final = recover(work, structure, plan, pruned)
        accuracy = measure_accuracy(work, structure, plan, pruned, final)
        delivered = deliver(work, structure, plan, final, accuracy)
        return finish(work, plan, accuracy, delivered)


def find_units(work: Work) -> tuple[Structure, Usage]:
    """Groups of the traced graph, each checked, and what that took; a finished stage's if there is one."""
    path = work.stages.folder / "check.json"
    meter = usage.begin()
    if work.stages.holds("groups", _group_inputs(work)) and path.is_file():
        found = read_json(path, "check/1")
        return analyse(work.dense, tuple(found["tied"]), tuple(found["frozen"])), meter.read()
    work.stages.notify("groups", 0.0)
    structure = find_structure(work.dense, work.example, work.recipe.seed)
    return structure, meter.read()


def _group_inputs(work: Work) -> list[Any]:
    return [work.model.sha256, code_of(work.dense), list(work.example.shape), work.recipe.seed]


def keep_units(work: Work, structure: Structure, spent: Usage) -> None:
    """The groups to disk; of the check its findings, not the labels."""
    folder = work.stages.folder

    def write() -> None:
        write_record(folder / "groups.json", structure.groups)
        findings = {"schema": "check/1", "tied": list(structure.tied), "frozen": list(structure.frozen)}
        write_json(folder / "check.json", findings)

    work.stages.do("groups", _group_inputs(work), write, lambda: None, spent=spent)


def score_options(recipe: Recipe) -> ScoreOptions:
    """How a recipe's criterion is read off a network."""
    given: dict[str, Any] = {"start": recipe.start, "target": recipe.start_class}
    given |= {name: getattr(recipe, name) for name in ("sign", "per", "place")}
    lrp = LrpOptions(composite=composite_of(recipe.composite), accept=recipe.accept, strict=recipe.strict)
    return ScoreOptions(seed=recipe.seed, lrp=lrp, **{name: value for name, value in given.items() if value})


def remove_and_repair(work: Work, structure: Structure) -> tuple[Plan, fx.GraphModule]:
    """Rounds of score, plan, removal and repair; the last one's plan is in units of the dense network."""
    recipe, folder = work.recipe, work.stages.folder
    aim = set_aim(work, structure)
    current, units = work.dense, structure
    kept: dict[str, IntArray] = {}
    for r in range(1, recipe.rounds + 1):
        scores = find_scores(work, r, current, units)
        step = make_step(work, r, current, units, scores, aim)
        kept = compose(kept, step.kept)
        current = _stage_repair(work, r, structure, kept, current, units, step)
        units = analyse(current, structure.tied, structure.frozen)
    write_text(folder / "recipe.toml", to_toml(recipe))
    splits = {"hashes": dict(work.splits.hashes), "left_out": list(work.splits.left_out)}
    write_json(folder / "splits.json", {"schema": "splits/1", **splits})
    plan = Plan(kept, measure_cost(work.dense).macs, measure_cost(current).macs, recipe.budget)
    write_record(folder / "plan.json", plan)
    return plan, current


def find_scores(work: Work, r: int, graph: fx.GraphModule, units: Structure) -> Scores:
    """What round r ranks by; a finished stage's if there is one, whatever the budget."""
    return _stage_comparable(work, r, graph, units, _stage_scores(work, r, graph, units))


def _stage_scores(work: Work, r: int, graph: fx.GraphModule, units: Structure) -> Scores:
    recipe, path = work.recipe, work.stages.folder / f"scores-{r}.json"
    inputs = [
        work.stages.keys.get(f"repair-{r - 1}", work.stages.keys["groups"]),
        work.splits.hashes["calibration"],
        *(getattr(recipe, n) for n in (*READING, "accept", "strict", "seed", "batch_size")),
        asdict(work.preprocessing),
    ]

    def write() -> None:
        options = score_options(recipe)
        total = max(1, len(work.calibration.images))
        scores = score(
            graph,
            units.groups,
            work.calibration,
            criterion=recipe.criterion,
            options=options,
            progress=lambda images: work.stages.notify(f"scores-{r}", images / total),
        )
        write_record(path, scores)

    return work.stages.do(f"scores-{r}", inputs, write, lambda: read_record(path, Scores))


def _stage_comparable(work: Work, r: int, graph: fx.GraphModule, units: Structure, scores: Scores) -> Scores:
    recipe, stage, path = work.recipe, f"measured-{r}", work.stages.folder / f"measured-{r}.json"
    if recipe.normalisation != "measured":
        return scores

    def write() -> None:
        notify = work.stages.notify
        found = comparable_scores(
            recipe, graph, units, scores, list(work.calibration), progress=lambda share: notify(stage, share)
        )
        write_record(path, found)

    inputs = [work.stages.keys[f"scores-{r}"], recipe.units, recipe.least, recipe.reduction]
    return work.stages.do(stage, inputs, write, lambda: read_record(path, Scores))


def _stage_repair(
    work: Work,
    r: int,
    structure: Structure,
    kept: dict[str, Any],
    current: fx.GraphModule,
    units: Structure,
    step: Plan,
) -> fx.GraphModule:
    recipe, folder = work.recipe, work.stages.folder
    record, path = folder / f"repair-{r}.json", folder / "stages" / f"repaired-{r}.safetensors"
    raw, _ = prune(current, units, step)
    whole, slices = prune(work.dense, structure, Plan(kept, 0, 0))
    del whole
    _check_identity(work, current, raw, units, step)

    def write() -> None:
        small = copy.deepcopy(raw)
        notify = work.stages.notify
        done = repair(
            recipe, work.dense, small, slices, work.calibration, progress=lambda share: notify(f"repair-{r}", share)
        )
        write_record(record, done)
        write_weights(path, small)

    def read() -> fx.GraphModule:
        read_record(record, Compensation)
        small = copy.deepcopy(raw)
        read_weights(path, small)
        return small

    inputs = [work.stages.keys[f"scores-{r}"], kept, recipe.compensate, recipe.reestimate, asdict(ranking_of(recipe))]
    return work.stages.do(f"repair-{r}", inputs, write, read)


def _check_identity(work: Work, graph: fx.GraphModule, raw: fx.GraphModule, units: Structure, step: Plan) -> None:
    """The first thing believed of a pruned network: it is the original without the removed units."""
    images = torch.from_numpy(work.sample(IDENTITY_IMAGES))
    error = identity_error(graph, raw, units, step.kept, images)
    work.gate(
        "identity: pruned = masked original",
        error,
        work.recipe.max_identity_error,
        "this is a defect of the pruner: please report the model; `--units` can leave the failing kind of unit out",
    )


def recover(work: Work, structure: Structure, plan: Plan, pruned: fx.GraphModule) -> fx.GraphModule:
    """Short fine-tuning of the repaired network, taught by the dense one; none when the recipe says so."""
    recipe, folder = work.recipe, work.stages.folder
    options = FinetuneOptions(
        epochs=recipe.finetune_epochs,
        learning_rate=recipe.learning_rate,
        distillation=recipe.distillation,
        seed=recipe.seed,
    )

    def write() -> None:
        small = copy.deepcopy(pruned)
        if recipe.finetune_epochs:
            finetune(
                small,
                work.calibration,
                options=options,
                teacher=work.dense,
                progress=lambda epoch, loss: work.stages.notify("finetune", (epoch + 1) / (recipe.finetune_epochs + 1)),
            )
        write_weights(folder / "weights.safetensors", small)

    def read() -> fx.GraphModule:
        small = rebuild(work.dense, structure, dict(plan.kept))
        read_weights(folder / "weights.safetensors", small)
        return small

    inputs = [work.stages.keys[f"repair-{recipe.rounds}"], asdict(options), recipe.batch_size]
    final = work.stages.do("finetune", inputs, write, read)
    shape = tuple(work.example.shape[1:])
    write_network(folder, Network(work.model.builder, shape, structure.tied, structure.frozen, dict(plan.kept)))
    return final


def measure_accuracy(
    work: Work, structure: Structure, plan: Plan, repaired: fx.GraphModule, final: fx.GraphModule
) -> dict[str, Accuracy]:
    """Held-out accuracy of every variant, dense to fine-tuned; the shipped one's loss is a gate."""
    folder = work.stages.folder
    variants = {"dense": work.dense, "pruned": rebuild(work.dense, structure, dict(plan.kept)), "compensated": repaired}
    if work.recipe.finetune_epochs:
        variants["finetuned"] = final

    def write() -> None:
        found = {name: asdict(evaluate(net, work.evaluation)) for name, net in variants.items()}
        write_json(folder / "accuracy.json", {"schema": "accuracy/1", "variants": found})

    def read() -> dict[str, Accuracy]:
        held = read_json(folder / "accuracy.json", "accuracy/1")["variants"]
        return {name: Accuracy(**held[name]) for name in variants}

    inputs = [work.stages.keys["finetune"], work.splits.hashes["evaluation"], asdict(work.preprocessing)]
    return work.stages.do("accuracy", inputs, write, read)


def finish(work: Work, plan: Plan, accuracy: dict[str, Accuracy], delivered: Delivered) -> Run:
    """The run's summary, written and returned."""
    top1 = {name: round(a.top1, 4) for name, a in accuracy.items()}
    summary = {
        "model": work.recipe.model,
        "run_dir": str(work.stages.folder),
        "accuracy_dense": top1["dense"],
        "accuracy_removed_only": top1["pruned"],
        "accuracy_pruned": top1["compensated"],
        "accuracy_finetuned": top1.get("finetuned"),
        "evaluation_images": accuracy["dense"].n,
        "device": str(work.device),
        **work.budget_facts,
        **delivered.summary,
        **stage_costs(work.stages),
    }
    write_json(work.stages.folder / "summary.json", {"schema": "summary/1", **summary})
    return Run(work.stages.folder, work.recipe, summary)


def inspect(recipe: Recipe) -> Groups:
    """The groups a recipe's model has and what is left alone; no images are needed."""
    graph, example = _without_images(recipe)
    return find_structure(graph, example, recipe.seed).groups


def _without_images(recipe: Recipe) -> tuple[fx.GraphModule, Tensor]:
    """The traced network alone: 224 px RGB unless model or recipe say otherwise, no weights unless they are named."""
    require_known(recipe)
    model = load_model(recipe.model, recipe.weights or "none", seed=recipe.seed)
    given = given_preprocessing(recipe)
    if model.preprocessing is None:
        plain = {"size": 224, "mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
        given |= {name: given[name] or value for name, value in plain.items()}
    example = example_of(overridden(model.preprocessing, **given).shape)
    graph = trace(model.module, example)
    require_function(model.module, graph, example)
    return graph, example


def predict(recipe: Recipe) -> dict[str, Any]:
    """What a run would cost, from random scores: the budget fixes MACs and parameters closely, scores do not."""
    graph, example = _without_images(recipe)
    structure = find_structure(graph, example, recipe.seed)
    scores = score(graph, structure.groups, [], criterion="random", options=ScoreOptions(seed=recipe.seed))
    budget, dense = parse_budget(recipe.budget), measure_cost(graph)
    found = {"model": recipe.model, "budget": recipe.budget, "macs_dense": dense.macs, "params_dense": dense.parameters}
    if budget.kind == "latency":
        found["not_predicted"] = f"MACs and parameters: '{budget}' is measured in the run"
    else:
        plan = make_plan(graph, structure, scores, budget, ranking_here(graph, structure, recipe))
        cost = measure_cost(prune(graph, structure, plan)[0])
        found |= {"macs_predicted": cost.macs, "params_predicted": cost.parameters}
    return {
        **found,
        "groups": len(structure.groups.groups),
        "left_alone": [asdict(x) for x in structure.groups.left_alone],
        "recipe": asdict(recipe),
    }


def replay(folder: str | Path, *, trust: bool = False) -> dict[str, Any]:
    """A run's network rebuilt in this process: its size and a hash of its outputs on fixed noise."""
    network = load_saved(folder, trust=trust)
    shape = read_network(Path(folder)).shape
    with torch.inference_mode():
        outputs = network(example_of(shape)).numpy()
    parameters = sum(p.numel() for p in network.parameters())
    return {"run_dir": str(folder), "parameters": parameters, "outputs_sha256": content_hash(outputs)}


load = load_saved
