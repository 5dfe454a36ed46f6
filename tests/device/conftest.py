"""One small model as an ONNX file, made once without torch, for everything the device does with a file."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from compressor.device import fastest, runtimes, tensorrt
from compressor.device.__main__ import main
from compressor.device.bundle import Manifest, ModelFile, declared, write_bundle
from compressor.device.images import Preprocessing

SIZE, CLASSES = 16, 5
TOKENS = 7
PREPROCESSING = Preprocessing((SIZE, SIZE), (20,), "bilinear", (0.5, 0.4, 0.3), (0.2, 0.25, 0.3))


def small_model(channels: int = 8, seed: int = 0) -> onnx.ModelProto:
    """Convolution, ReLU, mean over the image, linear; free batch axis."""
    draw = np.random.default_rng(seed).standard_normal
    weights = {
        "conv.weight": draw((channels, 3, 3, 3)) / 5,
        "conv.bias": draw(channels),
        "fc.weight": draw((CLASSES, channels)),
        "fc.bias": draw(CLASSES),
    }
    nodes = [
        helper.make_node("Conv", ["input", "conv.weight", "conv.bias"], ["c"], "conv", pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["c"], ["r"], "relu"),
        helper.make_node("GlobalAveragePool", ["r"], ["p"], "pool"),
        helper.make_node("Flatten", ["p"], ["f"], "flatten"),
        helper.make_node("Gemm", ["f", "fc.weight", "fc.bias"], ["output"], "fc", transB=1),
    ]
    graph = helper.make_graph(
        nodes,
        "small",
        [helper.make_tensor_value_info("input", 1, ["batch", 3, SIZE, SIZE])],
        [helper.make_tensor_value_info("output", 1, ["batch", CLASSES])],
        [numpy_helper.from_array(value.astype(np.float32), name) for name, value in weights.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def small_outputs(model: onnx.ModelProto, images: NDArray[np.float32]) -> NDArray[np.float64]:
    """The same network by hand in float64: the oracle every runtime is held against."""
    weight, bias, fc, fc_bias = (numpy_helper.to_array(i).astype(np.float64) for i in model.graph.initializer)
    padded = np.pad(images.astype(np.float64), ((0, 0), (0, 0), (1, 1), (1, 1)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(2, 3))  # [N, C, H, W, 3, 3]
    hidden = np.einsum("nchwij,ocij->nohw", windows, weight) + bias[:, None, None]
    return np.maximum(hidden, 0).mean((2, 3)) @ fc.T + fc_bias


def pair_model() -> onnx.ModelProto:
    """Images and whole numbers in, with a mask; a row of scores, the best one's index and a map out. Free batch axis.

    Scores are the images' means by channel and the mean of the tokens' weights, where the mask says so.
    """
    weights = np.random.default_rng(2).standard_normal((TOKENS, 3)).astype(np.float32)
    nodes = [
        helper.make_node("Gather", ["weights", "tokens"], ["t"], "embed"),
        helper.make_node("ReduceMean", ["t", "one"], ["m"], "mean", keepdims=0),
        helper.make_node("GlobalAveragePool", ["image"], ["p"], "pool"),
        helper.make_node("Flatten", ["p"], ["f"], "flatten"),
        helper.make_node("Add", ["f", "m"], ["s"], "sum"),
        helper.make_node("Cast", ["mask"], ["c"], "cast", to=onnx.TensorProto.FLOAT),
        helper.make_node("Unsqueeze", ["c", "one"], ["u"], "unsqueeze"),
        helper.make_node("Mul", ["s", "u"], ["scores"], "masked"),
        helper.make_node("ArgMax", ["s"], ["best"], "argmax", axis=1, keepdims=0),
        helper.make_node("Relu", ["image"], ["maps.0"], "relu"),
    ]
    inputs = [
        helper.make_tensor_value_info("image", onnx.TensorProto.FLOAT, ["batch", 3, 4, 4]),
        helper.make_tensor_value_info("tokens", onnx.TensorProto.INT64, ["batch", 2]),
        helper.make_tensor_value_info("mask", onnx.TensorProto.BOOL, ["batch"]),
    ]
    outputs = [
        helper.make_tensor_value_info("scores", onnx.TensorProto.FLOAT, ["batch", 3]),
        helper.make_tensor_value_info("best", onnx.TensorProto.INT64, ["batch"]),
        helper.make_tensor_value_info("maps.0", onnx.TensorProto.FLOAT, ["batch", 3, 4, 4]),
    ]
    constants = [numpy_helper.from_array(weights, "weights"), numpy_helper.from_array(np.array([1]), "one")]
    graph = helper.make_graph(nodes, "pair", inputs, outputs, constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def pair_outputs(inputs: tuple[NDArray[Any], ...]) -> tuple[NDArray[Any], ...]:
    """The same network by hand."""
    image, tokens, mask = inputs
    weights = numpy_helper.to_array(pair_model().graph.initializer[0])
    scores = image.mean((2, 3)) + weights[tokens].mean(1)
    return scores * mask[:, None], scores.argmax(1), np.maximum(image, 0)


@pytest.fixture(scope="session", autouse=True)
def caches(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where what was measured is kept; runtimes are not timed but found equally fast, so that the first is taken."""
    folder = tmp_path_factory.mktemp("caches")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(fastest.CACHE, str(folder))
        patch.setattr(
            fastest, "time_files", lambda files, *_, **__: {name: SimpleNamespace(p50_ms=1) for name in files}
        )
        yield folder


@pytest.fixture(scope="session")
def pair_inputs() -> tuple[NDArray[Any], ...]:
    """Of five samples, in the model's order; the third is masked."""
    generator = np.random.default_rng(3)
    images = generator.standard_normal((5, 3, 4, 4)).astype(np.float32)
    return images, generator.integers(0, TOKENS, (5, 2)), np.arange(5) != 2


@pytest.fixture(scope="session")
def pair_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pair") / "pair.onnx"
    path.write_bytes(pair_model().SerializeToString())
    return path


@pytest.fixture(scope="session")
def images() -> NDArray[np.float32]:
    return np.random.default_rng(1).standard_normal((6, 3, SIZE, SIZE)).astype(np.float32)


@pytest.fixture(scope="session")
def model_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "small.onnx"
    path.write_bytes(small_model().SerializeToString())
    return path


@pytest.fixture
def bundle(tmp_path: Path, model_file: Path, images: NDArray[np.float32]) -> Path:
    outputs = small_outputs(small_model(), images).astype(np.float32)
    manifest = Manifest(
        name="small",
        models=(ModelFile("models/small.onnx"),),
        preprocessing=PREPROCESSING,
        labels=("ant", "bee", "cat", "dog", "eel"),
        licences=("made for a test",),
        provenance={"seed": 0},
    )
    files = {"models/small.onnx": model_file}
    return write_bundle(
        tmp_path / "small.bundle", files, manifest=manifest, golden_inputs=images, golden_outputs=outputs
    )


@pytest.fixture
def pair_bundle(tmp_path: Path, pair_file: Path, pair_inputs: tuple[NDArray[Any], ...]) -> Path:
    """Of the model of three inputs and outputs, which says what they are and no pre-processing."""
    outputs = pair_outputs(pair_inputs)
    manifest = Manifest(
        name="pair",
        models=(ModelFile("models/pair.onnx"),),
        preprocessing=None,
        inputs=declared(("image", "tokens", "mask"), pair_inputs),
        outputs=declared(("scores", "best", "maps.0"), outputs),
        task="any",
    )
    files = {"models/pair.onnx": pair_file}
    return write_bundle(
        tmp_path / "pair.bundle", files, manifest=manifest, golden_inputs=pair_inputs, golden_outputs=outputs
    )


@dataclass(frozen=True, slots=True)
class Answer:
    code: int
    out: str
    err: str


Command = Callable[..., Answer]


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Command:
    def run(*words: object) -> Answer:
        capsys.readouterr()
        code = main([str(word) for word in words])
        return Answer(code, *capsys.readouterr())

    return run


@pytest.fixture
def image(tmp_path: Path, images: NDArray[np.float32]) -> Path:
    np.save(tmp_path / "image.npy", images[:1])
    return tmp_path / "image.npy"


@pytest.fixture
def engines_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """TensorRT as if it were here: an engine is an ONNX file, run by ONNX Runtime."""
    as_onnx = replace(runtimes.row_of(runtimes.REFERENCE), name="tensorrt", takes="engine")
    rows = tuple(as_onnx if row.name == "tensorrt" else row for row in runtimes.RUNTIMES)
    monkeypatch.setattr(runtimes, "RUNTIMES", rows)
    monkeypatch.setattr(tensorrt, "unavailable", lambda library: "")
