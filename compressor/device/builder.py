"""An ONNX file in, an engine file with its sidecar out: built in a process of its own, cached by content.

The cache key is the hash of (onnx bytes, library, its version, targets, profiles, options): never a file name.
An engine that did not run is recorded as such. Knows no GPU names; which library serves which target is export's.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from ..errors import EngineError, FolderError, ModelError
from . import child, cuda, fields, tensorrt
from .lowering import Lowering, read_lowering

SCHEMA = "compressor.engine/1"
_MOST_SIDECAR_BYTES = 1 << 24
_MOST_KERNELS = 1 << 20
_MOST_AXES = 8
Profiles = Mapping[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]]
Progress = Callable[[str, float], None]


@dataclass(frozen=True, slots=True)
class EngineJob:
    """What decides an engine's bytes. `profiles[input]` = (min, optimal, max) shapes; no targets = this GPU."""

    library: str
    profiles: Profiles
    compute_capabilities: tuple[str, ...] = ()
    precision: str = "fp32"
    workspace_bytes: int = 0


@dataclass(frozen=True, slots=True)
class EngineRecord:
    """An engine that was built. `status`: `built, not run: <why>` until a run against golden outputs says more."""

    path: str
    sha256: str
    size_bytes: int
    onnx_sha256: str
    key: str
    library: str
    library_version: str
    compute_capabilities: tuple[str, ...]
    precision: str
    profiles: Profiles
    build_s: float
    cached: bool
    status: str
    warnings: tuple[str, ...] = ()
    lowering: Lowering = field(default_factory=lambda: Lowering(False, "not read"))


def build_engine(
    onnx_path: Path | str,
    out_path: Path | str,
    *,
    job: EngineJob,
    cache: Path | None = None,
    progress: Progress | None = None,
    timeout_s: float = 3600,
) -> EngineRecord:
    """Builds `out_path` and its sidecar `<out_path>.json`, or takes both from the cache; neither appears half-written.

    `progress(phase, share)` is called from 0 to 1. Raises EngineError with the builder's reasons.
    """
    onnx_path, out_path = Path(onnx_path), Path(out_path)
    if not onnx_path.is_file():
        raise ModelError(f"no ONNX file at {onnx_path}")
    reason = tensorrt.buildable(job.library)
    if reason:
        raise EngineError(f"can't build {out_path.name} with {job.library}: {reason}")
    onnx_sha256 = sha256_of(onnx_path)
    version = _installed_version(job.library)
    key = engine_key(onnx_sha256, version, job)
    found = _already_there(out_path, key) or _from_cache(cache, key, out_path)
    if found is not None:
        return found
    start = time.monotonic()
    events = _run_worker(onnx_path, out_path, job, progress=progress, timeout_s=timeout_s)
    record = EngineRecord(
        path=str(out_path),
        sha256=sha256_of(out_path),
        size_bytes=out_path.stat().st_size,
        onnx_sha256=onnx_sha256,
        key=key,
        library=job.library,
        library_version=version,
        compute_capabilities=job.compute_capabilities,
        precision=job.precision,
        profiles=dict(job.profiles),
        build_s=time.monotonic() - start,
        cached=False,
        status=f"built, not run: {cuda.unavailable() or 'no run was asked for'}",
        warnings=tuple(events["warnings"]),
        lowering=read_lowering(events["log"]),
    )
    write_sidecar(record)
    _to_cache(cache, record)
    if progress is not None:
        progress("done", 1.0)
    return record


def engine_key(onnx_sha256: str, version: str, job: EngineJob) -> str:
    """Hash of everything the engine's bytes depend on; an engine for `this GPU` depends on which GPU that is."""
    here = cuda.device() if not job.compute_capabilities and not cuda.unavailable() else ("", "")
    parts = {"schema": SCHEMA, "onnx": onnx_sha256, "version": version, "gpu": here, **asdict(job)}
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def sidecar_of(engine: Path) -> Path:
    return engine.with_name(engine.name + ".json")


def write_sidecar(record: EngineRecord) -> None:
    """The record beside the engine; never a prefix in it, which other loaders could not read."""
    content = {"schema": SCHEMA, **asdict(record), "path": Path(record.path).name}
    write_atomically(sidecar_of(Path(record.path)), (json.dumps(content, indent=1) + "\n").encode())


def read_sidecar(engine: Path) -> EngineRecord:
    """The record of an engine file; raises EngineError when it is missing, unreadable or of other bytes."""
    path = sidecar_of(engine)
    try:
        record = _record_of(fields.read_object(path, _MOST_SIDECAR_BYTES), engine)
        same = sha256_of(engine) == record.sha256
    except (OSError, ValueError, RecursionError) as error:
        raise EngineError(f"the sidecar {path} can't be read ({error}); build the engine again") from error
    if not same:
        raise EngineError(f"{engine} is not the file its sidecar describes (sha256 differs); build the engine again")
    return record


def _record_of(content: fields.Object, engine: Path) -> EngineRecord:
    if fields.field(content, "schema") != SCHEMA:
        raise ValueError(f"its schema is {fields.shown(content['schema'])}, expected {SCHEMA!r}")
    library = fields.text(content, "library")
    if library not in tensorrt.LIBRARIES:
        raise ValueError(f"no engine's library is {fields.shown(library)}; there are {', '.join(tensorrt.LIBRARIES)}")
    return EngineRecord(
        path=str(engine),
        sha256=fields.sha256(content, "sha256"),
        size_bytes=fields.whole(content, "size_bytes"),
        onnx_sha256=fields.sha256(content, "onnx_sha256"),
        key=fields.text(content, "key"),
        library=library,
        library_version=fields.text(content, "library_version"),
        compute_capabilities=fields.texts(content, "compute_capabilities"),
        precision=fields.text(content, "precision"),
        profiles=read_profiles(fields.inner(content, "profiles")),
        build_s=fields.number(content, "build_s", least=0, most=1e9),
        cached=fields.flag(content, "cached"),
        status=fields.text(content, "status"),
        warnings=fields.texts(content, "warnings"),
        lowering=_lowering_of(fields.inner(content, "lowering")),
    )


def _lowering_of(content: fields.Object) -> Lowering:
    counts = {
        key: {name: fields.whole(table, name) for name in table}
        for key, table in ((key, fields.inner(content, key)) for key in ("kinds", "types"))
    }
    return Lowering(
        available=fields.flag(content, "available"),
        reason=fields.text(content, "reason"),
        kernels=fields.whole(content, "kernels"),
        padded=fields.texts(content, "padded", most=_MOST_KERNELS),
        activation_bytes=fields.whole(content, "activation_bytes", least=-1),
        weights_bytes=fields.whole(content, "weights_bytes", least=-1),
        **counts,
    )


def read_profiles(content: fields.Object) -> Profiles:
    """Profiles as JSON has them, lists of lists, to the tuples a job wants; ValueError for what is no profile."""
    profiles = {}
    for name in content:
        shapes = [_shape(s, name) for s in fields.entries(content, name, least=3, most=3)]
        low, usual, high = shapes
        ordered = all(a <= b <= c for a, b, c in zip(low, usual, high, strict=False))
        if len({*map(len, shapes)}) != 1 or not ordered:
            raise ValueError(f"the profile of {fields.shown(name)} does not go from its least shape to its largest")
        profiles[name] = (low, usual, high)
    return profiles


def _shape(value: Any, name: str) -> tuple[int, ...]:
    if not isinstance(value, list) or not 1 <= len(value) <= _MOST_AXES:
        raise ValueError(f"a profile of {fields.shown(name)} is {fields.shown(value)}, expected a shape")
    return tuple(fields.as_whole(size, f"a profile of {fields.shown(name)}", least=1, most=1 << 16) for size in value)


def sha256_of(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _installed_version(library: str) -> str:
    """Asked for without importing it: the parent process stays free of the library."""
    from importlib import metadata

    for name in (f"{library}-cu13", f"{library}-cu12", library):
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return tensorrt.version(library)


def _run_worker(
    onnx_path: Path, out_path: Path, job: EngineJob, *, progress: Progress | None, timeout_s: float
) -> dict[str, Any]:
    """Runs the build beside the target and moves the finished file into place; returns the worker's answer."""
    _make_folder(out_path.parent)

    def forward(event: dict[str, Any]) -> None:
        if progress is not None:
            progress(str(event["phase"]), event["step"] / max(1, event["steps"]))

    with tempfile.TemporaryDirectory(dir=out_path.parent, prefix=".build-") as folder:
        scratch = Path(folder) / out_path.name
        request = {**asdict(job), "onnx": str(onnx_path.resolve()), "out": str(scratch.resolve())}
        name = f"the build of {out_path.name}"
        with child.start("compressor.device.tensorrt", name=name, timeout_s=timeout_s) as ask:
            answer = ask(request, forward)
        os.replace(scratch, out_path)
    return answer


def _already_there(out_path: Path, key: str) -> EngineRecord | None:
    if not sidecar_of(out_path).is_file() or not out_path.is_file():
        return None
    try:
        record = read_sidecar(out_path)
    except EngineError:
        return None
    return replace(record, cached=True) if record.key == key else None


def _from_cache(cache: Path | None, key: str, out_path: Path) -> EngineRecord | None:
    if cache is None or not (cache / f"{key}.plan").is_file():
        return None
    try:
        record = read_sidecar(cache / f"{key}.plan")
    except EngineError:  # an entry that was damaged is not an entry
        return None
    _make_folder(out_path.parent)
    scratch = out_path.with_name(f".{out_path.name}.{os.getpid()}")
    shutil.copyfile(cache / f"{key}.plan", scratch)
    os.replace(scratch, out_path)
    found = replace(record, path=str(out_path), cached=True)
    write_sidecar(found)
    return found


def _to_cache(cache: Path | None, record: EngineRecord) -> None:
    """Engine first, sidecar last: an entry counts only once its sidecar names its bytes."""
    if cache is None:
        return
    _make_folder(cache)
    entry = cache / f"{record.key}.plan"
    scratch = cache / f".{record.key}.{os.getpid()}"
    shutil.copyfile(record.path, scratch)
    os.replace(scratch, entry)
    write_sidecar(replace(record, path=str(entry)))


def _make_folder(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FolderError(f"can't make the folder {path}: {error.strerror}") from error


def write_atomically(path: Path, data: bytes) -> None:
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        scratch.write_bytes(data)
        os.replace(scratch, path)
    except OSError as error:
        raise FolderError(f"can't write {path}: {error.strerror}") from error
