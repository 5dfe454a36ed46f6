"""The whole flow: a recipe in, a smaller verified network, its files, report and bundle out.

`run` reads as the README does: trace, group, score, plan, remove, repair, recover, export, gate, measure,
report, ship. Every stage's result lies in the run's folder; a stage is done again only when its inputs changed.
"""

from __future__ import annotations

import copy
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn

from .checkpoints import state_hash
from .cost import measure_cost
from .data import load_images, require_labels
from .delivery import Delivered, deliver
from .errors import RecipeError
from .files import content_hash, read_json, read_record, write_json, write_record, write_text
from .graph import trace
from .images import Images, Preprocessing, batches, overridden
from .models import Model, load_model
from .pruning import (
    CompensationOptions,
    Structure,
    analyse,
    compensate,
    compose,
    find_structure,
    identity_error,
    make_plan,
    parse_budget,
    prune,
)
from .recipe import Recipe, make_recipe, read_recipe, to_toml
from .records import Accuracy, Groups, Plan, Scores
from .recovery.batchnorm import reestimate
from .recovery.evaluate import evaluate
from .recovery.finetune import FinetuneOptions, finetune
from .relevance import ScoreOptions, score
from .relevance.composite import preset
from .relevance.lrp import LrpOptions
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
from .splits import Splits, split, split_apart
from .stages import Notify, open_run
from .work import Work, ranking_of

IDENTITY_IMAGES = 4


@dataclass(frozen=True, slots=True)
class Run:
    """A finished run. `summary` is the command's last line; `network()` rebuilds the network that ships."""

    folder: Path
    recipe: Recipe
    summary: dict[str, Any]

    def network(self, model: nn.Module | None = None) -> fx.GraphModule:
        return load_saved(self.folder, model)

    def module(self, model: nn.Module | None = None) -> nn.Module:
        """The same in the model's own class, where its code can follow (ModelError where not)."""
        return load_module(self.folder, model)


def compress(
    model: str | nn.Module | None = None,
    images: str | Images | None = None,
    *,
    notify: Notify | None = None,
    **options: Any,
) -> Run:
    """Compresses a model; `options` are the recipe's fields, of which `model` and `images` are the first.

    `model` may be a module of yours (its run can't be rebuilt without it), `images` a source's name or
    `Images` with their pre-processing. Raises CompressorError's subclasses (see compressor.errors).
    """
    if isinstance(model, str):
        options["model"] = model
    if isinstance(images, str):
        options["data"] = images
    if isinstance(model, nn.Module):
        options.setdefault("out", "runs/model")
        recipe = make_recipe({**options, "model": type(model).__name__})
        known = Model(model, "", "given", None, None, state_hash(model))
    else:
        recipe = read_recipe(None, **options)
        known = None
    return run(recipe, notify=notify, model=known, images=images if isinstance(images, Images) else None)


def run(
    recipe: Recipe, *, notify: Notify | None = None, model: Model | None = None, images: Images | None = None
) -> Run:
    """One run from a recipe, continued where an earlier one in the same folder stopped."""
    work = prepare(recipe, notify or (lambda stage, share: None), model, images)
    structure = find_units(work)
    plan, pruned = remove_and_repair(work, structure)
    final = recover(work, structure, plan, pruned)
    accuracy = measure_accuracy(work, structure, plan, pruned, final)
    delivered = deliver(work, structure, plan, final, accuracy)
    return finish(work, plan, accuracy, delivered)


def prepare(recipe: Recipe, notify: Notify, model: Model | None, images: Images | None) -> Work:
    """Everything that can be refused is refused here, before anything is written."""
    budget = parse_budget(recipe.budget)
    composite = preset(recipe.composite) if recipe.composite else None
    del budget, composite
    model = model or load_model(recipe.model, recipe.weights or None, seed=recipe.seed)
    splits, how = read_images(recipe, model, images)
    dense = trace(model.module, example_of((len(how.mean), *how.size)))
    outputs = int(dense.graph.output_node().args[0][0].meta["val"].shape[-1])  # type: ignore[union-attr,index]
    for part in (splits.calibration, splits.evaluation):
        require_labels(part, outputs)
    folder = Path(recipe.out or f"runs/{recipe.model.split(':')[-1].split('/')[-1]}")
    identity = {"model": recipe.model, "weights": model.sha256, "data": splits.hashes["evaluation"]}
    stages = open_run(folder, identity, notify)
    write_text(folder / "recipe.toml", to_toml(recipe))
    work = Work(
        recipe,
        stages,
        model,
        splits,
        dense,
        batches(splits.calibration, recipe.batch_size),
        batches(splits.evaluation, recipe.batch_size),
        how,
    )
    write_json(
        folder / "splits.json", {"schema": "splits/1", "hashes": dict(splits.hashes), "left_out": list(splits.left_out)}
    )
    return work


def read_images(recipe: Recipe, model: Model, images: Images | None) -> tuple[Splits, Preprocessing]:
    """Calibration and evaluation images, disjoint, prepared as the model wants them."""
    given = {
        "size": recipe.size[0] if len(recipe.size) == 1 else recipe.size or None,
        "resize": recipe.resize or None,
        "interpolation": recipe.interpolation or None,
        "mean": recipe.mean or None,
        "std": recipe.std or None,
    }
    known = images.preprocessing if images is not None and images.preprocessing else model.preprocessing
    how = overridden(known, **given)
    if images is None:
        if not recipe.data:
            raise RecipeError("no images were given; name a folder, an .npz or a data set with --data")
        images = load_images(recipe.data, classes=model.class_names)
    images = images.prepared(how)
    if recipe.evaluation_data:
        held_out = load_images(recipe.evaluation_data, classes=images.class_names or model.class_names).prepared(how)
        n = min(recipe.calibration, len(images))
        return split_apart(images, held_out, recipe.seed, calibration=n, search=0), how
    held = round(recipe.evaluation * len(images))
    n = min(recipe.calibration, len(images) - held)
    return split(images, recipe.seed, calibration=n, search=0, evaluation=recipe.evaluation), how


def find_units(work: Work) -> Structure:
    """Groups of the traced graph, each checked; the findings of the check are kept, not the labels."""
    stages, folder = work.stages, work.stages.folder

    def write() -> None:
        structure = find_structure(work.dense, work.example, work.recipe.seed)
        write_record(folder / "groups.json", structure.groups)
        findings = {"schema": "check/1", "tied": list(structure.tied), "frozen": list(structure.frozen)}
        write_json(folder / "check.json", findings)

    def read() -> Structure:
        found = read_json(folder / "check.json", "check/1")
        return analyse(work.dense, tuple(found["tied"]), tuple(found["frozen"]))

    return stages.do("groups", [work.model.sha256, str(work.dense.code), list(work.example.shape)], write, read)


def score_units(work: Work, graph: fx.GraphModule, groups: Groups) -> Scores:
    recipe = work.recipe
    lrp = LrpOptions(accept=recipe.accept)
    if recipe.composite:
        lrp = replace(lrp, composite=preset(recipe.composite))
    return score(
        graph, groups, work.calibration, criterion=recipe.criterion, options=ScoreOptions(seed=recipe.seed, lrp=lrp)
    )


def remove_and_repair(work: Work, structure: Structure) -> tuple[Plan, fx.GraphModule]:
    """Rounds of score, plan, removal and repair; the last one's plan is in units of the dense network."""
    recipe, folder = work.recipe, work.stages.folder
    dense_cost = measure_cost(work.dense)
    target = parse_budget(recipe.budget)
    current, units, kept = work.dense, structure, {}
    for r in range(1, recipe.rounds + 1):
        scores = _stage_scores(work, r, current, units)
        now = measure_cost(current)
        measured = (now.macs / dense_cost.macs) if target.kind == "macs" else now.parameters / dense_cost.parameters
        budget = replace(target, share=target.share ** (r / recipe.rounds) / measured)
        step = make_plan(current, units, scores, budget, ranking_of(recipe))
        kept = compose(kept, step.kept)
        current = _stage_repair(work, r, structure, kept, current, units, step)
        units = analyse(current, structure.tied, structure.frozen)
    plan = Plan(kept, dense_cost.macs, measure_cost(current).macs, recipe.budget)
    write_record(folder / "plan.json", plan)
    network = Network(work.model.builder, tuple(work.example.shape[1:]), structure.tied, structure.frozen, dict(kept))
    write_network(folder, network)
    return plan, current


def _stage_scores(work: Work, r: int, graph: fx.GraphModule, units: Structure) -> Scores:
    recipe, path = work.recipe, work.stages.folder / (f"scores-{r}.json" if work.recipe.rounds > 1 else "scores.json")
    inputs = [
        work.stages.keys.get(f"repair-{r - 1}", work.stages.keys["groups"]),
        work.splits.hashes["calibration"],
        *(getattr(recipe, n) for n in ("criterion", "composite", "accept", "seed", "batch_size")),
        asdict(work.preprocessing),
    ]
    return work.stages.do(
        f"scores-{r}",
        inputs,
        lambda: write_record(path, score_units(work, graph, units.groups)),
        lambda: read_record(path, Scores),
    )


def _stage_repair(
    work: Work,
    r: int,
    structure: Structure,
    kept: dict[str, Any],
    current: fx.GraphModule,
    units: Structure,
    step: Plan,
) -> fx.GraphModule:
    recipe, path = work.recipe, work.stages.folder / "stages" / f"repaired-{r}.safetensors"
    raw, _ = prune(current, units, step)
    whole, slices = prune(work.dense, structure, Plan(kept, 0, 0))
    del whole
    _check_identity(work, current, raw, units, step)

    def write() -> None:
        small = copy.deepcopy(raw)
        if recipe.compensate:
            record = compensate(
                work.dense, small, slices, work.calibration, options=CompensationOptions(seed=recipe.seed)
            )
            write_json(
                work.stages.folder / "repair.json",
                {
                    "schema": "repair/1",
                    "layers": [asdict(x) for x in record.repaired],
                    "left_alone": [asdict(x) for x in record.left_alone],
                },
            )
        if recipe.reestimate:
            reestimate(small, work.calibration)
        write_weights(path, small)

    def read() -> fx.GraphModule:
        small = copy.deepcopy(raw)
        read_weights(path, small)
        return small

    inputs = [work.stages.keys[f"scores-{r}"], kept, recipe.compensate, recipe.reestimate, asdict(ranking_of(recipe))]
    return work.stages.do(f"repair-{r}", inputs, write, read)


def _check_identity(work: Work, graph: fx.GraphModule, raw: fx.GraphModule, units: Structure, step: Plan) -> None:
    """The first thing believed of a pruned network: it is the original without the removed units."""
    images = next(iter(work.calibration))[0][:IDENTITY_IMAGES]
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
    return work.stages.do("finetune", inputs, write, read)


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
        **delivered.summary,
    }
    write_json(work.stages.folder / "summary.json", {"schema": "summary/1", **summary})
    return Run(work.stages.folder, work.recipe, summary)


def inspect(recipe: Recipe) -> Groups:
    """The groups a recipe's model has and what is left alone; no images are needed."""
    model = load_model(recipe.model, recipe.weights or None, seed=recipe.seed)
    how = _shape_only(recipe, model)
    example = example_of((len(how.mean), *how.size))
    return find_structure(trace(model.module, example), example, recipe.seed).groups


def _shape_only(recipe: Recipe, model: Model) -> Preprocessing:
    """Pre-processing for a look at the network alone: 224 px RGB unless the model or the recipe says otherwise."""
    size = recipe.size[0] if len(recipe.size) == 1 else recipe.size or None
    mean, std = recipe.mean or None, recipe.std or None
    if model.preprocessing is None:
        size, mean, std = size or 224, mean or (0.5, 0.5, 0.5), std or (0.5, 0.5, 0.5)
    return overridden(model.preprocessing, size=size, mean=mean, std=std)


def predict(recipe: Recipe) -> dict[str, Any]:
    """What a run would cost, from random scores: the budget fixes MACs and parameters closely, scores do not."""
    model = load_model(recipe.model, recipe.weights or None, seed=recipe.seed)
    how = _shape_only(recipe, model)
    example = example_of((len(how.mean), *how.size))
    graph = trace(model.module, example)
    structure = find_structure(graph, example, recipe.seed)
    scores = score(graph, structure.groups, [], criterion="random", options=ScoreOptions(seed=recipe.seed))
    plan = make_plan(graph, structure, scores, parse_budget(recipe.budget), ranking_of(recipe))
    cost, dense = measure_cost(prune(graph, structure, plan)[0]), measure_cost(graph)
    return {
        "model": recipe.model,
        "budget": recipe.budget,
        "macs_dense": dense.macs,
        "macs_predicted": cost.macs,
        "params_dense": dense.parameters,
        "params_predicted": cost.parameters,
        "groups": len(structure.groups.groups),
        "left_alone": [asdict(x) for x in structure.groups.left_alone],
        "recipe": asdict(recipe),
    }


def replay(folder: str | Path) -> dict[str, Any]:
    """A run's network rebuilt in this process: its size and a hash of its outputs on fixed noise."""
    network = load_saved(folder)
    shape = read_network(Path(folder)).shape
    with torch.inference_mode():
        outputs = network(example_of(shape)).numpy()
    parameters = sum(p.numel() for p in network.parameters())
    return {"run_dir": str(folder), "parameters": parameters, "outputs_sha256": content_hash(outputs)}


load = load_saved
