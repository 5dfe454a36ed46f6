"""Engines built on this device, which no manifest vouches for: which of them are what they say, and which passed.

An engine is preferred only with a record beside it that it passed the golden outputs, bound to the engine's and the
manifest's hash. The record saves no check but the first: who can write an engine here can write a record.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from ..errors import EngineError, GateError
from . import cuda, fields, tensorrt
from .builder import EngineRecord, read_sidecar, sha256_of, sidecar_of
from .destinations import write_json
from .folders import files_below
from .golden import Golden, distance
from .manifest import BUILT, MANIFEST, Manifest, ModelFile
from .parity import Parity, failures
from .runtimes import Session

SCHEMA = "compressor.golden-check/1"
_MOST_RECORD_BYTES = 1 << 16
_ENGINE = r"[A-Za-z0-9_-][A-Za-z0-9._-]*\.plan(\.json|\.golden\.json)?"
_UNFINISHED = r"\.build-[^/]+(/.*)?|\.[^/]+\.\d+"  # by a build that runs or was killed
_BUILDERS_FILES = re.compile(f"{BUILT}/({_ENGINE}|{_UNFINISHED})")


@dataclass(frozen=True, slots=True)
class BuiltEngine:
    """An engine of one of the bundle's models. `unchecked` says why it is not preferred, and is empty when it is."""

    model: ModelFile
    at_once: int
    unchecked: str


def is_builders_file(name: str) -> bool:
    """Whether a path in the bundle is called as what `compressor build` leaves there."""
    return _BUILDERS_FILES.fullmatch(name) is not None


def shipped_files(folder: Path) -> Iterator[str]:
    """Paths in the bundle but for what `compressor build` leaves there; a link is never that."""
    return (name for name in files_below(folder) if not is_builders_file(name) or (folder / name).is_symlink())


def engine_files(folder: Path) -> tuple[Path, ...]:
    """The engines built in a bundle's folder, by name; links are none, they may lead out of it."""
    return tuple(itertools.filterfalse(Path.is_symlink, sorted((folder / BUILT).glob("*.plan"))))


def built_engines(folder: Path, manifest: Manifest) -> tuple[BuiltEngine, ...]:
    """Engines made here from this bundle's models; raises EngineError for one that is not."""
    return tuple(read_built(path, manifest) for path in engine_files(folder))


def checked_engines(folder: Path, manifest: Manifest) -> tuple[BuiltEngine, ...]:
    """Those of them that passed the golden outputs."""
    return tuple(engine for engine in built_engines(folder, manifest) if not engine.unchecked)


def read_built(path: Path, manifest: Manifest) -> BuiltEngine:
    """The engine at `path` as a model of the bundle; raises EngineError when no model of it is what it was built from.

    The source is told by its hash: limits and precision of the engine are that model's.
    """
    record = read_sidecar(path)
    for source in manifest.models:
        if manifest.files[source.path]["sha256"] == record.onnx_sha256:
            model = replace(source, path=f"{BUILT}/{path.name}", library=record.library, target="this-gpu", made_for="")
            return BuiltEngine(model, most_images(record), _unchecked(path, record))
    raise EngineError(f"{path} was built from no model of this bundle; remove it and run `compressor build` again")


def most_images(record: EngineRecord) -> int:
    """The largest batch the engine was built for."""
    largest_batches = [largest[0] for _, _, largest in record.profiles.values()]
    return min(largest_batches, default=1)


def check_built(session: Session, golden: Golden, engine: ModelFile, at_once: int) -> Parity:
    """The engine's distance from the golden outputs; raises GateError where it lies outside the model's limits."""
    parity = distance(session, golden, at_once)
    wrong = failures(parity, engine.limits)
    if wrong:
        raise GateError(f"{engine.path} differs from the golden outputs: {'; '.join(wrong)}")
    return parity


def write_check(engine: Path, parity: Parity) -> None:
    """Says beside the engine that these bytes passed this bundle's golden outputs."""
    content = {
        "schema": SCHEMA,
        "engine_sha256": sha256_of(engine),
        "manifest_sha256": sha256_of(_manifest_beside(engine)),
        "max_abs": parity.max_abs,
        "gpu": _gpu_here(),
    }
    write_json(_record_of(engine), content)


def remove_engine(engine: Path) -> None:
    """The engine with all that is said of it."""
    for path in (engine, sidecar_of(engine), _record_of(engine)):
        path.unlink(missing_ok=True)


def _record_of(engine: Path) -> Path:
    return engine.with_name(f"{engine.name}.golden.json")


def _manifest_beside(engine: Path) -> Path:
    return engine.parent.parent / MANIFEST  # BUNDLE/built/small.plan and BUNDLE/manifest.json


def _gpu_here() -> str:
    """The GPU's architecture, such as SM87, which an engine is built for; empty where there is none."""
    return cuda.device_here()[1]


def _unchecked(engine: Path, record: EngineRecord) -> str:
    """Why nothing says that the engine passed; `record.sha256` is known to be the file's."""
    remedy = "run `compressor build` on the bundle, which checks it"
    version = tensorrt.version_here(record.library)
    if version not in ("", record.library_version):
        library = f"{record.library} {record.library_version}"
        return f"it was built by {library}, {version} is installed; run `compressor build` on the bundle again"
    try:
        check = _read_check(_record_of(engine))
    except FileNotFoundError:
        return f"it was not checked on the golden outputs; {remedy}"
    except (OSError, ValueError, RecursionError) as error:
        return f"the record of its check can't be read ({error}); {remedy}"

    here = _gpu_here()
    if here and check.gpu not in ("", here):
        return f"it was checked on a GPU of {check.gpu}, this one is {here}; {remedy}"
    expected = replace(check, schema=SCHEMA, engine=record.sha256, manifest=sha256_of(_manifest_beside(engine)))
    if check == expected:
        return ""
    return f"it was checked in another bundle or form; {remedy}"


@dataclass(frozen=True, slots=True)
class _GoldenCheck:
    """What `write_check` says: hashes of engine and manifest, and the GPU's architecture, empty where it is unsaid."""

    schema: object
    engine: str
    manifest: str
    gpu: str


def _read_check(path: Path) -> _GoldenCheck:
    content = fields.read_object(path, _MOST_RECORD_BYTES)
    return _GoldenCheck(
        schema=fields.field(content, "schema"),
        engine=fields.sha256(content, "engine_sha256"),
        manifest=fields.sha256(content, "manifest_sha256"),
        gpu=fields.text({"gpu": "", **content}, "gpu"),  # records did not always say
    )
