"""Attention over an odd number of tokens, written over an even one: what TensorRT's fp32 products want.

In: an ONNX graph. Out: a copy in which keys and values hold one token more, which the softmax never sees (its score
is -inf), so every output stays what it was. TensorRT-RTX widens such operands anyway, in kernels of their own before
each product; written in the graph, the widening becomes a part of the kernels that make keys, values and scores.
Attentions of another form than product, pointwise operations and reshapes, softmax, product stay as they are.
"""

from __future__ import annotations

import copy
from typing import Any, Literal

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from .parts import attributes_of, constants_of, inferred_tensors, makers_of, readers_of, with_nodes

# Which inputs the scores may be. A divisor of many columns stays out: the new column would be zero over zero.
_POINTWISE = {"Add": (0, 1), "Sub": (0, 1), "Mul": (0, 1), "Div": (0,), "Where": (1, 2)}

Edit = Literal["mask", "shape"] | int  # an axis: it gets longer by a zero
Edits = dict[str, dict[str, Edit]]  # by a node's first output, what becomes of which of its inputs


def with_even_tokens(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy with the same inputs and outputs, or the model itself where there is nothing to do."""
    graph = _Graph(model)
    edits: Edits = {}
    for node in model.graph.node:
        if node.op_type == "Softmax":
            edits |= graph.edits(node)
    if not edits:
        return model
    writer = _Writer(graph, edits)
    for node in model.graph.node:
        writer.add(node)

    return with_nodes(model, writer.nodes, [*model.graph.initializer, *writer.constants])


class _Graph:
    """What is asked of the graph: shapes, constants, who makes a tensor and who reads it."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self.constants = constants_of(model.graph)
        self.shapes: dict[str, tuple[int, ...]] = {}
        for tensor in inferred_tensors(model, with_values=True):
            self.shapes[tensor.name] = tuple(axis.dim_value or -1 for axis in tensor.type.tensor_type.shape.dim)
        self.shapes |= {name: tuple(constant.dims) for name, constant in self.constants.items()}
        self.outputs = {output.name for output in model.graph.output}
        self.makers = makers_of(model.graph)
        self.readers = readers_of(model.graph)

    def width(self, name: str) -> int:
        """The last axis; 0: it has none, -1: it is not known."""
        shape = self.shapes.get(name, (-1,))
        return shape[-1] if shape else 0

    def edits(self, softmax: onnx.NodeProto) -> Edits:
        """What widens the attention around a softmax over an odd number of tokens; empty where none is."""
        scores, shares = softmax.input[0], softmax.output[0]
        tokens = self.width(scores)
        is_odd = tokens >= 3 and tokens % 2 == 1
        if not is_odd or not self._is_over_last_axis(softmax):
            return {}
        before = self._before(scores, tokens)
        values = self._values_behind(shares, tokens)
        if not before or not values:
            return {}
        return {**before, shares: {scores: "mask"}, **values}

    def _is_over_last_axis(self, softmax: onnx.NodeProto) -> bool:
        return attributes_of(softmax).get("axis", -1) in (-1, len(self.shapes[softmax.input[0]]) - 1)

    def _is_read_once(self, name: str) -> bool:
        return name not in self.outputs and len(self.readers.get(name, [])) == 1

    def _values_behind(self, shares: str, tokens: int) -> Edits:
        """The edit of the product that alone reads the shares, from the left, and values [..., tokens, width]."""
        if not self._is_read_once(shares):
            return {}
        (reader,) = self.readers[shares]
        if reader.op_type != "MatMul" or reader.input[0] != shares:
            return {}
        values = reader.input[1]
        if self.shapes.get(values, ())[-2:-1] != (tokens,):
            return {}
        return {reader.output[0]: {values: -2}}

    def _before(self, name: str, tokens: int) -> Edits:
        """The edits from the product of queries and keys to the operation that makes `name`; empty if it is another."""
        node = self.makers.get(name)
        if node is None or not self._is_read_once(name) or self.width(name) != tokens:
            return {}
        match node.op_type:
            case "MatMul":
                return self._before_product(node, tokens)
            case "Reshape":
                return self._before_reshape(node, tokens)
            case _:
                return self._before_pointwise(node, tokens)

    def _before_product(self, node: onnx.NodeProto, tokens: int) -> Edits:
        keys = node.input[1]  # [..., width, tokens]
        if self.width(keys) == tokens and len(self.shapes[keys]) > 1:
            return {node.output[0]: {keys: -1}}
        return {}

    def _before_reshape(self, node: onnx.NodeProto, tokens: int) -> Edits:
        scores, shape = node.input
        before = self._before(scores, tokens)
        if before and self.last_size(shape) in (-1, tokens):
            return {**before, node.output[0]: {shape: "shape"}}
        return {}

    def _before_pointwise(self, node: onnx.NodeProto, tokens: int) -> Edits:
        """Along the first input that comes from the product; others of its width, such as a mask, are widened too."""
        widths = (0, 1) if node.op_type == "Div" else (0, 1, tokens)
        for index in _POINTWISE.get(node.op_type, ()):
            scores = node.input[index]
            operand_widths = {name: self.width(name) for name in node.input if name != scores}
            before = self._before(scores, tokens)
            if before and all(width in widths for width in operand_widths.values()):
                widened: dict[str, Edit] = {name: -1 for name, width in operand_widths.items() if width == tokens}
                return {**before, node.output[0]: widened}
        return {}

    def last_constant(self, shape: str) -> str:
        """The constant that a shape ends in: it may be put together of several. Empty if it ends in none."""
        maker = self.makers.get(shape)
        if maker is not None and maker.op_type == "Concat":
            shape = maker.input[-1]
        return shape if shape in self.constants else ""

    def last_size(self, shape: str) -> int:
        """The last number of a shape, -1 for what is left over; 0: it is computed."""
        constant = self.last_constant(shape)
        return int(numpy_helper.to_array(self.constants[constant])[-1]) if constant else 0


class _Writer:
    """The new graph's nodes so far; each tensor is widened once for each way it is read."""

    def __init__(self, graph: _Graph, edits: Edits) -> None:
        self.graph, self.edits = graph, edits
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []
        self.edited: dict[tuple[str, Edit], str] = {}  # the names edited tensors have in the new graph

    def add(self, node: onnx.NodeProto) -> None:
        """Adds the node, before it what its edited inputs need."""
        changes = self.edits.get(node.output[0], {})
        written = copy.deepcopy(node)
        for place, name in enumerate(node.input):
            if name in changes:
                written.input[place] = self._changed(name, changes[name])
        self.nodes.append(written)

    def _changed(self, name: str, edit: Edit) -> str:
        """The edited tensor's name; it is made where it is read for the first time."""
        if isinstance(edit, int):
            edit %= len(self.graph.shapes[name])
        if (name, edit) not in self.edited:
            target = f"{name}_even_{edit}"
            match edit:
                case "mask":
                    self._mask(name, target)
                case "shape":
                    self._reshape(name, target)
                case int():
                    self._widen(name, target, edit)
            self.edited[name, edit] = target
        return self.edited[name, edit]

    def _mask(self, scores: str, target: str) -> None:
        """Scores are one token wider by now; the softmax gives the new one, at -inf, nothing."""
        unseen = np.array([0.0] * self.graph.width(scores) + [-np.inf], np.float32)
        self._constant(f"{target}_unseen", unseen)
        self.nodes.append(helper.make_node("Add", [scores, f"{target}_unseen"], [target], target))

    def _reshape(self, shape: str, target: str) -> None:
        """The same shape with a larger last axis; -1 adapts by itself."""
        last = self.graph.last_constant(shape)
        sizes = numpy_helper.to_array(self.graph.constants[last]).copy()
        if sizes[-1] != -1:
            sizes[-1] += 1
        if last == shape:
            self._constant(target, sizes)
        else:
            self._constant(f"{target}_last", sizes)
            pieces = [*self.graph.makers[shape].input[:-1], f"{target}_last"]
            self.nodes.append(helper.make_node("Concat", pieces, [target], target, axis=0))

    def _widen(self, name: str, target: str, axis: int) -> None:
        """A zero at the end of the axis; before a transposition, as what comes before that can take it in."""
        rank, maker = len(self.graph.shapes[name]), self.graph.makers.get(name)
        if name in self.graph.constants:
            zeros = np.zeros((rank, 2), np.int64)  # in front of each axis, and behind it
            zeros[axis, 1] = 1
            self._constant(target, np.pad(numpy_helper.to_array(self.graph.constants[name]), zeros))
        elif maker is not None and maker.op_type == "Transpose" and maker.attribute:
            order = list(maker.attribute[0].ints)  # axis i is the source's order[i]
            source = self._changed(maker.input[0], order[axis])
            self.nodes.append(helper.make_node("Transpose", [source], [target], target, perm=order))
        else:
            # Pad takes the zeros in front of all axes, then those behind: rank 3, axis 1 is 0 0 0, 0 1 0.
            self._constant(f"{target}_sizes", np.eye(1, 2 * rank, rank + axis, dtype=np.int64)[0])
            self.nodes.append(helper.make_node("Pad", [name, f"{target}_sizes"], [target], target))

    def _constant(self, name: str, values: NDArray[Any]) -> None:
        self.constants.append(numpy_helper.from_array(values, name))
