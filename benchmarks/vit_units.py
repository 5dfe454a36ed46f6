"""What should go of a vision transformer: heads only, MLP neurons only, or both, at equal MACs.

    python benchmarks/vit_units.py --networks digits-vit --seeds 0,1,2
    python benchmarks/vit_units.py --networks deit_tiny --kept 0.95,0.9,0.85 --seeds 0
As in Hatefi et al. 2024 (arXiv 2408.12568: the criterion ranks alone, nothing is repaired), and as we do it (loss
measured, repaired). Heads go whole and reach only so far: points.csv says of a share they can't meet which is near.
OUT/points.jsonl holds what is done; a plot per network; the last line is JSON.
"""

from __future__ import annotations

import argparse
import functools
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from typing import Any

import pandas as pd
from study import (
    Points,
    Row,
    Study,
    add_flags,
    attempt,
    draw_panels,
    finish,
    ours,
    read_studies,
    run,
    seeds_of,
    spread,
    subjects_of,
)

UNITS: Mapping[str, tuple[str, ...]] = {"heads": ("head",), "neurons": ("neuron",), "both": ("head", "neuron")}
WAYS: Mapping[str, Mapping[str, Any]] = {
    "criterion alone, raw": {"normalisation": "mean", "compensate": False},
    "loss measured, repaired": {"normalisation": "measured", "compensate": True},
}


def measure(study: Study, seed: int, points: Points) -> Iterator[Row]:
    """Every point of one network and one seed; also with all kinds of units the recipe allows."""
    subjects = functools.cache(lambda: subjects_of(study, seed))
    for way, changes in WAYS.items():
        for kind, units in {**UNITS, "any kind": study.recipe.units}.items():
            recipe = replace(study.recipe, seed=seed, units=units, **changes)
            for share in study.kept:
                named = {"network": study.name, "seed": seed, "asked": share, "way": way, "units": kind}
                named["variant"] = f"{kind}, {way}"
                yield points.measure(named, asdict(recipe), lambda r=recipe, k=share: attempt(subjects, ours, r, k))


def summarise(table: pd.DataFrame) -> list[Row]:
    """Each network, way and share: every choice that gets there, the best first."""
    found = []
    for (network, way, share), part in table.groupby(["network", "way", "asked"], sort=False):
        by_units = {kind: spread(some.accuracy) for kind, some in part.groupby("units", sort=False)}
        entry = {"model": network, "way": way, "macs_kept": share, "seeds": part.seed.nunique()}
        entry |= {"dense": round(part.dense.mean(), 4)}
        found.append({**entry, "accuracy": dict(sorted(by_units.items(), key=lambda item: -item[1]["mean"]))})
    return found


def style_of(kind: str) -> Row:
    return {"linestyle": "-" if kind in UNITS else ":"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_flags(parser, kept="shares of the MACs that stay", out="runs/vit-units")
    options = parser.parse_args()
    points = Points(options.out / "points.jsonl")
    rows = [
        row for study in read_studies(options) for seed in seeds_of(options) for row in measure(study, seed, points)
    ]
    table = finish(rows, options.out)
    draw_panels(table, options.out, panels="way", lines="units", style=style_of, same_height=True)
    print(json.dumps({"points": summarise(table)}))


if __name__ == "__main__":
    run(main)
