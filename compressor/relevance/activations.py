"""The criterion that needs only a forward pass: a graph and nodes in, a measurement of one batch out.

Molchanov et al., ICLR 2017, section 2.2 (mean activation). Knows no units.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, fx

from ..graph import Watcher
from ..tasks import Targets
from ..tensors import Inputs, as_tuple
from .gradients import Measure, Take
from .options import ScoreOptions


def activation(graph: fx.GraphModule, nodes: Sequence[str], options: ScoreOptions) -> Measure:
    """How strongly a unit fires: its absolute activations, summed (Molchanov et al., ICLR 2017, section 2.2).

    What is handed on is the activation with its sign; the criterion's row says where the absolute value is taken.
    """
    names = frozenset(nodes)

    @torch.no_grad()
    def measure(images: Inputs, targets: Targets, take: Take) -> None:
        def watch(node: fx.Node, value: object) -> object:
            if node.name in names:
                assert isinstance(value, Tensor), f"{node.name} returns no single tensor: it is no site"
                take(node.name, value)
            return value  # in the graph it stays as it is

        Watcher(graph, watch).run(*as_tuple(images))

    return measure
