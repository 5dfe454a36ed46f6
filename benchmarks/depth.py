"""Whole blocks beside thinner layers, at one measured latency: what the repaired network keeps, nothing trained.

    python benchmarks/depth.py --networks digits-vit,resnet56 --seeds 0,1,2
    python benchmarks/depth.py --networks deit_tiny --budget "latency 0.5 on onnxruntime threads 1" calibration=200
Every point is the command's own run with `blocks` keep or drop, in a folder of its own below OUT, so that a study goes
on where it stopped; its gates judge nothing here. Networks are the embedded ones or those of networks.toml. Out:
OUT/points.csv and, as the last line, one JSON object.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from rich.console import Console
from study import FOLDER, NETWORKS, Row, as_fields, known_networks, spread

from compressor.errors import BudgetError, CompressorError, GateError
from compressor.pipeline import run
from compressor.recipe import EMBEDDED, Recipe, read_recipe

BLOCKS = ("keep", "drop")
RECIPE: dict[str, Any] = {  # what a run spends on files and engines tells nothing here
    "finetune_epochs": 0,
    "targets": "",
    "precisions": "fp32",
    "runtimes": "onnxruntime",
    "latency_batches": 1,
    "latency_seconds": 1.0,
    "max_accuracy_loss": 100.0,
}
console = Console(stderr=True)


def recipe_of(network: str, **given: Any) -> Recipe:
    """An embedded model's recipe, or that of networks.toml, with the given fields in its place."""
    if (EMBEDDED / f"{network}.toml").is_file():
        return read_recipe(None, model=network, **given)
    known = known_networks()
    if network not in known:
        raise SystemExit(f"no network {network!r}; there are the embedded ones and {', '.join(known)}")
    if f"${{{FOLDER}}}" in str(known[network]):
        raise SystemExit(f"set {FOLDER} to the folder of images and weights that {NETWORKS.name} names")
    fields = {name: value for name, value in known[network].items() if name not in ("kept", "variants")}
    return read_recipe(None, **{**fields, **given})


def point(network: str, seed: int, blocks: str, options: argparse.Namespace) -> Row:
    """One run's accuracy and share of the dense network's time, or why there is none."""
    given = as_fields(dict(pair.split("=", 1) for pair in options.fields))
    out = options.out / f"{network}-{seed}-{blocks}"
    recipe = recipe_of(
        network, **{**RECIPE, **given, "seed": seed, "blocks": blocks, "budget": options.budget, "out": out}
    )
    named = {"network": network, "seed": seed, "blocks": blocks}
    try:
        summary = run(recipe).summary
    except (BudgetError, GateError) as refusal:
        return {**named, "failed": str(refusal)[:200]}
    met = summary.get("latency_budget", {})
    return {
        **named,
        "dense": summary["accuracy_dense"],
        "accuracy": summary["accuracy_repaired"],
        "fidelity": summary["fidelity_shipped"],
        "macs_kept": round(summary["macs_shipped"] / summary["macs_dense"], 4),
        "time_kept": met.get("measured"),
        "dropped": summary["blocks_dropped"],
        "images": summary["evaluation_images"],
    }


def summarise(rows: Sequence[Row]) -> list[Row]:
    """Of each network what dropping blocks is ahead by, seed by seed, in shares of one."""
    table = pd.DataFrame([row for row in rows if "failed" not in row])
    found: list[Row] = []
    for network, part in table.groupby("network", sort=False):
        by_seed = part.pivot_table(index="seed", columns="blocks", values="accuracy")
        row: Row = {"network": network, "dense": round(float(part.dense.mean()), 4), "seeds": len(by_seed)}
        row |= {f"blocks {way}": spread(by_seed[way].dropna()) for way in BLOCKS if way in by_seed}
        if set(BLOCKS) <= set(by_seed):
            row["ahead"] = spread((by_seed["drop"] - by_seed["keep"]).dropna())
        found.append(row)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", default="digits-vit,resnet56")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--budget", default="latency 0.5 on onnxruntime threads 1")
    parser.add_argument("--threads", type=int, default=1, help="of PyTorch, not of what is timed")
    parser.add_argument("--out", type=Path, default=Path("runs/depth"))
    parser.add_argument("fields", nargs="*", help="field=value of the recipe")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    options.out.mkdir(parents=True, exist_ok=True)
    rows: list[Row] = []
    for network in options.networks.split(","):
        for seed in map(int, options.seeds.split(",")):
            for blocks in BLOCKS:
                rows.append(point(network, seed, blocks, options))
                console.print(rows[-1], highlight=False, soft_wrap=True)
                pd.DataFrame(rows).to_csv(options.out / "points.csv", index=False)
    print(json.dumps({"budget": options.budget, "points": summarise(rows)}))


if __name__ == "__main__":
    try:
        main()
    except CompressorError as error:
        raise SystemExit(f"error: {error}") from error
