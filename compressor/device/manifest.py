"""What a bundle says of itself: a manifest's records, its text with a digest, and its reading with limits.

A manifest from elsewhere is data: every field is held to its kind and size before anything is done with it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import TypedDict

from ..errors import GateError, InputError
from . import fields, tensorrt
from .builder import read_profiles
from .external import ASIDE
from .folders import reaches_out
from .images import Preprocessing, checked_preprocessing
from .leaves import Leaf, names_of, read_leaves
from .metrics import Metric, read_metrics
from .parity import MOST_CHANNEL, MOST_RELATIVE, Limits

SCHEMA = "compressor.bundle/2"
IMAGES_SCHEMA = "compressor.bundle/1"
"""Of older bundles, which say nothing of inputs and outputs: images in, a row of numbers for each out."""
MANIFEST = "manifest.json"
SIGNATURE = "model.sig"  # over all other files, the manifest among them; called as OpenSSF Model Signing calls it
GOLDEN = "golden.npz"
CLASSIFICATION = "classification"  # the task whose answers are told by their classes
BUILT = "built"  # engines made on the device: outside the manifest, each with a sidecar of its own

_MOST_BYTES = 1 << 26  # a million labels fit
_MOST_LABELS = 1 << 20
_MOST_PATH = 1000
_MOST_STEP = 200  # of a folder or file in a path; file systems take 255 bytes
_MOST_NAME = 200
_MOST_LIBRARIES = 16
_LEAST_COSINE = -1.0
_MODEL_FIELDS = ("path", "precision", "library", "target", "limits", "made_for")
_DECODE_FIELDS = ("kind", "parameters")
_LIMIT_FIELDS = ("relative", "cosine", "top1_agreement", "channel")


@dataclass(frozen=True, slots=True)
class ModelFile:
    """One model of the bundle. `library` names an engine's; `limits` bound its distance from the golden outputs.

    `made_for` names the library that builds from an ONNX file; other runtimes compute it, but slowly.
    """

    path: str
    precision: str = "fp32"
    library: str = ""
    target: str = ""
    limits: Limits = field(default_factory=Limits)
    made_for: str = ""


@dataclass(frozen=True, slots=True)
class Decode:
    """How outputs become what is meant by them, such as boxes: a kind of decoding by name, and its parameters."""

    kind: str
    parameters: fields.Object = field(default_factory=dict)


class FileListing(TypedDict):
    """What a manifest says of a file."""

    sha256: str
    bytes: int


@dataclass(frozen=True, slots=True)
class Manifest:
    """What a bundle says of itself, its `files` by path; `build` are the recipes of engines to be built.

    `inputs` and `outputs` are in the models' order. `preprocessing` makes an image the only input, and is None where
    inputs are arrays. `task` says what outputs mean, `metrics` how good they are, `not_checked` what nobody looked at;
    older bundles say neither. `schema` is of the file this was read from; what is written has
    the newest. With the older one, `outputs` is empty: there is one, of any shape.
    """

    name: str
    models: tuple[ModelFile, ...]
    preprocessing: Preprocessing | None
    labels: tuple[str, ...] = ()
    licences: tuple[str, ...] = ()
    build: tuple[fields.Object, ...] = ()
    provenance: fields.Object = field(default_factory=dict)
    files: Mapping[str, FileListing] = field(default_factory=dict)
    inputs: tuple[Leaf, ...] = ()
    outputs: tuple[Leaf, ...] = ()
    task: str = CLASSIFICATION
    decode: Decode | None = None
    metrics: tuple[Metric, ...] = ()
    not_checked: tuple[str, ...] = ()
    schema: str = SCHEMA

    @property
    def output_names(self) -> list[str]:
        """What the outputs are called; the only one, of which older bundles say nothing, is `output`."""
        return names_of(self.outputs) or ["output"]

    def model_bytes(self, path: str) -> int:
        """Of the model of that path, with the weights that lie beside it."""
        beside = self.files.get(path + ASIDE)
        return self.files[path]["bytes"] + (beside["bytes"] if beside else 0)

    def model_at(self, path: str) -> ModelFile | None:
        """The model of that path; None where there is none."""
        return next((model for model in self.models if model.path == path), None)


def read_bundle(folder: Path | str) -> Manifest:
    """The manifest of a bundle; raises GateError when it is damaged or was changed by hand, InputError when none."""
    folder = Path(folder)
    path = folder / MANIFEST
    if not path.is_file():
        raise InputError(f"{folder} is no bundle: it has no {MANIFEST}{_nearby(folder)}")
    try:
        content = fields.read_object(path, _MOST_BYTES)
        schema, digest = fields.field(content, "schema"), fields.sha256(content, "digest")
        if schema not in (SCHEMA, IMAGES_SCHEMA):
            raise InputError(f"{path} has schema {fields.shown(schema)}, this version reads {SCHEMA!r} and older")

        del content["schema"], content["digest"]
        if digest != _digest(content):
            raise GateError(f"{path} was changed after it was written (digest differs); get the bundle again")
        return _manifest_of(content, str(schema))
    except (OSError, ValueError, RecursionError) as error:
        raise GateError(f"{path} is damaged ({error}); get the bundle again") from error


def _nearby(folder: Path) -> str:
    """Where a run's folder was given, its bundle is one down."""
    if folder.is_file():
        return "; it is a file, `compressor unpack` makes a folder of an archive"
    below = folder / "bundle"
    return f"; the bundle is one folder down: {below}" if (below / MANIFEST).is_file() else ""


def manifest_text(manifest: Manifest, files: Mapping[str, FileListing]) -> str:
    """The manifest as it is stored, with `files` in place of its own; raises InputError for one no reader accepts."""
    try:
        # There and back, so that the digest is of what a reader will see: lists where there are tuples.
        stated = asdict(manifest)
        del stated["schema"]
        stated["models"] = list(map(_stated, manifest.models))
        content = json.loads(json.dumps({**stated, "files": files}, allow_nan=False))
        _manifest_of(content)
    except ValueError as error:
        raise InputError(f"the bundle's manifest can't be written: {error}") from error
    return json.dumps({"schema": SCHEMA, "digest": _digest(content), **content}, indent=1) + "\n"


def _stated(model: ModelFile) -> dict[str, object]:
    """Without the limit on channels where there is none: older readers know of no such field."""
    stated = asdict(model)
    if model.limits.channel is None:
        del stated["limits"]["channel"]
    return stated


def inside(name: str) -> PurePosixPath:
    """The name as a path that stays in the bundle; a manifest from elsewhere must not reach out of it."""
    path = PurePosixPath(name)
    if reaches_out(name) or not path.parts:
        raise GateError(f"the manifest names {fields.shown(name)}, which lies outside the bundle; don't use it")
    return path


def _digest(content: fields.Object) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _manifest_of(content: fields.Object, schema: str = SCHEMA) -> Manifest:
    files = _files(content)
    models = tuple(_model(entry, files) for entry in fields.entries(content, "models"))
    build = tuple(map(_recipe, fields.entries(content, "build")))
    manifest = Manifest(
        name=fields.text(content, "name"),
        models=models,
        preprocessing=None,
        labels=fields.texts(content, "labels", most=_MOST_LABELS),
        licences=fields.texts(content, "licences"),
        build=build,
        provenance=_provenance(content),
        files=files,
        schema=schema,
    )
    complete = _with_images if schema == IMAGES_SCHEMA else _with_leaves
    return complete(manifest, content)


def _with_images(manifest: Manifest, content: fields.Object) -> Manifest:
    """What the older schema says of inputs and outputs."""
    preprocessing = _preprocessing(fields.inner(content, "preprocessing"))
    return replace(manifest, preprocessing=preprocessing, inputs=(_image_leaf(preprocessing),))


def _with_leaves(manifest: Manifest, content: fields.Object) -> Manifest:
    """What the newer schema says of inputs and outputs."""
    inputs = read_leaves(content, "inputs")
    has_images = fields.field(content, "preprocessing") is not None
    return replace(
        manifest,
        preprocessing=_preprocessing_of(inputs, content) if has_images else None,
        inputs=inputs,
        outputs=read_leaves(content, "outputs"),
        task=fields.text(content, "task", most=_MOST_NAME),
        decode=_decode(content),
        metrics=read_metrics(content),
        not_checked=fields.texts({"not_checked": [], **content}, "not_checked"),
    )


def _files(content: fields.Object) -> dict[str, FileListing]:
    files: dict[str, FileListing] = {}
    for name, entry in fields.inner(content, "files").items():
        listing = fields.as_object(entry, fields.shown(name))
        files[_path(name)] = {"sha256": fields.sha256(listing, "sha256"), "bytes": fields.whole(listing, "bytes")}
    if GOLDEN not in files:
        raise ValueError(f"its files lack {GOLDEN}")
    return files


def _path(name: str) -> str:
    """The name, if it is one that a bundle's file can have."""
    path = inside(name)
    is_too_long = len(name) > _MOST_PATH or max(map(len, path.parts)) > _MOST_STEP
    if is_too_long or not name.isprintable():
        raise GateError(f"the manifest names {fields.shown(name)}, which is no path of a file; don't use it")
    if str(path) != name or path.parts[0] == BUILT or name in (MANIFEST, SIGNATURE):  # "a//b" is a second name of "a/b"
        raise GateError(f"the manifest names {fields.shown(name)}, which no bundle's file is called; don't use it")
    return name


def _model(entry: object, files: Collection[str]) -> ModelFile:
    stated = fields.record(entry, _MODEL_FIELDS, "a model")
    content = {"library": "", "target": "", "made_for": "", **stated}  # older bundles say nothing of some

    path, library = fields.text(content, "path"), fields.text(content, "library", most=_MOST_NAME)
    if _path(path) not in files:
        raise ValueError(f"the model {fields.shown(path)} has no entry among the files")
    if library not in ("", *tensorrt.LIBRARIES):
        raise ValueError(f"no engine's library is {fields.shown(library)}; there are {', '.join(tensorrt.LIBRARIES)}")
    return ModelFile(
        path=path,
        precision=fields.text(content, "precision", most=_MOST_NAME),
        library=library,
        target=fields.text(content, "target", most=_MOST_NAME),
        limits=_limits(fields.inner(content, "limits")),
        made_for=fields.text(content, "made_for", most=_MOST_NAME),
    )


def _limits(content: fields.Object) -> Limits:
    fields.only(content, _LIMIT_FIELDS, "a model's limits")
    is_by_channels = content.get("channel") is not None  # older bundles don't say
    return Limits(
        relative=fields.number(content, "relative", least=0, most=MOST_RELATIVE),
        cosine=fields.number(content, "cosine", least=_LEAST_COSINE, most=1),
        top1_agreement=fields.number(content, "top1_agreement", least=0, most=1),
        channel=fields.number(content, "channel", least=0, most=MOST_CHANNEL) if is_by_channels else None,
    )


def _preprocessing_of(inputs: Sequence[Leaf], content: fields.Object) -> Preprocessing:
    """ValueError for one that makes something else than the only input."""
    preprocessing = _preprocessing(fields.inner(content, "preprocessing"))
    image = _image_leaf(preprocessing)
    if [(leaf.shape, leaf.dtype) for leaf in inputs] != [(image.shape, image.dtype)]:
        listed = ", ".join(f"{leaf.name} {leaf}" for leaf in inputs)
        raise ValueError(f"its pre-processing makes images {image}, its inputs are {fields.shown(listed)}")
    return preprocessing


def _image_leaf(preprocessing: Preprocessing) -> Leaf:
    """What images are for the model once they are prepared."""
    return Leaf("input", (len(preprocessing.mean), *preprocessing.size), "float32")  # [C, H, W]


def _decode(content: fields.Object) -> Decode | None:
    """Its parameters are whoever decodes by them to look at."""
    if fields.field(content, "decode") is None:
        return None
    decode = fields.inner(content, "decode")
    fields.only(decode, _DECODE_FIELDS, "the decoding")
    return Decode(fields.text(decode, "kind", most=_MOST_NAME), fields.inner(decode, "parameters"))


def _preprocessing(content: fields.Object) -> Preprocessing:
    fields.only(content, ("size", "resize", "interpolation", "mean", "std"), "the pre-processing")
    return checked_preprocessing(
        size=fields.entries(content, "size"),
        resize=fields.entries(content, "resize"),
        mean=fields.entries(content, "mean"),
        std=fields.entries(content, "std"),
        interpolation=fields.text(content, "interpolation", most=_MOST_NAME),
    )


def _recipe(entry: object) -> fields.Object:
    """What `compressor build` needs; which of the libraries it can build with is its to say."""
    content = fields.as_object(entry, "a build recipe")
    fields.text(content, "target", most=_MOST_NAME)
    fields.text(content, "precision", most=_MOST_NAME)
    fields.text(content, "model", most=_MOST_PATH)
    fields.texts(content, "libraries", most=_MOST_LIBRARIES)
    read_profiles(fields.inner(content, "profiles"))
    return content


def _provenance(content: fields.Object) -> fields.Object:
    """Free, but for the two costs that others count with."""
    provenance = fields.inner(content, "provenance")
    for key in {"macs", "parameters"} & provenance.keys():
        fields.whole(provenance, key, least=-1)
    return provenance
