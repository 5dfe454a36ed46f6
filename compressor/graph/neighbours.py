"""What stands around a node: a node of a traced graph in; the nodes it reads, or the one that reads it, out.

A graph's *stored* nodes are its parameters, buffers and constants; all others are computed from the inputs.
"""

from __future__ import annotations

from typing import TypeGuard

from torch import Tensor, fx


def shape_of(node: fx.Node) -> tuple[int, ...]:
    """Of the node's tensor when it was traced; empty for a node that returns several, and for a number."""
    value = node.meta.get("val")
    return tuple(value.shape) if isinstance(value, Tensor) else ()


def is_stored(value: object) -> TypeGuard[fx.Node]:
    """Whether an argument is a parameter, a buffer or a constant of the graph."""
    return isinstance(value, fx.Node) and value.op == "get_attr"


def stored_operands(node: fx.Node) -> list[fx.Node]:
    """The parameters, buffers and constants that a node reads."""
    return [operand for operand in node.all_input_nodes if is_stored(operand)]


def computed_operands(node: fx.Node) -> list[fx.Node]:
    """The nodes that a node reads and that depend on the network's inputs."""
    return [operand for operand in node.all_input_nodes if not is_stored(operand)]


def other_operands(node: fx.Node, operand: fx.Node) -> list[fx.Node]:
    """What a node reads beside one of its operands."""
    return [other for other in node.all_input_nodes if other is not operand]


def only_user(node: fx.Node) -> fx.Node | None:
    """The one node that reads this one; None where there are several, or none."""
    if len(node.users) != 1:
        return None
    (user,) = node.users
    return user


def stored_nodes(graph: fx.GraphModule) -> list[fx.Node]:
    """The graph's parameters, buffers and constants, in its order; several nodes may name one tensor."""
    return list(graph.graph.find_nodes(op="get_attr"))


def calls_of(graph: fx.GraphModule) -> list[fx.Node]:
    """The nodes that compute something, in the graph's order; the list stays as it is where the graph changes."""
    return [node for node in graph.graph.nodes if node.op == "call_function"]
