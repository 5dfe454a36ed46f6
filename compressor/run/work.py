"""What the stages of one run share: recipe, folder, dense network, images. It stays as it was read.

`prepare` reads and checks all of it before anything is written.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx

from ..choices import given_preprocessing, require_known
from ..errors import DataError, ModelError, RecipeError, with_article
from ..export.exportable import require_exportable
from ..graph import trace
from ..graph.behaviour import require_function
from ..inputs.images import Batches, Images, Preprocessing, batches, overridden, require_decodable
from ..inputs.models import Model, load_model
from ..inputs.sources import load_images, require_labels
from ..inputs.splits import Splits, split, split_apart
from ..placement import CPU, device_of, placed, resolve, to_device
from ..recipe import Recipe
from .fingerprints import Known
from .saved import example_of
from .stages import Notify, Stages, open_run

SEARCH_LEAST = 50  # fewer images than this can't tell one trial from another


@dataclass(frozen=True, slots=True, eq=False)
class Work:
    """What the stages of one run share. `warnings` are what reading the model gave to be warned of."""

    recipe: Recipe
    stages: Stages
    model: Model
    splits: Splits
    dense: fx.GraphModule
    calibration: Batches
    evaluation: Batches
    preprocessing: Preprocessing
    warnings: tuple[str, ...] = ()
    device: torch.device = CPU  # where scores, repair, recovery and evaluation are computed

    @property
    def example(self) -> Tensor:
        return example_of(self.preprocessing.shape)

    @property
    def calibration_images(self) -> Known:
        """The calibration images as a stage's input."""
        return self._known(self.calibration, "calibration")

    @property
    def evaluation_images(self) -> Known:
        """The evaluation images as a stage's input."""
        return self._known(self.evaluation, "evaluation")

    def _known(self, images: Batches, part: str) -> Known:
        return Known(images, [self.splits.hashes[part], images.batch_size, asdict(self.preprocessing)])

    def sample(self, count: int) -> NDArray[np.float32]:
        """float32 [count, C, H, W], the first calibration images as the network takes them; few ones come again."""
        gathered: list[NDArray[np.float32]] = []
        for images, _ in self.calibration:
            gathered.append(images.numpy())
            if sum(len(part) for part in gathered) >= count:
                break
        return np.resize(np.concatenate(gathered), (count, *self.preprocessing.shape))


def prepare(
    recipe: Recipe, notify: Notify, model: Model | None, images: Images | None, *, search: int = 0, spare: int = 0
) -> Work:
    """What the run is made of, read and checked; nothing is written. Raises InputError's subclasses.

    `search` images are set apart from calibration and evaluation, or at most `spare` of what both leave.
    """
    require_known(recipe)
    model = model or load_model(recipe.model, recipe.weights or None, seed=recipe.seed)
    splits, preprocessing = read_images(recipe, model, images, search=search, spare=spare)
    device = resolve(recipe.device)
    traced = trace(model.module, example_of(preprocessing.shape))
    require_function(model.module, traced, example_of(preprocessing.shape))
    require_exportable(traced)
    dense = placed(traced, device)
    classes = _classes(dense, example_of(preprocessing.shape))
    require_own_classes(splits.calibration, classes, model)
    for part in (splits.calibration, splits.search, splits.evaluation):
        require_labels(part, classes)
        require_decodable(part)
    identity = {"model": recipe.model, "weights": model.sha256, "data": splits.hashes["evaluation"]}
    return Work(
        recipe,
        open_run(recipe.folder, identity, notify),
        model,
        splits,
        dense,
        batches(splits.calibration, recipe.batch_size),
        batches(splits.evaluation, recipe.batch_size),
        preprocessing,
        warnings=tuple(f"the model was taken as a plain network: {note}" for note in model.notes),
        device=device,
    )


@torch.no_grad()
def _classes(graph: fx.GraphModule, example: Tensor) -> int:
    """How many classes the network tells apart; raises ModelError unless it answers with one [N, classes]."""
    answer = graph(to_device(example, device_of(graph)))
    if not isinstance(answer, Tensor) or answer.ndim != 2:
        raise ModelError(_no_classifier(answer))
    return int(answer.shape[1])


def _no_classifier(answer: object) -> str:
    """What to say of a network that answers with anything but one [N, classes]."""
    if not isinstance(answer, Tensor):
        return (
            f"the model answers with {with_article(type(answer).__name__)}, expected one tensor [N, classes]; "
            "wrap the model so that its forward returns the logits alone"
        )
    if answer.ndim == 4:
        return (
            f"the model answers with maps {list(answer.shape)}, as for segmentation or detection; classifiers, which "
            "answer with one tensor [N, classes], are what can be compressed. `compressor inspect` shows its units"
        )
    return (
        f"the model answers with a tensor {list(answer.shape)}, expected one tensor [N, classes]; wrap the model so "
        "that its forward returns class scores"
    )


def require_own_classes(images: Images, outputs: int, model: Model) -> None:
    """Raises DataError where named classes would be taken for the first few of more outputs, whose names aren't known.

    Numbers as names are the model's own class numbers where they count from 0.
    """
    names = images.class_names
    are_named = model.class_names is not None and model.weights != "none"
    numbered = all(name.isdigit() and int(name) == index for index, name in enumerate(names))
    if are_named or numbered or len(names) >= outputs:
        return
    listed = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
    remedy = _built_for(model.builder, len(names))
    labelled = "labels.csv with" if images.storage == "files" else "labels that are"
    raise DataError(
        f"{images.source} has {len(names)} classes ({listed}), the model {outputs} outputs, and which of them are "
        f"meant is not known; {remedy}, or give {labelled} the model's class numbers"
    )


def _built_for(spec: str, classes: int) -> str:
    """What to call for a model of so many classes, as that kind of model is spelt."""
    name, _, arguments = spec.removesuffix(")").partition("(")
    if spec.startswith(("torchvision:", "timm:")):
        others = [part.strip() for part in arguments.split(",") if part.strip() and "num_classes" not in part]
        return f"take --model '{name}({', '.join((*others, f'num_classes={classes}'))})' with weights trained for them"
    return f"build {spec or 'the model'} for {classes} classes"


def read_images(
    recipe: Recipe, model: Model, images: Images | None, *, search: int = 0, spare: int = 0
) -> tuple[Splits, Preprocessing]:
    """Calibration, evaluation and `search` images (or at most `spare`), disjoint, prepared as the model wants them."""
    preset = images.preprocessing if images is not None and images.preprocessing else model.preprocessing
    preprocessing = overridden(preset, **given_preprocessing(recipe))
    classes = model.class_names if model.weights != "none" else None  # an untrained network's classes mean nothing
    if images is None:
        if not recipe.data:
            raise RecipeError("no images were given; name a folder, an .npz or a data set with --data")
        images = load_images(recipe.data, classes=classes)
    images = images.prepared(preprocessing)
    if recipe.evaluation_data:
        held_out = load_images(recipe.evaluation_data, classes=images.class_names or classes).prepared(preprocessing)
        n = min(recipe.calibration, _different(images, recipe.calibration + search))
        rest = _left_for_search(images, n, search) if search else _left(images, n, spare)
        return split_apart(images, held_out, recipe.seed, calibration=n, search=rest), preprocessing
    evaluated = round(recipe.evaluation * len(images))
    n = min(recipe.calibration, _different(images, recipe.calibration + evaluated + search) - evaluated)
    if not evaluated or n < 1:
        raise DataError(
            f"{images.source} holds {len(images)} images, of which {evaluated} are held out for evaluation; give more "
            "images, another share with --evaluation, or evaluation images of their own with --evaluation-data"
        )
    rest = _left_for_search(images, evaluated + n, search) if search else _left(images, evaluated + n, spare)
    return split(images, recipe.seed, calibration=n, search=rest, evaluation=recipe.evaluation), preprocessing


def _left_for_search(images: Images, taken: int, search: int) -> int:
    """How many images are set apart to search on; raises DataError when too few to tell trials apart are left."""
    left = _left(images, taken, search)
    if left < min(search, SEARCH_LEAST):
        raise DataError(
            f"{images.source} holds {len(images)} images, of which {taken} calibrate and evaluate and {left} "
            f"are left to search on, expected at least {SEARCH_LEAST}; give more images or a smaller --calibration"
        )
    return left


def _left(images: Images, taken: int, wanted: int) -> int:
    return max(0, min(wanted, _different(images, taken + wanted) - taken)) if wanted else 0


def _different(images: Images, wanted: int) -> int:
    """How many images there are; repeated ones count once where that decides whether there are enough."""
    return len(images) if len(images) > 2 * wanted else len({images.pixel_hash(name) for name in images.names})
