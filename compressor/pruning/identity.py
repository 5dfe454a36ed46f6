"""Two whole networks in float64: the pruned one, and the original with removed units zeroed at every consumer's input.

A graph, its pruned graph and images in, the largest difference of their outputs out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx

from ..errors import GateError
from ..graph.double import Double, exactly, parameters_late
from ..graph.interface import nodes_by_name, traced_count
from ..placement import CPU, placed
from ..records import IntArray
from ..tensors import Inputs, count, cut, moved
from .compaction import compact
from .masking import inexact_nodes, is_weight, mask, scatter
from .structure import Keep, Structure
from .surgery import removed_classes


@torch.no_grad()
def identity_error(
    dense: fx.GraphModule, pruned: fx.GraphModule, structure: Structure, kept: Mapping[str, IntArray], images: Inputs
) -> float:
    """Largest difference of the outputs on [N, ...] images, relative to each output's largest number, in float64.

    The masked original normalises over what remains where the pruned axis is a normalised one: it computes
    such a node on the compacted operands and puts the result back in place. Like `find_structure`, on the CPU.
    Raises GateError where nothing would be compared: fewer images than the graph was traced with, no number in any
    output.
    """
    dense, pruned, images = placed(dense, CPU), placed(pruned, CPU), moved(images, CPU)
    masked = _MaskedRun(parameters_late(dense), pruned, structure, removed_classes(structure, kept))
    exact = Double(parameters_late(pruned))
    traced = traced_count(dense)
    if count(images) < traced:
        raise GateError(
            f"the identity check was given {count(images)} images and compares {traced} at once; give as many"
        )

    worst, compared = 0.0, 0
    for start in range(0, count(images) - traced + 1, traced):  # shapes are known at the traced batch size
        batch = cut(images, start, start + traced)
        for a, b in zip(exactly(exact, batch), exactly(masked, batch), strict=True):
            if b.numel():
                compared += b.numel()
                worst = max(worst, _difference(a, b))
    if not compared:
        raise GateError("the network's answer holds no number, so nothing was compared; give a network that answers")
    return worst


def _difference(a: Tensor, b: Tensor) -> float:
    """Of float64 outputs, over the largest of b; of whole numbers and booleans, the share of entries that differ.

    What is no finite number on either side at the same place (a mask's infinity) is equal.
    """
    if a.shape != b.shape:
        return math.inf
    if not b.is_floating_point():
        return float((a != b).double().mean())
    same = (a == b) | (a.isnan() & b.isnan())
    difference = torch.where(same, 0.0, (a - b).abs())
    scale = b.abs().nan_to_num(0.0, 0.0, 0.0).max().clamp_min(1e-30)
    return float(difference.nan_to_num(math.inf, math.inf).max() / scale)


class _MaskedRun(Double):
    """The original on masked values; where that can't be exact, the pruned operation on the compacted ones."""

    def __init__(self, graph: fx.GraphModule, pruned: fx.GraphModule, structure: Structure, gone: Keep) -> None:
        super().__init__(graph)
        self.structure, self.gone = structure, gone
        self.inexact = inexact_nodes(structure)
        self.small_nodes = nodes_by_name(pruned)

    def run_node(self, n: fx.Node) -> object:
        if n.name in self.inexact:
            return self._run_compacted(n)
        result: object = super().run_node(n)
        if n.op == "output" or is_weight(n):
            return result
        return mask(result, self.structure.values.get(n.name), self.structure, self.gone)

    def _run_compacted(self, n: fx.Node) -> object:
        """The pruned node's arguments (sizes are rewritten there) on what remains of the operands."""
        small = self.small_nodes[n.name]
        sources = {source.name: source for source in n.all_input_nodes}

        def compacted(small_source: fx.Node) -> Any:  # no fx argument, which is all that fx's own types foresee
            source = sources[small_source.name]
            value = self.env[source]
            if not isinstance(value, Tensor):
                return value
            return compact(value, self.structure.lying(source), self.gone)

        args, kwargs = fx.map_arg((small.args, small.kwargs), compacted)
        out = n.target(*args, **kwargs)  # type: ignore[operator]
        return scatter(out, self.structure.values[n.name], self.structure, self.gone)
