"""How much of a node's operands shows whether its channels are right: a node in, lengths of its axes out.

Along axes that lose nothing, those of images and positions, layers, normalisations with stored statistics and
pointwise operations repeat the same arithmetic: one or a few entries tell as much as all.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
from torch import Tensor, fx

from ..graph import aten
from ..graph.operators import ALL_CONVOLUTIONS, arguments, weight_shape
from .compaction import cut_axes
from .labels import Value
from .operations import handler_of, pointwise
from .structure import Keep, Structure

Lengths = Mapping[int, int]  # an axis, counted from the last (-1), and how many of its entries are taken


def excerpt(node: fx.Node, structure: Structure, gone: Keep) -> Lengths:
    """How many entries of which axes show whether an operation's channels are right; all of an axis not named."""
    lengths = _repeated(node)
    if not lengths:
        return {}
    ends = [end for end in (node, *node.all_input_nodes) if isinstance(structure.values.get(end.name), Value)]
    if not is_pointwise(node):
        ends = ends[:2]  # of a layer, its result and its input tell
    for end in ends:
        rank = len(structure.shape(end))  # operands are aligned from the right: axes are counted from the last
        for axis in cut_axes(structure.lying(end), gone):
            lengths.pop(axis - rank, None)  # an axis of which units go is needed whole
    return lengths


def excerpted_operands(node: fx.Node) -> list[fx.Node]:
    """The operands of which an excerpt does: parameters of a layer are needed whole, whatever is taken of its input."""
    return node.all_input_nodes if is_pointwise(node) else node.all_input_nodes[:1]


def narrowed(value: object, lengths: Lengths) -> object:
    """A tensor's first entries along those axes; one that lacks an axis is left as it is along it."""
    if not isinstance(value, Tensor):
        return value
    for axis, length in lengths.items():
        if axis + value.ndim >= 0:
            value = value.narrow(axis, 0, min(length, value.shape[axis]))
    return value


def _repeated(node: fx.Node) -> dict[int, int]:
    """Axes along which the node does the same again and again, and how many entries of them show all of it."""
    meta = node.meta["val"]
    if not isinstance(meta, Tensor):
        return {}
    if is_pointwise(node):
        return dict.fromkeys(range(-meta.ndim, 0), 1)
    repeated = _REPEATED.get(node.target, _of_other)
    return repeated(node, meta.ndim)


def _of_other(node: fx.Node, rank: int) -> dict[int, int]:
    """Of what is not foreseen, nothing is left out."""
    return {}


def _of_linear(node: fx.Node, rank: int) -> dict[int, int]:
    """[..., features]: all axes but the last."""
    return dict.fromkeys(range(-rank, -1), 1)


def _of_convolution(node: fx.Node, rank: int) -> dict[int, int]:
    """[N, C, ...]: images, and two places of the kernel.

    A kernel of 3 at dilation 1 and stride 2 needs (3 - 1) * 1 + 1 + 2 = 5 entries.
    """
    settings = arguments(node)
    dilation, stride = np.max(settings["dilation"]), np.max(settings["stride"])
    lengths = {-rank: 1}
    for axis, kernel_size in enumerate(weight_shape(node)[2:], 2 - rank):
        lengths[axis] = int((kernel_size - 1) * dilation + 1 + stride)
    return lengths


def _of_batch_norm(node: fx.Node, rank: int) -> dict[int, int]:
    """[N, C, ...]: all axes but the channels'."""
    return dict.fromkeys([-rank, *range(2 - rank, 0)], 1)


def _of_layer_norm(node: fx.Node, rank: int) -> dict[int, int]:
    """All axes but those that are normalised over, the last ones."""
    normalised = len(arguments(node)["normalized_shape"])
    return dict.fromkeys(range(-rank, -normalised), 1)


_REPEATED: Mapping[object, Callable[[fx.Node, int], dict[int, int]]] = {
    aten.linear.default: _of_linear,
    aten.batch_norm.default: _of_batch_norm,
    aten.layer_norm.default: _of_layer_norm,
    **dict.fromkeys(ALL_CONVOLUTIONS, _of_convolution),
}


def is_pointwise(node: fx.Node) -> bool:
    """Whether a node's operation works element by element."""
    return node.op == "call_function" and handler_of(node) is pointwise
