"""An fp32 file and calibration images in; which way each int8 weight is rounded out, and what biases make up for.

Weights are rounded one input after the other, each time the remaining ones take over what rounding did to the
outputs (GPTQ, arXiv 2210.17323); the mean that is left goes to the bias (arXiv 1906.04721). Knows no ranges.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper

from .calibration import Images, exposed, values_of

Floats = NDArray[np.float64]

WIDEST = 4608  # inputs of one output; the covariance of more is not held, and such weights are rounded to the nearest
ROWS = 25_600  # of each layer that are looked at
_DAMPING = 0.01  # of the covariance's mean diagonal
_BLOCK = 128


@dataclass
class _Layer:
    """A node with constant weights [groups, outputs, inputs], and its inputs' mean and covariance, once seen."""

    node: onnx.NodeProto
    weight: Floats
    count: int = 0
    total: Any = 0.0
    square: Any = 0.0

    def see(self, rows: Floats) -> None:
        """Rows are [groups, n, inputs]."""
        self.count += rows.shape[1]
        self.total = self.total + rows.sum(1)
        if self.weight.shape[2] <= WIDEST:
            self.square = self.square + rows.transpose(0, 2, 1) @ rows

    @property
    def mean(self) -> Floats:
        return np.asarray(self.total) / self.count

    def covariance(self, *, centred: bool) -> Floats | None:
        if self.weight.shape[2] > WIDEST:
            return None
        mean = self.mean
        found = np.asarray(self.square) / self.count
        return found - mean[:, :, None] * mean[:, None, :] if centred else found


@dataclass
class Rounding:
    """Chooses the weights' int8 codes in quantised forms of one file."""

    layers: Mapping[str, _Layer]
    _known: dict[tuple[str, bytes, int], NDArray[np.int8]] = field(default_factory=dict, repr=False)

    def apply(self, quantised: onnx.ModelProto, most: int) -> None:
        """Rewrites codes, within -most .. most, and biases of the model, in place; scales stay."""
        held = {i.name: i for i in quantised.graph.initializer}
        for name, layer in self.layers.items():
            if f"{name}_quantized" not in held:
                continue
            scales = numpy_helper.to_array(held[f"{name}_scale"])
            bias = _bias_of(layer.node, held)
            codes = self._codes(name, layer, scales, most, centred=bias is not None)
            held[f"{name}_quantized"].CopyFrom(
                numpy_helper.from_array(_flat(codes, layer.node, held[f"{name}_quantized"]), f"{name}_quantized")
            )
            if bias is not None:
                lost = layer.weight - codes * _per_output(scales, layer.weight)
                _shift(held, bias, (lost * layer.mean[:, None, :]).sum(2).reshape(-1))

    def _codes(
        self, name: str, layer: _Layer, scales: NDArray[np.float32], most: int, *, centred: bool
    ) -> NDArray[np.int8]:
        key = (name, scales.tobytes(), most)
        if key not in self._known:
            steps = layer.weight / _per_output(scales, layer.weight)
            covariance = layer.covariance(centred=centred)
            codes = np.rint(steps) if covariance is None else rounded(steps, covariance, most)
            self._known[key] = np.clip(codes, -most, most).astype(np.int8)
        return self._known[key]


def find_rounding(path: Path | str, images: Images) -> Rounding:
    """Runs the file on [N, C, H, W] images, one at a time. Layers that share weights or a bias are left out."""
    model = onnx.load(path)
    constants = {i.name: i for i in model.graph.initializer}
    reads = Counter(name for node in model.graph.node for name in node.input)
    layers = {
        node.input[1]: _Layer(node, _rows_of_weight(node, numpy_helper.to_array(constants[node.input[1]])))
        for node in model.graph.node
        if node.op_type in ("Conv", "Gemm", "MatMul")
        and node.input[1] in constants
        and all(reads[name] == 1 for name in node.input[1:])
    }
    session, names = exposed(model)
    readers: dict[str, list[_Layer]] = {}
    for layer in layers.values():
        readers.setdefault(layer.node.input[0], []).append(layer)
    each = math.ceil(ROWS / len(images))
    for index in range(len(images)):
        for name, value in values_of(session, names, [images[index : index + 1]]):
            for layer in readers.get(name, ()):
                layer.see(_rows_of(layer, value, each))
    return Rounding({name: layer for name, layer in layers.items() if layer.count})


def rounded(steps: Floats, covariance: Floats, most: int) -> Floats:
    """Whole numbers for weights [groups, outputs, inputs] in steps of 1, given the inputs' second moments.

    The error of each goes to the weights behind it as the inverse of `covariance` [groups, inputs, inputs] says.
    """
    groups, _, inputs = steps.shape
    damping = _DAMPING * np.einsum("gii->gi", covariance).mean(1) + 1e-12
    inverse = np.linalg.inv(covariance + damping[:, None, None] * np.eye(inputs))
    upper = np.linalg.cholesky((inverse + inverse.transpose(0, 2, 1)) / 2).transpose(0, 2, 1)
    left, codes = steps.copy(), np.empty_like(steps)
    for begin in range(0, inputs, _BLOCK):
        end = min(begin + _BLOCK, inputs)
        errors = np.empty((groups, steps.shape[1], end - begin))
        for i in range(begin, end):
            codes[:, :, i] = np.clip(np.rint(left[:, :, i]), -most, most)
            error = (left[:, :, i] - codes[:, :, i]) / upper[:, i, i][:, None]
            left[:, :, i + 1 : end] -= error[:, :, None] * upper[:, None, i, i + 1 : end]
            errors[:, :, i - begin] = error
        left[:, :, end:] -= errors @ upper[:, begin:end, end:]
    return codes


def _rows_of_weight(node: onnx.NodeProto, weight: NDArray[np.float32]) -> Floats:
    groups = _attributes(node).get("group", 1)
    plain = weight.T if _is_transposed(node) else weight
    return plain.reshape(groups, plain.shape[0] // groups, -1).astype(np.float64)


def _flat(codes: NDArray[np.int8], node: onnx.NodeProto, like: onnx.TensorProto) -> NDArray[np.int8]:
    shape = tuple(like.dims)
    return np.ascontiguousarray(codes.reshape(shape[::-1]).T if _is_transposed(node) else codes.reshape(shape))


def _is_transposed(node: onnx.NodeProto) -> bool:
    """Whether the weights lie [inputs, outputs]."""
    return node.op_type == "MatMul" or (node.op_type == "Gemm" and not _attributes(node).get("transB", 0))


def _attributes(node: onnx.NodeProto) -> dict[str, Any]:
    return {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}


def _per_output(scales: NDArray[np.float32], weight: Floats) -> Floats:
    """[groups, outputs, 1], also where one scale serves the whole tensor."""
    groups, outputs, _ = weight.shape
    each: Floats = np.broadcast_to(scales.astype(np.float64).reshape(-1), groups * outputs)
    return each.reshape(groups, outputs, 1)


def _rows_of(layer: _Layer, value: NDArray[np.float32], most: int) -> Floats:
    """[groups, n, inputs] what the weights are multiplied with in some places of an input, evenly spread."""
    if layer.node.op_type != "Conv":
        rows = value.reshape(1, -1, value.shape[-1])
        return rows[:, _spread(rows.shape[1], most)].astype(np.float64)
    attributes, groups = _attributes(layer.node), layer.weight.shape[0]
    kernel = attributes["kernel_shape"]
    axes = len(kernel)
    pads = attributes.get("pads", [0] * 2 * axes)
    padded = np.pad(value, [(0, 0), (0, 0), *zip(pads[:axes], pads[axes:], strict=True)])
    gaps, strides = (attributes.get(name, [1] * axes) for name in ("dilations", "strides"))
    reach = tuple((size - 1) * gap + 1 for size, gap in zip(kernel, gaps, strict=True))
    windows = np.lib.stride_tricks.sliding_window_view(padded, reach, axis=tuple(range(2, 2 + axes)))
    every = (slice(None), slice(None), *(slice(None, None, s) for s in strides), *(slice(None, None, g) for g in gaps))
    windows = np.moveaxis(windows[every], 1, 1 + axes)  # [1, *places, channels, *kernel]
    sizes = windows.shape[1 : 1 + axes]
    where = np.unravel_index(_spread(math.prod(sizes), most), sizes)
    found: Floats = windows[0][where].reshape(len(where[0]), groups, -1).transpose(1, 0, 2).astype(np.float64)
    return found


def _spread(available: int, most: int) -> NDArray[np.int64]:
    return np.unique(np.linspace(0, available - 1, min(available, most)).round().astype(np.int64))


def _bias_of(node: onnx.NodeProto, held: Mapping[str, onnx.TensorProto]) -> str | None:
    """The name of the initialiser that holds the bias, in float or in whole steps of its scale."""
    bias = node.input[2] if len(node.input) > 2 else ""
    return next((name for name in (f"{bias}_quantized", bias) if bias and name in held), None)


def _shift(held: Mapping[str, onnx.TensorProto], bias: str, by: Floats) -> None:
    old = numpy_helper.to_array(held[bias])
    scale = held.get(f"{bias}_scale")
    moved = old + by if scale is None else old + np.rint(by / numpy_helper.to_array(scale))
    held[bias].CopyFrom(numpy_helper.from_array(moved.astype(old.dtype).reshape(old.shape), bias))
