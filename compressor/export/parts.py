"""The parts of an ONNX file by their names: a model or a node in; constants, makers of tensors, attributes out."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable
from typing import Any

import onnx
from google.protobuf.message import Message

_LARGE_BYTES = 1024  # of a tensor whose values no shape depends on
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
    stored = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    return {tensor.name: tensor.type.tensor_type.elem_type for tensor in inferred_tensors(model)} | stored


def inferred_tensors(model: onnx.ModelProto, *, with_values: bool = False) -> list[onnx.ValueInfoProto]:
    """The type and, where it is known, the shape of every tensor but the constants, as ONNX infers them.

    `with_values` follows shapes that are computed too. Weights are declared and not handed over: the inference would
    copy them twice, and takes no more than 2 GB.
    """
    declared = _without(model, "initializer")
    for tensor in model.graph.initializer:
        declared.graph.initializer.append(tensor if tensor.ByteSize() <= _LARGE_BYTES else _declared(tensor))
    graph = onnx.shape_inference.infer_shapes(declared, data_prop=with_values).graph
    return [*graph.value_info, *graph.input, *graph.output]


def _declared(tensor: onnx.TensorProto) -> onnx.TensorProto:
    """Its name, type and shape, as of one whose values lie elsewhere."""
    elsewhere = onnx.StringStringEntryProto(key="location", value="elsewhere")
    return onnx.TensorProto(
        name=tensor.name,
        data_type=tensor.data_type,
        dims=tensor.dims,
        data_location=onnx.TensorProto.EXTERNAL,
        external_data=[elsewhere],
    )


def stored_bytes(model: onnx.ModelProto) -> int:
    """What its nodes and constants take, by their shapes: above 2 GB a message can't be asked for its size."""
    sizes: list[int] = [node.ByteSize() for node in model.graph.node]
    sizes += [math.prod(tensor.dims) * _item_bytes(tensor.data_type) for tensor in model.graph.initializer]
    return sum(sizes)


def _item_bytes(data_type: int) -> int:
    return int(onnx.helper.tensor_dtype_to_np_dtype(data_type).itemsize)


def attributes_of(node: onnx.NodeProto) -> dict[str, Any]:
    """The settings that the node states; the operator's defaults are not among them."""
    return {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in node.attribute}


def with_nodes(
    model: onnx.ModelProto, nodes: Iterable[onnx.NodeProto], constants: Iterable[onnx.TensorProto]
) -> onnx.ModelProto:
    """A copy with other nodes and constants between the same inputs and outputs; nothing is known of its shapes."""
    rewritten = _without(model, "node", "initializer", "value_info")
    rewritten.graph.node.extend(nodes)
    rewritten.graph.initializer.extend(constants)
    return rewritten


def _without(model: onnx.ModelProto, *parts: str) -> onnx.ModelProto:
    """A copy whose graph lacks those parts, which are never copied: weights may be more than one message holds."""
    bare = onnx.ModelProto()
    _copy_fields(model, bare, but=("graph",))
    _copy_fields(model.graph, bare.graph, but=parts)
    return bare


def _copy_fields(source: Message, target: Message, *, but: Collection[str]) -> None:
    for field, _ in source.ListFields():
        if field.name not in but:
            part = type(source)(**{field.name: getattr(source, field.name)})
            target.MergeFrom(part)
