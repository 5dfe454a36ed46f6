"""Attention over an odd number of tokens: widened without changing an output, wherever the form is known."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

from compressor.device import tensorrt
from compressor.export.engines import build_engine, image_profile
from compressor.export.onnx import INPUT, export_onnx
from compressor.export.tokens import with_even_tokens
from compressor.graph import trace

HEADS, WIDTH = 2, 6


class Attention(nn.Module):
    """softmax(q k^T + what the form adds) v over `tokens` tokens in two windows, spelled out or by one call."""

    def __init__(self, tokens: int, form: str) -> None:
        super().__init__()
        self.tokens, self.form = tokens, form
        self.qkv, self.out = nn.Linear(4, 3 * HEADS * WIDTH), nn.Linear(HEADS * WIDTH, 5)
        self.register_buffer("bias", torch.randn(HEADS, tokens, tokens))
        self.register_buffer("mask", torch.where(torch.rand(2, 1, tokens, tokens) > 0.3, 0.0, -100.0))

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(2).transpose(1, 2).reshape(-1, self.tokens, 4)
        q, k, v = self.qkv(x).reshape(-1, self.tokens, 3, HEADS, WIDTH).permute(2, 0, 3, 1, 4).unbind(0)
        if self.form == "call":
            attended = nn.functional.scaled_dot_product_attention(q, k, v)
        elif self.form == "call, masked":
            attended = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=self.bias)
        elif self.form == "call, causal":
            attended = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        elif self.form == "call, told what to see":
            attended = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=self.mask > -1, scale=0.3)
        else:
            attended = torch.softmax(self.scores(q, k), -1) @ v
        return self.out(attended.transpose(1, 2).flatten(2)).reshape(-1, 2 * self.tokens, 5).mean(1)

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        scores = (q @ k.transpose(-2, -1)) / 2
        if self.form == "biased":
            return self.bias + scores
        if self.form == "divided":
            return scores / (1 + self.bias.abs())
        if self.form == "windows":  # Swin's shifted windows
            split = scores.reshape(-1, 2, HEADS, self.tokens, self.tokens) + self.mask
            return split.reshape(-1, HEADS, self.tokens, self.tokens)
        if self.form == "computed":
            return scores * (1 + scores.mean(-1, keepdim=True)) - q.mean((-1, -2), keepdim=True)
        return scores


FORMS = ("call", "call, masked", "call, causal", "call, told what to see", "plain", "biased", "windows")


def exported(tokens: int, form: str, folder: Path) -> tuple[Path, np.ndarray]:
    torch.manual_seed(0)
    network = Attention(tokens, form).eval()
    if form == "call, told what to see":
        network.mask = network.mask[:1, :, :, :]
    images = torch.randn(3, 4, 2, tokens)
    path = export_onnx(trace(network, images[:2]), images[:2], folder / f"{tokens}.onnx")
    return path, images.numpy()


def run(model: onnx.ModelProto, images: np.ndarray) -> np.ndarray:
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, {INPUT: images})[0])


def products(model: onnx.ModelProto, images: np.ndarray) -> list[tuple[int, ...]]:
    """The shapes of the second operands of products of two activations, as they are at run time."""
    held = {i.name for i in model.graph.initializer}
    names = [n.input[1] for n in model.graph.node if n.op_type == "MatMul" and not held & set(n.input)]
    open_model = onnx.ModelProto()
    open_model.CopyFrom(model)
    open_model.graph.output.extend(helper.make_tensor_value_info(n, TensorProto.FLOAT, None) for n in names)
    session = onnxruntime.InferenceSession(open_model.SerializeToString(), providers=["CPUExecutionProvider"])
    return [a.shape for a in session.run(names, {INPUT: images})]


@pytest.mark.thorough
@pytest.mark.parametrize("form", FORMS)
def test_every_output_stays_what_it_was(form: str, tmp_path: Path) -> None:
    path, images = exported(7, form, tmp_path)
    model = onnx.load(path)
    even = with_even_tokens(model)
    onnx.checker.check_model(even, full_check=True)
    for batch in (1, 3):
        np.testing.assert_allclose(run(even, images[:batch]), run(model, images[:batch]), atol=1e-6)
    assert [s[-2:] for s in products(model, images)] == [(WIDTH, 7), (7, WIDTH)]
    assert [s[-2:] for s in products(even, images)] == [(WIDTH, 8), (8, WIDTH)]


@pytest.mark.thorough
def test_an_even_number_and_unknown_forms_stay_as_they_are(tmp_path: Path) -> None:
    for tokens, form in ((8, "biased"), (7, "computed"), (7, "divided")):
        model = onnx.load(exported(tokens, form, tmp_path)[0])
        assert with_even_tokens(model) is model


def test_scores_that_are_read_elsewhere_stay_as_they_are(tmp_path: Path) -> None:
    model = onnx.load(exported(7, "plain", tmp_path)[0])
    softmax = next(n for n in model.graph.node if n.op_type == "Softmax")
    for name in (softmax.input[0], softmax.output[0]):
        shown = onnx.ModelProto()
        shown.CopyFrom(model)
        shown.graph.output.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, None))
        assert with_even_tokens(shown) is shown


def test_a_softmax_over_another_axis_stays_as_it_is() -> None:
    scores = helper.make_tensor_value_info("scores", TensorProto.FLOAT, [7, 7])
    out = helper.make_tensor_value_info("out", TensorProto.FLOAT, [7, 7])
    weight = numpy_helper.from_array(np.eye(7, dtype=np.float32), "weight")
    nodes = [
        helper.make_node("MatMul", ["scores", "scores"], ["product"]),
        helper.make_node("Softmax", ["product"], ["shares"], axis=0),
        helper.make_node("MatMul", ["shares", "scores"], ["mixed"]),
        helper.make_node("MatMul", ["mixed", "weight"], ["out"]),
    ]
    model = helper.make_model(helper.make_graph(nodes, "g", [scores], [out], [weight]))
    assert with_even_tokens(model) is model


@pytest.mark.skipif(bool(tensorrt.buildable("tensorrt_rtx")), reason=tensorrt.buildable("tensorrt_rtx"))
@pytest.mark.parametrize("form", [pytest.param("call", marks=pytest.mark.slow), "windows"])
def test_fp32_engines_hold_no_pad_kernels(form: str, tmp_path: Path) -> None:
    path, images = exported(49, form, tmp_path)
    profile = image_profile(images.shape[1:], batches=(1, 1, 4))
    record = build_engine(path, tmp_path / "e.plan", target="SM86", profiles=profile)
    assert record.lowering.available
    assert record.lowering.padded == ()
    assert build_engine(path, tmp_path / "e.plan", target="SM86", profiles=profile).cached
