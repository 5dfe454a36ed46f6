"""An fp32 ONNX graph and its fp32 islands in, the same graph in half precision out, casts where the two meet.

What may become half is read from ONNX's own operator schemas. Each tensor is cast at most once each way, right
after its producer, so the nodes stay sorted. Knows no values: which nodes are islands is the caller's finding.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from ..errors import InputError
from .parts import constants_of, with_nodes

_GRAPHS = (onnx.AttributeProto.GRAPH, onnx.AttributeProto.GRAPHS)
# The type of their outputs is an attribute that `_adapt` leaves as it is.
_TYPED_BY_ATTRIBUTE = ("RandomNormal", "RandomUniform", "RandomNormalLike", "RandomUniformLike", "EyeLike")
_SMALLEST = np.float32(6e-8)  # the least magnitude half can hold; what rounds to zero would divide by zero


def converted(model: onnx.ModelProto, islands: Collection[str]) -> onnx.ModelProto:
    """A model with half weights and activations, float32 inputs and outputs, and the named nodes in float32.

    Raises InputError for control flow, whose bodies read tensors from outside.
    """
    opset = next(entry.version for entry in model.opset_import if entry.domain == "")
    writer = _Writer(model.graph, _float_tensors(model))
    for node in model.graph.node:
        if any(attribute.type in _GRAPHS for attribute in node.attribute):
            raise InputError(f"node {node.name!r} ({node.op_type}) is control flow, which has no half precision here")
        is_island = node.name in islands
        takes_half = [False] * len(node.input) if is_island else _inputs_taking_half(node, opset)
        writer.add(node, takes_half, not is_island)

    return with_nodes(model, writer.nodes, writer.initializers())


def _float_tensors(model: onnx.ModelProto) -> set[str]:
    """Names of the float32 tensors, constants included."""
    inferred = onnx.shape_inference.infer_shapes(model).graph
    tensors = (*inferred.value_info, *inferred.input, *inferred.output)
    types = {tensor.name: tensor.type.tensor_type.elem_type for tensor in tensors}
    types |= {constant.name: constant.data_type for constant in model.graph.initializer}
    return {name for name, type_code in types.items() if type_code == TensorProto.FLOAT}


class _Writer:
    """The new graph's nodes so far, and in which types each tensor is there already."""

    def __init__(self, graph: onnx.GraphProto, floats: set[str]) -> None:
        self.constants = constants_of(graph)
        self.used: dict[str, onnx.TensorProto] = {}  # constants of the new graph, by their names there
        self.floats = floats
        self.halves: set[str] = set()  # tensors of the new graph that are float16
        self.casts: dict[tuple[str, bool], str] = {}  # (tensor, to half) -> the cast tensor
        self.outputs = {output.name for output in graph.output}
        self.nodes: list[onnx.NodeProto] = []

    def add(self, node: onnx.NodeProto, takes_half: Sequence[bool], may_be_half: bool) -> None:
        """Adds the node with its inputs in the types it takes, and behind it casts of what must stay float32."""
        copy = onnx.NodeProto()
        copy.CopyFrom(node)
        copy.input[:] = [self._as(name, half) for name, half in zip(node.input, takes_half, strict=True)]

        # A node without float inputs, such as a constant, makes half where its attributes allow it.
        reads_floats = not self.floats.isdisjoint(node.input)
        makes_half = may_be_half and (any(takes_half) or not reads_floats) and _adapt(copy)
        half_outputs = self.floats.intersection(node.output) if makes_half else set()
        self.nodes.append(copy)
        self.halves |= half_outputs - self.outputs
        for place, name in enumerate(node.output):
            if name in half_outputs & self.outputs:  # the caller's side stays float32
                copy.output[place] = self._half_before(name)

    def _half_before(self, output: str) -> str:
        """The name of a half tensor that becomes a float32 output of the graph by a cast."""
        half_name = f"{output}_half"
        self.halves.add(half_name)
        self.floats.add(half_name)
        self.casts[output, True] = half_name
        self.nodes.append(_cast(half_name, output, TensorProto.FLOAT))
        return half_name

    def _as(self, name: str, half: bool) -> str:
        """The tensor's name in the wanted type; constants are converted, others cast once."""
        if name in self.constants:
            return self._constant(name, half=half and name in self.floats)
        if name not in self.floats or (name in self.halves) == half:
            return name
        if (name, half) not in self.casts:
            target = f"{name}_half" if half else f"{name}_float"
            self.casts[name, half] = target
            self.nodes.append(_cast(name, target, TensorProto.FLOAT16 if half else TensorProto.FLOAT))
        return self.casts[name, half]

    def _constant(self, name: str, *, half: bool) -> str:
        target = f"{name}_half" if half else name
        if target not in self.used:
            tensor = self.constants[name]
            self.used[target] = _half_tensor(tensor, target) if half else tensor
        return target

    def initializers(self) -> list[onnx.TensorProto]:
        """The constants that are read, and those that are outputs themselves."""
        output_constants = [self.constants[name] for name in self.outputs if name in self.constants]
        return [*self.used.values(), *output_constants]


def _inputs_taking_half(node: onnx.NodeProto, opset: int) -> list[bool]:
    """For each input, whether the operator's schema takes half where it takes float; all or none of one type."""
    try:
        schema = onnx.defs.get_schema(node.op_type, opset, node.domain)
    except onnx.defs.SchemaError:
        return [False] * len(node.input)

    taking_half = {
        constraint.type_param_str
        for constraint in schema.type_constraints
        if "tensor(float16)" in constraint.allowed_type_strs
    }
    formal = schema.inputs
    last = len(formal) - 1  # stands for all further inputs, as of Concat
    return [formal[min(i, last)].type_str in taking_half for i in range(len(node.input))]


def _adapt(node: onnx.NodeProto) -> bool:
    """Rewrites attributes that fix an output's type; False when the node's output can't be half."""
    for attribute in node.attribute:
        if node.op_type == "Cast" and attribute.name == "to" and attribute.i == TensorProto.FLOAT:
            attribute.i = TensorProto.FLOAT16
        elif attribute.name == "value" and node.op_type in ("Constant", "ConstantOfShape"):
            if attribute.t.data_type == TensorProto.FLOAT:
                attribute.t.CopyFrom(_half_tensor(attribute.t, attribute.t.name))
        elif attribute.name.startswith("value_") and node.op_type == "Constant":
            return False  # value_float and the like are float32 by their name
    return node.op_type not in _TYPED_BY_ATTRIBUTE


def _half_tensor(tensor: onnx.TensorProto, name: str) -> onnx.TensorProto:
    values = numpy_helper.to_array(tensor)
    tiny = (values != 0) & (np.abs(values) < _SMALLEST)
    with np.errstate(over="ignore"):  # a mask's -inf or -1e9 becomes -inf, which masks as well
        half = np.where(tiny, np.copysign(_SMALLEST, values), values).astype(np.float16)
    return numpy_helper.from_array(half, name)


def _cast(source: str, target: str, type_code: int) -> onnx.NodeProto:
    return helper.make_node("Cast", [source], [target], f"cast_{target}", to=type_code)
