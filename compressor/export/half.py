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

_SMALLEST = np.float32(6e-8)  # the least magnitude half can hold; what rounds to zero would divide by zero


def converted(model: onnx.ModelProto, islands: Collection[str]) -> onnx.ModelProto:
    """A model with half weights and activations, float32 inputs and outputs, and the named nodes in float32.

    Raises InputError for control flow, whose bodies read tensors from outside.
    """
    opset = next(o.version for o in model.opset_import if o.domain == "")
    inferred = onnx.shape_inference.infer_shapes(model).graph
    kinds = {v.name: v.type.tensor_type.elem_type for v in (*inferred.value_info, *inferred.input, *inferred.output)}
    kinds |= {i.name: i.data_type for i in model.graph.initializer}
    floats = {name for name, kind in kinds.items() if kind == TensorProto.FLOAT}
    writer = _Writer(model.graph, floats)
    for node in model.graph.node:
        if any(a.type in (onnx.AttributeProto.GRAPH, onnx.AttributeProto.GRAPHS) for a in node.attribute):
            raise InputError(f"node {node.name!r} ({node.op_type}) is control flow, which has no half precision here")
        halves = [False] * len(node.input) if node.name in islands else _half_inputs(node, opset)
        writer.add(node, halves, node.name not in islands)
    result = onnx.ModelProto()
    result.CopyFrom(model)
    del result.graph.node[:], result.graph.initializer[:], result.graph.value_info[:]
    result.graph.node.extend(writer.nodes)
    result.graph.initializer.extend(writer.initializers())
    return result


class _Writer:
    """The new graph's nodes so far, and in which types each tensor is there already."""

    def __init__(self, graph: onnx.GraphProto, floats: set[str]) -> None:
        self.constants = {i.name: i for i in graph.initializer}
        self.used: dict[str, onnx.TensorProto] = {}
        self.floats = floats
        self.is_half: set[str] = set()
        self.casts: dict[tuple[str, bool], str] = {}
        self.outputs = {v.name for v in graph.output}
        self.nodes: list[onnx.NodeProto] = []

    def add(self, node: onnx.NodeProto, halves: Sequence[bool], may_be_half: bool) -> None:
        copy = onnx.NodeProto()
        copy.CopyFrom(node)
        copy.input[:] = [self._as(name, half) for name, half in zip(node.input, halves, strict=True)]
        made_half = may_be_half and (any(halves) or not any(n in self.floats for n in node.input)) and _adapt(copy)
        renamed = []
        for name in node.output:
            if made_half and name in self.floats:
                if name in self.outputs:  # the caller's side stays float32
                    renamed.append((name, f"{name}_half"))
                    continue
                self.is_half.add(name)
        for name, half_name in renamed:
            copy.output[list(copy.output).index(name)] = half_name
        self.nodes.append(copy)
        for name, half_name in renamed:
            self.is_half.add(half_name)
            self.floats.add(half_name)
            self.casts[name, True] = half_name
            self.nodes.append(_cast(half_name, name, TensorProto.FLOAT))

    def _as(self, name: str, half: bool) -> str:
        """The tensor's name in the wanted type; constants are converted, others cast once."""
        if name not in self.floats:
            if name in self.constants:
                self.used[name] = self.constants[name]
            return name
        if name in self.constants:
            return self._constant(name, half)
        if (name in self.is_half) == half:
            return name
        if (name, half) not in self.casts:
            target = f"{name}_{'half' if half else 'float'}"
            self.casts[name, half] = target
            self.nodes.append(_cast(name, target, TensorProto.FLOAT16 if half else TensorProto.FLOAT))
        return self.casts[name, half]

    def _constant(self, name: str, half: bool) -> str:
        target = f"{name}_half" if half else name
        if target not in self.used:
            tensor = self.constants[name]
            self.used[target] = _half_tensor(tensor, target) if half else tensor
        return target

    def initializers(self) -> list[onnx.TensorProto]:
        return [*self.used.values(), *(self.constants[n] for n in self.outputs if n in self.constants)]


def _half_inputs(node: onnx.NodeProto, opset: int) -> list[bool]:
    """For each input, whether the operator's schema takes half where it takes float; all or none of one type."""
    try:
        schema = onnx.defs.get_schema(node.op_type, opset, node.domain)
    except onnx.defs.SchemaError:
        return [False] * len(node.input)
    taking = {c.type_param_str for c in schema.type_constraints if "tensor(float16)" in c.allowed_type_strs}
    formal = schema.inputs
    return [formal[min(i, len(formal) - 1)].type_str in taking for i in range(len(node.input))]


def _adapt(node: onnx.NodeProto) -> bool:
    """Rewrites attributes that fix an output's type; False when the node's output can't be half."""
    for attribute in node.attribute:
        if node.op_type == "Cast" and attribute.name == "to" and attribute.i == TensorProto.FLOAT:
            attribute.i = TensorProto.FLOAT16
        elif attribute.name == "value" and node.op_type in ("Constant", "ConstantOfShape"):
            if attribute.t.data_type == TensorProto.FLOAT:
                attribute.t.CopyFrom(_half_tensor(attribute.t, attribute.t.name))
        elif attribute.name.startswith("value_") and node.op_type == "Constant":
            return False
    fixed = ("RandomNormal", "RandomUniform", "RandomNormalLike", "RandomUniformLike", "EyeLike")
    return node.op_type not in fixed


def _half_tensor(tensor: onnx.TensorProto, name: str) -> onnx.TensorProto:
    values = numpy_helper.to_array(tensor)
    tiny = (values != 0) & (np.abs(values) < _SMALLEST)
    with np.errstate(over="ignore"):  # a mask's -inf or -1e9 becomes -inf, which masks as well
        half = np.where(tiny, np.copysign(_SMALLEST, values), values).astype(np.float16)
    return numpy_helper.from_array(half, name)


def _cast(source: str, target: str, kind: int) -> onnx.NodeProto:
    return helper.make_node("Cast", [source], [target], f"cast_{target}", to=kind)
