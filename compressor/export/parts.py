"""The parts of an ONNX file by their names: a model or a node in; constants, makers of tensors, attributes out."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import onnx

WEIGHTED = ("Conv", "ConvTranspose", "Gemm", "MatMul")  # the operations that weights are operands of


def constants_of(graph: onnx.GraphProto) -> dict[str, onnx.TensorProto]:
    """The stored tensors, weights among them."""
    return {tensor.name: tensor for tensor in graph.initializer}


def makers_of(graph: onnx.GraphProto) -> dict[str, onnx.NodeProto]:
    """The node that computes each tensor; neither inputs nor constants have one."""
    return {name: node for node in graph.node for name in node.output}


def readers_of(graph: onnx.GraphProto) -> dict[str, list[onnx.NodeProto]]:
    """The nodes that take each tensor, in their order, twice where one takes it twice."""
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    return readers


def element_types_of(model: onnx.ModelProto) -> dict[str, int]:
    """The element type, in ONNX's numbers, of every tensor where it is stated or can be inferred."""
    graph = onnx.shape_inference.infer_shapes(model).graph
    tensors = (*graph.value_info, *graph.input, *graph.output)
    stored = {tensor.name: tensor.data_type for tensor in graph.initializer}
    return {tensor.name: tensor.type.tensor_type.elem_type for tensor in tensors} | stored


def attributes_of(node: onnx.NodeProto) -> dict[str, Any]:
    """The settings that the node states; the operator's defaults are not among them."""
    return {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in node.attribute}


def with_nodes(
    model: onnx.ModelProto, nodes: Iterable[onnx.NodeProto], constants: Iterable[onnx.TensorProto]
) -> onnx.ModelProto:
    """A copy with other nodes and constants between the same inputs and outputs; nothing is known of its shapes."""
    rewritten = copy.deepcopy(model)
    graph = rewritten.graph
    del graph.node[:], graph.initializer[:], graph.value_info[:]
    graph.node.extend(nodes)
    graph.initializer.extend(constants)
    return rewritten
