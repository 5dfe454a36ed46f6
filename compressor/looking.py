"""One image through LRP, gathered for a picture: the input's heat map, every layer's units, every head."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torch import fx

from .data import load_images
from .errors import DataError, RecipeError
from .graph import trace
from .images import Images, Preprocessing, overridden
from .models import Model, load_model
from .placement import computing, device_of, placed, resolve, to_device
from .pruning import analyse
from .recipe import Recipe
from .records import FloatArray, Group, Site
from .relevance.lrp import LrpOptions, prepare
from .relevance.spelling import composite_of
from .report.explanation import Explanation, LayerRelevance
from .saved import example_of


def explain(recipe: Recipe, index: int = 0) -> Explanation:
    """What the recipe's model finds relevant in image `index` of its data, for the labelled (else predicted) class.

    Raises DataError when there is no such image, RecipeError when no data is named.
    """
    with computing():
        return _explained(recipe, index)


def _explained(recipe: Recipe, index: int) -> Explanation:
    device = resolve(recipe.device)
    model = load_model(recipe.model, recipe.weights or None, seed=recipe.seed)
    images = _prepared(recipe, model)
    if not 0 <= index < len(images):
        raise DataError(f"image {index} was asked for, {images.source} has {len(images)} (0 to {len(images) - 1})")
    how = images.preprocessing
    assert how is not None
    graph = placed(trace(model.module, example_of((len(how.mean), *how.size))), device)
    groups = analyse(graph).groups.groups
    source = next(n.name for n in graph.graph.nodes if n.op == "placeholder")
    sites = {(site.node, site.axes): (group, site) for group in groups for site in group.sites}
    lrp = LrpOptions(accept=recipe.accept, strict=recipe.strict)
    if recipe.composite:
        lrp = replace(lrp, composite=composite_of(recipe.composite))
    image, label = images[index][None], torch.tensor([int(images.labels[index])])
    nodes = [source, *dict.fromkeys(node for node, _ in sites)]
    found = prepare(graph, lrp)(to_device(image, device), to_device(label, device), nodes)
    relevance = {node: value.cpu() for node, value in found.items()}
    scores = torch.softmax(_logits(graph, image), dim=1)[0]
    return Explanation(
        _title(recipe, images, index, scores, int(label)),
        _visible(image[0].numpy(), how),
        relevance[source][0].sum(dim=0).double().numpy(),
        tuple(_layers(groups, relevance)),
        *_heads(groups, relevance),
    )


def _prepared(recipe: Recipe, model: Model) -> Images:
    source = recipe.evaluation_data or recipe.data
    if not source:
        raise RecipeError("no images were given; name a folder, an .npz or a data set with --data")
    given = {name: getattr(recipe, name) or None for name in ("size", "resize", "interpolation", "mean", "std")}
    if given["size"] and len(given["size"]) == 1:
        given["size"] = given["size"][0]
    return load_images(source, classes=model.class_names).prepared(overridden(model.preprocessing, **given))


@torch.no_grad()
def _logits(graph: fx.GraphModule, image: torch.Tensor) -> torch.Tensor:
    logits: torch.Tensor = graph(to_device(image, device_of(graph))).cpu()
    return logits


def _title(recipe: Recipe, images: Images, index: int, scores: torch.Tensor, label: int) -> str:
    names = images.class_names
    said = int(scores.argmax())
    shown = {i: names[i] if i < len(names) else str(i) for i in (said, max(label, 0))}
    truth = f", labelled {shown[max(label, 0)]}" if label >= 0 else ""
    return f"{recipe.model}: image '{images.names[index]}' seen as {shown[said]} ({float(scores[said]):.0%}){truth}"


def _visible(pixels: FloatArray, how: Preprocessing) -> FloatArray:
    """[C, H, W] as the network takes it, back to [H, W, 3] in 0-1."""
    mean, std = (np.array(v).reshape(-1, 1, 1) for v in (how.mean, how.std))
    shown = np.clip(pixels * std + mean, 0, 1)
    return np.repeat(shown, 3, axis=0).transpose(1, 2, 0) if len(shown) == 1 else shown.transpose(1, 2, 0)


def _units(relevance: dict[str, torch.Tensor], site: Site, size: int) -> FloatArray:
    """[units] signed relevance at one site, summed over everything that is not a unit."""
    value = relevance[site.node].double()
    others = [a for a in range(value.ndim) if a not in site.axes]
    flat = value.sum(dim=others).reshape(-1).numpy() if others else value.reshape(-1).numpy()
    units, found = site.units.reshape(-1), np.zeros(size)
    np.add.at(found, units[units >= 0], flat[units >= 0])
    return found


def _layers(groups: tuple[Group, ...], relevance: dict[str, torch.Tensor]) -> list[LayerRelevance]:
    order = {name: i for i, name in enumerate(relevance)}
    rows: dict[str, LayerRelevance] = {}
    for group in groups:
        for site in group.sites if group.kind not in ("head", "head_dim", "conv_group") else ():
            rows[site.node] = LayerRelevance(site.layer or site.node, _units(relevance, site, group.size))
    return [rows[node] for node in sorted(rows, key=lambda n: -order[n])]


def _heads(groups: tuple[Group, ...], relevance: dict[str, torch.Tensor]) -> tuple[FloatArray, tuple[str, ...]]:
    found = [(g.name.split("@")[0], _units(relevance, g.sites[-1], g.size)) for g in groups if g.kind == "head"]
    width = max((len(units) for _, units in found), default=0)
    table = np.full((len(found), width), np.nan)
    for row, (_, units) in enumerate(found):
        table[row, : len(units)] = units
    return table, tuple(name for name, _ in found)
