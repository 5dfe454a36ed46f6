"""The shipped fp32 file in, its fp16 and int8 files out, made from calibration images alone.

Ranges are read from the first part of the calibration images. Methods and mixed precision are judged on images that
served nothing else, where there are some left, else on the other calibration images: those flatter, as the repair
was fitted on them. No evaluation image decides anything here.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import fx

from ..device.parity import compare
from ..device.runtimes import open_model, version_of
from ..errors import GateError
from ..export.calibration import Statistics, collect
from ..export.int8 import Evidence, Quantised, quantise
from ..export.kernels import node_layers
from ..export.precision import Placement, to_fp16, weight_bits
from ..export.rounding import Rounding, find_rounding
from ..files import file_sha256, read_json, write_json
from ..images import Batches, Images, batches
from ..report import GateRow
from ..work import Work
from .artifacts import FP16, INT8, INT8_TENSORRT, SHIPPED, Artifact, Findings, wanted_precisions
from .gates import too_few

RANGE_IMAGES = 64  # more than 32 changed no range by a level that mattered; each costs a pass with every activation
JUDGE_IMAGES = 512
LEAST_SPARE = 64  # fewer tell two methods apart worse than calibration images do
SENSITIVITY_IMAGES = 16

LabelledImages = tuple[NDArray[np.float32], NDArray[np.int64]]


def make_precisions(work: Work, found: Findings) -> None:
    """Writes the files the recipe asks for and notes what they took; raises GateError when int8 loses too much."""
    wanted = wanted_precisions(work.recipe.precisions)
    forms = (INT8, *((INT8_TENSORRT,) if work.recipe.targets else ()))
    made = [*([FP16] if "fp16" in wanted else []), *(forms if "int8" in wanted else ())]
    for stale in {FP16, INT8, INT8_TENSORRT} - set(made):
        found.path(stale).unlink(missing_ok=True)
    if FP16 in made:
        _note(work, found, FP16, _fp16(work, found))
    if INT8 in made:
        for form, detail in _int8(work, found, forms).items():
            _note(work, found, form, detail)


def _note(work: Work, found: Findings, artifact: Artifact, detail: dict[str, Any]) -> None:
    """The nodes that stay in float are named by the layers they belong to, as everything else in the report."""
    owners = node_layers(found.path(SHIPPED), layers_of(work.dense))
    layers = list(dict.fromkeys(owners.get(node, node) for node in detail["kept"]))
    found.artifacts = (*found.artifacts, artifact)
    found.details[artifact.name] = {**detail, "layers": layers}


def layers_of(network: fx.GraphModule) -> dict[str, str]:
    """Layer by name of the traced graph's node; the shipped graph has the dense one's names."""
    return {n.name: n.meta["layer"] for n in network.graph.nodes if n.meta.get("layer")}


def _fp16(work: Work, found: Findings) -> dict[str, Any]:
    folder = work.stages.folder

    def write() -> None:
        made = to_fp16(found.path(SHIPPED), found.path(FP16), statistics=_statistics(work, found))
        write_json(folder / "fp16.json", {"schema": "fp16/1", "islands": sorted(made.islands)})

    def read() -> dict[str, Any]:
        found.path(FP16).stat()
        return {"kept": list(read_json(folder / "fp16.json", "fp16/1")["islands"])}

    images = [work.splits.hashes["calibration"], asdict(work.preprocessing), RANGE_IMAGES]
    inputs = [file_sha256(found.path(SHIPPED)), images, version_of("onnxruntime")]
    return work.stages.do("fp16", inputs, write, read)


def _int8(work: Work, found: Findings, forms: tuple[Artifact, ...]) -> dict[Artifact, dict[str, Any]]:
    folder, recipe = work.stages.folder, work.recipe

    def write() -> None:
        evidence = _evidence(work, found)
        made: dict[str, Any] = {}
        first: Quantised | None = None
        for form in forms:
            first = _quantised(work, found, form, evidence, first)
            made[form.name] = {**asdict(first), "path": form.name, "judged_on": _judged_on(work)}
        write_json(folder / "int8.json", {"schema": "int8/2", "files": made})

    def read() -> dict[Artifact, dict[str, Any]]:
        held = read_json(folder / "int8.json", "int8/2")["files"]
        for form in forms:
            found.path(form).stat()
        return {form: held[form.name] for form in forms}

    files = [form.name for form in forms]
    sizes = [RANGE_IMAGES, JUDGE_IMAGES, SENSITIVITY_IMAGES]
    images = [*(work.splits.hashes[name] for name in ("calibration", "search")), asdict(work.preprocessing)]
    place = [version_of("onnxruntime"), weight_bits()]
    inputs = [file_sha256(found.path(SHIPPED)), images, recipe.max_int8_loss, files, sizes, *place]
    made = work.stages.do("int8", inputs, write, read)
    for form, detail in made.items():
        work.gate(
            _gate_name(work, form),
            100 * (round(detail["reference"], 4) - round(detail["score"], 4)),  # without the ties' breaker
            recipe.max_int8_loss,
            _REMEDY,
            unit="points",
            doubt=too_few(_judged_on(work), recipe.max_int8_loss),
        )
    return made


def _gate_name(work: Work, artifact: Artifact) -> str:
    form = f", form for {artifact.made_for}" if artifact.made_for else ""
    which = "spare" if _spare(work) else "calibration"
    return f"int8: top-1 lost on {_judged_on(work)} {which} images{form}"


_REMEDY = "leave int8 out (--precisions fp32,fp16), allow more with --max-int8-loss, or give more calibration images"


def _quantised(work: Work, found: Findings, form: Artifact, evidence: Evidence, like: Quantised | None) -> Quantised:
    placement: Placement = "tensorrt" if form.made_for else "onnxruntime"
    try:
        return quantise(
            found.path(SHIPPED),
            found.path(form),
            evidence=evidence,
            placement=placement,
            like=like,
            progress=lambda share: work.stages.notify(f"int8: what each layer costs ({placement})", share),
        )
    except GateError as error:
        found.path(form).unlink(missing_ok=True)
        limit, name = work.recipe.max_int8_loss, _gate_name(work, form)
        work.gates.append(GateRow(name, limit, math.nan, False, "<=", "points", f"{error}; or {_REMEDY}"))
        work.stages.retract()
        raise GateError(f"gate '{name}' failed: {error}; or {_REMEDY}") from error


def _evidence(work: Work, found: Findings) -> Evidence:
    images, labels = _judges(work)
    score = _judge(found.path(SHIPPED), images, labels)
    return Evidence(
        statistics=_statistics(work, found),
        rounding=_rounding(work, found),
        images=images[:SENSITIVITY_IMAGES],
        score=score,
        reference=score(found.path(SHIPPED), "onnxruntime"),
        max_loss=work.recipe.max_int8_loss / 100,
    )


def _judge(
    original: Path, images: NDArray[np.float32], labels: NDArray[np.int64]
) -> Callable[[Path, Placement], float]:
    """Share of images a file is right about; ties are broken by the distance to the original, 1e-7 for a dB."""
    reference = _outputs(original, images, "onnxruntime")

    def score(path: Path, placement: Placement) -> float:
        outputs = _outputs(path, images, placement)
        right = float((outputs.argmax(1) == labels).mean())
        return right if path == original else right + 1e-7 * (300 + compare(reference, outputs).sqnr_db)

    return score


def _outputs(path: Path, images: NDArray[np.float32], placement: Placement) -> NDArray[np.float32]:
    session = open_model(path, fused=placement == "onnxruntime")
    return np.concatenate([session.run(images[i : i + 8]) for i in range(0, len(images), 8)])


def _statistics(work: Work, found: Findings) -> Statistics:
    """Ranges and histograms of every activation over the first calibration images; fp16 and int8 share them."""
    if found.statistics is None:
        work.stages.notify("precisions: ranges of the activations", 0.0)
        found.statistics = collect(found.path(SHIPPED), gathered(work.calibration, _range_images(work))[0])
    return found.statistics


def _rounding(work: Work, found: Findings) -> Rounding:
    """From the images the ranges are read from."""
    work.stages.notify("int8: what the layers read", 0.0)
    return find_rounding(found.path(SHIPPED), gathered(work.calibration, _range_images(work))[0])


def _range_images(work: Work) -> int:
    """A quarter of the images at most, so that enough are left to judge."""
    return min(RANGE_IMAGES, max(1, len(work.splits.calibration) // 4))


def _spare(work: Work) -> Images | None:
    """Images that served nothing yet, where there are enough."""
    left = work.splits.search
    return left if len(left) >= LEAST_SPARE else None


def _judges(work: Work) -> LabelledImages:
    """Spare images, else the calibration images behind those the ranges come from; all, where there is only one."""
    spare = _spare(work)
    if spare is not None:
        return gathered(batches(spare, work.recipe.batch_size), JUDGE_IMAGES)
    first = _range_images(work)
    images, labels = gathered(work.calibration, first + JUDGE_IMAGES)
    return (images[first:], labels[first:]) if len(images) > first else (images, labels)


def _judged_on(work: Work) -> int:
    spare, count = _spare(work), len(work.splits.calibration)
    if spare is not None:
        return min(JUDGE_IMAGES, len(spare))
    return min(JUDGE_IMAGES, count - _range_images(work)) or count


def gathered(source: Batches, count: int) -> LabelledImages:
    """The first `count` images [N, C, H, W] with their labels, or as many as there are."""
    images, labels = [], []
    for some, answers in source:
        images.append(some.numpy())
        labels.append(answers.numpy())
        if sum(map(len, labels)) >= count:
            break
    return np.concatenate(images)[:count], np.concatenate(labels)[:count]
