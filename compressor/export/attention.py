"""Operations written so that exporters read them: attention as products, maxima to a given size as slices.

In: a traced graph. Out: the same graph, or a copy without `scaled_dot_product_attention`, adaptive maxima, parts as
long as the batch and `take_along_dim`. The exporter's own spelling of attention takes four axes only, transposes the
keys between two reshapes and scales keys as well as queries; what runtimes fuse is product, softmax and product.
Adaptive maxima it doesn't know, and computed lengths of parts become sequences, which TensorRT does not take.
"""

from __future__ import annotations

import copy
import operator
from typing import Any

import torch
from torch import Tensor, fx

from ..graph import aten
from ..graph.operators import arguments
from .exportable import ADAPTIVE_MAXIMA, spell_adaptive_maximum

SPLIT_BY_EACH = aten.split_with_sizes.default
SPLITS = (aten.split.Tensor, SPLIT_BY_EACH)
ATTENTION = aten.scaled_dot_product_attention.default
_NAMES = [argument.name for argument in ATTENTION._schema.arguments]


def spelled_out(graph: fx.GraphModule) -> fx.GraphModule:
    """A copy that shares the weights, or the graph itself where it holds nothing to be spelled out.

    Attention with fewer heads of keys than of queries (`enable_gqa`) stays as it is.
    """
    if not any(map(_is_spelled, graph.graph.nodes)):
        return graph

    spelled = fx.GraphModule(graph, copy.deepcopy(graph.graph))
    for node in filter(_is_spelled, list(spelled.graph.nodes)):
        if node.target is ATTENTION:
            _spell_attention(spelled, node)
        elif node.target in SPLITS:
            _spell_split(spelled, node)
        elif node.target is aten.take_along_dim.default:
            _spell_taken(spelled, node)
        else:
            spell_adaptive_maximum(spelled, node)
    spelled.graph.lint()
    spelled.recompile()
    return spelled


def _is_spelled(node: fx.Node) -> bool:
    if node.target is ATTENTION:
        return not _arguments(node).get("enable_gqa")
    if node.target in SPLITS:
        return any(isinstance(length, fx.Node) for length in _lengths(node))
    if node.target is aten.take_along_dim.default:
        return arguments(node)["dim"] is not None
    return node.target in ADAPTIVE_MAXIMA


def _lengths(split: fx.Node) -> list[Any]:
    """Of its parts, as they are given: one for all of them, or one for each; numbers and sizes that are computed."""
    settings = arguments(split)
    given = settings.get("split_size", settings.get("split_sizes"))
    return list(given) if isinstance(given, (list, tuple)) else [given]


def _spell_taken(model: fx.GraphModule, taken: fx.Node) -> None:
    """What is read and the places, each stretched to the other on every axis but one, and `gather` on that."""
    settings = arguments(taken)
    read, places = settings["self"], settings["indices"]
    axis = settings["dim"] % read.meta["val"].ndim
    with model.graph.inserting_before(taken):
        stretched = _stretched(model, places, read, axis)
        gathered = model.graph.call_function(
            aten.gather.default, (_stretched(model, read, places, axis), axis, stretched)
        )
    taken.replace_all_uses_with(gathered)
    model.graph.erase_node(taken)


def _stretched(model: fx.GraphModule, source: fx.Node, like: fx.Node, axis: int) -> fx.Node:
    """`source` with the other's lengths where its own is 1, but along `axis`; itself where there are none."""
    shape, wanted = source.meta["val"].shape, like.meta["val"].shape
    sizes: list[Any] = [-1] * len(shape)
    for other, (own, asked) in enumerate(zip(shape, wanted, strict=True)):
        if other != axis and own == 1 and asked != 1:
            sizes[other] = model.graph.call_function(aten.sym_size.int, (like, 0)) if other == 0 else int(asked)
    if sizes == [-1] * len(shape):
        return source
    return model.graph.call_function(aten.expand.default, (source, sizes))


def _spell_split(model: fx.GraphModule, split: fx.Node) -> None:
    """Each part as a slice: of three parts of `n` the second is `x[n : 2 * n]`."""
    settings, lengths = arguments(split), _lengths(split)
    for part in list(split.users):
        index = int(part.args[1])  # type: ignore[arg-type]  # a split's users take one part each
        before = lengths[:index] if split.target is SPLIT_BY_EACH else lengths * index
        with model.graph.inserting_before(part):
            begin: Any = 0
            for length in before:
                begin = model.graph.call_function(operator.add, (begin, length))
            own_length = lengths[index] if split.target is SPLIT_BY_EACH else lengths[0]
            end = model.graph.call_function(operator.add, (begin, own_length))
            cut = model.graph.call_function(aten.slice.Tensor, (settings["self"], settings["dim"], begin, end))
        part.replace_all_uses_with(cut)
        model.graph.erase_node(part)
    model.graph.erase_node(split)


def _arguments(node: fx.Node) -> dict[str, Any]:
    """What an attention was called with, by the operator's names."""
    return dict(zip(_NAMES, node.args, strict=False)) | dict(node.kwargs)


def _spell_attention(model: fx.GraphModule, node: fx.Node) -> None:
    """softmax(scale q k^T + mask) v, the queries scaled as they are fewest and half precision holds no large scores."""
    call = model.graph.call_function
    arguments = _arguments(node)
    query, keys, values, mask = arguments["query"], arguments["key"], arguments["value"], arguments.get("attn_mask")
    scale = arguments.get("scale") or _shape(query)[-1] ** -0.5

    with model.graph.inserting_before(node):
        if arguments.get("is_causal"):
            query_count, key_count = _shape(query)[-2], _shape(keys)[-2]
            model.register_buffer(f"{node.name}_causal", torch.ones(query_count, key_count).tril().bool())
            mask = model.graph.get_attr(f"{node.name}_causal")
        scaled = call(aten.mul.Tensor, (query, scale))  # [..., queries, width]
        transposed = call(aten.transpose.int, (keys, -2, -1))  # [..., width, keys]
        scores = call(aten.matmul.default, (scaled, transposed))  # [..., queries, keys]
        if mask is not None:
            scores = _masked(model, scores, mask)
        shares = call(aten.softmax.int, (scores, -1))
        attended = call(aten.matmul.default, (shares, values))  # [..., queries, width of the values]

    attended.meta = dict(node.meta)
    node.replace_all_uses_with(attended)
    model.graph.erase_node(node)


def _masked(model: fx.GraphModule, scores: fx.Node, mask: fx.Node) -> fx.Node:
    """A mask of booleans says what may be seen, one of numbers is added."""
    if _type(model, mask) != torch.bool:
        return model.graph.call_function(aten.add.Tensor, (scores, mask))
    hidden = model.graph.call_function(aten.logical_not.default, (mask,))
    return model.graph.call_function(aten.masked_fill.Scalar, (scores, hidden, float("-inf")))


def _type(model: fx.GraphModule, node: fx.Node) -> torch.dtype:
    # The causal mask was put in after tracing and has no traced value: it is a buffer of the model.
    value: Tensor = node.meta["val"] if "val" in node.meta else getattr(model, str(node.target))
    return value.dtype


def _shape(node: fx.Node) -> tuple[int, ...]:
    return tuple(node.meta["val"].shape)
