"""An fp32 ONNX graph and its fp32 islands in, the same graph in half precision out, casts where the two meet.

What may become half is read from ONNX's own operator schemas. Each tensor is cast at most once each way, right
after its producer, so the nodes stay sorted. Knows no values: which nodes are islands is the caller's finding.
"""

from __future__ import annotations

import copy
from collections.abc import Collection

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from ..errors import InputError
from .parts import constants_of, element_types_of, with_nodes

_GRAPHS = (onnx.AttributeProto.GRAPH, onnx.AttributeProto.GRAPHS)
# The type of their outputs is an attribute that `_adapt` leaves as it is.
_TYPED_BY_ATTRIBUTE = ("RandomNormal", "RandomUniform", "RandomNormalLike", "RandomUniformLike", "EyeLike")
_SMALLEST = np.float32(6e-8)  # the least magnitude half can hold; what rounds to zero would divide by zero


def converted(model: onnx.ModelProto, islands: Collection[str]) -> onnx.ModelProto:
    """A model with half weights and activations, float32 inputs and outputs, and the named nodes in float32.

    Raises InputError for control flow, whose bodies read tensors from outside.
    """
    writer = _Writer(model)
    for node in model.graph.node:
        if any(attribute.type in _GRAPHS for attribute in node.attribute):
            raise InputError(f"node {node.name!r} ({node.op_type}) is control flow, which has no half precision here")
        if node.name in islands:
            writer.add_island(node)
        else:
            writer.add(node)

    return with_nodes(model, writer.nodes, writer.initializers())


class _Writer:
    """The new graph's nodes so far, and in which types each tensor is there already."""

    def __init__(self, model: onnx.ModelProto) -> None:
        types = element_types_of(model)
        self.opset = next(entry.version for entry in model.opset_import if entry.domain == "")
        self.constants = constants_of(model.graph)
        self.used: dict[str, onnx.TensorProto] = {}  # constants of the new graph, by their names there
        self.floats = {name for name in types if types[name] == TensorProto.FLOAT}  # in either graph, or half now
        self.halves: set[str] = set()  # tensors of the new graph that are float16
        self.casts: dict[tuple[str, bool], str] = {}  # (tensor, to half) -> the cast tensor
        self.outputs = {output.name for output in model.graph.output}
        self.nodes: list[onnx.NodeProto] = []

    def add_island(self, node: onnx.NodeProto) -> None:
        """Adds the node with its inputs in float32."""
        island = copy.deepcopy(node)
        island.input[:] = [self._as(name, half=False) for name in node.input]
        self.nodes.append(island)

    def add(self, node: onnx.NodeProto) -> None:
        """Adds the node with its inputs in the types it takes, and behind it casts of what must stay float32."""
        takes_half = _inputs_taking_half(node, self.opset)
        written = copy.deepcopy(node)
        written.input[:] = [self._as(name, half=half) for name, half in zip(node.input, takes_half, strict=True)]
        self.nodes.append(written)

        # A node without float inputs, such as a constant, makes half where its attributes allow it.
        reads_floats = not self.floats.isdisjoint(node.input)
        makes_half = any(takes_half) or not reads_floats
        if not (makes_half and _adapt(written)):
            return
        for place, name in enumerate(node.output):
            if name not in self.floats:
                continue
            if name in self.outputs:  # the caller's side stays float32
                written.output[place] = self._half_before(name)
            else:
                self.halves.add(name)

    def _half_before(self, output: str) -> str:
        """The name of a half tensor that becomes a float32 output of the graph by a cast."""
        half_name = f"{output}_half"
        self.halves.add(half_name)
        self.floats.add(half_name)
        self.casts[output, True] = half_name
        self.nodes.append(_cast(half_name, output, TensorProto.FLOAT))
        return half_name

    def _as(self, name: str, *, half: bool) -> str:
        """The tensor's name in the wanted type; constants are converted, others cast once."""
        if name in self.constants:
            return self._constant(name, half=half and name in self.floats)
        if name not in self.floats or (name in self.halves) == half:
            return name
        if (name, half) not in self.casts:
            suffix, type_code = ("half", TensorProto.FLOAT16) if half else ("float", TensorProto.FLOAT)
            target = f"{name}_{suffix}"
            self.casts[name, half] = target
            self.nodes.append(_cast(name, target, type_code))
        return self.casts[name, half]

    def _constant(self, name: str, *, half: bool) -> str:
        if not half:
            self.used[name] = self.constants[name]
            return name
        target = f"{name}_half"
        if target not in self.used:
            self.used[target] = _half_tensor(self.constants[name], target)
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

    # The schema gives inputs of one type one letter, such as T, and says which types each letter may stand for.
    letters = {
        constraint.type_param_str
        for constraint in schema.type_constraints
        if "tensor(float16)" in constraint.allowed_type_strs
    }
    takes_half = [formal.type_str in letters for formal in schema.inputs]
    last = len(takes_half) - 1  # stands for all further inputs, as of Concat
    return [takes_half[min(place, last)] for place in range(len(node.input))]


def _adapt(node: onnx.NodeProto) -> bool:
    """Rewrites attributes that fix an output's type; False when the node's output can't be half."""
    for attribute in node.attribute:
        match node.op_type, attribute.name:
            case "Cast", "to" if attribute.i == TensorProto.FLOAT:
                attribute.i = TensorProto.FLOAT16
            case "Constant" | "ConstantOfShape", "value" if attribute.t.data_type == TensorProto.FLOAT:
                attribute.t.CopyFrom(_half_tensor(attribute.t, attribute.t.name))
            case "Constant", name if name.startswith("value_"):
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
