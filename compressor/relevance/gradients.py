"""Criteria that need one or more gradient passes: a graph and nodes in, a measurement of one batch out.

A measurement hands each node's tensor, of its output's shape, to `take`. Knows neither units nor how samples combine.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, fx

from .options import ScoreOptions, Start
from .tape import record

Take = Callable[[str, Tensor], None]
Measure = Callable[[Tensor, Tensor, Take], None]  # images, targets


def gradient(graph: fx.GraphModule, nodes: Sequence[str], options: ScoreOptions) -> Measure:
    """Sun et al., ICML 2017 (meProp), as Yeom et al. 2021 compare with it."""
    start = _start(options)

    def measure(images: Tensor, targets: Tensor, take: Take) -> None:
        for name, found in record(graph, images, targets, nodes, start=start)[1].items():
            take(name, found)

    return measure


def gradient_x_value(graph: fx.GraphModule, nodes: Sequence[str], options: ScoreOptions) -> Measure:
    """First-order effect of setting the value to zero (Molchanov et al., ICLR 2017, eq. 8, without the sign)."""
    start = _start(options)

    def measure(images: Tensor, targets: Tensor, take: Take) -> None:
        values, gradients = record(graph, images, targets, nodes, start=start)
        for name, value in values.items():
            take(name, value * gradients[name])

    return measure


def integrated_gradients(graph: fx.GraphModule, nodes: Sequence[str], options: ScoreOptions) -> Measure:
    """The path integral of gradient times change of value from a black image to the image, by the trapezoid rule.

    Summed over a layer that all paths cross, it is the change of what relevance starts from (Sundararajan
    et al. 2017 for the path; Dhamdhere et al. 2019, eq. 2, for inner layers). `steps` + 1 gradient passes.
    """
    start = _start(options)

    def measure(images: Tensor, targets: Tensor, take: Take) -> None:
        before = record(graph, torch.zeros_like(images), targets, nodes, start=start)
        total = {name: torch.zeros_like(value, dtype=torch.float64) for name, value in before[0].items()}
        for step in range(1, options.steps + 1):
            now = record(graph, images * (step / options.steps), targets, nodes, start=start)
            for name, sums in total.items():
                sums += (now[1][name] + before[1][name]) / 2 * (now[0][name] - before[0][name])
            before = now
        for name, sums in total.items():
            take(name, sums)

    return measure


def _start(options: ScoreOptions) -> Start:
    assert options.start is not None, "the caller fills in the criterion's own start"
    return options.start
