"""How few images will do: accuracy at equal MACs against calibration images per class, criterion by criterion.

    python benchmarks/few_shot.py --networks resnet20 --kept 0.5 --seeds 0,1,2
    python benchmarks/few_shot.py --networks digits-resnet --counts 1,5 --criteria lrp,random
Each criterion ranks alone (scores divided by their mean, as in the papers) or says only what counts while the loss of
each layer is measured (the default); both raw and repaired. Nothing is trained. A seed draws the images, fewer of them
being among more. OUT/points.jsonl holds what is done; curves.csv and a plot per network; the last line is JSON.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
from study import (
    COLOURS,
    REPAIRS,
    Points,
    Row,
    Study,
    Subjects,
    add_flags,
    attempt,
    chosen,
    draw_bounds,
    draw_each,
    draw_line,
    finish,
    make_subjects,
    margin,
    ours,
    pool_of,
    read_studies,
    run,
    seeds_of,
    spread,
)

from compressor.criteria import UNLEARNED
from compressor.inputs.images import Images
from compressor.inputs.models import load_model

DEFAULT_CRITERIA = "lrp,gradient_x_input,taylor,l1,random"
RANKINGS: Mapping[str, Mapping[str, Any]] = {
    "criterion alone": {"normalisation": "mean"},
    "loss measured": {"normalisation": "measured"},
}


def measure(study: Study, seed: int, points: Points, criteria: list[str], per_class: list[int]) -> Iterator[Row]:
    """Every point of one network and one seed; images and network are read only if a point is missing."""
    read = functools.cache(lambda: _read(study, seed, max(per_class)))
    for count in per_class:
        subjects = functools.cache(lambda n=count: read()[0].seeing(draw_each(read()[1], n)))
        for share in study.kept:
            for criterion in criteria:
                for ranking, (repair, compensate) in itertools.product(RANKINGS, REPAIRS.items()):
                    changes = {"criterion": criterion, "compensate": compensate, **RANKINGS[ranking]}
                    recipe = replace(study.recipe, seed=seed, **changes)
                    named = {"network": study.name, "seed": seed, "asked": share, "criterion": criterion}
                    named |= {"per_class": count, "ranking": ranking, "repair": repair}
                    named["variant"] = f"{count} a class, {criterion}, {ranking}, {repair}"
                    yield points.measure(
                        named, asdict(recipe), lambda s=subjects, r=recipe, k=share: attempt(s, ours, r, k)
                    )


def _read(study: Study, seed: int, most: int) -> tuple[Subjects, Images]:
    recipe = replace(study.recipe, seed=seed)
    model = load_model(recipe.model, recipe.weights or None)
    pool, evaluation = pool_of(recipe, model)
    return make_subjects(recipe, model, draw_each(pool, most), evaluation), pool


def summarise(table: pd.DataFrame) -> list[Row]:
    """One entry for each network, share, ranking and repair; who is ahead for each number of images."""
    found = []
    for (network, share, ranking, repair), part in table.groupby(["network", "asked", "ranking", "repair"], sort=False):
        by_criterion: Row = {}
        for (criterion, count), some in part.groupby(["criterion", "per_class"], sort=False):
            by_criterion.setdefault(criterion, {})[str(count)] = spread(some.accuracy)
        entry = {"model": network, "macs_kept": share, "ranking": ranking, "repair": repair}
        entry |= {"dense": round(part.dense.mean(), 4), "seeds": part.seed.nunique(), "accuracy": by_criterion}
        entry["lrp_margin"] = {str(count): margin(some) for count, some in part.groupby("per_class")}
        found.append(entry)
    return found


def draw(table: pd.DataFrame, folder: Path) -> None:
    """Four panels for each network and share: who ranks, and whether the rest is repaired."""
    ticks = sorted(table.per_class.unique())
    for (network, share), part in table.groupby(["network", "asked"], sort=False):
        figure, axes = plt.subplots(2, 2, figsize=(9, 7), sharex=True, sharey="col", layout="constrained")
        for j, repair in enumerate(REPAIRS):
            column = part[part.repair == repair]
            for i, ranking in enumerate(RANKINGS):
                for criterion, line in column[column.ranking == ranking].groupby("criterion", sort=False):
                    draw_line(axes[i, j], line, "per_class", criterion, color=COLOURS.get(criterion), alpha=0.8)
                draw_bounds(axes[i, j], column)
                axes[i, j].set(xscale="log", title=f"{ranking}, {repair}")
                axes[i, j].set_xticks(ticks, [str(t) for t in ticks])
                axes[i, j].minorticks_off()
        figure.supxlabel("calibration images per class")
        figure.supylabel("top-1, %")
        figure.suptitle(f"{network}, {share:.0%} of the MACs, nothing trained")
        figure.legend(*axes[0, 0].get_legend_handles_labels(), fontsize=8, loc="outside right center")
        figure.savefig(folder / f"{network}-{share:g}.png", dpi=150)
        plt.close(figure)


def main() -> None:
    options = _options()
    criteria = chosen(options.criteria, UNLEARNED, "criterion")
    points = Points(options.out / "points.jsonl")
    rows: list[Row] = []
    for study in read_studies(options):
        for seed in seeds_of(options):
            rows += measure(study, seed, points, criteria, [int(n) for n in options.counts.split(",")])
    table = finish(rows, options.out)
    by = ["network", "asked", "ranking", "repair", "criterion", "per_class"]
    curves = table.groupby(by, sort=False).accuracy.agg(["mean", "min", "max", "count"])
    curves.to_csv(options.out / "curves.csv")
    draw(table, options.out)
    print(json.dumps({"points": summarise(table)}))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--counts", default="1,2,5,10,20", help="calibration images per class")
    parser.add_argument("--criteria", default=DEFAULT_CRITERIA)
    add_flags(parser, kept="shares of the MACs that stay", out="runs/few-shot")
    return parser.parse_args()


if __name__ == "__main__":
    run(main)
