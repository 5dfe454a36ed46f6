"""Bundles of any task: arrays in by name, every output out, said in words, as JSON and as a file; boxes where known."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from compressor.device import answers
from compressor.device.__main__ import main
from compressor.device.bundle import (
    Decode,
    Leaf,
    Manifest,
    ModelFile,
    declared,
    read_bundle,
    run_bundle,
    verify_bundle,
    write_bundle,
)
from compressor.device.summaries import summarise_answer
from compressor.errors import CompressorError, DataError, GateError, InputError

from .conftest import CLASSES, SIZE, pair_outputs
from .tampering import aged, put, resign

FP32_ABS = 1e-5  # fp32 means of 16 values in another order
NAMES = ("image", "tokens", "mask")
QUICK = ("--runs", "2", "--seconds", "0", "--rounds", "1", "--threads", "1", "--batch", "2", "--runtime", "onnxruntime")

Arrays = tuple[NDArray[Any], ...]


@pytest.fixture
def pair_npz(tmp_path: Path, pair_inputs: Arrays) -> Path:
    np.savez(tmp_path / "in.npz", note=np.zeros(3), **dict(zip(NAMES, pair_inputs, strict=True)))
    return tmp_path / "in.npz"


def test_a_bundle_of_several_inputs_passes_and_says_what_it_is(pair_bundle: Path, pair_inputs: Arrays) -> None:
    assert verify_bundle(pair_bundle).passed
    manifest = read_bundle(pair_bundle)
    assert manifest.inputs == declared(NAMES, pair_inputs)
    assert manifest.outputs == (
        Leaf("scores", (3,), "float32"),
        Leaf("best", (), "int64"),
        Leaf("maps.0", (3, 4, 4), "float32"),
    )
    assert (manifest.task, manifest.preprocessing, manifest.decode) == ("any", None, None)


def test_what_a_run_was_given_is_run_on_the_device_too(
    pair_bundle: Path, pair_inputs: Arrays, pair_npz: Path, tmp_path: Path
) -> None:
    stored = {f"input.{name}": array for name, array in zip(NAMES, pair_inputs, strict=True)}
    np.savez(tmp_path / "host.npz", targets=np.zeros(5), **stored)  # as `compress --data` takes it
    plain, as_on_host = run_bundle(pair_bundle, [pair_npz, tmp_path / "host.npz"])
    (golden,) = run_bundle(pair_bundle, [pair_bundle / "golden.npz"])
    for leaf, same, again in zip(plain, as_on_host, golden, strict=True):
        np.testing.assert_array_equal(leaf, same)
        np.testing.assert_array_equal(leaf, again)


def test_one_wrong_output_fails_the_bundle(pair_bundle: Path, tmp_path: Path, pair_inputs: Arrays) -> None:
    scores, best, maps = pair_outputs(pair_inputs)
    wrong = np.where(np.arange(5) < 4, best, 9)
    folder = write_bundle(
        tmp_path / "wrong",
        {"models/pair.onnx": pair_bundle / "models/pair.onnx"},
        manifest=read_bundle(pair_bundle),
        golden_inputs=pair_inputs,
        golden_outputs=(scores, wrong, maps),
    )
    (failed,) = [check for check in verify_bundle(folder).checks if check.outcome == "failed"]
    assert "max |difference| 0.2, at most 0.001" in failed.detail


def test_every_output_of_a_file_comes_back(pair_bundle: Path, pair_npz: Path, pair_inputs: Arrays) -> None:
    (outputs,) = run_bundle(pair_bundle, [pair_npz])
    assert isinstance(outputs, tuple)
    for output, expected in zip(outputs, pair_outputs(pair_inputs), strict=True):
        np.testing.assert_allclose(output, expected, atol=FP32_ABS)


def test_a_run_says_a_line_for_each_output(
    pair_bundle: Path, pair_npz: Path, pair_inputs: Arrays, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["run", str(pair_bundle), str(pair_npz)]) == 0
    lines = capsys.readouterr().out.splitlines()
    scores, best, maps = pair_outputs(pair_inputs)
    assert [line.partition(",")[0] for line in lines] == [
        f"{pair_npz}: scores float32 [5",
        f"{pair_npz}: best int64 [5]",
        f"{pair_npz}: maps.0 float32 [5",
    ]
    assert lines[1].endswith(f"min {best.min()}, mean {best.mean():.6g}, max {best.max()}")
    assert main(["run", str(pair_bundle), str(pair_npz), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["task"] == "any"
    first, _, last = said["results"][str(pair_npz)]
    assert (first["output"], first["dtype"], first["shape"]) == ("scores", "float32", [5, 3])
    assert first["mean"] == pytest.approx(scores.mean(), abs=FP32_ABS)
    assert (last["min"], last["max"]) == (0.0, pytest.approx(maps.max()))


def test_a_run_writes_every_output_under_its_name(
    pair_bundle: Path, pair_npz: Path, tmp_path: Path, pair_inputs: Arrays
) -> None:
    expected = dict(zip(("scores", "best", "maps.0"), pair_outputs(pair_inputs), strict=True))
    assert main(["run", str(pair_bundle), str(pair_npz), "--out", str(tmp_path / "one.npz")]) == 0
    with np.load(tmp_path / "one.npz") as written:
        assert list(written) == list(expected)
        np.testing.assert_allclose(written["maps.0"], expected["maps.0"], atol=FP32_ABS)

    other = tmp_path / "b.npz"
    other.write_bytes(pair_npz.read_bytes())
    assert main(["run", str(pair_bundle), str(pair_npz), str(other), "--out", str(tmp_path / "two.npz")]) == 0
    with np.load(tmp_path / "two.npz") as written:
        assert list(written) == [f"output_{index}.{name}" for index in range(2) for name in expected]


def test_outputs_of_any_name_are_written(pair_bundle: Path, pair_npz: Path, tmp_path: Path) -> None:
    """To `np.savez` the word "file" is the place to write to."""

    def change(content: dict[str, Any]) -> None:
        for leaf, name in zip(content["outputs"], ("file", "allow_pickle", "../maps"), strict=True):
            leaf["name"] = name

    resign(pair_bundle, change)
    flags = ("--runtime", "onnxruntime", "--out", str(tmp_path / "one.npz"))
    assert main(["run", str(pair_bundle), str(pair_npz), *flags]) == 0
    with np.load(tmp_path / "one.npz") as written:
        assert list(written) == ["file", "allow_pickle", "../maps"]


def test_a_bundle_of_several_inputs_is_timed(pair_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["benchmark", str(pair_bundle), *QUICK, "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)["timings"]
    assert (row["model"], row["n"]) == ("models/pair.onnx", 2)


INPUTS: dict[str, Callable[[dict[str, NDArray[Any]]], dict[str, NDArray[Any]]]] = {
    "holds 'image, mask'; expected arrays named 'image, tokens, mask'": lambda a: {**a, "tokens": None},  # type: ignore[dict-item]
    r"int32 of shape [5, 2], expected int64 [N, 2] for 'tokens'": lambda a: {**a, "tokens": a["tokens"].astype("i4")},
    r"of shape [4], expected bool [N] for 'mask', with": lambda a: {**a, "mask": a["mask"][:4]},
    r"of shape [5, 1], expected bool [N]": lambda a: {**a, "mask": a["mask"][:, None]},
    r"of shape [], expected float32 [N, 3, 4, 4]": lambda a: {**a, "image": np.float32(1)},  # type: ignore[dict-item]
    "at least one sample": lambda a: {name: array[:0] for name, array in a.items()},
    "holds NaN or infinity": lambda a: {**a, "image": a["image"] + np.float32(np.nan)},
}


@pytest.mark.parametrize("words", INPUTS)
def test_arrays_the_model_takes_nothing_of_are_one_line(
    pair_bundle: Path, tmp_path: Path, pair_inputs: Arrays, capsys: pytest.CaptureFixture[str], words: str
) -> None:
    arrays = INPUTS[words](dict(zip(NAMES, pair_inputs, strict=True)))
    np.savez(tmp_path / "x.npz", **{name: array for name, array in arrays.items() if array is not None})
    assert main(["run", str(pair_bundle), str(tmp_path / "x.npz")]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: {tmp_path / 'x.npz'} holds ")
    assert words in said
    assert said.count("\n") == 1


@pytest.mark.parametrize("name", ["x.npy", "x.png"])
def test_several_inputs_are_an_npz(pair_bundle: Path, tmp_path: Path, name: str) -> None:
    np.save(tmp_path / "x.npy", np.zeros((1, 3, 4, 4), np.float32))
    (tmp_path / "x.png").write_bytes(b"")
    with pytest.raises(DataError, match=rf"{name}: the model takes no images; its input is an \.npz with arrays named"):
        run_bundle(pair_bundle, [tmp_path / name])


def test_an_only_input_that_is_no_image_is_any_array(bundle: Path, tmp_path: Path, images: NDArray[np.float32]) -> None:
    expected = run_bundle(bundle, [_saved(tmp_path / "x.npy", images)])[0]
    put(bundle, "preprocessing", None)
    np.savez(tmp_path / "a.npz", whatever=images)
    np.savez(tmp_path / "b.npz", input=images, note=np.zeros(1))
    for name in ("x.npy", "a.npz", "b.npz"):
        np.testing.assert_array_equal(run_bundle(bundle, [tmp_path / name])[0], expected)
    pixels = _saved(tmp_path / "pixels.npy", np.zeros((1, SIZE, SIZE, 3), np.uint8))
    with pytest.raises(DataError, match="holds uint8"):
        run_bundle(bundle, [pixels])
    np.savez(tmp_path / "c.npz", a=images, b=images)
    with pytest.raises(DataError, match="holds 'a, b'; expected arrays named 'input'"):
        run_bundle(bundle, [tmp_path / "c.npz"])


def _saved(path: Path, array: NDArray[Any]) -> Path:
    np.save(path, array)
    return path


@pytest.mark.parametrize(
    ("where", "value", "words"),
    [
        ("outputs|2", ..., "with 3 arrays, the bundle declares 2 outputs"),
        ("outputs|1|dtype", "float32", "with int64 of shape [5], expected float32 [N] for 'best'"),
        ("outputs|0|shape", [4], "with float32 of shape [5, 3], expected float32 [N, 4] for 'scores'"),
        ("outputs|1|shape", [1], "expected int64 [N, 1] for 'best'"),
    ],
)
def test_answers_that_are_not_declared_are_an_error(
    pair_bundle: Path, pair_npz: Path, capsys: pytest.CaptureFixture[str], where: str, value: Any, words: str
) -> None:
    put(pair_bundle, where, value)
    assert main(["run", str(pair_bundle), str(pair_npz), "--runtime", "onnxruntime"]) == 4
    assert words in capsys.readouterr().err
    assert not verify_bundle(pair_bundle).passed


def test_infinity_in_one_output_is_no_answer(
    pair_bundle: Path, tmp_path: Path, pair_inputs: Arrays, capsys: pytest.CaptureFixture[str]
) -> None:
    """The mean of sixteen numbers near float32's largest overflows; the map is as it was."""
    arrays = dict(zip(NAMES, pair_inputs, strict=True))
    np.savez(tmp_path / "x.npz", **{**arrays, "image": np.full((5, 3, 4, 4), 3e38, np.float32)})
    assert main(["run", str(pair_bundle), str(tmp_path / "x.npz")]) == 4
    assert "with NaN or infinity" in capsys.readouterr().err


def test_an_older_bundle_is_read_as_before(
    bundle: Path, tmp_path: Path, images: NDArray[np.float32], capsys: pytest.CaptureFixture[str]
) -> None:
    image = _saved(tmp_path / "x.npy", images)
    said = []
    for folder in (bundle, aged(bundle)):
        assert verify_bundle(folder).passed
        assert main(["run", str(folder), str(image)]) == 0
        said.append(capsys.readouterr().out)
        assert main(["benchmark", str(folder), *QUICK]) == 0
        capsys.readouterr()
    assert said[0] == said[1]
    manifest = read_bundle(bundle)
    assert manifest.inputs == (Leaf("input", (3, SIZE, SIZE), "float32"),)
    assert (manifest.schema, manifest.outputs, manifest.task) == ("compressor.bundle/1", (), "classification")


def test_an_older_bundle_is_written_again_as_a_newer(bundle: Path, tmp_path: Path, images: NDArray[np.float32]) -> None:
    manifest = read_bundle(aged(bundle))
    files = {"models/small.onnx": bundle / "models/small.onnx"}
    outputs = np.zeros((len(images), CLASSES), np.float32)
    folder = write_bundle(tmp_path / "new", files, manifest=manifest, golden_inputs=images, golden_outputs=outputs)
    newer = read_bundle(folder)
    assert newer.schema == "compressor.bundle/2"
    assert newer.outputs == (Leaf("output", (CLASSES,), "float32"),)


def test_what_is_declared_and_what_is_written_must_go_together(
    tmp_path: Path, pair_file: Path, pair_inputs: Arrays, pair_bundle: Path
) -> None:
    files, outputs = {"models/pair.onnx": pair_file}, pair_outputs(pair_inputs)
    undeclared = Manifest("pair", (ModelFile("models/pair.onnx"),), None)
    with pytest.raises(InputError, match="3 arrays for the names input; name each"):
        write_bundle(tmp_path / "x", files, manifest=undeclared, golden_inputs=pair_inputs, golden_outputs=outputs)
    stated = read_bundle(pair_bundle)
    with pytest.raises(GateError, match=r"holds output\.scores"):
        write_bundle(tmp_path / "x", files, manifest=stated, golden_inputs=pair_inputs, golden_outputs=outputs[::-1])
    with pytest.raises(InputError, match="'b' is a single number"):
        declared(("a", "b"), (np.zeros(3), np.float32(1)))  # type: ignore[arg-type]
    assert not (tmp_path / "x").exists()


# --- what is said of an answer ------------------------------------------------------------------------------------

ROWS = np.log(np.array([[0.1, 0.7, 0.2], [0.5, 0.3, 0.2]], np.float32))
DENSE = Decode("dense", {"strides": [8, 16], "threshold": 0.3, "iou": 0.5, "most": 100})


def manifest_of(task: str, outputs: tuple[str, ...], decode: Decode | None = None) -> Manifest:
    leaves = tuple(Leaf(name, (3,), "float32") for name in outputs)
    return Manifest("m", (), None, labels=("a", "b", "c"), outputs=leaves, task=task, decode=decode)


def test_a_classifier_of_several_outputs_is_told_by_its_first_row_of_numbers() -> None:
    maps = np.zeros((2, 3, 4, 4), np.float32)
    said = summarise_answer(manifest_of("classification", ("maps", "logits", "aux")), (maps, ROWS, -ROWS), "x", top=1)
    assert said.lines == ("x[0]: b 0.700", "x[1]: a 0.500")
    assert said.values[1] == [{"index": 0, "label": "a", "share": pytest.approx(0.5)}]


def test_other_tasks_are_told_by_their_figures() -> None:
    said = summarise_answer(manifest_of("embedding", ("output",)), ROWS, "x", top=1)
    assert said.lines[0].startswith("x: output float32 [2, 3], min -2.30259, mean ")
    masks = np.array([[True, False], [True, True]])
    (row,) = summarise_answer(manifest_of("segmentation", ("output",)), masks, "x", top=1).values
    assert (row["dtype"], row["min"], row["mean"], row["max"]) == ("bool", 0.0, 0.75, 1.0)


@pytest.fixture
def decoder(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """In place of the module of decoders: one box on the first image, none on the second; what it was asked is kept."""
    asked: list[Any] = []

    def decode_dense(leaves: Mapping[str, NDArray[Any]], **parameters: Any) -> list[dict[str, NDArray[Any]]]:
        asked.append((list(leaves), parameters))
        if "broken" in leaves:
            raise CompressorError("no scores")
        box = {"boxes": np.array([[1, 2, 3.5, 4]], np.float32), "scores": np.array([0.5]), "labels": np.array([1])}
        return [box, {name: array[:0] for name, array in box.items()}]

    monkeypatch.setattr(answers, "decode_dense", decode_dense)
    return asked


def test_boxes_are_told_where_the_way_of_decoding_is_known(decoder: list[Any]) -> None:
    said = summarise_answer(manifest_of("detection", ("scores", "boxes"), DENSE), (ROWS, ROWS), "x", top=1)
    assert said.lines == ("x[0]: b 0.500 at 1.0 2.0 3.5 4.0", "x[1]: nothing detected")
    assert said.values == [[{"index": 1, "label": "b", "score": 0.5, "box": [1.0, 2.0, 3.5, 4.0]}], []]
    assert decoder == [(["scores", "boxes"], dict(DENSE.parameters))]


def test_outputs_are_told_raw_where_it_is_not(decoder: list[Any]) -> None:
    def said(decode: Decode) -> str:
        return summarise_answer(manifest_of("detection", ("scores",), decode), ROWS, "x", top=1).lines[0]

    assert said(Decode("of tomorrow")).startswith("x: scores float32")
    assert decoder == []


@pytest.mark.parametrize(
    "changed",
    [
        *({"strides": value} for value in ([], 8, ["8"], [0], [8.0], [8] * 1000)),
        *({"threshold": value} for value in (None, "0.5", -1, 2)),
        *({"iou": value} for value in (True, 1.5)),
        *({"most": value} for value in (0, 10**9, 1.5)),
        {"code": "import os"},
    ],
)
def test_parameters_of_decoding_are_held_to_their_kind(decoder: list[Any], changed: dict[str, Any]) -> None:
    decode = Decode("dense", {**DENSE.parameters, **changed})
    with pytest.raises(GateError, match=r"^the bundle's parameters of decoding are no use: "):
        summarise_answer(manifest_of("detection", ("scores",), decode), ROWS, "x", top=1)
    assert decoder == []


@pytest.mark.usefixtures("decoder")
def test_outputs_that_can_not_be_decoded_are_the_bundles_fault() -> None:
    with pytest.raises(GateError, match="can't be decoded as the bundle says: no scores"):
        summarise_answer(manifest_of("detection", ("broken",), DENSE), ROWS, "x", top=1)
