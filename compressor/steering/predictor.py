"""A copy of the network that answers from what a mask leaves of an image as the network does from all of it.

Without it a masked image would only look strange, and a selector would learn what looks least so. The copy is the
traced graph with weights that learn; the network itself stays.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, fx

from ..errors import RecipeError
from ..graph.interface import input_nodes
from ..placement import device_of, inputs_to
from ..tensors import Inputs, count
from .augmentation import Augmentation, varied
from .checkpoints import Checkpoint
from .lessons import Lessons, lessons_from, uniform
from .masks import DISC, drawn_mask, papers_widths_at, random_spots, side_of
from .objectives import Distance, answers_of, leaves_of
from .options import SelectorOptions
from .training import TrainingOptions, train

TEMPERATURE = 0.1


def require_images(graph: fx.GraphModule) -> tuple[int, int]:
    """The height and width of the one image that the network takes. Raises RecipeError for any other input."""
    nodes = input_nodes(graph)
    shapes = [list(node.meta["val"].shape[1:]) for node in nodes]
    if len(nodes) != 1 or len(shapes[0]) != 3 or not nodes[0].meta["val"].is_floating_point():
        taken = ", ".join(str(["N", *shape]).replace("'", "") for shape in shapes)
        raise RecipeError(
            f"criterion isp masks images, and takes one input [N, channels, height, width] of real numbers; the "
            f"network takes {taken}; use --criterion gates, which keeps the answers of any network"
        )
    return int(shapes[0][1]), int(shapes[0][2])


def train_predictor(
    graph: fx.GraphModule,
    lessons: Lessons,
    held_out: Lessons,
    distance: Distance,
    *,
    options: SelectorOptions,
    augmentation: Augmentation,
    seed: int,
    checkpoint: Checkpoint,
    progress: Callable[[float], None],
) -> fx.GraphModule:
    """The predictor that was best on images kept out, under masks that are the same ones for every judgement."""
    shape, device = require_images(graph), device_of(graph)
    widths = widths_of(options, shape)
    predictor = copy.deepcopy(graph)
    stream = Stream(lessons, seed, device, augmentation)

    def masked(inputs: Inputs, seed: int, step: int) -> Tensor:
        assert isinstance(inputs, Tensor)
        numbers = uniform(seed, 2 * step, len(inputs), 3, like=inputs)
        levels = mask_numbers(seed, 2 * step + 1, inputs, options)
        return inputs * drawn_mask(random_spots(numbers, shape, widths).map(), levels, TEMPERATURE)

    def loss(step: int) -> Tensor:
        inputs = stream.at(step)
        return distance(leaves_of(predictor, masked(inputs, seed, step)), answers_of(graph, inputs))

    def held_loss(inputs: Inputs, step: int) -> Tensor:
        return distance(answers_of(predictor, masked(inputs, seed + 1, step)), answers_of(graph, inputs))

    train(
        dict(predictor.named_parameters()),
        loss,
        lambda: mean_over(held_out, device, held_loss),
        options=TrainingOptions(options.predictor_steps, options.predictor_rate, options.weight_decay),
        checkpoint=checkpoint,
        also={},
        progress=progress,
    )
    return predictor


def widths_of(options: SelectorOptions, shape: tuple[int, int]) -> tuple[float, float]:
    """The narrowest and the widest spot that a predictor learns from, in pixels."""
    side = side_of(shape)
    if options.widths is None:
        return papers_widths_at(side)
    low, high = options.widths
    return low * side, high * side


def mask_numbers(seed: int, step: int, inputs: Tensor, options: SelectorOptions) -> Tensor:
    """[N, 1, H, W] what draws a mask for each image [N, C, H, W]; of a disc always the same."""
    shape = (len(inputs), 1, *inputs.shape[2:])
    if options.discs:
        return inputs.new_full(shape, DISC)
    return uniform(seed, step, *shape, like=inputs)


class Stream:
    """Batches on a device by their step, which only goes up; the images as `augmentation` varies them."""

    def __init__(self, lessons: Lessons, seed: int, device: torch.device, augmentation: Augmentation) -> None:
        self._lessons, self._seed, self._device = lessons, seed, device
        self._augmentation = augmentation
        self._iterator: Iterator[Inputs] | None = None

    def at(self, step: int) -> Inputs:
        """The batch of that step: the first one that is asked for, or the next."""
        if self._iterator is None:
            self._iterator = lessons_from(self._lessons, self._seed, step)
        return inputs_to(varied(next(self._iterator), self._augmentation, self._seed, step), self._device)


@torch.no_grad()
def mean_over(batches: Lessons, device: torch.device, loss: Callable[[Inputs, int], Tensor]) -> float:
    """The mean loss of the batches, each weighted by its images; the batch's number draws what is random."""
    total, images = 0.0, 0
    for step, (inputs, _) in enumerate(batches):
        total += float(loss(inputs_to(inputs, device), step)) * count(inputs)
        images += count(inputs)
    return total / images
