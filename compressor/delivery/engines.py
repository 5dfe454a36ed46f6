"""The exported files in, engines for the recipe's targets out, one for each target and precision.

What can't be built here goes into the bundle as a build recipe and into the report with the reason.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..device import cuda
from ..device.builder import sidecar_of
from ..device.runtimes import version_of
from ..errors import EngineError, MissingPackageError
from ..export.engines import build_engine, build_recipe, image_profile, record_fields, supported_targets
from ..export.targets import resolve_target
from ..files import file_sha256, note, read_json, write_json
from ..work import Work
from .artifacts import Artifact, Findings


def build_engines(work: Work, found: Findings) -> None:
    """Engines under `engines/`, named target.precision; each a dictionary of its record's fields."""
    folder, recipe = work.stages.folder, work.recipe
    profiles = image_profile(work.example.shape[1:], batches=(1, 1, max((*recipe.latency_batches, 1))))
    sources = engine_sources(found)

    def write() -> None:
        built = [_built(work, found, source, target, profiles) for source in sources for target in recipe.targets]
        recipes = [
            build_recipe(target, model=source.name, profiles=profiles, precision=source.precision)
            for source in sources
            for target in recipe.targets
        ]
        write_json(folder / "engines.json", {"schema": "engines/1", "engines": built, "build": recipes})

    def read() -> dict[str, Any]:
        held = read_json(folder / "engines.json", "engines/1")
        for engine in held["engines"]:
            (folder / engine["path"]).stat()
        return held

    hashes = {a.name: file_sha256(found.path(a)) for a in sources}
    held = work.stages.do("engines", [hashes, _builders(recipe.targets), profiles], write, read)
    found.engines, found.build = held["engines"], held["build"]
    work.not_checked += _not_run(found.engines)


def _builders(targets: Sequence[str]) -> dict[str, Any]:
    """Of each target what builds it here, or why nothing does: with a new library or GPU, engines are tried again."""
    if not targets:
        return {}
    refusals = supported_targets()
    gpu = [] if cuda.unavailable() else list(cuda.device())
    found: dict[str, Any] = {}
    for name in targets:
        target = resolve_target(name)
        found[name] = [refusals[target.name], {library: version_of(library) for library in target.libraries}, gpu]
    return found


def _not_run(engines: list[dict[str, Any]]) -> list[str]:
    """One line for all engines with the same status."""
    by_status: dict[str, list[dict[str, Any]]] = {}
    for engine in engines:
        if not engine["status"].startswith("run"):
            by_status.setdefault(engine["status"], []).append(engine)
    lines = []
    for status, some in by_status.items():
        targets, precisions = (", ".join(dict.fromkeys(e[key] for e in some)) for key in ("target", "precision"))
        lines.append(f"TensorRT engines for {targets} in {precisions}: {status}")
    return lines


def engine_sources(found: Findings) -> tuple[Artifact, ...]:
    """The shipped file of each precision in the form that TensorRT's parser takes."""
    forms = {a.precision: a for a in found.artifacts if a.variant == "shipped"}  # the form for TensorRT comes last
    return tuple(forms.values())


def _built(work: Work, found: Findings, source: Artifact, target: str, profiles: Any) -> dict[str, Any]:
    path = work.stages.folder / "engines" / f"{target.lower()}.{source.precision}.engine"
    path.parent.mkdir(parents=True, exist_ok=True)
    about = {"target": target, "precision": source.precision, "model": source.name}
    try:
        record = build_engine(
            found.path(source),
            path,
            target=target,
            profiles=profiles,
            precision=source.precision,
            progress=lambda phase, share: work.stages.notify(f"engines: {source.precision}, {phase}", share),
        )
    except (EngineError, MissingPackageError) as error:
        return {**about, "path": "", "status": f"not built: {error}"}
    for file in (path, sidecar_of(path)):  # the builder's worker wrote them
        note(file)
    return {**record_fields(record), **about, "path": str(path.relative_to(work.stages.folder))}
