"""The families of ATen operations: one list each, for every package that handles them. Knows no handlers.

A new member goes in here; `tests/test_operators.py` then names the rooms that can't handle it and don't say so.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

aten = torch.ops.aten

Arguments = dict[str, Any]  # nodes, numbers and lists of them, by the names of an operator's schema

LINEAR = aten.linear.default
ATTENTION = aten.scaled_dot_product_attention.default

# each with its number of spatial axes
CONVOLUTIONS: Mapping[object, int] = {
    aten.conv1d.default: 1,
    aten.conv2d.default: 2,
    aten.conv3d.default: 3,
    aten.conv1d.padding: 1,
    aten.conv2d.padding: 2,
    aten.conv3d.padding: 3,
}
TRANSPOSED_CONVOLUTIONS: Mapping[object, int] = {
    aten.conv_transpose1d.default: 1,
    aten.conv_transpose2d.input: 2,
    aten.conv_transpose3d.input: 3,
}
_SPATIAL_AXES = {**CONVOLUTIONS, **TRANSPOSED_CONVOLUTIONS}
ALL_CONVOLUTIONS: tuple[object, ...] = tuple(_SPATIAL_AXES)
LAYERS: tuple[object, ...] = (LINEAR, *CONVOLUTIONS)
"""Each output is a weighted sum of inputs that lie together."""
PRODUCTS: tuple[object, ...] = (
    *(aten.matmul.default, aten.mm.default, aten.bmm.default),
    *(aten.addmm.default, aten.baddbmm.default, aten.einsum.default),
)
NORMALISATIONS: tuple[object, ...] = (
    *(aten.batch_norm.default, aten.instance_norm.default, aten.group_norm.default),
    *(aten.layer_norm.default, aten.rms_norm.default),
)
# (input, hx, params, has_biases, num_layers, dropout, train, bidirectional, batch_first)
RECURRENT: tuple[object, ...] = (
    *(aten.lstm.input, aten.gru.input),
    *(aten.rnn_tanh.input, aten.rnn_relu.input),
)


def arguments(node: fx.Node) -> Arguments:
    """A node's arguments by the names of its operator's schema, defaults filled in."""
    return by_name(node.target, node.args, node.kwargs)


def by_name(operator: object, args: Sequence[object], kwargs: Mapping[str, object]) -> Arguments:
    """What an operator is called with, by the names of its schema, defaults filled in."""
    parameters = operator._schema.arguments  # type: ignore[attr-defined]
    defaults: Arguments = {parameter.name: parameter.default_value for parameter in parameters}  # None without one
    by_position = dict(zip(defaults, args, strict=False))
    return defaults | by_position | dict(kwargs)


@dataclass(frozen=True, slots=True)
class Convolution:
    """A convolution's arguments by name, one number for each spatial axis; `padding` may be "same".

    `weight` and `bias` are the nodes that hold them. `groups` is a node where it is as many as the batch has images.
    """

    weight: fx.Node
    bias: fx.Node | None
    stride: tuple[int, ...]
    padding: tuple[int, ...] | str
    dilation: tuple[int, ...]
    groups: int | fx.Node
    transposed: bool

    @classmethod
    def of(cls, node: fx.Node) -> Convolution:
        """Of a node whose target is in ALL_CONVOLUTIONS."""
        dims = _SPATIAL_AXES[node.target]
        settings = arguments(node)
        return cls(
            settings["weight"],
            settings["bias"],
            per_axis(settings["stride"], dims),
            _padding(settings["padding"], dims),
            per_axis(settings["dilation"], dims),
            settings["groups"],
            transposed=node.target in TRANSPOSED_CONVOLUTIONS,
        )


def _padding(padding: int | Sequence[int] | str, dims: int) -> tuple[int, ...] | str:
    if not isinstance(padding, str):
        return per_axis(padding, dims)
    # how many "same" is depends on the kernel
    return (0,) * dims if padding == "valid" else padding


def channel_axis(node: fx.Node) -> int | None:
    """The output-channel axis of a convolution or linear node, None for any other."""
    if node.target is LINEAR:
        return int(node.meta["val"].ndim) - 1  # [..., out]
    return 1 if node.target in ALL_CONVOLUTIONS else None  # [N, out, ...]


def weight_shape(node: fx.Node) -> tuple[int, ...]:
    """The shape of a layer's weight: [out, in], [out, in / groups, ...] or, transposed, [in, out / groups, ...]."""
    return tuple(arguments(node)["weight"].meta["val"].shape)


def paddings_of(
    padding: tuple[int, ...] | str, kernel: Sequence[int], dilation: Sequence[int]
) -> list[tuple[int, int]]:
    """(before, after) of each spatial axis; an odd total of "same" puts the extra zero behind."""
    if padding == "same":
        totals = [gap * (size - 1) for gap, size in zip(dilation, kernel, strict=True)]
        return [(total // 2, total - total // 2) for total in totals]
    assert not isinstance(padding, str)  # "valid" is none on any side: see `_padding`
    return [(side, side) for side in padding]


def per_axis(setting: int | Sequence[int], dims: int) -> tuple[int, ...]:
    """One number per spatial axis: 2 or [2] of a two-dimensional convolution is (2, 2)."""
    numbers = tuple(setting) if isinstance(setting, (tuple, list)) else (setting,)
    return numbers if len(numbers) == dims else numbers * dims
