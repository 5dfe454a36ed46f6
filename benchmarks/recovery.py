"""What all images give back: the repaired network taught by the dense one, over 200, 1,000 and all images, no labels.

    python benchmarks/recovery.py --networks resnet20,resnet56 --kept 0.5,0.35 --minutes 30
    python benchmarks/recovery.py --networks resnet20 --images all --peer --fastnas
Of the images of a point a tenth (a fifth of few, 512 at most) tells when to end, as many choose between repaired and
recovered, the others teach; the first 500 of those repair. Evaluation images are counted once, at the end. `--peer`
gives the same recovery to torch_pruning's plan (`--setting`), `--fastnas` to ModelOpt's (`--fastnas-setting`, or
`all` for each one repaired only). OUT/points.jsonl holds what is done, with the fidelity over the minutes; a point
that is killed goes on where it was. The last line is JSON.
"""

from __future__ import annotations

import argparse
import copy
import functools
import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from accuracy import peer_subject, with_repaired_norms
from fastnas import FASTNAS_SETTINGS, FastNas, fastnas_to, require_fastnas
from peer import SETTINGS, prune_to
from study import (
    Points,
    Row,
    Study,
    Subjects,
    add_flags,
    draw_panels,
    finish,
    make_subjects,
    pool_of,
    read_studies,
    run,
    seeds_of,
    spread,
)
from torch import fx

from compressor.accuracy import evaluate
from compressor.budgets import Budget
from compressor.choices import choices_of
from compressor.errors import CompressorError
from compressor.files import content_hash
from compressor.graph import trace
from compressor.graph.cost import measure_cost
from compressor.inputs.images import Batches, Images, batches
from compressor.inputs.models import load_model
from compressor.pruning import slices_of
from compressor.records import Slices
from compressor.recovery import RecoveryOptions, recover
from compressor.repair.better_of_two import choose
from compressor.rounds import Prunable, pruning_round

REPAIRED, RECOVERED = "repaired", "recovered"
REPAIR_IMAGES = 500
LEAST, MOST = 50, 512  # images that tell when to end, and that choose
FEW_APART, MANY_APART = 5, 10  # one image of so many does each: no more than the first share, no fewer than the second
OURS = "ours"
ALL = "all"


@dataclass(frozen=True, slots=True, eq=False)
class Parts:
    """What the images of a point serve; `judges` have the dense network's answers for labels."""

    taught: Batches
    held: Batches
    judges: Batches


@dataclass(frozen=True, slots=True, eq=False)
class Start:
    """A smaller network as a recovery begins with it."""

    network: fx.GraphModule
    macs_kept: float
    slices: Slices | None


def parted(images: Images) -> tuple[Images, Images, Images]:
    """Those that teach, those that tell when to end and those that choose: the last ones of the order."""
    apart = min(MOST, max(len(images) // MANY_APART, min(LEAST, len(images) // FEW_APART)))
    ends = [0, len(images) - 2 * apart, len(images) - apart, len(images)]
    taught, held, judges = (images.subset(np.arange(*span)) for span in itertools.pairwise(ends))
    return taught, held, judges


def answered(images: Images, dense: fx.GraphModule, batch_size: int) -> Images:
    """The images with the dense network's answers for labels."""
    with torch.no_grad():
        classes = [dense(inputs).argmax(1).numpy() for inputs, _ in batches(images, batch_size)]
    return images.labelled(np.concatenate(classes).astype(np.int64))


def measure(
    study: Study, seed: int, counts: Sequence[int], points: Points, options: argparse.Namespace
) -> Iterator[Row]:
    """Every point of one network and one seed, the repaired start of each beside it."""

    @functools.cache
    def read() -> tuple[Any, Images, Images]:
        recipe = replace(study.recipe, seed=seed)
        model = load_model(recipe.model, recipe.weights or None)
        return model, *pool_of(recipe, model)

    for count in counts:
        subjects = functools.cache(lambda count=count: subjects_with(study, seed, read(), count))
        for share in study.kept:
            for plan, states in _plans(options):
                begin = functools.cache(lambda s=share, p=plan, f=subjects: start_of(f()[0], s, p, seed))
                for state in states:
                    name = f"{plan}, {state}, {count or 'all'} images"
                    named = {"network": study.name, "seed": seed, "asked": share, "variant": name, "state": state}
                    named |= {"plan": plan, "images_given": count}
                    teaching = _teaching(options, seed)
                    depends = [asdict(study.recipe), count, asdict(teaching) if state == RECOVERED else None]
                    folder = None if state == REPAIRED else options.out / "begun" / content_hash(named)[:16]

                    def work(f: Any = subjects, b: Any = begin, o: Any = teaching, at: Path | None = folder) -> Row:
                        return attempt(f, b, o, at)

                    yield points.measure(named, depends, work)


def _plans(options: argparse.Namespace) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Whose plans are followed, and which states of each are measured."""
    yield OURS, (REPAIRED, RECOVERED)
    if options.peer:
        yield options.setting, (REPAIRED, RECOVERED)
    if options.fastnas and options.fastnas_setting == ALL:
        for setting in FASTNAS_SETTINGS:
            yield str(setting), (REPAIRED,)
    elif options.fastnas:
        yield options.fastnas_setting, (REPAIRED, RECOVERED)


def _teaching(options: argparse.Namespace, seed: int) -> RecoveryOptions:
    return RecoveryOptions(minutes=options.minutes, passes=options.passes, features=options.features, seed=seed)


def subjects_with(study: Study, seed: int, read: tuple[Any, Images, Images], count: int) -> tuple[Subjects, Parts]:
    """The network with `count` images of the pool (0: all) dealt out; the first of those that teach repair."""
    model, pool, evaluation = read
    given = pool.subset(np.arange(min(count or len(pool), len(pool))))
    size = study.recipe.batch_size
    taught, held, judges = parted(given)
    recipe = replace(study.recipe, seed=seed)
    repairing = taught.subset(np.arange(min(REPAIR_IMAGES, len(taught))))
    subjects = make_subjects(recipe, model, repairing, evaluation)
    judges = answered(judges, subjects.dense, size)
    return subjects, Parts(batches(taught, size), batches(held, size), batches(judges, size))


def start_of(subjects: Subjects, share: float, plan: str, seed: int) -> Start:
    """Our plan repaired, or a peer's with its batch normalisations repaired where it has any."""
    if plan != OURS:
        setting = next(setting for setting in (*SETTINGS, *FASTNAS_SETTINGS) if str(setting) == plan)
        prune = fastnas_to if isinstance(setting, FastNas) else prune_to
        module, _ = prune(peer_subject(subjects), setting, share, seed=seed)
        module = with_repaired_norms(module, subjects.calibration) or module
        network = trace(copy.deepcopy(module), subjects.example)
        return Start(network, _kept(network, subjects), None)
    dense = Prunable(subjects.dense, subjects.structure)
    scores = subjects.scores(subjects.recipe, dense.network, dense.structure)
    step = pruning_round(
        dense,
        dense,
        Budget("macs", share),
        subjects.calibration,
        images=subjects.example,
        choices=choices_of(subjects.recipe),
        scores=scores,
    )
    slices = slices_of(dense.network, dense.structure, dict(step.after.kept))
    return Start(step.after.network, _kept(step.after.network, subjects), slices)


def _kept(network: fx.GraphModule, subjects: Subjects) -> float:
    return measure_cost(network).macs / measure_cost(subjects.dense).macs


def attempt(
    read: Callable[[], tuple[Subjects, Parts]],
    begin: Callable[[], Start],
    options: RecoveryOptions,
    folder: Path | None,
) -> Row:
    """Accuracy of the start, or of what ships after a recovery (`folder` holds what is begun), or why there is none."""
    subjects, parts = read()
    bounds: Row = {"dense": subjects.dense_accuracy, "chance": 1 / subjects.classes}
    try:
        start = begin()
    except (CompressorError, RuntimeError, ValueError) as refusal:
        return {"failed": str(refusal)[:200], **bounds}
    network, found = start.network, Row()
    if folder is not None:
        network, found = recovered(subjects, parts, start, options, folder)
    accuracy = evaluate(network, subjects.evaluation)
    of_dense = round(accuracy.top1 / subjects.dense_accuracy, 4)
    return {"macs_kept": start.macs_kept, "accuracy": accuracy.top1, "of_dense": of_dense, **found, **bounds}


def recovered(
    subjects: Subjects, parts: Parts, start: Start, options: RecoveryOptions, folder: Path
) -> tuple[fx.GraphModule, Row]:
    """The better of start and recovery by images that served neither, and how it came about."""
    folder.mkdir(parents=True, exist_ok=True)
    network, recovery = recover(
        subjects.dense,
        start.network,
        parts.taught,
        parts.held,
        slices=start.slices,
        options=options,
        folder=folder,
    )
    choice = choose(start.network, network, parts.judges, source="images apart")
    moments = [[round(value, 5) for value in (m.seconds, m.shown, m.distance, m.fidelity)] for m in recovery.moments]
    found = {
        "shipped": choice.shipped,
        "setting": str(recovery.setting),
        "trials": {str(trial.setting): round(trial.distance, 5) for trial in recovery.trials},
        "ended": recovery.ended,
        "taught": recovery.images,
        "moments": moments,
    }
    return (network if choice.shipped == "tuned" else start.network), found


def summarise(table: pd.DataFrame) -> list[Row]:
    """One entry for each network, share and variant: the share of the dense accuracy, mean and range over seeds."""
    entries = []
    for (network, asked, variant), part in table.groupby(["network", "asked", "variant"], sort=False):
        entries.append({"model": network, "kept": asked, "variant": variant, "of_dense": spread(part.of_dense)})
    return entries


def main() -> None:
    options = _options()
    if options.fastnas:
        require_fastnas()
    counts = [0 if text == "all" else int(text) for text in options.images.split(",")]
    points = Points(options.out / "points.jsonl")
    rows: list[Row] = []
    for study in read_studies(options):
        for seed in seeds_of(options):
            rows += measure(study, seed, counts, points, options)
    table = finish(rows, options.out)
    draw_panels(table, options.out, panels="images_given", lines="variant", style=lambda name: {}, same_height=True)
    print(json.dumps({"minutes": options.minutes, "points": summarise(table)}))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", default="200,1000,all", help="how many images there are")
    parser.add_argument("--minutes", type=float, default=30.0, help="of each recovery, at most")
    parser.add_argument("--passes", type=int, default=200, help="over the images, at most")
    parser.add_argument("--features", type=float, default=1.0, help="weight of the features in front of the head")
    parser.add_argument("--peer", action="store_true", help="torch_pruning's plan, too")
    parser.add_argument("--setting", default="taylor, isomorphic", help="torch_pruning's importance and scope")
    parser.add_argument("--fastnas", action="store_true", help="ModelOpt's FastNAS, too")
    parser.add_argument(
        "--fastnas-setting", default=ALL, help=f"one of {', '.join(map(str, FASTNAS_SETTINGS))}; or all"
    )
    add_flags(parser, kept="shares of the MACs that stay", out="runs/recovery")
    return parser.parse_args()


if __name__ == "__main__":
    run(main)
