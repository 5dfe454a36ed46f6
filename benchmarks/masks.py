"""Whether a learned selector finds what decides in an image: decisions kept by its mask, and by others of its area.

    python benchmarks/masks.py --networks digits-resnet,resnet20 --seeds 0
    python benchmarks/masks.py --networks resnet20 --judge held --vary keeps=0.1 --vary images=200
The selector learns from all images that are not for evaluation, without labels. Every mask shows the pixels that come
first in some order, in each image as many as the selector's spot is large: nearest to its centre, to the middle, to
the mean centre, to a place by chance, to where LRP's relevance lies in the mean; LRP's most relevant, any by chance.
Judged by the network itself and by the predictor, which knows masked images; the curves insert and delete pixels in
those orders. OUT/points.jsonl holds what is done, OUT/<network>.png some masks; the last line is JSON.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from steered import heats
from study import Points, Row, Study, Subjects, add_flags, pool_of, read_studies, run, seeds_of, subjects_of
from torch import Tensor, fx
from torch.nn import functional

from compressor.choices import scoring_of
from compressor.inputs.images import batches, visible
from compressor.steering import SteeringOptions, learn_selector
from compressor.steering.masks import Spots
from compressor.steering.selector import find_spots
from compressor.steering.training import parted

CURVES = 100  # images whose pixels are inserted and deleted
SHARES = np.linspace(0, 1, 11)
CHANCES = 2  # draws of what is by chance
BLUR = 0.25  # of the side: the width of the Gaussian that hides pixels for the network
DRAWN = 8
CURVED = ("selector", "middle", "anywhere", "lrp", "pixels")
VARIED: Mapping[str, Callable[[str], Any]] = {
    "keeps": float,
    "images": int,
    "predictor_steps": int,
    "steps": int,
    "shift": float,
    "discs": lambda text: text == "true",
    "narrowest": float,
    "led": float,
    "schedule": str,
}


@dataclass(frozen=True, slots=True, eq=False)
class Judged:
    """[N, C, H, W] images with the class that the network gives each, and who judges masked ones."""

    images: Tensor
    decided: Tensor
    network: fx.GraphModule
    predictor: fx.GraphModule
    blurred: Tensor

    def kept(self, masks: Tensor) -> dict[str, Tensor]:
        """[N] 1 where a masked image is still called the same, by each judge; hidden: where what is masked is gone."""
        return {
            "predictor": self.same(self.predictor, self.images * masks),
            "network": self.same(self.network, self.images * masks + self.blurred * (1 - masks)),
            "hidden": self.same(self.network, self.images * (1 - masks) + self.blurred * masks),
        }

    def same(self, network: fx.GraphModule, images: Tensor) -> Tensor:
        return (logits_of(network, images).argmax(1) == self.decided).float()

    def chance_of(self, network: fx.GraphModule, images: Tensor) -> float:
        """The mean probability of the class that was decided."""
        chances = logits_of(network, images).softmax(1)
        return float(chances.gather(1, self.decided[:, None]).mean())

    def first(self, count: int) -> Judged:
        fewer = (tensor[:count] for tensor in (self.images, self.decided))
        return Judged(*fewer, self.network, self.predictor, self.blurred[:count])


@torch.no_grad()
def logits_of(network: fx.GraphModule, images: Tensor) -> Tensor:
    return torch.cat([network(part) for part in images.split(100)])


def blurred(images: Tensor) -> Tensor:
    """[N, C, H, W] so that nothing smaller than a quarter of the side is seen."""
    sigma = BLUR * images.shape[-1]
    reach = int(2 * sigma)
    line = torch.arange(-reach, reach + 1, dtype=images.dtype)
    weights = (-(line**2) / (2 * sigma**2)).exp()
    weights = (weights / weights.sum()).expand(images.shape[1], 1, 1, -1)
    wide = functional.pad(images, (reach, reach, reach, reach), mode="replicate")
    rows = functional.conv2d(wide, weights, groups=images.shape[1])
    return functional.conv2d(rows, weights.transpose(2, 3), groups=images.shape[1])


def measure(study: Study, seed: int, options: argparse.Namespace, varied: Row) -> Row:
    """Figures of one selector, and a picture of some of its masks."""
    recipe = replace(study.recipe, seed=seed, criterion="isp")
    found = subjects_of(study, seed)
    pool, _ = pool_of(recipe, found.model)
    pool = pool.subset(np.arange(min(len(pool), varied.get("images", len(pool)))))
    lessons = batches(pool, recipe.batch_size)
    selector, predictor = learn_selector(found.dense, found.structure, lessons, steering_of(recipe, varied))
    shown = found.evaluation if options.judge == "evaluation" else parted(lessons)[1]
    images = first_of(shown, options.judges)
    judged = Judged(images, logits_of(found.dense, images).argmax(1), found.dense, predictor, blurred(images))

    with torch.no_grad():
        spots, _ = find_spots(selector, found.dense, images)
    relevance = torch.from_numpy(heats(found.dense, images, judged.decided)).float()
    orders = orders_of(spots, relevance, seed)
    count = spots.map().flatten(1).sum(1).round().long().clamp(1, relevance.shape[1])  # [N] pixels
    rows = {name: kept_by(judged, order, count) for name, order in orders.items()}
    draw(found, images, spots, relevance, count, options.out / f"{study.name}.png")
    return {
        "lessons": len(pool),
        "judges": len(images),
        "area": round(float(count.double().mean()) / relevance.shape[1], 4),
        "width": [round(float(value), 2) for value in (spots.sigma.mean(), spots.sigma.std())],
        "centres_spread": (spots.centre.std(0) / torch.tensor(selector.shape)).round(decimals=3).tolist(),
        "kept": {name: means(kept) for name, kept in rows.items()},
        "selector_ahead_of": {name: ahead(rows["selector"], kept) for name, kept in rows.items() if name != "selector"},
        "ends": ends_of(judged),
        "curves": curves_of(judged.first(CURVES), orders),
    }


def steering_of(recipe: Any, varied: Row) -> SteeringOptions:
    options = scoring_of(replace(recipe, gates_schedule=varied.get("schedule", ""))).steering
    named = {name: varied[name] for name in ("keeps", "predictor_steps", "steps", "discs", "led") if name in varied}
    if "narrowest" in varied and options.selector.widths is not None:
        named["widths"] = (varied["narrowest"], options.selector.widths[1])
    augmentation = replace(options.augmentation, shift=varied.get("shift", options.augmentation.shift))
    return replace(options, selector=replace(options.selector, **named), augmentation=augmentation)


def first_of(shown: Any, most: int) -> Tensor:
    parts: list[Tensor] = []
    for inputs, _ in shown:
        parts.append(inputs)
        if sum(map(len, parts)) >= most:
            break
    return torch.cat(parts)[:most]


def orders_of(spots: Spots, relevance: Tensor, seed: int) -> dict[str, list[Tensor]]:
    """[N, pixels] of each kind, the largest value first; several draws of what is by chance."""
    generator = torch.Generator().manual_seed(seed)
    height, width = spots.shape
    sides = torch.tensor([height, width]) - 1.0
    low, high = spots.centre.min(0).values, spots.centre.max(0).values
    chances = [torch.rand(spots.centre.shape, generator=generator) for _ in range(CHANCES)]
    places = torch.stack(torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij"), -1).reshape(-1, 2)
    positive = relevance.clamp_min(0)
    middles = (positive @ places.float()) / positive.sum(1, keepdim=True).clamp_min(1e-12)
    return {
        "selector": [nearness(spots.centre, places)],
        "middle": [nearness((sides / 2).expand_as(spots.centre), places)],
        "mean spot": [nearness(spots.centre.mean(0).expand_as(spots.centre), places)],
        "anywhere": [nearness(chance * sides, places) for chance in chances],
        "where spots lie": [nearness(low + chance * (high - low), places) for chance in chances],
        "where relevance lies": [nearness(middles, places)],
        "lrp": [relevance],
        "pixels": [torch.rand(relevance.shape, generator=generator) for _ in range(CHANCES)],
    }


def nearness(centres: Tensor, places: Tensor) -> Tensor:
    """[N, pixels] minus the squared distance of each pixel from the image's centre [N, 2]."""
    return -(places[None] - centres[:, None]).square().sum(2)


def mask_of(order: Tensor, count: Tensor, shape: Sequence[int]) -> Tensor:
    """[N, 1, H, W] 1 on the first `count` [N] pixels of each image."""
    ranks = order.argsort(1, descending=True).argsort(1)
    return (ranks < count[:, None]).float().reshape(len(order), 1, *shape)


def kept_by(judged: Judged, orders: Sequence[Tensor], count: Tensor) -> dict[str, Tensor]:
    """[N] how often each image's decision is kept over the draws, by each judge."""
    shape = judged.images.shape[2:]
    draws = [judged.kept(mask_of(order, count, shape)) for order in orders]
    return {name: torch.stack([draw[name] for draw in draws]).mean(0) for name in draws[0]}


def means(kept: Mapping[str, Tensor]) -> Row:
    return {name: round(float(values.mean()), 4) for name, values in kept.items()}


def ahead(kept: Mapping[str, Tensor], others: Mapping[str, Tensor]) -> Row:
    """By how much, image by image, with half of a 95 % interval."""
    found = {}
    for name, values in kept.items():
        difference = values - others[name]
        half = 1.96 * float(difference.std()) / len(difference) ** 0.5
        found[name] = [round(float(difference.mean()), 4), round(half, 4)]
    return found


def ends_of(judged: Judged) -> Row:
    """With everything shown and with nothing."""
    ones = torch.ones_like(judged.images[:, :1])
    return {"everything": means(judged.kept(ones)), "nothing": means(judged.kept(ones * 0))}


def curves_of(judged: Judged, orders: Mapping[str, Sequence[Tensor]]) -> Row:
    """Areas under the class's mean probability while pixels are inserted into, or deleted from, what is blurred.

    `shown` is the same as inserted, into grey and by the predictor.
    """
    found: Row = {}
    pixels = judged.images.shape[2] * judged.images.shape[3]
    for name in CURVED:
        order = orders[name][0][: len(judged.images)]
        heights: dict[str, list[float]] = {"inserted": [], "deleted": [], "shown": []}
        for share in SHARES:
            count = torch.full((len(order),), round(float(share) * pixels))
            mask = mask_of(order, count, judged.images.shape[2:])
            inside, outside = judged.images * mask, judged.images * (1 - mask)
            heights["inserted"].append(judged.chance_of(judged.network, inside + judged.blurred * (1 - mask)))
            heights["deleted"].append(judged.chance_of(judged.network, outside + judged.blurred * mask))
            heights["shown"].append(judged.chance_of(judged.predictor, inside))
        found[name] = {kind: round(float(np.trapezoid(values, SHARES)), 4) for kind, values in heights.items()}
    return found


def draw(found: Subjects, images: Tensor, spots: Spots, relevance: Tensor, count: Tensor, path: Any) -> None:
    """The first images, what the selector leaves of each, LRP's heat map and as many of its pixels."""
    preprocessing = found.evaluation.images.preprocessing
    shape = images.shape[2:]
    pixels = mask_of(relevance, count, shape)
    figure, axes = plt.subplots(4, DRAWN, figsize=(1.3 * DRAWN, 5.6), layout="constrained")
    for column in range(min(DRAWN, len(images))):
        image = visible(images[column].double().numpy(), preprocessing)
        limit = float(relevance[column].abs().quantile(0.995)) or 1.0
        axes[0, column].imshow(image)
        axes[1, column].imshow(image * spots.map()[column, 0].numpy()[:, :, None])
        axes[2, column].imshow(relevance[column].reshape(*shape), cmap="RdBu_r", vmin=-limit, vmax=limit)
        axes[3, column].imshow(image * pixels[column, 0].numpy()[:, :, None])
    for row, name in zip(axes, ("image", "selector", "LRP", "LRP, same area"), strict=True):
        row[0].set_title(name, fontsize=8, loc="left")
        for each in row:
            each.axis("off")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def summary_line(row: Row) -> str:
    shares = {name: kept["predictor"] for name, kept in row["kept"].items()}
    return f"{row['network']} seed {row['seed']} {row['varied']}: area {row['area']}, kept {shares}"


def main() -> None:
    options = _options()
    varied = dict(_varied(text) for text in options.vary)
    points = Points(options.out / "points.jsonl")
    rows = []
    for study in read_studies(options):
        for seed in seeds_of(options):
            named = {"network": study.name, "seed": seed, "judge": options.judge, "varied": varied}
            named["judges_asked"] = options.judges
            recipe = replace(study.recipe, seed=seed)
            depends_on = [asdict(recipe), asdict(steering_of(replace(recipe, criterion="isp"), varied))]

            def work(study: Study = study, seed: int = seed) -> Row:
                return measure(study, seed, options, varied)

            rows.append(points.measure(named, depends_on, work, line=summary_line))
    print(json.dumps({"masks": [{k: v for k, v in row.items() if k != "key"} for row in rows]}))


def _varied(text: str) -> tuple[str, Any]:
    name, _, value = text.partition("=")
    if name not in VARIED:
        raise SystemExit(f"--vary {text!r} is not NAME=VALUE with one of {', '.join(VARIED)}")
    return name, VARIED[name](value)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--judge", choices=("evaluation", "held"), default="evaluation", help="images that judge")
    parser.add_argument("--judges", type=int, default=500, help="at most so many images judge")
    parser.add_argument("--vary", action="append", default=[], help=f"NAME=VALUE of {', '.join(VARIED)}")
    add_flags(parser, kept="not used", out="runs/masks")
    return parser.parse_args()


if __name__ == "__main__":
    run(main)
