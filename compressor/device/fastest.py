"""A bundle in, which of its files runs here and on which runtime out: the fastest pair, as it was measured here.

Each pair is timed in a process of its own on the first golden input; the fastest whose answers are the golden ones is
taken. What was measured is kept outside the bundle, for this bundle, these libraries and this machine.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import CompressorError, InputError
from . import fields
from .builder import sha256_of
from .built import checked_engines
from .bundle import usable_runtimes, verify_files
from .destinations import write_json
from .environment import affinity
from .feeds import cut
from .folders import reason_of
from .golden import read_golden
from .manifest import BUILT, MANIFEST, Manifest, ModelFile
from .runtimes import FILES, require_runtime, row_of, runtime_names, unavailable_error
from .timing import Schedule
from .worker import time_files

SCHEMA = "compressor.choice/1"
CACHE = "XDG_CACHE_HOME"
"""The environment's name for the folder of caches; without it, `.cache` of the home folder."""
_MOST_BYTES = 1 << 20
_MOST_MS = 1e9
_NOISE = 0.05  # a lead below it is none: the earlier of the manifest's files and of the table's runtimes stays


@dataclass(frozen=True, slots=True)
class Pair:
    """A file of the bundle and a runtime that takes it here."""

    model: ModelFile
    runtime: str

    def __str__(self) -> str:
        return f"{self.model.path} on {self.runtime}"


@dataclass(frozen=True, slots=True)
class Ranking:
    """Pairs that can run here, the best first, and in words why they stand so; `is_new` where they were timed now."""

    pairs: tuple[Pair, ...]
    reason: str
    is_new: bool = False


def rank(folder: Path, manifest: Manifest, *, runtime: str = "", model: str = "", threads: int = 0) -> Ranking:
    """The pairs by what was measured, now or before; the only one without measuring.

    `runtime` and `model` (a file's path, or a precision) leave out all others. Raises InputError for names that are
    none, MissingPackageError or EngineError where nothing runs here.
    """
    require_runtime(runtime)
    pairs = _pairs(folder, manifest, runtime, model)
    if len(pairs) == 1:
        return Ranking(pairs, "the only one that runs here")

    place = _kept_at(folder, pairs, threads)
    times_ms = _read(place, pairs)
    origin, is_new = "as measured here before", not times_ms
    if is_new:
        times_ms, failures = _measured(folder, manifest, pairs, threads)
        origin = "; ".join(["measured now", *failures, *_keep(place, times_ms)])
    ranked = _ranked(pairs, times_ms)
    listed = ", ".join(f"{pair} {times_ms[str(pair)]:.3g} ms" for pair in ranked)
    return Ranking(ranked, f"{listed} ({origin})", is_new)


def _pairs(folder: Path, manifest: Manifest, runtime: str, model: str) -> tuple[Pair, ...]:
    """Engines built here, then the manifest's files in its order; what a builder is to read only without others."""
    reasons: list[str] = []
    pairs: list[Pair] = []
    for entry in _models(folder, manifest, model):
        names, reason = usable_runtimes(entry, runtime)
        pairs += [Pair(entry, name) for name in names]
        if reason:
            reasons.append(f"{entry.path}: {reason}")
    if not pairs:
        raise unavailable_error(f"no model of {folder} runs here: {'; '.join(reasons)}", reasons)
    direct = [pair for pair in pairs if not pair.model.made_for]
    return tuple(direct or pairs)


def _models(folder: Path, manifest: Manifest, name: str) -> list[ModelFile]:
    """Those of that path or precision, all without a name; InputError where there is none."""
    models = [engine.model for engine in checked_engines(folder, manifest)]
    models += manifest.models
    models = [model for model in models if name in ("", model.path, model.precision)]
    if not models:
        listed = ", ".join(f"{model.path} ({model.precision})" for model in manifest.models)
        raise InputError(f"the bundle has no model {fields.shown(name)}; it has {fields.printable(listed)}")
    return models


def _measured(
    folder: Path, manifest: Manifest, pairs: Sequence[Pair], threads: int
) -> tuple[dict[str, float], list[str]]:
    """Medians in ms by pair, of those that could be timed; and what the others failed of.

    No file is given to a runtime before the hashes of all were compared.
    """
    verify_files(folder, manifest)
    first = cut(read_golden(folder, manifest).inputs, 0, 1)
    schedule = Schedule(
        rounds=1, seconds=0.2, runs=9, limit_s=3, warmup_s=0.1, warmup_limit_s=1, threads=threads
    )  # some hundred milliseconds a pair
    times_ms: dict[str, float] = {}
    failures: list[str] = []
    for pair in pairs:
        try:
            timings = time_files({"": folder / pair.model.path}, first, schedule=schedule, runtime=pair.runtime)
        except CompressorError as error:
            failures.append(f"{pair} failed: {error}")
        else:
            times_ms[str(pair)] = timings[""].p50_ms
    if not times_ms:
        raise unavailable_error(f"no model of {folder} runs here: {'; '.join(failures)}", failures)
    return times_ms, failures


def _ranked(pairs: Sequence[Pair], times_ms: Mapping[str, float]) -> tuple[Pair, ...]:
    """By time; of those within the noise of the fastest, the earlier first."""
    timed = [pair for pair in pairs if str(pair) in times_ms]
    fastest_ms = min(times_ms.values())
    return tuple(sorted(timed, key=lambda pair: max(times_ms[str(pair)], fastest_ms * (1 + _NOISE))))


def _kept_at(folder: Path, pairs: Sequence[Pair], threads: int) -> Path:
    """A file whose name says what its content depends on."""
    ingredients = [
        sha256_of(folder / MANIFEST),
        [(str(pair), _sha256_of(folder, pair.model)) for pair in pairs],
        threads,
        affinity(),
        (platform.node(), platform.machine(), os.cpu_count()),
        {name: _installed(name) for name in runtime_names(*FILES)},
    ]
    key = hashlib.sha256(json.dumps([SCHEMA, *ingredients], sort_keys=True).encode()).hexdigest()
    caches = Path(os.environ.get(CACHE, ""))
    if not caches.is_absolute():
        caches = Path.home() / ".cache"
    return caches / "compressor" / "choices" / f"{key[:32]}.json"


def _sha256_of(folder: Path, model: ModelFile) -> str:
    """Empty for a file of the manifest, whose own hash stands for it."""
    if not model.path.startswith(f"{BUILT}/"):
        return ""
    return sha256_of(folder / model.path)


def _installed(runtime: str) -> list[str]:
    """Names and versions of what is installed as a runtime's library; importing it to ask takes too long."""
    library = row_of(runtime).library
    spec = importlib.util.find_spec(library)
    if spec is None or not spec.origin:
        return []
    packages = Path(spec.origin).parent.parent
    return sorted(path.name for path in packages.glob(f"{library}*.dist-info"))


def _read(place: Path, pairs: Sequence[Pair]) -> dict[str, float]:
    """What was measured of these pairs; empty where nothing was, or it can't be read."""
    try:
        content = fields.read_object(place, _MOST_BYTES)
        if fields.field(content, "schema") != SCHEMA:
            return {}
        stored = fields.inner(content, "times_ms")
        times_ms = {name: fields.number(stored, name, least=0, most=_MOST_MS) for name in stored}
    except (OSError, ValueError):
        return {}
    if not times_ms.keys() <= set(map(str, pairs)):
        return {}
    return times_ms


def _keep(place: Path, times_ms: Mapping[str, float]) -> list[str]:
    """Writes what was measured; where it can't, that is said, since the next run measures again."""
    content = {"schema": SCHEMA, "times_ms": dict(times_ms)}
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        write_json(place, content)
    except (OSError, CompressorError) as error:
        return [f"not kept: {reason_of(error)}"]
    return []
