"""LRP through layer, group, instance and root-mean-square normalisation: relevance behind it in, before it out.

The deviation is held constant; what is left is linear and follows the epsilon rule, mean and affine part included
(Achtibat et al. 2024, proposition 3.4; the shift absorbs like a bias). Knows nothing of routes and rules elsewhere.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from ..graph.operators import arguments
from .canonical import Constant, constant_of, operation
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


def norm_of(node: fx.Node, x: Tensor, constants: Mapping[fx.Node, Constant]) -> Norm:
    """The normalisation a node computes of x."""
    settings = arguments(node)
    weight = constant_of(settings["weight"], constants)
    bias = constant_of(settings.get("bias"), constants)  # rms_norm has none
    epsilon = settings["eps"]
    if epsilon is None:  # rms_norm's default
        epsilon = torch.finfo(x.dtype).eps

    name = operation(node)
    if name in ("layer_norm", "rms_norm"):
        axes = tuple(range(-len(settings["normalized_shape"]), 0))  # the last ones: (-1,) for tokens [N, T, C]
        return Norm(tuple(x.shape), axes, weight, bias, float(epsilon), name == "layer_norm")

    # instance_norm names no groups: every channel is one
    groups = int(settings.get("num_groups", x.shape[1]))
    shape = (x.shape[0], groups, x.shape[1] // groups, *x.shape[2:])  # [N, groups, channels of a group, H, W]
    affine_shape = (1, groups, -1, *[1] * (x.dim() - 2))  # [C] -> [1, groups, channels of a group, 1, 1]
    if weight is not None:
        weight = weight.reshape(affine_shape)
    if bias is not None:
        bias = bias.reshape(affine_shape)
    return Norm(shape, tuple(range(2, len(shape))), weight, bias, float(epsilon), True)


def through_norm(norm: Norm, x: Tensor, relevance: Tensor, epsilon: float) -> Tensor:
    """Relevance at x, shaped as x. With z = gain (x - mean) + bias and the gain constant it is x dz/dx R / z."""
    centred = x.reshape(norm.shape)
    if norm.centred:
        centred = centred - centred.mean(norm.axes, keepdim=True)
    gain = torch.rsqrt(centred.square().mean(norm.axes, keepdim=True) + norm.epsilon)
    if norm.weight is not None:
        gain = gain * norm.weight
    z = centred * gain
    if norm.bias is not None:
        z = z.add_(norm.bias)

    share = torch.div(relevance.reshape(norm.shape), stabilised_(z, epsilon), out=z).mul_(gain)
    if norm.centred:  # the mean hands back to every x alike what centring took from it
        share -= share.mean(norm.axes, keepdim=True)
    return share.reshape(x.shape).mul_(x)
