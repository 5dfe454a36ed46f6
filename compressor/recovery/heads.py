"""The features in front of a network's head: found in the graph, given beside the answers.

The head are the last layers with weights on every way to an answer. Mimicking what they read needs fewer images than
their answers do (MiR, Wang et al., arXiv 2201.02620; PRACTISE, arXiv 2202.07861). Knows no architecture.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from ..graph.interface import nodes_by_name, output_node, output_nodes
from ..graph.neighbours import shape_of
from ..graph.operators import ALL_CONVOLUTIONS, LINEAR, Convolution, arguments
from ..records import Slices

_LAYERS = (LINEAR, *ALL_CONVOLUTIONS)


@dataclass(frozen=True, slots=True, eq=False)
class Feature:
    """What a layer of the head reads: the `node` in both graphs, and which of the dense one's channels are left.

    `kept` is None where all are.
    """

    node: str
    axis: int
    kept: Tensor | None = None

    def of_dense(self, value: Tensor) -> Tensor:
        """The dense network's feature [N, ...] without the channels that went."""
        if self.kept is None:
            return value
        return value.index_select(self.axis, self.kept.to(value.device))


def features_of(dense: fx.GraphModule, small: fx.GraphModule, slices: Slices | None = None) -> tuple[Feature, ...]:
    """The head's inputs that can be compared; without `slices` those alone that lost nothing."""
    slices = slices or Slices({})
    dense_nodes, small_nodes = nodes_by_name(dense), nodes_by_name(small)
    features: dict[str, Feature] = {}
    for layer in _heads(dense):
        feature = _feature(layer, slices)
        if feature is None or not {layer.name, feature.node} <= small_nodes.keys():
            continue
        dense_width, small_width = (shape_of(nodes[feature.node])[feature.axis] for nodes in (dense_nodes, small_nodes))
        left = dense_width if feature.kept is None else len(feature.kept)
        if small_width == left:
            features.setdefault(feature.node, feature)
    return tuple(features.values())


def _heads(graph: fx.GraphModule) -> list[fx.Node]:
    """The first layers with weights that are met on the ways back from the answers."""
    layers: list[fx.Node] = []
    seen: set[fx.Node] = set()
    waiting = list(output_nodes(graph))
    while waiting:
        node = waiting.pop()
        if node in seen:
            continue
        seen.add(node)
        if node.target in _LAYERS:
            layers.append(node)
        else:
            waiting.extend(node.all_input_nodes)
    return layers


def _feature(layer: fx.Node, slices: Slices) -> Feature | None:
    """None where a layer reads the images themselves, or its channels in groups."""
    source: fx.Node = arguments(layer)["input"]
    axis, weight_axis = 1, 1
    if layer.target is LINEAR:
        axis = len(shape_of(source)) - 1
    else:
        convolution = Convolution.of(layer)
        if convolution.groups != 1:
            return None
        weight_axis = 0 if convolution.transposed else 1  # a transposed weight is [in, out, *kernel]
    if source.op == "placeholder":
        return None

    kept = slices.kept.get(str(arguments(layer)["weight"].target))
    if kept is None:
        return Feature(source.name, axis)
    return Feature(source.name, axis, torch.from_numpy(kept[weight_axis]))


def watched(graph: fx.GraphModule, features: Sequence[Feature]) -> fx.GraphModule:
    """The same network, tensors shared, which answers with (answers, features): two tuples.

    It can be switched to training by itself.
    """
    copied = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    copied.graph_copy(graph.graph, copies)
    originals = nodes_by_name(graph)
    answers = tuple(copies[node] for node in output_nodes(graph))
    end = copied.output((answers, tuple(copies[originals[feature.node]] for feature in features)))
    end.meta = dict(output_node(graph).meta)
    return fx.GraphModule(graph, copied)
