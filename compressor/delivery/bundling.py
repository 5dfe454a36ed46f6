"""What was exported, built and checked in, the bundle that ships out: files, golden outputs, manifest."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..device import feeds
from ..device.bundle import Manifest, ModelFile, write_bundle
from ..device.images import Preprocessing
from ..device.parity import Limits, limits_around
from ..graph.cost import measure_cost
from ..graph.interface import answers
from ..records import Cost
from ..run.work import Work
from .results import Delivery, Engine, Outcome

GOLDEN_IMAGES = 8
LICENCES = (
    "compressor: Apache-2.0. The model's and the images' own licences apply to what was made from them.",
    "Layer-wise relevance propagation may be covered by patents where you ship.",
)


def bundle(work: Work, outcome: Outcome, delivery: Delivery) -> None:
    """The shipped network's files and engines, each bound to about the distance it has here from the golden outputs.

    Writes `bundle/` in the run's folder. Parity must have been measured for every shipped file.
    """
    folder, shipped = work.stages.folder, delivery.files.shipped
    limits = {artifact.name: limits_around(delivery.parity.worst(artifact)) for artifact in shipped}
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

    manifest = _manifest(work, delivery, models, measure_cost(outcome.network))
    images = work.sample(GOLDEN_IMAGES)  # [N, ...]
    with torch.inference_mode():
        leaves = answers(outcome.network, tuple(torch.from_numpy(array) for array in feeds.as_tuple(images)))
        outputs = leaves[0].numpy()
    write_bundle(folder / "bundle", files, manifest=manifest, golden_inputs=images, golden_outputs=outputs)


def _engine_file(engine: Engine, limits: Limits) -> ModelFile:
    return ModelFile(engine.path, engine.precision, engine.library, engine.target, limits)


def _manifest(work: Work, delivery: Delivery, models: Sequence[ModelFile], cost: Cost) -> Manifest:
    preprocessing = work.preprocessing
    return Manifest(
        name=work.recipe.model,
        models=tuple(models),
        preprocessing=Preprocessing(
            preprocessing.size,
            preprocessing.resize,
            preprocessing.interpolation,
            preprocessing.mean,
            preprocessing.std,
        ),
        labels=tuple(work.splits.evaluation.class_names or work.model.class_names or ()),
        licences=LICENCES,
        build=delivery.engines.recipes,
        provenance=_provenance(work, cost),
    )


def _provenance(work: Work, cost: Cost) -> dict[str, object]:
    return {
        "model": work.recipe.model,
        "weights_sha256": work.model.sha256,
        "budget": work.recipe.budget,
        "macs": cost.macs,
        "parameters": cost.parameters,
    }
