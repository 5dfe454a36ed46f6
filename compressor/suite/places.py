"""A finished run's folder or a bundle in, what can be measured of it out: files, costs, images, networks.

A place says for each thing it lacks why; nothing is measured here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..data import load_images
from ..delivery.artifacts import Artifact
from ..device.bundle import GOLDEN, MANIFEST, Manifest, read_bundle, verify_files
from ..device.runtimes import kind_of
from ..errors import CompressorError, FolderError
from ..files import read_json
from ..images import Batches, batches, overridden
from ..models import load_model
from ..recipe import read_recipe
from ..saved import read_network
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


def open_place(folder: Path, *, label: str = "", evaluation_data: str = "") -> Place:
    """Raises FolderError when `folder` is neither a finished run's nor a bundle, GateError for a damaged bundle."""
    label = label or folder.resolve().name
    if (folder / MANIFEST).is_file():
        return _bundle(folder, label, evaluation_data)
    if (folder / "summary.json").is_file() and (folder / "recipe.toml").is_file():
        return _run(folder, label)
    raise FolderError(
        f"{folder} is neither the folder of a finished run nor a bundle; give one of them, or no folder and a recipe"
    )


def _run(folder: Path, label: str) -> Place:
    summary = read_json(folder / "summary.json", "summary/2")
    recipe = read_recipe(folder / "recipe.toml")
    dense = File(Artifact("dense.onnx", "dense"), folder / "dense.onnx", summary["macs_dense"], summary["params_dense"])
    shipped = [
        File(
            Artifact(name, "shipped", about["precision"], "tensorrt" if "tensorrt" in name else ""),
            folder / name,
            summary["macs_shipped"],
            summary["params_shipped"],
        )
        for name, about in summary["precisions"].items()
    ]
    lacks: list[str] = []
    evaluation: Batches | None = None
    try:
        splits, _ = read_images(recipe, load_model(recipe.model, recipe.weights or None, seed=recipe.seed), None)
        evaluation = batches(splits.evaluation, BATCH)
    except CompressorError as error:
        lacks.append(f"{label}: accuracy was not measured, its images are not at hand: {error}")
    with np.load(folder / "bundle" / GOLDEN, allow_pickle=False) as golden:
        images = golden["inputs"] if evaluation is None else _gathered(evaluation)
    networks = folder if read_network(folder).builder else None
    if networks is None:
        lacks.append(f"{label}: PyTorch was not timed, the run began with a model object")
    files = tuple(f for f in (dense, *shipped) if not f.artifact.made_for)
    seen = "" if evaluation is None else evaluation.images.content_hash()
    return Place(label, folder, recipe.budget, files, images, evaluation, tuple(lacks), networks, seen)


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
    with np.load(folder / GOLDEN, allow_pickle=False) as golden:
        images = golden["inputs"] if evaluation is None else _gathered(evaluation)
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
