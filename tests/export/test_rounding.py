"""Rounding with its error passed on, against the same weight by weight, and what it is for: nearer outputs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray
from onnx import helper, numpy_helper
from torch import Tensor, nn

from compressor.errors import FolderError
from compressor.export import rounding
from compressor.export.onnx import export_onnx
from compressor.export.rounding import (
    _BLOCK,
    Rounding,
    _bias_of,
    _damped_root,
    _flat,
    _Layer,
    _layer_of,
    _layers_of,
    _shift,
    _spread,
    find_rounding,
    inverse_factor,
    rounded,
)
from compressor.graph.windows import Window


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def covariance(features: int, *, groups: int = 1, seed: int = 0) -> Tensor:
    """Of features that have much in common: [groups, features, features]."""
    factor = numbers(groups, features, features + 2, seed=seed) + 2
    return factor @ factor.mT / (features + 2)


def step_by_step(steps: Tensor, matrix: Tensor, most: int) -> Tensor:
    """One output, weight by weight: each error goes to the rest by least squares on the damped covariance."""
    damped = matrix + 0.01 * matrix.diagonal().mean() * torch.eye(len(matrix)).double()
    wanted, codes = steps.clone(), torch.empty_like(steps)
    for i in range(len(steps)):
        codes[i] = wanted[i].round().clamp(-most, most)
        rest = list(range(i + 1, len(steps)))
        if rest:
            # the rest's best answer to an error at i: inverse(C_rest) C_rest,i of it
            share = torch.linalg.solve(damped[rest][:, rest], damped[rest][:, [i]])[:, 0]
            wanted[rest] += (wanted[i] - codes[i]) * share
    return codes


@pytest.mark.parametrize("features", [1, 2, 5, 12])
def test_codes_are_those_of_the_slow_derivation(features: int) -> None:
    steps, matrix = 20 * numbers(2, 3, features, seed=1), covariance(features, groups=2)
    codes = rounded(steps, inverse_factor(matrix), 127)
    for group in range(2):
        for output in range(3):
            assert torch.equal(codes[group, output], step_by_step(steps[group, output], matrix[group], 127))


def test_more_inputs_than_a_block_are_rounded_as_one() -> None:
    features = _BLOCK + 9
    steps, matrix = 5 * numbers(1, 1, features, seed=1), covariance(features)
    assert torch.equal(rounded(steps, inverse_factor(matrix), 127)[0, 0], step_by_step(steps[0, 0], matrix[0], 127))


def test_outputs_are_nearer_than_with_rounding_to_the_nearest() -> None:
    steps, matrix = 3 * numbers(1, 40, 16, seed=1), covariance(16)

    def lost(codes: Tensor) -> float:
        error = codes - steps
        return float(((error @ matrix) * error).sum())

    assert lost(rounded(steps, inverse_factor(matrix), 127)) < 0.5 * lost(steps.round())


def test_codes_keep_to_their_bits_and_whole_weights_stay() -> None:
    steps = 100 * numbers(1, 20, 8, seed=1)
    assert rounded(steps, inverse_factor(covariance(8)), 63).abs().max() == 63
    whole = numbers(1, 3, 8, seed=2).round()
    assert torch.equal(rounded(whole, inverse_factor(covariance(8)), 127), whole)


def test_inputs_that_have_nothing_in_common_are_rounded_to_the_nearest() -> None:
    steps = 20 * numbers(1, 3, 8, seed=1)
    assert torch.equal(rounded(steps, inverse_factor(torch.eye(8).double().unsqueeze(0)), 127), steps.round())


def test_a_matrix_that_is_none_passes_nothing_on() -> None:
    broken = torch.full((1, 4, 4), -100.0).double()
    broken[0].fill_diagonal_(1.0)
    root = _damped_root(broken)
    assert torch.equal(root[0], root[0].diagonal().diag())
    assert torch.isfinite(_damped_root(torch.zeros(1, 4, 4).double())).all()


def seen(value: Tensor, *, images: int = 4) -> _Layer:
    layer = _Layer(onnx.NodeProto(), torch.zeros(1, 2, value.shape[-1]), Window())
    for index in range(images):
        layer.see(value[index : index + 1], most=1000)
    return layer


@pytest.mark.parametrize("mean", [0.0, 1e6])
def test_streamed_moments_are_the_rows_own_wherever_they_lie(mean: float) -> None:
    value = (numbers(4, 9, 3) + mean).float()  # as a file's activations are
    layer, rows = seen(value), value.double().reshape(-1, 3)
    torch.testing.assert_close(layer.mean[0], rows.mean(0))
    centred = (rows - rows.mean(0)).mT @ (rows - rows.mean(0)) / len(rows)
    around_zero = layer.covariance()
    layer.centred = True
    around_mean = layer.covariance()
    assert around_mean is not None
    assert around_zero is not None
    torch.testing.assert_close(around_mean[0], centred, atol=1e-6, rtol=0)
    torch.testing.assert_close(around_zero[0], rows.mT @ rows / len(rows))


@pytest.mark.parametrize(("available", "most", "places"), [(5, 3, [0, 2, 4]), (3, 5, [0, 1, 2]), (10, 2, [0, 9])])
def test_places_are_spread_from_the_first_to_the_last(available: int, most: int, places: list[int]) -> None:
    assert _spread(available, most).tolist() == places


def tensor(name: str, array: np.ndarray) -> onnx.TensorProto:  # type: ignore[type-arg]
    return numpy_helper.from_array(array, name)


def model_of(nodes: list[onnx.NodeProto], constants: list[onnx.TensorProto]) -> onnx.ModelProto:
    return helper.make_model(helper.make_graph(nodes, "g", [], [], constants))


def test_layers_that_share_a_weight_or_a_bias_are_left_out() -> None:
    weight, bias = np.zeros((2, 3), np.float32), np.zeros(2, np.float32)
    nodes = [
        helper.make_node("Gemm", ["x", "own", "own.bias"], ["a"]),
        helper.make_node("Gemm", ["x", "shared", "b1"], ["b"]),
        helper.make_node("Gemm", ["x", "shared", "b2"], ["c"]),
        helper.make_node("Gemm", ["x", "w3", "twice"], ["d"]),
        helper.make_node("Add", ["d", "twice"], ["e"]),
        helper.make_node("MatMul", ["x", "y"], ["f"]),
    ]
    names = {"own": weight, "shared": weight, "w3": weight, "own.bias": bias, "b1": bias, "b2": bias, "twice": bias}
    model = model_of(nodes, [tensor(name, array) for name, array in names.items()])
    assert list(_layers_of(model)) == ["own"]


@pytest.mark.parametrize(("kind", "attributes", "transposed"), [("MatMul", {}, True), ("Gemm", {"transB": 1}, False)])
def test_weights_are_outputs_first_and_go_back_as_they_lay(
    kind: str, attributes: dict[str, int], transposed: bool
) -> None:
    outputs_first = np.arange(6, dtype=np.float32).reshape(2, 3)
    stored = np.ascontiguousarray(outputs_first.T) if transposed else outputs_first
    node = helper.make_node(kind, ["x", "w"], ["y"], **attributes)
    layer = _layer_of(node, {"w": tensor("w", stored)})
    assert torch.equal(layer.weight[0], torch.from_numpy(outputs_first))
    flat = _flat(layer.weight.to(torch.int8), node, tensor("w", stored.astype(np.int8)))
    np.testing.assert_array_equal(flat, stored)


def test_a_grouped_convolution_has_its_window_and_groups() -> None:
    node = helper.make_node(
        "Conv", ["x", "w"], ["y"], kernel_shape=[3, 2], strides=[2, 1], pads=[1, 0, 2, 3], dilations=[1, 2], group=2
    )
    layer = _layer_of(node, {"w": tensor("w", np.zeros((4, 3, 3, 2), np.float32))})
    assert layer.weight.shape == (2, 2, 18)
    assert layer.window == Window((3, 2), (2, 1), ((1, 2), (0, 3)), (1, 2), 2)
    plain = helper.make_node("Conv", ["x", "w"], ["y"], kernel_shape=[3, 2])
    assert _layer_of(plain, {"w": tensor("w", np.zeros((4, 3, 3, 2), np.float32))}).window == Window(
        (3, 2), (1, 1), ((0, 0), (0, 0)), (1, 1), 1
    )


def test_a_bias_takes_up_the_mean_in_its_own_form() -> None:
    node = helper.make_node("Gemm", ["x", "w", "b"], ["y"])
    in_float = {"b": tensor("b", np.array([1.0, 2.0], np.float32))}
    assert _bias_of(node, in_float) == "b"
    _shift(in_float, "b", np.array([0.25, -0.5]))
    assert numpy_helper.to_array(in_float["b"]).tolist() == [1.25, 1.5]

    in_steps = {
        "b_quantized": tensor("b_quantized", np.array([10, 20], np.int32)),
        "b_quantized_scale": tensor("b_quantized_scale", np.array([0.1, 0.5], np.float32)),
    }
    assert _bias_of(node, in_steps) == "b_quantized"
    _shift(in_steps, "b_quantized", np.array([0.26, -0.5]))
    assert numpy_helper.to_array(in_steps["b_quantized"]).tolist() == [13, 19]
    assert _bias_of(helper.make_node("Gemm", ["x", "w"], ["y"]), in_float) is None


def _file(folder: Path) -> tuple[Path, NDArray[np.float32]]:
    """Three layers of 12, 6 and 6 inputs in a row, the middle one without a bias, and images for it."""
    torch.manual_seed(0)
    layers = (nn.Linear(12, 6), nn.ReLU(), nn.Linear(6, 6, bias=False), nn.ReLU(), nn.Linear(6, 4))
    images = numbers(40, 12, seed=1).float()
    return export_onnx(nn.Sequential(*layers).eval(), images, folder / "m.onnx"), images.numpy()


def _codes_of(rounding: Rounding, most: int) -> list[Tensor]:
    codes = []
    for name, layer in rounding.layers.items():
        codes.append(rounding._codes(name, layer, layer.weight[0].abs().amax(1).numpy() / most, most))
    return codes


@pytest.mark.parametrize("named", ["_SQUARES_BYTES", "_FACTORS_BYTES"])
def test_layers_that_do_not_fit_in_memory_together_are_rounded_alike(
    named: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, images = _file(tmp_path)
    expected = find_rounding(path, images)
    monkeypatch.setattr(rounding, named, 1)
    found = find_rounding(path, images)
    assert len(found.layers) == 3
    assert {layer.centred for layer in found.layers.values()} == {True, False}
    assert all(isinstance(layer.square, float) for layer in found.layers.values())  # the sums are let go of
    for most in (63, 127):
        assert all(map(torch.equal, _codes_of(found, most), _codes_of(expected, most)))


def test_a_disk_that_is_full_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*given: object) -> None:
        raise OSError(28, "No space left on device")

    path, images = _file(tmp_path)
    monkeypatch.setattr(rounding, "_FACTORS_BYTES", 1)
    monkeypatch.setattr(np, "save", full)
    with pytest.raises(FolderError, match="No space left on device; free some space, or name another place in TMPDIR"):
        find_rounding(path, images)
