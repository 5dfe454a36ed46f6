"""What was exported, built and checked in, the bundle that ships out: files, golden outputs, manifest."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from ..device.bundle import Manifest, ModelFile, write_bundle
from ..device.images import Preprocessing
from ..device.parity import limits_around
from ..records import Cost
from ..work import Work
from .artifacts import Findings

GOLDEN_IMAGES = 8
LICENCES = (
    "compressor: Apache-2.0. The model's and the images' own licences apply to what was made from them.",
    "Layer-wise relevance propagation may be covered by patents where you ship.",
)


def bundle(work: Work, found: Findings, final: fx.GraphModule, cost: Cost) -> None:
    """The shipped network's files and engines, each bound to about the distance it has here from the golden outputs."""
    folder, how = work.stages.folder, work.preprocessing
    ships = [a for a in found.artifacts if a.variant == "shipped"]
    limits = {a.name: limits_around(found.worst_parity(a)) for a in ships}
    models = [ModelFile(a.name, a.precision, limits=limits[a.name], made_for=a.made_for) for a in ships]
    files = {**{a.name: found.path(a) for a in ships}, "plan.json": folder / "network.json"}
    for engine in found.engines:
        if engine["path"]:
            models.append(
                ModelFile(
                    engine["path"], engine["precision"], engine["library"], engine["target"], limits[engine["model"]]
                )
            )
            files[engine["path"]] = folder / engine["path"]
    manifest = Manifest(
        name=work.recipe.model,
        models=tuple(models),
        preprocessing=Preprocessing(how.size, how.resize, how.interpolation, how.mean, how.std),
        labels=tuple(work.splits.evaluation.class_names or work.model.class_names or ()),
        licences=LICENCES,
        build=tuple(found.build),
        provenance=_provenance(work, cost),
    )
    images = work.sample(GOLDEN_IMAGES)
    with torch.inference_mode():
        outputs = final(torch.from_numpy(images)).numpy()
    write_bundle(folder / "bundle", files, manifest=manifest, golden_inputs=images, golden_outputs=outputs)


def _provenance(work: Work, cost: Cost) -> dict[str, Any]:
    return {
        "model": work.recipe.model,
        "weights_sha256": work.model.sha256,
        "budget": work.recipe.budget,
        "macs": cost.macs,
        "parameters": cost.parameters,
    }
