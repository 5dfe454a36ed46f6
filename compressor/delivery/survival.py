"""How well the explanation survived: whether the smaller network finds the same places of an input relevant.

Dense and shipped network and some evaluation images in, the rank correlation of their relevance at the input (LRP) out,
the mean over images. Like the pictures it tells a reader something and judges nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import rankdata
from torch import Tensor, fx

from ..files import read_json, write_json
from ..graph.interface import input_nodes
from ..inputs.images import Batches
from ..records import FloatArray, Quality, figure_fields, figure_of
from ..relevance.lrp import LrpOptions
from ..relevance.spelling import composite_of
from ..run.checks import Checks
from ..run.fingerprints import Known
from ..run.stages import Keeper, Progress
from ..run.tasking import NetworkTask, predict_of
from ..run.work import Work
from ..steering.masks import overlap
from ..tensors import Inputs, as_tuple
from .pictures import asked_of, judge_of, prepared_for, reason_of
from .results import Outcome, Survival, stands_for
from .spots import Spotter, spots_of

IMAGES = 64
METRIC, MASKS = "rank correlation of relevance", "overlap of the selector's masks"


def measure_survival(work: Work, outcome: Outcome) -> Survival:
    """Taken once; where relevance can't be had, a line that says why. Nothing where both networks are one."""
    if outcome.is_dense:
        return Survival()
    try:
        return work.stages.make(
            "explanation",
            _measured,
            Keeper(_write, _read),
            networks=Known({"dense": work.dense, "shipped": outcome.network}, stands_for(work.stages.keys)),
            images=work.first_evaluation_images(IMAGES),
            task=outcome.task.itself,
            spots=spots_of(work, outcome),
            lrp=LrpOptions(composite=composite_of(work.recipe.composite), accept=work.recipe.accept),
        )
    except OSError:  # a disk that is full stops more than this
        raise
    except Exception as error:  # whatever it is, nothing of the run depends on it
        return Survival(checks=Checks(not_checked=(f"how well the explanation survived: {reason_of(error)}",)))


def _measured(
    networks: Mapping[str, fx.GraphModule],
    images: Batches,
    task: NetworkTask,
    spots: Spotter | None,
    lrp: LrpOptions,
    progress: Progress,
) -> Survival:
    place = _input_of(next(iter(images))[0])
    if place < 0:
        return Survival(checks=Checks(not_checked=("how well the explanation survived: no input of real numbers",)))
    dense = predict_of(networks["dense"])
    judge = judge_of(task, dense, images)
    prepared = [prepared_for(network, lrp, judge) for network in networks.values()]
    correlations: list[float] = []
    overlaps: list[float] = []
    for done, (inputs, targets) in enumerate(images):
        progress(done / len(images))
        asked = asked_of(task, dense(inputs), targets)
        maps = []
        for network in prepared:
            node = input_nodes(network.graph)[place].name
            maps.append(maps_of(network(inputs, asked, [node])[node]))
        correlations += rank_correlations(*maps).tolist()
        if spots is not None:
            masks = spots.masks(networks["dense"], networks["shipped"], inputs)
            overlaps += overlap(*masks).tolist()
    return Survival(figure_of_images(correlations), figure_of_images(overlaps, MASKS))


def _input_of(inputs: Inputs) -> int:
    """The first input of real numbers with several values a sample; -1 where none is."""
    for index, tensor in enumerate(as_tuple(inputs)):
        if tensor.is_floating_point() and tensor[0].numel() > 1:
            return index
    return -1


def maps_of(relevance: Tensor) -> FloatArray:
    """[N, places]: of images summed over their channels."""
    summed = relevance.sum(1) if relevance.ndim >= 4 else relevance
    maps: FloatArray = summed.detach().cpu().double().flatten(1).numpy()
    return maps


def rank_correlations(dense: FloatArray, other: FloatArray) -> FloatArray:
    """Spearman's of each row of [N, places]; 0 where `other` is the same everywhere, NaN where `dense` is."""
    ranks = [rankdata(rows, axis=1) for rows in (dense, other)]
    centred = [rows - rows.mean(axis=1, keepdims=True) for rows in ranks]
    norms = [np.sqrt((rows**2).sum(axis=1)) for rows in centred]
    products = (centred[0] * centred[1]).sum(axis=1)
    correlations = np.divide(products, norms[0] * norms[1], out=np.zeros(len(products)), where=norms[0] * norms[1] > 0)
    correlations[norms[0] == 0] = np.nan
    return np.asarray(correlations)


def figure_of_images(correlations: list[float], metric: str = METRIC) -> Quality | None:
    """Their mean and its 95 % interval; None where no image tells places apart."""
    values = np.array(correlations)
    values = values[np.isfinite(values)]
    if not len(values):
        return None
    mean, half = float(values.mean()), 0.0
    if len(values) > 1:
        half = 1.96 * float(values.std(ddof=1)) / np.sqrt(len(values))
    return Quality(metric, mean, len(values), max(-1.0, mean - half), min(1.0, mean + half), chance=0.0)


def _write(folder: Path, survival: Survival) -> None:
    figure = survival.figure and figure_fields(survival.figure)
    masks = survival.masks and figure_fields(survival.masks)
    content = {"figure": figure, "masks": masks, "not_checked": list(survival.checks.not_checked)}
    write_json(folder / "explanation.json", {"schema": "explanation/1", **content})


def _read(folder: Path) -> Survival:
    content = read_json(folder / "explanation.json", "explanation/1")
    checks = Checks(not_checked=tuple(content["not_checked"]))
    return Survival(_read_quality(content["figure"]), _read_quality(content["masks"]), checks)


def _read_quality(entries: dict[str, Any] | None) -> Quality | None:
    if entries is None:
        return None
    figure = figure_of(entries)
    assert isinstance(figure, Quality)
    return figure
