"""A graph, images and node names in; those nodes' values and the gradient of the output with respect to them out.

The gradient pass every criterion that needs one shares. Only the asked nodes are kept; weights cost no
gradient unless asked for. Knows neither units nor criteria.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional

from ..errors import ModelError
from .options import Start


class _Tape(fx.Interpreter):
    """Keeps the asked nodes' values; whatever depends on no image stays out of the autograd graph."""

    def __init__(self, graph: fx.GraphModule, names: Collection[str]) -> None:
        super().__init__(graph)
        self.names = names
        self.values: dict[str, Tensor] = {}

    def run_node(self, n: fx.Node) -> Any:
        out = super().run_node(n)
        if n.op == "get_attr" and isinstance(out, Tensor):
            out = out.detach()
        if n.name in self.names:
            if not out.requires_grad:  # no image leads here (a weight): made a leaf, it has a gradient too
                out = out.detach().requires_grad_()
            self.values[n.name] = out
        return out


def record(
    graph: fx.GraphModule, images: Tensor, targets: Tensor, names: Collection[str], *, start: Start
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Values and gradients at the nodes `names`; a node the output does not depend on has gradient zero."""
    tape = _Tape(graph, names)
    with torch.enable_grad():
        logits = logits_of(tape.run(images.detach().requires_grad_()))
        nodes = list(tape.values)
        tensors = [tape.values[node] for node in nodes]
        at_nodes = torch.autograd.grad(logits, tensors, seed(logits, targets, start), allow_unused=True)

    values: dict[str, Tensor] = {}
    gradients: dict[str, Tensor] = {}
    for node, gradient in zip(nodes, at_nodes, strict=True):
        values[node] = tape.values[node].detach()
        gradients[node] = torch.zeros_like(values[node]) if gradient is None else gradient
    return values, gradients


def logits_of(output: Any) -> Tensor:
    """[N, classes]; of a network with several outputs the first of that form."""
    outputs: Sequence[Any] = output if isinstance(output, (tuple, list)) else [output]
    if isinstance(output, Mapping):
        outputs = list(output.values())
    for tensor in outputs:
        if isinstance(tensor, Tensor) and tensor.ndim == 2:
            return tensor
    shapes = [list(tensor.shape) for tensor in outputs if isinstance(tensor, Tensor)]
    raise ModelError(
        f"the network's outputs have shapes {shapes}, relevance starts at [N, classes]; wrap the model so that "
        "its forward returns class scores"
    )


def seed(logits: Tensor, targets: Tensor, start: Start) -> Tensor:
    """What is propagated back from the output, [N, classes]."""
    logits = logits.detach()
    one_hot = functional.one_hot(targets, logits.shape[1]).to(logits)
    if start == "loss":
        return logits.softmax(1) - one_hot  # gradient of the cross-entropy, summed over samples
    return one_hot * logits if start == "logit" else one_hot


@torch.no_grad()
def targets_of(graph: fx.GraphModule, images: Tensor, labels: Tensor, *, predicted: bool) -> Tensor:
    """The class relevance starts from; one forward pass only where a label is unknown (-1)."""
    if not predicted and bool((labels >= 0).all()):
        return labels
    predictions = logits_of(graph(images)).argmax(1)
    return predictions if predicted else torch.where(labels < 0, predictions, labels)
