"""What decides in an image, told at once: three scales of the frozen network in, one round spot for each image out.

Where the answer's own question finds its like among the features of a scale is where the spot lies (attention over
positions), how wide it is is read off what was found. Feature maps and tokens are alike here: positions with features.
After the selector of Ganjdanesh et al. 2022, which is a U-Net on feature maps alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, fx, nn

from ..errors import ModelError
from ..graph.interface import input_nodes, output_names, tensors_in, traced_count
from ..graph.tracing import Watcher
from ..placement import device_of
from ..pruning import Structure
from ..pruning.labels import Value
from ..pruning.structure import Keep
from ..tasks import Leaves
from ..tensors import Inputs, as_tuple
from .augmentation import Augmentation
from .centres import Centres, distance_between
from .checkpoints import Checkpoint
from .lessons import Lessons
from .masks import (
    LEAST_WIDTH,
    Spots,
    area,
    centre_of,
    drawn_mask,
    first_width_at,
    roughness,
    side_of,
    sigma_of,
    width_price,
)
from .objectives import Distance, answers_of, leaves_of
from .options import SelectorOptions
from .predictor import TEMPERATURE as SHARP
from .predictor import Stream, mask_numbers, mean_over, require_images, widths_of
from .training import TrainingOptions, train

SCALES = 3
WIDTH = 32  # features that scales are compared in
LEAST_POSITIONS = 4  # with fewer there is no telling where
TEMPERATURE = 1.0  # of what is drawn from a spot


@dataclass(frozen=True, slots=True)
class Scale:
    """A node with positions: `channels` is the axis of its features, `grid` how the others lie, `skip` tokens of none.

    [N, 1 + 14 * 14, C] of a vision transformer has grid (14, 14) and skips 1.
    """

    node: str
    channels: int
    features: int
    grid: tuple[int, int]
    skip: int = 0

    def positions(self, value: Tensor) -> Tensor:
        """[N, positions, features]."""
        last = value.movedim(self.channels, -1)
        return last.flatten(1, -2)[:, self.skip :]

    def places(self, shape: Sequence[int]) -> Tensor:
        """[positions, 2] the middle of each, from the middle of the image, in pixels."""
        rows, columns = self.grid
        y = (torch.arange(rows) + 0.5) / rows - 0.5
        x = (torch.arange(columns) + 0.5) / columns - 0.5
        grid = torch.stack(torch.meshgrid(y * shape[0], x * shape[1], indexing="ij"), -1)
        return grid.reshape(-1, 2)


def find_scales(graph: fx.GraphModule, structure: Structure) -> tuple[Scale, ...]:
    """The last node of each of the three coarsest grids; of fewer grids, nodes at a third, two thirds and the end.

    Raises ModelError where no node has units at positions of an image.
    """
    height, width = input_nodes(graph)[0].meta["val"].shape[-2:]
    possible = (_scale_of(node, graph, structure, height / width) for node in graph.graph.nodes)
    scales = tuple(filter(None, possible))
    if not scales:
        raise ModelError(
            "no layer of this network has units at the positions of an image, which the selector of criterion isp "
            "reads; use --criterion gates"
        )
    last_of_grid = {scale.grid: scale for scale in scales}
    coarsest = sorted(last_of_grid.values(), key=lambda scale: -math.prod(scale.grid))[-SCALES:]
    if len(coarsest) == SCALES:
        return tuple(coarsest)
    # at a third, at two thirds and at the end of the way: of 12 numbers 3, 7 and 11
    places = [len(scales) * (number + 1) // SCALES - 1 for number in range(SCALES)]
    return tuple(scales[max(0, place)] for place in places)


def _scale_of(node: fx.Node, graph: fx.GraphModule, structure: Structure, aspect: float) -> Scale | None:
    """The scale that a node is, of an image with that height over width; None where it has no units at positions."""
    value = structure.values.get(node.name)
    if node.op != "call_function" or not isinstance(value, Value) or not node.meta["val"].is_floating_point():
        return None
    if not 3 <= len(value.shape) <= 4 or value.shape[0] != traced_count(graph):
        return None
    channels = _axis_of_units(structure, value)
    if channels < 1:
        return None
    positions = [size for axis, size in enumerate(value.shape) if axis not in (0, channels)]
    if math.prod(positions) < LEAST_POSITIONS:
        return None
    if len(positions) == 2:
        return Scale(node.name, channels, value.shape[channels], (positions[0], positions[1]))
    return _scale_of_tokens(node.name, channels, value.shape[channels], positions[0], aspect)


def _axis_of_units(structure: Structure, value: Value) -> int:
    """The one axis that units lie on; -1 where they lie on several or on none."""
    match structure.lying_of(value):
        case [((axis,), _)]:
            return axis
        case _:
            return -1


def _scale_of_tokens(node: str, channels: int, features: int, tokens: int, aspect: float) -> Scale | None:
    """Tokens as rows of an image with that height over width: 197 are one of none and 14 rows of 14."""
    for skip in (0, 1, 2):  # tokens of a class, of a distillation
        rows = round(math.sqrt((tokens - skip) * aspect))
        if not rows:
            continue
        columns, left_over = divmod(tokens - skip, rows)
        if not left_over and columns == round(rows / aspect):
            return Scale(node, channels, features, (rows, columns), skip)
    return None


class Selector(nn.Module):
    """Features of three scales and the dense network's answer to a spot for each image, none narrower than `least`."""

    def __init__(self, scales: Sequence[Scale], asked: int, shape: tuple[int, int], seed: int, least: float) -> None:
        super().__init__()
        self.scales, self.shape, self.least = tuple(scales), shape, least
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.embed = nn.ModuleList(nn.Linear(scale.features, WIDTH) for scale in scales)
            self.question = nn.Linear(max(1, asked), WIDTH * len(scales))
            self.read = nn.Linear(WIDTH * len(scales), 3)
        nn.init.zeros_(self.read.weight)  # begins in the middle of what was found, at the paper's width
        nn.init.zeros_(self.read.bias)
        self.weight = nn.Parameter(torch.zeros(len(scales)))
        for index, scale in enumerate(scales):
            self.register_buffer(f"places_{index}", scale.places(shape))
            self.register_buffer(f"mean_{index}", torch.zeros(scale.features))
            self.register_buffer(f"spread_{index}", torch.ones(scale.features))

    def forward(self, features: Mapping[str, Tensor], question: Tensor) -> Spots:
        """`features[node]` as the network has them, `question` [N, classes] of the dense one."""
        questions = self.question(question).tanh().chunk(len(self.scales), 1)  # of each scale [N, WIDTH]
        centres, contents = [], []
        for index, scale in enumerate(self.scales):
            positions = (scale.positions(features[scale.node]) - self.of("mean", index)) / self.of("spread", index)
            embedded = self.embed[index](positions.float()).tanh()  # [N, P, WIDTH]
            likeness = torch.einsum("npw,nw->np", embedded, questions[index])
            attention = likeness.softmax(1)
            centres.append(attention @ self.of("places", index))
            contents.append(torch.einsum("np,npw->nw", attention, embedded))
        shares = self.weight.softmax(0)
        numbers = self.read(torch.cat(contents, 1))  # [N, 3]
        side = side_of(self.shape)
        middle = torch.stack(centres, 0).mul(shares[:, None, None]).sum(0)
        centre = centre_of(middle + numbers[:, :2] * side / 4, self.shape)
        first = first_width_at(side) - self.least
        inverse = first + math.log(-math.expm1(-first))  # softplus of it is `first`
        return Spots(centre, sigma_of(inverse + numbers[:, 2] * side / 4, self.least), self.shape)

    def of(self, name: str, index: int) -> Tensor:
        """A buffer of a scale."""
        buffer: Tensor = getattr(self, f"{name}_{index}")
        return buffer

    @property
    def learned(self) -> dict[str, Tensor]:
        """What training changes."""
        return dict(self.named_parameters())


def find_spots(selector: Selector, graph: fx.GraphModule, inputs: Inputs) -> tuple[Spots, Leaves]:
    """The dense network's spots, with a gradient in the selector alone, and its answers: one pass."""
    features, dense = pass_of(graph, inputs, [scale.node for scale in selector.scales])
    spots: Spots = selector(features, question_of(dense))
    return spots, dense


@torch.no_grad()
def pass_of(graph: fx.GraphModule, inputs: Inputs, nodes: Sequence[str]) -> tuple[dict[str, Tensor], Leaves]:
    """What nodes give for some inputs, and the answers by name, without a gradient."""
    features: dict[str, Tensor] = {}

    def watch(node: fx.Node, value: object) -> object:
        if node.name in nodes and isinstance(value, Tensor):
            features[node.name] = value
        return value

    answer = Watcher(graph, watch).run(*as_tuple(inputs))
    return features, dict(zip(output_names(graph), tensors_in(answer, graph), strict=True))


def in_place(
    features: Mapping[str, Tensor], scales: Sequence[Scale], structure: Structure, gone: Keep
) -> dict[str, Tensor]:
    """A smaller network's features where the dense network has them, 0 where units are gone."""
    placed = {}
    for scale in scales:
        labels = structure.values[scale.node]
        assert isinstance(labels, Value)
        ((_, classes),) = structure.lying_of(labels)
        value = features[scale.node]
        sizes = list(value.shape)
        sizes[scale.channels] = scale.features
        kept = torch.from_numpy(np.flatnonzero(~gone[classes])).to(value.device)
        placed[scale.node] = value.new_zeros(sizes).index_copy(scale.channels, kept, value)
    return placed


def question_of(dense: Leaves) -> Tensor:
    """[N, classes] the dense network's probabilities; [N, 1] of ones where its answer is no row of classes."""
    first, *further = (leaf for leaf in dense.values() if leaf.is_floating_point())
    if not further and first.ndim == 2 and first.shape[1] > 1:
        return first.float().softmax(1)
    return torch.ones(len(first), 1, device=first.device)


def make_selector(
    graph: fx.GraphModule, structure: Structure, lessons: Lessons, options: SelectorOptions, seed: int
) -> Selector:
    """Not trained, but for the mean and the spread of each feature over the first images."""
    shape, device = require_images(graph), device_of(graph)
    least = LEAST_WIDTH if options.widths is None else widths_of(options, shape)[0]
    scales = find_scales(graph, structure)
    nodes = [scale.node for scale in scales]
    inputs = Stream(lessons, seed, device, Augmentation(0)).at(0)
    features, dense = pass_of(graph, inputs, nodes)
    selector = Selector(scales, question_of(dense).shape[1], shape, seed, least)
    for index, scale in enumerate(scales):
        positions = scale.positions(features[scale.node]).float().flatten(0, 1)
        selector.of("mean", index).copy_(positions.mean(0))
        selector.of("spread", index).copy_(positions.std(0).clamp_min(1e-3))
    return selector.to(device)


def train_selector(
    graph: fx.GraphModule,
    predictor: fx.GraphModule,
    selector: Selector,
    lessons: Lessons,
    held_out: Lessons,
    distance: Distance,
    *,
    options: SelectorOptions,
    augmentation: Augmentation,
    seed: int,
    centres: Centres | None = None,
    checkpoint: Checkpoint,
    progress: Callable[[float], None],
) -> float:
    """Trains the selector in place; gives the judgement, on images kept out, of the state that was best there.

    What a spot costs is as in the paper, a root of its area, or, where `options.keeps`, its width, which costs the more
    the better the answer is kept: as much as leaves `keeps` of what an empty mask loses. It is drawn to `centres` at
    first, as `options.led` says.
    """
    device = device_of(graph)
    stream = Stream(lessons, seed, device, augmentation)
    masking = _Masking(graph, predictor, selector, distance, options)
    charge = {"charge": torch.tensor(1.0, dtype=torch.float64)}  # what a width of one side costs
    allowed = options.keeps * mean_over(held_out, device, masking.empty_loss)

    def loss(step: int) -> Tensor:
        images = stream.at(step)
        shown = masking.shown(images, seed, step)
        if not options.keeps:
            return shown.lost + masking.papers_price(shown.mask)
        over = (float(shown.lost.detach()) - allowed) / max(allowed, 1e-9)
        charge["charge"].mul_(math.exp(-options.step * max(-1.0, min(1.0, over)))).clamp_(1e-3, 1e3)
        price = float(charge["charge"]) * width_price(shown.spots)
        lead = _lead_at(step, options)
        if centres is not None and lead:
            assert isinstance(images, Tensor)
            places = centres(images, shown.dense)
            price = price + lead * distance_between(shown.spots.centre, places, selector.shape)
        return shown.lost + allowed * price

    def judged(inputs: Inputs, step: int) -> Tensor:
        shown = masking.shown(inputs, seed + 1, step)
        return _judgement(shown, allowed) if options.keeps else shown.lost + masking.papers_price(shown.mask)

    return train(
        selector.learned,
        loss,
        lambda: mean_over(held_out, device, judged),
        options=TrainingOptions(options.steps, options.rate, options.weight_decay),
        checkpoint=checkpoint,
        also=charge,
        progress=progress,
    )


def _lead_at(step: int, options: SelectorOptions) -> float:
    """From 1 at the first step to 0 where the led part of the steps ends."""
    led = options.led * options.steps
    return max(0.0, 1 - step / led) if led else 0.0


@dataclass(frozen=True, slots=True, eq=False)
class _Shown:
    """What is `lost` of the `dense` answers where a mask [N, 1, H, W], drawn from the spots, shows the images."""

    lost: Tensor
    mask: Tensor
    spots: Spots
    dense: Leaves


def _judgement(shown: _Shown, allowed: float) -> Tensor:
    """The width over the first one, and what is lost beyond the allowed: a tenth of either is as bad.

    By a sharper price images kept out, on which a little more is lost, would never let go of the first width.
    """
    side = side_of(shown.spots.shape)
    over = (shown.lost / max(allowed, 1e-9) - 1).clamp_min(0)
    return width_price(shown.spots) / (first_width_at(side) / side) + over


@dataclass(frozen=True, slots=True, eq=False)
class _Masking:
    """What a predictor loses of the network's answers where it sees no more than the selector's mask leaves."""

    graph: fx.GraphModule
    predictor: fx.GraphModule
    selector: Selector
    distance: Distance
    options: SelectorOptions

    def shown(self, inputs: Inputs, seed: int, step: int) -> _Shown:
        """Masks are drawn by the numbers of that seed and step."""
        assert isinstance(inputs, Tensor)
        spots, dense = find_spots(self.selector, self.graph, inputs)
        temperature = SHARP if self.options.discs else TEMPERATURE
        mask = drawn_mask(spots.map(), mask_numbers(seed, step, inputs, self.options), temperature)
        lost = self.distance(leaves_of(self.predictor, inputs * mask), dense)
        return _Shown(lost, mask, spots, dense)

    def empty_loss(self, inputs: Inputs, step: int) -> Tensor:
        """Where nothing is left of the images."""
        assert isinstance(inputs, Tensor)
        return self.distance(answers_of(self.predictor, inputs * 0), answers_of(self.graph, inputs))

    def papers_price(self, mask: Tensor) -> Tensor:
        """What a mask costs without `keeps`."""
        return self.options.area * area(mask, self.options.power) + self.options.roughness * roughness(mask)
