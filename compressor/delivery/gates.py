"""The exported files against the network and the evaluation images: parity and accuracy, a gate for each.

Every file is compared with the fp32 network in PyTorch, never with another file. Limits are the recipe's for
fp32 and accuracy, and `device.parity.LIMITS` for fp16 and int8, where accuracy is what judges.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path

import numpy as np
from torch import fx

from ..device import feeds
from ..device.feeds import Arrays
from ..device.parity import LIMITS, Limits, Parity, relative_difference
from ..device.runtimes import REFERENCE, open_model, version_of
from ..errors import GateError
from ..export.gate import measure_export, measure_rounding
from ..export.precision import weight_bits
from ..files import read_json, write_json
from ..inputs.images import Batches
from ..records import Accuracy, Figure, Quality, figure_fields, figure_of
from ..run.checks import Checks, gate, until_failed
from ..run.fingerprints import Known
from ..run.stages import Keeper, Progress
from ..run.tasking import NetworkTask, metric_of
from ..run.work import Work, arrays_of
from ..tensors import from_arrays
from .answers import predict_of_file
from .artifacts import Artifact, FileRefused
from .results import FileAccuracies, Files, Parities

PARITY_IMAGES = 16
CONFIDENCE = 0.95  # of which a gate's limit must be shown
ROUNDINGS = 10  # a file adds up in another order: so many times PyTorch's own rounding explains its difference

_REMEDIES = {
    "fp32": "report the model; its export differs",
    "fp16": "leave fp16 out (--precisions fp32) and report the model",
    "int8": "leave int8 out (--precisions fp32,fp16), or give more calibration images",
}


def accuracy_checks(accuracy: Mapping[str, Figure], limit: float) -> Checks:
    """The gate of what the shipped network lost in PyTorch: `limit` is in points of a share, else per cent.

    A warning where the dense network seems to guess. No gate where the dense network is the one that ships.
    """
    dense = accuracy["dense"]
    guessing = no_better_than_chance(dense)
    warnings = Checks(warnings=(guessing,) if guessing else ())
    if "shipped" not in accuracy:
        return warnings
    lost = gate(
        f"{judged_as(dense)} lost",
        dense.lost(accuracy["shipped"]),
        limit=limit,
        remedy="raise the budget, give more calibration images, or a longer recovery (--recovery-minutes)",
        unit=unit_of(dense),
        doubt=doubt_of(dense, limit),
    )
    return warnings + lost


def judged_as(dense: Figure) -> str:
    """How a gate on what networks are judged by begins: only a share of right answers is an accuracy."""
    return f"{'accuracy' if dense.metric == 'top-1' else 'quality'}: {dense.metric}"


def unit_of(dense: Figure) -> str:
    """What a loss is counted in: points of a share, else per cent of the dense network's figure."""
    return "points" if dense.is_share else "%"


def doubt_of(dense: Figure, limit: float) -> str:
    """Why a loss counted on these images shows nothing: the dense network guesses, or they are too few; else empty.

    How many are enough is known where right answers are counted alone.
    """
    few = too_few(dense.n, limit) if isinstance(dense, Accuracy) else ""
    return no_better_than_chance(dense) or few


def no_better_than_chance(dense: Figure) -> str:
    """Why the dense network seems to guess, in words; empty where its whole interval lies above chance."""
    if dense.is_above_chance:
        return ""
    if isinstance(dense, Quality):
        return (
            f"the dense network's {dense.metric} is {dense.value:.3g} on {dense.n} evaluation images (95 % interval "
            f"{dense.low:.3g} to {dense.high:.3g}), where chance would give {dense.chance:.3g}: the labels or the "
            "pre-processing are probably wrong, and what it loses says nothing"
        )
    low, high = (100 * share for share in dense.interval)
    return (
        f"the dense network is right on {dense.correct} of {dense.n} evaluation images (95 % interval {low:.1f} to "
        f"{high:.1f} %), where chance would be right on {100 * dense.chance:.1f} %: the labels, the order of the "
        "classes or the pre-processing are probably wrong, and what it loses says nothing"
    )


def too_few(images: int, limit: float) -> str:
    """Why so many images, none of them lost, can't rule out a loss above `limit` points; empty where they can."""
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


def limits_of(precision: str, max_parity: float) -> Limits:
    """How far a file's outputs may lie from PyTorch's in fp32; the recipe says so of fp32 alone."""
    if precision == "fp32":
        return Limits(relative=max_parity, cosine=0.9999, channel=LIMITS["fp32"].channel)
    return LIMITS[precision]


def kernels_here() -> list[object]:
    """What of this machine a file's outputs depend on: ONNX Runtime's version, and the weights its kernels take."""
    return [version_of(REFERENCE), weight_bits()]


def measure_parity(work: Work, files: Files, networks: Known) -> Parities:
    """Every file on ONNX Runtime at two batch sizes against its network in PyTorch, `networks` by variant.

    A gate for each, up to the first file that differs too much, or can't be measured.
    """
    max_parity = work.recipe.max_parity
    try:
        by_file = work.stages.make(
            "parity",
            _parities,
            Keeper(_write_parities, _read_parities),
            place=kernels_here(),
            files=dict(files.paths),
            networks=networks,
            images=work.sample(PARITY_IMAGES),
        )
    except FileRefused as error:
        limit = limits_of(error.artifact.precision, max_parity).relative
        row = gate(f"parity: {error.artifact.name}", math.nan, limit=limit, remedy=str(error))
        return Parities(checks=row + Checks(refusal=str(error)))

    def rounding_of(artifact: Artifact) -> Parity:
        images = from_arrays(work.sample(PARITY_IMAGES))
        return measure_rounding(networks.value[artifact.variant], images)

    return Parities(by_file, until_failed(_parity_checks(files, by_file, max_parity, rounding_of)))


def _parities(
    files: Mapping[Artifact, Path],
    networks: Mapping[str, fx.GraphModule],
    images: Arrays,
    progress: Progress,
) -> dict[str, dict[int, Parity]]:
    by_file = {}
    for artifact, path in files.items():
        try:
            by_file[artifact.name] = measure_export(
                path, networks[artifact.variant], images, fused=not artifact.made_for
            )
        except GateError as error:
            raise FileRefused(artifact, str(error)) from error
    return by_file


def _write_parities(folder: Path, by_file: Mapping[str, Mapping[int, Parity]]) -> None:
    """JSON's keys are text."""
    rows: dict[str, dict[str, object]] = {}
    for name, by_batch in by_file.items():
        rows[name] = {str(batch): asdict(parity) for batch, parity in by_batch.items()}
    write_json(folder / "parity.json", {"schema": "parity/1", REFERENCE: rows})


def _read_parities(folder: Path) -> dict[str, dict[int, Parity]]:
    by_file: dict[str, dict[int, Parity]] = {}
    for name, by_batch in read_json(folder / "parity.json", "parity/1")[REFERENCE].items():
        by_file[name] = {int(batch): Parity(**fields) for batch, fields in by_batch.items()}
    return by_file


def _parity_checks(
    files: Files,
    by_file: Mapping[str, Mapping[int, Parity]],
    max_parity: float,
    rounding_of: Callable[[Artifact], Parity],
) -> Iterator[Checks]:
    """The largest difference, and for lossy precisions the least cosine, at the worse of the batch sizes.

    `rounding_of` is asked how far PyTorch's own float32 is from float64 only of an fp32 file that differs too much.
    """
    for artifact in files.artifacts:
        limits, remedy = limits_of(artifact.precision, max_parity), _REMEDIES[artifact.precision]
        parities = by_file[artifact.name].values()
        worst = max(relative_difference(parity) for parity in parities)
        if artifact.precision == "fp32" and worst > limits.relative:
            remedy = _remedy_of_export(worst, relative_difference(rounding_of(artifact)))
        name = f"parity: {artifact.name} = PyTorch fp32, largest difference"
        yield gate(name, worst, limit=limits.relative, remedy=remedy)
        if artifact.precision != "fp32":
            angle = 1 - min(parity.cosine for parity in parities)
            name = f"parity: {artifact.name}, 1 - least cosine"
            yield gate(name, angle, limit=1 - limits.cosine, remedy=remedy)
        if limits.channel is not None:
            yield from _channel_check(artifact, parities, limits.channel, rounding_of)


def _channel_check(
    artifact: Artifact, parities: Iterable[Parity], limit: float, rounding_of: Callable[[Artifact], Parity]
) -> Iterator[Checks]:
    """Of outputs whose channels are of different units; no gate where there are none.

    A channel may be smaller than its own rounding: what PyTorch's float32 loses there explains as much of the file's.
    """
    by_share = {parity.channel_relative: parity.channel for parity in parities if parity.channel_relative is not None}
    if not by_share:
        return
    worst = max(by_share)
    if worst > limit:
        limit = max(limit, ROUNDINGS * (rounding_of(artifact).channel_relative or 0.0))
    name = f"parity: {artifact.name} = PyTorch fp32, largest difference in a channel over its spread"
    yield gate(name, worst, limit=limit, remedy=f"report the model; its export differs in {by_share[worst]}")


def _remedy_of_export(difference: float, rounding: float) -> str:
    """Of an fp32 file that differs too much: its export is to blame unless PyTorch's own rounding explains it."""
    if difference > ROUNDINGS * rounding:
        return _REMEDIES["fp32"]
    return (
        f"PyTorch's own answers in float32 are {rounding:.2g} off those in float64: this network multiplies rounding, "
        "so that no file can be shown to be right. Check its weights, its batch norms' statistics and the "
        "pre-processing (--mean, --std, --size)"
    )


def measure_files(work: Work, files: Files, dense: Figure, task: NetworkTask) -> FileAccuracies:
    """Evaluation quality of every file on ONNX Runtime; what fp16 and int8 lose against dense is a gate each.

    The gates end with the first file that loses more than the recipe allows.
    """
    by_file = work.stages.make(
        "accuracy of the files",
        _counted_right,
        Keeper(_write_accuracies, _read_accuracies),
        place=kernels_here(),
        files=dict(files.paths),
        images=work.evaluation_images,
        task=task.itself,
    )
    return FileAccuracies(by_file, until_failed(_file_checks(files, by_file, dense, work.recipe.max_accuracy_loss)))


def _counted_right(
    files: Mapping[Artifact, Path], images: Batches, task: NetworkTask, progress: Progress
) -> dict[str, Figure]:
    by_file: dict[str, Figure] = {}
    judge = task.task
    for index, (artifact, path) in enumerate(files.items()):
        progress(index / len(files))
        fused = not artifact.made_for
        if judge is None:
            by_file[artifact.name] = accuracy_of(path, images, fused=fused, metric=metric_of(task.chosen))
        else:
            by_file[artifact.name] = judge.quality(predict_of_file(path, fused=fused), images)
    return by_file


def _write_accuracies(folder: Path, by_file: Mapping[str, Figure]) -> None:
    rows = {name: figure_fields(figure) for name, figure in by_file.items()}
    write_json(folder / "accuracy-files.json", {"schema": "figures/1", REFERENCE: rows})


def _read_accuracies(folder: Path) -> dict[str, Figure]:
    rows = read_json(folder / "accuracy-files.json", "figures/1")[REFERENCE]
    return {name: figure_of(fields) for name, fields in rows.items()}


def _file_checks(files: Files, by_file: Mapping[str, Figure], dense: Figure, limit: float) -> Iterator[Checks]:
    for artifact in files.artifacts:
        if artifact.precision == "fp32":  # parity holds it to the network in PyTorch, which has a gate of its own
            continue
        yield gate(
            f"{judged_as(dense)} lost by {artifact.name}",
            dense.lost(by_file[artifact.name]),
            limit=limit,
            remedy=_REMEDIES[artifact.precision],
            unit=unit_of(dense),
            doubt=doubt_of(dense, limit),
        )


def accuracy_of(
    path: Path, images: Batches, *, runtime: str = REFERENCE, fused: bool = True, metric: str = "top-1"
) -> Accuracy:
    """Top-1 and, from six classes on, top-5 of a classifier's file over all labelled images.

    Raises GateError where there is no image. `fused` as in `open_model`; `metric` is what right answers are called.
    """
    session = open_model(path, runtime=runtime, fused=fused)
    right, right_top5, seen, classes = 0, 0, 0, 0
    for batch, labels in images:
        outputs = feeds.as_tuple(session.run(arrays_of(batch)))[0]  # [N, classes]
        classes = outputs.shape[1]
        ranked = np.argsort(-outputs, axis=1, kind="stable")[:, :5]
        hits = ranked == labels.numpy()[:, None]  # [N, 5]: which place the labelled class has
        right += int(hits[:, 0].sum())
        right_top5 += int(hits.any(1).sum())
        seen += len(labels)
    if not seen:
        raise GateError(f"accuracy of {path.name}: no image was given, so nothing was measured; give evaluation images")
    return Accuracy(right, seen, right_top5 if classes > 5 else -1, metric=metric)
