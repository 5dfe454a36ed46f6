"""A finished run's folder, a bundle or its archive in, what can be measured of it out: files, costs, inputs, networks.

A place says for each thing it lacks why; nothing is measured here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ..delivery.artifacts import DENSE, SHIPPED, Artifact
from ..device import feeds
from ..device.archive import as_folder
from ..device.bundle import MANIFEST, Manifest, ModelFile, read_bundle, require_signed, verify_files
from ..device.feeds import Arrays
from ..device.golden import read_golden
from ..device.runtimes import kind_of
from ..errors import CompressorError, FolderError, InputError, ModelError
from ..files import read_json
from ..inputs.entries import Signature
from ..inputs.images import Batches, Images, Source, batches, overridden
from ..inputs.models import load_model
from ..inputs.sources import load_images, load_source
from ..inputs.trust import require_trusted
from ..recipe import Recipe, read_recipe
from ..run.reading import read_data
from ..run.saved import Network, read_network
from ..run.stages import changed_files, recorded_files
from ..run.task_choice import CLASSES
from ..run.user_code import require_trusted_data
from ..run.work import arrays_of
from ..tensors import as_tuple
from .records import Content

STEM = "benchmark"
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
    """`label` names the place among others; `images` are real ones [N, C, H, W], or several inputs, as it takes them.

    `task` is what the network's answers mean.
    """

    label: str
    folder: Path
    budget: str
    files: tuple[File, ...]
    images: Arrays
    evaluation: Batches | None
    lacks: tuple[str, ...]
    networks: Path | None = None
    evaluation_hash: str = ""
    task: str = CLASSES


@contextmanager
def opened_place(
    place: Path, *, evaluation_data: str = "", trust: bool = False, key: Path | None = None
) -> Iterator[Place]:
    """`open_place` of a folder, or of a bundle's archive, which is unpacked for as long as the block lasts.

    With a public `key`, nothing is read before the signature over all of the bundle's files held.
    """
    with as_folder(place) as folder:
        if key is not None:
            require_signed(folder, key)
        yield open_place(folder, evaluation_data=evaluation_data, trust=trust)


def results_folder(place: Path) -> Path:
    """Where a place's results lie: in a run's folder; beside a bundle, as nothing foreign may lie in one."""
    if place.is_file():
        return place.with_suffix(f".{STEM}")
    if (place / MANIFEST).is_file():
        bundle = place.resolve()
        return bundle.with_name(f"{bundle.name}.{STEM}")
    return place / STEM


def open_place(folder: Path, *, label: str = "", evaluation_data: str = "", trust: bool = False) -> Place:
    """Raises FolderError when `folder` is neither a finished run's nor a bundle, or was changed since; GateError for a
    damaged bundle; ModelError or DataError for a run whose model is built or whose data are read by code that nothing
    speaks for, unless with `trust`.
    """
    label = label or folder.resolve().name
    if (folder / MANIFEST).is_file():
        return _bundle(folder, label, evaluation_data)
    if (folder / "summary.json").is_file() and (folder / "recipe.toml").is_file():
        return _run(folder, label, trust)
    raise FolderError(
        f"{folder} is neither the folder of a finished run nor a bundle; give one of them, a bundle's archive, or no "
        "folder and a recipe"
    )


def _run(folder: Path, label: str, trust: bool) -> Place:
    recipe, network = read_recipe(folder / "recipe.toml"), read_network(folder)
    if network.builder:
        sha256 = network.builder_sha256 if network.builder == recipe.model else ""
        require_trusted(recipe.model, sha256, folder, trust=trust)
        require_trusted(network.builder, network.builder_sha256, folder, trust=trust)
        require_trusted_data(recipe, network.code_sha256s, folder, trust=trust)
    files = _files_of(folder)
    _require_unchanged(folder, [file.path.name for file in files])

    lacks: list[str] = []
    evaluation: Batches | None = None
    try:
        evaluation = _evaluation_of(recipe, network)
    except CompressorError as error:
        lacks.append(f"{label}: accuracy was not measured, its images are not at hand: {error}")
    networks: Path | None = None
    if network.builder:
        networks = folder
    else:
        lacks.append(f"{label}: PyTorch was not timed, the run began with a model object")

    summary = read_json(folder / "summary.json", "summary/2")
    return Place(
        label=label,
        folder=folder,
        budget=recipe.budget,
        files=files,
        images=_golden_of_run(folder) if evaluation is None else _gathered(evaluation),
        evaluation=evaluation,
        lacks=tuple(lacks),
        networks=networks,
        evaluation_hash=_hash_of(evaluation),
        task=str(summary.get("task") or CLASSES),
    )


def _evaluation_of(recipe: Recipe, network: Network) -> Batches:
    """The run's own held-out images, read again. Raises a CompressorError when they, or the model, are not there."""
    if not network.builder:
        raise ModelError("the run began with a model object")
    model = load_model(recipe.model, recipe.weights or None, seed=recipe.seed)
    splits = read_data(recipe, model, None).splits
    return batches(splits.evaluation, BATCH)


def _hash_of(evaluation: Batches | None) -> str:
    return "" if evaluation is None else evaluation.images.content_hash()


def _files_of(folder: Path) -> tuple[File, ...]:
    """The run's files that are themselves run, as its summary lists them."""
    path = folder / "summary.json"
    summary = read_json(path, "summary/2")
    try:
        costs = {variant: _costs_of(summary, variant) for variant in ("dense", "shipped")}
        precisions = {str(name): str(details["precision"]) for name, details in summary["precisions"].items()}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise FolderError(
            f"{path} does not say what the run made ({type(error).__name__}: {error}); run the command that made this "
            "folder again"
        ) from error
    for name in precisions:
        if Path(name).name != name:
            raise FolderError(f"{path} names {name[:80]!r}, which is no file of its folder; run the command again")

    artifacts = _artifacts_of(precisions, ships_dense=summary.get("shipped") == "dense")
    return tuple(File(artifact, folder / artifact.name, *costs[artifact.variant]) for artifact in artifacts)


def _artifacts_of(precisions: Mapping[str, str], *, ships_dense: bool) -> list[Artifact]:
    """The dense network's file, then the shipped one's by their `precisions`; where the dense ships, one is both."""
    # TensorRT's form of Q/DQ is for an engine's parser and is not itself run
    run_precisions = {name: precision for name, precision in precisions.items() if "tensorrt" not in name}
    artifacts = [DENSE]
    if ships_dense:
        artifacts = [Artifact(SHIPPED.name, "dense")]
        run_precisions.pop(SHIPPED.name, None)
    for name, precision in run_precisions.items():
        artifacts.append(Artifact(name, "shipped", precision))
    return artifacts


def _costs_of(summary: Content, variant: str) -> tuple[int, int]:
    """MACs and parameters for one image."""
    return int(summary[f"macs_{variant}"]), int(summary[f"params_{variant}"])


def _require_unchanged(folder: Path, names: Sequence[str]) -> None:
    """Every file is there, and as the stage that wrote it left it."""
    hashes = recorded_files(folder)
    changed = changed_files(folder, {name: hashes.get(name, "") for name in names})
    for name, reason in changed.items():
        raise FolderError(f"{name} in {folder} {reason}; run the command that made this folder again")


def _golden_of_run(folder: Path) -> Arrays:
    """The golden inputs of the run's bundle."""
    bundle = folder / "bundle"
    return read_golden(bundle, read_bundle(bundle)).inputs


def _bundle(folder: Path, label: str, evaluation_data: str) -> Place:
    manifest = read_bundle(folder)
    verify_files(folder, manifest)
    # an engine runs on the GPU that it was built for; what every machine can open is compared
    portable = [model for model in manifest.models if not model.made_for and kind_of(model.path) == "onnx"]
    files = tuple(_bundle_file(folder, model, manifest.provenance) for model in portable)

    lacks = [f"{label}: a bundle holds no dense network, so nothing is compared with it"]
    evaluation: Batches | None = None
    if evaluation_data:
        evaluation = batches(_prepared(evaluation_data, manifest), BATCH)
    else:
        lacks.append(f"{label}: accuracy was not measured, a bundle holds no labelled images; give --evaluation-data")

    return Place(
        label=label,
        folder=folder,
        budget=str(manifest.provenance.get("budget", "")),
        files=files,
        images=read_golden(folder, manifest).inputs if evaluation is None else _gathered(evaluation),
        evaluation=evaluation,
        lacks=tuple(lacks),
        evaluation_hash=_hash_of(evaluation),
        task=manifest.task or CLASSES,
    )


def _bundle_file(folder: Path, model: ModelFile, provenance: Content) -> File:
    return File(
        artifact=Artifact(model.path, "shipped", model.precision),
        path=folder / model.path,
        macs=int(provenance.get("macs", -1)),
        parameters=int(provenance.get("parameters", -1)),
    )


def _prepared(source: str, manifest: Manifest) -> Source:
    """The samples of a source as the bundle's network takes them, its labels as their classes."""
    shipped = manifest.preprocessing
    if shipped is None:
        return _tensors(source, manifest)
    preprocessing = overridden(
        None,
        size=shipped.size,
        resize=shipped.resize,
        interpolation=shipped.interpolation,
        mean=shipped.mean,
        std=shipped.std,
    )
    return load_images(source, classes=manifest.labels or None).prepared(preprocessing)


def _tensors(source: str, manifest: Manifest) -> Source:
    """Samples that are tensors as the network takes them, of inputs called as the manifest has them."""
    names = tuple(leaf.name for leaf in manifest.inputs)
    samples = load_source(source, Signature(len(names), names, False))
    if isinstance(samples, Images):
        raise InputError(f"the bundle of {manifest.name} takes no images, so accuracy can't be measured on {source}")
    shapes = [list(tensor.shape[1:]) for tensor in as_tuple(samples.inputs([0]))]
    if shapes != [list(leaf.shape) for leaf in manifest.inputs]:
        raise InputError(f"{source} holds {shapes}, the bundle of {manifest.name} takes {_listed(manifest)}")
    return samples


def _listed(manifest: Manifest) -> str:
    return ", ".join(f"{leaf.name} {list(leaf.shape)}" for leaf in manifest.inputs)


def _gathered(evaluation: Batches) -> Arrays:
    """The first inputs [N, ...]; whole batches until there are at least `POOL_IMAGES` samples, or all."""
    gathered: list[Arrays] = []
    for inputs, _ in evaluation:
        gathered.append(arrays_of(inputs))
        if sum(map(feeds.count, gathered)) >= POOL_IMAGES:
            break
    return feeds.joined(gathered)
