"""fp16 and int8 files: close to fp32, islands where they are needed, Q/DQ as TensorRT's parser wants it."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from compressor.device.parity import LIMITS, compare, failures
from compressor.device.runtimes import open_model
from compressor.errors import GateError, InputError
from compressor.export import precision
from compressor.export.calibration import METHODS, Statistics, collect, ranges
from compressor.export.mixed import best_method, sensitivity, to_mixed
from compressor.export.precision import (
    Placement,
    quantisable,
    sorted_nodes,
    to_fp16,
    to_int8,
    weighted_nodes,
    with_half_rest,
)
from compressor.export.rounding import _Layer, find_rounding, inverse_factor, rounded
from compressor.graph.windows import Window

# int8 of these small untrained networks on noise; the noise floor of 8 bits over four layers is some 30 dB.
INT8_DB = 20.0
FP16_DB = 55.0


@pytest.fixture(scope="module")
def statistics(residual_file: Path, images: NDArray[np.float32]) -> Statistics:
    return collect(residual_file, images, batch=4)


@pytest.fixture(scope="module")
def attentive_statistics(attentive_file: Path, images: NDArray[np.float32]) -> Statistics:
    return collect(attentive_file, images)


def outputs(path: Path | str, images: NDArray[np.float32]) -> NDArray[np.float32]:
    return open_model(path, threads=1).run(images)


def nodes(path: Path | str, kind: str) -> list[onnx.NodeProto]:
    return [node for node in onnx.load(path).graph.node if node.op_type == kind]


def test_statistics_are_those_of_the_activations(
    statistics: Statistics, residual_file: Path, images: NDArray[np.float32]
) -> None:
    assert statistics.images == len(images)
    assert statistics.extremes["input"] == (images.min(), images.max())
    assert statistics.histograms["input"].sum() == images.size
    result = outputs(residual_file, images)
    np.testing.assert_allclose(statistics.extremes["output"], (result.min(), result.max()), rtol=1e-5)


def test_ranges_by_method() -> None:
    # 10,000 values spread evenly over [-1, 1] and one outlier at 100.
    counts = np.histogram(np.append(np.linspace(-1, 1, 10_000), 100.0), bins=2048, range=(-1.0, 100.0))[0]
    made = Statistics({"x": (-1.0, 100.0), "flat": (2.0, 2.0)}, {"x": counts, "flat": np.zeros(2048, np.int64)}, 1)
    assert ranges(made, "minmax")["x"] == (-1.0, 100.0)
    low, high = ranges(made, "percentile", percentile=99.9)["x"]
    assert low == pytest.approx(-1.0, abs=0.06)  # one bin is 0.05 wide
    assert high == pytest.approx(1.0, abs=0.06)
    assert ranges(made, "entropy")["x"][1] < 50.0
    assert all(ranges(made, m)["flat"] == (0.0, 2.0) for m in METHODS)  # zero is inside
    with pytest.raises(InputError, match="no calibration method"):
        ranges(made, "best")  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["residual", "attentive"])
def test_fp16_is_close_and_half_as_large(
    name: str, images: NDArray[np.float32], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    path = request.getfixturevalue(f"{name}_file")
    made = to_fp16(path, tmp_path / "h.onnx", statistics=collect(path, images))
    found = compare(outputs(path, images), outputs(made.path, images))
    assert found.sqnr_db > FP16_DB
    assert made.islands == {}
    weights = [i for i in onnx.load(made.path).graph.initializer if len(i.dims) > 1]
    assert {i.data_type for i in weights} <= {TensorProto.FLOAT16, TensorProto.INT64}
    assert open_model(made.path).run(images[:1]).dtype == np.float32


def overflowing_model(path: Path) -> Path:
    """x * 1000 squared: the square of 4 * 1000 is beyond half precision, the root's result is not."""
    graph = helper.make_graph(
        [
            helper.make_node("Mul", ["input", "thousand"], ["large"], "scale"),
            helper.make_node("Mul", ["large", "large"], ["square"], "square"),
            helper.make_node("ReduceMean", ["square", "axes"], ["mean"], "mean", keepdims=0),
            helper.make_node("Sqrt", ["mean"], ["output"], "root"),
        ],
        "overflow",
        [helper.make_tensor_value_info("input", 1, ["batch", 3, 16, 16])],
        [helper.make_tensor_value_info("output", 1, ["batch", 3])],
        [
            numpy_helper.from_array(np.float32(1000.0), "thousand"),
            numpy_helper.from_array(np.array([2, 3]), "axes"),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    path.write_bytes(model.SerializeToString())
    return path


def test_what_overflows_in_half_stays_in_fp32(images: NDArray[np.float32], tmp_path: Path) -> None:
    path = overflowing_model(tmp_path / "o.onnx")
    made = to_fp16(path, tmp_path / "h.onnx", statistics=collect(path, images))
    assert {"square", "mean", "root"} <= set(made.islands)
    assert "scale" not in made.islands  # 4 * 1000 and its margin fit
    assert failures(compare(outputs(path, images), outputs(made.path, images)), LIMITS["fp16"]) == ()


def test_without_statistics_what_may_overflow_stays(attentive_file: Path, tmp_path: Path) -> None:
    made = to_fp16(attentive_file, tmp_path / "h.onnx")
    norms = [n.name for n in nodes(attentive_file, "LayerNormalization")]
    assert norms
    assert set(norms) <= set(made.islands)
    with pytest.raises(InputError, match="no node 'nowhere'"):
        to_fp16(attentive_file, tmp_path / "i.onnx", islands=["nowhere"])


@pytest.mark.parametrize("placement", ["tensorrt", "onnxruntime"])
@pytest.mark.parametrize("name", ["residual", "attentive"])
def test_int8_is_close(
    name: str, placement: Placement, images: NDArray[np.float32], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    path = request.getfixturevalue(f"{name}_file")
    made = to_int8(path, tmp_path / "q.onnx", ranges=ranges(collect(path, images)), placement=placement)
    for batch in (1, 6):
        assert compare(outputs(path, images[:batch]), outputs(made, images[:batch])).sqnr_db > INT8_DB


def test_weights_for_onnxruntime_leave_a_bit_where_the_processor_saturates(
    residual_file: Path, statistics: Statistics, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    largest = {}
    for bits in (7, 8):
        monkeypatch.setattr(precision, "weight_bits", lambda bits=bits: bits)
        for placement in ("tensorrt", "onnxruntime"):
            made = to_int8(residual_file, tmp_path / "q.onnx", ranges=ranges(statistics), placement=placement)
            weights = [numpy_helper.to_array(i) for i in onnx.load(made).graph.initializer]
            largest[placement, bits] = max(int(np.abs(w.astype(int)).max()) for w in weights if w.dtype == np.int8)
    assert largest == {("tensorrt", 7): 127, ("tensorrt", 8): 127, ("onnxruntime", 7): 64, ("onnxruntime", 8): 127}


@pytest.mark.parametrize("name", ["residual", "attentive"])
def test_weights_rounded_together_keep_the_outputs_better(
    name: str, images: NDArray[np.float32], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """Activations in float: what weights lose is told apart from what ranges do."""
    path = request.getfixturevalue(f"{name}_file")
    seen = np.random.default_rng(1).normal(size=(64, *images.shape[1:])).astype(np.float32)
    decibels = []
    for rounding in (None, find_rounding(path, seen)):
        made = to_int8(path, tmp_path / "q.onnx", ranges=ranges(collect(path, images)), rounding=rounding)
        held = {i.name: numpy_helper.to_array(i) for i in onnx.load(made).graph.initializer}
        axes = {n.input[0]: n.attribute[0].i for n in nodes(made, "DequantizeLinear") if n.attribute}
        model = onnx.load(path)
        for weight in model.graph.initializer:
            old = numpy_helper.to_array(weight)
            if f"{weight.name}_quantized" in held:
                codes, scale = held[f"{weight.name}_quantized"], held[f"{weight.name}_scale"]
                along = [-1 if axis == axes[f"{weight.name}_quantized"] else 1 for axis in range(old.ndim)]
                new = (codes * scale.reshape(along)).astype(old.dtype)
                assert np.abs(new - old).max() < 3 * scale.max()
            else:
                new = held.get(weight.name, old)
            weight.CopyFrom(numpy_helper.from_array(new, weight.name))
        onnx.save(model, tmp_path / "w.onnx")
        decibels.append(compare(outputs(path, images), outputs(tmp_path / "w.onnx", images)).sqnr_db)
    assert decibels[1] > decibels[0] + 1


@pytest.mark.parametrize("spread", [0.0, 1e-7, 1e-3])
def test_nearly_constant_inputs_are_rounded_for_too(spread: float) -> None:
    """Where the mean's square is large beside the variance float32 sums leave no covariance; dead inputs leave none."""
    normal = partial(torch.randn, generator=torch.Generator().manual_seed(0))
    node = helper.make_node("MatMul", ["x", "w"], ["y"])
    layer = _Layer(node, normal(1, 5, 12), Window(), centred=True)
    for _ in range(8):
        layer.see(1000 + spread * normal(1, 20, 12), 20)
    covariance = layer.covariance()
    assert covariance is not None
    assert float(torch.linalg.eigvalsh(covariance).min()) > -1e-9
    assert float(covariance.diagonal(dim1=1, dim2=2).mean()) == pytest.approx(spread**2, rel=0.3, abs=2e-9)
    codes = rounded(layer.weight.double() * 4, inverse_factor(covariance), 10)
    assert torch.isfinite(codes).all()
    assert (codes - layer.weight * 4).abs().max() < 3


def test_rounding_passes_over_what_is_not_positive() -> None:
    steps = torch.randn(1, 4, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 4
    codes = rounded(steps, inverse_factor(-torch.eye(6, dtype=torch.float64).unsqueeze(0)), 10)
    assert torch.equal(codes, steps.round().clamp(-10, 10))


def test_rounding_one_weight_moves_those_behind_it() -> None:
    normal = partial(torch.randn, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    inputs = normal(500, 3) @ normal(3, 12) + 0.1 * normal(500, 12)
    steps = normal(2, 5, 12) * 4
    codes = rounded(steps, inverse_factor((inputs.mT @ inputs).expand(2, 12, 12)), 10)
    errors = [float(((steps - c) @ inputs.mT).square().sum()) for c in (codes, steps.round().clamp(-10, 10))]
    assert torch.equal(codes, codes.round())
    assert codes.abs().max() <= 10
    assert errors[0] < errors[1] / 3


def test_tensorrt_gets_symmetric_per_channel_weights_and_float_biases(
    residual_file: Path, statistics: Statistics, tmp_path: Path
) -> None:
    made = to_int8(residual_file, tmp_path / "q.onnx", ranges=ranges(statistics))
    values = {i.name: numpy_helper.to_array(i) for i in onnx.load(made).graph.initializer}
    pairs = [*nodes(made, "QuantizeLinear"), *nodes(made, "DequantizeLinear")]
    assert all(not np.any(values[n.input[2]]) and values[n.input[2]].dtype == np.int8 for n in pairs)
    per_channel = [values[n.input[1]].size for n in nodes(made, "DequantizeLinear") if n.input[0] in values]
    assert sorted(per_channel) == [5, 8, 8, 12, 12]
    assert not any(v.dtype == np.int32 for v in values.values())
    assert all(values[n.input[2]].dtype == np.float32 for n in nodes(made, "Conv"))


def test_tensorrt_gets_no_pair_behind_an_activation_that_nobody_quantised_reads(
    residual_file: Path, statistics: Statistics, tmp_path: Path
) -> None:
    made = to_int8(residual_file, tmp_path / "q.onnx", ranges=ranges(statistics))
    readers: dict[str, set[str]] = {}
    for node in onnx.load(made).graph.node:
        for name in node.input:
            readers.setdefault(name, set()).add(node.op_type)
    for node in nodes(made, "DequantizeLinear"):
        assert readers[node.output[0]] <= {"Conv", "Gemm", "MatMul", "Add"}


@pytest.mark.parametrize("name", ["residual", "attentive"])
def test_the_rest_of_an_int8_file_in_half(
    name: str, images: NDArray[np.float32], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    path = request.getfixturevalue(f"{name}_file")
    found = collect(path, images)
    int8 = to_int8(path, tmp_path / "q.onnx", ranges=ranges(found))
    made = with_half_rest(int8, tmp_path / "h.onnx", statistics=found)
    assert made.islands == {}
    assert compare(fp32_of(int8, images), fp32_of(Path(made.path), images)).sqnr_db > 30  # int8 itself has about 25
    floats = {i.name for i in onnx.load(made.path).graph.initializer if i.data_type == TensorProto.FLOAT}
    assert floats == set()
    assert [n.op_type for n in onnx.load(made.path).graph.node].count("Cast") == 2  # the input and the output


def fp32_of(path: Path, images: NDArray[np.float32]) -> NDArray[np.float32]:
    return np.asarray(open_model(path, fused=False).run(images), dtype=np.float32)


@pytest.mark.parametrize("factor", [1e5, 1e8])  # the values are beyond half precision, then the scale as well
def test_what_overflows_in_half_is_quantised_in_float(factor: float, tmp_path: Path) -> None:
    """A product of large values with weights near 1e-4, whose scale is a subnormal half: neither is lost."""
    weight = np.array([[3e-4, 1.0], [-1e-4, 0.5], [2e-4, -1.0]], dtype=np.float32)
    graph = helper.make_graph(
        [
            helper.make_node("Mul", ["input", "large"], ["big"], "scale"),
            helper.make_node("MatMul", ["big", "weight"], ["product"], "product"),
            helper.make_node("Mul", ["product", "small"], ["output"], "back"),
        ],
        "large",
        [helper.make_tensor_value_info("input", 1, ["batch", 3])],
        [helper.make_tensor_value_info("output", 1, ["batch", 2])],
        [
            numpy_helper.from_array(np.float32(factor), "large"),
            numpy_helper.from_array(weight, "weight"),
            numpy_helper.from_array(np.array([1e5, 10.0], np.float32) / np.float32(factor), "small"),
        ],
    )
    path = tmp_path / "m.onnx"
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    path.write_bytes(model.SerializeToString())
    rows = np.random.default_rng(0).uniform(0.5, 1.0, (16, 3)).astype(np.float32)
    found = collect(path, rows)
    int8 = to_int8(path, tmp_path / "q.onnx", ranges=ranges(found))
    made = with_half_rest(int8, tmp_path / "h.onnx", statistics=found)
    assert {"scale", "product"} <= set(made.islands)
    reference, ours = outputs(path, rows), fp32_of(Path(made.path), rows)
    assert (np.abs(ours - reference).max(0) < 0.02 * np.abs(reference).max(0)).all()


def test_kept_nodes_stay_in_float(residual_file: Path, statistics: Statistics, tmp_path: Path) -> None:
    first = weighted_nodes(onnx.load(residual_file))[0]
    made = to_int8(residual_file, tmp_path / "q.onnx", ranges=ranges(statistics), keep=[first])
    values = {i.name for i in onnx.load(made).graph.initializer}
    kept = next(n for n in onnx.load(made).graph.node if n.name == first)
    assert kept.input[1] in values
    everything = quantisable(onnx.load(residual_file))
    with pytest.raises(InputError, match="left to quantise"):
        to_int8(residual_file, tmp_path / "r.onnx", ranges=ranges(statistics), keep=everything)


def test_attention_products_and_the_residual_stream_stay_in_float(attentive_file: Path) -> None:
    model = onnx.load(attentive_file)
    chosen = set(quantisable(model))
    operations = {n.name: n.op_type for n in model.graph.node}
    assert {operations[name] for name in chosen} <= {"Conv", "Gemm", "MatMul"}
    assert len(chosen) == len(weighted_nodes(model)) == 6  # patches, qkv, out, two of the MLP, head


def test_nodes_are_sorted_and_a_cycle_is_an_error() -> None:
    first, second = helper.make_node("Relu", ["b"], ["c"]), helper.make_node("Relu", ["a"], ["b"])
    info = helper.make_tensor_value_info
    graph = helper.make_graph([first, second], "g", [info("a", 1, [1])], [info("c", 1, [1])])
    ordered = sorted_nodes(helper.make_model(graph)).graph.node
    assert [n.output[0] for n in ordered] == ["b", "c"]
    second.input[0] = "c"
    cyclic = helper.make_graph([first, second], "g", [info("a", 1, [1])], [info("c", 1, [1])])
    with pytest.raises(InputError, match="cycle"):
        sorted_nodes(helper.make_model(cyclic))


def test_sensitivity_finds_the_layer_that_int8_hurts(
    residual_file: Path, images: NDArray[np.float32], statistics: Statistics
) -> None:
    spoilt = dict(ranges(statistics))
    head = nodes(residual_file, "Gemm")[0]
    spoilt[head.input[0]] = (-500.0, 500.0)  # steps of 4: the head's input is rounded away
    order = sensitivity(residual_file, images, ranges=spoilt)
    assert order[0][0] == head.name
    assert len(order) == 5
    assert order[0][1].sqnr_db < 10 < order[1][1].sqnr_db


def test_mixed_precision_keeps_as_few_layers_as_the_judge_accepts(
    residual_file: Path, images: NDArray[np.float32], statistics: Statistics, tmp_path: Path
) -> None:
    spoilt = dict(ranges(statistics))
    head = nodes(residual_file, "Gemm")[0]
    spoilt[head.input[0]] = (-500.0, 500.0)
    names = [head.name, *(n for n in weighted_nodes(onnx.load(residual_file)) if n != head.name)]
    reference = outputs(residual_file, images)

    def score(path: Path) -> float:
        return compare(reference, outputs(path, images)).sqnr_db

    made = to_mixed(residual_file, tmp_path / "m.onnx", ranges=spoilt, order=names, score=score, least=INT8_DB)
    assert made.kept == (head.name,)
    assert score(Path(made.path)) == pytest.approx(made.score)
    assert made.score >= INT8_DB
    with pytest.raises(GateError, match="ship fp16"):
        to_mixed(residual_file, tmp_path / "m.onnx", ranges=spoilt, order=names, score=score, least=200.0)


def test_the_best_calibration_method_is_the_judges(
    residual_file: Path, images: NDArray[np.float32], statistics: Statistics, tmp_path: Path
) -> None:
    wanted = iter([0.1, 0.7, 0.3])
    best, scores = best_method(
        residual_file, tmp_path / "q.onnx", statistics=statistics, score=lambda path: next(wanted)
    )
    assert best == METHODS[1]
    assert scores == dict(zip(METHODS, (0.1, 0.7, 0.3), strict=True))
    again = to_int8(residual_file, tmp_path / "p.onnx", ranges=ranges(statistics, best))
    np.testing.assert_array_equal(outputs(again, images), outputs(tmp_path / "q.onnx", images))
