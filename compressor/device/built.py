"""Engines built on this device, which no manifest vouches for: which of them are what they say, and which passed.

An engine is preferred only with a record beside it that it passed the golden outputs, bound to the engine's and the
manifest's hash. The record saves no check but the first: who can write an engine here can write a record.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from ..errors import EngineError, GateError
from . import fields
from .builder import EngineRecord, read_sidecar, sha256_of, write_atomically
from .golden import Golden, distance
from .manifest import BUILT, MANIFEST, Manifest, ModelFile
from .parity import Parity, failures
from .runtimes import Session

SCHEMA = "compressor.golden-check/1"
_MOST_RECORD_BYTES = 1 << 16
_ENGINE_FILES = re.compile(rf"{BUILT}/[A-Za-z0-9_-][A-Za-z0-9._-]*\.plan(\.json|\.golden\.json)?")
_UNFINISHED = re.compile(rf"{BUILT}/(\.build-[^/]+(/.*)?|\.[^/]+\.\d+)")  # by a build that runs or was killed


@dataclass(frozen=True, slots=True)
class BuiltEngine:
    """An engine of one of the bundle's models. `unchecked` says why it is not preferred, and is empty when it is."""

    model: ModelFile
    at_once: int
    unchecked: str


def is_builders_file(name: str) -> bool:
    """Whether a path in the bundle is called as what `compressor build` leaves there."""
    return bool(_ENGINE_FILES.fullmatch(name) or _UNFINISHED.fullmatch(name))


def engine_files(folder: Path) -> tuple[Path, ...]:
    return tuple(path for path in sorted((folder / BUILT).glob("*.plan")) if not path.is_symlink())


def built_engines(folder: Path, manifest: Manifest) -> tuple[BuiltEngine, ...]:
    """Engines made here from this bundle's models; raises EngineError for one that is not."""
    return tuple(read_built(path, manifest) for path in engine_files(folder))


def read_built(path: Path, manifest: Manifest) -> BuiltEngine:
    record = read_sidecar(path)
    sources = (m for m in manifest.models if manifest.files[m.path]["sha256"] == record.onnx_sha256)
    source = next(sources, None)
    if source is None:
        raise EngineError(f"{path} was built from no model of this bundle; remove it and run `compressor build` again")
    model = replace(source, path=f"{BUILT}/{path.name}", library=record.library, target="this-gpu", made_for="")
    return BuiltEngine(model, most_images(record), _unchecked(path, record))


def most_images(record: EngineRecord) -> int:
    """The largest batch the engine was built for."""
    largest = [shapes[2][0] for shapes in record.profiles.values()]
    return min(largest, default=1)


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
    }
    write_atomically(_record_of(engine), (json.dumps(content, indent=1) + "\n").encode())


def remove_engine(engine: Path) -> None:
    """The engine with all that is said of it."""
    for path in _parts(engine):
        path.unlink(missing_ok=True)


def _parts(engine: Path) -> Iterator[Path]:
    yield from (engine, engine.with_name(f"{engine.name}.json"), _record_of(engine))


def _record_of(engine: Path) -> Path:
    return engine.with_name(f"{engine.name}.golden.json")


def _manifest_beside(engine: Path) -> Path:
    return engine.parent.parent / MANIFEST


def _unchecked(engine: Path, record: EngineRecord) -> str:
    """Why nothing says that the engine passed; `record.sha256` is known to be the file's."""
    remedy = "run `compressor build` on the bundle, which checks it"
    try:
        content = fields.read_object(_record_of(engine), _MOST_RECORD_BYTES)
        known = {key: fields.sha256(content, key) for key in ("engine_sha256", "manifest_sha256")}
        right = fields.field(content, "schema") == SCHEMA
    except FileNotFoundError:
        return f"it was not checked on the golden outputs; {remedy}"
    except (OSError, ValueError, RecursionError) as error:
        return f"the record of its check can't be read ({error}); {remedy}"
    hashes = {"engine_sha256": record.sha256, "manifest_sha256": sha256_of(_manifest_beside(engine))}
    return "" if right and known == hashes else f"it was checked in another bundle or form; {remedy}"
