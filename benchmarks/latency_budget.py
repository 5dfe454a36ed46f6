"""A latency budget against the MAC budget that reaches the same measured latency: accuracy without retraining.

    python benchmarks/latency_budget.py --network mobilenetv2 --budget "latency 0.5 on onnxruntime threads 1"
    python benchmarks/latency_budget.py --recipe mine.toml --budget "latency 0.5 on openvino" --seeds 0,1,2
    python benchmarks/latency_budget.py --network resnet20 calibration=100 criterion=l1
Each seed: the latency budget is met, MAC budgets are tried until their network takes the same time, both are repaired
and evaluated, and the two are timed once more against each other. What is done is kept; the last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from study import NETWORKS, known_networks
from torch import fx

from compressor.accuracy import evaluate
from compressor.budgets import Budget, parse_budget
from compressor.device.environment import read_environment
from compressor.errors import CompressorError
from compressor.files import content_hash, read_json, write_json
from compressor.latency.correction import Ratio, meet
from compressor.latency.trial import export_for, time_ratio
from compressor.pipeline import Pruned, find_scores, find_units, keep_units, remove_and_repair
from compressor.planning import make_plan
from compressor.planning.budget import least_share
from compressor.pruning import Structure, prune
from compressor.recipe import Recipe, make_recipe, read_recipe
from compressor.records import Plan, Scores
from compressor.run.baseline import baseline_of, measure_ratio
from compressor.run.plans import set_aim
from compressor.run.tasking import NetworkTask, make_task
from compressor.run.work import Request, Work, prepare

SCHEMA = "latency-budget/1"
STEP = 0.02  # of the MACs, in which the largest MAC budget is looked for
console = Console(stderr=True)


@dataclass(frozen=True, slots=True)
class Row:
    """One network of one seed. `ratio` is its latency over the dense one's, `against` over the latency budget's."""

    seed: int
    kind: str
    multiple: int
    top1: float
    images: int
    macs_kept: float
    params_kept: float
    ratio: tuple[float, float, float]
    against: tuple[float, float, float] = (1.0, 1.0, 1.0)


def study_seed(recipe: Recipe, out: Path, multiples: Sequence[int]) -> list[Row]:
    """The latency budget's network and, for each multiple, the MAC budget's of the same latency."""
    folder = out / f"seed-{recipe.seed}"
    timed = _prepared(replace(recipe, out=str(folder / "latency")))
    structure, spent = find_units(timed)
    with timed.stages.begun():
        keep_units(timed, structure, spent)
        pruned = remove_and_repair(timed, structure, _task_of(timed))
    facts = pruned.budget_facts["latency_budget"]
    ratio = (facts["measured"], *facts["interval"])
    rows = [_once(folder / "latency.json", [*_inputs(recipe), ratio], lambda: _row(timed, 0, pruned, ratio))]
    budget = replace(parse_budget(recipe.budget), share=facts["measured"])
    for multiple in multiples:
        counted = replace(recipe, multiple=multiple, out=str(folder / f"macs-{multiple}"))
        row = partial(_same_latency, counted, structure, budget, pruned.network)
        rows.append(_once(folder / f"macs-{multiple}.json", [*_inputs(counted), ratio], row))
    return rows


def _inputs(recipe: Recipe) -> list[Any]:
    return [asdict(replace(recipe, out="")), read_environment().fingerprint]


def _once(path: Path, inputs: Sequence[Any], find: Callable[[], Row]) -> Row:
    """The row that is kept there, if it was found with these inputs."""
    key = content_hash(*inputs)
    if not path.is_file() or read_json(path, SCHEMA)["inputs"] != key:
        write_json(path, {"schema": SCHEMA, "inputs": key, "row": asdict(find())})
    held = read_json(path, SCHEMA)["row"]
    return Row(**{**held, "ratio": tuple(held["ratio"]), "against": tuple(held["against"])})


def _prepared(recipe: Recipe) -> Work:
    return prepare(Request(recipe), lambda stage, share: console.print(f"  {stage}") if share in (0.0, 1.0) else None)


def _task_of(work: Work) -> NetworkTask:
    """What the answers mean; the groups are kept already."""
    return make_task(work.stages, work.chosen, work.dense, work.calibration_images, work.stages.keys["groups"])


def _same_latency(recipe: Recipe, structure: Structure, budget: Budget, rival: fx.GraphModule) -> Row:
    """The largest MAC budget whose network takes what the latency budget's does, found by timing."""
    work = _prepared(replace(recipe, budget="macs 0.5"))
    with work.stages.begun():
        keep_units(work, structure)
        scores = find_scores(work, 1, work.dense, structure, _task_of(work))
        share, found = _met_by_macs(work, structure, scores, budget)
    work = _prepared(replace(recipe, budget=f"macs {share * (1 + 1e-6):.6f}"))
    with work.stages.begun():
        keep_units(work, structure)
        pruned = remove_and_repair(work, structure, _task_of(work))
    row = _row(work, recipe.multiple, pruned, (found.value, found.low, found.high))
    return replace(row, kind="macs", against=_beside(work, pruned.network, rival, budget))


def _met_by_macs(work: Work, structure: Structure, scores: Scores, budget: Budget) -> tuple[float, Ratio]:
    options = set_aim(work, structure).options
    baseline = baseline_of(work, structure, budget)

    def plan_at(share: float) -> tuple[Plan, float]:
        plan = make_plan(work.dense, structure, scores, Budget("macs", share, 1.0), options)
        return plan, plan.macs_kept / plan.macs_dense

    def measure(plan: Plan) -> Ratio:
        found = measure_ratio(baseline, budget, prune(work.dense, structure, plan)[0])
        console.print(f"  seed {work.recipe.seed}: {plan.macs_kept / plan.macs_dense:.3f} of the MACs take {found}")
        return found

    least = least_share(work.dense, structure, scores, "macs", options)
    met = meet(budget, plan_at=plan_at, measure=measure, least=least * (1 + 1e-9))
    share, found = met.plan.macs_kept / met.plan.macs_dense, met.trial.measured
    while True:  # latency hardly rises over wide ranges of MACs, and the network that keeps most is the fair rival
        plan, more = plan_at(min(share + STEP, 1.0))
        if more <= share or (measured := measure(plan)).value > budget.share * (1 + budget.slack):
            return share, found
        share, found = more, measured


def _beside(work: Work, network: fx.GraphModule, rival: fx.GraphModule, budget: Budget) -> tuple[float, float, float]:
    """Latency of the MAC budget's network over the latency budget's, in one interleaved measurement."""
    with tempfile.TemporaryDirectory() as folder:
        files = {
            name: export_for(net, work.example, Path(folder) / f"{name}.onnx")
            for name, net in (("dense", rival), ("pruned", network))
        }
        found = time_ratio((files["dense"], files["pruned"]), work.sample(max(16, budget.batch)), budget)
    return found.value, found.low, found.high


def _row(work: Work, multiple: int, pruned: Pruned, ratio: tuple[float, float, float]) -> Row:
    accuracy = evaluate(pruned.network, work.evaluation)
    before, after = (sum(p.numel() for p in net.parameters()) for net in (work.dense, pruned.network))
    kept = pruned.plan.macs_kept / pruned.plan.macs_dense
    return Row(work.recipe.seed, "latency", multiple, accuracy.top1, accuracy.n, kept, after / before, ratio)


def read_study(options: argparse.Namespace) -> Recipe:
    fields = dict(pair.split("=", 1) for pair in options.fields)
    given = {"finetune_epochs": 0, "targets": "", "budget": options.budget, **fields}
    if options.recipe:
        return read_recipe(options.recipe, **given)
    known = known_networks()
    if options.network not in known:
        raise CompressorError(f"no network '{options.network}' in {NETWORKS.name}; there are {', '.join(known)}")
    held = {k: v for k, v in known[options.network].items() if k not in ("kept", "variants")}
    if "$" in json.dumps(held):
        raise CompressorError("set COMPRESSOR_DATA to the folder of images and weights")
    return make_recipe({**held, **given})


def summarise(rows: Sequence[Row], multiples: Sequence[int]) -> dict[str, Any]:
    ours = {r.seed: r for r in rows if r.kind == "latency"}
    found: dict[str, Any] = {"seeds": sorted(ours), "latency": _mean(list(ours.values()))}
    for multiple in multiples:
        theirs = {r.seed: r for r in rows if r.kind == "macs" and r.multiple == multiple}
        better = [ours[s].top1 >= theirs[s].top1 for s in ours]
        found[f"macs, multiple {multiple}"] = {**_mean(list(theirs.values())), "latency_at_least_as_good": sum(better)}
    return found


def _mean(rows: Sequence[Row]) -> dict[str, Any]:
    of: Callable[[str], float] = lambda name: round(float(np.mean([getattr(r, name) for r in rows])), 4)  # noqa: E731
    spread = round(float(np.std([r.top1 for r in rows])), 4)
    latency = {"ratio": round(float(np.mean([r.ratio[0] for r in rows])), 4)}
    return {"top1": of("top1"), "top1_spread": spread, "macs_kept": of("macs_kept"), **latency}


def show(rows: Sequence[Row], title: str) -> None:
    table = Table(title=title)
    for column in ("seed", "budget", "top-1", "MACs", "params", "of dense's time", "of latency's time"):
        table.add_column(column, justify="left" if column == "budget" else "right", overflow="fold")
    for r in rows:
        kind = r.kind if r.kind == "latency" else f"macs, multiple {r.multiple or 'measured'}"
        spans = [f"{v:.3f} ({low:.3f}-{high:.3f})" for v, low, high in (r.ratio, r.against)]
        table.add_row(str(r.seed), kind, f"{r.top1:.2%}", f"{r.macs_kept:.1%}", f"{r.params_kept:.1%}", *spans)
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", default="resnet20", help=f"one of {NETWORKS.name}")
    parser.add_argument("--recipe", default="", help="a recipe of your own instead")
    parser.add_argument("--budget", default="latency 0.5 on onnxruntime")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--multiples", default="8,0", help="of the MAC budget; 0: the widths measured here")
    parser.add_argument("--threads", type=int, default=1, help="of PyTorch, not of what is timed")
    parser.add_argument("--out", type=Path, default=Path("runs/latency-budget"))
    parser.add_argument("fields", nargs="*", help="field=value of the recipe")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    os.environ.setdefault("COMPRESSOR_CACHE", str(options.out / "cache"))
    recipe, multiples = read_study(options), [int(m) for m in options.multiples.split(",")]
    out = options.out / (options.network if not options.recipe else Path(options.recipe).stem)
    rows: list[Row] = []
    for seed in map(int, options.seeds.split(",")):
        rows += study_seed(replace(recipe, seed=seed), out, multiples)
        show(rows, f"{recipe.model.split('/')[-1]}: {recipe.budget}")
    environment = read_environment()
    machine = {**environment.machine, "fingerprint": environment.fingerprint}
    result = {**summarise(rows, multiples), "budget": recipe.budget, "criterion": recipe.criterion}
    print(json.dumps({**result, "rows": [asdict(r) for r in rows], "machine": machine}))


if __name__ == "__main__":
    try:
        main()
    except CompressorError as error:
        raise SystemExit(f"error: {error}") from error
