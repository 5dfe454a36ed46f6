"""Graphs written node by node, without a model and an export: milliseconds, and every operation by its own name."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn


class Written:
    """Inputs, parameters, constants and calls in order; `graph()` is a module as `trace` gives it."""

    def __init__(self) -> None:
        self.root, self.nodes = nn.Module(), fx.Graph()

    def input(self, *shape: int) -> fx.Node:
        return self._noted(self.nodes.placeholder("x"), torch.empty(shape, device="meta"))

    def parameter(self, name: str, *shape: int) -> fx.Node:
        """With labels on every axis that is longer than one."""
        self.root.register_parameter(name, nn.Parameter(torch.randn(shape)))
        return self._noted(self.nodes.get_attr(name), torch.empty(shape, device="meta"))

    def constant(self, name: str, values: Sequence[int]) -> fx.Node:
        self.root.register_buffer(name, torch.tensor(values))
        return self._noted(self.nodes.get_attr(name), torch.empty(len(values), dtype=torch.int64, device="meta"))

    def call(self, target: Any, *args: Any, **settings: Any) -> fx.Node:
        node = self.nodes.call_function(target, args, settings)
        values, named = fx.map_arg((args, settings), lambda source: source.meta["val"])
        return self._noted(node, target(*values, **named))

    def graph(self) -> fx.GraphModule:
        """Without an output, which would freeze what it gives out."""
        self.nodes.output(())
        return fx.GraphModule(self.root, self.nodes)

    def _noted(self, node: fx.Node, value: Tensor | tuple[Tensor, ...]) -> fx.Node:
        node.meta = {"val": value, "layer": node.name, "place": ""}
        return node
