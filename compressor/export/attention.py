"""Attention over any number of leading axes, written over four: what the ONNX exporter reads.

In: a traced graph. Out: the same graph, or a copy whose attentions are flattened to [N, heads, tokens, features]
and back. The leading axis stays what it is, so a free batch stays free.
"""

from __future__ import annotations

import copy

from torch import fx

from ..graph import aten

ATTENTION = aten.scaled_dot_product_attention.default


def over_four_axes(graph: fx.GraphModule) -> fx.GraphModule:
    found = [n for n in graph.graph.nodes if n.target is ATTENTION and len(_shape(n)) > 4]
    if not found:
        return graph
    names = {n.name for n in found}
    result = copy.deepcopy(graph)
    for node in result.graph.nodes:
        if node.name in names:
            _flatten(result.graph, node)
    result.graph.lint()
    result.recompile()
    return result


def _shape(node: fx.Node) -> tuple[int, ...]:
    return tuple(node.meta["val"].shape)


def _flatten(graph: fx.Graph, node: fx.Node) -> None:
    """Axes 1 to -3 of every operand become one."""
    leading = _shape(node)[1:-2]
    with graph.inserting_before(node):
        operands = [_merged(graph, a, leading) if isinstance(a, fx.Node) else a for a in node.args]
        mask = node.kwargs.get("attn_mask")
        given = (
            {**node.kwargs, "attn_mask": _merged(graph, mask, leading)} if isinstance(mask, fx.Node) else node.kwargs
        )
        flat = graph.call_function(ATTENTION, tuple(operands), given)
        back = graph.call_function(aten.unflatten.int, (flat, 1, list(leading)))
    back.meta = dict(node.meta)
    node.replace_all_uses_with(back)
    graph.erase_node(node)


def _merged(graph: fx.Graph, operand: fx.Node, leading: tuple[int, ...]) -> fx.Node:
    """A mask has fewer axes, or ones to be repeated."""
    shape = _shape(operand)
    if len(shape) <= 2:
        return operand
    whole = (1,) * (len(leading) + 3 - len(shape)) + shape
    if whole[1:-2] != leading:
        sizes = [-1 if len(shape) == len(whole) else 1, *leading, -1, -1]
        operand = graph.call_function(aten.expand.default, (operand, sizes))
    return graph.call_function(aten.flatten.using_ints, (operand, 1, len(leading)))
