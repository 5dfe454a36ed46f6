"""LRP through layer, group, instance and root-mean-square normalisation: relevance behind it in, before it out.

The deviation is held constant; what is left is linear and follows the epsilon rule, mean and affine part included
(Achtibat et al. 2024, proposition 3.4; the shift absorbs like a bias). Knows nothing of routes and rules elsewhere.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from .canonical import operation
from .rules import stabilised_


@dataclass(frozen=True, slots=True)
class Norm:
    """`shape` is the one the statistics are taken in, over `axes`; weight and bias broadcast to it."""

    shape: tuple[int, ...]
    axes: tuple[int, ...]
    weight: Tensor | None
    bias: Tensor | None
    epsilon: float
    centred: bool


def norm_of(node: fx.Node, x: Tensor, constants: Mapping[fx.Node, Any]) -> Norm:
    """The normalisation a node computes of x."""
    names = [argument.name for argument in node.target._schema.arguments]  # type: ignore[union-attr]
    given: dict[str, Any] = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
    weight, bias = (constants[n] if isinstance(n := given.get(key), fx.Node) else None for key in ("weight", "bias"))
    epsilon = given.get("eps", 1e-5)
    epsilon = torch.finfo(x.dtype).eps if epsilon is None else epsilon
    name = operation(node)
    if name in ("layer_norm", "rms_norm"):
        axes = tuple(range(-len(given["normalized_shape"]), 0))
        return Norm(tuple(x.shape), axes, weight, bias, epsilon, name == "layer_norm")
    groups = given.get("num_groups", x.shape[1])
    shape = (x.shape[0], groups, x.shape[1] // groups, *x.shape[2:])
    affine = (1, groups, -1, *[1] * (x.dim() - 2))
    weight, bias = (None if t is None else t.reshape(affine) for t in (weight, bias))
    return Norm(shape, tuple(range(2, len(shape))), weight, bias, epsilon, True)


def through_norm(norm: Norm, x: Tensor, relevance: Tensor, epsilon: float) -> Tensor:
    values = x.reshape(norm.shape)
    if norm.centred:
        values = values - values.mean(norm.axes, keepdim=True)
    gain = torch.rsqrt(values.square().mean(norm.axes, keepdim=True) + norm.epsilon)
    gain = gain if norm.weight is None else gain * norm.weight
    out = values * gain
    out = out if norm.bias is None else out.add_(norm.bias)
    share = torch.div(relevance.reshape(norm.shape), stabilised_(out, epsilon), out=out).mul_(gain)
    if norm.centred:
        share -= share.mean(norm.axes, keepdim=True)
    return share.reshape(x.shape).mul_(x)
