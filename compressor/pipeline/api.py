"""What a Python caller has in hand in (a module, images, functions of the task), a run or a sweep of runs out."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..errors import ModelError, RecipeError, with_article
from ..files import content_hash
from ..graph.interface import answers
from ..inputs.models import model_in_hand
from ..recipe import Recipe, RecipeFields, make_recipe, read_recipe
from ..run.saved import load_graph, read_network
from ..run.stages import Notify
from ..run.task_choice import parted_options
from ..sweeping import is_sweep
from .flow import Run, run, ship_trained, silent
from .own_training import Asked
from .sweeps import sweep, watched_by

if TYPE_CHECKING:  # Python 3.10 has it in an extension that only type checkers need here
    from typing_extensions import Unpack


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
    parts, asked = parted_options(dict(options))
    if isinstance(images, (str, os.PathLike)):
        asked["data"] = os.fspath(images)
        images = None

    in_hand, dense = None, None
    if isinstance(model, nn.Module):
        in_hand = model_in_hand(model)
        dense = in_hand.module
        recipe = _recipe_of_module(dense, asked)
    else:
        if model is not None:
            asked["model"] = require_name(model)
        recipe = read_recipe(None, **asked)

    if is_sweep(recipe):
        swept = sweep(recipe, watch=watched_by(notify), model=in_hand, data=images, parts=parts)
        return replace(swept, runs=tuple(replace(point, dense=dense) for point in swept.runs))
    return replace(run(recipe, notify=notify, model=in_hand, data=images, parts=parts), dense=dense)


def _recipe_of_module(module: nn.Module, asked: Mapping[str, Any]) -> Recipe:
    """The recipe for a module that has no name but its class's; what is None was not asked for."""
    fields = {"out": "runs/model", **asked, "model": type(module).__name__}
    return make_recipe({name: value for name, value in fields.items() if value is not None})


def require_name(model: object) -> str:
    """The model's name. Raises ModelError for what is none: nothing is taken in its place."""
    if isinstance(model, str):
        return model
    if isinstance(model, type) and issubclass(model, nn.Module):
        raise ModelError(
            f"the model is the class {model.__name__}, expected a module made of it: {model.__name__}(...)"
        )
    kind = with_article(type(model).__name__)
    if isinstance(model, torch.export.ExportedProgram):
        raise ModelError(f"the model is {kind}; give the Python module it was made from")
    remedy = "call it and give its result" if callable(model) else "give the torch.nn.Module, or a name"
    raise ModelError(
        f"the model is {kind}, expected a torch.nn.Module or a name (torchvision:NAME, timm:NAME, file.py:factory); "
        f"{remedy}"
    )


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
    functions, refused = parted_options(parts)
    if refused:
        raise RecipeError(f"ship takes no {next(iter(refused))!r}; what a run was asked for stays as it was")
    data = os.fspath(images) if isinstance(images, (str, os.PathLike)) else ""
    asked = Asked(Path(folder), out, entry, trust, data=data, evaluation_data=evaluation_data)
    return ship_trained(asked, trained, model, None if data else images, functions, notify or silent)


def replay(folder: str | Path, *, trust: bool = False) -> dict[str, Any]:
    """A run's network rebuilt in this process: its size and a hash of its outputs on fixed noise."""
    network = load_graph(folder, trust=trust)
    example = read_network(Path(folder)).example
    with torch.inference_mode():
        outputs = [leaf.numpy() for leaf in answers(network, example)]
    parameters = sum(p.numel() for p in network.parameters())
    return {"run_dir": str(folder), "parameters": parameters, "outputs_sha256": content_hash(*outputs)}
