"""What a traced graph does otherwise while it is trained: batch statistics and dropout, put away and given back.

In evaluation dropout is nothing, so the graph that is pruned has none; where it was stands in its nodes' metadata
(`dropouts`), for an owner who trains the pruned network further. Knows no loss and no optimiser.
"""

from __future__ import annotations

from collections.abc import Container, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from .nesting import Nesting, with_nesting
from .operators import RECURRENT

aten = torch.ops.aten

_DROPOUTS = {
    aten.dropout.default: "dropout",
    aten.feature_dropout.default: "feature_dropout",
    aten.alpha_dropout.default: "alpha_dropout",
    aten.feature_alpha_dropout.default: "feature_alpha_dropout",
}
Dropout = tuple[str, float, tuple[str, ...]]
"""Its kind, its probability, and the nodes that read the value through it."""


@torch.library.custom_op("compressor::idle_dropout", mutates_args=())
def _idle_dropout(x: Tensor, kind: str, p: float) -> Tensor:
    """Stands where dropout stood, so that decompositions leave the place alone."""
    return x.clone()


@_idle_dropout.register_fake
def _(x: Tensor, kind: str, p: float) -> Tensor:
    return torch.empty_like(x)


_IDLE = torch.ops.compressor.idle_dropout.default


def mark_dropouts(exported: torch.export.ExportedProgram) -> None:
    """Replaces dropout that does nothing in evaluation by a mark that survives decomposition."""
    graph = exported.graph_module.graph
    for node in graph.nodes:
        if node.target not in _DROPOUTS:
            continue
        source, p, training = node.args
        if p and not training:
            node.args, node.target = (source, _DROPOUTS[node.target], p), _IDLE
    exported.graph_module.recompile()


def note_dropouts(graph: fx.GraphModule) -> None:
    """Takes the marks out; the values they read remember them in `meta["dropouts"]`."""
    for node in graph.graph.find_nodes(op="call_function", target=_IDLE):
        source, kind, p = node.args
        # by name: copies of the graph carry metadata along, and their nodes are others
        dropout: Dropout = (kind, p, tuple(user.name for user in node.users))
        source.meta["dropouts"] = (*source.meta.get("dropouts", ()), dropout)
        node.replace_all_uses_with(source)
        graph.graph.erase_node(node)
    graph.recompile()


def set_training(graph: fx.GraphModule, training: bool) -> None:
    """Switches every batch normalisation between batch and running statistics, and every dropout on or off.

    A recurrent layer's dropout is between its layers; cuDNN gives it a gradient in training only.
    """
    for node in graph.graph.nodes:
        if node.target in _TRAINING_AT:
            node.update_arg(_TRAINING_AT[node.target], training)
    graph.recompile()


_TRAINING_AT: Mapping[object, int] = {
    aten.batch_norm.default: 5,  # (x, weight, bias, mean, var, training, ...)
    **dict.fromkeys(RECURRENT, 6),  # (x, state, parameters, has_biases, layers, dropout, training, ...)
    **dict.fromkeys(_DROPOUTS, 2),  # (x, p, training)
}
"""The place of `training` among the arguments."""


class TrainableGraph(fx.GraphModule):
    """The same graph with its dropouts back, in evaluation mode; it follows `train()` and `eval()` as a module does.

    With a `nesting` it is called as the model is and answers in the model's containers; a deep copy of it, too.
    """

    nesting: Nesting | None = None

    def __init__(
        self,
        root: nn.Module | dict[str, Any],
        graph: fx.Graph,
        class_name: str = "TrainableGraph",
        nesting: Nesting | None = None,
    ) -> None:
        super().__init__(root, graph, class_name)
        _insert_dropouts(self)
        self.nesting = nesting
        self.eval()

    def train(self, mode: bool = True) -> TrainableGraph:
        """Switches the graph's own operations too, which no module stands for."""
        super().train(mode)
        set_training(self, mode)
        return self

    def recompile(self) -> Any:
        """Writes the graph's code anew; the flat forward that comes of it is wrapped."""
        code = super().recompile()
        if self.nesting is not None:
            kind = type(self)  # a class of this very graph: fx makes one for each
            kind.forward = with_nesting(kind.forward, self.nesting)
        return code

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """Moving averages of weights are deep copies, which fx makes of the graph alone."""
        copied: Any = super().__deepcopy__(memo)
        copied.nesting = self.nesting
        copied.recompile()
        return copied


def _insert_dropouts(graph: fx.GraphModule) -> None:
    """An operation between a value and each reader that had it behind a dropout; other readers keep the value."""
    targets = {kind: target for target, kind in _DROPOUTS.items()}
    for node in list(graph.graph.nodes):
        for kind, p, readers in node.meta.pop("dropouts", ()):
            with graph.graph.inserting_after(node):
                dropout = graph.graph.call_function(targets[kind], (node, p, False))
            dropout.meta = dict(node.meta)
            _hand_over(node, dropout, readers)
    graph.recompile()


def _hand_over(node: fx.Node, other: fx.Node, readers: Container[str]) -> None:
    """Those of a node's readers read the other one from now on."""
    node.replace_all_uses_with(other, delete_user_cb=lambda user: user.name in readers)
