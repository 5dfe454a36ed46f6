"""Pictures of what both networks answer, and which pixels speak for it, on the images where they differ most.

Two networks, a task and some evaluation images in, a PNG for each of the images that were chosen out: the task's
distance chooses, LRP to the input shows. It tells a reader something and judges nothing: what can't be drawn is said
and ends no run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
from torch import Tensor, fx

from ..errors import CompressorError
from ..files import file_sha256, read_json, write_bytes, write_json
from ..graph.interface import input_nodes
from ..inputs.images import Batches, Preprocessing, visible
from ..records import FloatArray
from ..relevance.lrp import LrpOptions, Prepared
from ..relevance.lrp import prepare as prepare_lrp
from ..relevance.spelling import composite_of
from ..relevance.starts import objective_of
from ..report import PictureRow
from ..report.views import Comparison
from ..run.checks import Checks
from ..run.fingerprints import PACKAGE, Known
from ..run.stages import Keeper, Progress
from ..run.tasking import NetworkTask, predict_of
from ..run.work import Work
from ..tasks import Leaves, Predict, Targets, Task, reference_of
from ..tasks.comparison import classes_of, labels_of, pixels_of
from ..tensors import Inputs, as_tuple, count, cut
from .results import Outcome, Pictures, stands_for
from .spots import Spotter, spots_of
from .views import Pair, views_of

LOOKED_AT = 64
PICTURES = 4
_DECISIONS = {"classification": classes_of, "multi-label": labels_of, "segmentation": pixels_of}
_DRAWING = ("explanation.py", "pictures.py", "plots.py")  # of the report, whose sources are in no stage's key


def make_pictures(work: Work, outcome: Outcome) -> Pictures:
    """Images on which both networks differ most, and what each sees in them.

    None where both are one network. Where drawing fails there is none either, and `checks` say why.
    """
    if outcome.is_dense:
        return Pictures()
    try:
        return work.stages.make(
            "pictures",
            _drawn,
            Keeper(_write, _read),
            place=[file_sha256(PACKAGE / "report" / name) for name in _DRAWING],
            networks=Known({"dense": work.dense, "shipped": outcome.network}, stands_for(work.stages.keys)),
            images=work.first_evaluation_images(LOOKED_AT),
            task=outcome.task.itself,
            spots=spots_of(work, outcome),
            lrp=LrpOptions(composite=composite_of(work.recipe.composite), accept=work.recipe.accept),
            preprocessing=work.preprocessing,
            names=tuple(work.splits.evaluation.class_names or work.model.class_names or ()),
        )
    except OSError:  # a disk that is full stops more than pictures
        raise
    except Exception as error:  # whatever it is, nothing of the run depends on it
        return Pictures(checks=Checks(not_checked=(f"what the networks see was not drawn: {reason_of(error)}",)))


def reason_of(error: Exception) -> str:
    """The first line of an error, with its kind where it is none of ours."""
    text, *_ = str(error).strip().splitlines() or ["no message"]
    if isinstance(error, CompressorError):
        return text
    return f"{type(error).__name__}: {text}"


def _drawn(
    networks: Mapping[str, fx.GraphModule],
    images: Batches,
    task: NetworkTask,
    spots: Spotter | None,
    lrp: LrpOptions,
    preprocessing: Preprocessing | None,
    names: tuple[str, ...],
    progress: Progress,
) -> Pictures:
    from ..report.pictures import draw_comparison  # brings matplotlib, which only what is drawn needs

    dense, shipped = predict_of(networks["dense"]), predict_of(networks["shipped"])
    judge = judge_of(task, dense, images)
    distances = distances_between(judge, dense, shipped, images)
    chosen = farthest(distances, PICTURES)
    samples = samples_at(images, chosen)
    chosen_inputs = [inputs for inputs, _ in samples]
    asked = [asked_of(task, dense(inputs), targets) for inputs, targets in samples]
    progress(0.0, "which pixels they see")
    heats, lack = _relevances(networks, lrp, judge, chosen_inputs, asked)
    masks, unmasked = _masks(networks, spots, chosen_inputs)

    rows: list[PictureRow] = []
    drawings: dict[str, bytes] = {}
    for number, (index, inputs) in enumerate(zip(chosen, chosen_inputs, strict=True)):
        answers = Pair(dense(inputs), shipped(inputs), names, task.chosen.parts.functions.get("decode"))
        (view_dense, view_shipped), shows = views_of(task.chosen.name, answers)
        shown = Comparison(visible_of(inputs, preprocessing), view_dense, view_shipped, *heats[number])
        if masks[number]:
            shown = replace(shown, mask_dense=masks[number][0], mask_shipped=masks[number][1])

        name = f"seen-{number + 1}"
        rows.append(PictureRow(name, str(images.images.names[index]), float(distances[index]), shows))
        drawings[name] = draw_comparison(shown)
    return Pictures(tuple(rows), drawings, len(distances), Checks(not_checked=(*lack, *unmasked)))


def judge_of(task: NetworkTask, dense: Predict, images: Batches) -> Task:
    """The task on what `dense` answers; what it is compared with is taken from these images where it is not stated."""
    reference = task.reference or reference_of(dense, images)
    return replace(task, reference=reference).against(dense)


def distances_between(judge: Task, dense: Predict, shipped: Predict, images: Batches) -> FloatArray:
    """[images] by the task's distance, infinite where an answer is not finite."""
    by_batch = [judge.distance(shipped(inputs), dense(inputs)).double().numpy() for inputs, _ in images]
    distances: FloatArray = np.nan_to_num(np.concatenate(by_batch), nan=np.inf, posinf=np.inf)
    return distances


def farthest(distances: FloatArray, most: int) -> list[int]:
    """The `most` images of the largest distances, the largest first; of equal ones the earlier."""
    indices: list[int] = np.argsort(-distances, kind="stable")[:most].tolist()
    return indices


def samples_at(images: Batches, chosen: Sequence[int]) -> list[tuple[Inputs, Targets]]:
    """The chosen images one by one, [1, ...], with their targets, in the order that they were chosen in."""
    samples: dict[int, tuple[Inputs, Targets]] = {}
    start = 0
    for inputs, targets in images:
        end = start + count(inputs)
        for index in set(chosen).intersection(range(start, end)):
            place = index - start  # in the batch
            samples[index] = cut(inputs, place, place + 1), targets[place : place + 1]
        start = end
    return [samples[index] for index in chosen]


Heats = tuple[FloatArray, ...]  # [H, W] of both networks, relevance or masks; none of an input that is no image


def _relevances(
    networks: Mapping[str, fx.GraphModule],
    lrp: LrpOptions,
    judge: Task,
    inputs: Sequence[Inputs],
    targets: Sequence[Targets],
) -> tuple[Sequence[Heats], tuple[str, ...]]:
    """For every image its pixels' relevance in both networks; where that fails for none, and why."""
    try:
        prepared = [prepared_for(network, lrp, judge) for network in networks.values()]
        return [_heats(prepared, *sample) for sample in zip(inputs, targets, strict=True)], ()
    except Exception as error:  # the answers are drawn without it
        return [()] * len(inputs), (f"which pixels the networks see was not drawn: {reason_of(error)}",)


def prepared_for(network: fx.GraphModule, lrp: LrpOptions, judge: Task) -> Prepared:
    """The network, made ready for relevance that starts where the task says."""
    return prepare_lrp(network, replace(lrp, objective=objective_of(network, judge)))


def _heats(prepared: Sequence[Prepared], inputs: Inputs, targets: Targets) -> Heats:
    if image_of(inputs) < 0:
        return ()
    return tuple(_relevance(network, inputs, targets) for network in prepared)


def _masks(
    networks: Mapping[str, fx.GraphModule], spots: Spotter | None, inputs: Sequence[Inputs]
) -> tuple[Sequence[Heats], tuple[str, ...]]:
    """For every image the selector's masks in both networks; where there are none, and why if they should be."""
    if spots is None:
        return [()] * len(inputs), ()
    masks: list[Heats] = []
    try:
        for image in inputs:
            dense, shipped = spots.masks(networks["dense"], networks["shipped"], image)  # [1, 1, H, W] each
            masks.append((dense[0, 0].double().numpy(), shipped[0, 0].double().numpy()))
    except Exception as error:  # the rest is drawn without them
        return [()] * len(inputs), (f"the selector's masks were not drawn: {reason_of(error)}",)
    return masks, ()


def asked_of(task: NetworkTask, dense: Leaves, targets: Targets) -> Targets:
    """What relevance is asked of both networks: the dense one's decisions, so that they are asked the same.

    A user's own `says` gets the data's targets, as everywhere.
    """
    decide = _DECISIONS.get(task.chosen.name)
    if decide is None or "says" in task.chosen.parts.functions:
        return targets
    return decide(dense)


def _relevance(prepared: Prepared, inputs: Inputs, targets: Targets) -> FloatArray:
    """[H, W] of the image, summed over its channels."""
    node = input_nodes(prepared.graph)[image_of(inputs)].name
    relevance = prepared(inputs, targets, [node])[node]
    summed: FloatArray = relevance[0].sum(0).double().numpy()
    return summed


def image_of(inputs: Inputs) -> int:
    """Which of the inputs is shown: the first of real numbers [1, C, H, W]; -1 where none is."""
    for index, tensor in enumerate(as_tuple(inputs)):
        if tensor.dim() == 4 and tensor.is_floating_point():
            return index
    return -1


def visible_of(inputs: Inputs, preprocessing: Preprocessing | None) -> FloatArray | None:
    """[H, W, 3] in 0-1; the first channel in grey where the pre-processing is not known. None where it is no image."""
    index = image_of(inputs)
    if index < 0:
        return None
    image: Tensor = as_tuple(inputs)[index][0]  # [C, H, W]
    if preprocessing is not None and len(image) == len(preprocessing.mean):
        return visible(image.double().numpy(), preprocessing)
    first = image[0].double()
    low, high = float(first.min()), float(first.max())
    grey = ((first - low) / (high - low or 1.0)).numpy()
    return np.repeat(grey[:, :, None], 3, axis=2)


def _write(folder: Path, pictures: Pictures) -> None:
    for name, png in pictures.images.items():
        write_bytes(_file(folder, name), png)
    rows = [asdict(replace(row, distance=min(row.distance, _FAR))) for row in pictures.rows]
    content = {"rows": rows, "looked_at": pictures.looked_at, "not_checked": list(pictures.checks.not_checked)}
    write_json(folder / "pictures.json", {"schema": "pictures/1", **content})


_FAR = 1e30  # JSON knows no infinity


def _read(folder: Path) -> Pictures:
    content = read_json(folder / "pictures.json", "pictures/1")
    rows = tuple(PictureRow(**row) for row in content["rows"])
    images = {row.name: _file(folder, row.name).read_bytes() for row in rows}
    return Pictures(rows, images, content["looked_at"], Checks(not_checked=tuple(content["not_checked"])))


def _file(folder: Path, name: str) -> Path:
    return folder / "plots" / f"{name}.png"
