"""What learned gates are worth, and what it is worth to steer them by the explanation: accuracy, and what survives.

    python benchmarks/steered.py --model digits-resnet
    python benchmarks/steered.py --networks resnet20 --seeds 0 --calibration 1000
Gates that keep the answers, the selector's masks, or both, beside LRP, gradient x input, Taylor, L1 and a draw; raw and
with the same repair, at equal MACs, on the same images, nothing trained afterwards. Every row has the accuracy and the
rank correlation of dense and smaller network's relevance (LRP). What the selector itself is worth is `masks.py`'s to
say. OUT/points.jsonl holds what is done; the last line is JSON.
"""

from __future__ import annotations

import argparse
import functools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, replace
from typing import Any, cast

import numpy as np
import pandas as pd
import torch
from study import (
    COLOURS,
    REPAIRS,
    Points,
    Row,
    Study,
    Subjects,
    add_flags,
    chosen,
    draw_panels,
    finish,
    ours,
    pool_of,
    read_studies,
    run,
    seeds_of,
    spread,
    subjects_of,
)
from torch import Tensor, fx

from compressor.accuracy import evaluate
from compressor.choices import scoring_of
from compressor.criteria import LEARNED as LEARNS
from compressor.delivery.survival import figure_of_images, maps_of, rank_correlations
from compressor.errors import CompressorError
from compressor.graph.interface import input_nodes
from compressor.inputs.images import batches
from compressor.recipe import Recipe
from compressor.relevance.lrp import LrpOptions, prepare
from compressor.steering import GATES, GateOptions

SPARE = 500  # images that judge in place of the evaluation images
IMAGES = 64  # of the evaluation images, on which explanations are compared
LEARNED = {"normalisation": "none", "per_cost": 0.0}  # what a unit costs is in a learned score already
RANKINGS: Mapping[str, Mapping[str, Any]] = {
    "gates": {"criterion": "gates", **LEARNED},
    "gates from lrp": {"criterion": "gates", "gates_start": "lrp", **LEARNED},
    "gates measured": {"criterion": "gates", "normalisation": "measured"},
    "isp": {"criterion": "isp", "explanation": 1.0, **LEARNED},
    "isp and answers": {"criterion": "isp", "explanation": 0.5, **LEARNED},
    "isp measured": {"criterion": "isp", "explanation": 0.5, "normalisation": "measured"},
    **{name: {"criterion": name, "normalisation": "mean"} for name in ("lrp", "gradient_x_input", "taylor", "l1")},
    "random": {"criterion": "random", "normalisation": "mean"},
    "loss measured": {"normalisation": "measured"},
}
STYLES = {"gates": "C3", "gates from lrp": "C8", "gates measured": "black", "isp": "C0", "isp and answers": "C4"}


def measure(
    study: Study, seed: int, points: Points, rankings: Iterable[str], repairs: Iterable[str], judge: str
) -> Iterator[Row]:
    """Every point of one network and one seed; the network is read only if a point is missing."""
    subjects = functools.cache(lambda: subjects_of(study, seed) if judge == "evaluation" else on_spare(study, seed))
    for ranking in rankings:
        for repair in repairs:
            recipe = replace(study.recipe, seed=seed, compensate=REPAIRS[repair], **RANKINGS[ranking])
            for share in study.kept:
                named = {"network": study.name, "seed": seed, "asked": share, "criterion": ranking, "repair": repair}
                named["variant"] = f"{ranking}, {repair}"
                if judge != "evaluation":
                    named["judge"] = judge
                yield points.measure(named, depends_on(recipe), lambda r=recipe, k=share: attempt(subjects, r, k))


def depends_on(recipe: Recipe) -> Row:
    """A recipe, and how a learned criterion learns, which its fields do not hold."""
    if recipe.criterion not in LEARNS:
        return asdict(recipe)
    return {**asdict(recipe), "steering": asdict(scoring_of(recipe).steering)}


def on_spare(study: Study, seed: int) -> Subjects:
    """The same network, judged on images that neither calibrate nor evaluate, so that constants can be chosen."""
    found = subjects_of(study, seed)
    pool, _ = pool_of(found.recipe, found.model)
    known = set(found.calibration.images.names)
    spare = [index for index, name in enumerate(pool.names) if name not in known][:SPARE]
    shown = batches(pool.subset(spare), found.recipe.batch_size)
    return replace(found, evaluation=shown, dense_accuracy=evaluate(found.dense, shown).top1)


def attempt(subjects: Callable[[], Subjects], recipe: Any, share: float) -> Row:
    """Accuracy and survival of what the recipe makes at that share, or why it can't be made."""
    found = subjects()
    bounds = {"dense": found.dense_accuracy, "chance": 1 / found.classes}
    try:
        network, at = ours(found, recipe, share)
    except CompressorError as refusal:
        return {"failed": str(refusal)[:200], **bounds}
    accuracy = evaluate(network, found.evaluation)
    survived = figure_of_images(survival(found, network))
    kept = None if survived is None else round(survived.value, 4)
    return {"macs_kept": at, "accuracy": accuracy.top1, "explanation": kept, **bounds, "images": accuracy.n}


def first_images(found: Subjects) -> Tensor:
    """[N, C, H, W] the first evaluation images."""
    parts: list[Tensor] = []
    for inputs, _ in found.evaluation:
        parts.append(inputs)
        if sum(map(len, parts)) >= IMAGES:
            break
    return torch.cat(parts)[:IMAGES]


def survival(found: Subjects, network: fx.GraphModule) -> list[float]:
    """Of each image, for the class that the dense network answers with."""
    images = first_images(found)
    answers = found.dense(images).argmax(1)
    maps = [heats(each, images, answers) for each in (found.dense, network)]
    return [float(value) for value in rank_correlations(*maps)]


def heats(network: fx.GraphModule, images: Tensor, classes: Tensor) -> np.ndarray[Any, np.dtype[np.float64]]:
    node = input_nodes(network)[0].name
    return maps_of(prepare(network, LrpOptions())(images, classes, [node])[node])


def summarise(table: pd.DataFrame) -> list[Row]:
    """One entry for each network, repair and share: accuracy and survival of each ranking, the best accuracy first."""
    found = []
    for (network, repair, asked), part in table.groupby(["network", "repair", "asked"], sort=False):
        rows = {}
        for name, some in part.groupby("criterion", sort=False):
            rows[str(name)] = {"accuracy": spread(some.accuracy), "explanation": spread(some.explanation.dropna())}
        best_first = dict(sorted(rows.items(), key=lambda item: -item[1]["accuracy"]["mean"]))
        found.append({"model": network, "repair": repair, "kept": asked, "seeds": part.seed.nunique(), **best_first})
    return found


def style_of(ranking: str) -> Row:
    return {"color": STYLES.get(ranking, COLOURS.get(ranking)), "linestyle": "-" if ranking in STYLES else ":"}


def main() -> None:
    options = _options()
    rankings = chosen(options.rankings, tuple(RANKINGS), "ranking")
    repairs = chosen(options.repairs, tuple(REPAIRS), "repair")
    points = Points(options.out / "points.jsonl")
    pressed = {name: getattr(options, name) for name in ("travel", "pressure") if getattr(options, name)}
    options_of_gates = cast(dict[str, GateOptions], GATES)
    options_of_gates[""] = replace(GATES[""], **pressed)
    rows: list[Row] = []
    for study in read_studies(options):
        for seed in seeds_of(options):
            rows += measure(study, seed, points, rankings, repairs, options.judge)
    table = finish(rows, options.out)
    draw_panels(table, options.out, panels="repair", lines="criterion", style=style_of, same_height=False)
    print(json.dumps({"points": summarise(table)}))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rankings", default="", help=", ".join(RANKINGS))
    parser.add_argument("--repairs", default="", help=", ".join(REPAIRS))
    parser.add_argument("--judge", choices=("evaluation", "spare"), default="evaluation", help="images that judge")
    parser.add_argument("--travel", type=float, default=0.0, help="of a gate's logit, to be chosen on spare images")
    parser.add_argument("--pressure", type=float, default=0.0, help="of the cost, to be chosen on spare images")
    add_flags(parser, kept="shares of the MACs that stay", out="runs/steered")
    return parser.parse_args()


if __name__ == "__main__":
    run(main)
