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
import functools
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
import torch
from peer import SETTINGS, Batch, Setting, Subject, prune_to
from study import (
    ENOUGH,
    Points,
    Row,
    Study,
    Subjects,
    add_flags,
    as_fields,
    attempt,
    counts,
    draw_bounds,
    draw_line,
    finish,
    ours,
    read_studies,
    seeds_of,
    subjects_of,
)
from torch import nn

from compressor.accuracy import evaluate
from compressor.recipe import Recipe, make_recipe

SCREEN_IMAGES, SCREENED = 160, 3  # the peer's settings are tried on few evaluation images, the best on all of them
OURS, PEER = "ours", "torch_pruning: "
Variants = Mapping[str, Mapping[str, Any]]


@functools.lru_cache(maxsize=1)
def peer_subject(subjects: Subjects) -> Subject:
    """What torch_pruning has to be told by hand, read off the groups we found."""
    groups = subjects.structure.groups.groups
    stream = {site.layer for g in groups if g.kind == "stream" for site in g.sites}
    linear = {n: m for n, m in subjects.model.module.named_modules() if isinstance(m, nn.Linear)}
    blocks = {site.layer.rpartition(".")[0]: g.size for g in groups if g.kind == "head" for site in g.sites}
    fused = {n: m for n, m in linear.items() if m.out_features == 3 * m.in_features}
    heads = {n: size for n in fused for block, size in blocks.items() if n.rpartition(".")[0] == block}
    module, batches = subjects.model.module, subjects.calibration
    return Subject(module, subjects.example, subjects.classes, frozenset(stream), heads, batches)


def with_repaired_norms(network: nn.Module, calibration: Iterable[Batch]) -> nn.Module | None:
    """A copy whose batch normalisations know their new inputs: the repair anybody can do.

    None where there are none that hold statistics: those folded into their layers, means of zero, are plain biases.
    """
    network = copy.deepcopy(network)
    norms = [m for m in network.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.running_mean.any()]
    if not norms:
        return None
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the plain average over all batches
        norm.train()
    with torch.no_grad():
        for images, _ in calibration:
            network(images)
    return network.eval()


def measure(study: Study, seed: int, points: Points, variants: Variants, *, peer: bool) -> Iterator[Row]:
    """Every point of one network and one seed; subjects are read only if a point is missing."""
    subjects = functools.cache(lambda: subjects_of(study, seed))
    for share in study.kept:
        for name, changes in variants.items():
            recipe = make_recipe({**_values(study.recipe), "seed": seed, **changes})
            named = {"network": study.name, "seed": seed, "asked": share, "variant": name}
            yield points.measure(named, asdict(recipe), lambda r=recipe, s=share: attempt(subjects, ours, r, s))
    if not peer:
        return
    for share in study.kept:
        tried = list(measure_peer(study, seed, share, points, subjects, SETTINGS, SCREEN_IMAGES))
        best = sorted(filter(counts, tried), key=lambda r: -max(r["accuracy"], r["with_norms"]))[:SCREENED]
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


def _values(recipe: Recipe) -> dict[str, Any]:
    return {f.name: getattr(recipe, f.name) for f in fields(recipe)}


def _try_peer(subjects: Callable[[], Subjects], setting: Setting, share: float, images: int) -> Row:
    found = subjects()
    try:
        network, at = prune_to(peer_subject(found), setting, share, seed=found.recipe.seed)
        few = -(-images // found.recipe.batch_size) or None
        shown = list(itertools.islice(found.evaluation, few))
        accuracy = evaluate(network, shown).top1
        renewed = with_repaired_norms(network, itertools.islice(found.calibration, few))
        norms = evaluate(renewed, shown).top1 if renewed else accuracy
    except Exception as failure:  # whatever the peer raises is its result
        return {"failed": f"{type(failure).__name__}: {failure}"[:200], "dense": found.dense_accuracy}
    return {"macs_kept": at, "accuracy": accuracy, "with_norms": norms, "dense": found.dense_accuracy}


def summarise(rows: list[Row]) -> list[Row]:
    """One point per network and share: ours over the seeds, the best setting of the peer over the same."""
    table = pd.DataFrame([r for r in rows if counts(r) and not r.get("screened_on")])
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
    """A plot per network: mean over the seeds with their range, every variant, and the peer with its best settings."""
    table = pd.DataFrame([r for r in rows if "failed" not in r and not r.get("screened_on")])
    for network, part in table.groupby("network", sort=False):
        figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
        mine = part[~part.variant.str.startswith(PEER)]
        peers = part[part.variant.str.startswith(PEER) & (part.macs_kept >= ENOUGH * part.asked)]
        lines = list(mine.groupby("variant", sort=False))
        if not peers.empty:
            renewed = peers.assign(accuracy=peers.with_norms)
            for name, rows_of in (("best setting", peers), ("batch norm re-estimated", renewed)):
                best = rows_of.loc[rows_of.groupby("asked").accuracy.idxmax()]
                lines.append((f"torch_pruning, {name}", best))
        for name, line in lines:
            draw_line(axes, line, "asked", name, percent=True)
        draw_bounds(axes, part)
        axes.set(
            xlabel="MACs kept, %", ylabel="top-1, %", title=f"{network}: accuracy without retraining", ylim=(0, 100)
        )
        axes.invert_xaxis()
        axes.legend(fontsize=8)
        figure.savefig(folder / f"{network}.png", dpi=150)
        plt.close(figure)


def main() -> None:
    options = _options()
    variants = {OURS: {}, **dict(map(_variant, options.variant))}
    points = Points(options.out / "points.jsonl")
    rows: list[Row] = []
    for study in read_studies(options):
        if options.hold_out:
            study = replace(study, recipe=replace(study.recipe, evaluation_data="", evaluation=options.hold_out))
        for i, seed in enumerate(seeds_of(options)):
            peer = options.peer and i == 0  # one seed of the peer is 36 settings
            rows += measure(study, seed, points, variants, peer=peer)
    finish(rows, options.out)
    draw(rows, options.out)
    print(json.dumps({"points": summarise(rows)}))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variant", action="append", default=[], help="'name: field=value; field=value', repeatable")
    parser.add_argument("--peer", action=argparse.BooleanOptionalAction, default=True, help="torch_pruning beside ours")
    parser.add_argument("--hold-out", type=float, default=0.0, help="share of --data to choose on")
    add_flags(parser, kept="shares of the MACs that stay", out="runs/accuracy")
    return parser.parse_args()


def _variant(text: str) -> tuple[str, Mapping[str, Any]]:
    name, _, changes = text.partition(":")
    pairs = (c.split("=", 1) for c in changes.split(";") if c.strip())
    return name.strip(), as_fields({field.strip(): value.strip() for field, value in pairs})


if __name__ == "__main__":
    main()
