"""The toy experiment of "Pruning by Explaining" (Yeom et al. 2021): who picks 1000 of 3000 neurons best from n samples?

Three 2-D sets, an MLP of 3 x 1000, nothing fine-tuned. A reference sample is a fresh draw of the set per seed.
Prints the published figures beside ours, then a table over n; the last line is one JSON object.
    python benchmarks/toy.py --seeds 50 --out runs/toy
"""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from safetensors.torch import load_file, save_file
from sklearn.datasets import make_circles, make_moons
from torch import Tensor, fx, nn
from torch.nn import functional

from compressor.graph import aten, trace
from compressor.records import FloatArray, Group, Groups, IntArray, Site
from compressor.relevance import ScoreOptions, score
from compressor.relevance.composite import Composite, Rule
from compressor.relevance.lrp import LrpOptions

WIDTH, REMOVED, TRAINING_SAMPLES_PER_CLASS = 1000, 1000, 1000
CLASSES = {"moon": 2, "circle": 2, "mult": 4}
SAMPLES_PER_CLASS = (1, 2, 5, 10, 20, 50, 100)
SHOWN_PER_CLASS = 5  # n = 10, for the four-class set n = 20
PUBLISHED = {
    "moon": {"weight": 99.6, "gradient": 86.2, "taylor": 84.8, "lrp": 99.9},
    "circle": {"weight": 97.1, "gradient": 82.2, "taylor": 87.2, "lrp": 100.0},
    "mult": {"weight": 91.0, "gradient": 68.0, "taylor": 77.3, "lrp": 91.9},
}

_ZPLUS = Rule("zplus", bias=False, epsilon=1e-9)
_OPTIONS = {
    "lrp": ScoreOptions(
        start="logit",
        sign="signed",
        lrp=LrpOptions(Composite(low=_ZPLUS, mid=_ZPLUS, high=_ZPLUS, fc=_ZPLUS, linear=_ZPLUS, first=_ZPLUS)),
    ),
    "gradient": ScoreOptions(start="loss", per="all", place="site", over="mean"),
    "taylor": ScoreOptions(start="loss", per="all", place="site", over="mean"),
    "gradient_x_input": ScoreOptions(place="site"),
    "activation": ScoreOptions(),
    "l1": ScoreOptions(),
    "random": ScoreOptions(),
}
CRITERIA = {"weight": "l1", **{name: name for name in _OPTIONS if name != "l1"}}
# Relevance always sums to one per layer. The rivals: as in the authors' released code (weights by their sum,
# gradient and Taylor by their L2 norm per layer), raw, and by their sum like relevance.
NORMALISATIONS = ("released", "raw", "equal")


@dataclass(frozen=True)
class Trained:
    """A network, its training set, its accuracy there in percent, and that of what was left of it so far."""

    graph: fx.GraphModule
    groups: Groups
    x: Tensor
    y: Tensor
    accuracy: float
    known: dict[bytes, float] = field(default_factory=dict)

    def accuracy_of(self, kept: Mapping[str, IntArray]) -> float:
        """Many criteria and seeds keep the same neurons."""
        key = b"|".join(units.tobytes() for units in kept.values())
        if key not in self.known:
            self.known[key] = accuracy(self.graph, kept, self.x, self.y)
        return self.known[key]


def draw(name: str, per_class: int, seed: int) -> tuple[Tensor, Tensor]:
    """Samples [N, 2] and classes [N] of one of the three sets."""
    if name == "mult":
        x, y = _spirals(per_class, CLASSES[name], np.random.RandomState(seed))
    elif name == "moon":
        x, y = make_moons(2 * per_class, noise=0.1, random_state=seed)
    else:
        x, y = make_circles(2 * per_class, noise=0.1, factor=0.3, random_state=seed)
    return torch.tensor(x, dtype=torch.float32), torch.tensor(y, dtype=torch.int64)


def _spirals(per_class: int, classes: int, random: np.random.RandomState) -> tuple[FloatArray, FloatArray]:
    """Arms from the centre to radius 1 over 4 radians each, with angles that scatter by 0.2."""
    radius = np.linspace(0, 1, per_class)
    angles = [np.linspace(4 * c, 4 * c + 4, per_class) + 0.2 * random.randn(per_class) for c in range(classes)]
    points = [np.stack([radius * np.sin(a), radius * np.cos(a)], axis=1) for a in angles]
    return np.concatenate(points), np.repeat(np.arange(classes), per_class)


def build(classes: int) -> nn.Sequential:
    hidden = [nn.Linear(2, WIDTH), nn.ReLU(), nn.Dropout(), nn.Linear(WIDTH, WIDTH), nn.ReLU()]
    return nn.Sequential(*hidden, nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, classes))


def train(name: str, seed: int, epochs: int, progress: Progress) -> nn.Sequential:
    torch.manual_seed(seed)
    model = build(CLASSES[name])
    x, y = draw(name, TRAINING_SAMPLES_PER_CLASS, 10_000 + seed)
    optimiser = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 0.1, epochs * (len(x) // 100))
    task = progress.add_task(f"train {name} {seed}", total=epochs)
    for _ in range(epochs):
        for batch in torch.randperm(len(x)).split(100):
            optimiser.zero_grad()
            functional.cross_entropy(model(x[batch]), y[batch]).backward()
            optimiser.step()
            schedule.step()
        progress.advance(task)
    progress.remove_task(task)
    return model.eval()


def trained(name: str, seed: int, args: argparse.Namespace, progress: Progress) -> Trained:
    """From the folder when it is there."""
    path = args.out / f"{name}-{seed}-{args.epochs}.safetensors"
    if path.exists():
        model = build(CLASSES[name]).eval()
        model.load_state_dict(load_file(path))
    else:
        model = train(name, seed, args.epochs, progress)
        save_file(model.state_dict(), path)
    x, y = draw(name, TRAINING_SAMPLES_PER_CLASS, 10_000 + seed)
    graph = trace(model, x[:3])
    return Trained(graph, hidden_groups(graph), x, y, accuracy(graph, {}, x, y))


def hidden_groups(graph: fx.GraphModule) -> Groups:
    nodes = [n for n in graph.graph.nodes if n.target is aten.linear.default][:-1]
    rows = np.zeros(WIDTH, np.int64)
    return Groups(
        tuple(
            Group(n.meta["layer"], "neuron", WIDTH, (Site(n.name, n.meta["layer"], (1,), np.arange(WIDTH)),), rows)
            for n in nodes
        )
    )


@torch.no_grad()
def accuracy(graph: fx.GraphModule, kept: Mapping[str, IntArray], x: Tensor, y: Tensor) -> float:
    """Percent, of the MLP without the neurons that are not in `kept[layer]`."""
    parameters = dict(graph.named_parameters())
    layers = sorted({name.rsplit(".", 1)[0] for name in parameters}, key=int)
    came: Tensor | None = None
    for layer in layers:
        weight: Tensor = parameters[f"{layer}.weight"]
        bias: Tensor = parameters[f"{layer}.bias"]
        stays = torch.from_numpy(kept[layer]) if layer in kept else torch.arange(len(weight))
        weight, bias = weight[stays], bias[stays]
        x = functional.linear(x, weight if came is None else weight[:, came], bias)
        x = x if layer == layers[-1] else x.relu()
        came = stays
    return 100 * float((x.argmax(1) == y).double().mean())


def keep(scores: Mapping[str, FloatArray], criterion: str, normalisation: str) -> dict[str, IntArray]:
    """Without the `REMOVED` lowest over all layers together."""
    values = {layer: own[0] for layer, own in scores.items()}
    if normalisation != "raw" or criterion == "lrp":
        euclidean = normalisation == "released" and criterion in ("gradient", "taylor")
        values = {
            layer: own / ((np.linalg.norm(own) if euclidean else own.sum()) or 1.0) for layer, own in values.items()
        }
    flat = np.concatenate(list(values.values()))
    stays = np.ones(len(flat), bool)
    stays[np.argsort(flat, kind="stable")[:REMOVED]] = False
    return {layer: np.flatnonzero(part) for layer, part in zip(values, np.split(stays, len(values)), strict=True)}


def measure(name: str, net: Trained, seed: int, per_class: int) -> Iterator[dict[str, object]]:
    """One row per criterion and normalisation."""
    batch = draw(name, per_class, seed)
    for label, criterion in CRITERIA.items():
        options = _OPTIONS[criterion] if criterion != "random" else ScoreOptions(seed=seed)
        values = score(net.graph, net.groups, [batch], criterion=criterion, options=options).values
        for normalisation in NORMALISATIONS:
            found = net.accuracy_of(keep(values, criterion, normalisation))
            yield {
                "set": name,
                "seed": seed,
                "per_class": per_class,
                "criterion": label,
                "normalisation": normalisation,
                "accuracy": found,
            }


def rows_of(args: argparse.Namespace, progress: Progress) -> Iterator[dict[str, object]]:
    """What is in the folder already is not measured again."""
    log = args.out / f"rows-{args.networks}-{args.epochs}.jsonl"
    rows = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    done = {(r["set"], r["seed"], r["per_class"]) for r in rows}
    yield from (r for r in rows if r["seed"] < args.seeds)
    task = progress.add_task("score and remove", total=len(CLASSES) * args.seeds * len(SAMPLES_PER_CLASS))
    for name in CLASSES:
        nets = [trained(name, s, args, progress) for s in range(args.networks)]
        progress.console.print(f"{name}: unpruned {', '.join(f'{n.accuracy:.2f}' for n in nets)} %")
        for seed in range(args.seeds):
            net = nets[seed % len(nets)]
            for per_class in SAMPLES_PER_CLASS:
                progress.advance(task)
                if (name, seed, per_class) in done:
                    continue
                fresh = [{**row, "unpruned": net.accuracy} for row in measure(name, net, seed, per_class)]
                with log.open("a") as file:
                    file.writelines(json.dumps(row) + "\n" for row in fresh)
                yield from fresh


def table(rows: list[dict[str, object]], name: str, normalisation: str, console: Console) -> None:
    mine = [r for r in rows if r["set"] == name and r["normalisation"] == normalisation]
    unpruned = np.mean([float(str(r["unpruned"])) for r in mine])
    shown = Table(
        title=f"{name}: training accuracy % (mean±sd), normalisation {normalisation}; unpruned {unpruned:.1f}"
    )
    for column in ("criterion", *(f"n={n * CLASSES[name]}" for n in SAMPLES_PER_CLASS), "published"):
        shown.add_column(column, justify="right")
    for criterion in CRITERIA:
        cells = []
        for n in SAMPLES_PER_CLASS:
            found = [float(str(r["accuracy"])) for r in mine if r["criterion"] == criterion and r["per_class"] == n]
            cells.append(f"{np.mean(found):.1f}±{np.std(found):.1f}")
        shown.add_row(criterion, *cells, str(PUBLISHED[name].get(criterion, "")))
    console.print(shown)


def summary(rows: list[dict[str, object]], normalisation: str, *, spread: bool = False) -> dict[str, dict[str, float]]:
    def figure(name: str, criterion: str) -> float:
        wanted = (name, criterion, normalisation, SHOWN_PER_CLASS)
        mine = [r for r in rows if (r["set"], r["criterion"], r["normalisation"], r["per_class"]) == wanted]
        found = [float(str(r["accuracy"])) for r in mine]
        return round(float(np.std(found) if spread else np.mean(found)), 2)

    return {name: {criterion: figure(name, criterion) for criterion in CRITERIA} for name in CLASSES}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=50, help="draws of reference samples")
    parser.add_argument("--networks", type=int, default=5, help="trained networks the seeds are spread over (paper: 1)")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--out", type=Path, default=Path("runs/toy"), help="folder to resume from")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    console = Console(width=160)
    console.print(f"published (n = 10, four classes n = 20, one network per set, 50 draws): {PUBLISHED}")
    with Progress(console=Console(stderr=True)) as progress:
        rows = list(rows_of(args, progress))
    for name in CLASSES:
        for normalisation in NORMALISATIONS:
            table(rows, name, normalisation, console)
    console.print(f"{platform.machine()}, torch {torch.__version__}, {torch.get_num_threads()} threads")
    console.print(
        "Relevance sums to the same in every layer; raw weights do not (rows of 2 inputs, rows of 1000), lose the "
        "whole first layer and flatter LRP. The published weight figures are near the normalised ones, not the raw."
    )
    others = {n: summary(rows, n) for n in NORMALISATIONS[1:]}
    print(json.dumps({**summary(rows, "released"), "spread": summary(rows, "released", spread=True), **others}))


if __name__ == "__main__":
    main()
