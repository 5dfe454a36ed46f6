"""A model's name and its weights in, the module ready for evaluation out, with what is known of its images.

Names: `torchvision:NAME`, `timm:NAME`, `transformers:NAME`, `package.module:factory`, `file.py:factory`, each with
literal arguments if need be (`torchvision:resnet18(num_classes=2)`), and the embedded models of models/index.json.
A detector becomes its network and its decode (see `detectors`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict, cast

import torch
from torch import nn

from ..errors import ModelError, did_you_mean
from ..files import file_sha256, read_json
from ..graph.wrappers import copied, is_detector, plain
from .builders import Built, called
from .calls import parse_call
from .checkpoints import fill, require_values, state_hash
from .code import code_of
from .decoding import NamedDecode
from .detectors import Decoder, split_detector
from .images import Interpolation, Preprocessing, overridden
from .torchvision_models import torchvision_model, torchvision_names, without_training_heads
from .transformers_models import is_class, transformers_model

EMBEDDED = Path(__file__).resolve().parents[2] / "models"


@dataclass(frozen=True, slots=True)
class Model:
    """`builder` and `weights` are what `load_model` was given; `sha256` is of the tensors themselves.

    `notes` say what was done to make a plain float32 module of it (see `wrappers.plain`). `decode` gives the boxes of
    a detector's outputs; None for what is no detector, and for those of two stages.
    """

    module: nn.Module
    builder: str
    weights: str
    preprocessing: Preprocessing | None
    class_names: tuple[str, ...] | None
    sha256: str
    notes: tuple[str, ...] = ()
    decode: Decoder | NamedDecode | None = None


def model_in_hand(module: nn.Module) -> Model:
    """A caller's own module, made a plain one (see `wrappers.plain`); nothing is known of its images and classes.

    Raises ModelError for a module that can't be read as a plain one.
    """
    ready = plain(module)
    return Model(ready.module, "", "given", None, None, state_hash(ready.module), ready.notes)


class _Decode(TypedDict):
    """A way to boxes by name."""

    kind: str
    parameters: dict[str, Any]


class _Decoded(TypedDict, total=False):
    """What a detector's row has beside the others."""

    decode: _Decode


class _Embedded(_Decoded):
    """A row of models/index.json; `builder` and `file` are paths from the project's root and from models/."""

    builder: str
    file: str
    sha256: str
    preprocessing: dict[str, object]


class _DataConfig(TypedDict):
    """What is read of timm's data configuration."""

    input_size: tuple[int, int, int]
    crop_pct: float
    crop_mode: str
    interpolation: str
    mean: Sequence[float]
    std: Sequence[float]


def load_model(spec: str, weights: str | None = None, *, seed: int = 0) -> Model:
    """The model of that name, in evaluation mode on the CPU.

    `weights`: "none" (freshly initialised from `seed`, or as the factory leaves them), "default" (the
    library's or the embedded checkpoint), else a checkpoint file. None means default where there is one.
    Raises ModelError (unknown name, a factory that fails, a checkpoint that doesn't fit, no network).
    """
    build, name = _builder_of(spec)
    weights = weights or ("default" if _has_weights(spec) else "none")
    with torch.random.fork_rng(devices=[]):  # the caller's random numbers go on as if nothing had been drawn
        torch.manual_seed(seed)
        built = build(name, "default" if weights == "default" else "none")
    if weights not in ("none", "default"):
        fill(built.module, weights)
    require_values(built.module)
    return _ready(built, spec, weights)


def _ready(built: Built, spec: str, weights: str) -> Model:
    """The network alone, without what serves training, and without what follows it in a detector."""
    module, preprocessing = built.module.cpu(), built.preprocessing
    decode: Decoder | NamedDecode | None = built.decode
    notes = built.notes + without_training_heads(module)
    if is_detector(module):
        split = split_detector(module)
        module, preprocessing, decode = split.network, split.preprocessing, split.decode
        notes += split.notes

    ready = plain(module)
    module = ready.module.eval()
    return Model(
        module, spec, weights, preprocessing, built.class_names, state_hash(module), ready.notes + notes, decode
    )


def _has_weights(spec: str) -> bool:
    """Whether a library, or the project, has trained weights of that name."""
    build, name = _builder_of(spec)
    if build is transformers_model:
        return not is_class(name.partition("(")[0])
    return build is not _factory


def _builder_of(spec: str) -> tuple[Callable[[str, str], Built], str]:
    """The function that builds a model of that name, and the name as it takes it."""
    match spec.split(":", 1):
        case [_] | [_, ""]:
            return _embedded, spec
        case ["torchvision", name]:
            return torchvision_model, name
        case ["timm", name]:
            return _timm, name
        case ["transformers", name]:
            return transformers_model, name
        case _:
            return _factory, spec


def _embedded(spec: str, weights: str) -> Built:
    name, arguments = parse_call(spec)
    index = _index()
    if name not in index:
        raise ModelError(_unknown(name, list(index)))
    if arguments:
        raise ModelError(f"the embedded model {name!r} takes no arguments; drop {spec.removeprefix(name)}")
    entry = index[name]
    built = _factory(str(EMBEDDED.parent / entry["builder"]), "none")
    if weights == "default":
        file = EMBEDDED / entry["file"]
        if not file.is_file() or file_sha256(file) != entry["sha256"]:
            raise ModelError(f"{str(file)!r} is not the file models/index.json names; check it out again")
        fill(built.module, file)
    named = entry.get("decode")
    decode = None if named is None else NamedDecode(named["parameters"], named["kind"])
    return Built(built.module, overridden(None, **entry["preprocessing"]), decode=decode)


def _index() -> dict[str, _Embedded]:
    path = EMBEDDED / "index.json"
    if not path.is_file():
        raise ModelError(
            f"the embedded models are not here: {str(path)!r} is missing; they come with a checkout of the project "
            "(install it in place: pip install -e .), or name a model as torchvision:NAME, timm:NAME or file.py:factory"
        )
    return cast(dict[str, _Embedded], read_json(path, "models/1")["models"])


def _unknown(name: str, embedded: list[str]) -> str:
    prefixed = [f"{library}:{name}" for library, names in _library_names() if name in names]
    hint = f" Did you mean {' or '.join(map(repr, prefixed))}?" if prefixed else did_you_mean(name, embedded)
    return (
        f"there is no model {name!r}.{hint} Models are {', '.join(embedded)}, torchvision:NAME, timm:NAME, "
        "transformers:NAME, package.module:factory or file.py:factory"
    )


def _library_names() -> Iterator[tuple[str, list[str]]]:
    import timm

    yield "torchvision", list(torchvision_names())
    yield "timm", timm.list_models()


def _interpolation(name: str) -> Interpolation:
    return "bicubic" if name == "random" else cast(Interpolation, name)  # timm's "random" is for training only


def _timm(spec: str, weights: str) -> Built:
    import timm

    name, arguments = parse_call(spec)
    if not timm.is_model(name):
        raise ModelError(f"timm has no model {name!r}.{did_you_mean(name, timm.list_models())}")
    default = weights == "default"

    create: Callable[..., object] = timm.create_model  # which of its arguments there are, the name's text says

    def build() -> object:
        return create(name, pretrained=default, **arguments)

    module = called(build, f"timm:{spec}", downloads=default)
    return Built(module, _of_config(module))


def _of_config(module: nn.Module) -> Preprocessing | None:
    """The data configuration timm keeps with a model; None for ways of cropping that `Preprocessing` can't say."""
    if not isinstance(getattr(module, "pretrained_cfg", None), Mapping):
        return None
    from timm.data.config import resolve_model_data_config

    config = cast(Callable[[nn.Module], _DataConfig], resolve_model_data_config)(module)
    _, height, width = config["input_size"]
    scaled = tuple(math.floor(side / config["crop_pct"]) for side in (height, width))  # 224 at 0.875 is cut from 256
    if config["crop_mode"] == "center" and height == width:
        resize = scaled[:1]
    elif config["crop_mode"] == "squash":
        resize = scaled
    else:
        return None
    mean, std = tuple(config["mean"]), tuple(config["std"])
    return Preprocessing((height, width), resize, _interpolation(config["interpolation"]), mean, std)


def _factory(spec: str, weights: str) -> Built:
    head, opening, inside = spec.partition("(")  # a colon may stand in the arguments too
    place, _, call = head.rpartition(":")
    if not place or not call:
        raise ModelError(f"{spec!r} names no factory; write package.module:factory or file.py:factory")
    if weights == "default":
        raise ModelError(f"{spec!r} has no default weights of a library; give a checkpoint file or --weights none")

    name, arguments = parse_call(call + opening + inside)
    with code_of(place, name, role="factory", error=ModelError) as factory:
        if isinstance(factory, nn.Module):
            module = copied(factory)  # a model that stands ready in the module stays as it is
        else:
            module = called(lambda: factory(**arguments), spec, downloads=False)
    return Built(module, _of_config(module))
