"""Files of single layers: each kind run against the same layer written out, and copies that add up."""

from __future__ import annotations

import math

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from numpy.typing import NDArray
from onnx import numpy_helper
from torch.nn import functional

from compressor.export.layers import Layer, input_shape, layer_model

Array = NDArray[np.float32]

# fp32 sums of at most some hundred products of small values.
FP32_ABS = 1e-5

CONV = {"sizes": (6, 5), "kernel": (3, 3), "stride": (2, 1), "padding": (1, 1, 1, 1), "dilation": (1, 1)}
LAYERS = {
    "conv": (Layer("conv", **CONV), 4, 6),  # type: ignore[arg-type]
    "depthwise": (Layer("depthwise", **CONV), 4, 4),  # type: ignore[arg-type]
    "grouped": (Layer("grouped", groups=2, **CONV), 4, 6),  # type: ignore[arg-type]
    "transposed": (Layer("transposed", **CONV), 4, 6),  # type: ignore[arg-type]
    "linear": (Layer("linear", (5,)), 4, 6),
    "linear, images are rows": (Layer("linear", (0,)), 4, 6),
    "product": (Layer("product", (2, 3, 5)), 4, 4),
    "attention": (Layer("attention", (2, 3, 3)), 4, 4),
}


def by_hand(
    layer: Layer, x: NDArray[np.float32], weight: NDArray[np.float32], bias: NDArray[np.float32]
) -> torch.Tensor:
    """One copy of a layer with weights, by torch's own function."""
    images, w, b = torch.from_numpy(x), torch.from_numpy(weight), torch.from_numpy(bias)
    if layer.kind == "linear":
        return images @ w + b
    if layer.kind == "product":
        return images @ w
    if layer.kind == "transposed":
        outputs = functional.conv_transpose2d(images, w, b, layer.stride, layer.padding[:2])
    else:
        groups = x.shape[1] if layer.kind == "depthwise" else layer.groups
        outputs = functional.conv2d(images, w, b, layer.stride, layer.padding[:2], layer.dilation, groups)
    return outputs


def run(model: onnx.ModelProto, x: Array) -> Array:
    onnx.checker.check_model(model, full_check=True)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    outputs: Array = session.run(None, {session.get_inputs()[0].name: x})[0]
    return outputs


@pytest.mark.parametrize("copies", [1, 4])
@pytest.mark.parametrize("name", LAYERS)
def test_a_file_computes_its_copies_added_up(name: str, copies: int) -> None:
    layer, inputs, outputs = LAYERS[name]
    model = layer_model(layer, inputs, outputs, copies)
    x = np.random.default_rng(0).standard_normal((2, *input_shape(layer, inputs))).astype(np.float32)
    answer = run(model, x)

    constants = {tensor.name: numpy_helper.to_array(tensor).copy() for tensor in model.graph.initializer}
    total = torch.zeros(1)
    for i in range(copies):
        if layer.kind == "attention":
            scores = torch.from_numpy(x) @ torch.from_numpy(x).mT / (i + 2)
            total = total + scores.softmax(-1) @ torch.from_numpy(x)
        else:
            bias = constants.get(f"b{i}", np.zeros(1, np.float32))
            total = total + by_hand(layer, x, constants[f"w{i}"], bias)
    if layer.kernel:
        total = total.mean((2, 3), keepdim=True)
    np.testing.assert_allclose(answer, total.numpy(), atol=FP32_ABS)
    assert answer.shape[1:] == tuple(d.dim_value for d in model.graph.output[0].type.tensor_type.shape.dim[1:])


@pytest.mark.parametrize("name", ["conv", "linear", "product"])
def test_no_two_copies_are_alike_and_no_weight_is_zero(name: str) -> None:
    layer, inputs, outputs = LAYERS[name]
    model = layer_model(layer, inputs, outputs, 4)
    weights = [numpy_helper.to_array(one) for one in model.graph.initializer if one.name.startswith("w")]
    assert len({weight.tobytes() for weight in weights}) == 4
    assert all(np.count_nonzero(weight) == math.prod(weight.shape) for weight in weights)


def test_layers_of_one_family_share_kind_and_kernel() -> None:
    assert LAYERS["conv"][0].family == "conv 3x3"
    assert LAYERS["linear"][0].family == "linear"
    assert LAYERS["attention"][0].family != LAYERS["product"][0].family
