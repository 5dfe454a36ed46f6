"""A traced graph's two ends: which nodes take its inputs, which hold its answer, and what both are called.

A traced graph is flat: `graph(*inputs)` takes tensors in the order of `input_names` and gives one tensor, or a tuple of
them in the order of `output_names`.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, fx

from ..tensors import OUTPUT, Inputs, as_tuple, named_leaves

_NAMES, _PATHS, _CONSTANT = "names", "paths", "constant"  # of an output node's metadata


def nodes_by_name(graph: fx.GraphModule) -> dict[str, fx.Node]:
    """Every node; a pruned graph's have the names of the dense one's."""
    return {node.name: node for node in graph.graph.nodes}


def input_nodes(graph: fx.GraphModule) -> list[fx.Node]:
    """The placeholders, in the order of the inputs."""
    return list(graph.graph.find_nodes(op="placeholder"))


def input_names(graph: fx.GraphModule) -> tuple[str, ...]:
    """What the inputs are called: `input` where there is one."""
    return tuple(str(node.meta.get("name", node.name)) for node in input_nodes(graph))


def traced_count(graph: fx.GraphModule) -> int:
    """How many samples the graph was traced with, which the shapes in its metadata are of."""
    return int(input_nodes(graph)[0].meta["val"].shape[0])


def output_node(graph: fx.GraphModule) -> fx.Node:
    """The node that returns."""
    return graph.graph.output_node()


def output_nodes(graph: fx.GraphModule) -> list[fx.Node]:
    """The nodes whose values are the answer, in its order; one may stand twice."""
    returned = output_node(graph).args[0]
    leaves: Sequence[object] = returned if isinstance(returned, (tuple, list)) else (returned,)
    return [leaf for leaf in leaves if isinstance(leaf, fx.Node)]


def output_names(graph: fx.GraphModule) -> tuple[str, ...]:
    """What the answer's tensors are called: `output` where there is one alone."""
    leaves = output_nodes(graph)
    names: tuple[str, ...] = output_node(graph).meta.get(_NAMES, ())
    if len(names) == len(leaves):
        return names
    if len(leaves) == 1:
        return (OUTPUT,)
    return tuple(f"{OUTPUT}.{index}" for index in range(len(leaves)))


def output_paths(graph: fx.GraphModule) -> tuple[str, ...]:
    """Where the tensors stand in the model's own answer, as `named_leaves` calls them, in the order of the names."""
    paths: tuple[str, ...] = output_node(graph).meta.get(_PATHS, ())
    return paths or output_names(graph)


def constant_outputs(graph: fx.GraphModule) -> tuple[str, ...]:
    """What of the model's answer is the same for every sample, and so is no output of the graph."""
    names: tuple[str, ...] = output_node(graph).meta.get(_CONSTANT, ())
    return names


def name_outputs(graph: fx.GraphModule, paths: Sequence[str], constant: Sequence[str] = ()) -> None:
    """Notes the names, one for each of `output_nodes`, and those of `constant_outputs`.

    A path is its name, but where an input is called the same: a file has one value of a name, so that `left` beside an
    input `left` is `output.left`.
    """
    inputs = input_names(graph)
    names: list[str] = []
    for path in paths:
        name = path
        if path in inputs:
            taken = {*inputs, *paths, *names}
            while name in taken:
                name = f"{OUTPUT}.{name}"
        names.append(name)
    output_node(graph).meta |= {_NAMES: tuple(names), _PATHS: tuple(paths), _CONSTANT: tuple(constant)}


def answers(graph: fx.GraphModule, inputs: Inputs) -> tuple[Tensor, ...]:
    """The tensors that the graph answers with, in the order of `output_names`."""
    return tensors_in(graph(*as_tuple(inputs)), graph)


def tensors_in(answer: object, graph: fx.GraphModule) -> tuple[Tensor, ...]:
    """Those of an answer that the graph gave, in the same order."""
    if isinstance(answer, Tensor):
        return (answer,)
    if isinstance(answer, (tuple, list)) and all(isinstance(leaf, Tensor) for leaf in answer):
        return tuple(answer)
    leaves = named_leaves(answer)  # a network that answers in its model's own containers
    return tuple(leaves[path] for path in output_paths(graph))
