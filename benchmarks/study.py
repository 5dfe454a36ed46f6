"""What the studies share: networks and their images, removal to shares of the MACs, rows kept on disk, curves.

In: names of networks.toml, or a recipe's flags. Out: `Subjects` (one network, one seed), networks at equal MACs,
`Points` (rows that are measured once, so that a study continues), lines with their spread. Knows no study's question.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from matplotlib.axes import Axes
from rich.console import Console
from torch import Tensor, fx, nn

from compressor.accuracy import evaluate
from compressor.budgets import Budget
from compressor.choices import choices_of
from compressor.errors import CompressorError, DataError
from compressor.files import content_hash
from compressor.graph import trace
from compressor.graph.cost import measure_cost
from compressor.inputs.images import Batches, Images, batches
from compressor.inputs.models import Model, load_model
from compressor.placement import device_of, placed, resolve, to_device
from compressor.pruning import Structure, find_structure
from compressor.recipe import Recipe, read_recipe
from compressor.records import Scores
from compressor.rounds import Prunable, pruning_round, score_units
from compressor.run.reading import read_data
from compressor.run.saved import example_of
from compressor.toml import parse_toml

mpl.use("agg")

NETWORKS = Path(__file__).with_name("networks.toml")
FOLDER = "COMPRESSOR_DATA"  # names the folder that networks.toml's paths begin with
ENOUGH = 0.98  # a point is "at equal MACs" when it keeps at least this share of what it may keep
WIDE = 50.0  # per cent of accuracy below which an axis begins at 0
EVERYTHING = 10**9  # more images than there are
TASK_FIELDS = ("task", "quality", "loss", "says", "distance", "decode")  # not asked for: studies count right answers
COLOURS = {"lrp": "C3", "gradient": "C0", "gradient_x_input": "C4", "taylor": "C1", "l1": "C2", "random": "C7"}
COLOURS |= {"activation": "C5", "loss measured": "C9", "searched": "C6"}
REPAIRS: Mapping[str, bool] = {"raw": False, "repaired": True}
console = Console(stderr=True)
Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Study:
    """One network: its recipe and the shares of the MACs that stay."""

    name: str
    recipe: Recipe
    kept: tuple[float, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Subjects:
    """What the points of one network and one seed share."""

    recipe: Recipe
    model: Model
    calibration: Batches
    evaluation: Batches
    example: Tensor
    dense: fx.GraphModule
    structure: Structure
    dense_accuracy: float
    known: dict[str, Scores] = field(default_factory=dict)

    @property
    def classes(self) -> int:
        return int(self.dense(to_device(self.example, device_of(self.dense))).shape[1])

    def seeing(self, calibration: Images) -> Subjects:
        """The same network with other images to score and repair on."""
        return replace(self, calibration=batches(calibration, self.recipe.batch_size), known={})

    def scores(self, recipe: Recipe, graph: fx.GraphModule, structure: Structure) -> Scores:
        """The dense network is scored once for each way of scoring."""
        choices = choices_of(recipe)
        key = f"{choices.scoring} {recipe.normalisation} {recipe.units} {recipe.least} {recipe.reduction}"
        if graph is not self.dense or key not in self.known:
            subject = Prunable(graph, structure)
            batches_now = list(self.calibration)
            scores = score_units(subject, batches_now, scoring=choices.scoring, ranking=choices.ranking)
            if graph is not self.dense:
                return scores
            self.known[key] = scores
        return self.known[key]


def known_networks() -> dict[str, Any]:
    """The tables of `networks.toml` by network, with variables of the environment filled in."""
    return parse_toml(os.path.expandvars(NETWORKS.read_text()))


def subjects_of(study: Study, seed: int) -> Subjects:
    """The network and the images of its recipe."""
    recipe = replace(study.recipe, seed=seed)
    model = load_model(recipe.model, recipe.weights or None)
    return make_subjects(recipe, model, *_images_of(recipe, model))


def make_subjects(recipe: Recipe, model: Model, calibration: Images, evaluation: Images) -> Subjects:
    assert calibration.preprocessing is not None
    example = example_of(calibration.preprocessing.shape)
    dense = placed(trace(model.module, example), resolve(recipe.device))
    shown = batches(evaluation, recipe.batch_size)
    return Subjects(
        recipe,
        model,
        batches(calibration, recipe.batch_size),
        shown,
        example,
        dense,
        find_structure(dense, example),
        evaluate(dense, shown).top1,
    )


def pool_of(recipe: Recipe, model: Model) -> tuple[Images, Images]:
    """All images that may calibrate, in an order that the seed decides, and those that evaluate: disjoint."""
    return _images_of(replace(recipe, calibration=EVERYTHING), model)


def _images_of(recipe: Recipe, model: Model) -> tuple[Images, Images]:
    """Those that calibrate and those that evaluate. Raises DataError for what is no images."""
    splits = read_data(recipe, model, None).splits
    calibration, evaluation = splits.calibration, splits.evaluation
    if not isinstance(calibration, Images) or not isinstance(evaluation, Images):
        raise DataError(f"{calibration.source} holds tensors, and a study takes images; give their files or pixels")
    return calibration, evaluation


def draw_each(pool: Images, per_class: int) -> Images:
    """The pool's first so many images of every class: few ones are among the many of the same seed."""
    places = [np.flatnonzero(pool.labels == label) for label in np.unique(pool.labels)]
    least = min(map(len, places))
    if least < per_class:
        raise DataError(f"{pool.source} has a class of {least} images, {per_class} are asked for; ask for fewer")
    return pool.subset(np.sort(np.concatenate([some[:per_class] for some in places])))


Mend = Callable[[fx.GraphModule], fx.GraphModule]


def steps(
    subjects: Subjects, recipe: Recipe, budgets: Iterable[Budget], mend: Mend = lambda network: network
) -> Iterator[tuple[fx.GraphModule, float]]:
    """Score, plan, removal and repair at every budget, each from the network before it; what share it kept.

    Budgets are of the dense network. What `mend` makes of a network is what the next step starts from.
    """
    dense = Prunable(subjects.dense, subjects.structure)
    now, choices = dense, choices_of(recipe)
    for budget in budgets:
        scores = subjects.scores(recipe, now.network, now.structure)
        step = pruning_round(
            dense, now, budget, subjects.calibration, images=subjects.example, choices=choices, scores=scores
        )
        now = replace(step.after, network=mend(step.after.network))
        yield now.network, measure_cost(now.network).macs / measure_cost(dense.network).macs


def ours(subjects: Subjects, recipe: Recipe, share: float) -> tuple[fx.GraphModule, float]:
    """The recipe's rounds down to that share; the network and the share of the MACs it kept."""
    on_the_way = [Budget("macs", share ** (r / recipe.rounds), slack=1.0) for r in range(1, recipe.rounds)]
    *_, last = steps(subjects, recipe, [*on_the_way, Budget("macs", share)])
    return last


def attempt(subjects: Callable[[], Subjects], build: Callable[..., tuple[nn.Module, float]], *how: Any) -> Row:
    """The accuracy of what `build` makes, or why it can't be made."""
    found = subjects()
    bounds = {"dense": found.dense_accuracy, "chance": 1 / found.classes}
    try:
        network, at = build(found, *how)
    except CompressorError as refusal:
        return {"failed": str(refusal)[:200], **bounds}
    accuracy = evaluate(network, found.evaluation)
    return {"macs_kept": at, "accuracy": accuracy.top1, **bounds, "images": accuracy.n}


class Points:
    """Rows already measured, on disk after every one."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self.rows: list[Row] = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
        self.known = {row["key"]: row for row in self.rows}

    def measure(
        self, named: Row, depends_on: object, work: Callable[[], Row], *, line: Callable[[Row], str] | None = None
    ) -> Row:
        """The row of that name, measured unless it stands for the same `depends_on`, on any machine and commit.

        What a recipe says of the device does not count.
        """
        key = content_hash(_without_folder([named, _without_device(depends_on)]))
        if key not in self.known:
            start = time.perf_counter()
            row = {**named, **work(), "seconds": round(time.perf_counter() - start, 1), "commit": _commit(), "key": key}
            with self.path.open("a") as file:
                file.write(json.dumps(row) + "\n")
            self.known[key] = row
            self.rows.append(row)
        row = self.known[key]
        console.print((line or _line)(row), highlight=False, soft_wrap=True)
        return row


def _without_folder(values: object) -> object:
    """The same on every machine: the folder of images and weights by the name it has in networks.toml."""
    text, folder = json.dumps(values), os.environ.get(FOLDER, "")
    return json.loads(text.replace(json.dumps(folder)[1:-1], f"${{{FOLDER}}}") if folder else text)


def _without_device(values: object) -> object:
    if isinstance(values, dict):
        return {k: v for k, v in values.items() if k != "device"}
    return [_without_device(v) for v in values] if isinstance(values, (list, tuple)) else values


def _commit() -> str:
    """Of the code that measures; with a + where it has been edited since, empty where git does not know it."""
    asked = ["git", "describe", "--always", "--dirty=+", "--exclude=*"]
    found = subprocess.run(asked, cwd=NETWORKS.parent, capture_output=True, text=True, check=False)
    return found.stdout.strip()


def _line(row: Row) -> str:
    found = row.get("failed") or f"{row['macs_kept']:.3f} of MACs, {row['accuracy']:.1%} of {row['dense']:.1%}"
    point = f"{row['network']:14} seed {row['seed']} keep {row['asked']:.2f}"
    return f"{point} {row['variant']:44} {found}  {row['seconds']} s"


def counts(row: Row) -> bool:
    """Whether a row is at equal MACs."""
    return "failed" not in row and row["macs_kept"] >= ENOUGH * row["asked"]


def spread(values: Iterable[float]) -> Row:
    """Mean and range of what the seeds gave."""
    found = np.array(list(values), dtype=np.float64)
    return {k: round(float(v), 4) for k, v in (("mean", found.mean()), ("low", found.min()), ("high", found.max()))}


def margin(table: pd.DataFrame, of: str = "lrp", column: str = "accuracy") -> Row | None:
    """How far one criterion is ahead of the best other one (by its mean), seed by seed; None without both."""
    by_seed = table.pivot_table(index="seed", columns="criterion", values=column)
    others = by_seed.columns.drop(of, errors="ignore")
    if of not in by_seed or others.empty:
        return None
    best = by_seed[others].mean().idxmax()
    return {"over": str(best), **spread((by_seed[of] - by_seed[best]).dropna())}


def draw_line(axes: Axes, part: pd.DataFrame, x: str, label: str, *, percent: bool = False, **style: Any) -> None:
    """Mean accuracy over the seeds with their range, against a column (a share as per cent)."""
    curve = 100 * part.groupby(x).accuracy.agg(["mean", "min", "max"])
    at = 100 * curve.index if percent else curve.index
    (line,) = axes.plot(at, curve["mean"], marker="o", label=label, **style)
    axes.fill_between(at, curve["min"], curve["max"], alpha=0.12, color=line.get_color(), linewidth=0)


def draw_bounds(axes: Axes, part: pd.DataFrame) -> None:
    """The dense network's accuracy, and what guessing gives where points are that bad; the axis from 0 there only."""
    axes.axhline(100 * part.dense.mean(), color="black", linestyle="--", linewidth=1, label="dense")
    worst = 100 * part.accuracy.min()
    if "chance" in part and worst < WIDE:
        axes.axhline(100 * part.chance.mean(), color="black", linestyle=":", linewidth=1, label="chance")
    axes.set_ylim(0.0 if worst < WIDE else 10 * (worst // 10), 101.0)


def draw_panels(
    table: pd.DataFrame, folder: Path, *, panels: str, lines: str, style: Callable[[str], Row], same_height: bool
) -> None:
    """Each network's curves over the MACs kept, nothing trained: a panel for each value of a column, lines of another.

    Written to folder/<network>.png; panels of the same height share their axis.
    """
    for network, part in table.groupby("network", sort=False):
        ways = part[panels].unique()
        figure, row = plt.subplots(
            1, len(ways), figsize=(10, 4.5), sharex=True, sharey=same_height, squeeze=False, layout="constrained"
        )
        for panel, way in zip(row[0], ways, strict=True):
            own = part[part[panels] == way]
            for name, line in own.groupby(lines, sort=False):
                draw_line(panel, line, "asked", str(name), percent=True, alpha=0.8, **style(str(name)))
            draw_bounds(panel, part if same_height else own)
            panel.set(title=way, xlabel="MACs kept, %", ylabel="top-1, %")
        row[0, 0].invert_xaxis()
        figure.legend(*row[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=5, fontsize=8)
        figure.suptitle(f"{network}, nothing trained")
        figure.savefig(folder / f"{network}.png", dpi=150)
        plt.close(figure)


def finish(rows: Sequence[Row], out: Path) -> pd.DataFrame:
    """Writes points.csv; the rows at equal MACs as a table."""
    pd.DataFrame(rows).drop(columns="key").to_csv(out / "points.csv", index=False)
    found = [row for row in rows if counts(row)]
    if not found:
        raise SystemExit(f"no point could be reached; {out / 'points.csv'} says why")
    return pd.DataFrame(found)


def add_flags(parser: argparse.ArgumentParser, *, kept: str, out: str) -> None:
    """What every study takes: networks, shares, seeds, and a recipe's fields."""
    parser.add_argument("--networks", default="", help=f"names of {NETWORKS.name}, comma-separated")
    parser.add_argument("--kept", default="", help=kept)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path(out))
    flags = parser.add_argument_group("recipe, as in `compressor compress`")
    for f in fields(Recipe):
        if f.name not in ("seed", "out", *TASK_FIELDS):
            flags.add_argument(f"--{f.name.replace('_', '-')}", dest=f"recipe_{f.name}")


def read_studies(options: argparse.Namespace, **defaults: Any) -> Iterator[Study]:
    """The networks of the command line: of the list by name, or one by its recipe's flags."""
    if options.threads:
        torch.set_num_threads(options.threads)
    given = as_fields({k[7:]: v for k, v in vars(options).items() if k.startswith("recipe_") and v is not None})
    known = known_networks()
    names = [name for name in options.networks.split(",") if name] or [""]
    for name in filter(None, names):
        if name not in known:
            raise SystemExit(f"{NETWORKS.name} has no network {name!r}; it has {', '.join(known)}")
        if f"${{{FOLDER}}}" in str(known[name]):
            raise SystemExit(f"set {FOLDER} to the folder of images and weights that {NETWORKS.name} names")
    for name in names:
        table = {"kept": (0.7, 0.5, 0.35), **known.get(name, {})}
        own = table.pop("kept")
        kept = tuple(map(float, options.kept.split(","))) if options.kept else tuple(own)
        recipe = read_recipe(None, **{"multiple": 1, **defaults, **table, **given})
        yield Study(name or recipe.model, recipe, kept)


def as_fields(texts: Mapping[str, str]) -> Row:
    """A recipe's fields from text: those that are true or false want to be so."""
    truths = {f.name for f in fields(Recipe) if isinstance(f.default, bool)}
    return {k: {"true": True, "false": False}.get(v, v) if k in truths else v for k, v in texts.items()}


def seeds_of(options: argparse.Namespace) -> list[int]:
    return [int(seed) for seed in options.seeds.split(",")]


def chosen(text: str, allowed: Sequence[str], what: str) -> list[str]:
    """A comma-separated choice; everything where none is made."""
    found = [part.strip() for part in text.split(",") if part.strip()] or list(allowed)
    for part in found:
        if part not in allowed:
            raise SystemExit(f"{what} {part!r} is not one of {', '.join(allowed)}")
    return found


def run(main: Callable[[], None]) -> None:
    """A refusal ends the study with its reason."""
    try:
        main()
    except CompressorError as refusal:
        raise SystemExit(str(refusal)) from None
