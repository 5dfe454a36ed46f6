"""One image through LRP, gathered for a picture: the input's heat map, every layer's units, every head.

A recipe and an image's number in, the record that `report.explanation` draws out, whatever the task and however many
inputs. Knows no plan and draws nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, fx

from .choices import given_preprocessing
from .delivery.pictures import asked_of, image_of, visible_of
from .errors import DataError, FolderError, RecipeError
from .graph import trace
from .graph.interface import input_names, input_nodes
from .inputs.examples import Examples
from .inputs.images import Source, batches, overridden
from .inputs.models import Model, load_model
from .inputs.samples import UNKNOWN
from .inputs.sources import load_source
from .placement import CPU, computing, device_of, inputs_to, placed, resolve, to_device
from .pruning import analyse
from .recipe import Recipe
from .records import FloatArray, Group, Site
from .relevance.lrp import LrpOptions, prepare
from .relevance.spelling import composite_of
from .relevance.starts import CLASSES, Objective, objective_of
from .report.explanation import Explanation, LayerRelevance
from .run.reading import signature_of
from .run.task_choice import choose, decode_of
from .run.tasking import NetworkTask, predict_of
from .steering import hash_of_network, learned_in, read_selector
from .steering.selector import Selector, find_spots
from .tasks import Targets, reference_of
from .tasks.record import class_leaf
from .tensors import Inputs, as_tuple, noise_like, specs_of

MEAN_OF = 64  # images whose mean answer stands for what no image in particular says


def explain(recipe: Recipe, index: int = 0, *, saliency: bool = False) -> Explanation:
    """What the recipe's model finds relevant in image `index` of its data: of the answer that its task starts from.

    A classifier is asked for the labelled (else predicted) class, any other task for what it says of this image.
    `saliency` adds the mask of the selector that a run in the recipe's folder learned. Raises DataError when there is
    no such image or none of the inputs is one, RecipeError when no data is named, FolderError where there is no
    selector.
    """
    with computing():
        return _explained(recipe, index, saliency)


def _explained(recipe: Recipe, index: int, saliency: bool) -> Explanation:
    model = load_model(recipe.model, recipe.weights or None, seed=recipe.seed)
    source = _source_of(recipe, model)
    if not 0 <= index < len(source):
        raise DataError(f"image {index} was asked for, {source.source} has {len(source)} (0 to {len(source) - 1})")
    keywords = source.input_names if isinstance(source, Examples) else ()
    inputs = source.inputs([index])  # [1, ...] of each
    traced = trace(model.module, noise_like(specs_of(inputs)), keywords)
    selector = selector_of(recipe, traced) if saliency else None
    question = _asked(recipe, model, traced, source, index)

    device = resolve(recipe.device) if question.objective.classifies else CPU
    graph = placed(traced, device)
    shown = _shown_input(graph, inputs)
    groups = analyse(graph).groups.groups
    composite = composite_of(recipe.composite)
    options = LrpOptions(composite, accept=recipe.accept, strict=recipe.strict, objective=question.objective)
    relevance = _relevance(graph, options, groups, inputs, question.targets)
    by_input = [relevance[node.name] for node in input_nodes(graph)]
    image = visible_of(inputs, source.preprocessing)
    assert image is not None  # one of the inputs is
    mask = None if selector is None else _mask(selector, graph, inputs)
    return Explanation(
        f"{recipe.model}: image '{source.names[index]}' {question.title}{_shares(graph, by_input)}",
        image,
        by_input[shown][0].sum(dim=0).double().numpy(),  # [C, H, W] to [H, W]
        tuple(_layers(groups, relevance)),
        *_heads(groups, relevance),
        mask,
    )


def _shown_input(graph: fx.GraphModule, inputs: Inputs) -> int:
    """Which of the inputs is drawn. Raises DataError where none of them is an image."""
    position = image_of(inputs)
    if position < 0:
        named = zip(input_names(graph), as_tuple(inputs), strict=True)
        shapes = ", ".join(f"{name} {list(tensor.shape[1:])}" for name, tensor in named)
        raise DataError(
            f"none of the inputs is an image [C, H, W] of real numbers, there is {shapes}; nothing is drawn"
        )
    return position


@dataclass(frozen=True, slots=True)
class _Question:
    """What relevance starts at, for which targets [1, ...]; `title` says it."""

    objective: Objective
    targets: Targets
    title: str


def _asked(recipe: Recipe, model: Model, graph: fx.GraphModule, source: Source, index: int) -> _Question:
    """By the task that data and answers show, or that the recipe asks for."""
    inputs, targets = source.inputs([index]), source.targets([index])
    first = batches(source.subset(range(min(MEAN_OF, len(source)))), recipe.batch_size)
    chosen = choose(recipe, graph, first, decode=decode_of(model, as_tuple(inputs)[0].shape))
    answer = predict_of(graph)(inputs)
    if chosen.classifies:
        label = targets if chosen.labelled else torch.tensor([UNKNOWN])
        assert isinstance(label, Tensor)
        logits = class_leaf(answer)[1]  # [1, classes]
        return _Question(CLASSES, label, _seen_as(source, torch.softmax(logits, dim=1)[0], int(label)))
    reference = reference_of(predict_of(graph), first, by_place=chosen.name == "detection")
    task = NetworkTask(chosen, reference, graph, None)
    title = "asked for its whole answer" if chosen.name == "any" else f"asked for its {chosen.name}"
    return _Question(objective_of(graph, task.task), asked_of(task, answer, targets), title)


def _relevance(
    graph: fx.GraphModule, options: LrpOptions, groups: tuple[Group, ...], inputs: Inputs, targets: Targets
) -> dict[str, Tensor]:
    """By node: of every input, and of every one that shows units."""
    device = device_of(graph)
    if isinstance(targets, Tensor):
        targets = to_device(targets, device)
    placeholders = [node.name for node in input_nodes(graph)]
    sites = dict.fromkeys(site.node for group in groups for site in group.sites)
    relevance = prepare(graph, options)(inputs_to(inputs, device), targets, [*placeholders, *sites])
    return {node: tensor.cpu() for node, tensor in relevance.items()}


def _shares(graph: fx.GraphModule, by_input: Sequence[Tensor]) -> str:
    """How much of the relevance lies in each of several inputs."""
    if len(by_input) == 1:
        return ""
    sums = [float(relevance.double().abs().sum()) for relevance in by_input]
    total = sum(sums) or 1.0
    shares = [f"{amount / total:.0%} in {name}" for name, amount in zip(input_names(graph), sums, strict=True)]
    return f"; relevance lies to {', '.join(shares)}"


def selector_of(recipe: Recipe, graph: fx.GraphModule) -> Selector:
    """What a run in the recipe's folder learned of this network. Raises FolderError where it did not."""
    selector = read_selector(recipe.folder / learned_in(1), hash_of_network(graph))
    if selector is None:
        raise FolderError(
            f"{recipe.folder} has no selector: a run learns one with `compressor compress --criterion isp`, with this "
            "model and data; then give its folder here with --out"
        )
    return selector


@torch.no_grad()
def _mask(selector: Selector, graph: fx.GraphModule, image: Inputs) -> FloatArray:
    """[H, W] of one image [1, C, H, W]."""
    device = device_of(graph)
    spots, _ = find_spots(selector.to(device), graph, inputs_to(image, device))
    mask: FloatArray = spots.map()[0, 0].cpu().double().numpy()  # [1, 1, H, W] to [H, W]
    return mask


def _source_of(recipe: Recipe, model: Model) -> Source:
    """The images prepared for the model, or tensors as they are."""
    name = recipe.evaluation_data or recipe.data
    if not name:
        raise RecipeError("no images were given; name a folder, an .npz or a data set with --data")
    source = load_source(name, signature_of(recipe, model), classes=model.class_names)
    if isinstance(source, Examples):
        return source
    return source.prepared(overridden(source.preprocessing or model.preprocessing, **given_preprocessing(recipe)))


def _seen_as(images: Source, scores: Tensor, label: int) -> str:
    predicted = int(scores.argmax())
    truth = f", labelled {_class_name(images, label)}" if label >= 0 else ""
    return f"seen as {_class_name(images, predicted)} ({float(scores[predicted]):.0%}){truth}"


def _class_name(images: Source, index: int) -> str:
    names = images.class_names
    if index < len(names):
        return names[index]
    return str(index)


def _units(relevance: dict[str, torch.Tensor], site: Site, size: int) -> FloatArray:
    """[units] signed relevance at one site, summed over everything that is not a unit."""
    value = relevance[site.node].double()
    other_axes = [axis for axis in range(value.ndim) if axis not in site.axes]
    summed = value.sum(dim=other_axes) if other_axes else value  # without axes, `sum` would take all of them
    entries = summed.reshape(-1).numpy()

    units, totals = site.units.reshape(-1), np.zeros(size)
    in_group = units >= 0
    np.add.at(totals, units[in_group], entries[in_group])  # several entries may show one unit
    return totals


def _layers(groups: tuple[Group, ...], relevance: dict[str, torch.Tensor]) -> list[LayerRelevance]:
    """A row for each node that shows units of a layer; heads have a table of their own."""
    rows: dict[str, LayerRelevance] = {}
    for group in groups:
        if group.kind in ("head", "head_dim", "conv_group"):
            continue
        for site in group.sites:
            rows[site.node] = LayerRelevance(site.layer or site.node, _units(relevance, site, group.size))
    return [rows[node] for node in reversed(relevance) if node in rows]  # relevance goes from the answer to the input


def _heads(groups: tuple[Group, ...], relevance: dict[str, torch.Tensor]) -> tuple[FloatArray, tuple[str, ...]]:
    """[layers, heads] with NaN where a layer has fewer, and the layers' names."""
    with_heads = [group for group in groups if group.kind == "head"]
    rows = [_units(relevance, group.sites[-1], group.size) for group in with_heads]
    width = max(map(len, rows), default=0)
    table = np.full((len(rows), width), np.nan)
    for row, units in enumerate(rows):
        table[row, : len(units)] = units
    return table, tuple(group.name.split("@")[0] for group in with_heads)
