"""An fp32 ONNX file in, an fp16 or an int8 one out; precision is written into the file, as strong typing needs.

fp16 keeps fp32 islands where calibration images show values half floats can't hold. int8 is explicit Q/DQ with
symmetric per-channel weights, placed for the target, the rest in fp32 or fp16. Knows no accuracy: `mixed` measures.
"""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from ..device.feeds import as_tuple
from ..device.runtimes import open_model
from ..errors import InputError
from .calibration import Ranges, Statistics
from .half import converted
from .onnx import silenced, write_model
from .parts import WEIGHTED, attributes_of, constants_of, inferred_tensors
from .rounding import Rounding

Placement = Literal["tensorrt", "onnxruntime"]

_HALF_MAX = 65504.0
_MARGIN = 4.0  # other images than the calibration's may go this much further
_SQUARING = ("LayerNormalization", "InstanceNormalization", "GroupNormalization", "ReduceL2", "ReduceSumSquare", "Pow")
_SUMMING = ("ReduceSum", "CumSum", "ReduceLogSumExp", "Exp")
_LARGEST_CODES = {7: 64, 8: 127}  # by the bits of weights: so the quantiser scales them
_QUANTISING = ("QuantizeLinear", "DequantizeLinear")
_PASSING = ("Relu", "Clip", "MaxPool", "AveragePool", "GlobalAveragePool", "Concat", "Add")


@dataclass(frozen=True, slots=True)
class Half:
    """An fp16 file; `islands` are the nodes left in fp32 and the magnitude that put them there."""

    path: str
    islands: Mapping[str, float]


def to_fp16(
    path: Path | str, out: Path | str, *, statistics: Statistics | None = None, islands: Iterable[str] = ()
) -> Half:
    """Writes the file in half precision with float32 input and output; `islands` adds nodes by name.

    Without `statistics` every operation that squares or sums stays in fp32, since nothing shows it may not.
    """
    model = named(onnx.load(path))
    magnitudes = overflowing(model, statistics)
    unknown = set(islands) - {node.name for node in model.graph.node}
    if unknown:
        raise InputError(f"no node {min(unknown)!r} in {path} to keep in fp32")
    for name in islands:
        magnitudes.setdefault(name, 0.0)
    write_model(converted(model, magnitudes), Path(out))
    return Half(str(out), magnitudes)


def with_half_rest(path: Path | str, out: Path | str, *, statistics: Statistics) -> Half:
    """Writes an int8 file (Q/DQ) whose other operations compute in half precision, which TensorRT has kernels for.

    So attention is fused and no product is padded to a multiple of four. `statistics` are of the fp32 file.
    """
    model = named(onnx.load(path))
    magnitudes = overflowing(model, statistics)
    _fit_scales(model)
    write_model(converted(model, magnitudes), Path(out))
    return Half(str(out), magnitudes)


def _fit_scales(model: onnx.ModelProto) -> None:
    """Scales become the next half float above, and codes of weights what they are on that scale."""
    constants = constants_of(model.graph)
    scales_before: dict[str, NDArray[np.float32]] = {}
    fitted: set[str] = set()
    for node in model.graph.node:
        if node.op_type not in _QUANTISING or node.input[1] not in constants:
            continue
        codes, scale = node.input[:2]
        if scale not in scales_before:
            scales_before[scale] = numpy_helper.to_array(constants[scale])
            constants[scale].CopyFrom(numpy_helper.from_array(_half_above(scales_before[scale]), scale))
        if codes in constants and codes not in fitted:
            fitted.add(codes)
            scale_after = numpy_helper.to_array(constants[scale])
            _fit_codes(constants[codes], scales_before[scale], scale_after, attributes_of(node).get("axis", 1))


def _fit_codes(
    codes: onnx.TensorProto, scale_before: NDArray[np.float32], scale_after: NDArray[np.float32], axis: int
) -> None:
    """Rewrites codes in place so that code times scale stays; `axis` is that of the scales, where there are several."""
    values = numpy_helper.to_array(codes)
    ratio = np.divide(scale_before, scale_after, out=np.ones_like(scale_after), where=scale_after > 0)
    shape = [1] * values.ndim
    if ratio.size > 1:
        shape[axis % values.ndim] = -1
    fitted_values = np.rint(values * ratio.reshape(shape)).astype(values.dtype)
    codes.CopyFrom(numpy_helper.from_array(fitted_values, codes.name))


def _half_above(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """What half can't hold stays: its quantiser is an island."""
    with np.errstate(over="ignore"):
        near = values.astype(np.float16)
        above = np.where(near < values, np.nextafter(near, np.float16(np.inf)), near).astype(np.float32)
    return np.where(np.isfinite(above), above, values)


def overflowing(model: onnx.ModelProto, statistics: Statistics | None) -> dict[str, float]:
    """Nodes whose values, or squares and sums inside them, half floats can't hold, with that magnitude."""
    if statistics is None:
        uncertain = [node.name for node in model.graph.node if node.op_type in (*_SQUARING, *_SUMMING)]
        return dict.fromkeys(uncertain, float("inf"))

    magnitudes: dict[str, float] = {}
    fp32_names: dict[str, str] = {}  # what a quantiser passes on, by the name it had in the fp32 file
    for node in model.graph.node:
        if node.op_type in _QUANTISING:
            fp32_names[node.output[0]] = fp32_names.get(node.input[0], node.input[0])

        tensors = [fp32_names.get(name, name) for name in (*node.input, *node.output)]
        reached = max((_magnitude(statistics, name) for name in tensors), default=0.0)
        if node.op_type in _SQUARING:
            reached = max(reached, _magnitude(statistics, tensors[0]) ** 2)
        if reached * _MARGIN > _HALF_MAX:
            magnitudes[node.name] = reached
    return magnitudes


def _magnitude(statistics: Statistics, name: str) -> float:
    """0 for a tensor without statistics: constants are judged by what comes of them."""
    low, high = statistics.extremes.get(name, (0.0, 0.0))
    return max(abs(low), abs(high))


def to_int8(
    path: Path | str,
    out: Path | str,
    *,
    ranges: Ranges,
    placement: Placement = "tensorrt",
    keep: Sequence[str] = (),
    rounding: Rounding | None = None,
) -> Path:
    """Writes the file with Q/DQ around convolutions and products with weights, but for the nodes in `keep`.

    `tensorrt`: symmetric int8 inputs of weighted nodes and residual sums, zero points 0, outputs left to fusion.
    `onnxruntime`: uint8 activations on both sides, so that its CPU kernels stay in integers from node to node;
    weights have `weight_bits()`. They are rounded as `rounding` of the same file says, else to the nearest.
    """
    model = named(onnx.load(path))
    nodes = [name for name in quantisable(model) if name not in set(keep)]
    if not nodes:
        raise InputError(f"{path} has no convolution or matrix product left to quantise")

    tensors = inferred_tensors(model)
    del model.graph.value_info[:]
    model.graph.value_info.extend(tensors)
    quantised = _quantise(model, nodes, ranges, placement)
    if rounding is not None:
        rounding.apply(quantised, _LARGEST_CODES[bits_for(placement)])
    del quantised.graph.value_info[:]
    quantised.ir_version = model.ir_version
    return write_model(sorted_nodes(quantised), Path(out))


def bits_for(placement: Placement) -> int:
    """Of int8 weights in that form."""
    return 8 if placement == "tensorrt" else weight_bits()


@functools.cache
def weight_bits() -> int:
    """Of int8 weights for ONNX Runtime on this processor: 7 where two products of 255 saturate at 16 bits, else 8.

    So they do on x86 without VNNI. Found by trying; the runtime does not say.
    """
    most = np.full((64, 16), 127, dtype=np.int8)
    nodes = [
        helper.make_node("Cast", ["input"], ["bytes"], to=onnx.TensorProto.UINT8),
        helper.make_node("MatMulInteger", ["bytes", "weight"], ["sums"]),
        helper.make_node("Cast", ["sums"], ["output"], to=onnx.TensorProto.FLOAT),
    ]
    image = helper.make_tensor_value_info("input", onnx.TensorProto.FLOAT, ["batch", 64])
    output = helper.make_tensor_value_info("output", onnx.TensorProto.FLOAT, ["batch", 16])
    graph = helper.make_graph(nodes, "saturates", [image], [output], [numpy_helper.from_array(most, "weight")])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    with tempfile.TemporaryDirectory(prefix="compressor-") as folder:
        path = write_model(model, Path(folder) / "saturates.onnx")
        sums, *_ = as_tuple(open_model(path).run(np.full((8, 64), 255, dtype=np.float32)))
    return 8 if bool((sums == 255.0 * 127 * 64).all()) else 7


def quantisable(model: onnx.ModelProto) -> list[str]:
    """Weighted nodes, then what joins or passes on their results unchanged in kind: sums, pools, activations.

    Sums of a transformer's residual stream are not among them: their outliers would cost every token.
    """
    constants = constants_of(model.graph)
    spatial: set[str] = set()  # results of convolutions, and of what passes them on
    names = []
    for node in model.graph.node:
        activations = {*node.input} - constants.keys() - {""}  # "" stands for an input that is left out
        has_weights = node.op_type in WEIGHTED and not constants.keys().isdisjoint(node.input[1:2])
        passes_on = node.op_type in _PASSING and bool(activations) and activations <= spatial
        if not has_weights and not passes_on:
            continue
        names.append(node.name)
        if node.op_type not in ("Gemm", "MatMul"):
            spatial.update(node.output)
    return names


def weighted_nodes(model: onnx.ModelProto) -> list[str]:
    """The nodes whose precision is worth a choice of its own, in graph order."""
    constants = constants_of(model.graph)
    weighted = [node for node in model.graph.node if node.op_type in WEIGHTED]
    return [node.name for node in weighted if not constants.keys().isdisjoint(node.input[:2])]


def _quantise(model: onnx.ModelProto, nodes: Sequence[str], ranges: Ranges, placement: Placement) -> onnx.ModelProto:
    from onnxruntime.quantization import CalibrationMethod, QuantType
    from onnxruntime.quantization.calibrate import TensorsData
    from onnxruntime.quantization.qdq_quantizer import QDQQuantizer

    types, activation_type = [*WEIGHTED, *_PASSING], QuantType.QUInt8
    options: dict[str, Any] = {"QuantizeBias": True, "WeightSymmetric": True}
    if placement == "tensorrt":
        types, activation_type = [*WEIGHTED, "Add"], QuantType.QInt8
        options |= {"QuantizeBias": False, "ActivationSymmetric": True, "OpTypesToExcludeOutputQuantization": types}
    data = {name: (np.float32(low), np.float32(high)) for name, (low, high) in ranges.items()}

    with silenced("root"):  # it advises a pre-processing our export has already done
        quantiser = QDQQuantizer(
            model,
            True,  # per channel
            bits_for(placement) < 8,
            QuantType.QInt8,
            activation_type,
            TensorsData(CalibrationMethod.MinMax, data),
            list(nodes),
            [],
            types,
            options,
        )
        quantiser.quantize_model()
    result: onnx.ModelProto = quantiser.model.model
    return result


def named(model: onnx.ModelProto) -> onnx.ModelProto:
    """Gives every node a name, in place, since nodes are chosen by name."""
    taken = {node.name for node in model.graph.node}
    for index, node in enumerate(model.graph.node):
        if not node.name:
            name = f"{node.op_type}_{index}"
            node.name = name if name not in taken else f"unnamed_{index}"
    return model


def sorted_nodes(model: onnx.ModelProto) -> onnx.ModelProto:
    """The same model with producers before consumers, in place; the quantiser appends nodes at the end.

    Raises InputError for a graph that has no such order.
    """
    available = {""}  # the name of an input that is left out
    available |= constants_of(model.graph).keys()
    available |= {tensor.name for tensor in model.graph.input}
    waiting, ordered = list(model.graph.node), []
    while waiting:
        later = []
        for node in waiting:
            if available.issuperset(node.input):
                ordered.append(node)
                available.update(node.output)
            else:
                later.append(node)
        if len(later) == len(waiting):
            raise InputError(f"the graph has a cycle or an input nobody makes, at node {later[0].name!r}")
        waiting = later

    del model.graph.node[:]
    model.graph.node.extend(ordered)
    return model
