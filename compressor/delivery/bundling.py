"""What was exported, built and checked in, the bundle that ships out: files, golden outputs, manifest."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, fx

from .. import __version__
from ..device import feeds
from ..device.bundle import Leaf, Manifest, ModelFile, declared, write_bundle
from ..device.feeds import Arrays
from ..device.golden import Golden, distance
from ..device.images import Preprocessing
from ..device.manifest import Decode, FileListing
from ..device.metrics import Metric
from ..device.parity import Limits, limits_around, worst_of
from ..device.runtimes import REFERENCE, open_model
from ..graph.cost import measure_cost
from ..graph.interface import answers, input_names, output_names
from ..inputs.decoding import NamedDecode
from ..recipe import to_toml
from ..records import Figure
from ..report.bundled import describe_bundle
from ..run.work import Work
from ..tensors import from_arrays
from .artifacts import Artifact
from .bom import BOM, bill_of_materials
from .results import Delivery, Engine, Outcome

GOLDEN_IMAGES = 8
GOLDEN_BYTES = 1 << 28  # half of what a reader takes
LRP_PATENTS = "Layer-wise relevance propagation may be covered by patents where you ship."


def bundle(work: Work, outcome: Outcome, delivery: Delivery) -> None:
    """The shipped network's files and engines, each bound to about the distance it has here from the golden outputs.

    Writes `bundle/` in the run's folder. Parity must have been measured for every shipped file.
    """
    folder, shipped = work.stages.folder, delivery.files.shipped
    images, outputs = _golden(work, outcome.network)
    golden = Golden(images, outputs, tuple(output_names(outcome.network)))
    limits = {artifact.name: file_limits(artifact, delivery, golden) for artifact in shipped}
    models = [
        ModelFile(artifact.name, artifact.precision, limits=limits[artifact.name], made_for=artifact.made_for)
        for artifact in shipped
    ]
    files = {artifact.name: delivery.files.paths[artifact] for artifact in shipped}
    files["plan.json"] = folder / "network.json"

    for engine in delivery.engines.built:
        # an engine has no parity of its own here: it is held to that of the file it was built from
        models.append(_engine_file(engine, limits[engine.model]))
        files[engine.path] = folder / engine.path

    ends = Declared(declared(input_names(outcome.network), images), declared(output_names(outcome.network), outputs))
    manifest = _manifest(work, outcome, delivery, models, ends)
    write_bundle(
        folder / "bundle",
        files,
        manifest=manifest,
        golden_inputs=images,
        golden_outputs=outputs,
        describe=_described,
    )


def file_limits(artifact: Artifact, delivery: Delivery, golden: Golden) -> Limits:
    """About the file's distances from its network on the images of parity and on the golden ones.

    A difference counts as a share of what the images at hand spread, and golden images are few: those whom a device
    compares must be among those that set the limits.
    """
    session = open_model(delivery.files.paths[artifact], fused=not artifact.made_for)
    return limits_around(worst_of([*delivery.parity.by_file[artifact.name].values(), distance(session, golden)]))


def _described(manifest: Manifest) -> dict[str, bytes]:
    """The bill of materials, then the pages, which list it too."""
    bill = bill_of_materials(manifest)
    listing: FileListing = {"sha256": hashlib.sha256(bill).hexdigest(), "bytes": len(bill)}
    listed = replace(manifest, files={**manifest.files, BOM: listing})
    return {BOM: bill, **describe_bundle(listed)}


def _golden(work: Work, network: fx.GraphModule) -> tuple[Arrays, Arrays]:
    """Inputs and the network's answers to them, as many samples as fit a golden file."""
    first = work.sample(1)
    answer_bytes = sum(leaf.nbytes for leaf in _leaves_of(network, first))
    fitting = GOLDEN_BYTES // max(1, feeds.sample_bytes(first) + answer_bytes)
    images = work.sample(max(1, min(GOLDEN_IMAGES, fitting)))  # [N, ...]
    outputs = tuple(leaf.numpy() for leaf in _leaves_of(network, images))
    return images, feeds.unwrapped(outputs)


@torch.no_grad()
def _leaves_of(network: fx.GraphModule, images: Arrays) -> tuple[Tensor, ...]:
    return answers(network, from_arrays(images))


def _engine_file(engine: Engine, limits: Limits) -> ModelFile:
    return ModelFile(engine.path, engine.precision, engine.library, engine.target, limits)


@dataclass(frozen=True, slots=True)
class Declared:
    """What a bundle says of its models' inputs and outputs."""

    inputs: tuple[Leaf, ...]
    outputs: tuple[Leaf, ...]


def _manifest(
    work: Work, outcome: Outcome, delivery: Delivery, models: Sequence[ModelFile], ends: Declared
) -> Manifest:
    return Manifest(
        name=work.recipe.model,
        models=tuple(models),
        preprocessing=_preprocessing(work),
        labels=tuple(work.splits.evaluation.class_names or work.model.class_names or ()),
        licences=_licences(work),
        build=delivery.engines.recipes,
        provenance=_provenance(work, outcome),
        inputs=ends.inputs,
        outputs=ends.outputs,
        task=work.chosen.name,
        decode=_decode(work),
        metrics=tuple(_metrics(outcome, delivery)),
        not_checked=delivery.checks.not_checked,
    )


def _licences(work: Work) -> tuple[str, ...]:
    """What is known of licences, and whom to ask for the rest."""
    name, stated = work.recipe.model, work.model.licence
    weights = f"{stated}, as their source states it" if stated else "not stated where they were read; ask who made them"
    return (
        f"The weights that {name} began with: {weights}.",
        "The images it was made and judged with, of which the golden inputs are some: as whoever gave them says.",
        "compressor, which made this: Apache-2.0. It adds no code of its own to the models.",
        LRP_PATENTS,
    )


def _metrics(outcome: Outcome, delivery: Delivery) -> Iterator[Metric]:
    """The shipped files' figures as ONNX Runtime ran them, and the dense network's in PyTorch."""
    by_file = delivery.accuracy.by_file
    for artifact in delivery.files.shipped:
        if artifact.name in by_file:
            yield _metric(artifact.name, by_file[artifact.name], REFERENCE)
    yield _metric("dense", outcome.accuracy["dense"], "pytorch")


def _metric(of: str, figure: Figure, runtime: str) -> Metric:
    return Metric(
        of=of,
        metric=figure.metric,
        value=figure.value,
        low=figure.low,
        high=figure.high,
        n=figure.n,
        is_share=figure.is_share,
        runtime=runtime,
    )


def _decode(work: Work) -> Decode | None:
    """How outputs become boxes, where a device knows that way by name; a function of the user's it does not know."""
    decode = work.chosen.parts.functions.get("decode")
    return Decode(decode.kind, dict(decode.parameters)) if isinstance(decode, NamedDecode) else None


def _preprocessing(work: Work) -> Preprocessing | None:
    """None where the data are tensors as the network takes them."""
    chosen = work.preprocessing
    if chosen is None:
        return None
    return Preprocessing(chosen.size, chosen.resize, chosen.interpolation, chosen.mean, chosen.std)


def _provenance(work: Work, outcome: Outcome) -> dict[str, object]:
    """What went in, by hashes that the run's folder can be held against, and what it was told to do."""
    cost, dense = measure_cost(outcome.network), measure_cost(work.dense)
    return {
        "model": work.recipe.model,
        "weights_sha256": work.model.sha256,
        "data": dict(work.splits.hashes),
        # of the recipe.toml in the run's folder
        "recipe_sha256": hashlib.sha256(to_toml(work.recipe).encode()).hexdigest(),
        "shipped": outcome.shipped,
        "budget": outcome.budget or work.recipe.budget,
        "macs": cost.macs,
        "parameters": cost.parameters,
        "macs_dense": dense.macs,
        "parameters_dense": dense.parameters,
        "compressor": __version__,
    }
