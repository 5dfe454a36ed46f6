"""The shipped fp32 file in, its fp16 and int8 files out, made from calibration images alone.

Ranges are read from the first part of the calibration images. Methods and mixed precision are judged on images that
served nothing else, where there are some left, else on the other calibration images: those flatter, as the repair
was fitted on them. No evaluation image decides anything here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
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
from ..inputs.images import Batches, Images, batches
from ..report import GateRow
from ..run.judges import JUDGE_IMAGES
from ..run.work import Work
from .artifacts import FP16, INT8, INT8_TENSORRT, SHIPPED, Artifact, Findings, wanted_precisions
from .gates import too_few

RANGE_IMAGES = 64  # more than 32 changed no range by a level that mattered; each costs a pass with every activation
LEAST_SPARE = 64  # fewer tell two methods apart worse than calibration images do
SENSITIVITY_IMAGES = 16

LabelledImages = tuple[NDArray[np.float32], NDArray[np.int64]]


def make_precisions(work: Work, findings: Findings) -> None:
    """Writes the files the recipe asks for and notes what they took; raises GateError when int8 loses too much."""
    wanted = wanted_precisions(work.recipe.precisions)
    forms = [INT8]
    if work.recipe.targets:
        forms.append(INT8_TENSORRT)

    artifacts: list[Artifact] = []
    if "fp16" in wanted:
        artifacts.append(FP16)
    if "int8" in wanted:
        artifacts += forms

    # what an earlier run with another recipe made must not pass for this one's
    for stale in {FP16, INT8, INT8_TENSORRT} - set(artifacts):
        findings.path(stale).unlink(missing_ok=True)

    if FP16 in artifacts:
        _note(work, findings, FP16, _fp16(work, findings))
    if INT8 in artifacts:
        for form, detail in _int8(work, findings, forms).items():
            _note(work, findings, form, detail)


def _note(work: Work, findings: Findings, artifact: Artifact, detail: dict[str, Any]) -> None:
    """The nodes that stay in float are named by the layers they belong to, as everything else in the report."""
    owners = node_layers(findings.path(SHIPPED), layers_of(work.dense))
    layers = list(dict.fromkeys(owners.get(node, node) for node in detail["kept"]))
    findings.artifacts = (*findings.artifacts, artifact)
    findings.details[artifact.name] = {**detail, "layers": layers}


def layers_of(network: fx.GraphModule) -> dict[str, str]:
    """Layer by name of the traced graph's node; the shipped graph has the dense one's names."""
    return {node.name: node.meta["layer"] for node in network.graph.nodes if node.meta.get("layer")}


def _fp16(work: Work, findings: Findings) -> dict[str, Any]:
    """Writes the fp16 file; `kept` names the nodes that stay in fp32, as half floats would overflow there."""
    folder = work.stages.folder

    def write() -> None:
        half = to_fp16(findings.path(SHIPPED), findings.path(FP16), statistics=_statistics(work, findings))
        write_json(folder / "fp16.json", {"schema": "fp16/1", "islands": sorted(half.islands)})

    def read() -> dict[str, Any]:
        findings.path(FP16).stat()
        return {"kept": list(read_json(folder / "fp16.json", "fp16/1")["islands"])}

    images = [work.splits.hashes["calibration"], asdict(work.preprocessing), RANGE_IMAGES]
    inputs = [file_sha256(findings.path(SHIPPED)), images, version_of("onnxruntime")]
    return work.stages.do("fp16", inputs, write, read)


def _int8(work: Work, findings: Findings, forms: Sequence[Artifact]) -> dict[Artifact, dict[str, Any]]:
    """Writes the int8 file in each form, with what its making took; a gate for each form.

    Raises GateError where no choice of layers in float loses as little as the recipe asks.
    """
    folder, recipe = work.stages.folder, work.recipe

    def write() -> None:
        evidence = _evidence(work, findings)
        details: dict[str, Any] = {}
        quantised: Quantised | None = None
        for form in forms:
            # the choices made for one form are tried first for the next
            quantised = _quantised(work, findings, form, evidence, quantised)
            details[form.name] = {**asdict(quantised), "path": form.name, "judged_on": _judged_on(work)}
        write_json(folder / "int8.json", {"schema": "int8/2", "files": details})

    def read() -> dict[Artifact, dict[str, Any]]:
        by_file = read_json(folder / "int8.json", "int8/2")["files"]
        for form in forms:
            findings.path(form).stat()
        return {form: by_file[form.name] for form in forms}

    files = [form.name for form in forms]
    sizes = [RANGE_IMAGES, JUDGE_IMAGES, SENSITIVITY_IMAGES]
    hashes = [work.splits.hashes[name] for name in ("calibration", "search")]
    images = [*hashes, asdict(work.preprocessing)]
    place = [version_of("onnxruntime"), weight_bits()]
    inputs = [file_sha256(findings.path(SHIPPED)), images, recipe.max_int8_loss, files, sizes, *place]
    details = work.stages.do("int8", inputs, write, read)
    for form, detail in details.items():
        _gate_int8(work, form, detail)
    return details


def _gate_int8(work: Work, form: Artifact, detail: Mapping[str, Any]) -> None:
    # rounded, so that the ties' breakers (some 3e-5, see `_judge`) don't count as answers
    reference, score = round(detail["reference"], 4), round(detail["score"], 4)
    limit = work.recipe.max_int8_loss
    doubt = too_few(_judged_on(work), limit)
    work.gate(_gate_name(work, form), 100 * (reference - score), limit, _REMEDY, unit="points", doubt=doubt)


def _gate_name(work: Work, artifact: Artifact) -> str:
    form = f", form for {artifact.made_for}" if artifact.made_for else ""
    source = "spare" if _spare(work) else "calibration"
    return f"int8: top-1 lost on {_judged_on(work)} {source} images{form}"


_REMEDY = "leave int8 out (--precisions fp32,fp16), allow more with --max-int8-loss, or give more calibration images"


def _quantised(work: Work, findings: Findings, form: Artifact, evidence: Evidence, like: Quantised | None) -> Quantised:
    """Writes the file of that form; where it can't be, the failed gate is noted before the error goes on."""
    placement: Placement = "tensorrt" if form.made_for else "onnxruntime"
    try:
        return quantise(
            findings.path(SHIPPED),
            findings.path(form),
            evidence=evidence,
            placement=placement,
            like=like,
            progress=lambda share: work.stages.notify(f"int8: what each layer costs ({placement})", share),
        )
    except GateError as error:
        findings.path(form).unlink(missing_ok=True)
        limit, name = work.recipe.max_int8_loss, _gate_name(work, form)
        work.gates.append(GateRow(name, limit, math.nan, False, "<=", "points", f"{error}; or {_REMEDY}"))
        work.stages.retract()
        raise GateError(f"gate '{name}' failed: {error}; or {_REMEDY}") from error


def _evidence(work: Work, findings: Findings) -> Evidence:
    images, labels = _judges(work)
    score = _judge(findings.path(SHIPPED), images, labels)
    return Evidence(
        statistics=_statistics(work, findings),
        rounding=_rounding(work, findings),
        images=images[:SENSITIVITY_IMAGES],
        score=score,
        reference=score(findings.path(SHIPPED), "onnxruntime"),
        max_loss=work.recipe.max_int8_loss / 100,
    )


def _judge(
    original: Path, images: NDArray[np.float32], labels: NDArray[np.int64]
) -> Callable[[Path, Placement], float]:
    """Share of images a file is right about; ties are broken by the distance to the original, 1e-7 for a dB.

    SQNR lies between -300 and 300 dB, so a breaker is at most 6e-5: less than one of 512 images.
    """
    reference = _outputs(original, images, "onnxruntime")

    def score(path: Path, placement: Placement) -> float:
        outputs = _outputs(path, images, placement)
        right = float((outputs.argmax(1) == labels).mean())
        if path == original:
            return right
        return right + 1e-7 * (300 + compare(reference, outputs).sqnr_db)

    return score


def _outputs(path: Path, images: NDArray[np.float32], placement: Placement) -> NDArray[np.float32]:
    """[N, classes], eight images at a time."""
    session = open_model(path, fused=placement == "onnxruntime")
    outputs = [session.run(images[start : start + 8]) for start in range(0, len(images), 8)]
    return np.concatenate(outputs)


def _statistics(work: Work, findings: Findings) -> Statistics:
    """Ranges and histograms of every activation over the first calibration images; fp16 and int8 share them."""
    if findings.statistics is None:
        work.stages.notify("precisions: ranges of the activations", 0.0)
        images, _ = gathered(work.calibration, _range_images(work))
        findings.statistics = collect(findings.path(SHIPPED), images)
    return findings.statistics


def _rounding(work: Work, findings: Findings) -> Rounding:
    """From the images the ranges are read from."""
    work.stages.notify("int8: what the layers read", 0.0)
    images, _ = gathered(work.calibration, _range_images(work))
    return find_rounding(findings.path(SHIPPED), images)


def _range_images(work: Work) -> int:
    """A quarter of the images at most, so that enough are left to judge."""
    return min(RANGE_IMAGES, max(1, len(work.splits.calibration) // 4))


def _spare(work: Work) -> Images | None:
    """Images that served nothing yet, where there are enough."""
    spare = work.splits.search
    return spare if len(spare) >= LEAST_SPARE else None


def _judges(work: Work) -> LabelledImages:
    """Spare images, else the calibration images behind those the ranges come from; all, where there is only one."""
    spare = _spare(work)
    if spare is not None:
        return gathered(batches(spare, work.recipe.batch_size), JUDGE_IMAGES)
    ranged = _range_images(work)
    images, labels = gathered(work.calibration, ranged + JUDGE_IMAGES)
    if len(images) <= ranged:
        return images, labels
    return images[ranged:], labels[ranged:]


def _judged_on(work: Work) -> int:
    """How many images `_judges` gives, counted without reading them."""
    spare, count = _spare(work), len(work.splits.calibration)
    if spare is not None:
        return min(JUDGE_IMAGES, len(spare))
    behind = min(JUDGE_IMAGES, count - _range_images(work))
    return behind or count


def gathered(source: Batches, count: int) -> LabelledImages:
    """The first `count` images [N, C, H, W] with their labels, or as many as there are."""
    images, labels = [], []
    taken = 0
    for batch, batch_labels in source:
        images.append(batch.numpy())
        labels.append(batch_labels.numpy())
        taken += len(batch_labels)
        if taken >= count:
            break
    return np.concatenate(images)[:count], np.concatenate(labels)[:count]
