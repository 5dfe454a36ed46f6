"""Two whole networks in float64: the pruned one, and the original with removed units zeroed at every consumer's input.

A graph, its pruned graph and images in, the largest difference of their outputs out.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx

from ..errors import GateError
from ..graph.double import Double, parameters_late
from ..placement import CPU, placed
from ..records import IntArray
from .compaction import compact
from .masking import inexact_nodes, is_weight, mask, scatter, tensors_in
from .structure import Keep, Structure
from .surgery import removed_classes


@torch.no_grad()
def identity_error(
    dense: fx.GraphModule, pruned: fx.GraphModule, structure: Structure, kept: Mapping[str, IntArray], images: Tensor
) -> float:
    """Largest difference of the outputs on [N, C, H, W] images, relative to the largest output, in float64.

    The masked original normalises over what remains where the pruned axis is a normalised one: it computes
    such a node on the compacted operands and puts the result back in place. Like `find_structure`, on the CPU.
    Raises GateError where there are fewer images than the graph was traced with: nothing would be compared.
    """
    dense, pruned, images = placed(dense, CPU), placed(pruned, CPU), images.to(CPU)
    masked = _MaskedRun(parameters_late(dense), pruned, structure, removed_classes(structure, kept))
    exact = Double(parameters_late(pruned))
    placeholder = next(node for node in dense.graph.nodes if node.op == "placeholder")
    traced = placeholder.meta["val"].shape[0]
    if len(images) < traced:
        raise GateError(
            f"the identity check was given {len(images)} images and compares {traced} at once; give as many"
        )

    worst = 0.0
    for start in range(0, len(images) - traced + 1, traced):  # shapes are known at the traced batch size
        batch = images[start : start + traced].double()
        for a, b in zip(tensors_in(exact.run(batch)), tensors_in(masked.run(batch)), strict=True):
            worst = max(worst, float((a - b).abs().max() / b.abs().max().clamp_min(1e-30)))
    return worst


class _MaskedRun(Double):
    """The original on masked values; where that can't be exact, the pruned operation on the compacted ones."""

    def __init__(self, graph: fx.GraphModule, pruned: fx.GraphModule, structure: Structure, gone: Keep) -> None:
        super().__init__(graph)
        self.structure, self.gone = structure, gone
        self.inexact = inexact_nodes(structure)
        self.small_nodes = {node.name: node for node in pruned.graph.nodes}

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
