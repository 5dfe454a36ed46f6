"""The export carries the module over exactly, and every way of breaking it is caught by a gate."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray
from onnx import helper, numpy_helper
from torch import nn

from compressor.device.parity import LIMITS
from compressor.device.runtimes import open_model
from compressor.errors import FolderError, GateError, ModelError
from compressor.export.attention import ATTENTION, spelled_out
from compressor.export.engines import build_engine, image_profile
from compressor.export.gate import check_export
from compressor.export.onnx import DIALECT, export_onnx, weight_elements, write_model
from compressor.graph import trace

# fp32 in another order; both networks' logits are around 1.
FP32_ABS = 1e-5


def loaded(path: Path) -> onnx.ModelProto:
    return onnx.load(path)


@pytest.mark.parametrize("name", ["residual", "attentive"])
def test_parity_at_several_batch_sizes(name: str, images: NDArray[np.float32], request: pytest.FixtureRequest) -> None:
    path, model = request.getfixturevalue(f"{name}_file"), request.getfixturevalue(name)
    found = check_export(path, model, images, batches=(1, 2, 3))
    assert set(found) == {1, 2, 3}
    assert all(p.max_abs < FP32_ABS and p.n == 6 for p in found.values())


def test_norms_are_folded_and_constants_gone(residual_file: Path) -> None:
    operations = [node.op_type for node in loaded(residual_file).graph.node]
    assert operations.count("Conv") == 4
    assert not {"BatchNormalization", "Constant", "Identity", "Dropout", "Shape", "CastLike"} & set(operations)


def test_the_dialect_is_pinned_and_the_file_says_what_it_is(residual_file: Path) -> None:
    content = loaded(residual_file)
    assert content.ir_version == DIALECT.ir_version
    assert [o.version for o in content.opset_import if o.domain == ""] == [DIALECT.opset]
    assert {p.key: p.value for p in content.metadata_props}["labels"] == "a,b"
    assert [v.name for v in (*content.graph.input, *content.graph.output)] == ["input", "output"]
    assert [v.type.tensor_type.shape.dim[0].dim_param for v in content.graph.input] == ["batch"]


def test_no_path_of_this_machine_is_inside(residual_file: Path) -> None:
    assert str(Path(__file__).parents[2]).encode() not in residual_file.read_bytes()
    assert b".py" not in residual_file.read_bytes()


def test_every_weight_is_counted(residual_file: Path, residual: nn.Module) -> None:
    weights = sum(p.numel() for n, p in residual.named_parameters() if n.endswith("weight") and p.ndim > 1)
    assert weight_elements(loaded(residual_file)) == weights


def test_a_traced_module_in_training_exports_silently_in_evaluation_mode(
    residual: nn.Module, images: NDArray[np.float32], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    model = copy.deepcopy(residual).train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    traced = trace(model, torch.zeros(2, 3, 16, 16))
    path = export_onnx(traced, torch.zeros(2, 3, 16, 16), tmp_path / "m.onnx")
    assert capfd.readouterr() == ("", "")
    check_export(path, model, images)
    check_export(path, traced, images)
    assert all(m.training for m in model.modules())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


class Branching(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x if float(x.sum()) > 0 else -x


def test_a_model_that_cannot_be_exported_is_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="the ONNX exporter refuses the model") as caught:
        export_onnx(Branching(), torch.zeros(2, 3, 16, 16), tmp_path / "m.onnx")
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_leaves_nothing_behind(
    residual: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(FolderError, match="No space left on device"):
        export_onnx(residual, torch.zeros(2, 3, 16, 16), tmp_path / "m.onnx")
    assert list(tmp_path.iterdir()) == []


def wrong_bias(model: onnx.ModelProto) -> None:
    bias = next(i for i in model.graph.initializer if list(i.dims) == [5])
    bias.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(bias) + np.float32(0.05), bias.name))


def dropped_layer(model: onnx.ModelProto) -> None:
    node = next(n for n in model.graph.node if n.op_type == "Relu")
    for user in model.graph.node:
        user.input[:] = [node.input[0] if name == node.output[0] else name for name in user.input]
    model.graph.node.remove(node)


def training_norm(model: onnx.ModelProto) -> None:
    conv = next(n for n in model.graph.node if n.op_type == "Conv")
    index = list(model.graph.node).index(conv)
    result, conv.output[0] = conv.output[0], "before_norm"
    channels = 8
    for name, value in (("g", 1.0), ("b", 0.0), ("m", 0.0), ("v", 1.0)):
        model.graph.initializer.append(numpy_helper.from_array(np.full(channels, value, np.float32), name))
    outputs = [result, "new_mean", "new_var"]
    norm = helper.make_node("BatchNormalization", ["before_norm", *"gbmv"], outputs, "norm", training_mode=1)
    model.graph.node.insert(index + 1, norm)


def fixed_batch(model: onnx.ModelProto) -> None:
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.shape.dim[0].dim_value = 1


def hidden_fixed_batch(model: onnx.ModelProto) -> None:
    """The batch is free by name only: a reshape inside lays all images into one."""
    last = next(n for n in model.graph.node if n.output[0] == "output")
    last.output[0] = "before"
    model.graph.initializer.append(numpy_helper.from_array(np.array([1, 5]), "one"))
    model.graph.node.append(helper.make_node("Reshape", ["before", "one"], ["output"], "squash"))


def not_a_number(model: onnx.ModelProto) -> None:
    first = model.graph.initializer[0]
    values = numpy_helper.to_array(first).copy()
    values.flat[0] = np.nan
    first.CopyFrom(numpy_helper.from_array(values, first.name))


@pytest.mark.parametrize(
    ("breakage", "words"),
    [
        (wrong_bias, "differs from the model at batch 1"),
        (dropped_layer, "differs from the model at batch 1"),
        (training_norm, "training mode"),
        (fixed_batch, "fixed batch 1"),
        (hidden_fixed_batch, "does not run at batch 3"),
        (not_a_number, "not finite"),
    ],
)
def test_a_broken_export_fails_its_gate(
    residual_file: Path,
    residual: nn.Module,
    images: NDArray[np.float32],
    tmp_path: Path,
    breakage: Callable[[onnx.ModelProto], None],
    words: str,
) -> None:
    check_export(residual_file, residual, images)  # whole, it passes
    content = loaded(residual_file)
    breakage(content)
    path = tmp_path / "broken.onnx"
    path.write_bytes(content.SerializeToString())
    with pytest.raises(GateError, match=words):
        check_export(path, residual, images, limits=LIMITS["fp32"])


@pytest.mark.parametrize("breakage", [training_norm, fixed_batch, not_a_number])
def test_what_is_broken_by_structure_is_not_even_written(
    residual_file: Path, tmp_path: Path, breakage: Callable[[onnx.ModelProto], None]
) -> None:
    content = loaded(residual_file)
    breakage(content)
    with pytest.raises(GateError):
        write_model(content, tmp_path / "m.onnx")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("nodes", "words"),
    [
        ([("MatMul", ["x", "weight"], "y")], "Incompatible dimensions"),
        ([("Relu", ["z"], "y"), ("MatMul", ["x", "weight"], "z")], "topologically sorted"),
        ([("Nonsense", ["x"], "y")], "No Op registered for Nonsense"),
    ],
    ids=["shapes", "order", "operation"],
)
def test_what_is_no_valid_onnx_is_not_written(
    nodes: Sequence[tuple[str, list[str], str]], words: str, tmp_path: Path
) -> None:
    x, y = (helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["batch", 3]) for name in "xy")
    weight = numpy_helper.from_array(np.zeros((5, 4), np.float32), "weight")
    graph = helper.make_graph([helper.make_node(kind, read, [made]) for kind, read, made in nodes], "g", [x], [y])
    graph.initializer.append(weight)
    path = tmp_path / "m.onnx"
    path.write_bytes(b"before")
    with pytest.raises(ModelError, match=words):
        write_model(helper.make_model(graph, opset_imports=[helper.make_opsetid("", DIALECT.opset)]), path)
    assert [(entry.name, entry.read_bytes()) for entry in tmp_path.iterdir()] == [("m.onnx", b"before")]


def test_lost_weights_are_noticed(residual: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from compressor.export import onnx as module

    honest = module._slimmed

    def lossy(folded: Path, folded_by: str) -> tuple[onnx.ModelProto, str]:
        model, name = honest(folded, folded_by)
        head = next(i for i in model.graph.initializer if list(i.dims) == [5, 12])
        head.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(head)[:, :10].copy(), head.name))
        return model, name

    monkeypatch.setattr(module, "_slimmed", lossy)
    with pytest.raises(GateError, match="weights of convolutions"):
        export_onnx(residual, torch.zeros(2, 3, 16, 16), tmp_path / "m.onnx")


def test_a_model_that_can_not_be_folded_is_written_as_it_is(
    residual: nn.Module, images: NDArray[np.float32], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(model: onnx.ModelProto) -> onnx.ModelProto:
        raise RuntimeError("a pass failed") from AttributeError("no such attribute")

    monkeypatch.setattr("onnxscript.optimizer.optimize", refuse)
    path = export_onnx(residual, torch.zeros(2, 3, 16, 16), tmp_path / "m.onnx")
    said = {entry.key: entry.value for entry in onnx.load(path).metadata_props}
    assert said["compressor.optimiser"] == "nothing (onnxscript: no such attribute)+onnxslim"
    assert all(p.max_abs < FP32_ABS for p in check_export(path, residual, images, batches=(1, 3)).values())


def test_no_optimiser_keeps_a_model_that_is_written(residual: nn.Module, tmp_path: Path) -> None:
    """Their rules remember what they matched last; of a large model that was three times its weights, until the end."""
    export_onnx(residual, torch.zeros(2, 3, 16, 16), tmp_path / "m.onnx")
    gc.collect()

    graphs = [thing for thing in gc.get_objects() if type(thing).__name__ == "Graph"]
    ir_graphs = [graph for graph in graphs if hasattr(graph, "initializers") and len(graph.initializers) > 1]
    surgeon_graphs = [graph for graph in graphs if "onnxslim" in str(type(graph).__module__)]
    assert (ir_graphs, surgeon_graphs) == ([], [])


def test_garbage_is_no_export(residual: nn.Module, images: NDArray[np.float32], tmp_path: Path) -> None:
    (tmp_path / "bad.onnx").write_bytes(b"hello")
    with pytest.raises(GateError, match=r"bad\.onnx"):
        check_export(tmp_path / "bad.onnx", residual, images)


class WindowedAttention(nn.Module):
    """Attention over [N, windows, heads, tokens, features], as networks with windows write it."""

    def __init__(self, *, masked: bool) -> None:
        super().__init__()
        self.qkv = nn.Linear(6, 18)
        self.register_buffer("mask", torch.randn(2, 5, 5) if masked else None)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.flatten(2).transpose(1, 2).reshape(-1, 4, 5, 6)
        q, k, v = self.qkv(x).reshape(-1, 4, 5, 3, 2, 3).permute(3, 0, 1, 4, 2, 5).unbind(0)
        return nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=self.mask).mean((1, 2, 3))


@pytest.mark.parametrize("masked", [False, True])
def test_attention_over_five_axes_is_exported(masked: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    images = torch.randn(6, 6, 4, 5)
    graph = trace(WindowedAttention(masked=masked).eval(), images[:2])
    before = str(graph.graph)
    path = export_onnx(graph, images[:2], tmp_path / "m.onnx")
    assert all(p.max_abs < FP32_ABS for p in check_export(path, graph, images.numpy(), batches=(1, 3)).values())
    assert str(graph.graph) == before


def test_attention_is_spelled_out_beside_the_graph_and_without_a_copy_of_its_weights() -> None:
    graph = trace(WindowedAttention(masked=False).eval(), torch.randn(2, 6, 4, 5))
    spelled = spelled_out(graph)
    assert spelled is not graph
    kept = {id(p) for p in graph.parameters()}
    assert {id(p) for p in spelled.parameters()} <= kept
    assert ATTENTION in {n.target for n in graph.graph.nodes} - {n.target for n in spelled.graph.nodes}


class StandardisedWeights(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 3, 3, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = (self.weight - self.weight.mean((1, 2, 3), keepdim=True)) / self.weight.std((1, 2, 3), keepdim=True)
        return nn.functional.conv2d(x, weight).mean((2, 3))


def test_a_computed_weight_is_counted_before_and_after_folding(tmp_path: Path) -> None:
    images = torch.randn(2, 3, 6, 6)
    path = export_onnx(trace(StandardisedWeights(), images), images, tmp_path / "m.onnx")
    assert weight_elements(onnx.load(path)) == 8 * 3 * 3 * 3


class _Stateful(nn.Module):
    """A layer that reads the zeros a state begins with: the optimiser folds it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.state = nn.Conv2d(3, 8, 3), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.conv(x)
        return y.mean((2, 3)) + self.state(y.new_zeros(y.shape[:2]))  # type: ignore[no-any-return]


def test_a_layer_that_reads_no_image_is_not_counted(tmp_path: Path) -> None:
    images = torch.randn(2, 3, 6, 6)
    model = _Stateful().eval()
    path = export_onnx(trace(model, images), images, tmp_path / "m.onnx")
    assert weight_elements(onnx.load(path)) == 8 * 3 * 3 * 3


class _Einsum(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 8), nn.Linear(6, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k = self.a(x.flatten(2)), self.b(x.flatten(2))
        return torch.einsum("B I D, B J D -> B I J", q, k).flatten(1)


def test_einsum_is_spelled_as_every_parser_reads_it(tmp_path: Path) -> None:
    x = torch.randn(2, 3, 2, 3)
    model = trace(_Einsum().eval(), x.repeat(2, 1, 1, 1))
    path = export_onnx(model, x, tmp_path / "m.onnx")
    spelled = [a.s.decode() for n in onnx.load(path).graph.node for a in n.attribute if n.op_type == "Einsum"]
    assert spelled == ["abc,adc->abd"]
    found = open_model(path).run(x.numpy())
    assert np.allclose(found, model(x).detach().numpy(), atol=1e-5)
    build_engine(path, tmp_path / "m.engine", target="rtx", profiles=image_profile(x.shape[1:], batches=(1, 1, 4)))
