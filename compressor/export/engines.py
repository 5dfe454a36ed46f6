"""ONNX files to engines for named targets: which library serves a target, and what the bundle does for the rest.

In: an ONNX file and a target such as `SM86`, `rtx` or `orin`. Out: an engine with its record, or a refusal that
says which library builds it where. Knows no builder API; that is `compressor.device`.
"""

from __future__ import annotations

import importlib.util
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import onnx
from google.protobuf.message import DecodeError

from ..device import cuda, tensorrt
from ..device.builder import EngineJob, EngineRecord, Profiles, Progress, sha256_of, write_sidecar
from ..device.builder import build_engine as _build
from ..errors import EngineError
from .onnx import write_model
from .targets import TARGETS, Target, resolve_target
from .tokens import with_even_tokens


def supported_targets() -> dict[str, str]:
    """Every target by name; an empty string where an engine can be built here, else why not."""
    return {name: _refusal(target) for name, target in TARGETS.items()}


def build_engine(
    onnx_path: Path | str,
    out_path: Path | str,
    *,
    target: str,
    profiles: Profiles,
    precision: str = "fp32",
    cache: Path | None = None,
    progress: Progress | None = None,
) -> EngineRecord:
    """Builds for `target`; raises InputError for an unknown one, EngineError where it can't be built here and why.

    TensorRT-RTX's fp32 products take even sizes only: attention over an odd number of tokens is widened first.
    """
    chosen = resolve_target(target)
    refusal = _refusal(chosen)
    if refusal:
        raise EngineError(refusal)

    onnx_path, job = Path(onnx_path), _job(chosen, profiles, precision)
    with tempfile.TemporaryDirectory() as folder:
        source = onnx_path
        if precision == "fp32" and job.library == "tensorrt_rtx":
            source = _with_even_tokens(onnx_path, Path(folder))
        record = _build(source, out_path, job=job, cache=cache, progress=progress)
    if source != onnx_path:  # on record is the file that ships, by whose hash a bundle knows the engine's model
        record = replace(record, onnx_sha256=sha256_of(onnx_path))
        write_sidecar(record)
    return record


def _with_even_tokens(source: Path, folder: Path) -> Path:
    """A file in `folder`; `source` where nothing changes, weights lie outside the file, or the builder says why not."""
    try:
        model = onnx.load(source, load_external_data=False)
    except (OSError, DecodeError):
        return source
    if any(tensor.data_location == onnx.TensorProto.EXTERNAL for tensor in model.graph.initializer):
        return source
    even = with_even_tokens(model)
    return source if even is model else write_model(even, folder / source.name)


def image_profile(
    shape: Sequence[int], *, batches: tuple[int, int, int] = (1, 1, 32), name: str = "input"
) -> dict[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]]:
    """The profile of an input whose samples have that shape, [C, H, W] of images, at (least, usual, most) at once."""
    low, usual, high = ((batch, *shape) for batch in batches)
    return {name: (low, usual, high)}


def build_recipe(target: str, *, model: str, profiles: Profiles, precision: str) -> dict[str, object]:
    """What a bundle carries so that `compressor build` makes the engine on the device itself; plain JSON values.

    `model` is the ONNX file's path in the bundle. Raises InputError for an unknown target.
    """
    chosen = resolve_target(target)
    return {
        "target": chosen.name,
        "devices": chosen.devices,
        "libraries": list(chosen.libraries),
        "model": model,
        "precision": precision,
        "profiles": {name: [list(shape) for shape in shapes] for name, shapes in profiles.items()},
    }


def _job(target: Target, profiles: Profiles, precision: str) -> EngineJob:
    """The build by the first library that can; TensorRT's engines are for the GPU it sees, and name no capability."""
    library = next(name for name in target.libraries if not tensorrt.buildable(name))
    capabilities = target.compute_capabilities if library == "tensorrt_rtx" else ()
    return EngineJob(library=library, profiles=profiles, compute_capabilities=capabilities, precision=precision)


def _refusal(target: Target) -> str:
    """Why `target`'s engine can't be built on this machine, empty where it can."""
    if any(_serves(library, target) for library in target.libraries):
        return ""
    if "tensorrt_rtx" in target.libraries and importlib.util.find_spec("tensorrt_rtx") is None:
        return f"an engine for {target.name} ({target.devices}) needs: {tensorrt.buildable('tensorrt_rtx')}"
    if not target.compute_capabilities:
        return f"an engine for {target.name} needs a GPU here: {tensorrt.unavailable(target.libraries[0])}"
    return (
        f"an engine for {target.name} ({target.devices}) can't be built on this machine: TensorRT-RTX does not serve "
        "it, TensorRT does, and only on the device itself; ship the bundle and run `compressor build BUNDLE` there, "
        "which builds, checks and caches the engine from the bundle's ONNX file and build recipe"
    )


def _serves(library: str, target: Target) -> bool:
    """Whether the library can build for it here: TensorRT-RTX for any named GPU, TensorRT only for the one it sees."""
    capabilities = target.compute_capabilities
    if library == "tensorrt_rtx" and capabilities:
        return not tensorrt.buildable(library)
    if tensorrt.unavailable(library):
        return False
    return not capabilities or cuda.device()[1] in capabilities
