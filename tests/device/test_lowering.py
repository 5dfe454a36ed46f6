"""The build log's layer list: read right where it has the known form, unavailable where it has not."""

from __future__ import annotations

from compressor.device.lowering import read_lowering


def tensor(name: str, dims: str, kind: str = "Half") -> str:
    layout = f"Strides: [1], StrideOrder: [0], Datatype: {kind}, Format: (Linear) x"
    return f"{{ Name: {name}, Dimensions: [{dims}], {layout} }}"


def layer(name: str, kind: str, inputs: str, outputs: str, constants: str = "") -> str:
    return (
        f"Name: {name}, LayerType: {kind}, Inputs: [ {inputs}], Constants: [ {constants}], Outputs: [ {outputs}], "
        "TacticName: t, StreamId: 0, Metadata: [ONNX Layer: n]"
    )


def log(*layers: str) -> list[str]:
    footer = "\n\nI/O Tensors:\n Name: image, IOMode: Input, DataType: Float, Dimensions: [-1,3,8,8]"
    return [
        "Layers:\n" + "\n".join(layers) + footer,
        "Total Activation Memory: 1234 bytes",
        "Total Weights Memory: 99 bytes",
    ]


SHAPES = layer("s", "shape_call", "", "")
CAST = layer("__myl_CastReplConc_0", "kgen", tensor("image", "-1,3,8,8", "Float"), tensor("a", "-1,4,8,8"))
CONV = layer("conv", "correlation", tensor("a", "-1,4,8,8"), tensor("b", "-1,63,8,8"), tensor("w", "63,4,3,3"))
PAD = layer("__myl_ReplConc_3", "kgen", tensor("b", "-1,63,8,8"), tensor("c", "-1,64,8,8"))


def test_kernels_types_and_memory() -> None:
    found = read_lowering(log(SHAPES, CAST, CONV))
    assert found.available
    assert found.kernels == 2  # shapes are computed on the CPU
    assert found.kinds == {"kgen": 1, "correlation": 1}
    assert found.types == {"Float->Half": 1, "Half->Half": 1}
    assert (found.activation_bytes, found.weights_bytes) == (1234, 99)


def test_arithmetic_on_one_whole_number_is_no_kernel() -> None:
    rows = layer("__mye33481_myl0_6", "reshape", "", tensor("rows", "1", "Int64"))
    cast = layer("cast_hvar_7", "cast", tensor("rows", "1", "Int64"), tensor("hvar", "1", "Int64"))
    table = layer("gather", "gather", tensor("at", "7", "Int64"), tensor("where", "7", "Int64"))
    assert read_lowering(log(CONV, rows, cast, table)).kinds == {"correlation": 1, "gather": 1}


def test_widening_to_the_next_multiple_is_padding_but_not_of_the_image() -> None:
    assert read_lowering(log(CAST, CONV)).padded == ()
    assert read_lowering(log(CAST, CONV, PAD)).padded == ("__myl_ReplConc_3: 63->64",)


def test_packing_several_times_over_and_other_concatenations_are_not_padding() -> None:
    packed = layer("__myl_CastReplConc_1", "kgen", tensor("b", "-1,32,8,8"), tensor("c", "-1,128,8,8", "Int8"))
    token = layer("__myl_Conc_1", "kgen", tensor("b", "-1,196,64"), tensor("c", "-1,197,64"))
    assert read_lowering(log(CONV, packed, token)).padded == ()


def test_an_unknown_form_is_unavailable_with_its_reason() -> None:
    for messages, words in (
        ([], "0 layer lists"),
        (log("Layer 1: conv"), "unknown form"),
        (log(CONV) + log(CONV), "2 layer lists"),
        (log(SHAPES), "empty"),
    ):
        found = read_lowering(messages)
        assert not found.available
        assert words in found.reason
        assert found.kernels == 0
