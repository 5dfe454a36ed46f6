"""A run's networks in, a figure of each on evaluation images out: by the task's measure, and its nearness to the
dense one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import fx

from ..accuracy import evaluate
from ..files import read_json, write_json
from ..inputs.images import Batches
from ..pruning import Structure
from ..records import Accuracy, Quality, figure_fields, figure_of
from ..run.fingerprints import Known
from ..run.saved import rebuild
from ..run.stages import Keeper, Progress
from ..run.tasking import NetworkTask, metric_of, predict_of
from ..run.work import Work, own_share
from ..tasks import fidelity
from .recovery import Recovered, name_of_shipped
from .removal import Pruned

FIDELITY_IMAGES = 256  # of the evaluation images; more would cost as much again as the accuracy does


def measure_accuracy(
    work: Work, structure: Structure, pruned: Pruned, recovered: Recovered, task: NetworkTask
) -> dict[str, Accuracy | Quality]:
    """Held-out quality of every network, dense to shipped, by the task's measure; the shipped one's loss is a gate."""
    removed = rebuild(work.base, structure, dict(pruned.plan.kept))
    networks = {"dense": work.dense, "removed": removed, "repaired": pruned.network}
    if recovered.tuned is not None:
        networks["tuned"] = recovered.tuned
    accuracy = measure_networks(work, networks, work.stages.keys["finetune"], task)
    return {**accuracy, "shipped": accuracy[name_of_shipped(recovered)]}


def measure_networks(
    work: Work, networks: Mapping[str, fx.GraphModule], origin: str, task: NetworkTask
) -> dict[str, Accuracy | Quality]:
    """Of each network by its name, on the evaluation images; `origin` is the key of the stage that made the last."""

    # a user's own function is given all images: nobody knows what it sums
    own_quality = "quality" in task.chosen.parts.functions
    images = work.evaluation_images if own_quality else own_share(work.evaluation_images)
    return work.stages.make(
        "accuracy",
        _measured,
        _kept_as_figures("accuracy.json", list(networks)),
        networks=Known(networks, [origin, list(networks)]),
        images=images,
        task=task.itself,
    )


def _kept_as_figures(file: str, names: Sequence[str]) -> Keeper[dict[str, Accuracy | Quality]]:
    """One figure for each network, as JSON."""

    def write(folder: Path, figures: dict[str, Accuracy | Quality]) -> None:
        rows = {name: figure_fields(figure) for name, figure in figures.items()}
        write_json(folder / file, {"schema": "figures/1", "networks": rows})

    def read(folder: Path) -> dict[str, Accuracy | Quality]:
        rows = read_json(folder / file, "figures/1")["networks"]
        return {name: figure_of(rows[name]) for name in names}

    return Keeper(write, read)


def _measured(
    networks: Mapping[str, fx.GraphModule], images: Batches, task: NetworkTask, progress: Progress
) -> dict[str, Accuracy | Quality]:
    total = len(networks) * max(1, len(images.images))
    ranks = images.turns[1]  # each of which is about as far
    figures: dict[str, Accuracy | Quality] = {}
    judge = task.task
    for index, (name, network) in enumerate(networks.items()):
        before = index * len(images.images)

        def say(done: int, before: int = before) -> None:
            progress((before + ranks * done) / total)

        if judge is None:
            figures[name] = evaluate(network, images, metric=metric_of(task.chosen), progress=say)
        else:
            say(0)
            figures[name] = judge.quality(predict_of(network), images)
    return figures


def measure_fidelity(work: Work, pruned: Pruned, recovered: Recovered) -> dict[str, Accuracy | Quality]:
    """How near the repaired and the tuned network's answers are to the dense one's, on some evaluation images.

    It needs no labels, so it stands beside every other figure.
    """
    networks = {"repaired": pruned.network}
    if recovered.tuned is not None:
        networks["tuned"] = recovered.tuned
    near_dense = measure_nearness(work, networks, work.stages.keys["finetune"])
    return {**near_dense, "shipped": near_dense[name_of_shipped(recovered)]}


def measure_nearness(work: Work, networks: Mapping[str, fx.GraphModule], origin: str) -> dict[str, Accuracy | Quality]:
    """Of each network by its name; `origin` is the key of the stage that made the last."""
    images = own_share(work.first_evaluation_images(FIDELITY_IMAGES))
    return work.stages.make(
        "fidelity",
        _compared,
        _kept_as_figures("fidelity.json", list(networks)),
        dense=Known(work.dense, work.stages.keys.get("groups", origin)),
        networks=Known(networks, [origin, list(networks)]),
        images=images,
    )


def _compared(
    dense: fx.GraphModule, networks: Mapping[str, fx.GraphModule], images: Batches, progress: Progress
) -> dict[str, Accuracy | Quality]:
    figures: dict[str, Accuracy | Quality] = {}
    for index, (name, network) in enumerate(networks.items()):
        progress(index / len(networks))
        figures[name] = fidelity(predict_of(network), predict_of(dense), images)
    return figures
