"""Residual branches that can go whole: a traced graph in, its branches out; and the graph without some of them.

A branch is what lies between a stream and the sum it enters again: a block's convolutions, an attention, an MLP.
Without it the sum hands the stream on. Knows neither scores nor plans, and repairs nothing.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterable
from dataclasses import dataclass

from torch import Tensor, fx

from ..errors import ModelError
from ..graph import aten
from ..graph.neighbours import shape_of

_SUMS = (aten.add.Tensor, aten.add_.Tensor)
_IDENTITY = aten.dropout.default  # that of evaluation, which every room knows
_IDEMPOTENT = (aten.relu.default, aten.relu_.default, aten.relu6.default)  # twice in a row they do nothing more


@dataclass(frozen=True, slots=True)
class Branch:
    """A residual branch: `total` is the sum it enters, `stream` the sum's other operand, which the branch reads.

    `nodes` are the operations that only the branch needs, in the graph's order.
    """

    total: fx.Node
    stream: fx.Node
    end: fx.Node
    nodes: tuple[fx.Node, ...]

    @property
    def name(self) -> str:
        """The sum's node name, the same in every trace of the model."""
        return self.total.name


def find_branches(graph: fx.GraphModule) -> tuple[Branch, ...]:
    """Every branch whose sum has the stream's own shape, in the graph's order; branches may lie inside others."""
    order = {node: place for place, node in enumerate(graph.graph.nodes)}
    branches: list[Branch] = []
    for node in order:
        branch = _branch_at(node, order)
        if branch is not None:
            branches.append(branch)
    return tuple(branches)


def _branch_at(total: fx.Node, order: dict[fx.Node, int]) -> Branch | None:
    summands = _summands(total)
    if len(summands) != 2:
        return None
    stream, end = sorted(summands, key=order.__getitem__)
    if not all(isinstance(node.meta.get("val"), Tensor) for node in (stream, end, total)):
        return None  # sizes are added up, too
    if len({shape_of(node) for node in (stream, end, total)}) > 1:
        return None

    before_stream = _needed(stream.all_input_nodes)
    reached = _needed([end], past={stream, *before_stream})
    if stream not in reached:
        return None
    inside = {node for node in reached - before_stream - {stream} if node.op == "call_function"}
    readers = {user for node in inside for user in node.users}
    if not readers <= {*inside, total}:  # something of the branch is read elsewhere too
        return None
    return Branch(total, stream, end, tuple(sorted(inside, key=order.__getitem__)))


def _summands(total: fx.Node) -> list[fx.Node]:
    """What a plain sum adds up, as far as it is computed; none of any other node."""
    if total.target not in _SUMS or total.kwargs.get("alpha", 1) != 1:
        return []
    operands = [operand for operand in total.args[:2] if isinstance(operand, fx.Node)]
    return [operand for operand in operands if operand.op == "call_function"]


def _needed(nodes: Iterable[fx.Node], past: Collection[fx.Node] = ()) -> set[fx.Node]:
    """Those nodes and all that they are computed from, without what only nodes in `past` need."""
    needed: set[fx.Node] = set()
    waiting = list(nodes)
    while waiting:
        node = waiting.pop()
        if node in needed:
            continue
        needed.add(node)
        if node not in past:
            waiting.extend(node.all_input_nodes)
    return needed


def without_branches(graph: fx.GraphModule, names: Collection[str]) -> fx.GraphModule:
    """A copy without the branches that enter those sums; what remains keeps its names, the sums hand the stream on.

    Parameters that nothing reads any more go too. Raises ModelError for a name that is no branch of the graph.
    """
    small = copy.deepcopy(graph)
    branches = {branch.name: branch for branch in find_branches(small)}
    unknown = sorted(set(names) - branches.keys())
    if unknown:
        raise ModelError(f"the plan names branch '{unknown[0]}', which this model does not have; rebuild the plan")
    for name in names:
        _hand_on(branches[name].total, branches[name].stream)
    for node in small.graph.nodes:
        if node.target in _IDEMPOTENT and _source(node).target is node.target:
            _hand_on(node, node.all_input_nodes[0])
    small.graph.eliminate_dead_code()
    small.delete_all_unused_submodules()
    small.recompile()
    return small


def _hand_on(node: fx.Node, value: fx.Node) -> None:
    """Makes the node the identity of a value, under its own name."""
    node.target = _IDENTITY
    node.args, node.kwargs = (value, 0.0, False), {}


def _source(node: fx.Node) -> fx.Node:
    """What a node of one operand reads, past identities."""
    (source,) = node.all_input_nodes[:1]
    while source.target is _IDENTITY:
        (source,) = source.all_input_nodes
    return source
