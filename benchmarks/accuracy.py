"""Accuracy without retraining at equal MACs: our recipe, variants of it, and torch_pruning's best, all really removed.

    python benchmarks/accuracy.py --networks resnet20,resnet56 --seeds 0,1,2
    python benchmarks/accuracy.py --model file.py:build --weights w.safetensors --data images/ --kept 0.7,0.5
    python benchmarks/accuracy.py --networks resnet20 --hold-out 0.2 --no-peer --variant "l1: criterion=l1"
`--hold-out` is for choosing: it evaluates on a share of --data, not on the evaluation images. Widths are not rounded
(torch_pruning's are not either). OUT/points.jsonl holds what is done, so a study continues; the last line is JSON.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import matplotlib as mpl
import pandas as pd
import tomllib
import torch
from peer import SETTINGS, Setting, Subject, prune_to
from rich.console import Console
from torch import fx, nn

from compressor.cost import measure_cost
from compressor.errors import CompressorError
from compressor.files import content_hash
from compressor.graph import trace
from compressor.images import Batches, batches
from compressor.models import Model, load_model
from compressor.pipeline import score_options
from compressor.plans import comparable_scores
from compressor.pruning import (
    Budget,
    CompensationOptions,
    Structure,
    analyse,
    compensate,
    compose,
    find_structure,
    identity_error,
    make_plan,
    prune,
)
from compressor.recipe import Recipe, make_recipe, read_recipe
from compressor.records import IntArray, Plan, Scores
from compressor.recovery.batchnorm import reestimate
from compressor.recovery.evaluate import evaluate
from compressor.relevance import score
from compressor.saved import example_of
from compressor.work import ranking_of, read_images

mpl.use("agg")
import matplotlib.pyplot as plt

NETWORKS = Path(__file__).with_name("networks.toml")
SCREEN_IMAGES, SCREENED = 160, 3  # the peer's settings are tried on few evaluation images, the best on all of them
ENOUGH = 0.98  # a point is "at equal MACs" when it keeps at least this share of what it may keep
IDENTITY = 1e-9
OURS, PEER = "ours", "torch_pruning: "
console = Console(stderr=True)
Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Study:
    """One network: its recipe, the shares of the MACs that stay, and the variants' fields by name."""

    name: str
    recipe: Recipe
    kept: tuple[float, ...]
    variants: Mapping[str, Mapping[str, str]]


class Subjects:
    """What the points of one network and one seed share; read when the first point asks."""

    def __init__(self, study: Study, seed: int) -> None:
        recipe = self.recipe = replace(study.recipe, seed=seed)
        self.model: Model = load_model(recipe.model, recipe.weights or None)
        splits, how = read_images(recipe, self.model, None)
        self.calibration: Batches = batches(splits.calibration, recipe.batch_size)
        self.evaluation: Batches = batches(splits.evaluation, recipe.batch_size)
        self.example = example_of(how.shape)
        self.dense: fx.GraphModule = trace(self.model.module, self.example)
        self.structure: Structure = find_structure(self.dense, self.example)
        self.dense_accuracy = evaluate(self.dense, self.evaluation).top1
        self._scores: dict[str, Scores] = {}

    def scores(self, recipe: Recipe, graph: fx.GraphModule, structure: Structure) -> Scores:
        """The dense network is scored once for each way of scoring."""
        options = score_options(recipe)
        key = f"{recipe.criterion} {options} {recipe.normalisation} {recipe.units} {recipe.least} {recipe.reduction}"
        if graph is not self.dense or key not in self._scores:
            found = score(graph, structure.groups, self.calibration, criterion=recipe.criterion, options=options)
            found = comparable_scores(recipe, graph, structure, found, list(self.calibration))
            if graph is not self.dense:
                return found
            self._scores[key] = found
        return self._scores[key]


def ours(subjects: Subjects, recipe: Recipe, share: float) -> tuple[nn.Module, float]:
    """Rounds of score, plan, removal and repair; the network and the share of the MACs it kept."""
    structure, dense = subjects.structure, subjects.dense
    current, units, at = dense, structure, 1.0
    kept: dict[str, IntArray] = {}
    for r in range(1, recipe.rounds + 1):
        slack = {} if r == recipe.rounds else {"slack": 1.0}
        budget = Budget("macs", share ** (r / recipe.rounds) / at, **slack)
        plan = make_plan(current, units, subjects.scores(recipe, current, units), budget, ranking_of(recipe))
        small, _ = prune(current, units, plan)
        error = identity_error(current, small, units, plan.kept, subjects.example)
        if error > IDENTITY:
            raise CompressorError(f"pruned and masked original differ by {error:.1e}")
        kept = compose(kept, plan.kept)
        _, slices = prune(dense, structure, Plan(kept, 0, 0))
        if recipe.compensate:
            compensate(dense, small, slices, subjects.calibration, options=CompensationOptions(seed=recipe.seed))
        if recipe.reestimate:
            reestimate(small, subjects.calibration, reference=dense, slices=slices)
        current, units = small, analyse(small, structure.tied, structure.frozen)
        at = measure_cost(current).macs / measure_cost(dense).macs
    return current, at


def peer_subject(subjects: Subjects) -> Subject:
    """What torch_pruning has to be told by hand, read off the groups we found."""
    groups = subjects.structure.groups.groups
    stream = {site.layer for g in groups if g.kind == "stream" for site in g.sites}
    classes = int(subjects.dense(subjects.example).shape[1])
    linear = {n: m for n, m in subjects.model.module.named_modules() if isinstance(m, nn.Linear)}
    blocks = {site.layer.rpartition(".")[0]: g.size for g in groups if g.kind == "head" for site in g.sites}
    fused = {n: m for n, m in linear.items() if m.out_features == 3 * m.in_features}
    heads = {n: size for n in fused for block, size in blocks.items() if n.rpartition(".")[0] == block}
    return Subject(subjects.model.module, subjects.example, classes, frozenset(stream), heads)


def with_repaired_norms(network: nn.Module, calibration: Batches) -> nn.Module:
    """A copy whose batch normalisations know their new inputs: the repair anybody can do."""
    network = copy.deepcopy(network)
    norms = [m for m in network.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the plain average over all batches
        norm.train()
    with torch.no_grad():
        for images, _ in calibration:
            network(images)
    return network.eval()


class Points:
    """Rows already measured, on disk after every one."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self.rows: list[Row] = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
        self.known = {row["key"]: row for row in self.rows}

    def measure(self, named: Row, depends_on: object, work: Callable[[], Row]) -> Row:
        key = content_hash([named, depends_on])
        if key not in self.known:
            start = time.perf_counter()
            row = {**named, **work(), "seconds": round(time.perf_counter() - start, 1), "key": key}
            with self.path.open("a") as file:
                file.write(json.dumps(row) + "\n")
            self.known[key] = row
            self.rows.append(row)
        row = self.known[key]
        console.print(_line(row), highlight=False, soft_wrap=True)
        return row


def _line(row: Row) -> str:
    found = row.get("failed") or f"{row['macs_kept']:.3f} of MACs, {row['accuracy']:.1%} of {row['dense']:.1%}"
    point = f"{row['network']:14} seed {row['seed']} keep {row['asked']:.2f}"
    return f"{point} {row['variant']:44} {found}  {row['seconds']} s"


def measure(study: Study, seed: int, points: Points, *, peer: bool) -> Iterator[Row]:
    """Every point of one network and one seed; subjects are read only if a point is missing."""
    held: list[Subjects] = []

    def subjects() -> Subjects:
        return held[0] if held else held.append(Subjects(study, seed)) or held[0]

    for share in study.kept:
        for name, changes in study.variants.items():
            recipe = make_recipe({**_values(study.recipe), "seed": seed, **changes})
            named = {"network": study.name, "seed": seed, "asked": share, "variant": name}
            yield points.measure(named, asdict(recipe), lambda r=recipe, s=share: _try(subjects, ours, r, s))
    if not peer:
        return
    for share in study.kept:
        tried = list(measure_peer(study, seed, share, points, subjects, SETTINGS, SCREEN_IMAGES))
        counted = [r for r in tried if _counts(r)]
        best = sorted(counted, key=lambda r: -max(r["accuracy"], r["with_norms"]))[:SCREENED]
        settings = [x for x in SETTINGS if f"{PEER}{x}" in {r["variant"] for r in best}]
        yield from measure_peer(study, seed, share, points, subjects, settings, 0)


def measure_peer(
    study: Study,
    seed: int,
    share: float,
    points: Points,
    subjects: Callable[[], Subjects],
    settings: Sequence[Setting],
    images: int,
) -> Iterator[Row]:
    """The peer under each setting, on so many evaluation images (0: all)."""
    for setting in settings:
        named = {"network": study.name, "seed": seed, "asked": share, "variant": f"{PEER}{setting}"}
        named |= {"screened_on": images} if images else {}
        depends = [str(setting), asdict(replace(study.recipe, seed=seed))]
        yield points.measure(named, depends, lambda x=setting: _try_peer(subjects, x, share, images))


def _counts(row: Row) -> bool:
    return "failed" not in row and row["macs_kept"] >= ENOUGH * row["asked"]


def _values(recipe: Recipe) -> dict[str, Any]:
    return {f.name: getattr(recipe, f.name) for f in fields(recipe)}


def _try(subjects: Callable[[], Subjects], build: Callable[..., tuple[nn.Module, float]], *how: Any) -> Row:
    found = subjects()
    try:
        network, at = build(found, *how)
    except CompressorError as refusal:
        return {"failed": str(refusal)[:200], "dense": found.dense_accuracy}
    accuracy = evaluate(network, found.evaluation)
    return {"macs_kept": at, "accuracy": accuracy.top1, "dense": found.dense_accuracy, "images": accuracy.n}


def _try_peer(subjects: Callable[[], Subjects], setting: Setting, share: float, images: int) -> Row:
    found = subjects()
    try:
        network, at = prune_to(peer_subject(found), setting, share, found.calibration, seed=found.recipe.seed)
        shown = list(itertools.islice(found.evaluation, -(-images // found.recipe.batch_size) or None))
        accuracy = evaluate(network, shown).top1
        norms = evaluate(with_repaired_norms(network, found.calibration), shown).top1
    except Exception as failure:  # whatever the peer raises is its result
        return {"failed": f"{type(failure).__name__}: {failure}"[:200], "dense": found.dense_accuracy}
    return {"macs_kept": at, "accuracy": accuracy, "with_norms": norms, "dense": found.dense_accuracy}


def summarise(rows: list[Row]) -> list[Row]:
    """One point per network and share: ours over the seeds, the best setting of the peer over the same."""
    table = pd.DataFrame([r for r in rows if _counts(r) and not r.get("screened_on")])
    found = []
    for (network, _), part in table.groupby(["network", "asked"], sort=False):
        mine = part[part.variant == OURS]
        if mine.empty:
            continue
        peers = part[part.variant.str.startswith(PEER)]
        by_setting = peers.groupby("variant").accuracy.mean()
        point = {
            "model": network,
            "macs_kept": float(mine.macs_kept.mean()),
            "dense": float(mine.dense.mean()),
            "ours": float(mine.accuracy.mean()),
            "ours_spread": float(mine.accuracy.max() - mine.accuracy.min()),
            "seeds": len(mine),
            "peer": float(by_setting.max()) if len(by_setting) else None,
            "peer_setting": str(by_setting.idxmax()).removeprefix(PEER) if len(by_setting) else "",
            "peer_with_norms": float(peers.groupby("variant").with_norms.mean().max()) if len(by_setting) else None,
        }
        found.append({k: round(v, 4) if isinstance(v, float) else v for k, v in point.items()})
    return found


def draw(rows: list[Row], folder: Path) -> None:
    """A plot per network: mean over the seeds with their range, every variant and the peer's best."""
    table = pd.DataFrame([r for r in rows if "failed" not in r and not r.get("screened_on")])
    for network, part in table.groupby("network", sort=False):
        figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
        mine = part[~part.variant.str.startswith(PEER)]
        peers = part[part.variant.str.startswith(PEER) & (part.macs_kept >= ENOUGH * part.asked)]
        lines = list(mine.groupby("variant", sort=False))
        if not peers.empty:
            best = peers.loc[peers.groupby("asked").accuracy.idxmax()]
            lines.append(("torch_pruning, best setting", best))
        for name, line in lines:
            curve = line.groupby("asked").accuracy.agg(["mean", "min", "max"])
            axes.plot(100 * curve.index, 100 * curve["mean"], marker="o", label=name)
            axes.fill_between(100 * curve.index, 100 * curve["min"], 100 * curve["max"], alpha=0.2)
        axes.axhline(100 * part.dense.mean(), color="grey", linestyle="--", label="dense")
        axes.set(
            xlabel="MACs kept, %", ylabel="top-1, %", title=f"{network}: accuracy without retraining", ylim=(0, 100)
        )
        axes.invert_xaxis()
        axes.legend(fontsize=8)
        figure.savefig(folder / f"{network}.png", dpi=150)
        plt.close(figure)


def main() -> None:
    options = _options()
    if options.threads:
        torch.set_num_threads(options.threads)
    points = Points(options.out / "points.jsonl")
    rows: list[Row] = []
    for study in _studies(options):
        for i, seed in enumerate(map(int, options.seeds.split(","))):
            rows += measure(study, seed, points, peer=options.peer and i == 0)  # one seed of the peer is 36 settings
    pd.DataFrame(rows).drop(columns="key").to_csv(options.out / "points.csv", index=False)
    draw(rows, options.out)
    print(json.dumps({"points": summarise(rows)}))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", default="", help=f"names of {NETWORKS.name}, comma-separated")
    parser.add_argument("--kept", default="", help="shares of the MACs that stay")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--variant", action="append", default=[], help="'name: field=value; field=value', repeatable")
    parser.add_argument("--peer", action=argparse.BooleanOptionalAction, default=True, help="torch_pruning beside ours")
    parser.add_argument("--hold-out", type=float, default=0.0, help="share of --data to choose on")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/accuracy"))
    flags = parser.add_argument_group("recipe, as in `compressor compress`")
    for f in fields(Recipe):
        if f.name not in ("seed", "out"):
            flags.add_argument(f"--{f.name.replace('_', '-')}", dest=f"recipe_{f.name}")
    return parser.parse_args()


def _studies(options: argparse.Namespace) -> Iterator[Study]:
    given = {k[7:]: v for k, v in vars(options).items() if k.startswith("recipe_") and v is not None}
    variants: dict[str, dict[str, str]] = {OURS: {}}
    for text in options.variant:
        name, _, changes = text.partition(":")
        variants[name.strip()] = dict(tuple(map(str.strip, c.split("=", 1))) for c in changes.split(";") if c.strip())  # type: ignore[misc]
    known = tomllib.loads(os.path.expandvars(NETWORKS.read_text()))
    if options.networks and "COMPRESSOR_DATA" not in os.environ:
        raise SystemExit(f"set COMPRESSOR_DATA to the folder of images and weights that {NETWORKS.name} names")
    for name in filter(None, options.networks.split(",")) if options.networks else [""]:
        table = dict(known[name]) if name else {"kept": (0.7, 0.5, 0.35)}
        kept = tuple(map(float, options.kept.split(","))) if options.kept else tuple(table.pop("kept"))
        table.pop("kept", None)
        recipe = read_recipe(None, **{"multiple": 1, **table, **given})
        if options.hold_out:
            recipe = replace(recipe, evaluation_data="", evaluation=options.hold_out)
        yield Study(name or recipe.model, recipe, kept, variants)


if __name__ == "__main__":
    main()
