"""A finished run's folder or a bundle in, what can be measured of it out: files, costs, images, networks.

A place says for each thing it lacks why; nothing is measured here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..data import load_images
from ..delivery.artifacts import DENSE, Artifact
from ..device.bundle import GOLDEN, MANIFEST, Manifest, read_bundle, verify_files
from ..device.runtimes import kind_of
from ..errors import CompressorError, FolderError, ModelError
from ..files import read_json
from ..images import Batches, batches, overridden
from ..models import load_model
from ..recipe import read_recipe
from ..saved import read_network
from ..stages import changed_files, recorded_files
from ..trust import require_trusted
from ..work import read_images

BATCH = 32
POOL_IMAGES = 512


@dataclass(frozen=True, slots=True)
class File:
    """One model file of a place. Costs are per image; -1 where the place does not say."""

    artifact: Artifact
    path: Path
    macs: int = -1
    parameters: int = -1


@dataclass(frozen=True, slots=True)
class Place:
    """`label` names the place among others; `images` [N, C, H, W] are real ones, as the network takes them."""

    label: str
    folder: Path
    budget: str
    files: tuple[File, ...]
    images: NDArray[np.float32]
    evaluation: Batches | None
    lacks: tuple[str, ...]
    networks: Path | None = None
    evaluation_hash: str = ""


def open_place(folder: Path, *, label: str = "", evaluation_data: str = "", trust: bool = False) -> Place:
    """Raises FolderError when `folder` is neither a finished run's nor a bundle, or was changed since; GateError for a
    damaged bundle; ModelError for a run whose model is code that nothing speaks for, unless with `trust`.
    """
    label = label or folder.resolve().name
    if (folder / MANIFEST).is_file():
        return _bundle(folder, label, evaluation_data)
    if (folder / "summary.json").is_file() and (folder / "recipe.toml").is_file():
        return _run(folder, label, trust)
    raise FolderError(
        f"{folder} is neither the folder of a finished run nor a bundle; give one of them, or no folder and a recipe"
    )


def _run(folder: Path, label: str, trust: bool) -> Place:
    recipe, network = read_recipe(folder / "recipe.toml"), read_network(folder)
    if network.builder:
        sha256 = network.builder_sha256 if network.builder == recipe.model else ""
        require_trusted(recipe.model, sha256, folder, trust=trust)
        require_trusted(network.builder, network.builder_sha256, folder, trust=trust)
    files = _files_of(folder)
    _require_unchanged(folder, [f.path.name for f in files])
    lacks: list[str] = []
    evaluation: Batches | None = None
    try:
        if not network.builder:
            raise ModelError("the run began with a model object")
        splits, _ = read_images(recipe, load_model(recipe.model, recipe.weights or None, seed=recipe.seed), None)
        evaluation = batches(splits.evaluation, BATCH)
    except CompressorError as error:
        lacks.append(f"{label}: accuracy was not measured, its images are not at hand: {error}")
    images = _golden(folder / "bundle") if evaluation is None else _gathered(evaluation)
    networks = folder if network.builder else None
    if networks is None:
        lacks.append(f"{label}: PyTorch was not timed, the run began with a model object")
    seen = "" if evaluation is None else evaluation.images.content_hash()
    return Place(label, folder, recipe.budget, files, images, evaluation, tuple(lacks), networks, seen)


def _files_of(folder: Path) -> tuple[File, ...]:
    """The run's files that are themselves run, as its summary lists them."""
    path = folder / "summary.json"
    summary = read_json(path, "summary/2")
    try:
        costs = {v: (int(summary[f"macs_{v}"]), int(summary[f"params_{v}"])) for v in ("dense", "shipped")}
        precisions = {str(name): str(about["precision"]) for name, about in summary["precisions"].items()}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise FolderError(
            f"{path} does not say what the run made ({type(error).__name__}: {error}); run the command that made this "
            "folder again"
        ) from error
    outside = [name for name in precisions if Path(name).name != name]
    if outside:
        raise FolderError(f"{path} names {outside[0][:80]!r}, which is no file of its folder; run the command again")
    shipped = [Artifact(n, "shipped", p, "tensorrt" if "tensorrt" in n else "") for n, p in precisions.items()]
    artifacts = [DENSE, *(a for a in shipped if not a.made_for)]
    return tuple(File(a, folder / a.name, *costs[a.variant]) for a in artifacts)


def _require_unchanged(folder: Path, names: Sequence[str]) -> None:
    """Every file is there, and as the stage that wrote it left it."""
    hashes = recorded_files(folder)
    changed = changed_files(folder, {name: hashes.get(name, "") for name in names})
    for name, reason in changed.items():
        raise FolderError(f"{name} in {folder} {reason}; run the command that made this folder again")


def _golden(bundle: Path) -> NDArray[np.float32]:
    """The golden inputs of a bundle, float32 [N, C, H, W]."""
    try:
        with np.load(bundle / GOLDEN, allow_pickle=False) as golden:
            images = np.asarray(golden["inputs"], dtype=np.float32)
        if images.ndim != 4 or not images.size:
            raise ValueError(f"inputs of shape {list(images.shape)}")
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        raise FolderError(
            f"{bundle / GOLDEN} holds no golden inputs ({reason}); run the command that made it again"
        ) from error
    return images


def _bundle(folder: Path, label: str, evaluation_data: str) -> Place:
    manifest = read_bundle(folder)
    verify_files(folder, manifest)
    about: Mapping[str, Any] = manifest.provenance
    files = tuple(
        File(
            Artifact(m.path, "shipped", m.precision),
            folder / m.path,
            int(about.get("macs", -1)),
            int(about.get("parameters", -1)),
        )
        for m in manifest.models
        if not m.made_for and kind_of(m.path) == "onnx"
    )
    lacks = [f"{label}: a bundle holds no dense network, so nothing is compared with it"]
    evaluation: Batches | None = None
    if evaluation_data:
        evaluation = batches(_prepared(evaluation_data, manifest), BATCH)
    else:
        lacks.append(f"{label}: accuracy was not measured, a bundle holds no labelled images; give --evaluation-data")
    images = _golden(folder) if evaluation is None else _gathered(evaluation)
    budget, seen = str(about.get("budget", "")), "" if evaluation is None else evaluation.images.content_hash()
    return Place(label, folder, budget, files, images, evaluation, tuple(lacks), None, seen)


def _prepared(source: str, manifest: Manifest) -> Any:
    how = manifest.preprocessing
    given = {"size": how.size, "resize": how.resize, "interpolation": how.interpolation}
    known = overridden(None, **given, mean=how.mean, std=how.std)
    return load_images(source, classes=manifest.labels or None).prepared(known)


def _gathered(evaluation: Batches) -> NDArray[np.float32]:
    found: list[NDArray[np.float32]] = []
    for images, _ in evaluation:
        found.append(images.numpy())
        if sum(map(len, found)) >= POOL_IMAGES:
            break
    return np.concatenate(found)
