"""What can be said before a run: a model's units, what is left alone, and what a plan would cost. Writes nothing."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from torch import Tensor, fx

from .budgets import parse_budget
from .choices import given_preprocessing, require_known
from .errors import RecipeError
from .graph import trace
from .graph.behaviour import require_function
from .graph.cost import measure_cost
from .inputs.images import overridden
from .inputs.models import load_model
from .placement import computing
from .planning import make_plan
from .pruning import Structure, find_structure, prune
from .recipe import Recipe
from .records import Groups
from .run.baseline import any_scores
from .run.judges import spare_of
from .run.plans import below_budget, ranking_here, require_reachable, share_kept
from .run.saved import example_of
from .run.work import Work, prepare
from .tensors import specs_of


def inspect(recipe: Recipe) -> Groups:
    """The groups a recipe's model has and what is left alone; no images are needed."""
    graph, example = _without_images(recipe)
    return find_structure(graph, example, recipe.seed).groups


def _without_images(recipe: Recipe, *, sized: bool = False) -> tuple[fx.GraphModule, Tensor]:
    """The traced network alone: 224 px RGB unless model or recipe say otherwise, no weights unless they are named.

    `sized`: costs depend on the size, so it is not guessed. Raises RecipeError where it would have to be.
    """
    require_known(recipe)
    model = load_model(recipe.model, recipe.weights or "none", seed=recipe.seed)
    given = given_preprocessing(recipe)
    if sized and model.preprocessing is None and not given["size"]:
        raise RecipeError("the model says nothing about the size of its images, which costs depend on; give --size")
    if model.preprocessing is None:
        usual = {"size": 224, "mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
        given |= {name: given[name] or value for name, value in usual.items()}
    example = example_of(overridden(model.preprocessing, **given).shape)
    graph = trace(model.module, example)
    require_function(model.module, graph, example)
    return graph, example


def predict(recipe: Recipe) -> dict[str, Any]:
    """What a run would cost, from random scores: the budget fixes MACs and parameters closely, scores do not.

    With images named, everything is read and refused as the run would; nothing is written. Without, a model that
    says nothing about its images' size needs one (RecipeError).
    """
    with computing():
        return _predicted(recipe)


def _predicted(recipe: Recipe) -> dict[str, Any]:
    work = prepare(recipe, lambda stage, share: None, None, None, spare=spare_of(recipe)) if recipe.data else None
    graph, example = _without_images(recipe, sized=True) if work is None else (work.dense, work.example)
    structure = find_structure(graph, example, recipe.seed)
    require_reachable(graph, structure, recipe)
    dense = measure_cost(graph)
    sizes = [list(spec.shape) for spec in specs_of(example)]
    return {
        "model": recipe.model,
        "budget": recipe.budget,
        "size": sizes[0] if len(sizes) == 1 else sizes,
        "images": work and _counts(work),
        "macs_dense": dense.macs,
        "params_dense": dense.parameters,
        **_costs_predicted(recipe, graph, structure),
        "groups": len(structure.groups.groups),
        "left_alone": [asdict(x) for x in structure.groups.left_alone],
        "recipe": asdict(recipe),
    }


def _counts(work: Work) -> dict[str, int]:
    parts = {"calibration": work.splits.calibration, "evaluation": work.splits.evaluation, "spare": work.splits.search}
    return {name: len(images) for name, images in parts.items()}


def _costs_predicted(recipe: Recipe, graph: fx.GraphModule, structure: Structure) -> dict[str, Any]:
    budget = parse_budget(recipe.budget)
    if budget.kind == "latency":
        return {"not_predicted": f"MACs and parameters: '{budget}' is measured in the run", "warnings": []}
    scores = any_scores(graph, structure, recipe)
    plan = make_plan(graph, structure, scores, budget, ranking_here(graph, structure, recipe))
    small = prune(graph, structure, plan)[0]
    cost, said = measure_cost(small), below_budget(recipe, share_kept(graph, small, budget))
    return {"macs_predicted": cost.macs, "params_predicted": cost.parameters, "warnings": [said] if said else []}
