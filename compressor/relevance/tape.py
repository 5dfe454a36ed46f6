"""A graph, images and node names in; those nodes' values and the gradient of the output with respect to them out.

The gradient pass every criterion that needs one shares. Only the asked nodes are kept; weights cost no
gradient unless asked for. Knows neither units nor criteria.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, fx

from ..criteria import Start
from ..graph.operators import RECURRENT
from ..tasks import Targets
from ..tensors import Inputs, as_tuple
from .starts import CLASSES, Objective, Seeds


class _Tape(fx.Interpreter):
    """Keeps the asked nodes' values; whatever depends on no image stays out of the autograd graph."""

    def __init__(self, graph: fx.GraphModule, names: Collection[str]) -> None:
        super().__init__(graph)
        self.names = names
        self.values: dict[str, Tensor] = {}

    def run_node(self, n: fx.Node) -> object:
        with _differentiable(n):
            value = super().run_node(n)
        if n.op == "get_attr" and isinstance(value, Tensor):
            value = value.detach()
        if n.name in self.names:
            if not value.requires_grad:  # no image leads here (a weight): made a leaf, it has a gradient too
                value = value.detach().requires_grad_()
            self.values[n.name] = value
        return value


def _differentiable(node: fx.Node) -> AbstractContextManager[object]:
    """cuDNN's recurrent layers have a gradient in training only."""
    if node.target in RECURRENT:
        return torch.backends.cudnn.flags(enabled=False)
    return nullcontext()


def record(
    graph: fx.GraphModule,
    images: Inputs,
    targets: Targets,
    names: Collection[str],
    *,
    start: Start,
    objective: Objective = CLASSES,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Values and gradients at the nodes `names`, both shaped as the node's output; a gradient is summed over the batch.

    `images` are [N, ...] of every input, `targets` class indices [N] or what the objective's task takes. A node that
    the start does not depend on has gradient zero. Raises what `Objective.seeds` raises.
    """
    tape = _Tape(graph, names)
    with torch.enable_grad():
        inputs = [tensor.detach().requires_grad_(tensor.is_floating_point()) for tensor in as_tuple(images)]
        answer = as_tuple(tape.run(*inputs))
        at_nodes = _gradients(answer, list(tape.values.values()), objective.seeds(answer, targets, start))

    values = {node: value.detach() for node, value in tape.values.items()}
    gradients: dict[str, Tensor] = {}
    for (node, value), gradient in zip(values.items(), at_nodes, strict=True):
        gradients[node] = torch.zeros_like(value) if gradient is None else gradient
    return values, gradients


def _gradients(answer: Sequence[Tensor], tensors: Sequence[Tensor], seeds: Seeds) -> Sequence[Tensor | None]:
    """Of the seeded outputs with respect to each tensor; None where none of them depends on it."""
    outputs: list[Tensor] = []
    starts: list[Tensor] = []
    for leaf, start in zip(answer, seeds, strict=True):
        if start is not None and leaf.requires_grad:
            outputs.append(leaf)
            starts.append(start)
    if not outputs or not tensors:
        return [None] * len(tensors)
    return torch.autograd.grad(outputs, tensors, starts, allow_unused=True)
