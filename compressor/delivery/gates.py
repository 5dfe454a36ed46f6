"""The exported files against the network and the evaluation images: parity and accuracy, a gate for each.

Every file is compared with the fp32 network in PyTorch, never with another file. Limits are the recipe's for
fp32 and accuracy, and `device.parity.LIMITS` for fp16 and int8, where accuracy is what judges.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from torch import fx

from ..device.parity import LIMITS, Limits, Parity
from ..device.runtimes import open_model, version_of
from ..errors import GateError
from ..export.gate import measure_export
from ..export.precision import weight_bits
from ..files import file_sha256, read_json, write_json
from ..inputs.images import Batches
from ..records import Accuracy
from ..report import GateRow
from ..run.work import Work
from .artifacts import Artifact, Findings

PARITY_IMAGES = 16
CONFIDENCE = 0.95  # of which a gate's limit must be shown

_REMEDIES = {
    "fp32": "report the model; its export differs",
    "fp16": "leave fp16 out (--precisions fp32) and report the model",
    "int8": "leave int8 out (--precisions fp32,fp16), or give more calibration images",
}


def gate_accuracy(work: Work, accuracy: Mapping[str, Accuracy]) -> None:
    """Points of top-1 that the shipped network lost in PyTorch; raises GateError when more than the recipe allows."""
    limit = work.recipe.max_accuracy_loss
    work.gate(
        "accuracy: top-1 lost",
        100 * (accuracy["dense"].top1 - accuracy["shipped"].top1),
        limit,
        "raise the budget, give more calibration images, or allow more fine-tuning",
        unit="points",
        doubt=doubt_of(accuracy["dense"], limit),
    )


def doubt_of(dense: Accuracy, limit: float) -> str:
    """Why a loss counted on these images shows nothing: the dense network guesses, or they are too few; else empty."""
    return no_better_than_chance(dense) or too_few(dense.n, limit)


def no_better_than_chance(dense: Accuracy) -> str:
    """Why the dense network seems to guess, in words; empty where its whole interval lies above chance."""
    if dense.is_above_chance:
        return ""
    low, high = (100 * share for share in dense.interval)
    return (
        f"the dense network is right on {dense.correct} of {dense.n} evaluation images (95 % interval {low:.1f} to "
        f"{high:.1f} %), where chance would be right on {100 * dense.chance:.1f} %: the labels, the order of the "
        "classes or the pre-processing are probably wrong, and what it loses says nothing"
    )


def too_few(images: int, limit: float) -> str:
    """Whether more than `limit` points may be lost although not one image is: what that many images can't rule out."""
    least = least_images(limit)
    if images >= least:
        return ""
    # the loss p with (1 - p)^images = 5 %, in points: of 10 images, none lost, 25.9 may be
    possible = 100 * (1 - (1 - CONFIDENCE) ** (1 / max(1, images)))
    return (
        f"{images} images are too few to show a loss of at most {limit:g} points: with none lost, {possible:.1f} "
        f"points may be ({100 * CONFIDENCE:.0f} % confidence); it takes {least:,}"
    )


def least_images(limit: float) -> int:
    """So many that none lost rules out a loss above `limit` points: 99 for 3. Limits that allow all or nothing need 1.

    With a true loss p, no loss among n images has probability (1 - p)^n.
    """
    if not 0 < limit < 100:
        return 1
    return math.ceil(math.log(1 - CONFIDENCE) / math.log(1 - limit / 100))


def limits_of(work: Work, precision: str) -> Limits:
    """How far a file's outputs may lie from PyTorch's in fp32; the recipe says so of fp32 alone."""
    if precision == "fp32":
        return Limits(relative=work.recipe.max_parity, cosine=0.9999)
    return LIMITS[precision]


def measure_parity(work: Work, findings: Findings, networks: Mapping[str, fx.GraphModule]) -> None:
    """Every file on ONNX Runtime at two batch sizes against its network in PyTorch, `networks` by variant.

    Raises GateError at the first file that differs too much, or can't be measured.
    """
    folder, images = work.stages.folder, work.sample(PARITY_IMAGES)

    def write() -> None:
        measured = {}
        for artifact in findings.artifacts:
            measured[artifact.name] = _parity_of(work, findings, artifact, networks[artifact.variant], images)
        write_json(folder / "parity.json", {"schema": "parity/1", "onnxruntime": measured})

    def read() -> dict[str, dict[int, Parity]]:
        by_file = read_json(folder / "parity.json", "parity/1")["onnxruntime"]
        return {name: _read_parities(by_batch) for name, by_batch in by_file.items()}

    hashes = _hashes_of(findings)
    sample = [work.splits.hashes["calibration"], asdict(work.preprocessing)]
    inputs = [hashes, sample, version_of("onnxruntime"), weight_bits()]
    findings.parity = work.stages.do("parity", inputs, write, read)
    for artifact in findings.artifacts:
        _gate_parity(work, findings, artifact)


def _read_parities(by_batch: Mapping[str, Mapping[str, Any]]) -> dict[int, Parity]:
    """JSON's keys are text; batch sizes are numbers."""
    return {int(batch): Parity(**fields) for batch, fields in by_batch.items()}


def _hashes_of(findings: Findings) -> dict[str, str]:
    return {artifact.name: file_sha256(findings.path(artifact)) for artifact in findings.artifacts}


def _parity_of(
    work: Work, findings: Findings, artifact: Artifact, network: fx.GraphModule, images: np.ndarray
) -> dict[str, dict[str, float]]:
    """What can't even be measured is a failed gate too, with the reason for its remedy."""
    try:
        measured = measure_export(findings.path(artifact), network, images, fused=not artifact.made_for)
    except GateError as error:
        limit = limits_of(work, artifact.precision).relative
        work.gates.append(GateRow(f"parity: {artifact.name}", limit, math.nan, False, "<=", "", str(error)))
        work.stages.retract()
        raise
    return {str(batch): asdict(parity) for batch, parity in measured.items()}


def _gate_parity(work: Work, findings: Findings, artifact: Artifact) -> None:
    """The largest difference, and for lossy precisions the least cosine, at the worse of the batch sizes."""
    limits, remedy = limits_of(work, artifact.precision), _REMEDIES[artifact.precision]
    parities = findings.parity[artifact.name].values()
    worst = max(parity.max_abs / max(parity.reference_max_abs, 1e-30) for parity in parities)
    work.gate(f"parity: {artifact.name} = PyTorch fp32, largest difference", worst, limits.relative, remedy)
    if artifact.precision != "fp32":
        angle = 1 - min(parity.cosine for parity in parities)
        work.gate(f"parity: {artifact.name}, 1 - least cosine", angle, 1 - limits.cosine, remedy)


def measure_files(work: Work, findings: Findings, dense: Accuracy) -> None:
    """Evaluation accuracy of every file on ONNX Runtime; what fp16 and int8 lose against dense is a gate each.

    Raises GateError at the first file that loses more than the recipe allows.
    """
    folder = work.stages.folder

    def write() -> None:
        measured = {}
        for index, artifact in enumerate(findings.artifacts):
            work.stages.notify("accuracy of the files", index / len(findings.artifacts))
            accuracy = accuracy_of(findings.path(artifact), work.evaluation, fused=not artifact.made_for)
            measured[artifact.name] = asdict(accuracy)
        write_json(folder / "accuracy-files.json", {"schema": "accuracy/1", "onnxruntime": measured})

    def read() -> dict[str, Accuracy]:
        by_file = read_json(folder / "accuracy-files.json", "accuracy/1")["onnxruntime"]
        return {artifact.name: Accuracy(**by_file[artifact.name]) for artifact in findings.artifacts}

    hashes = _hashes_of(findings)
    place = [version_of("onnxruntime"), weight_bits()]
    inputs = [hashes, work.splits.hashes["evaluation"], asdict(work.preprocessing), *place]
    findings.accuracy = work.stages.do("accuracy of the files", inputs, write, read)

    limit = work.recipe.max_accuracy_loss
    for artifact in findings.artifacts:
        if artifact.precision == "fp32":  # parity holds it to the network in PyTorch, which has a gate of its own
            continue
        work.gate(
            f"accuracy: top-1 lost by {artifact.name}",
            100 * (dense.top1 - findings.accuracy[artifact.name].top1),
            limit,
            _REMEDIES[artifact.precision],
            unit="points",
            doubt=doubt_of(dense, limit),
        )


def accuracy_of(path: Path, images: Batches, *, runtime: str = "onnxruntime", fused: bool = True) -> Accuracy:
    """Top-1 and, from six classes on, top-5 of a model file over all labelled images.

    Raises GateError where there is no image. `fused` as in `open_model`.
    """
    session = open_model(path, runtime=runtime, fused=fused)
    right, right_top5, seen, classes = 0, 0, 0, 0
    for batch, labels in images:
        outputs = session.run(batch.numpy())  # [N, classes]
        classes = outputs.shape[1]
        ranked = np.argsort(-outputs, axis=1, kind="stable")[:, :5]
        hits = ranked == labels.numpy()[:, None]  # [N, 5]: which place the labelled class has
        right += int(hits[:, 0].sum())
        right_top5 += int(hits.any(1).sum())
        seen += len(labels)
    if not seen:
        raise GateError(f"accuracy of {path.name}: no image was given, so nothing was measured; give evaluation images")
    return Accuracy(right, seen, right_top5 if classes > 5 else -1)
