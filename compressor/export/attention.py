"""Operations written so that exporters read them: attention as products, maxima to a given size as slices.

In: a traced graph. Out: the same graph, or a copy without `scaled_dot_product_attention` and adaptive maxima. The
exporter's own spelling of attention takes four axes only, transposes the keys between two reshapes and scales keys as
well as queries; what runtimes fuse is product, softmax and product. Adaptive maxima it doesn't know.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, fx

from ..graph import aten
from .exportable import ADAPTIVE_MAXIMA, spell_adaptive_maximum

ATTENTION = aten.scaled_dot_product_attention.default
_NAMES = [argument.name for argument in ATTENTION._schema.arguments]


def spelled_out(graph: fx.GraphModule) -> fx.GraphModule:
    found = [n.name for n in graph.graph.nodes if _is_spelled(n)]
    if not found:
        return graph
    result = fx.GraphModule(graph, copy.deepcopy(graph.graph))  # the weights are shared
    for node in list(result.graph.nodes):
        if node.name in found:
            (_spell if node.target is ATTENTION else spell_adaptive_maximum)(result, node)
    result.graph.lint()
    result.recompile()
    return result


def _is_spelled(node: fx.Node) -> bool:
    if node.target is ATTENTION:
        return not _asked(node).get("enable_gqa")
    return node.target in ADAPTIVE_MAXIMA


def _asked(node: fx.Node) -> dict[str, Any]:
    return dict(zip(_NAMES, node.args, strict=False)) | dict(node.kwargs)


def _spell(model: fx.GraphModule, node: fx.Node) -> None:
    """softmax(scale q k^T + mask) v, the queries scaled as they are fewest and half precision holds no large scores."""
    asked, call = _asked(node), model.graph.call_function
    query, keys, values, mask = asked["query"], asked["key"], asked["value"], asked.get("attn_mask")
    scale = asked.get("scale") or _shape(query)[-1] ** -0.5
    with model.graph.inserting_before(node):
        if asked.get("is_causal"):
            model.register_buffer(f"{node.name}_causal", torch.ones(_shape(query)[-2], _shape(keys)[-2]).tril().bool())
            mask = model.graph.get_attr(f"{node.name}_causal")
        scaled = call(aten.mul.Tensor, (query, scale))
        scores = call(aten.matmul.default, (scaled, call(aten.transpose.int, (keys, -2, -1))))
        if mask is not None:
            scores = _masked(model, scores, mask)
        shares = call(aten.softmax.int, (scores, -1))
        result = call(aten.matmul.default, (shares, values))
    result.meta = dict(node.meta)
    node.replace_all_uses_with(result)
    model.graph.erase_node(node)


def _masked(model: fx.GraphModule, scores: fx.Node, mask: fx.Node) -> fx.Node:
    """A mask of booleans says what may be seen, one of numbers is added."""
    if _type(model, mask) != torch.bool:
        return model.graph.call_function(aten.add.Tensor, (scores, mask))
    hidden = model.graph.call_function(aten.logical_not.default, (mask,))
    return model.graph.call_function(aten.masked_fill.Scalar, (scores, hidden, float("-inf")))


def _type(model: fx.GraphModule, node: fx.Node) -> torch.dtype:
    value: Tensor = node.meta["val"] if "val" in node.meta else getattr(model, str(node.target))
    return value.dtype


def _shape(node: fx.Node) -> tuple[int, ...]:
    return tuple(node.meta["val"].shape)
