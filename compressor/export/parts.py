"""The parts of an ONNX file by their names: a model or a node in; constants, makers of tensors, attributes out.

Knows no operation.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import onnx


def constants_of(graph: onnx.GraphProto) -> dict[str, onnx.TensorProto]:
    """The stored tensors, weights among them."""
    return {tensor.name: tensor for tensor in graph.initializer}


def makers_of(graph: onnx.GraphProto) -> dict[str, onnx.NodeProto]:
    """The node that computes each tensor; neither inputs nor constants have one."""
    return {name: node for node in graph.node for name in node.output}


def attributes_of(node: onnx.NodeProto) -> dict[str, Any]:
    """The settings that the node states; the operator's defaults are not among them."""
    return {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in node.attribute}


def with_nodes(
    model: onnx.ModelProto, nodes: Iterable[onnx.NodeProto], constants: Iterable[onnx.TensorProto]
) -> onnx.ModelProto:
    """A copy with other nodes and constants between the same inputs and outputs; nothing is known of its shapes."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    del copy.graph.node[:], copy.graph.initializer[:], copy.graph.value_info[:]
    copy.graph.node.extend(nodes)
    copy.graph.initializer.extend(constants)
    return copy
