"""Which criterion ranks best: accuracy over MACs kept, raw and with the same repair for all, and the area under it.

    python benchmarks/criteria.py --networks resnet20,resnet56 --seeds 0,1,2
    python benchmarks/criteria.py --repairs raw --searched 'benchmarks/results/composites/{network}.toml' --networks N
Each criterion ranks alone, its scores divided by their layer's mean as in the papers; "loss measured" is our default
beside them, `--searched` the recipe a search of that network found. Nothing is trained. OUT/points.jsonl holds what is
done; a plot per network; the last line is JSON.
"""

from __future__ import annotations

import argparse
import functools
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pandas as pd
from study import (
    COLOURS,
    REPAIRS,
    Points,
    Row,
    Study,
    add_flags,
    attempt,
    chosen,
    draw_panels,
    finish,
    margin,
    ours,
    read_studies,
    run,
    seeds_of,
    spread,
    subjects_of,
)

from compressor.criteria import UNLEARNED
from compressor.recipe import read_recipe
from compressor.searching.bench import Kept, area

DEFAULT_CRITERIA = "lrp,gradient_x_input,taylor,activation,l1,random"
MEASURED, SEARCHED = "loss measured", "searched"
FOUND = ("criterion", "composite", "start", "start_class", "sign", "per", "place")  # by a search
FOUND += ("reduction", "normalisation", "scope", "per_cost")


def rankings_of(criteria: list[str], searched: str) -> dict[str, dict[str, Any]]:
    """What changes in the recipe, by the name of the ranking; `searched` is a recipe's file, or empty."""
    found: dict[str, dict[str, Any]] = {c: {"criterion": c, "normalisation": "mean"} for c in criteria}
    found[MEASURED] = {"normalisation": "measured"}
    if searched:
        recipe = read_recipe(Path(searched))
        found[SEARCHED] = {name: getattr(recipe, name) for name in FOUND}
    return found


def measure(
    study: Study, seed: int, points: Points, rankings: Mapping[str, Mapping[str, Any]], repairs: Iterable[str]
) -> Iterator[Row]:
    """Every point of one network and one seed; the network is read only if a point is missing."""
    subjects = functools.cache(lambda: subjects_of(study, seed))
    for name, changes in rankings.items():
        for repair in repairs:
            recipe = replace(study.recipe, seed=seed, compensate=REPAIRS[repair], **changes)
            for share in study.kept:
                named = {"network": study.name, "seed": seed, "asked": share, "criterion": name, "repair": repair}
                named["variant"] = f"{name}, {repair}"
                yield points.measure(named, asdict(recipe), lambda r=recipe, k=share: attempt(subjects, ours, r, k))


def areas_of(table: pd.DataFrame) -> pd.DataFrame:
    """One row for each network, repair, criterion and seed."""
    by = ["network", "repair", "criterion", "seed"]
    return table.groupby(by, sort=False).apply(_area, include_groups=False).rename("area").reset_index()


def _area(part: pd.DataFrame) -> float:
    return area([Kept(p.asked, p.macs_kept, p.accuracy, p.images) for p in part.itertuples()])


def summarise(table: pd.DataFrame) -> list[Row]:
    """One entry for each network and repair: the criteria by their area, and how far LRP is ahead of the best other."""
    reached = table.groupby(["network", "repair", "criterion", "seed"]).asked.transform("count")
    complete = table[reached == table.groupby("network").asked.transform("nunique")]  # areas over the same shares
    found = []
    for (network, repair), part in areas_of(complete).groupby(["network", "repair"], sort=False):
        areas = {name: spread(some.area) for name, some in part.groupby("criterion", sort=False)}
        entry = {"model": network, "repair": repair, "seeds": part.seed.nunique()}
        entry |= {"area": dict(sorted(areas.items(), key=lambda item: -item[1]["mean"]))}
        alone = part[~part.criterion.isin([MEASURED, SEARCHED])]
        entry["lrp_margin"] = margin(alone, column="area")
        if SEARCHED in areas:
            rivals = part[~part.criterion.isin([MEASURED, "lrp"])]
            entry["searched_margin"] = margin(rivals, SEARCHED, "area")
        found.append(entry)
    return found


def style_of(criterion: str) -> Row:
    return {"color": COLOURS.get(criterion), "linestyle": "-" if criterion in UNLEARNED else ":"}


def main() -> None:
    options = _options()
    criteria = chosen(options.criteria, UNLEARNED, "criterion")
    repairs = chosen(options.repairs, tuple(REPAIRS), "repair")
    points = Points(options.out / "points.jsonl")
    rows: list[Row] = []
    for study in read_studies(options):
        rankings = rankings_of(criteria, options.searched.replace("{network}", study.name))
        for seed in seeds_of(options):
            rows += measure(study, seed, points, rankings, repairs)
    table = finish(rows, options.out)
    draw_panels(table, options.out, panels="repair", lines="criterion", style=style_of, same_height=False)
    print(json.dumps({"points": summarise(table)}))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--criteria", default=DEFAULT_CRITERIA)
    parser.add_argument("--repairs", default="", help=", ".join(REPAIRS))
    parser.add_argument("--searched", default="", help="recipe that a search found; {network} stands for the name")
    add_flags(parser, kept="shares of the MACs that stay", out="runs/criteria")
    return parser.parse_args()


if __name__ == "__main__":
    run(main)
