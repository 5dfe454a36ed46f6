"""A model's name on Hugging Face's Hub, its folder, or a class of the package transformers in, the model out.

A name is built as the class its configuration was saved with; a class from a configuration of the arguments that are
given. The pre-processing is the image processor's. The package is optional; code that lies beside a model's weights
(`trust_remote_code`) is never run.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import ModuleType
from typing import Any, cast

from PIL import Image

from ..errors import MissingPackageError, ModelError, did_you_mean
from .builders import Built, called, first_line_of
from .calls import parse_call
from .images import Interpolation, Preprocessing, overridden

_REFUSED = ("trust_remote_code", "auto_map", "code_revision")  # each of them names code to run


def transformers_model(spec: str, weights: str) -> Built:
    """The model of that name or class, `weights` none or default.

    Raises MissingPackageError without the package, ModelError for unknown names, classes and arguments.
    """
    library = _library(spec)
    name, arguments = parse_call(spec)
    _refuse_code(spec, arguments)
    if is_class(name):
        return _of_class(library, spec, weights)
    config = _config(library, spec)
    model_class = _saved_class(library, config)
    default = weights == "default"

    def build() -> object:
        if default:
            return _trained(library, model_class, spec, config)
        return _fresh(model_class, config)

    module = called(build, f"transformers:{spec}", downloads=default)
    preprocessing = _of_processor(library, name)
    if preprocessing is not None and "image_size" in arguments:
        preprocessing = overridden(preprocessing, size=arguments["image_size"])
    return Built(module, preprocessing, _class_names(model_class, config))


def is_class(name: str) -> bool:
    """Whether a name is a class of the package; those on the Hub have their owner in front, a folder has `./`."""
    return name.isidentifier() and name[:1].isupper()


def _library(spec: str) -> ModuleType:
    try:
        import transformers
    except ImportError as error:
        raise MissingPackageError(
            f"'transformers:{spec}' needs the package transformers, which is not installed: "
            "pip install 'compressor[transformers]'"
        ) from error
    library: ModuleType = transformers
    return library


def _refuse_code(spec: str, fields: Mapping[str, object]) -> None:
    """Raises ModelError for arguments or a configuration's fields that name code to fetch and run."""
    named = [name for name in fields if name in _REFUSED]
    named += [name for name, value in fields.items() if name.endswith("attn_implementation") and "/" in str(value)]
    if named:
        raise ModelError(
            f"'transformers:{spec}' asks for {named[0]}, which would run code from elsewhere; read that code, keep it "
            "in a file of yours and name it as file.py:factory"
        )


def _of_class(library: ModuleType, spec: str, weights: str) -> Built:
    """A class with a configuration of its own; it has no weights."""
    name, arguments = parse_call(spec)
    model_class = getattr(library, name, None)
    is_model = isinstance(model_class, type) and issubclass(model_class, library.PreTrainedModel)
    config_class = getattr(model_class, "config_class", None)
    if not is_model or config_class is None:
        names = [entry for entry in dir(library) if entry.endswith("Model") or "For" in entry]
        raise ModelError(f"transformers has no model class {name!r}.{did_you_mean(name, names)}")
    if weights == "default":
        raise ModelError(
            f"'transformers:{spec}' names a class, which has no default weights; give a checkpoint file, "
            "--weights none, or a model's name on the Hub"
        )
    _require_fields(spec, config_class(), arguments)

    def build() -> object:
        return _fresh(model_class, config_class(**arguments))

    return Built(called(build, f"transformers:{spec}", downloads=False), None)


def _require_fields(spec: str, config: Any, arguments: Mapping[str, object]) -> None:
    """Raises ModelError for an argument that no configuration of the kind has: the library would keep it unread."""
    unknown = [name for name in arguments if not hasattr(config, name)]
    if unknown:
        raise ModelError(
            f"'transformers:{spec}': {type(config).__name__} has no {unknown[0]!r}."
            f"{did_you_mean(unknown[0], [*config.to_dict(), 'num_labels'])}"
        )


def _config(library: ModuleType, spec: str) -> Any:
    """The configuration of a model by name, with the arguments in their fields' place."""
    name, arguments = parse_call(spec)
    try:
        config = library.AutoConfig.from_pretrained(name, trust_remote_code=False)
    except Exception as error:
        raise ModelError(
            f"the configuration of 'transformers:{spec}' can't be read ({type(error).__name__}: "
            f"{first_line_of(error)}); check the name and the network, or name a class with its arguments, such as "
            "transformers:ViTForImageClassification(hidden_size=64, num_hidden_layers=2)"
        ) from error
    _require_fields(spec, config, arguments)
    _refuse_code(spec, {"attn_implementation": getattr(config, "_attn_implementation", None)})
    for field, value in arguments.items():
        setattr(config, field, value)
    return config


def _class_names(model_class: Any, config: Any) -> tuple[str, ...] | None:
    """Of a classifier whose configuration names its classes; "LABEL_0" is what the library writes without names."""
    labels = [str(label) for _, label in sorted(config.id2label.items())]
    is_classifier = model_class.__name__.endswith("ForImageClassification")
    if not is_classifier or labels[0].startswith("LABEL_"):
        return None
    return tuple(labels)


def _saved_class(library: ModuleType, config: Any) -> Any:
    """The class a configuration was saved with, else the library's plain one for its kind."""
    classes = (getattr(library, name, None) for name in config.architectures or ())
    return next(filter(None, classes), None) or library.AutoModel  # which takes a second to look up


def _trained(library: ModuleType, model_class: Any, spec: str, config: Any) -> object:
    """The model with the weights of its name. Raises ModelError where they leave some of it as it was drawn."""
    name = parse_call(spec)[0]
    with _without_bars(library):
        model, loading = model_class.from_pretrained(
            name, config=config, trust_remote_code=False, output_loading_info=True
        )
    missing = sorted(loading["missing_keys"])
    if missing:
        raise ModelError(
            f"the weights of 'transformers:{spec}' lack {len(missing)} tensors of {model_class.__name__} "
            f"({', '.join(map(repr, missing[:3]))}); name a model that was trained as a whole, or give its checkpoint"
        )
    return model


@contextmanager
def _without_bars(library: ModuleType) -> Iterator[None]:
    """Without the library's progress bars, which would stand among what a command says."""
    logging = library.utils.logging
    was_enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_enabled:
            logging.enable_progress_bar()


def _fresh(model_class: Any, config: Any) -> object:
    """A model of new weights; the library's automatic classes are no constructors."""
    if hasattr(model_class, "from_config"):
        return model_class.from_config(config)
    return model_class(config)


def _of_processor(library: ModuleType, name: str) -> Preprocessing | None:
    """What the image processor beside a model says; None where there is none, or for ways that can't be said so."""
    try:
        fields = library.AutoImageProcessor.from_pretrained(name, trust_remote_code=False).to_dict()
    except (OSError, ValueError, KeyError, ImportError):  # there is none: images are the user's to describe
        return None
    return preprocessing_of(fields)


def preprocessing_of(fields: Mapping[str, Any]) -> Preprocessing | None:
    """What an image processor's fields say: resize, cut out the middle, scale to [0, 1], normalise.

    Where it keeps an image's ratio and cuts nothing off, the whole image is scaled to the square of the shorter side,
    as a traced network has one size. None without a size, or for values in another range.
    """
    resize = _sides(fields.get("size")) if fields.get("do_resize", True) else None
    crop = _sides(fields.get("crop_size")) if fields.get("do_center_crop") else None
    cut = crop or resize
    if cut is None or not _is_scaled_to_one(fields):
        return None
    size = (cut[0], cut[-1])
    is_whole = crop is None and len(cut) == 1  # its ratio is kept, and nothing is cut off
    if resize is None or is_whole:
        resize = size
    mean: tuple[float, ...] = (0.0, 0.0, 0.0)
    std: tuple[float, ...] = (1.0, 1.0, 1.0)
    if fields.get("do_normalize", True):
        mean, std = tuple(fields["image_mean"]), tuple(fields["image_std"])
    return Preprocessing(size, resize, _interpolation(fields.get("resample")), mean, std)


def _is_scaled_to_one(fields: Mapping[str, Any]) -> bool:
    """Whether pixels from 0 to 255 become values from 0 to 1."""
    if not fields.get("do_rescale", True):
        return False
    return bool(abs(fields.get("rescale_factor", 1 / 255) * 255 - 1) < 1e-6)


def _sides(size: object) -> tuple[int, ...] | None:
    """{"height": 224, "width": 224} is (224, 224), {"shortest_edge": 256} is (256,), and so is 256."""
    match size:
        case int():
            return (size,)
        case {"height": height, "width": width} if height and width:
            return (int(height), int(width))
        case {"shortest_edge": edge} if edge:
            return (int(edge),)
        case _:
            return None


def _interpolation(resample: int | None) -> Interpolation:
    """Pillow's number of a filter by its name; bilinear is the library's own where none is named."""
    if resample is None:
        return "bilinear"
    return cast(Interpolation, Image.Resampling(resample).name.lower())
