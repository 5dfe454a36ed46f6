"""MACs or parameters as a function of gates: the cost that is counted everywhere, on sizes that are sums of gates.

Exactly the dense network's where all gates are open, and with gates of 0 and 1 exactly what is counted after removal;
the formulas are those of `graph.cost`, so that the gradient says what a unit costs wherever it is read or written.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor, fx

from ..graph.cost import Sizes, formula_of, measure_cost
from ..graph.neighbours import stored_nodes
from ..pruning.compaction import laid
from ..pruning.labels import Value
from .gating import Gating, Places
from .options import Counted


@dataclass(frozen=True, slots=True)
class Block:
    """Axes of a tensor that units share, with their lengths and gates; `key` is the same where the same units lie."""

    axes: tuple[int, ...]
    lengths: tuple[int, ...]
    gates: tuple[Places, ...]
    key: tuple[object, ...]


@dataclass(frozen=True, slots=True)
class _Standing:
    """Stands for a node, or for a call with such nodes as arguments."""

    args: tuple[Any, ...]
    meta: dict[str, Any]
    kwargs: Mapping[str, Any]
    name: str = ""


class CostOfGates:
    """MACs at batch 1, or parameters, from gates [units]; `dense` is where all are open."""

    def __init__(self, gating: Gating, counted: Counted = "macs") -> None:
        self.gating = gating
        self._blocks: dict[str, tuple[Block, ...]] = {}
        self._fixed = 0
        self._calls: list[tuple[fx.Node, float, Callable[[Any], Any]]] = []
        costs = list(_parameters_of(gating.graph) if counted == "parameters" else _macs_of(gating.graph))
        self.dense = sum(amount for _, amount, _ in costs)
        for node, amount, formula in costs:
            tensors = (node, *node.all_input_nodes)
            for tensor in tensors:
                if tensor.name not in self._blocks:
                    self._blocks[tensor.name] = _blocks(gating, tensor)
            is_gated = any(self._blocks[tensor.name] for tensor in tensors)
            if is_gated and amount:
                self._calls.append((node, amount / formula(node), formula))
            else:
                self._fixed += amount

    def __call__(self, gates: Tensor) -> Tensor:
        """[units] to a number in float64, differentiable."""
        with_one = torch.cat([gates.double(), gates.new_ones(1, dtype=torch.float64)])
        sizes: dict[Any, Sequence[Any]] = {}
        total = with_one.new_tensor(float(self._fixed))
        for node, scale, formula in self._calls:
            tensors = (node, *node.all_input_nodes)
            standing = {tensor: self._standing(tensor, with_one, sizes) for tensor in tensors}
            args = fx.map_arg(node.args, standing.__getitem__)  # type: ignore[arg-type]  # torch knows nodes alone
            total = total + scale * formula(_Standing(args, standing[node].meta, node.kwargs, node.name))
        return total

    def _standing(self, node: fx.Node, gates: Tensor, sizes: dict[Any, Sequence[Any]]) -> _Standing:
        """What stands for a node: its shape in sums of gates; `sizes` are those that were summed before, by key."""
        blocks = self._blocks[node.name]
        if not blocks:
            return _Standing((), node.meta, {}, node.name)
        shape: list[Any] = list(self.gating.structure.shape(node))
        for block in blocks:
            if block.key not in sizes:
                sizes[block.key] = _sizes(block, gates)
            for axis, size in zip(block.axes, sizes[block.key], strict=True):
                shape[axis] = size
        return _Standing((), {"val": Sizes(tuple(shape))}, {}, node.name)


def _macs_of(graph: fx.GraphModule) -> Iterator[tuple[fx.Node, int, Callable[[Any], Any]]]:
    """Each node that is counted, its MACs and their formula."""
    cost = measure_cost(graph)
    for node in graph.graph.nodes:
        formula = formula_of(node)
        if node.name in cost.by_node and formula is not None:
            yield node, cost.by_node[node.name], formula


def _parameters_of(graph: fx.GraphModule) -> Iterator[tuple[fx.Node, int, Callable[[Any], Any]]]:
    """Each parameter once, its elements and how they are counted."""
    counted: set[int] = set()
    parameters = dict(graph.named_parameters(remove_duplicate=False))
    for node in stored_nodes(graph):
        parameter = parameters.get(str(node.target))
        if parameter is not None and id(parameter) not in counted:
            counted.add(id(parameter))
            yield node, parameter.numel(), _elements


def _elements(node: Any) -> Any:
    """How many numbers a node, or what stands for it, has."""
    tensor = node.meta["val"]
    return prod(tensor.sizes if isinstance(tensor, Sizes) else tensor.shape)


def _blocks(gating: Gating, node: fx.Node) -> tuple[Block, ...]:
    """What lies on a node's result, put together where axes are shared; empty for what is not one tensor."""
    value = gating.structure.values.get(node.name)
    if not isinstance(value, Value):
        return ()
    blocks: list[tuple[set[int], list[Places]]] = []  # axes, and what lies on them
    for places in gating.at(node.name):
        apart = [block for block in blocks if block[0].isdisjoint(places.axes)]
        met = [block for block in blocks if not block[0].isdisjoint(places.axes)]
        joint_axes = set(places.axes).union(*(axes for axes, _ in met))
        joint_gates = itertools.chain(*(gates for _, gates in met), [places])
        blocks = [*apart, (joint_axes, list(joint_gates))]
    return tuple(_block(sorted(axes), gates, value.shape) for axes, gates in blocks)


def _block(axes: Sequence[int], gates: Sequence[Places], shape: Sequence[int]) -> Block:
    """The axes counted from the first of them, so that a layer's weight and its input have the same key."""
    lengths = tuple(shape[axis] for axis in axes)
    content: list[object] = []
    for places in gates:
        content.append((tuple(map(axes.index, places.axes)), places.slots.cpu().numpy().tobytes()))
    return Block(tuple(axes), lengths, tuple(gates), (lengths, *content))


def _sizes(block: Block, gates: Tensor) -> list[Any]:
    """What remains of each axis: of whole slices those with any entry, of the last axis the mean of a slice.

    Three heads of four dimensions, one head shut and one dimension of each other: 2 and 3.
    """
    stays = gates.new_ones(())
    for places in block.gates:
        inside = [block.axes.index(axis) for axis in places.axes]
        stays = stays * laid(places.products(gates), inside, len(block.axes))
    stays = stays.expand(*block.lengths)
    if stays.ndim == 1:
        return [stays.sum()]
    sizes: list[Any] = []
    for axis in range(stays.ndim - 1):
        further = [another for another in range(stays.ndim) if another != axis]
        sizes.append(stays.amax(further).sum())
    return [*sizes, stays.sum() / prod(size.clamp_min(1.0) for size in sizes)]


def opened(gates: Tensor) -> Tensor:
    """0 or 1, whichever a gate is nearer to, with the gate's own gradient (straight through)."""
    return (gates > 0.5).to(gates.dtype) + gates - gates.detach()
