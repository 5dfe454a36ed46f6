"""A run's data: what is given in; calibration, evaluation and spare parts out, prepared for the model.

Knows of the model its pre-processing, its classes and what its forward takes.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..choices import given_preprocessing
from ..errors import DataError, RecipeError
from ..graph.program import inputs_wanted, parameter_names
from ..inputs.damage import without_damaged
from ..inputs.data import given_data
from ..inputs.entries import Signature
from ..inputs.examples import Examples
from ..inputs.images import Images, Preprocessing, Source, overridden, pixel_hashes
from ..inputs.models import Model
from ..inputs.sources import load_source
from ..inputs.splits import Splits, split, split_apart
from ..recipe import Recipe
from ..records import InputSpec
from ..tensors import specs_of

SEARCH_LEAST = 50  # fewer images than this can't tell one trial from another


@dataclass(frozen=True, slots=True)
class Data:
    """A run's data in parts; `preprocessing` is None where they are tensors as the network takes them.

    `inputs` say what one sample is, `keywords` name them where forward takes them by name. `notes` are what was decided
    when they were read.
    """

    splits: Splits
    preprocessing: Preprocessing | None
    inputs: tuple[InputSpec, ...]
    keywords: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def read_data(recipe: Recipe, model: Model, data: object, *, search: int = 0, spare: int = 0) -> Data:
    """Calibration, evaluation and `search` images (or at most `spare`), disjoint, prepared as the model wants them.

    `data` are what a Python caller gave, in place of the recipe's. Raises DataError for data that are none, or too few,
    RecipeError where a pre-processing is missing.
    """
    signature = signature_of(recipe, model)
    source = _source_of(recipe, model, given_data(data, signature), signature)
    if isinstance(source, Examples):
        specs = specs_of(source.inputs([0]))
        splits, _ = _dealt(recipe, model, source, signature, None, search=search, spare=spare)
        return Data(splits, None, specs, source.input_names, source.notes)
    preset = source.preprocessing or model.preprocessing
    preprocessing = overridden(preset, **given_preprocessing(recipe))
    prepared, notes = without_damaged(source.prepared(preprocessing), recipe.damaged_images)
    splits, more_notes = _dealt(recipe, model, prepared, signature, preprocessing, search=search, spare=spare)
    return Data(splits, preprocessing, (InputSpec(preprocessing.shape),), notes=(*notes, *more_notes))


def signature_of(recipe: Recipe, model: Model) -> Signature:
    """What forward takes; images can be given as pixels where a pre-processing is known or asked for."""
    asked = any(given_preprocessing(recipe).values())
    wanted = max(1, len(inputs_wanted(model.module)))
    return Signature(wanted, parameter_names(model.module), model.preprocessing is not None or asked)


def _source_of(
    recipe: Recipe, model: Model, in_hand: str | Images | Examples | None, signature: Signature
) -> Images | Examples:
    """What was given in Python, else what the recipe names."""
    if in_hand is not None and not isinstance(in_hand, str):
        return in_hand
    name = in_hand or recipe.data
    if not name:
        raise RecipeError("no images were given; name a folder, an .npz or a data set with --data")
    return load_source(name, signature, classes=_classes_of(model))


def _classes_of(model: Model) -> tuple[str, ...] | None:
    """An untrained network's classes mean nothing."""
    if not model.class_names or model.weights == "none":
        return None
    return tuple(model.class_names)


def _dealt(
    recipe: Recipe,
    model: Model,
    source: Source,
    signature: Signature,
    preprocessing: Preprocessing | None,
    *,
    search: int,
    spare: int,
) -> tuple[Splits, tuple[str, ...]]:
    """The parts, and what was left out of evaluation images that are given apart."""
    if recipe.evaluation_data:
        classes = source.class_names or _classes_of(model)
        held_out: Source = load_source(recipe.evaluation_data, signature, classes=classes)
        if preprocessing is not None:
            held_out = held_out.prepared(preprocessing)
        held_out, notes = without_damaged(held_out, recipe.damaged_images)
        n = min(recipe.calibration, _different(source, recipe.calibration + search))
        set_apart = _set_apart(source, n, search=search, spare=spare)
        return split_apart(source, held_out, recipe.seed, calibration=n, search=set_apart), notes
    evaluated = round(recipe.evaluation * len(source))
    n = min(recipe.calibration, _different(source, recipe.calibration + evaluated + search) - evaluated)
    if not evaluated or n < 1:
        raise DataError(
            f"{source.source} holds {len(source)} images, of which {evaluated} are held out for evaluation; give more "
            "images, another share with --evaluation, or evaluation images of their own with --evaluation-data"
        )
    set_apart = _set_apart(source, evaluated + n, search=search, spare=spare)
    return split(source, recipe.seed, calibration=n, search=set_apart, evaluation=recipe.evaluation), ()


def _set_apart(images: Source, taken: int, *, search: int, spare: int) -> int:
    """How many images there are to search on, or else to spare, beside those that are taken.

    Raises DataError when too few to tell trials of a search apart are left.
    """
    left = _left(images, taken, search or spare)
    if search and left < min(search, SEARCH_LEAST):
        raise DataError(
            f"{images.source} holds {len(images)} images, of which {taken} calibrate and evaluate and {left} "
            f"are left to search on, expected at least {SEARCH_LEAST}; give more images or a smaller --calibration"
        )
    return left


def _left(images: Source, taken: int, wanted: int) -> int:
    if not wanted:
        return 0
    left = _different(images, taken + wanted) - taken
    return max(0, min(wanted, left))


def _different(images: Source, wanted: int) -> int:
    """How many images there are; repeated ones count once where that decides whether there are enough."""
    if len(images) > 2 * wanted:
        return len(images)
    return len(set(pixel_hashes(images, images.names)))
