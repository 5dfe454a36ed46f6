"""The shipped fp32 file in, its fp16 and int8 files out, made from calibration images alone.

Ranges are read from the first part of the calibration images. Methods and mixed precision are judged on images that
served nothing else, where there are some left, else on the other calibration images: those flatter, as the repair
was fitted on them. No evaluation image decides anything here.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx

from ..device import feeds
from ..device.feeds import Array, Arrays
from ..device.parity import compare
from ..device.runtimes import open_model
from ..errors import GateError
from ..export.calibration import Statistics, collect
from ..export.int8 import Evidence, Quantised, quantise
from ..export.kernels import node_layers
from ..export.precision import Placement, to_fp16
from ..export.rounding import Rounding, find_rounding
from ..files import read_json, write_json
from ..inputs.images import Batches, batches
from ..run.checks import Checks, gate, until_failed
from ..run.fingerprints import Known
from ..run.judges import JUDGE_IMAGES, judging_of
from ..run.stages import Keeper, Progress
from ..run.tasking import NetworkTask, metric_of, remembered
from ..run.work import Work, arrays_of
from ..tasks import Boxes, relative_error
from ..tensors import Inputs, from_arrays, unwrapped
from .answers import predict_of_file
from .artifacts import FP16, INT8, INT8_TENSORRT, SHIPPED, Artifact, FileRefused, Measure, wanted_precisions
from .gates import kernels_here, too_few
from .results import Files, Lowered

RANGE_IMAGES = 64  # more than 32 changed no range by a level that mattered; each costs a pass with every activation
LEAST_SPARE = 64  # fewer tell two methods apart worse than calibration images do
SENSITIVITY_IMAGES = 16

KnownTargets = Tensor | Sequence[Boxes]
LabelledImages = tuple[Arrays, KnownTargets]


@dataclass(frozen=True, eq=False)
class RangeImages:
    """The first `count` images of `batches`, which an fp32 file's ranges are read from."""

    file: Path
    batches: Batches
    count: int

    @functools.cached_property
    def statistics(self) -> Statistics:
        """Ranges and histograms of every activation; fp16 and int8 share them, so they are collected once."""
        return collect(self.file, gathered(self.batches, self.count)[0])

    def rounding(self) -> Rounding:
        """What the layers read of the same images."""
        return find_rounding(self.file, gathered(self.batches, self.count)[0])


@dataclass(frozen=True, slots=True, eq=False)
class JudgeImages:
    """`count` labelled images of `batches` from `first` on, which tell what an int8 file loses."""

    batches: Batches
    first: int
    count: int
    source: Literal["spare", "calibration"]

    def parts(self, size: int = 8) -> Iterator[tuple[Inputs, KnownTargets]]:
        """The same as a task takes them, so many at a time."""
        images, targets = self.read()
        for start in range(0, feeds.count(images), size):
            batch = feeds.cut(images, start, start + size)
            yield unwrapped(from_arrays(batch)), targets[start : start + size]

    def read(self) -> LabelledImages:
        """[N, ...] of each input, with their targets."""
        end = self.first + self.count
        images, targets = gathered(self.batches, end)
        return feeds.cut(images, self.first, end), targets[self.first :]


@dataclass(frozen=True, slots=True)
class Int8:
    """What the making of each int8 file took, by its name, what it was judged by and on how many images."""

    files: Mapping[str, Quantised]
    judged_on: int
    measure: Measure


def make_precisions(work: Work, exported: Files, task: NetworkTask) -> Iterator[Files]:
    """The files the recipe asks for, one precision after the other; int8 has a gate for each of its forms."""
    artifacts = _asked_for(work)

    # what an earlier run with another recipe made must not pass for this one's
    for stale in {FP16, INT8, INT8_TENSORRT} - set(artifacts):
        (work.stages.folder / stale.name).unlink(missing_ok=True)

    shipped = exported.paths[SHIPPED]
    images = _known(work, RangeImages(shipped, work.calibration, _range_count(work)))
    owners = node_layers(shipped, layers_of(work.dense)) if artifacts else {}
    if FP16 in artifacts:
        yield _make_fp16(work, shipped, images, owners)
    if INT8 in artifacts:
        yield _make_int8(work, shipped, images, owners, task)


def _asked_for(work: Work) -> tuple[Artifact, ...]:
    """Those beside fp32; int8 in each of the forms that somebody takes."""
    wanted = wanted_precisions(work.recipe.precisions)
    artifacts = [FP16] if "fp16" in wanted else []
    if "int8" in wanted:
        artifacts.append(INT8)
        if work.recipe.targets:
            artifacts.append(INT8_TENSORRT)
    return tuple(artifacts)


def _known(work: Work, images: RangeImages) -> Known:
    return Known(images, [work.splits.hashes["calibration"], work.prepared_as, images.count])


def layers_of(network: fx.GraphModule) -> dict[str, str]:
    """Layer by name of the traced graph's node; the shipped graph has the dense one's names."""
    return {node.name: node.meta["layer"] for node in network.graph.nodes if node.meta.get("layer")}


def _layers(nodes: Sequence[str], owners: Mapping[str, str]) -> tuple[str, ...]:
    """Nodes are named by the layers they belong to, as everything else in the report."""
    return tuple(dict.fromkeys(owners.get(node, node) for node in nodes))


def _make_fp16(work: Work, shipped: Path, images: Known, owners: Mapping[str, str]) -> Files:
    islands = work.stages.make(
        "fp16",
        _halved,
        Keeper(_write_islands, _read_islands),
        place=kernels_here(),
        shipped=shipped,
        images=images,
        folder=work.stages.output,
    )
    return Files({FP16: work.stages.folder / FP16.name}, {FP16: Lowered(_layers(islands, owners))})


def _halved(shipped: Path, images: RangeImages, folder: Path, progress: Progress) -> tuple[str, ...]:
    """Writes the fp16 file; names the nodes that stay in fp32, as half floats would overflow there."""
    progress(0.0, "ranges of the activations")
    half = to_fp16(shipped, folder / FP16.name, statistics=images.statistics)
    return tuple(sorted(half.islands))


def _write_islands(folder: Path, islands: Sequence[str]) -> None:
    write_json(folder / "fp16.json", {"schema": "fp16/1", "islands": islands})


def _read_islands(folder: Path) -> tuple[str, ...]:
    return tuple(read_json(folder / "fp16.json", "fp16/1")["islands"])


def _make_int8(work: Work, shipped: Path, images: Known, owners: Mapping[str, str], task: NetworkTask) -> Files:
    """The int8 file in each form, with a gate each; no file where no choice of layers in float loses little enough."""
    limit, judges = work.recipe.max_int8_loss, judge_images_of(work)
    forms = [artifact for artifact in _asked_for(work) if artifact.precision == "int8"]
    hashes = [work.splits.hashes["calibration"], work.splits.hashes["search"]]
    try:
        int8 = work.stages.make(
            "int8",
            _quantised,
            Keeper(_write_int8, _read_int8),
            place=kernels_here(),
            shipped=shipped,
            forms=forms,
            images=images,
            judges=Known(judges, [hashes, work.prepared_as, judges.first, judges.count]),
            task=task.itself,
            max_loss=limit / 100,
            folder=work.stages.output,
        )
    except FileRefused as error:
        return Files(checks=_refused(error, judges, limit))

    lowered = {form: _lowered(int8.files[form.name], owners) for form in forms}
    doubt = too_few(judges.count, limit) if task.chosen.classifies else ""
    checks = until_failed(_int8_checks(form, int8, judges, limit, doubt) for form in forms)
    return Files({form: work.stages.folder / form.name for form in forms}, lowered, checks)


def _lowered(quantised: Quantised, owners: Mapping[str, str]) -> Lowered:
    return Lowered(_layers(quantised.kept, owners), quantised.method, quantised.bits, quantised.islands)


def _int8_checks(form: Artifact, int8: Int8, judges: JudgeImages, limit: float, doubt: str) -> Checks:
    quantised, name = int8.files[form.name], _gate_name(form, judges, int8.measure)
    # rounded, so that the ties' breakers (some 3e-5, see `_judge`) don't count as answers
    lost = round(quantised.reference, 4) - round(quantised.score, 4)
    return gate(name, 100 * lost, limit=limit, remedy=_REMEDY, unit=int8.measure.unit, doubt=doubt)


def _refused(error: FileRefused, judges: JudgeImages, limit: float) -> Checks:
    name, reason = _gate_name(error.artifact, judges, error.measure), f"{error}; or {_REMEDY}"
    row = gate(name, math.nan, limit=limit, remedy=reason, unit=error.measure.unit)
    return row + Checks(refusal=f"gate '{name}' failed: {reason}")


def _gate_name(artifact: Artifact, judges: JudgeImages, measure: Measure) -> str:
    form = f", form for {artifact.made_for}" if artifact.made_for else ""
    return f"int8: {measure.metric} lost on {judges.count} {judges.source} images{form}"


_REMEDY = "leave int8 out (--precisions fp32,fp16), allow more with --max-int8-loss, or give more calibration images"


def _quantised(
    shipped: Path,
    forms: Sequence[Artifact],
    images: RangeImages,
    judges: JudgeImages,
    task: NetworkTask,
    max_loss: float,
    folder: Path,
    progress: Progress,
) -> Int8:
    """Writes the int8 file in each form. Raises FileRefused at the first that can't lose as little as `max_loss`."""
    evidence, measure = _evidence(shipped, images, judges, task, max_loss, progress)
    files: dict[str, Quantised] = {}
    quantised: Quantised | None = None
    for form in forms:
        # the choices made for one form are tried first for the next
        try:
            quantised = _quantised_for(form, shipped, folder / form.name, evidence, quantised, progress)
        except GateError as error:
            raise FileRefused(form, str(error), measure) from error
        files[form.name] = replace(quantised, path=form.name)
    return Int8(files, judges.count, measure)


def _quantised_for(
    form: Artifact, shipped: Path, out: Path, evidence: Evidence, like: Quantised | None, progress: Progress
) -> Quantised:
    """Without the file where it can't be made."""
    placement: Placement = "tensorrt" if form.made_for else "onnxruntime"
    try:
        return quantise(
            shipped,
            out,
            evidence=evidence,
            placement=placement,
            like=like,
            progress=lambda share: progress(share, f"what each layer costs ({placement})"),
        )
    except GateError:
        out.unlink(missing_ok=True)
        raise


def _evidence(
    shipped: Path, ranging: RangeImages, judges: JudgeImages, task: NetworkTask, max_loss: float, progress: Progress
) -> tuple[Evidence, Measure]:
    """What int8 is decided by, and what the judge among it goes by."""
    images, targets = judges.read()
    if task.chosen.classifies:
        measure = Measure(metric_of(task.chosen))
        score = _judge(shipped, feeds.as_tuple(images)[0], np.asarray(targets))
    else:
        score, measure = _judge_by_task(shipped, judges, task)
    progress(0.0, "ranges of the activations")
    statistics = ranging.statistics
    progress(0.0, "what the layers read")
    evidence = Evidence(
        statistics=statistics,
        rounding=ranging.rounding(),
        images=feeds.cut(images, 0, SENSITIVITY_IMAGES),
        score=score,
        reference=score(shipped, "onnxruntime"),
        max_loss=max_loss,
    )
    return evidence, measure


def _write_int8(folder: Path, int8: Int8) -> None:
    rows = {name: {**asdict(quantised), "judged_on": int8.judged_on} for name, quantised in int8.files.items()}
    write_json(folder / "int8.json", {"schema": "int8/3", "measure": asdict(int8.measure), "files": rows})


def _read_int8(folder: Path) -> Int8:
    files: dict[str, Quantised] = {}
    judged_on = 0
    content = read_json(folder / "int8.json", "int8/3")
    for name, row in content["files"].items():
        judged_on = row.pop("judged_on")
        islands = row["islands"]
        lists = {"kept": tuple(row["kept"]), "islands": None if islands is None else tuple(islands)}
        files[name] = Quantised(**{**row, **lists})
    return Int8(files, judged_on, Measure(**content["measure"]))


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


def _judge_by_task(
    original: Path, judges: JudgeImages, task: NetworkTask
) -> tuple[Callable[[Path, Placement], float], Measure]:
    """1 less what a file loses of the task's quality, which without targets is counted against the original's answers.

    With what the quality is called. Ties are broken by the distance to the original, as above.
    """
    data = list(judges.parts())
    reference = remembered(predict_of_file(original, at_once=8), data)
    judge = task.against(reference)
    figure = judge.quality(reference, data)

    def score(path: Path, placement: Placement) -> float:
        if path == original:
            return 1.0
        answers = remembered(predict_of_file(path, fused=placement == "onnxruntime", at_once=8), data)
        lost = figure.lost(judge.quality(answers, data)) / 100
        distance = relative_error(judge, ((answers(inputs), reference(inputs)) for inputs, _ in data))
        closeness_db = -10 * math.log10(max(distance, 1e-30))
        return 1.0 - lost + 1e-7 * min(600.0, max(0.0, 300 + closeness_db))

    return score, Measure(figure.metric, figure.is_share)


def _outputs(path: Path, images: Arrays, placement: Placement) -> Array:
    """[N, classes], eight images at a time."""
    session = open_model(path, fused=placement == "onnxruntime")
    outputs = feeds.joined(list(map(session.run, feeds.parted(images, 8))))
    return feeds.as_tuple(outputs)[0]


def _range_count(work: Work) -> int:
    """A quarter of the calibration images at most, so that enough are left to judge."""
    return min(RANGE_IMAGES, max(1, len(work.splits.calibration) // 4))


def judge_images_of(work: Work) -> JudgeImages:
    """Spare images, which served nothing yet, where there are enough; else calibration images.

    Those behind the images that the ranges come from; all, where there is only one.
    """
    spare, count = work.splits.search, len(work.splits.calibration)
    if len(spare) >= LEAST_SPARE:
        judging = judging_of(work.recipe, spare)  # the others have taught the network
        return JudgeImages(batches(judging, work.recipe.batch_size), 0, len(judging), "spare")
    ranged = _range_count(work)
    if count <= ranged:
        return JudgeImages(work.calibration, 0, count, "calibration")
    return JudgeImages(work.calibration, ranged, min(JUDGE_IMAGES, count - ranged), "calibration")


def gathered(source: Batches, count: int) -> LabelledImages:
    """The first `count` images [N, ...] of each input with their targets, or as many as there are."""
    images: list[Arrays] = []
    targets: list[KnownTargets] = []
    taken = 0
    for batch, batch_targets in source:
        images.append(arrays_of(batch))
        targets.append(batch_targets)
        taken += feeds.count(images[-1])
        if taken >= count:
            break
    return feeds.cut(feeds.joined(images), 0, count), _joined_targets(targets)[:count]


def _joined_targets(targets: Sequence[KnownTargets]) -> KnownTargets:
    """One tensor behind the other; lists of boxes as one list."""
    tensors = [batch for batch in targets if isinstance(batch, Tensor)]
    if tensors:
        return torch.cat(tensors)
    return [boxes for batch in targets for boxes in batch]
