"""A graph, images and node names in; those nodes' values and the gradient of the output with respect to them out.

The gradient pass every criterion that needs one shares. Only the asked nodes are kept; weights cost no
gradient unless asked for. Knows neither units nor criteria.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
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
            if not out.requires_grad:
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
        asked = list(tape.values)
        found = torch.autograd.grad(
            logits, [tape.values[n] for n in asked], seed(logits, targets, start), allow_unused=True
        )
    values = {n: tape.values[n].detach() for n in asked}
    return values, {n: torch.zeros_like(values[n]) if g is None else g for n, g in zip(asked, found, strict=True)}


def logits_of(output: Any) -> Tensor:
    """[N, classes]; of a network with several outputs the first of that form."""
    outputs = output if isinstance(output, (tuple, list)) else [output]
    if isinstance(output, Mapping):
        outputs = list(output.values())
    for tensor in outputs:
        if isinstance(tensor, Tensor) and tensor.ndim == 2:
            return tensor
    shapes = [list(t.shape) for t in outputs if isinstance(t, Tensor)]
    raise ModelError(
        f"the network's outputs have shapes {shapes}, relevance starts at [N, classes]; wrap the model so that "
        "its forward returns class scores"
    )


def seed(logits: Tensor, targets: Tensor, start: Start) -> Tensor:
    """What is propagated back from the output, [N, classes]."""
    logits = logits.detach()
    one = functional.one_hot(targets, logits.shape[1]).to(logits)
    if start == "loss":
        return logits.softmax(1) - one  # gradient of the cross-entropy, summed over samples
    return one * logits if start == "logit" else one


@torch.no_grad()
def targets_of(graph: fx.GraphModule, images: Tensor, labels: Tensor, *, predicted: bool) -> Tensor:
    """The class relevance starts from; one forward pass only where a label is unknown (-1)."""
    if not predicted and bool((labels >= 0).all()):
        return labels
    best = logits_of(graph(images)).argmax(1)
    return best if predicted else torch.where(labels < 0, best, labels)
