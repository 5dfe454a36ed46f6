"""A bundle's build recipes in, engines for this very device out: built, run on the golden inputs, cached.

What Jetson and other TensorRT devices do with a bundle; the engine stays beside the bundle with its own sidecar.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from ..errors import GateError, InputError
from . import fields, tensorrt
from .builder import EngineJob, EngineRecord, Progress, build_engine, read_profiles, write_sidecar
from .built import check_built, read_built, remove_engine, write_check
from .bundle import verify_files
from .external import require_weights_beside
from .golden import read_golden
from .manifest import BUILT, SCHEMA, Manifest, read_bundle
from .runtimes import open_model, unavailable_error

_MOST_STEM = 100


def build_bundle(folder: Path | str, *, progress: Progress | None = None) -> tuple[EngineRecord, ...]:
    """Builds every recipe's engine for the GPU of this machine and holds it against the golden outputs.

    Raises InputError when the bundle has no recipe, MissingPackageError or EngineError where no library can build
    here, GateError when a file was changed or an engine's outputs lie outside the limits (it is removed again).
    """
    folder = Path(folder)
    manifest = read_bundle(folder)
    if not manifest.build:
        raise InputError(f"the bundle {folder} carries no build recipe; its models run as they are")
    verify_files(folder, manifest)
    return tuple(_build_one(folder, manifest, recipe, progress) for recipe in manifest.build)


def _build_one(folder: Path, manifest: Manifest, recipe: fields.Object, progress: Progress | None) -> EngineRecord:
    target, precision = fields.text(recipe, "target"), fields.text(recipe, "precision")
    library = _library(target, fields.texts(recipe, "libraries"))
    profiles = read_profiles(fields.inner(recipe, "profiles"))
    if not profiles:
        raise GateError(f"the build recipe for {target} says nothing of the input's shapes")
    unshaped = [leaf.name for leaf in manifest.inputs if leaf.name not in profiles]
    if unshaped and manifest.schema == SCHEMA:  # older bundles do not say what their input is called
        raise GateError(f"the build recipe for {target} says nothing of the shapes of {fields.shown(unshaped[0])}")
    path = fields.text(recipe, "model")
    model = manifest.model_at(path)
    if model is None:
        raise GateError(f"the build recipe names {path!r}, which is no model of the bundle")

    try:
        require_weights_beside(folder / model.path)
    except ValueError as error:
        raise GateError(f"{model.path} is no ONNX file: {error}") from error

    # The recipe is from elsewhere: what it calls its target becomes the name of a file here.
    stem = re.sub(r"[^A-Za-z0-9_-]", "-", f"{target}-{precision}"[:_MOST_STEM])
    job = EngineJob(library=library, profiles=profiles, precision=precision)
    record = build_engine(folder / model.path, folder / BUILT / f"{stem}.plan", job=job, progress=progress)
    return _checked(record, folder, manifest)


def _checked(record: EngineRecord, folder: Path, manifest: Manifest) -> EngineRecord:
    """Run on the golden inputs where it can run; what does not pass them is removed, what does is said to have."""
    if tensorrt.unavailable(record.library):
        return record
    path = Path(record.path)
    engine = read_built(path, manifest)
    session = open_model(path, runtime=record.library)
    try:
        parity = check_built(session, read_golden(folder, manifest), engine.model, engine.at_once)
    except GateError as error:
        remove_engine(path)
        raise GateError(f"{error}; it was removed") from error

    gpu = session.details.get("gpu", "this GPU")
    checked_record = replace(record, status=f"run on {gpu}: max |difference| {parity.max_abs:.3g}")
    write_sidecar(checked_record)
    write_check(path, parity)
    return checked_record


def _library(target: str, libraries: Sequence[str]) -> str:
    """The first of the recipe's libraries that can build here; of names that are none's nothing is looked up."""
    reasons: dict[str, str] = {}
    for name in libraries:
        reason = tensorrt.unavailable(name) if name in tensorrt.LIBRARIES else "no library for engines"
        if not reason:
            return name
        reasons[fields.printable(name[:60])] = reason

    listed = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
    raise unavailable_error(
        f"no library can build an engine for {fields.printable(target)} here: {listed or 'the recipe names none'}",
        reasons.values(),
    )
