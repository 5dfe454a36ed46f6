"""An ONNX file in, an engine file with its sidecar out: built in a process of its own, cached by content.

The cache key is the hash of (onnx bytes and weights beside, library, its version, targets, profiles, options): never a
file name. An engine that did not run is recorded as such. Knows no GPU names; which library serves which target is
export's.
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
from functools import partial
from pathlib import Path
from typing import IO

from ..errors import EngineError, FolderError, ModelError
from . import child, cuda, fields, tensorrt
from .destinations import replacing, write_json
from .external import files_of
from .folders import reason_of
from .lowering import Lowering, read_lowering

SCHEMA = "compressor.engine/1"
_MOST_SIDECAR_BYTES = 1 << 24
_MOST_KERNELS = 1 << 20
_MOST_AXES = 8
_BLOCK_BYTES = 1 << 20
Profiles = Mapping[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]]
Progress = Callable[[str, float], None]  # phase, share done


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
    progress = progress or _say_nothing
    _require_buildable(onnx_path, out_path, job.library)

    onnx_sha256 = sha256_of(onnx_path)
    version = _installed_version(job.library)
    key = engine_key(content_of(onnx_path, onnx_sha256), version, job)
    earlier = _already_there(out_path, key) or _from_cache(cache, key, out_path)
    if earlier is not None:
        return earlier

    start = time.monotonic()
    answer = _run_worker(onnx_path, out_path, job, progress=progress, timeout_s=timeout_s)
    reason_not_run = cuda.unavailable() or "no run was asked for"
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
        status=f"built, not run: {reason_not_run}",
        warnings=tuple(answer["warnings"]),
        lowering=read_lowering(answer["log"]),
    )
    write_sidecar(record)
    _to_cache(cache, record)
    progress("done", 1.0)
    return record


def _say_nothing(phase: str, share: float) -> None:
    """What is called where nobody follows the progress."""


def _require_buildable(onnx_path: Path, out_path: Path, library: str) -> None:
    if not onnx_path.is_file():
        raise ModelError(f"no ONNX file at {onnx_path}")
    reason = tensorrt.buildable(library)
    if reason:
        raise EngineError(f"can't build {out_path.name} with {library}: {reason}")


def content_of(onnx_path: Path, sha256: str) -> str:
    """The hash of the ONNX file or, where it takes weights from others, of its own and theirs."""
    beside = [sha256_of(file) for file in files_of(onnx_path) if file != onnx_path]
    return hashlib.sha256(" ".join([sha256, *beside]).encode()).hexdigest() if beside else sha256


def engine_key(content_sha256: str, version: str, job: EngineJob) -> str:
    """Hash of everything the engine's bytes depend on; an engine for `this GPU` depends on which GPU that is."""
    gpu = ("", "") if job.compute_capabilities else cuda.device_here()
    ingredients = {"schema": SCHEMA, "onnx": content_sha256, "version": version, "gpu": gpu, **asdict(job)}
    return hashlib.sha256(json.dumps(ingredients, sort_keys=True).encode()).hexdigest()


def sidecar_of(engine: Path) -> Path:
    """`small.plan.json` for `small.plan`."""
    return engine.with_name(engine.name + ".json")


def write_sidecar(record: EngineRecord) -> None:
    """The record beside the engine; never a prefix in it, which other loaders could not read."""
    content = {"schema": SCHEMA, **asdict(record), "path": Path(record.path).name}
    write_json(sidecar_of(Path(record.path)), content)


def read_sidecar(engine: Path) -> EngineRecord:
    """The record of an engine file; raises EngineError when it is missing, unreadable or of other bytes."""
    path = sidecar_of(engine)
    try:
        record = _record_of(fields.read_object(path, _MOST_SIDECAR_BYTES), engine)
        is_described = sha256_of(engine) == record.sha256
    except (OSError, ValueError, RecursionError) as error:
        raise EngineError(f"the sidecar {path} can't be read ({error}); build the engine again") from error
    if not is_described:
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
    kinds = _counts(content, "kinds")
    types = _counts(content, "types")
    return Lowering(
        available=fields.flag(content, "available"),
        reason=fields.text(content, "reason"),
        kernels=fields.whole(content, "kernels"),
        padded=fields.texts(content, "padded", most=_MOST_KERNELS),
        activation_bytes=fields.whole(content, "activation_bytes", least=-1),  # -1 is what a log without it gives
        weights_bytes=fields.whole(content, "weights_bytes", least=-1),
        kinds=kinds,
        types=types,
    )


def _counts(content: fields.Object, key: str) -> dict[str, int]:
    table = fields.inner(content, key)
    return {name: fields.whole(table, name) for name in table}


def read_profiles(content: fields.Object) -> Profiles:
    """Profiles as JSON has them, lists of lists, to the tuples a job wants; ValueError for what is no profile."""
    profiles = {}
    for name in content:
        low, usual, high = (_shape(shape, name) for shape in fields.entries(content, name, least=3, most=3))
        axes = zip(low, usual, high, strict=False)  # of unequal lengths, which are refused for that
        ascends = all(least <= optimal <= most for least, optimal, most in axes)
        if not len(low) == len(usual) == len(high) or not ascends:
            raise ValueError(f"the profile of {fields.shown(name)} does not go from its least shape to its largest")
        profiles[name] = (low, usual, high)
    return profiles


def _shape(value: object, name: str) -> tuple[int, ...]:
    if not isinstance(value, list) or not 1 <= len(value) <= _MOST_AXES:
        raise ValueError(f"a profile of {fields.shown(name)} is {fields.shown(value)}, expected a shape")
    return tuple(fields.as_whole(size, f"a profile of {fields.shown(name)}", least=1, most=1 << 16) for size in value)


def sha256_of(path: Path) -> str:
    """The hash of a file's bytes in hexadecimal digits; raises OSError where there is no file."""
    with path.open("rb") as file:
        return sha256_of_open(file)


def sha256_of_open(file: IO[bytes]) -> str:
    """The hash of an open file's bytes, from where it stands to its end; an engine need not fit into memory."""
    digest = hashlib.sha256()
    for block in iter(partial(file.read, _BLOCK_BYTES), b""):
        digest.update(block)
    return digest.hexdigest()


def _installed_version(library: str) -> str:
    """Asked for without importing it: the parent process stays free of the library."""
    from importlib import metadata

    for name in (f"{library}-cu13", f"{library}-cu12", library):  # wheels carry their CUDA's version in their name
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return tensorrt.version(library)


def _run_worker(
    onnx_path: Path, out_path: Path, job: EngineJob, *, progress: Progress, timeout_s: float
) -> child.Event:
    """Runs the build beside the target and moves the finished file into place; returns the worker's answer."""
    _make_folder(out_path.parent)

    def forward(event: child.Event) -> None:
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
    record = _whole_record(out_path)
    if record is None or record.key != key:
        return None
    return replace(record, cached=True)


def _from_cache(cache: Path | None, key: str, out_path: Path) -> EngineRecord | None:
    if cache is None:
        return None
    entry = cache / f"{key}.plan"
    record = _whole_record(entry)
    if record is None:
        return None
    _copy(entry, out_path)
    copied_record = replace(record, path=str(out_path), cached=True)
    write_sidecar(copied_record)
    return copied_record


def _whole_record(engine: Path) -> EngineRecord | None:
    """None where there is no engine, or one that was damaged."""
    try:
        return read_sidecar(engine)
    except EngineError:
        return None


def _to_cache(cache: Path | None, record: EngineRecord) -> None:
    """Engine first, sidecar last: an entry counts only once its sidecar names its bytes."""
    if cache is None:
        return
    entry = cache / f"{record.key}.plan"
    _copy(Path(record.path), entry)
    write_sidecar(replace(record, path=str(entry)))


def _copy(source: Path, target: Path) -> None:
    _make_folder(target.parent)
    with replacing(target) as scratch:
        shutil.copyfile(source, scratch)


def _make_folder(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FolderError(f"can't make the folder {path}: {reason_of(error)}") from error
