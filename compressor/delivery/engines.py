"""The exported files in, engines for the recipe's targets out, one for each target and precision.

What can't be built here goes into the bundle as a build recipe and into the report with the reason.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..device import cuda
from ..device.builder import Profiles, sidecar_of
from ..device.runtimes import version_of
from ..errors import EngineError, MissingPackageError
from ..export.engines import build_engine, build_recipe, image_profile, record_fields, supported_targets
from ..export.targets import resolve_target
from ..files import file_sha256, note, read_json, write_json
from ..run.work import Work
from .artifacts import Artifact, Findings


def build_engines(work: Work, findings: Findings) -> None:
    """Engines under `engines/`, named target.precision; each a dictionary of its record's fields.

    A target that can't be built here raises nothing: its engine has an empty `path` and says why in `status`.
    """
    folder, recipe = work.stages.folder, work.recipe
    largest_batch = max((*recipe.latency_batches, 1))
    profiles = image_profile(work.example.shape[1:], batches=(1, 1, largest_batch))
    sources = engine_sources(findings)

    def write() -> None:
        jobs = [(source, target) for source in sources for target in recipe.targets]
        engines = [_built(work, findings, source, target, profiles) for source, target in jobs]
        recipes = [
            build_recipe(target, model=source.name, profiles=profiles, precision=source.precision)
            for source, target in jobs
        ]
        write_json(folder / "engines.json", {"schema": "engines/1", "engines": engines, "build": recipes})

    def read() -> dict[str, Any]:
        record = read_json(folder / "engines.json", "engines/1")
        for engine in record["engines"]:
            (folder / engine["path"]).stat()  # of an engine that was not built this is the folder itself
        return record

    hashes = {artifact.name: file_sha256(findings.path(artifact)) for artifact in sources}
    record = work.stages.do("engines", [hashes, _builders(recipe.targets), profiles], write, read)
    findings.engines, findings.build = record["engines"], record["build"]
    work.not_checked += _not_run(findings.engines)


def _builders(targets: Sequence[str]) -> dict[str, Any]:
    """Of each target what builds it here, or why nothing does: with a new library or GPU, engines are tried again."""
    if not targets:
        return {}
    refusals = supported_targets()
    gpu = [] if cuda.unavailable() else list(cuda.device())
    builders: dict[str, Any] = {}
    for name in targets:
        target = resolve_target(name)
        versions = {library: version_of(library) for library in target.libraries}
        builders[name] = [refusals[target.name], versions, gpu]
    return builders


def _not_run(engines: list[dict[str, Any]]) -> list[str]:
    """One line for all engines with the same status."""
    by_status: dict[str, list[dict[str, Any]]] = {}
    for engine in engines:
        if not engine["status"].startswith("run"):
            by_status.setdefault(engine["status"], []).append(engine)

    lines = []
    for status, alike in by_status.items():
        targets = ", ".join(dict.fromkeys(engine["target"] for engine in alike))
        precisions = ", ".join(dict.fromkeys(engine["precision"] for engine in alike))
        lines.append(f"TensorRT engines for {targets} in {precisions}: {status}")
    return lines


def engine_sources(findings: Findings) -> tuple[Artifact, ...]:
    """The shipped file of each precision in the form that TensorRT's parser takes."""
    forms: dict[str, Artifact] = {}
    for artifact in findings.artifacts:
        if artifact.variant == "shipped":
            forms[artifact.precision] = artifact  # the form for TensorRT comes last and takes the other's place
    return tuple(forms.values())


def _built(work: Work, findings: Findings, source: Artifact, target: str, profiles: Profiles) -> dict[str, Any]:
    path = work.stages.folder / "engines" / f"{target.lower()}.{source.precision}.engine"
    path.parent.mkdir(parents=True, exist_ok=True)
    asked = {"target": target, "precision": source.precision, "model": source.name}
    try:
        record = build_engine(
            findings.path(source),
            path,
            target=target,
            profiles=profiles,
            precision=source.precision,
            progress=lambda phase, share: work.stages.notify(f"engines: {source.precision}, {phase}", share),
        )
    except (EngineError, MissingPackageError) as error:
        return {**asked, "path": "", "status": f"not built: {error}"}
    for file in (path, sidecar_of(path)):  # the builder's worker wrote them
        note(file)
    return {**record_fields(record), **asked, "path": str(path.relative_to(work.stages.folder))}
