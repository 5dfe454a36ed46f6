"""Conformance: every runtime runs the same file to the same outputs and fails with the same clear errors."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import helper

from compressor.device import runtimes, tensorrt
from compressor.device.feeds import cut
from compressor.device.openers import LoadedModel, OpenOptions, Port
from compressor.device.runtimes import (
    FILES,
    REFERENCE,
    RUNTIMES,
    Runtime,
    available,
    canonical_name,
    kind_of,
    layer_timers,
    open_model,
    row_of,
    runtime_names,
    takers,
    version_of,
)
from compressor.errors import EngineError, InputError, MissingPackageError, ModelError

from .conftest import CLASSES, SIZE, pair_outputs, small_model, small_outputs

# fp32 sums of 27 to 256 terms in another order than the float64 oracle's.
FP32_ABS = 1e-5


@pytest.fixture(params=runtime_names("onnx"))
def runtime(request: pytest.FixtureRequest) -> str:
    name = str(request.param)
    if available()[name]:
        pytest.skip(f"{name}: {available()[name]}")
    return name


def test_outputs_are_the_oracles_at_every_batch_size(
    runtime: str, model_file: Path, images: NDArray[np.float32]
) -> None:
    session = open_model(model_file, runtime=runtime, threads=1)
    expected = small_outputs(small_model(), images)
    for batch in (1, 3, len(images)):
        np.testing.assert_allclose(session.run(images[:batch]), expected[:batch], atol=FP32_ABS)


def test_a_session_says_what_it_is(runtime: str, model_file: Path) -> None:
    session = open_model(model_file, runtime=runtime, threads=1)
    assert session.shape == (-1, 3, SIZE, SIZE)
    assert session.inputs == (Port("input", (-1, 3, SIZE, SIZE), "float32"),)
    assert session.outputs == (Port("output", (-1, CLASSES), "float32"),)
    assert session.version == version_of(runtime) != ""
    assert (session.runtime, session.threads) == (runtime, 1)


def test_several_inputs_and_outputs_of_any_type_go_by_the_files_order(
    runtime: str, pair_file: Path, pair_inputs: tuple[NDArray[Any], ...]
) -> None:
    session = open_model(pair_file, runtime=runtime, threads=1)
    assert session.inputs == (
        Port("image", (-1, 3, 4, 4), "float32"),
        Port("tokens", (-1, 2), "int64"),
        Port("mask", (-1,), "bool"),
    )
    assert session.outputs == (
        Port("scores", (-1, 3), "float32"),
        Port("best", (-1,), "int64"),
        Port("maps.0", (-1, 3, 4, 4), "float32"),
    )
    for size in (5, 2):
        answers = session.run(cut(pair_inputs, 0, size))
        assert isinstance(answers, tuple)
        for answer, expected in zip(answers, cut(pair_outputs(pair_inputs), 0, size), strict=True):
            assert answer.dtype == expected.dtype
            np.testing.assert_allclose(answer, expected, atol=FP32_ABS)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda image, tokens, mask: (image, tokens), r"takes 3 arrays \(image, tokens, mask\), 2 were given"),
        (lambda image, tokens, mask: (image, tokens[:, :1], mask), r"'tokens' has shape \[5, 1\], .*takes \[N, 2\]"),
        (lambda image, tokens, mask: (image, tokens, mask[:, None]), r"'mask' has shape \[5, 1\], .*takes \[N\]"),
        (lambda image, tokens, mask: (image, tokens.astype(np.int32), mask), "'tokens' is int32, .*takes int64"),
        (lambda image, tokens, mask: (image, tokens, mask[:4]), "equally many samples of each input, 5, 5, 4 were"),
    ],
)
def test_of_several_inputs_the_one_that_does_not_fit_is_named(
    runtime: str, pair_file: Path, pair_inputs: tuple[NDArray[Any], ...], change: Callable[..., Any], words: str
) -> None:
    with pytest.raises(ModelError, match=words):
        open_model(pair_file, runtime=runtime).run(change(*pair_inputs))


def test_half_floats_are_given_as_float32(runtime: str, tmp_path: Path) -> None:
    ports = [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT16, ["batch", 2]) for name in ("input", "y")]
    graph = helper.make_graph([helper.make_node("Relu", ["input"], ["y"])], "half", ports[:1], ports[1:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    (tmp_path / "half.onnx").write_bytes(model.SerializeToString())
    session = open_model(tmp_path / "half.onnx", runtime=runtime)
    assert [port.dtype for port in (*session.inputs, *session.outputs)] == ["float16", "float16"]
    answer = session.run(np.array([[1.5, -1]], np.float32))
    np.testing.assert_array_equal(answer, np.array([[1.5, 0]], np.float16))


def test_outputs_are_the_callers_own(runtime: str, model_file: Path, images: NDArray[np.float32]) -> None:
    session = open_model(model_file, runtime=runtime)
    first = session.run(images[:1])
    before = first.copy()
    session.run(images[1:2])
    np.testing.assert_array_equal(first, before)


@pytest.mark.parametrize("shape", [(1, 3, SIZE, SIZE + 1), (1, 4, SIZE, SIZE), (3, SIZE, SIZE)])
def test_a_wrong_shape_names_both_shapes(runtime: str, model_file: Path, shape: tuple[int, ...]) -> None:
    session = open_model(model_file, runtime=runtime)
    with pytest.raises(ModelError, match=rf"shape \[{shape[0]}, .*takes \[N, 3, {SIZE}, {SIZE}\]"):
        session.run(np.zeros(shape, np.float32))


def test_a_wrong_type_is_refused(runtime: str, model_file: Path, images: NDArray[np.float32]) -> None:
    with pytest.raises(ModelError, match=r"float64.*takes float32"):
        open_model(model_file, runtime=runtime).run(images.astype(np.float64))  # type: ignore[arg-type]


def test_a_missing_file_is_named(runtime: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no model file at .*gone\.onnx"):
        open_model(tmp_path / "gone.onnx", runtime=runtime)


@pytest.mark.parametrize("damage", ["garbage", "truncated", "empty"])
def test_a_corrupt_file_is_one_clear_line(runtime: str, model_file: Path, tmp_path: Path, damage: str) -> None:
    whole = model_file.read_bytes()
    path = tmp_path / "bad.onnx"
    path.write_bytes({"garbage": b"hello" * 99, "truncated": whole[: len(whole) // 2], "empty": b""}[damage])
    with pytest.raises(ModelError, match=r"bad\.onnx") as caught:
        open_model(path, runtime=runtime)
    assert "\n" not in str(caught.value)


def test_an_unknown_runtime_gets_a_suggestion(model_file: Path) -> None:
    with pytest.raises(InputError, match="Did you mean 'onnxruntime'"):
        open_model(model_file, runtime="onnxruntme")


@pytest.mark.parametrize("name", ["tensorrt", "tensorrt_rtx", "onnxruntime-cuda"])
def test_a_runtime_that_is_not_here_says_why(name: str, model_file: Path) -> None:
    reason = available()[name]
    if not reason:
        pytest.skip(f"{name} runs here")
    assert reason.startswith(("no GPU: ", "not installed: pip install ", "this onnxruntime has no "))
    with pytest.raises((EngineError, MissingPackageError), match=r"can't run small\.onnx"):
        open_model(model_file, runtime=name)


def test_engines_are_told_by_their_ending() -> None:
    assert [kind_of(f"model.{e}") for e in ("plan", "engine", "onnx")] == ["engine", "engine", "onnx"]


def test_a_word_means_one_runtime() -> None:
    words = [word for row in RUNTIMES for word in (row.name, *row.synonyms)]
    assert len(words) == len(set(words))
    assert [canonical_name(word) for row in RUNTIMES for word in row.synonyms] == [
        row.name for row in RUNTIMES for _ in row.synonyms
    ]
    assert canonical_name("tpu") == "tpu"


def test_the_reference_is_there_wherever_its_library_is() -> None:
    row = row_of(REFERENCE)
    assert (row.takes, row.on_processor, row.lacks()) == ("onnx", True, "")
    assert takers("onnx")[0] == REFERENCE in layer_timers()


def test_the_processors_runtimes_are_tried_before_those_of_a_gpu() -> None:
    assert takers("onnx") == ("onnxruntime", "openvino", "onnxruntime-cuda", "onnxruntime-tensorrt")
    assert takers("engine") == tensorrt.LIBRARIES


def test_a_network_is_no_file() -> None:
    assert set(available()) == set(runtime_names(*FILES))
    for name in runtime_names("network"):
        with pytest.raises(InputError, match=rf"no runtime '{name}'; there are onnxruntime, .*tensorrt_rtx\."):
            open_model("model.onnx", runtime=name)


def test_a_library_that_is_missing_is_named_as_pip_calls_it(model_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opener = row_of(REFERENCE).open
    rows = (Runtime("plain", opener, "no_such_library"), Runtime("other", opener, "no_such_library", "its-package"))
    monkeypatch.setattr(runtimes, "RUNTIMES", rows)
    assert available() == {
        "plain": "not installed: pip install no_such_library",
        "other": "not installed: pip install its-package",
    }
    assert version_of("plain") == ""
    with pytest.raises(MissingPackageError, match=r"can't run small\.onnx in other: not installed: pip install its-"):
        open_model(model_file, runtime="other")


def test_what_an_opener_raises_is_one_line_of_ours(model_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(path: Path, options: OpenOptions) -> LoadedModel:
        raise RuntimeError("Exception from somewhere.cpp:7\nthe file is upside down\nand more")

    monkeypatch.setattr(runtimes, "RUNTIMES", (Runtime("mirror", fails, "numpy"),))
    with pytest.raises(
        ModelError, match=r"^mirror can't load .*small\.onnx: the file is upside down; the file is damaged"
    ):
        open_model(model_file, runtime="mirror")


def test_an_opener_is_given_what_was_asked_for(model_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[OpenOptions] = []

    def opens(path: Path, options: OpenOptions) -> LoadedModel:
        asked.append(options)
        port = Port("input", (-1, 3, SIZE, SIZE), "float32")
        return LoadedModel((port,), (port,), lambda arrays: arrays, {"said": "so"})

    monkeypatch.setattr(runtimes, "RUNTIMES", (Runtime("mirror", opens, "numpy"),))
    session = open_model(model_file, runtime="mirror", threads=2, fused=False)
    assert asked == [OpenOptions(threads=2, fused=False)]
    assert (session.runtime, session.version, session.path) == ("mirror", np.__version__, str(model_file))
    assert (session.threads, session.details) == (2, {"said": "so"})
