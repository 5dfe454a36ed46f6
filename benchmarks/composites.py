"""Is a searched composite ahead of every preset on images that the search never saw (Hatefi et al. 2024)?

In: names of networks.toml, or a recipe's flags. Only LRP's rules and how scores are read off move; layers compete by
their mean. Out: DIR/<network>-<repair>-<seed>/ (the search with its report), DIR/composites.csv and .png, and as the
last line one JSON object. The same command goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
from study import REPAIRS, Row, Study, add_flags, chosen, console, read_studies, run, seeds_of, spread

from compressor.searching.flow import run_search
from compressor.searching.options import SearchOptions, make_options
from compressor.searching.study import Progress

HELD = "normalisation,reduction,scope,per_cost"
SEARCHED = "searched"


def measure(study: Study, seed: int, repair: str, options: argparse.Namespace) -> list[Row]:
    """The area on search and on evaluation images of what was found and of every preset."""
    name = f"{study.name.split('/')[-1]}-{repair}-{seed}"
    recipe = replace(study.recipe, seed=seed, compensate=REPAIRS[repair], out=str(options.out / name))
    given = {f: getattr(options, f) for f in SearchOptions.__dataclass_fields__ if hasattr(options, f)}
    how = make_options({**given, "budgets": study.kept, "held": HELD})
    found = run_search(recipe, how, on_trial=lambda progress: _say(name, progress)).summary
    areas = {SEARCHED: found["area"]}
    for names, area in found["area_presets"].items():  # "recipe = lrp yeom2021": one and the same here
        areas |= {name.removeprefix("lrp "): area for name in names.split(" = ") if name != "recipe"}
    known = {"network": study.name, "repair": repair, "seed": seed, "trials": found["trials"]}
    return [{**known, "composite": composite, **area} for composite, area in areas.items()]


def _say(name: str, progress: Progress) -> None:
    best = f", best {progress.best.value:.1%}" if progress.best and progress.best.value is not None else ""
    console.print(f"{name} trial {progress.done}/{progress.total}{best}, {progress.left_s / 60:.0f} min left")


def summarise(table: pd.DataFrame) -> list[Row]:
    """One entry for each network and repair; `margin` is over the preset that is best on the unseen images."""
    found = []
    for (network, repair), part in table.groupby(["network", "repair"], sort=False):
        by_seed = part.pivot_table(index="seed", columns="composite", values="evaluation", sort=False)
        presets = by_seed.drop(columns=SEARCHED)
        entry: Row = {"model": network, "repair": repair, "seeds": len(by_seed), "trials": int(part.trials.max())}
        entry["area"] = {str(name): spread(by_seed[name]) for name in by_seed}
        entry["margin"] = spread(by_seed[SEARCHED] - presets.max(axis="columns"))
        found.append(entry)
    return found


def draw(table: pd.DataFrame, options: argparse.Namespace) -> None:
    """Bars of the area on unseen images, a panel for each repair."""
    ways: Any = table.repair.unique()
    figure, row = plt.subplots(1, len(ways), figsize=(10, 4.5), sharey=True, squeeze=False, layout="constrained")
    for panel, way in zip(row[0], ways, strict=True):
        part = table[table.repair == way]
        bars = 100 * part.pivot_table(index="network", columns="composite", values="evaluation", sort=False)
        bars.plot.bar(ax=panel, rot=0, legend=False)
        panel.set(title=way, xlabel="", ylabel="area under accuracy on unseen images, %", ylim=(0, 100))
    figure.legend(*row[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    figure.savefig(options.out / "composites.png", dpi=150)
    plt.close(figure)


def main() -> None:
    options = _options()
    repairs = chosen(options.repairs, tuple(REPAIRS), "repair")
    rows: list[Row] = []
    for study in read_studies(options, normalisation="mean", multiple=8):
        for repair in repairs:
            for seed in seeds_of(options):
                rows += measure(study, seed, repair, options)
    table = pd.DataFrame(rows)
    table.to_csv(options.out / "composites.csv", index=False)
    draw(table, options)
    print(json.dumps({"points": summarise(table)}))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repairs", default="raw", help=f"of {', '.join(REPAIRS)}")
    for name in ("trials", "minutes", "search_images", "trial_images", "score_images"):
        option = SearchOptions.__dataclass_fields__[name]
        parser.add_argument(f"--{name.replace('_', '-')}", default=option.default, help=option.metadata["help"])
    add_flags(parser, kept="shares of the MACs a trial is judged at", out="runs/composites")
    parser.set_defaults(seeds="0")
    return parser.parse_args()


if __name__ == "__main__":
    run(main)
