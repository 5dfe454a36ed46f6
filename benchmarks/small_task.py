"""A network for a small task: a trained one restricted to some of its classes, or with a classifier fitted anew.

In: a model that ends in one linear layer (or 1x1 convolution), images. Out: the model with that layer smaller or
fitted in its place, nothing else trained. The layer is found by running the model, not by its name.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from study import Study, Subjects, draw_each, make_subjects, pool_of
from torch import Tensor, nn
from torch.nn import functional

from compressor.errors import DataError, ModelError
from compressor.inputs.images import Batches, Images, batches
from compressor.inputs.models import Model, load_model
from compressor.run.saved import example_of

DECAY = 1e-2  # of the fitted classifier's weights, for features of unit variance
FIT_STEPS = 100
SAME = 1e-5  # relative: the restricted network's outputs are some of the whole one's


@dataclass(frozen=True, slots=True)
class Task:
    """So many classes drawn by the seed; or, with `data`, that folder's classes, judged on `evaluation`."""

    classes: int
    per_class: int
    data: str = ""
    evaluation: str = ""

    def __str__(self) -> str:
        return "/".join(Path(self.data).parts[-2:]) if self.data else f"{self.classes} classes"


def subjects_of(study: Study, seed: int, task: Task) -> Subjects:
    """The dense network for the task and the few images a seed draws; all training images fit a new classifier."""
    recipe = replace(study.recipe, seed=seed)
    model = load_model(recipe.model, recipe.weights or None)
    if task.data:
        recipe = replace(recipe, data=task.data, evaluation_data=task.evaluation)
        pool, evaluation = pool_of(recipe, replace(model, class_names=None))
        model = transferred(model, batches(pool, recipe.batch_size))
    else:
        pool, evaluation = pool_of(recipe, model)
        kept = np.random.default_rng(seed).permutation(np.unique(evaluation.labels))[: task.classes]
        pool, evaluation = (_of_classes(images, np.sort(kept)) for images in (pool, evaluation))
        model = restricted(model, np.sort(kept).tolist(), _example(pool))
    return make_subjects(recipe, model, draw_each(pool, task.per_class), evaluation)


def _of_classes(images: Images, classes: Sequence[int] | np.ndarray) -> Images:
    """The images of those classes, numbered anew."""
    number = {int(label): i for i, label in enumerate(classes)}
    some = images.subset(np.flatnonzero(np.isin(images.labels, classes)))
    labels = np.array([number[int(label)] for label in some.labels], dtype=np.int64)
    if len(np.unique(labels)) < len(number):
        raise DataError(f"{images.source} has no images of some of the classes {list(number)}; draw others")
    return replace(some, labels=labels, class_names=tuple(images.class_names[label] for label in number))


def _example(images: Images) -> Tensor:
    assert images.preprocessing is not None
    return example_of(images.preprocessing.shape)


@torch.no_grad()
def restricted(model: Model, classes: Sequence[int], example: Tensor) -> Model:
    """The model whose classifier has those outputs only; raises ModelError where it would compute another function."""
    module = copy.deepcopy(model.module)
    head = module.get_submodule(head_of(module, example))
    expected = module(example)[:, classes]
    head.weight = nn.Parameter(head.weight[classes].clone())
    if head.bias is not None:
        head.bias = nn.Parameter(head.bias[classes].clone())
    setattr(head, "out_features" if isinstance(head, nn.Linear) else "out_channels", len(classes))
    found = module(example)
    if found.shape != expected.shape or float((found - expected).abs().max()) > SAME * float(expected.abs().max()):
        raise ModelError(f"{model.builder} can't be restricted: what follows its classifier mixes the classes")
    return replace(model, module=module)


def transferred(model: Model, images: Batches) -> Model:
    """The model with a linear classifier of its own features, fitted to the images' labels."""
    body = copy.deepcopy(model.module)
    body.set_submodule(head_of(body, _example(images.images)), nn.Identity())
    with torch.no_grad():
        features = torch.cat([body(batch) for batch, _ in images])
    if features.dim() != 2:
        raise ModelError(f"{model.builder} without its classifier gives {list(features.shape)}, expected [N, features]")
    labels = torch.from_numpy(images.images.labels)
    module = nn.Sequential(body, fit_classifier(features, labels)).eval()
    return replace(model, module=module, class_names=images.images.class_names)


@torch.no_grad()
def head_of(module: nn.Module, example: Tensor) -> str:
    """The name of the last linear layer or convolution that runs."""
    called: list[str] = []
    layers = {name: m for name, m in module.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))}
    hooks = [m.register_forward_hook(partial(_note, called, name)) for name, m in layers.items()]
    try:
        classes = module(example).shape[1]
    finally:
        for hook in hooks:
            hook.remove()
    if not called or layers[called[-1]].weight.shape[0] != classes:
        raise ModelError(f"the network's {classes} outputs are not those of its last layer; it can't be given another")
    return called[-1]


def _note(called: list[str], name: str, *_: object) -> None:
    called.append(name)


def fit_classifier(features: Tensor, labels: Tensor) -> nn.Linear:
    """Logistic regression of [N, features] on [N] labels, to its minimum; the scaling of features is folded in."""
    mean, scale = features.mean(0), features.std(0).clamp(min=1e-6 * float(features.std()))
    x = ((features - mean) / scale).double()
    weight = torch.zeros(int(labels.max()) + 1, x.shape[1], dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(len(weight), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=FIT_STEPS, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = functional.cross_entropy(x @ weight.T + bias, labels) + DECAY / 2 * weight.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    layer = nn.Linear(x.shape[1], len(weight))
    with torch.no_grad():
        layer.weight.copy_(weight / scale)
        layer.bias.copy_(bias - (weight / scale) @ mean.double())
    return layer
