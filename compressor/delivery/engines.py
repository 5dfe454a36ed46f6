"""The exported files in, engines for the recipe's targets out, one for each target and precision.

What can't be built here goes into the bundle as a build recipe and into the report with the reason.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import product
from pathlib import Path

from ..device import cuda
from ..device.builder import Profiles, sidecar_of
from ..device.runtimes import version_of
from ..errors import EngineError, MissingPackageError
from ..export.engines import build_engine, build_recipe, image_profile, supported_targets
from ..export.targets import resolve_target
from ..files import note, read_json, write_json
from ..graph.interface import input_names
from ..run.checks import Checks
from ..run.stages import Keeper, Progress
from ..run.work import Work
from .artifacts import Artifact
from .results import Engine, Engines, Files

SCHEMA = "engines/2"


def build_engines(work: Work, files: Files) -> Engines:
    """Engines under `engines/`, named target.precision.

    A target that can't be built here raises nothing: its engine has an empty `path` and says why in `status`.
    """
    targets = tuple(work.recipe.targets)
    largest_batch = max(work.recipe.latency_batches, default=1)
    profiles: dict[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]] = {}
    for name, spec in zip(input_names(work.dense), work.inputs, strict=True):
        profiles |= image_profile(spec.shape, batches=(1, 1, largest_batch), name=name)
    sources = engine_sources(files)
    asked = work.stages.make(
        "engines",
        _built,
        Keeper(_write_engines, _read_engines),
        place=_builders(targets),
        sources=sources,
        targets=targets,
        profiles=profiles,
        folder=work.stages.output,
    )
    recipes = []
    for source, target in product(sources, targets):
        recipes.append(build_recipe(target, model=source.name, profiles=profiles, precision=source.precision))
    return Engines(asked, tuple(recipes), Checks(not_checked=_not_run(asked)))


def engine_sources(files: Files) -> dict[Artifact, Path]:
    """The shipped file of each precision in the form that TensorRT's parser takes."""
    forms = {artifact.precision: artifact for artifact in files.shipped}  # that form comes last and takes a place
    return {artifact: files.paths[artifact] for artifact in forms.values()}


def _builders(targets: Sequence[str]) -> dict[str, object]:
    """Of each target what builds it here, or why nothing does: with a new library or GPU, engines are tried again."""
    if not targets:
        return {}
    refusals = supported_targets()
    gpu = [] if cuda.unavailable() else list(cuda.device())
    builders: dict[str, object] = {}
    for name in targets:
        target = resolve_target(name)
        versions = {library: version_of(library) for library in target.libraries}
        builders[name] = [refusals[target.name], versions, gpu]
    return builders


def _built(
    sources: Mapping[Artifact, Path], targets: Sequence[str], profiles: Profiles, folder: Path, progress: Progress
) -> tuple[Engine, ...]:
    engines = []
    for (source, model), target in product(sources.items(), targets):
        engines.append(_built_for(target, source, model, profiles, folder, progress))
    return tuple(engines)


def _built_for(
    target: str, source: Artifact, model: Path, profiles: Profiles, folder: Path, progress: Progress
) -> Engine:
    path = folder / "engines" / f"{target.lower()}.{source.precision}.engine"
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        record = build_engine(
            model,
            path,
            target=target,
            profiles=profiles,
            precision=source.precision,
            progress=lambda phase, share: progress(share, f"{source.precision}, {phase}"),
        )
    except (EngineError, MissingPackageError) as error:
        return Engine(target, source.precision, source.name, f"not built: {error}")
    for file in (path, sidecar_of(path)):  # the builder's worker wrote them
        note(file)
    return Engine(
        target=target,
        precision=source.precision,
        model=source.name,
        status=record.status,
        path=str(path.relative_to(folder)),
        library=record.library,
        library_version=record.library_version,
        size_bytes=record.size_bytes,
        build_s=record.build_s,
        kernels=record.lowering.kernels if record.lowering.available else None,
    )


def _write_engines(folder: Path, engines: Sequence[Engine]) -> None:
    rows = [asdict(engine) for engine in engines]
    write_json(folder / "engines.json", {"schema": SCHEMA, "engines": rows})


def _read_engines(folder: Path) -> tuple[Engine, ...]:
    return tuple(Engine(**row) for row in read_json(folder / "engines.json", SCHEMA)["engines"])


def _not_run(engines: Sequence[Engine]) -> tuple[str, ...]:
    """One line for all engines with the same status."""
    by_status: dict[str, list[Engine]] = {}
    for engine in engines:
        if not engine.status.startswith("run"):
            by_status.setdefault(engine.status, []).append(engine)

    lines = []
    for status, alike in by_status.items():
        targets = ", ".join(dict.fromkeys(engine.target for engine in alike))
        precisions = ", ".join(dict.fromkeys(engine.precision for engine in alike))
        lines.append(f"TensorRT engines for {targets} in {precisions}: {status}")
    return tuple(lines)
