"""Attention over an odd number of tokens, written over an even one: what TensorRT's fp32 products want.

In: an ONNX graph. Out: a copy in which keys and values hold one token more, which the softmax never sees (its score
is -inf), so every output stays what it was. TensorRT-RTX widens such operands anyway, in kernels of their own before
each product; written in the graph, the widening becomes a part of the kernels that make keys, values and scores.
Attentions of another form than product, pointwise operations and reshapes, softmax, product stay as they are.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

# Which inputs the scores may be. A divisor of many columns stays out: the new column would be zero over zero.
_POINTWISE = {"Add": (0, 1), "Sub": (0, 1), "Mul": (0, 1), "Div": (0,), "Where": (1, 2)}

Edit = Literal["mask", "shape"] | int  # an axis: it gets longer by a zero
Edits = dict[str, dict[str, Edit]]  # by a node's first output, what becomes of which of its inputs


def with_even_tokens(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy with the same inputs and outputs, or the model itself where there is nothing to do."""
    graph = _Graph(model)
    edits: Edits = {}
    for node in model.graph.node:
        for output, inputs in graph.edits(node).items():
            edits.setdefault(output, {}).update(inputs)
    if not edits:
        return model
    writer = _Writer(graph, edits)
    for node in model.graph.node:
        writer.add(node)
    result = onnx.ModelProto()
    result.CopyFrom(model)
    del result.graph.node[:], result.graph.value_info[:]
    result.graph.node.extend(writer.nodes)
    result.graph.initializer.extend(writer.constants)
    return result


class _Graph:
    """What is asked of the graph: shapes, constants, who makes a tensor and who reads it."""

    def __init__(self, model: onnx.ModelProto) -> None:
        graph = onnx.shape_inference.infer_shapes(model, data_prop=True).graph
        self.shapes = {
            v.name: tuple(d.dim_value or -1 for d in v.type.tensor_type.shape.dim)
            for v in (*graph.value_info, *graph.input, *graph.output)
        }
        self.constants = {i.name: i for i in model.graph.initializer}
        self.shapes |= {name: tuple(i.dims) for name, i in self.constants.items()}
        self.outputs = {v.name for v in model.graph.output}
        self.makers = {name: node for node in model.graph.node for name in node.output}
        self.readers: dict[str, list[onnx.NodeProto]] = {}
        for node in model.graph.node:
            for name in node.input:
                self.readers.setdefault(name, []).append(node)

    def width(self, name: str) -> int:
        """The last axis; 0: it has none, -1: it is not known."""
        shape = self.shapes.get(name, (-1,))
        return shape[-1] if shape else 0

    def edits(self, softmax: onnx.NodeProto) -> Edits:
        """What widens the attention around a softmax over an odd number of tokens; empty for every other node."""
        tokens = self.width(softmax.input[0]) if softmax.op_type == "Softmax" and softmax.input else 0
        if tokens < 3 or tokens % 2 == 0 or not self._is_over_last_axis(softmax):
            return {}
        readers = self.readers.get(softmax.output[0], [])
        result = readers[0] if len(readers) == 1 else None
        if result is None or result.op_type != "MatMul" or result.input[0] != softmax.output[0]:
            return {}
        found = self._before(softmax.input[0], tokens)
        rows = self.shapes.get(result.input[1], ())[-2:-1]
        if found is None or rows != (tokens,) or self._is_read_twice(softmax.output[0]):
            return {}
        return {**found, softmax.output[0]: {softmax.input[0]: "mask"}, result.output[0]: {result.input[1]: -2}}

    def _is_over_last_axis(self, softmax: onnx.NodeProto) -> bool:
        axis = next((a.i for a in softmax.attribute if a.name == "axis"), -1)
        return axis in (-1, len(self.shapes[softmax.input[0]]) - 1)

    def _is_read_twice(self, name: str) -> bool:
        return name in self.outputs or len(self.readers[name]) != 1

    def _before(self, name: str, tokens: int) -> Edits | None:
        """The edits from the product of queries and keys to the operation that makes `name`."""
        node = self.makers.get(name)
        if node is None or self._is_read_twice(name) or self.width(name) != tokens:
            return None
        if node.op_type == "MatMul":
            keys = node.input[1]
            return {name: {keys: -1}} if self.width(keys) == tokens and len(self.shapes[keys]) > 1 else None
        if node.op_type == "Reshape" and self.last_size(node.input[1]) in (-1, tokens):
            before = self._before(node.input[0], tokens)
            return None if before is None else {**before, name: {node.input[1]: "shape"}}
        for scores in (node.input[i] for i in _POINTWISE.get(node.op_type, ())):
            others = [other for other in node.input if other != scores]
            fits = all(self.width(o) in ((0, 1) if node.op_type == "Div" else (0, 1, tokens)) for o in others)
            before = self._before(scores, tokens) if fits else None
            if before is not None:
                return {**before, name: {other: -1 for other in others if self.width(other) == tokens}}
        return None

    def last_constant(self, shape: str) -> str:
        """The constant that a shape ends in: it may be put together of several. Empty if it ends in none."""
        maker = self.makers.get(shape)
        last = maker.input[-1] if maker is not None and maker.op_type == "Concat" else shape
        return last if last in self.constants else ""

    def last_size(self, shape: str) -> int:
        constant = self.last_constant(shape)
        return int(numpy_helper.to_array(self.constants[constant])[-1]) if constant else 0


class _Writer:
    """The new graph's nodes so far; each tensor is widened once for each way it is read."""

    def __init__(self, graph: _Graph, edits: Edits) -> None:
        self.graph, self.edits = graph, edits
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []
        self.held: dict[tuple[str, Edit], str] = {}

    def add(self, node: onnx.NodeProto) -> None:
        changes = self.edits.get(node.output[0], {}) if node.output else {}
        copy = onnx.NodeProto()
        copy.CopyFrom(node)
        copy.input[:] = [self._changed(n, changes[n]) if n in changes else n for n in node.input]
        self.nodes.append(copy)

    def _changed(self, name: str, edit: Edit) -> str:
        if isinstance(edit, int):
            edit %= len(self.graph.shapes[name])
        if (name, edit) not in self.held:
            target = f"{name}_even_{edit}"
            if edit == "mask":
                self._mask(name, target)
            elif edit == "shape":
                self._reshape(name, target)
            else:
                self._widen(name, target, edit)
            self.held[name, edit] = target
        return self.held[name, edit]

    def _mask(self, scores: str, target: str) -> None:
        unseen = np.array([0.0] * self.graph.width(scores) + [-np.inf], np.float32)
        self._constant(f"{target}_unseen", unseen)
        self.nodes.append(helper.make_node("Add", [scores, f"{target}_unseen"], [target], target))

    def _reshape(self, shape: str, target: str) -> None:
        """The same shape with a larger last axis; -1 adapts by itself."""
        last = self.graph.last_constant(shape)
        sizes = numpy_helper.to_array(self.graph.constants[last]).copy()
        sizes[-1] += sizes[-1] != -1
        if last == shape:
            return self._constant(target, sizes)
        self._constant(f"{target}_last", sizes)
        parts = [*self.graph.makers[shape].input[:-1], f"{target}_last"]
        self.nodes.append(helper.make_node("Concat", parts, [target], target, axis=0))
        return None

    def _widen(self, name: str, target: str, axis: int) -> None:
        """A zero at the end of the axis; before a transposition, as what comes before that can take it in."""
        rank, maker = len(self.graph.shapes[name]), self.graph.makers.get(name)
        if name in self.graph.constants:
            values = numpy_helper.to_array(self.graph.constants[name])
            return self._constant(target, np.pad(values, [(0, int(i == axis)) for i in range(rank)]))
        if maker is not None and maker.op_type == "Transpose" and maker.attribute:
            order = list(maker.attribute[0].ints)
            source = self._changed(maker.input[0], order[axis])
            self.nodes.append(helper.make_node("Transpose", [source], [target], target, perm=order))
            return None
        self._constant(f"{target}_sizes", np.eye(1, 2 * rank, rank + axis, dtype=np.int64)[0])
        self.nodes.append(helper.make_node("Pad", [name, f"{target}_sizes"], [target], target))
        return None

    def _constant(self, name: str, values: NDArray[Any]) -> None:
        self.constants.append(numpy_helper.from_array(values, name))
