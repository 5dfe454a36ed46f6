"""A bundle's build recipes in, engines for this very device out: built, run on the golden inputs, cached.

What Jetson and other TensorRT devices do with a bundle; the engine stays beside the bundle with its own sidecar.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import EngineError, GateError, InputError
from . import tensorrt
from .builder import EngineJob, EngineRecord, Progress, build_engine, read_profiles, write_sidecar
from .bundle import BUILT, GOLDEN, Manifest, ModelFile, read_bundle, verify_files
from .parity import compare, failures
from .runtimes import open_model


def build_bundle(folder: Path | str, *, progress: Progress | None = None) -> tuple[EngineRecord, ...]:
    """Builds every recipe's engine for the GPU of this machine and holds it against the golden outputs.

    Raises InputError when the bundle has no recipe, EngineError where no library can build here, GateError when
    a file was changed or an engine's outputs lie outside the limits (the engine is removed again).
    """
    folder = Path(folder)
    manifest = read_bundle(folder)
    if not manifest.build:
        raise InputError(f"the bundle {folder} carries no build recipe; its models run as they are")
    verify_files(folder, manifest)
    return tuple(_build_one(folder, manifest, recipe, progress) for recipe in manifest.build)


def _build_one(folder: Path, manifest: Manifest, recipe: Mapping[str, Any], progress: Progress | None) -> EngineRecord:
    job = EngineJob(
        library=_library(recipe), profiles=read_profiles(recipe["profiles"]), precision=str(recipe["precision"])
    )
    model = next((m for m in manifest.models if m.path == recipe["model"]), None)
    if model is None:
        raise GateError(f"the build recipe names {recipe['model']!r}, which is no model of the bundle")
    stem = re.sub(r"[^A-Za-z0-9._-]", "-", f"{recipe['target']}-{recipe['precision']}")
    record = build_engine(folder / model.path, folder / BUILT / f"{stem}.plan", job=job, progress=progress)
    return _checked(record, folder, model)


def _checked(record: EngineRecord, folder: Path, model: ModelFile) -> EngineRecord:
    reason = tensorrt.unavailable(record.library)
    if reason:
        return record
    engine = Path(record.path)
    session = open_model(engine, runtime=record.library)
    with np.load(folder / GOLDEN, allow_pickle=False) as golden:
        inputs, outputs = golden["inputs"], golden["outputs"]
    most = next(iter(record.profiles.values()))[2][0]
    parts = [session.run(inputs[i : i + most]) for i in range(0, len(inputs), most)]
    distance = compare(outputs, np.concatenate(parts))
    wrong = failures(distance, model.limits)
    if wrong:
        engine.unlink()
        raise GateError(f"the engine {engine.name} was removed: {'; '.join(wrong)} on the golden inputs")
    where = session.details.get("gpu", "this GPU")
    checked = replace(record, status=f"run on {where}: max |difference| {distance.max_abs:.3g}")
    write_sidecar(checked)
    return checked


def _library(recipe: Mapping[str, Any]) -> str:
    reasons: dict[str, str] = {str(name): tensorrt.unavailable(name) for name in recipe["libraries"]}
    for name, reason in reasons.items():
        if not reason:
            return name
    listed = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
    raise EngineError(f"no library can build an engine for {recipe['target']} here: {listed}")
