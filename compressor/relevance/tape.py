"""A graph, images and node names in; those nodes' values and the gradient of the output with respect to them out.

The gradient pass every criterion that needs one shares. Only the asked nodes are kept; weights cost no
gradient unless asked for. Knows neither units nor criteria.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

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

    def run_node(self, n: fx.Node) -> object:
        value = super().run_node(n)
        if n.op == "get_attr" and isinstance(value, Tensor):
            value = value.detach()
        if n.name in self.names:
            if not value.requires_grad:  # no image leads here (a weight): made a leaf, it has a gradient too
                value = value.detach().requires_grad_()
            self.values[n.name] = value
        return value


def record(
    graph: fx.GraphModule, images: Tensor, targets: Tensor, names: Collection[str], *, start: Start
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Values and gradients at the nodes `names`, both shaped as the node's output; a gradient is summed over the batch.

    `images` are [N, C, H, W], `targets` class indices [N]. A node the output does not depend on has gradient zero.
    Raises ModelError for a network that returns no [N, classes].
    """
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


def logits_of(output: object) -> Tensor:
    """[N, classes]; of a network with several outputs the first of that form. Raises ModelError where none has it."""
    tensors = _tensors_in(output)
    for tensor in tensors:
        if tensor.ndim == 2:
            return tensor
    shapes = [list(tensor.shape) for tensor in tensors]
    raise ModelError(
        f"the network's outputs have shapes {shapes}, relevance starts at [N, classes]; wrap the model so that "
        "its forward returns class scores"
    )


def _tensors_in(output: object) -> list[Tensor]:
    """A network's outputs in their order, whatever holds them."""
    if isinstance(output, Mapping):
        output = list(output.values())
    if not isinstance(output, (tuple, list)):
        output = [output]
    return [entry for entry in output if isinstance(entry, Tensor)]


def seed(logits: Tensor, targets: Tensor, start: Start) -> Tensor:
    """What is propagated back from the output, [N, classes]."""
    logits = logits.detach()
    one_hot = functional.one_hot(targets, logits.shape[1]).to(logits)
    if start == "loss":
        # gradient of the cross-entropy summed over samples: a mean's would be N times smaller in a batch of N
        return logits.softmax(1) - one_hot
    return one_hot * logits if start == "logit" else one_hot


@torch.no_grad()
def targets_of(graph: fx.GraphModule, images: Tensor, labels: Tensor, *, predicted: bool) -> Tensor:
    """The class relevance starts from; one forward pass only where a label is unknown (-1)."""
    if not predicted and bool((labels >= 0).all()):
        return labels
    predictions = logits_of(graph(images)).argmax(1)
    return predictions if predicted else torch.where(labels < 0, predictions, labels)
