"""A layer's kind and widths in, a small ONNX file of that layer out, for timing it away from its network.

The layer stands there `copies` times on one input and the results are added, so that the time of two files
of different copies differs by whole layers alone: layout changes and input and output are in both.
Weights are arbitrary: only shapes matter. Knows no runtime and no network.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from ..tensors import INPUT, OUTPUT
from .onnx import BATCH, DIALECT

LayerKind = Literal["conv", "depthwise", "grouped", "transposed", "linear", "attention", "product"]


@dataclass(frozen=True, slots=True)
class Layer:
    """What a weighted operation is, but for its widths.

    `sizes` is the input's [H, W] of a convolution, [rows] of a linear layer (0: images are rows), [lead, m, n]
    of a product of activations and [heads, queries, keys] of attention, whose widths are (inner, inner).
    `groups` is 1 but for `grouped`.
    """

    kind: LayerKind
    sizes: tuple[int, ...] = ()
    kernel: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] = ()
    dilation: tuple[int, ...] = ()
    groups: int = 1

    @property
    def family(self) -> str:
        """Layers of one family step at the same widths."""
        return f"{self.kind} {'x'.join(map(str, self.kernel))}".strip()


def input_shape(layer: Layer, inputs: int) -> tuple[int, ...]:
    """One image's input of the file that `layer_model` makes: its shape without the batch."""
    match layer.kind:
        case "linear":
            return (*layer.sizes, inputs) if layer.sizes[0] else (inputs,)
        case "product":
            lead, rows, _ = layer.sizes
            return (lead, rows, inputs)
        case "attention":
            heads, queries, keys = layer.sizes
            return (heads, max(queries, keys), inputs)
        case _:
            return (inputs, *layer.sizes)


def _output_shape(layer: Layer, inputs: int, outputs: int) -> tuple[int, ...]:
    """One image's output: of convolutions the mean over the image is what is handed out."""
    match layer.kind:
        case "linear":
            return (*input_shape(layer, inputs)[:-1], outputs)
        case "attention":
            return input_shape(layer, inputs)
        case "product":
            return layer.sizes
        case _:
            return (outputs, *[1] * len(layer.kernel))


def layer_model(layer: Layer, inputs: int, outputs: int, copies: int) -> onnx.ModelProto:
    """The file: `copies` of the layer from `inputs` to `outputs` channels on one input, added up."""
    nodes: list[onnx.NodeProto] = []
    weights: list[onnx.TensorProto] = []
    total = "y0"  # y0, y1, .. are the copies' outputs, s1, s2, .. the sums up to each
    for i in range(copies):
        nodes += _layer(layer, inputs, outputs, i, weights)
        if i:
            nodes.append(helper.make_node("Add", [total, f"y{i}"], [f"s{i}"]))
            total = f"s{i}"

    is_convolution = layer.kind not in ("linear", "product", "attention")
    nodes.append(helper.make_node("GlobalAveragePool" if is_convolution else "Identity", [total], [OUTPUT]))
    graph = helper.make_graph(
        nodes,
        "layer",
        [helper.make_tensor_value_info(INPUT, TensorProto.FLOAT, [BATCH, *input_shape(layer, inputs)])],
        [helper.make_tensor_value_info(OUTPUT, TensorProto.FLOAT, [BATCH, *_output_shape(layer, inputs, outputs)])],
        weights,
    )
    return helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", DIALECT.opset)], ir_version=DIALECT.ir_version
    )


def _layer(layer: Layer, inputs: int, outputs: int, i: int, weights: list[onnx.TensorProto]) -> list[onnx.NodeProto]:
    """Copy i of the layer, from the input to `y{i}`; what it has of weights `w{i}` and bias `b{i}` is appended."""
    match layer.kind:
        case "attention":
            return _attention(i)
        case "product":
            lead, _, columns = layer.sizes
            weights.append(_filled(f"w{i}", (lead, inputs, columns), i))
            return [helper.make_node("MatMul", [INPUT, f"w{i}"], [f"y{i}"])]
        case "linear":
            weights += [_filled(f"b{i}", (outputs,), i), _filled(f"w{i}", (inputs, outputs), i)]
            return _linear(i, of_tokens=layer.sizes[0] > 0)
        case _:
            return _convolution(layer, inputs, outputs, i, weights)


def _linear(i: int, *, of_tokens: bool) -> list[onnx.NodeProto]:
    """On [N, C] one operation, which takes the bias too; on [N, tokens, C] a product and a sum."""
    if not of_tokens:
        return [helper.make_node("Gemm", [INPUT, f"w{i}", f"b{i}"], [f"y{i}"])]
    product = helper.make_node("MatMul", [INPUT, f"w{i}"], [f"p{i}"])
    return [product, helper.make_node("Add", [f"p{i}", f"b{i}"], [f"y{i}"])]


def _convolution(
    layer: Layer, inputs: int, outputs: int, i: int, weights: list[onnx.TensorProto]
) -> list[onnx.NodeProto]:
    weights.append(_filled(f"b{i}", (outputs,), i))
    groups = inputs if layer.kind == "depthwise" else layer.groups
    operator, shape = "Conv", (outputs, inputs // groups)
    if layer.kind == "transposed":
        operator, shape = "ConvTranspose", (inputs, outputs // groups)
    weights.append(_filled(f"w{i}", (*shape, *layer.kernel), i))
    node = helper.make_node(
        operator,
        [INPUT, f"w{i}", f"b{i}"],
        [f"y{i}"],
        kernel_shape=layer.kernel,
        strides=layer.stride,
        pads=layer.padding,
        dilations=layer.dilation,
        group=groups,
    )
    return [node]


def _attention(i: int) -> list[onnx.NodeProto]:
    """softmax(x x^T) x: the sizes are right, the values don't matter. Copies scale their queries to stay apart."""
    steps = [
        helper.make_node("Constant", [], [f"f{i}"], value_float=1.0 / (i + 2)),
        helper.make_node("Transpose", [INPUT], [f"t{i}"], perm=[0, 1, 3, 2]),
        helper.make_node("Mul", [INPUT, f"f{i}"], [f"m{i}"]),
        helper.make_node("MatMul", [f"m{i}", f"t{i}"], [f"q{i}"]),
        helper.make_node("Softmax", [f"q{i}"], [f"p{i}"], axis=-1),
    ]
    return [*steps, helper.make_node("MatMul", [f"p{i}", INPUT], [f"y{i}"])]


def _filled(name: str, shape: Sequence[int], seed: int) -> onnx.TensorProto:
    """Small values, others in each copy: equal weights would be merged, zeros might be skipped."""
    # Repeated to size: 4093 is prime, so rows of a usual width don't come out equal.
    pattern: NDArray[np.float32] = np.random.default_rng(seed).uniform(-0.05, 0.05, 4093).astype(np.float32)
    return numpy_helper.from_array(np.resize(pattern, tuple(shape)), name)
