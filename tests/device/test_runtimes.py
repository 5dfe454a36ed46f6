"""Conformance: every runtime runs the same file to the same outputs and fails with the same clear errors."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from compressor.device.runtimes import RUNTIMES, available, kind_of, open_model, version_of
from compressor.errors import EngineError, InputError, MissingPackageError, ModelError

from .conftest import SIZE, small_model, small_outputs

# fp32 sums of 27 to 256 terms in another order than the float64 oracle's.
FP32_ABS = 1e-5
ONNX_RUNTIMES = [name for name in RUNTIMES if not name.startswith("tensorrt")]


@pytest.fixture(params=ONNX_RUNTIMES)
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
    assert session.version == version_of(runtime) != ""
    assert (session.runtime, session.threads) == (runtime, 1)


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
