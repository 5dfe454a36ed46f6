"""Golden outputs: what a model answers is held against them whole, however many images it takes at once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from compressor.device.bundle import read_bundle
from compressor.device.golden import Golden, distance, read_golden
from compressor.device.openers import Port
from compressor.device.parity import compare
from compressor.device.runtimes import Session, open_model
from compressor.errors import GateError

from .tampering import INPUT, OUTPUT, aged, archive, replace_file

FP32_ABS = 1e-5  # fp32 means of 16 values in another order

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
        ({"inputs": FIT[:0], "outputs": ANSWERS[:0]}, "of 1 to 1024 samples"),
        ({"inputs": FIT, "outputs": ANSWERS[:1]}, r"expected floats \[2, classes\]"),
        ({"inputs": FIT, "outputs": ANSWERS[:, 0]}, r"expected floats \[2, classes\]"),
        ({"inputs": FIT, "outputs": ANSWERS.astype(np.int64)}, "holds outputs int64"),
        ({"inputs": FIT, "outputs": ANSWERS + np.nan}, "holds outputs that are not finite"),
        ({"inputs": FIT - np.inf, "outputs": ANSWERS}, "holds inputs that are not finite"),
        ({"inputs": FIT + np.float32(1e31), "outputs": ANSWERS}, r"beyond 1e\+30"),
    ],
)
def test_arrays_that_do_not_fit_an_older_bundles_model_are_refused(
    bundle: Path, arrays: dict[str, NDArray[Any]], words: str
) -> None:
    aged(bundle)
    replace_file(bundle, "golden.npz", archive(**arrays))
    with pytest.raises(GateError, match=f"^golden.npz .*{words}.*get the bundle again"):
        read_golden(bundle, read_bundle(bundle))


PAIR: dict[str, NDArray[Any]] = {
    "input.image": np.zeros((5, 3, 4, 4), np.float32),
    "input.tokens": np.zeros((5, 2), np.int64),
    "input.mask": np.ones(5, bool),
    "output.scores": np.zeros((5, 3), np.float32),
    "output.best": np.zeros(5, np.int64),
    "output.maps.0": np.zeros((5, 3, 4, 4), np.float32),
}


@pytest.mark.parametrize(
    ("name", "array", "words"),
    [
        ("input.tokens", None, "holds no input.tokens"),
        ("output.best", None, "holds no output.best"),
        ("input.tokens", np.zeros((5, 3), np.int64), r"holds input.tokens int64 \[5, 3\], expected int64 \[N, 2\]"),
        ("input.tokens", np.zeros((5, 2), np.int32), "holds input.tokens int32"),
        ("input.mask", np.ones(4, bool), r"holds input.mask bool \[4\], .*equally many"),
        ("input.mask", np.ones(5, np.uint8), "expected bool"),
        ("input.image", np.full((5, 3, 4, 4), np.nan, np.float32), "holds input.image that are not finite"),
        ("output.maps.0", np.full((5, 3, 4, 4), np.inf, np.float32), "holds output.maps.0 that are not finite"),
        ("output.best", np.zeros(5, np.float32), "expected int64"),
        ("output.scores", np.float32(1), r"holds output.scores float32 \[\]"),
        ("output.scores", np.zeros((4, 3), np.float32), "equally many"),
    ],
)
def test_each_of_several_arrays_is_held_to_what_is_declared(
    pair_bundle: Path, name: str, array: NDArray[Any] | None, words: str
) -> None:
    arrays = {**PAIR, name: array}
    replace_file(
        pair_bundle, "golden.npz", archive(**{key: value for key, value in arrays.items() if value is not None})
    )
    with pytest.raises(GateError, match=f"^golden.npz .*{words}.*get the bundle again"):
        read_golden(pair_bundle, read_bundle(pair_bundle))


def test_several_inputs_and_outputs_come_back_in_their_order(
    pair_bundle: Path, pair_inputs: tuple[NDArray[Any], ...]
) -> None:
    golden = read_golden(pair_bundle, read_bundle(pair_bundle))
    assert isinstance(golden.inputs, tuple)
    for array, expected in zip(golden.inputs, pair_inputs, strict=True):
        np.testing.assert_array_equal(array, expected)
    assert golden.output_names == ("scores", "best", "maps.0")


@pytest.mark.parametrize("at_once", [1, 2, 5])
def test_the_distance_of_several_outputs_is_the_worst_of_them(pair_bundle: Path, pair_file: Path, at_once: int) -> None:
    golden = read_golden(pair_bundle, read_bundle(pair_bundle))
    session = open_model(pair_file, threads=1)
    assert distance(session, golden, at_once).max_abs < FP32_ABS
    assert isinstance(golden.outputs, tuple)
    scores, best, maps = golden.outputs
    wrong = replace(golden, outputs=(scores, np.where(np.arange(5) < 4, best, 9), maps))
    found = distance(session, wrong, at_once)
    assert (found.max_abs, found.reference_max_abs, found.top1_agreement) == (0.2, 1.0, 0.8)
    with pytest.raises(GateError, match=r"output 2 \(maps.0\): the outputs have shape"):
        distance(session, replace(golden, outputs=(scores, best, maps[:, :1])), at_once)
    with pytest.raises(GateError, match="there are 3 outputs, the reference has 2"):
        distance(session, replace(golden, outputs=(scores, best)), at_once)


def test_bytes_that_the_manifest_does_not_name_are_not_read(bundle: Path) -> None:
    (bundle / "golden.npz").write_bytes(archive(**{INPUT: FIT, OUTPUT: ANSWERS}))
    with pytest.raises(GateError, match="was changed: its sha256 differs"):
        read_golden(bundle, read_bundle(bundle))
