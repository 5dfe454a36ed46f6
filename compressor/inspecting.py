"""What can be said before a run: a model's units, what is left alone, and what a plan would cost. Writes nothing.

No images are needed; data that are tensors, or several inputs, say what goes into a model.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional
from torch.utils import _pytree as tree

from .choices import given_preprocessing, require_known
from .errors import RecipeError
from .graph import trace
from .graph.behaviour import require_function
from .graph.cost import measure_cost
from .graph.interface import input_names
from .graph.program import inputs_wanted
from .inputs.examples import Examples
from .inputs.images import overridden
from .inputs.models import Model, load_model
from .inputs.sources import load_source
from .placement import computing
from .planning import make_plan
from .pruning import Structure, find_structure, prune
from .recipe import Recipe
from .records import Groups
from .run.baseline import any_scores
from .run.judges import spare_of
from .run.plans import below_budget, kept_of, ranking_here, require_reachable, shares_of
from .run.reading import signature_of
from .run.saved import example_of
from .run.stages import Notify
from .run.work import Request, Work, prepare
from .tensors import Inputs, as_tuple, noise_like, specs_of

STRIDE = 32  # pixels that most networks divide an image into
ROUNDING = 1e-4  # of float32 sums in another order, on answers of about 1


def _say_nothing(step: str, share: float) -> None:
    pass


@contextmanager
def _step(notify: Notify, name: str) -> Iterator[None]:
    notify(name, 0.0)
    yield
    notify(name, 1.0)


@dataclass(frozen=True, slots=True)
class Inspection:
    """The units a model can lose and what is left alone; and, in words, which sizes of image or inputs it takes."""

    groups: Groups
    image_size: str


def inspect(recipe: Recipe, *, notify: Notify = _say_nothing) -> Inspection:
    """What a recipe's model is made of; no images are needed. `notify` is told each step.

    Data that are tensors as the network takes them, one or several a sample, say of which shapes it is traced.
    """
    with _step(notify, "reading the model and trying it"):
        graph, example, image_size = _tried(recipe)
    with _step(notify, "groups"):
        return Inspection(find_structure(graph, example, recipe.seed).groups, image_size)


def _tried(recipe: Recipe) -> tuple[fx.GraphModule, Inputs, str]:
    """The model's traced network, what it was traced with, and which sizes it takes in words."""
    require_known(recipe)
    model = load_model(recipe.model, recipe.weights or "none", seed=recipe.seed)
    tensors = _tensors_of(recipe, model)
    if tensors is None:
        graph, images = _without_images(recipe, model)
        return graph, images, _sizes_in_words(model.module, graph, images)
    example = noise_like(specs_of(tensors.inputs([0])))
    graph = trace(model.module, example, tensors.input_names)
    require_function(model.module, graph, example, tensors.input_names)
    if isinstance(example, Tensor) and example.dim() == 4:
        return graph, example, _sizes_in_words(model.module, graph, example)
    shapes = (list(tensor.shape[1:]) for tensor in as_tuple(example))
    listed = ", ".join(f"{name} {shape}" for name, shape in zip(input_names(graph), shapes, strict=True))
    return graph, example, f"{listed}, as the data have it"


def _tensors_of(recipe: Recipe, model: Model) -> Examples | None:
    """The data of a model that says nothing of its images, or takes more than one input; None of images as files."""
    is_of_images = model.preprocessing is not None and len(inputs_wanted(model.module)) <= 1
    if not recipe.data or is_of_images:
        return None
    source = load_source(recipe.data, signature_of(recipe, model))
    if not isinstance(source, Examples):
        return None
    return source


@torch.no_grad()
def _sizes_in_words(module: nn.Module, graph: fx.GraphModule, example: Tensor) -> str:
    """Which sizes the model takes and which its files will: a trace computes with the sizes it was made at."""
    height, width = example.shape[-2:]
    here = f"{height} x {width}"
    larger = functional.pad(example, (0, STRIDE, 0, STRIDE))
    try:
        expected = tree.tree_leaves(module(larger))
    except Exception:  # whatever a model raises that was built for one size
        return f"{here} alone: the model itself refuses {height + STRIDE} x {width + STRIDE}"
    fixed = f"the model takes other sizes too, its files take {here} alone (--size makes them for another)"
    try:
        answers = as_tuple(graph(larger))
    except Exception:  # reshapes to sizes of the traced image
        return fixed
    leaves = [leaf for leaf in expected if isinstance(leaf, Tensor)]
    if len(leaves) != len(answers) or not all(map(_alike, leaves, answers)):
        return fixed
    return f"{fixed}; nothing in the graph depends on it"


def _alike(leaf: Tensor, answer: Tensor) -> bool:
    return leaf.shape == answer.shape and torch.allclose(leaf, answer, rtol=ROUNDING, atol=ROUNDING)


def _without_images(recipe: Recipe, model: Model, *, sized: bool = False) -> tuple[fx.GraphModule, Tensor]:
    """The model's traced network and what it was traced with: 224 px RGB unless model or recipe say otherwise.

    `sized`: costs depend on the size, so it is not guessed. Raises RecipeError where it would have to be.
    """
    asked = given_preprocessing(recipe)
    if model.preprocessing is None:
        if sized and not asked["size"]:
            raise RecipeError("the model says nothing about the size of its images, which costs depend on; give --size")
        usual = {"size": 224, "mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
        asked |= {name: asked[name] or value for name, value in usual.items()}
    example = example_of(overridden(model.preprocessing, **asked).shape)
    graph = trace(model.module, example)
    require_function(model.module, graph, example)
    return graph, example


def predict(recipe: Recipe, *, notify: Notify = _say_nothing) -> dict[str, Any]:
    """What a run would cost, from random scores: the budget fixes MACs and parameters closely, scores do not.

    With images named, everything is read and refused as the run would; nothing is written. Without, a model that
    says nothing about its images' size needs one (RecipeError). `notify` is told each step.
    """
    with computing():
        return _predicted(recipe, notify)


def _predicted(recipe: Recipe, notify: Notify) -> dict[str, Any]:
    task: str | None = None
    images: dict[str, int] | None = None
    warnings: tuple[str, ...] = ()
    if recipe.data:
        with _step(notify, "reading the model and the images, and trying the model"):
            work = prepare(Request(recipe, spare=spare_of(recipe)), _say_nothing)
        graph, example = work.dense, work.example
        task, images, warnings = work.chosen.name, _counts(work), work.warnings
    else:
        with _step(notify, "reading the model and trying it"):
            require_known(recipe)
            model = load_model(recipe.model, recipe.weights or "none", seed=recipe.seed)
            graph, example = _without_images(recipe, model, sized=True)
    dense = measure_cost(graph)
    units: dict[str, Any] = {"groups": 0, "left_alone": []}
    costs: dict[str, Any] = {"macs_predicted": dense.macs, "params_predicted": dense.parameters, "warnings": []}
    if not recipe.as_it_is:
        with _step(notify, "groups"):
            structure = find_structure(graph, example, recipe.seed)
        with _step(notify, "planning under the budget, by random scores"):
            require_reachable(graph, structure, recipe)
            costs = _costs_predicted(recipe, graph, structure)
        left_alone = [asdict(layer) for layer in structure.groups.left_alone]
        units = {"groups": len(structure.groups.groups), "left_alone": left_alone}
    costs["warnings"] = [*warnings, *costs["warnings"]]
    sizes = [list(spec.shape) for spec in specs_of(example)]
    size = sizes[0] if len(sizes) == 1 else sizes
    return {
        "model": recipe.model,
        "task": task,
        "budget": recipe.budget,
        "size": size,
        "images": images,
        "macs_dense": dense.macs,
        "params_dense": dense.parameters,
        **costs,
        **units,
        "recipe": asdict(recipe),
    }


def _counts(work: Work) -> dict[str, int]:
    splits = work.splits
    return {"calibration": len(splits.calibration), "evaluation": len(splits.evaluation), "spare": len(splits.search)}


def _costs_predicted(recipe: Recipe, graph: fx.GraphModule, structure: Structure) -> dict[str, Any]:
    budget, *also = shares_of(recipe, graph)
    if budget.kind == "latency":
        return {"not_predicted": f"MACs and parameters: '{budget}' is measured in the run", "warnings": []}
    scores = any_scores(graph, structure, recipe)
    plan = make_plan(graph, structure, scores, budget, ranking_here(graph, structure, recipe), also=also)
    small, _ = prune(graph, structure, plan)
    cost = measure_cost(small)
    warning = below_budget(kept_of((budget, *also), graph, small), recipe.multiple)
    return {
        "macs_predicted": cost.macs,
        "params_predicted": cost.parameters,
        "warnings": [warning] if warning else [],
    }
