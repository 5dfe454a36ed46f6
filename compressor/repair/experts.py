"""Experts that are mixed into one kernel for each image, as a convolution that can be refitted like any other.

sum_k r_k (W_k * x) is one convolution of [r_1 x, ..., r_K x] with all experts side by side: linear in what is to be
fitted, K times the work, so it stands in for the product while a network is repaired and no longer. Dense and pruned
graph in, their copies with such convolutions out. Depthwise kernels stay: each of their channels reads itself alone.
"""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from ..graph import aten, fetch, store
from ..graph.dynamic import MIXTURES, is_part, keeps_order, part_of
from ..graph.interface import nodes_by_name
from ..graph.neighbours import calls_of, is_stored, only_user, shape_of, stored_nodes
from ..records import IntArray, Slices

_CONVOLUTIONS = {1: aten.conv1d.default, 2: aten.conv2d.default}


@dataclass(frozen=True, slots=True)
class Experts:
    """`product` multiplies patches [N, (groups,) in * taps, places] by kernels mixed of `weight` [K, entries].

    `routing` [N, K] says how much of each; `result` has the product's values as [N, out, *places].
    """

    product: fx.Node
    result: fx.Node
    routing: fx.Node
    weight: str

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """(experts, groups, outputs of a group, entries of a row in * taps)."""
        _, *groups, outputs, row = shape_of(self.product.all_input_nodes[0])  # [N, (groups,) out, in * taps]
        return shape_of(self.routing)[1], math.prod(groups), outputs, row

    @property
    def patches(self) -> fx.Node:
        """What the kernels are multiplied with, [N, (groups,) in * taps, places]."""
        return self.product.all_input_nodes[1]

    def side_by_side(self, weight: Tensor) -> Tensor:
        """[groups * out, K * in * taps, 1, ...] of [K, groups * out * in * taps]."""
        experts, groups, outputs, row = self.sizes
        ones = [1] * (len(shape_of(self.result)) - 2)
        by_output = weight.reshape(experts, groups * outputs, row).transpose(0, 1)  # [groups * out, K, in * taps]
        return by_output.reshape(groups * outputs, experts * row, *ones).clone()

    def kept_side_by_side(self, kept: Sequence[IntArray]) -> tuple[IntArray, IntArray]:
        """Outputs and inputs that stay of `side_by_side`, from the experts and the entries of each that stay."""
        of_experts, entries = kept
        _, _, _, row = self.sizes
        rows = np.unique(entries % row)
        return np.unique(entries // row), (of_experts[:, None] * row + rows).reshape(-1)


def as_stored(weight: Tensor, shape: Sequence[int]) -> Tensor:
    """Experts side by side, [out, K * in * taps], as [K, out * in * taps] of that shape."""
    return weight.reshape(len(weight), shape[0], -1).transpose(0, 1).reshape(*shape).clone()


def experts_convolved(graph: fx.GraphModule) -> tuple[fx.GraphModule, dict[str, Experts]]:
    """A graph in which one convolution stands for each mixture of experts, and these by their weights' names.

    The graph itself where there are none.
    """
    experts = {entry.weight: entry for entry in experts_of(graph)}
    if experts:
        graph = _convolved(graph, list(experts.values()))
    return graph, experts


def slices_side_by_side(experts: Mapping[str, Experts], slices: Slices) -> Slices:
    """What stays of each parameter, of experts as they stand in a graph that convolves with them."""
    kept = dict(slices.kept)
    for name in experts.keys() & kept.keys():
        kept[name] = experts[name].kept_side_by_side(kept[name])
    return Slices(kept)


def experts_of(graph: fx.GraphModule) -> list[Experts]:
    """The products of kernels that are mixed of stored experts, each of which is used there alone."""
    readers = Counter(id(fetch(graph, str(node.target))) for node in stored_nodes(graph))
    mixed = filter(None, map(_experts, calls_of(graph)))
    return [experts for experts in mixed if readers[id(fetch(graph, experts.weight))] == 1]


def _experts(kernel: fx.Node) -> Experts | None:
    """The experts that a product's kernel is mixed of, with the product; None where the node is no such kernel."""
    part, product = part_of(kernel), only_user(kernel)
    is_kernel = part is not None and part.role == "kernel" and not part.depthwise
    if not is_kernel or product is None:
        return None
    mixture = _mixture_behind(kernel)
    if mixture is None:
        return None
    routing, weight = mixture.all_input_nodes
    is_routed = not is_stored(routing) and len(shape_of(routing)) == 2
    if not is_routed or not is_stored(weight) or only_user(weight) is None:
        return None
    return Experts(product, _result_of(product), routing, str(weight.target))


def _mixture_behind(kernel: fx.Node) -> fx.Node | None:
    """The sum of experts that a kernel is another shape of, where nothing else reads it on the way."""
    node = kernel
    while keeps_order(node) and only_user(node) is not None:
        node = node.all_input_nodes[0]
    return node if node.target in MIXTURES and only_user(node) is not None else None


def _result_of(product: fx.Node) -> fx.Node:
    """The node with the product's values as [N, out, *places]: along a line the product itself, whatever reads it."""
    user = only_user(product)
    if is_part(product, "result") or user is None or not keeps_order(user):
        return product
    return user


@contextmanager
def experts_as_layers(
    dense: fx.GraphModule, pruned: fx.GraphModule, slices: Slices
) -> Iterator[tuple[fx.GraphModule, fx.GraphModule, Slices]]:
    """Both graphs and their slices with experts as convolutions; what is written there is in `pruned` afterwards.

    The graphs themselves where they have no experts.
    """
    experts = experts_of(dense)
    if not experts:
        yield dense, pruned, slices
        return

    left = {entry.product.name: entry for entry in experts_of(pruned)}
    pairs = [(entry, left[entry.product.name]) for entry in experts if entry.product.name in left]
    dense_experts = {entry.weight: entry for entry, _ in pairs}
    wide_dense = _convolved(dense, list(dense_experts.values()))
    wide = _convolved(pruned, [entry for _, entry in pairs])
    before = dict(_tensors(wide))
    yield wide_dense, wide, slices_side_by_side(dense_experts, slices)

    rewritten = [(name, tensor) for name, tensor in _tensors(wide) if tensor is not before[name]]
    for name, tensor in rewritten:
        if name in dense_experts:
            tensor = nn.Parameter(as_stored(tensor.detach(), fetch(pruned, name).shape))
        store(pruned, name, tensor)


def _tensors(graph: fx.GraphModule) -> Iterator[tuple[str, Tensor]]:
    """All parameters and buffers by name, tied ones under each of theirs."""
    yield from graph.named_parameters(remove_duplicate=False)
    yield from graph.named_buffers(remove_duplicate=False)


def _convolved(graph: fx.GraphModule, experts: list[Experts]) -> fx.GraphModule:
    """A copy over the same tensors, in which convolutions stand in the place of the experts' products.

    Their weights have the experts' names.
    """
    twin = fx.GraphModule(graph, copy.deepcopy(graph.graph))
    nodes = nodes_by_name(twin)
    for entry in experts:
        store(twin, entry.weight, nn.Parameter(entry.side_by_side(fetch(graph, entry.weight).detach())))
        _convolve(twin, nodes, entry)
    twin.graph.eliminate_dead_code()
    twin.recompile()
    return twin


def _convolve(graph: fx.GraphModule, nodes: dict[str, fx.Node], experts: Experts) -> None:
    """Puts the convolution of all experts in the place of a product's result."""
    product, result = nodes[experts.product.name], nodes[experts.result.name]
    kernel, patches = product.all_input_nodes
    _, groups, _, _ = experts.sizes
    places = shape_of(result)[2:]

    def call(target: Any, *args: Any) -> fx.Node:
        node = graph.graph.call_function(target, args)
        values = fx.map_arg(args, lambda source: source.meta["val"])
        node.meta = {"layer": product.meta["layer"], "place": product.meta["place"], "val": target(*values)}
        return node

    with graph.graph.inserting_before(product):
        shares = nodes[experts.routing.name]
        for axis in (1,) * (len(shape_of(kernel)) - 3) + (-1, -1):
            shares = call(aten.unsqueeze.default, shares, axis)  # [N, (1,) K, 1, 1]
        apart = call(aten.unsqueeze.default, patches, -3)  # [N, (groups,) 1, in * taps, places]
        shared = call(aten.mul.Tensor, shares, apart)
        rows = call(aten.flatten.using_ints, shared, 1, -2)  # [N, groups * K * in * taps, places]
        rows = call(aten.unflatten.int, rows, 2, list(places))
        weight = graph.graph.get_attr(experts.weight)
        weight.meta = {**product.meta, "val": torch.empty_like(fetch(graph, experts.weight), device="meta")}
        ones, zeros = [1] * len(places), [0] * len(places)
        convolution = _CONVOLUTIONS[len(places)]
        summed = call(convolution, rows, weight, None, ones, zeros, ones, groups)
    result.replace_all_uses_with(summed)
