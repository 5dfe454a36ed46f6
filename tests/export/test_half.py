"""Half precision by ONNX's own schemas: casts at the border of islands, and constants that half can hold."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from compressor.errors import InputError
from compressor.export.half import converted

Array = NDArray[Any]

# Half floats have 11 bits; three operations on values of about one.
HALF_ABS = 5e-3


def model_of(
    nodes: list[onnx.NodeProto], constants: dict[str, Array], shape: tuple[int, ...] = (4,)
) -> onnx.ModelProto:
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", *shape])],
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


@pytest.fixture
def model() -> onnx.ModelProto:
    weight = np.random.default_rng(0).standard_normal((4, 4)).astype(np.float32)
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["a"], "first"),
        helper.make_node("Relu", ["a"], ["b"], "island"),
        helper.make_node("MatMul", ["b", "w"], ["c"], "second"),
        helper.make_node("Add", ["c", "b"], ["y"], "sum"),
    ]
    return model_of(nodes, {"w": weight})


X = np.random.default_rng(1).standard_normal((3, 4)).astype(np.float32)


def run(model: onnx.ModelProto) -> Array:
    onnx.checker.check_model(model, full_check=True)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    outputs: Array = session.run(None, {"x": X})[0]
    return outputs


@pytest.mark.parametrize("islands", [(), ("island",), ("first", "sum"), ("first", "island", "second", "sum")])
def test_a_file_in_half_computes_the_same_and_speaks_float_outside(
    model: onnx.ModelProto, islands: tuple[str, ...]
) -> None:
    half = converted(model, islands)
    outputs = run(half)
    assert outputs.dtype == np.float32
    np.testing.assert_allclose(outputs, run(model), atol=HALF_ABS * np.abs(run(model)).max())
    if len(islands) == 4:
        np.testing.assert_array_equal(outputs, run(model))


def types(model: onnx.ModelProto) -> dict[str, int]:
    inferred = onnx.shape_inference.infer_shapes(model).graph
    return {value.name: value.type.tensor_type.elem_type for value in (*inferred.value_info, *inferred.output)}


def test_only_islands_are_computed_in_float(model: onnx.ModelProto) -> None:
    by_name = types(converted(model, ("island",)))
    assert by_name["a"] == by_name["c"] == TensorProto.FLOAT16
    assert by_name["b"] == by_name["y"] == TensorProto.FLOAT


def test_each_tensor_is_cast_once_each_way(model: onnx.ModelProto) -> None:
    casts = [node for node in converted(model, ("island",)).graph.node if node.op_type == "Cast"]
    assert len({(node.input[0], node.attribute[0].i) for node in casts}) == len(casts)
    assert len(casts) == 4  # x to half, a to float for the island, b to half for two readers, y to float


def test_a_weight_is_stored_in_the_types_it_is_read_in(model: onnx.ModelProto) -> None:
    stored = {one.name: one.data_type for one in converted(model, ()).graph.initializer}
    assert stored == {"w_half": TensorProto.FLOAT16}
    both = {one.name: one.data_type for one in converted(model, ("second",)).graph.initializer}
    assert both == {"w_half": TensorProto.FLOAT16, "w": TensorProto.FLOAT}


def test_the_model_that_was_given_is_not_changed(model: onnx.ModelProto) -> None:
    before = model.SerializeToString()
    converted(model, ("island",))
    assert model.SerializeToString() == before


def test_what_half_cannot_hold_becomes_its_nearest_of_the_same_sign() -> None:
    small = np.array([1e-12, -1e-12, 0.0, 1.0], np.float32)
    model = model_of([helper.make_node("Add", ["x", "c"], ["y"], "add")], {"c": small})
    (constant,) = (numpy_helper.to_array(one) for one in converted(model, ()).graph.initializer)
    assert constant[0] > 0 > constant[1]
    assert constant[2:].tolist() == [0.0, 1.0]
    masking = model_of([helper.make_node("Add", ["x", "c"], ["y"], "add")], {"c": np.float32([-1e9] * 4)})
    (mask,) = (numpy_helper.to_array(one) for one in converted(masking, ()).graph.initializer)
    assert np.isneginf(mask).all()


def test_whole_numbers_stay_whole_numbers() -> None:
    nodes = [helper.make_node("Reshape", ["x", "shape"], ["y"], "reshape")]
    half = converted(model_of(nodes, {"shape": np.array([-1, 2, 2])}, (2, 2)), ())
    assert [one.data_type for one in half.graph.initializer] == [TensorProto.INT64]
    assert run(half).shape == (3, 2, 2)


def test_a_constant_node_and_a_cast_follow() -> None:
    value = numpy_helper.from_array(np.float32([0.5]), "value")
    nodes = [
        helper.make_node("Constant", [], ["c"], "constant", value=value),
        helper.make_node("Constant", [], ["f"], "fixed", value_float=2.0),
        helper.make_node("Mul", ["x", "c"], ["a"], "scale"),
        helper.make_node("Mul", ["a", "f"], ["y"], "again"),
    ]
    model = model_of(nodes, {})
    assert types(converted(model, ()))["a"] == TensorProto.FLOAT16
    np.testing.assert_allclose(run(converted(model, ())), X, atol=HALF_ABS)


def test_control_flow_is_refused_by_name() -> None:
    branch = helper.make_graph([], "b", [], [])
    node = helper.make_node("If", ["x"], ["y"], "choice", then_branch=branch, else_branch=branch)
    with pytest.raises(InputError, match=r"node 'choice' \(If\) is control flow"):
        converted(model_of([node], {}), ())
