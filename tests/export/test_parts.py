"""What is read off an ONNX file, and copies of it: the same as ONNX's own, without the weights in hand."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
from onnx import shape_inference

from compressor.export import parts
from compressor.export.parts import element_types_of, inferred_tensors, with_nodes


@pytest.fixture(params=["residual_file", "attentive_file"])
def model(request: pytest.FixtureRequest) -> onnx.ModelProto:
    path: Path = request.getfixturevalue(request.param)
    return onnx.load(path)


@pytest.mark.parametrize("with_values", [False, True])
def test_tensors_are_inferred_as_from_the_whole_file(
    model: onnx.ModelProto, with_values: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    graph = shape_inference.infer_shapes(model, data_prop=with_values).graph
    handed_over: list[int] = []

    def infer(declared: onnx.ModelProto, **options: bool) -> onnx.ModelProto:
        handed_over.extend(len(tensor.raw_data) for tensor in declared.graph.initializer)
        return original(declared, **options)

    original = shape_inference.infer_shapes
    monkeypatch.setattr(parts, "_LARGE_BYTES", 300)
    monkeypatch.setattr(shape_inference, "infer_shapes", infer)
    assert inferred_tensors(model, with_values=with_values) == [*graph.value_info, *graph.input, *graph.output]
    assert max(handed_over) <= 300 < max(len(tensor.raw_data) for tensor in model.graph.initializer)


def test_every_tensor_has_its_type(model: onnx.ModelProto) -> None:
    names = {name for node in model.graph.node for name in (*node.input, *node.output) if name}
    assert names <= element_types_of(model).keys()


def test_the_same_nodes_between_the_same_ends_are_the_same_model(model: onnx.ModelProto) -> None:
    before = onnx.ModelProto()
    before.CopyFrom(model)
    del before.graph.value_info[:]
    assert with_nodes(model, model.graph.node, model.graph.initializer) == before
