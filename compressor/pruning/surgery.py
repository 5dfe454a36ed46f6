"""Removal: (graph, structure, plan) -> a graph with smaller tensors, same node and parameter names.

Parameters lose the coordinates whose labels go; integer arguments (sizes, slice bounds, group counts) are
rewritten from the widths that remain, so that no attribute of any module has to follow. The softmax scale
stays the trained one. The graph that came in is not touched.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, fx, nn

from ..errors import ModelError
from ..graph import fetch, store
from ..graph.neighbours import stored_nodes
from ..graph.tracing import named_tensors
from ..records import IntArray, Plan, Slices
from .compaction import RaggedError, compact, is_cut, kept_of_axes
from .labels import Value, map_labelled
from .rewrites import REWRITES, Remaining
from .structure import Keep, Structure


def removed_classes(structure: Structure, kept: Mapping[str, IntArray]) -> Keep:
    """[classes] true where a plan removes the class: units not kept, and everything in rows not kept."""
    gone = np.zeros(len(structure.classes.parent), dtype=bool)
    for name, units in kept.items():
        if name not in structure.members:
            raise ModelError(f"the plan names group '{name}', which this model does not have; rebuild the plan")
        goes = np.ones(structure.groups[name].size, dtype=bool)  # [units]
        goes[units] = False
        members = structure.members[name]  # classes
        gone[members] |= goes[structure.unit_of[members]]

    classes = structure.classes
    count_before = -1
    while count_before < np.count_nonzero(gone):  # a row may lie in another row: until nothing more goes
        count_before = int(np.count_nonzero(gone))
        for whole in (classes.parent, classes.column):
            inside = whole > 0
            gone[inside] |= gone[whole[inside]]
    gone[0] = False
    return gone


def prune(
    graph: fx.GraphModule, structure: Structure, plan: Plan | Mapping[str, IntArray], *, share: bool = False
) -> tuple[fx.GraphModule, Slices]:
    """The pruned graph and what stayed of each parameter.

    `plan` may also be the units that stay of each group. With `share`, parameters that lose nothing are the graph's own
    and no code is made: quicker, for a trial that is run node by node and writes no parameter in place. Raises
    ModelError for a plan of another model, and where groups that can go one by one can't go together.
    """
    gone = removed_classes(structure, _kept_of(plan))
    try:
        return remove(graph, structure, gone, share=share)
    except RaggedError as error:
        raise ModelError(
            f"the groups of this plan can't go together: at {error.node!r} {error}; leave a kind of units out "
            "(--units), and report the model"
        ) from error


def _kept_of(plan: Plan | Mapping[str, IntArray]) -> Mapping[str, IntArray]:
    return plan.kept if isinstance(plan, Plan) else plan


def slices_of(graph: fx.GraphModule, structure: Structure, plan: Plan | Mapping[str, IntArray]) -> Slices:
    """What stays of each parameter that a plan cuts; no tensor is copied. Raises ModelError as `prune` does."""
    gone = removed_classes(structure, _kept_of(plan))
    stays: dict[str, tuple[IntArray, ...]] = {}
    for node in _cut_nodes(graph, structure, gone):
        shape = fetch(graph, str(node.target)).shape
        stays[str(node.target)] = kept_of_axes(shape, structure.lying(node), gone)
    return Slices(stays)


def _cut_nodes(graph: fx.GraphModule, structure: Structure, gone: Keep) -> list[fx.Node]:
    """The nodes that read a parameter or buffer which loses anything."""
    return [node for node in stored_nodes(graph) if is_cut(structure.lying(node), gone)]


def remove(
    graph: fx.GraphModule, structure: Structure, gone: Keep, *, share: bool = False
) -> tuple[fx.GraphModule, Slices]:
    """The graph without the classes that are gone. Raises RaggedError, naming the node, where no box remains."""
    small = _shared(graph) if share else _copied(graph, structure, gone)
    remaining = Remaining(structure, gone)
    parameters = _Parameters(small)
    touched = structure.touched(gone)
    for node in small.graph.nodes:
        # a slice or a split may lose nothing itself and still begin elsewhere in what it is cut from
        if touched.isdisjoint(end.name for end in (node, *node.all_input_nodes)):
            continue
        with _naming(node):
            if node.op == "get_attr":
                parameters.cut(node, remaining)
            elif node.target in REWRITES:
                REWRITES[node.target](node, remaining)
            if node.name in touched:
                node.meta = {**node.meta, "val": _shrunk(node, remaining)}
    if not share:
        small.recompile()
    return small, Slices(parameters.kept)


@contextmanager
def _naming(node: fx.Node) -> Iterator[None]:
    """Whatever goes wrong inside is a RaggedError that names the node: so the check finds it there."""
    try:
        yield
    except RaggedError as error:
        error.node = node.name
        raise
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # a form that the rewrite does not take
        unforeseen = RaggedError(f"its sizes can't be rewritten ({type(error).__name__}: {error})")
        unforeseen.node = node.name
        raise unforeseen from error


def _shared(graph: fx.GraphModule) -> fx.GraphModule:
    """A copy of the nodes, over the graph's own tensors; it has no code of its own, so it is run node by node."""
    # fx's own constructor would generate and compile the code of a graph that no one calls
    twin: fx.GraphModule = fx.GraphModule.__new__(fx.GraphModule)
    nn.Module.__init__(twin)
    _take_tensors(twin, graph)
    twin._graph = copy.deepcopy(graph.graph)
    return twin


def _take_tensors(twin: nn.Module, module: nn.Module) -> None:
    """Gives the twin the module's tensors and, below it, modules that hold those of the module's own."""
    twin.training = module.training
    twin._parameters = dict(module._parameters)
    twin._buffers = dict(module._buffers)
    twin._modules = {}
    for name, child in module._modules.items():
        if child is None:
            continue
        owner = copy.copy(child)  # not nn.Module(): its constructor takes a fifth of a millisecond
        _take_tensors(owner, child)
        twin._modules[name] = owner


def _copied(graph: fx.GraphModule, structure: Structure, gone: Keep) -> fx.GraphModule:
    """A copy in which parameters that are cut next are still the graph's own, so that none is ever held twice."""
    names_of = Counter(map(id, named_tensors(graph).values()))

    not_copied: dict[int, Tensor] = {}
    for node in _cut_nodes(graph, structure, gone):
        tensor = fetch(graph, str(node.target))
        if names_of[id(tensor)] == 1:  # a second name, which no node may read, would stay the graph's own
            not_copied[id(tensor)] = tensor
    return copy.deepcopy(graph, not_copied)


@dataclass(slots=True)
class _Parameters:
    """A graph's parameters and buffers while they are cut; `kept` says what stayed of those that were.

    `cuts` holds what became of each tensor, by the `id` it had: tied parameters stay tied.
    """

    graph: fx.GraphModule
    kept: dict[str, tuple[IntArray, ...]] = field(default_factory=dict)
    cuts: dict[int, Tensor] = field(default_factory=dict)

    def cut(self, node: fx.Node, remaining: Remaining) -> None:
        """Puts what remains of the tensor that a node reads in its place."""
        name, gone = str(node.target), remaining.gone
        lying = remaining.structure.lying(node)
        if name in self.kept or not is_cut(lying, gone):
            return
        tensor = fetch(self.graph, name)
        if id(tensor) not in self.cuts:
            rest = compact(tensor.detach(), lying, gone).clone()
            self.cuts[id(tensor)] = nn.Parameter(rest) if isinstance(tensor, nn.Parameter) else rest
        self.kept[name] = kept_of_axes(tensor.shape, lying, gone)
        store(self.graph, name, self.cuts[id(tensor)])


def _shrunk(node: fx.Node, remaining: Remaining) -> object:
    """What the trace says of a node's result, for what remains of it."""

    def shrunk(tensor: Tensor, value: Value) -> Tensor:
        return torch.empty(remaining.shape_of(value), dtype=tensor.dtype, device="meta")

    return map_labelled(shrunk, node.meta.get("val"), remaining.structure.values[node.name])
