"""Criteria that need one or more gradient passes: a graph and nodes in, a measurement of one batch out.

A measurement hands each node's tensor, of its output's shape, to `take`. Knows neither units nor how samples combine.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, fx

from ..criteria import Start
from ..tasks import Targets
from ..tensors import Inputs, mapped
from .options import ScoreOptions
from .tape import record

Take = Callable[[str, Tensor], None]
Measure = Callable[[Inputs, Targets, Take], None]


def gradient(graph: fx.GraphModule, nodes: Sequence[str], options: ScoreOptions) -> Measure:
    """Absolute gradient of the loss at the unit (Sun et al., ICML 2017, meProp, as Yeom et al. 2021 compare with it).

    What is handed on is the gradient with its sign, of whatever `options.start` names.
    """
    start = _start(options)

    def measure(images: Inputs, targets: Targets, take: Take) -> None:
        _, gradients = record(graph, images, targets, nodes, start=start, objective=options.objective)
        for name, node_gradient in gradients.items():
            take(name, node_gradient)

    return measure


def gradient_x_value(graph: fx.GraphModule, nodes: Sequence[str], options: ScoreOptions) -> Measure:
    """Gradient times value, the first-order effect of setting the value to zero (Molchanov et al., ICLR 2017, eq. 8).

    What is handed on is the product with its sign. Where the sign goes and what gradient it is are the row's to say:
    `gradient_x_input` starts at the class score, `taylor` at the loss, `fisher` squares the sum over a sample.
    """
    start = _start(options)

    def measure(images: Inputs, targets: Targets, take: Take) -> None:
        values, gradients = record(graph, images, targets, nodes, start=start, objective=options.objective)
        for name, value in values.items():
            take(name, value * gradients[name])

    return measure


def integrated_gradients(graph: fx.GraphModule, nodes: Sequence[str], options: ScoreOptions) -> Measure:
    """The path integral of gradient times change of value from a black image to the image, by the trapezoid rule.

    Summed over a layer that all paths cross, it is the change of what relevance starts from (Sundararajan
    et al. 2017 for the path; Dhamdhere et al. 2019, eq. 2, for inner layers). `steps` + 1 gradient passes.
    Handed on in float64.
    """
    start = _start(options)

    def measure(images: Inputs, targets: Targets, take: Take) -> None:
        objective = options.objective
        black = mapped(_black, images)
        last_values, last_gradients = record(graph, black, targets, nodes, start=start, objective=objective)
        integrals = {name: torch.zeros_like(value, dtype=torch.float64) for name, value in last_values.items()}

        for step in range(1, options.steps + 1):
            image_on_path = mapped(partial(_part_of, share=step / options.steps), images)
            values, gradients = record(graph, image_on_path, targets, nodes, start=start, objective=objective)
            for name, integral in integrals.items():
                mean_gradient = (gradients[name] + last_gradients[name]) / 2
                integral += mean_gradient * (values[name] - last_values[name])  # in place
            last_values, last_gradients = values, gradients

        for name, integral in integrals.items():
            take(name, integral)

    return measure


def _black(tensor: Tensor) -> Tensor:
    """Where the path begins; whole numbers, which may be indices, stay as they are along it."""
    return torch.zeros_like(tensor) if tensor.is_floating_point() else tensor


def _part_of(tensor: Tensor, share: float) -> Tensor:
    return tensor * share if tensor.is_floating_point() else tensor


def _start(options: ScoreOptions) -> Start:
    assert options.start is not None, "the caller fills in the criterion's own start"
    return options.start
