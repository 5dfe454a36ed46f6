"""The transfer setting of Yeom et al. 2021 (arXiv 1912.08881): a network cut for a small task, from few images.

    python benchmarks/transfer.py --networks resnet20,resnet56 --seeds 0,1,2
    python benchmarks/transfer.py --networks squeezenet --task ants_bees/train --task-evaluation ants_bees/val
Without --task a network is restricted to classes drawn by the seed (the classifier's other outputs go), with it the
classifier is fitted anew on the task's images. Criteria rank alone: in one shot, or in steps of the MACs with new
scores (and fine-tuning, if asked for) at each; raw and repaired; without and with fine-tuning on the same few images.
OUT/points.jsonl holds what is done; curves.csv and a plot per network; the last line is JSON.
"""

from __future__ import annotations

import argparse
import copy
import functools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
from finetuning import finetune
from small_task import Task, subjects_of
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
    draw_line,
    finish,
    margin,
    ours,
    read_studies,
    run,
    seeds_of,
    spread,
    steps,
)
from torch import fx

from compressor.budgets import Budget
from compressor.criteria import UNLEARNED
from compressor.errors import CompressorError
from compressor.recipe import Recipe

DEFAULT_CRITERIA = "lrp,gradient,taylor,l1,random"
ONE_SHOT, ITERATIVE = "one shot", "iterative"
TUNING = {"learning_rate": 3e-4, "distillation": 0.9}
TUNINGS = ("no tuning", "tuned after", "tuned each step")
PANELS = (*((s, t) for t in TUNINGS[:2] for s in (ONE_SHOT, ITERATIVE)), (ITERATIVE, TUNINGS[2]))
TUNING_EPOCHS = 20
# The released code: relevance as it is, rivals over a norm of their layer, filters alike whatever they cost.
PUBLISHED: Mapping[str, Mapping[str, Any]] = {
    "lrp": {"composite": "yeom2021", "normalisation": "none", "per_cost": 0.0},
    "l1": {"normalisation": "sum", "per_cost": 0.0},
}
PUBLISHED_RIVAL: Mapping[str, Any] = {"normalisation": "l2", "per_cost": 0.0}
SETTING = ["schedule", "repair", "tuning"]
Walk = Callable[[int], tuple[fx.GraphModule, float]]


def measure(
    study: Study,
    seed: int,
    task: Task,
    points: Points,
    wanted: Sequence[tuple[str, str, str, str]],
    *,
    published: bool,
) -> Iterator[Row]:
    """Every point of one network and one seed; `wanted` are criterion, repair, schedule and tuning."""
    subjects = functools.cache(lambda: subjects_of(study, seed, task))
    walks: dict[tuple[str, ...], Walk] = {}
    for criterion, repair, schedule, tuning in wanted:
        ranking = PUBLISHED.get(criterion, PUBLISHED_RIVAL) if published else {}
        recipe = replace(study.recipe, seed=seed, criterion=criterion, compensate=REPAIRS[repair], **ranking)
        each = tuning == TUNINGS[2]
        # what is tuned afterwards begins with what is not, so both take the same walk
        key = (criterion, repair, schedule, str(each))
        if key not in walks:
            walks = {key: _walk(subjects, recipe, study.kept, schedule, each=each)}
        known = recipe if tuning != TUNINGS[0] else replace(recipe, finetune_epochs=0)
        for i, share in enumerate(study.kept):
            named = {"network": study.name, "seed": seed, "asked": share, "criterion": criterion, "repair": repair}
            named |= {"schedule": schedule, "tuning": tuning, "per_class": task.per_class, "task": str(task)}
            named |= {"ranking": "as published"} if published else {}
            named["variant"] = f"{criterion}, {repair}, {schedule}, {tuning}"
            depends = [asdict(known), asdict(task), study.kept[: i + 1] if schedule == ITERATIVE else share]
            build = functools.partial(_built, walk=walks[key], index=i, after=tuning == TUNINGS[1])
            yield points.measure(named, depends, lambda b=build: attempt(subjects, b))


def _built(subjects: Subjects, *, walk: Walk, index: int, after: bool) -> tuple[fx.GraphModule, float]:
    network, at = walk(index)
    return (tuned(subjects, network) if after else network), at


def _walk(
    subjects: Callable[[], Subjects], recipe: Recipe, shares: Sequence[float], schedule: str, *, each: bool
) -> Walk:
    """The network at each of the shares, made when it is first asked for."""
    if schedule == ONE_SHOT:
        return functools.cache(lambda index: ours(subjects(), replace(recipe, rounds=1), shares[index]))
    made: list[tuple[fx.GraphModule, float]] = []

    def begin() -> Iterator[tuple[fx.GraphModule, float]]:
        mend = functools.partial(tuned, subjects()) if each else (lambda network: network)
        return steps(subjects(), recipe, [Budget("macs", share, slack=1.0) for share in shares], mend)

    begun = functools.cache(begin)

    def reach(index: int) -> tuple[fx.GraphModule, float]:
        while len(made) <= index:
            try:
                made.append(next(begun()))
            except StopIteration:
                raise CompressorError("an earlier step could not be made") from None
        return made[index]

    return reach


def tuned(subjects: Subjects, network: fx.GraphModule) -> fx.GraphModule:
    """A copy fine-tuned on the calibration images, taught by the dense network."""
    small = copy.deepcopy(network)
    finetune(small, subjects.dense, subjects.calibration, subjects.recipe)
    return small


def summarise(table: pd.DataFrame) -> list[Row]:
    """For each network the area under accuracy over MACs, and the paper's questions answered by it."""
    found = []
    for network, part in table.groupby("network", sort=False):
        runs = part.groupby([*SETTING, "criterion", "seed"]).ngroups
        reached = part.groupby("asked").size()
        shares = reached[reached == runs].index  # by every criterion, setting and seed
        common = part[part.asked.isin(shares)]
        areas = common.groupby([*SETTING, "criterion", "seed"], sort=False).accuracy.mean().reset_index()
        found.append(
            {
                "model": network,
                "task": part.task.iloc[0],
                "dense": spread(part.groupby("seed").dense.mean()),
                "seeds": part.seed.nunique(),
                "shares": sorted(shares, reverse=True),
                "areas": _areas(areas),
                "iterating_gains": _gains(areas, {"schedule": (ITERATIVE, ONE_SHOT)}),
                "repair_gains": _gains(areas, {"repair": ("repaired", "raw")}),
                "tuning_gains": _gains(areas, {"tuning": (TUNINGS[1], TUNINGS[0])}),
            }
        )
    return found


def _areas(areas: pd.DataFrame) -> list[Row]:
    """Mean accuracy over the shares; LRP is ahead where it is in every seed."""
    found = []
    for setting, part in areas.groupby(SETTING, sort=False):
        entry: Row = dict(zip(SETTING, setting, strict=True))
        by_criterion = {name: spread(some.accuracy) for name, some in part.groupby("criterion", sort=False)}
        entry["area"] = dict(sorted(by_criterion.items(), key=lambda item: -item[1]["mean"]))
        entry["lrp_margin"] = lead = margin(part)
        entry["lrp_ahead_in_every_seed"] = None if lead is None else lead["low"] > 0
        found.append(entry)
    return found


def _gains(areas: pd.DataFrame, step: Mapping[str, tuple[str, str]]) -> list[Row]:
    """What one of two settings gains over the other, seed by seed, everything else being equal."""
    ((column, (better, base)),) = step.items()
    rest = [name for name in [*SETTING, "criterion"] if name != column]
    found = []
    for setting, part in areas.groupby(rest, sort=False):
        by_seed = part.pivot_table(index="seed", columns=column, values="accuracy")
        if {better, base} <= set(by_seed):
            gain = spread((by_seed[better] - by_seed[base]).dropna())
            found.append({**dict(zip(rest, setting, strict=True)), "gain": gain})
    return found


def draw(table: pd.DataFrame, folder: Path) -> None:
    """A panel for each schedule and tuning, raw above repaired."""
    for network, part in table.groupby("network", sort=False):
        panels = [p for p in PANELS if ((part.schedule == p[0]) & (part.tuning == p[1])).any()]
        repairs = [r for r in REPAIRS if (part.repair == r).any()]
        size = (1 + 3 * len(panels), 1 + 3 * len(repairs))
        grid = {"sharex": True, "sharey": "row", "squeeze": False, "layout": "constrained"}
        figure, axes = plt.subplots(len(repairs), len(panels), figsize=size, **grid)
        for (i, repair), (j, (schedule, tuning)) in ((a, b) for a in enumerate(repairs) for b in enumerate(panels)):
            some = part[(part.repair == repair) & (part.schedule == schedule) & (part.tuning == tuning)]
            for criterion, line in some.groupby("criterion", sort=False):
                style = {"color": COLOURS.get(criterion), "markersize": 3, "alpha": 0.8}
                draw_line(axes[i, j], line, "asked", criterion, percent=True, **style)
            draw_bounds(axes[i, j], part[part.repair == repair])
            axes[i, j].set_title(f"{schedule}, {repair}, {tuning}", size=9)
        axes[0, 0].invert_xaxis()
        figure.legend(*axes[0, 0].get_legend_handles_labels(), fontsize=8, loc="outside right center")
        figure.supxlabel("MACs kept, %")
        figure.supylabel("top-1, %")
        ranked = ", ranked as published" if "ranking" in part else ""
        figure.suptitle(f"{network}, {part.task.iloc[0]}, {part.per_class.iloc[0]} images per class{ranked}")
        figure.savefig(folder / f"{network}.png", dpi=150)
        plt.close(figure)


def main() -> None:
    options = _options()
    shares = [float(s) for s in options.kept.split(",")] if options.kept else _shares(options.step, options.until)
    task = Task(options.classes, options.per_class, options.task, options.task_evaluation)
    wanted = _wanted(options)
    points = Points(options.out / "points.jsonl")
    rows: list[Row] = []
    for study in read_studies(options, normalisation="mean", finetune_epochs=TUNING_EPOCHS, **TUNING):
        for seed in seeds_of(options):
            cut = replace(study, kept=tuple(shares))
            rows += measure(cut, seed, task, points, wanted, published=options.published)
    table = finish(rows, options.out)
    by = ["network", *SETTING, "criterion", "asked"]
    curves = table.groupby(by, sort=False).accuracy.agg(["mean", "min", "max", "count"])
    curves.to_csv(options.out / "curves.csv")
    draw(table, options.out)
    print(json.dumps({"networks": summarise(table)}))


def _shares(step: float, until: float) -> list[float]:
    """0.95, 0.9, ... for steps of 5 %."""
    return [round(1 - k * step, 6) for k in range(1, round((1 - until) / step) + 1)]


def _wanted(options: argparse.Namespace) -> list[tuple[str, str, str, str]]:
    criteria = chosen(options.criteria, UNLEARNED, "criterion")
    repairs = chosen(options.repairs, tuple(REPAIRS), "repair")
    schedules = chosen(options.schedules, (ONE_SHOT, ITERATIVE), "schedule")
    tunings = chosen(options.tunings, TUNINGS, "tuning")
    return [
        (criterion, repair, schedule, tuning)
        for criterion in criteria
        for repair in repairs
        for schedule, tuning in sorted(PANELS)
        if schedule in schedules and tuning in tunings
    ]


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--classes", type=int, default=3, help="a network is restricted to so many")
    parser.add_argument("--task", default="", help="images that a new classifier is fitted on, and that calibrate")
    parser.add_argument("--task-evaluation", default="", help="images that judge it")
    parser.add_argument("--per-class", type=int, default=10, help="images that score, repair and fine-tune")
    parser.add_argument("--step", type=float, default=0.05, help="share of the MACs that goes in one step")
    parser.add_argument("--until", type=float, default=0.3, help="share of the MACs that is left at the end")
    parser.add_argument("--criteria", default=DEFAULT_CRITERIA)
    parser.add_argument("--published", action="store_true", help="ranked as in the authors' code, not evenly")
    parser.add_argument("--repairs", default="", help=", ".join(REPAIRS))
    parser.add_argument("--schedules", default="", help=f"{ONE_SHOT}, {ITERATIVE}")
    parser.add_argument("--tunings", default="", help=", ".join(TUNINGS))
    add_flags(parser, kept="shares of the MACs instead of --step and --until, falling", out="runs/transfer")
    return parser.parse_args()


if __name__ == "__main__":
    run(main)
