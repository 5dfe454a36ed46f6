"""Golden outputs: what a model answers is held against them whole, however many images it takes at once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from compressor.device.bundle import read_bundle
from compressor.device.golden import Golden, distance, read_golden
from compressor.device.openers import Port
from compressor.device.parity import compare
from compressor.device.runtimes import Session
from compressor.errors import GateError

from .tampering import archive, replace_file

INPUTS = np.random.default_rng(0).standard_normal((5, 3, 4, 4)).astype(np.float32)


def answer(images: NDArray[np.float32]) -> NDArray[np.float32]:
    return images.sum(axis=(2, 3))


def session_of(function: Callable[[NDArray[np.float32]], NDArray[Any]]) -> Session:
    images = Port("input", (-1, 3, 4, 4), "float32")
    return Session("python", "1", "model.onnx", (images,), (), 1, lambda arrays: (function(arrays[0]),))


@pytest.mark.parametrize("at_once", [1, 2, 4, 5, 100])
def test_the_distance_does_not_depend_on_how_many_go_at_once(at_once: int) -> None:
    golden = Golden(INPUTS, answer(INPUTS) + np.linspace(0, 1, 15, dtype=np.float32).reshape(5, 3))
    sizes: list[int] = []

    def watched(images: NDArray[np.float32]) -> NDArray[np.float32]:
        sizes.append(len(images))
        return answer(images)

    assert distance(session_of(watched), golden, at_once) == compare(golden.outputs, answer(INPUTS))
    assert sum(sizes) == 5
    assert max(sizes) == min(at_once, 5)


def test_a_single_number_is_no_answer() -> None:
    with pytest.raises(GateError, match="answers with a single number"):
        distance(session_of(lambda images: np.asarray(images.sum())), Golden(INPUTS, answer(INPUTS)))


def test_what_a_bundle_holds_is_what_was_written(bundle: Path, images: NDArray[np.float32]) -> None:
    golden = read_golden(bundle, read_bundle(bundle))
    np.testing.assert_array_equal(golden.inputs, images)
    assert golden.outputs.shape == (len(images), 5)


FIT = np.zeros((2, 3, 16, 16), np.float32)
ANSWERS = np.zeros((2, 5), np.float32)


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"inputs": FIT}, "holds no outputs"),
        ({}, "holds no inputs and no outputs"),
        ({"inputs": FIT.astype(np.float64), "outputs": ANSWERS}, r"holds inputs float64 \[2, 3, 16, 16\]"),
        ({"inputs": FIT[:, :1], "outputs": ANSWERS}, r"expected float32 \[N, 3, 16, 16\]"),
        ({"inputs": FIT[:0], "outputs": ANSWERS[:0]}, "of 1 to 1024 images"),
        ({"inputs": FIT, "outputs": ANSWERS[:1]}, r"expected floats \[2, classes\]"),
        ({"inputs": FIT, "outputs": ANSWERS[:, 0]}, r"expected floats \[2, classes\]"),
        ({"inputs": FIT, "outputs": ANSWERS.astype(np.int64)}, "holds outputs int64"),
        ({"inputs": FIT, "outputs": ANSWERS + np.nan}, "holds outputs that are not finite"),
        ({"inputs": FIT - np.inf, "outputs": ANSWERS}, "holds inputs that are not finite"),
        ({"inputs": FIT + np.float32(1e31), "outputs": ANSWERS}, r"beyond 1e\+30"),
    ],
)
def test_arrays_that_do_not_fit_the_model_are_refused(
    bundle: Path, arrays: dict[str, NDArray[Any]], words: str
) -> None:
    replace_file(bundle, "golden.npz", archive(**arrays))
    with pytest.raises(GateError, match=f"^golden.npz .*{words}.*get the bundle again"):
        read_golden(bundle, read_bundle(bundle))


def test_bytes_that_the_manifest_does_not_name_are_not_read(bundle: Path) -> None:
    (bundle / "golden.npz").write_bytes(archive(inputs=FIT, outputs=ANSWERS))
    with pytest.raises(GateError, match="was changed: its sha256 differs"):
        read_golden(bundle, read_bundle(bundle))
