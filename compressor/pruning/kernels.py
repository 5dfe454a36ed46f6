"""Parameters that hold whole kernels on one axis: a traced graph in, how each such axis is parted out.

Experts [K, out * in * taps] that are mixed for each image, or a layer [out * in * taps, features] that predicts a
kernel: one coordinate stands for an output channel and an input channel at once, and goes with either.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from ..graph.dynamic import MIXTURES, keeps_order, part_of
from ..graph.neighbours import calls_of, computed_operands, is_stored, shape_of
from ..graph.operators import CONVOLUTIONS, LINEAR, arguments
from .labels import Ledger

KernelShape = tuple[int, int, int, int]
"""(groups, outputs of a group, inputs of a group, taps)."""


@dataclass(frozen=True, slots=True)
class KernelAxis:
    """`axis` of a parameter holds a kernel of that shape, its entries in row-major order."""

    axis: int
    shape: KernelShape


def kernel_axes(graph: fx.GraphModule) -> dict[str, KernelAxis]:
    """The axes that hold kernels, by their parameters' qualified names."""
    axes: dict[str, KernelAxis] = {}
    for node in calls_of(graph):
        part = part_of(node)
        if part is not None and part.role == "kernel":
            shape = _kernel_shape(node, part.taps)
            for parameter, axis in _holders(node, shape):
                axes[str(parameter.target)] = KernelAxis(axis, shape)
    return axes


def _kernel_shape(kernel: fx.Node, taps: int) -> KernelShape:
    """Of one image, from [N, (groups,) outputs, inputs * taps]."""
    # 8 outputs of 6 inputs under 3 x 3 are [N, 8, 54]: no axis for one group, whose number is the product of none
    *groups, outputs, row = shape_of(kernel)[1:]
    return math.prod(groups), outputs, row // taps, taps


def _holders(kernel: fx.Node, shape: KernelShape) -> Iterator[tuple[fx.Node, int]]:
    """The parameters that a kernel [N, ...] is a product with, and the axis of each that its entries lie on."""
    source = kernel
    # past what leaves every entry in its place, as a reshape or an activation does
    while keeps_order(source) or _is_pointwise(source):
        source = computed_operands(source)[0]
    if math.prod(shape_of(source)[1:]) != math.prod(shape):
        return
    if source.target in MIXTURES:
        yield from _of_length(source.args[1], -1, shape)  # [K, entries]
    elif source.target in (LINEAR, *CONVOLUTIONS):
        settings = arguments(source)
        if settings.get("groups", 1) == 1:
            yield from _of_length(settings["weight"], 0, shape)  # [entries, features, ...]
            yield from _of_length(settings["bias"], 0, shape)


def _of_length(parameter: object, axis: int, shape: KernelShape) -> Iterator[tuple[fx.Node, int]]:
    """A parameter and its axis, where that is as long as the kernel has entries."""
    if is_stored(parameter) and shape_of(parameter)[axis] == math.prod(shape):
        yield parameter, axis % len(shape_of(parameter))


def _is_pointwise(node: fx.Node) -> bool:
    """Whether a node computes each value from one value of the one node it reads."""
    return torch.Tag.pointwise in getattr(node.target, "tags", ()) and len(node.all_input_nodes) == 1


def kernel_labels(ledger: Ledger, shape: KernelShape) -> list[Tensor]:
    """[entries] labels of output channels, and of input channels: none for what a kernel has only one of in a group.

    Two outputs of three inputs by one tap are 0 0 0 1 1 1 and 0 1 2 0 1 2. Groups have channels of their own.
    """
    groups, outputs, inputs, _ = shape
    labels = []
    if groups * outputs > 1:
        labels.append(ledger.fresh(groups, outputs, 1, 1))
    if inputs > 1:
        labels.append(ledger.fresh(groups, 1, inputs, 1))
    # [groups, outputs, inputs, taps] in row-major order, as the parameter holds them
    return [entries.expand(shape).reshape(-1) for entries in labels]
