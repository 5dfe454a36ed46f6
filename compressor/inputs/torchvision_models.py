"""A name that torchvision knows in, its model out, with the pre-processing that its weights were trained with.

Classification, segmentation, detection, video and optical flow; quantised models are refused. Images are cut to one
size, as a traced network has one: where the library takes an image of any ratio, the middle of it (segmentation).
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from enum import Enum
from typing import Any, Protocol, cast

from torch import nn

from ..errors import ModelError, did_you_mean
from .builders import Built, called
from .calls import parse_call
from .images import Interpolation, Preprocessing, overridden

_QUANTISED = "quantization"  # the library's own name of that folder


class _ClassificationPreset(Protocol):
    """What is read of torchvision's `ImageClassification`."""

    crop_size: Sequence[int]
    resize_size: Sequence[int]
    interpolation: Enum
    mean: Sequence[float]
    std: Sequence[float]


class _SegmentationPreset(Protocol):
    """What is read of torchvision's `SemanticSegmentation`; without a size images stay as large as they are."""

    resize_size: Sequence[int] | None
    interpolation: Enum
    mean: Sequence[float]
    std: Sequence[float]


def torchvision_model(spec: str, weights: str) -> Built:
    """The model of that name, `weights` none or default. Raises ModelError for unknown and for quantised names."""
    import torchvision.models as library

    name, arguments = parse_call(spec)
    kind = _kind(name)
    trained = library.get_model_weights(name).DEFAULT
    default = weights == "default"
    options: dict[str, object] = {"weights": trained if default else None}
    if not default and "weights_backbone" in inspect.signature(library.get_model_builder(name)).parameters:
        options["weights_backbone"] = None  # which would be downloaded

    def build() -> object:
        return library.get_model(name, **(options | arguments))

    module = called(build, f"torchvision:{spec}", downloads=default)
    preset = trained.transforms()
    if kind == "classification":
        size = getattr(module, "image_size", None)  # a transformer without the best weights may be for fewer pixels
        categories = _categories(trained.meta, arguments)
        return Built(module, overridden(_of_classification(preset), size=size), categories)
    if kind == "video":
        return Built(module, None, _categories(trained.meta, arguments), (_clips(preset),))
    return Built(module, _of_segmentation(preset) if kind == "segmentation" else None)


def torchvision_names() -> dict[str, str]:
    """Every name with what its model is for; without quantised models."""
    import torchvision.models as library

    kinds = {name: _folder(library.get_model_builder(name).__module__) for name in library.list_models()}
    return {name: kind for name, kind in kinds.items() if kind != _QUANTISED}


def _folder(place: str) -> str:
    """`torchvision.models.segmentation.fcn` lies in segmentation, `torchvision.models.resnet` in no folder."""
    folders = place.split(".")[2:-1]
    return folders[0] if folders else "classification"


def _kind(name: str) -> str:
    """Raises ModelError for a name that is none, or is of a quantised model."""
    import torchvision.models as library

    names = torchvision_names()
    if name in names:
        return names[name]
    if name in library.list_models():
        plain_name = name.removeprefix("quantized_")
        raise ModelError(
            f"torchvision:{name} is quantised; give the float model, torchvision:{plain_name}: int8 files are made "
            "here (--precisions int8)"
        )
    raise ModelError(f"torchvision has no model {name!r}.{did_you_mean(name, list(names))}")


def _categories(meta: dict[str, Any], arguments: dict[str, object]) -> tuple[str, ...] | None:
    """The names of the classes the weights tell apart; None for a model of another number of them."""
    categories = tuple(meta["categories"])
    return categories if arguments.get("num_classes", len(categories)) == len(categories) else None


def _of_classification(preset: _ClassificationPreset) -> Preprocessing:
    return Preprocessing(
        (preset.crop_size[0], preset.crop_size[-1]),
        tuple(preset.resize_size),
        cast(Interpolation, preset.interpolation.value),
        tuple(preset.mean),
        tuple(preset.std),
    )


def _of_segmentation(preset: _SegmentationPreset) -> Preprocessing | None:
    """The shorter side as the library scales it, then the square in the middle."""
    if preset.resize_size is None:
        return None
    side = preset.resize_size[0]
    interpolation = cast(Interpolation, preset.interpolation.value)
    return Preprocessing((side, side), (side,), interpolation, tuple(preset.mean), tuple(preset.std))


def _clips(preset: _ClassificationPreset) -> str:
    """What to give a model of clips, which no pre-processing of single images says."""
    height, width = preset.crop_size[0], preset.crop_size[-1]
    return (
        f"its inputs are clips [N, 3, frames, {height}, {width}], normalised with mean {tuple(preset.mean)} and std "
        f"{tuple(preset.std)} of values in [0, 1]; give batches of them"
    )


def without_training_heads(module: nn.Module) -> tuple[str, ...]:
    """Takes the auxiliary classifier off a segmentation model, in place; says so.

    It is a second answer that training alone looks at, and what it needs would be kept for it.
    """
    is_segmentation = hasattr(module, "backbone") and hasattr(module, "classifier")
    if not is_segmentation or not isinstance(getattr(module, "aux_classifier", None), nn.Module):
        return ()
    module.register_module("aux_classifier", None)
    return ("its auxiliary classifier, of use in training alone, was left off",)
