"""The masked original: nodes' results with removed coordinates at zero, and back to that from the compacted ones.

What both checks share: `check.py`, node by node, and `identity.py`, of whole networks. Knows no tolerance.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, fx

from ..graph.neighbours import is_stored
from ..graph.operators import ALL_CONVOLUTIONS, LINEAR
from .compaction import laid
from .labels import Result, Value, map_labelled
from .structure import Keep, Lying, Structure


def mask(result: object, labels: Result, structure: Structure, gone: Keep) -> object:
    """A node's result with removed coordinates at zero, in its original shape; `labels` is what is known of it."""

    def masked(tensor: Tensor, value: Value) -> Tensor:
        return _masked(tensor, structure.lying_of(value), gone)

    return map_labelled(masked, result, labels)


def _masked(tensor: Tensor, lying: Sequence[Lying], gone: Keep) -> Tensor:
    if tensor.dtype == torch.bool:
        return tensor
    for over, classes in lying:
        if gone[classes].any():
            goes = torch.from_numpy(gone[classes])
            tensor = tensor.masked_fill(laid(goes, over, tensor.ndim), 0)
    return tensor


def scatter(result: object, labels: Result, structure: Structure, gone: Keep) -> object:
    """The inverse of `compact`: removed coordinates come back as zeros."""

    def scattered(tensor: Tensor, value: Value) -> Tensor:
        return _scattered(tensor, value.shape, structure.lying_of(value), gone)

    return map_labelled(scattered, result, labels)


def _scattered(tensor: Tensor, shape: Sequence[int], lying: Sequence[Lying], gone: Keep) -> Tensor:
    stays = _masked(torch.ones(tuple(shape), dtype=torch.float64), lying, gone) > 0  # in the original shape
    order = _labelled_last(len(shape), lying)
    full = torch.zeros(tuple(shape), dtype=tensor.dtype).permute(order).contiguous()
    full[stays.permute(order)] = tensor.permute(order).reshape(-1)
    return full.permute(np.argsort(order).tolist())  # every axis back to its place


def _labelled_last(rank: int, lying: Sequence[Lying]) -> list[int]:
    """All axes, those with labels last: [N, heads, tokens, d] becomes [N, tokens, heads, d].

    Entries that stay are then in one order in the full tensor and in the compacted one, also where heads lose
    different dimensions.
    """
    labelled = set(itertools.chain.from_iterable(over for over, _ in lying))
    elsewhere = [axis for axis in range(rank) if axis not in labelled]
    return [*elsewhere, *sorted(labelled)]


def inexact_nodes(structure: Structure) -> set[str]:
    """Nodes whose results depend on what goes beyond zeroing it: the masked original gives something else there."""
    return {name for names in structure.classes.inexact.values() for name in names}


def is_weight(node: fx.Node) -> bool:
    """Only multiplied with inputs that are masked themselves: masking it too changes nothing and costs a copy."""
    return is_stored(node) and all(_multiplies(user, node) for user in node.users)


def _multiplies(layer: fx.Node, weight: fx.Node) -> bool:
    """Whether a layer reads the node as its weight, and not as its input too."""
    if layer.target not in (LINEAR, *ALL_CONVOLUTIONS):
        return False
    return layer.args[1] is weight and layer.args[0] is not weight


def tensors_in(result: object) -> list[Tensor]:
    """The tensors among a node's results."""
    results: Sequence[object] = result if isinstance(result, (tuple, list)) else (result,)
    return [piece for piece in results if isinstance(piece, Tensor)]
