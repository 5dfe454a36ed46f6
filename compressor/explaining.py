"""One image through LRP, gathered for a picture: the input's heat map, every layer's units, every head.

A recipe and an image's number in, the record that `report.explanation` draws out. Knows no plan and draws nothing.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torch import fx

from .errors import DataError, FolderError, RecipeError
from .graph import trace
from .inputs.images import Images, overridden, visible
from .inputs.models import Model, load_model
from .inputs.sources import load_images
from .placement import computing, device_of, placed, resolve, to_device
from .pruning import analyse
from .recipe import Recipe
from .records import FloatArray, Group, Site
from .relevance.lrp import LrpOptions, prepare
from .relevance.spelling import composite_of
from .report.explanation import Explanation, LayerRelevance
from .run.saved import example_of
from .steering import hash_of_network, learned_in, read_selector
from .steering.objectives import answers_of
from .steering.selector import Selector, features_of, question_of


def explain(recipe: Recipe, index: int = 0, *, saliency: bool = False) -> Explanation:
    """What the recipe's model finds relevant in image `index` of its data, for the labelled (else predicted) class.

    `saliency` adds the mask of the selector that a run in the recipe's folder learned. Raises DataError when there is
    no such image, RecipeError when no data is named, FolderError where there is no selector.
    """
    with computing():
        return _explained(recipe, index, saliency)


def _explained(recipe: Recipe, index: int, saliency: bool) -> Explanation:
    device = resolve(recipe.device)
    model = load_model(recipe.model, recipe.weights or None, seed=recipe.seed)
    images = _prepared(recipe, model)
    if not 0 <= index < len(images):
        raise DataError(f"image {index} was asked for, {images.source} has {len(images)} (0 to {len(images) - 1})")
    preprocessing = images.preprocessing
    assert preprocessing is not None

    traced = trace(model.module, example_of(preprocessing.shape))
    selector = selector_of(recipe, traced) if saliency else None
    graph = placed(traced, device)
    groups = analyse(graph).groups.groups
    lrp = _lrp_options(recipe)
    image = images[index][None]  # [1, C, H, W]
    label = torch.tensor([int(images.labels[index])])  # -1 where it has none: then relevance starts at the prediction

    placeholder = next(node.name for node in graph.graph.nodes if node.op == "placeholder")
    site_nodes = dict.fromkeys(site.node for group in groups for site in group.sites)
    on_device = prepare(graph, lrp)(to_device(image, device), to_device(label, device), [placeholder, *site_nodes])
    relevance = {node: value.cpu() for node, value in on_device.items()}
    scores = torch.softmax(_logits(graph, image), dim=1)[0]  # [classes]
    return Explanation(
        _title(recipe, images, index, scores, int(label)),
        visible(image[0].numpy(), preprocessing),
        relevance[placeholder][0].sum(dim=0).double().numpy(),  # [C, H, W] to [H, W]
        tuple(_layers(groups, relevance)),
        *_heads(groups, relevance),
        None if selector is None else _mask(selector, graph, image),
    )


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
def _mask(selector: Selector, graph: fx.GraphModule, image: torch.Tensor) -> FloatArray:
    """[H, W] of one image [1, C, H, W]."""
    device = device_of(graph)
    inputs, spots_on = to_device(image, device), selector.to(device)
    features = features_of(graph, inputs, [scale.node for scale in selector.scales])
    mask: FloatArray = spots_on(features, question_of(answers_of(graph, inputs))).map()[0, 0].cpu().double().numpy()
    return mask


def _lrp_options(recipe: Recipe) -> LrpOptions:
    options = LrpOptions(accept=recipe.accept, strict=recipe.strict)
    if not recipe.composite:
        return options
    return replace(options, composite=composite_of(recipe.composite))


def _prepared(recipe: Recipe, model: Model) -> Images:
    source = recipe.evaluation_data or recipe.data
    if not source:
        raise RecipeError("no images were given; name a folder, an .npz or a data set with --data")
    overrides = {name: getattr(recipe, name) or None for name in ("size", "resize", "interpolation", "mean", "std")}
    if overrides["size"] and len(overrides["size"]) == 1:
        overrides["size"] = overrides["size"][0]
    return load_images(source, classes=model.class_names).prepared(overridden(model.preprocessing, **overrides))


@torch.no_grad()
def _logits(graph: fx.GraphModule, image: torch.Tensor) -> torch.Tensor:
    logits: torch.Tensor = graph(to_device(image, device_of(graph))).cpu()
    return logits


def _title(recipe: Recipe, images: Images, index: int, scores: torch.Tensor, label: int) -> str:
    predicted = int(scores.argmax())
    seen_as = f"{_class_name(images, predicted)} ({float(scores[predicted]):.0%})"
    truth = f", labelled {_class_name(images, label)}" if label >= 0 else ""
    return f"{recipe.model}: image '{images.names[index]}' seen as {seen_as}{truth}"


def _class_name(images: Images, index: int) -> str:
    names = images.class_names
    return names[index] if index < len(names) else str(index)


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
    order = {name: position for position, name in enumerate(relevance)}
    rows: dict[str, LayerRelevance] = {}
    for group in groups:
        if group.kind in ("head", "head_dim", "conv_group"):
            continue
        for site in group.sites:
            rows[site.node] = LayerRelevance(site.layer or site.node, _units(relevance, site, group.size))
    return [rows[node] for node in sorted(rows, key=lambda node: -order[node])]


def _heads(groups: tuple[Group, ...], relevance: dict[str, torch.Tensor]) -> tuple[FloatArray, tuple[str, ...]]:
    """[layers, heads] with NaN where a layer has fewer, and the layers' names."""
    with_heads = [group for group in groups if group.kind == "head"]
    rows = [_units(relevance, group.sites[-1], group.size) for group in with_heads]
    width = max((len(units) for units in rows), default=0)
    table = np.full((len(rows), width), np.nan)
    for row, units in enumerate(rows):
        table[row, : len(units)] = units
    return table, tuple(group.name.split("@")[0] for group in with_heads)
