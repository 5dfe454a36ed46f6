"""Weights beside an ONNX file: where they would come from is read off the file, and a bundle's come from the bundle."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from compressor.device import external
from compressor.device.bundle import open_bundle, verify_bundle
from compressor.device.external import external_locations, require_weights_beside
from compressor.device.runtimes import available, open_model
from compressor.errors import CompressorError, ModelError

from .conftest import Command, small_model
from .tampering import replace_file
from .test_attacks import MODEL, assert_refused, with_recipe
from .test_fuzzing import assert_held, mutated

WEIGHTS = np.arange(12, dtype=np.float32).reshape(4, 3)


def elsewhere(location: str, name: str = "w") -> TensorProto:
    """A tensor whose values lie in a file."""
    tensor = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=WEIGHTS.shape)
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in (("offset", "0"), ("location", location), ("length", str(WEIGHTS.nbytes))):
        entry = tensor.external_data.add()
        entry.key, entry.value = key, value
    return tensor


def product_model(location: str) -> onnx.ModelProto:
    """x [N, 4] times weights from a file."""
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        "product",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 3])],
        [elsewhere(location)],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def save(path: Path, model: onnx.ModelProto) -> Path:
    path.write_bytes(model.SerializeToString())
    return path


OUTSIDE = ("../weights.bin", "/etc/passwd", "a/../../weights.bin", "..\\weights.bin", "C:weights.bin")


@pytest.mark.parametrize("location", OUTSIDE)
def test_weights_from_outside_are_refused_before_a_runtime_sees_the_file(tmp_path: Path, location: str) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / "weights.bin").write_bytes(WEIGHTS.tobytes())
    path = save(tmp_path / "b" / "m.onnx", product_model(location))
    for runtime in ("onnxruntime", *(name for name in ("openvino",) if not available()[name])):
        with pytest.raises(ModelError, match=r"takes weights from .* outside its folder"):
            open_model(path, runtime=runtime)


def test_weights_beside_the_file_are_taken(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "weights.bin").write_bytes(WEIGHTS.tobytes())
    path = save(tmp_path / "m.onnx", product_model("data/weights.bin"))
    assert external_locations(path) == ("data/weights.bin",)
    outputs = open_model(path).run(np.ones((2, 4), np.float32))
    np.testing.assert_array_equal(outputs, np.ones((2, 4), np.float32) @ WEIGHTS)


@pytest.mark.usefixtures("engines_run")
def test_every_verb_refuses_such_a_bundle(bundle: Path, image: Path, command: Command) -> None:
    replace_file(with_recipe(bundle), MODEL, product_model("../../weights.bin").SerializeToString())
    for words in (("verify", bundle), ("run", bundle, image), ("build", bundle)):
        assert_refused(command(*words), "'../../weights.bin', outside")
    with pytest.raises(ModelError, match="outside its folder"):
        open_bundle(bundle)


def test_a_file_beside_it_that_the_manifest_does_not_list_is_refused(bundle: Path) -> None:
    (bundle / "models" / "weights.bin").write_bytes(WEIGHTS.tobytes())
    replace_file(bundle, MODEL, product_model("weights.bin").SerializeToString())
    failed = [check.what for check in verify_bundle(bundle).checks if check.outcome == "failed"]
    assert failed[0] == "models/weights.bin"


def test_every_place_that_can_hold_a_tensor_is_looked_at(tmp_path: Path) -> None:
    """Against the schema itself: a tensor in each field of each message that leads to one."""

    def graph(*tensors: TensorProto, **more: object) -> onnx.GraphProto:
        return helper.make_graph([], "g", [], [], list(tensors), **more)

    def node(**attributes: object) -> onnx.NodeProto:
        return helper.make_node("Any", [], [], **attributes)

    sparse = onnx.SparseTensorProto(values=elsewhere("sparse-values"), indices=elsewhere("sparse-indices"), dims=[4, 3])
    inner = helper.make_graph(
        [
            node(one=elsewhere("attribute"), several=[elsewhere("attributes")]),
            node(branch=graph(elsewhere("branch")), branches=[graph(elsewhere("branches"))]),
            node(rare=sparse, rares=[sparse]),
        ],
        "g",
        [],
        [],
        [elsewhere("initializer")],
    )
    inner.sparse_initializer.add().CopyFrom(sparse)
    model = helper.make_model(inner)
    function = model.functions.add(name="f", domain="d")
    function.node.add().CopyFrom(node(one=elsewhere("function")))
    function.attribute_proto.add().CopyFrom(helper.make_attribute("a", elsewhere("function-default")))
    training = model.training_info.add()
    training.initialization.CopyFrom(graph(elsewhere("initialization")))
    training.algorithm.CopyFrom(graph(elsewhere("algorithm")))
    assert set(external_locations(save(tmp_path / "m.onnx", model))) == {
        *("attribute", "attributes", "branch", "branches", "sparse-values", "sparse-indices", "initializer"),
        *("function", "function-default", "initialization", "algorithm"),
    }


def test_the_table_of_messages_is_the_formats_own() -> None:
    """Every field of every message of ONNX from which a tensor can be reached."""
    names = {"SparseTensorProto": "sparse tensor", "TrainingInfoProto": "training"}
    reached: dict[str, dict[int, str]] = {}

    def name_of(message: Any) -> str:
        return names.get(message.name, message.name.removesuffix("Proto").lower())

    def leads_to_a_tensor(message: Any, passed: tuple[str, ...] = ()) -> bool:
        if message.name == "TensorProto":
            return True
        inner = [field.message_type for field in message.fields if field.message_type]
        return any(leads_to_a_tensor(m, (*passed, message.name)) for m in inner if m.name not in passed)

    waiting = [onnx.ModelProto.DESCRIPTOR]
    while waiting:
        message = waiting.pop()
        if name_of(message) in reached or message.name == "TensorProto":
            continue
        inner = [field for field in message.fields if field.message_type and leads_to_a_tensor(field.message_type)]
        reached[name_of(message)] = {field.number: name_of(field.message_type) for field in inner}
        waiting += [field.message_type for field in inner]
    external_data = onnx.TensorProto.DESCRIPTOR.fields_by_name["external_data"].number
    assert {**reached, "tensor": {external_data: "entry"}} == external._MESSAGES


def test_a_model_without_any_has_none(tmp_path: Path) -> None:
    model = small_model()
    model.graph.initializer.append(numpy_helper.from_array(np.zeros(1000, np.float32), "location"))
    assert external_locations(save(tmp_path / "m.onnx", model)) == ()


@pytest.mark.parametrize("data", [b"", b"\x3a\xff\xff\xff\xff\x0f", b"\x3a\x05ab", b"\x80" * 20, b"\x3b", b"\x08"])
def test_what_is_no_onnx_is_one_line(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "m.onnx").write_bytes(data)
    with pytest.raises(ModelError, match="damaged or not for it"):
        open_model(tmp_path / "m.onnx")


def test_files_of_damaged_bytes(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    whole = product_model("../x").SerializeToString()

    def change(draw: random.Random) -> None:
        path.write_bytes(mutated(whole, draw))

    def read() -> None:
        try:
            require_weights_beside(path)
        except ValueError as error:
            raise CompressorError(str(error)) from error

    assert_held(change, read)
