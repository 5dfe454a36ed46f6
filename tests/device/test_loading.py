"""`load(bundle)(images)`: what may be given, what comes back, and which file on which runtime answers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from compressor import device
from compressor.device import fastest, loading
from compressor.device.archive import pack_bundle
from compressor.device.bundle import Manifest, ModelFile, read_bundle, write_bundle
from compressor.device.images import load_inputs
from compressor.device.parity import Limits
from compressor.device.runtimes import available
from compressor.errors import DataError, EngineError, GateError, InputError

from .conftest import PREPROCESSING, SIZE, small_model, small_outputs
from .tampering import put

FP32_ABS = 1e-5
ON_ORT = {"runtime": "onnxruntime"}


def expected(images: NDArray[np.float32]) -> NDArray[np.float64]:
    return small_outputs(small_model(), images)


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "wide.png"
    pixels = np.random.default_rng(4).integers(0, 256, (24, 40, 3), np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def test_a_batch_of_arrays_is_answered_sample_by_sample(bundle: Path, images: NDArray[np.float32]) -> None:
    answers = device.load(bundle, **ON_ORT)(images, top=2)
    assert len(answers) == len(images)
    for answer, row in zip(answers, expected(images), strict=True):
        np.testing.assert_allclose(answer.outputs["output"], row, atol=FP32_ABS)
        assert [entry["index"] for entry in answer.classes] == list(np.argsort(-row)[:2])
        assert (answer.detections, answer.mask) == (None, None)


def test_a_path_a_picture_and_its_pixels_are_one_image(bundle: Path, picture: Path) -> None:
    model = device.load(bundle, **ON_ORT)
    prepared = load_inputs(picture, PREPROCESSING)
    forms: list[Any] = [picture, str(picture), Image.open(picture), np.asarray(Image.open(picture)), prepared]
    for (answer,) in (model(form) for form in forms):
        np.testing.assert_allclose(answer.outputs["output"], expected(prepared)[0], atol=FP32_ABS)
    assert len(model(forms)) == len(forms)  # a list holds any of them


def test_several_inputs_are_a_tuple_or_a_mapping(pair_bundle: Path, pair_inputs: tuple[NDArray[Any], ...]) -> None:
    model = device.load(pair_bundle, **ON_ORT)
    by_name = dict(zip(("image", "tokens", "mask"), pair_inputs, strict=True))
    for given in (pair_inputs, by_name):
        answers = model(given)
        assert len(answers) == 5
        assert answers[0].outputs["best"].shape == ()


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (5, "input 0 is a int, expected a path, a picture or an array of pixels"),
        (np.zeros((4, 4, 2), np.uint8), "expected uint8 pixels [H, W, 3] or [H, W]"),
        (np.zeros((0, 4), np.uint8), "is uint8 of shape [0, 4]"),
        (np.zeros((3, SIZE, SIZE), np.float32), "holds float32 of shape"),
        ([np.full((1, 3, SIZE, SIZE), np.nan, np.float32)], "input 0 holds NaN"),
        ("gone.png", "no input at gone.png"),
    ],
)
def test_what_is_no_image_is_one_line(bundle: Path, given: Any, words: str) -> None:
    with pytest.raises(DataError) as error:
        device.load(bundle, **ON_ORT)(given)
    assert words in str(error.value)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda a: a[:2], "holds 2 arrays, the model takes 3: image, tokens, mask"),
        (lambda a: {"image": a[0]}, "has no 'tokens'; the model takes image, tokens, mask"),
        (lambda a: (a[0], a[1][:2], a[2]), "equally many samples"),
        (lambda a: (a[0], [1], a[2]), "has list for 'tokens'"),
        (lambda a: 3, "holds 0 arrays"),
    ],
)
def test_arrays_that_the_model_does_not_take_are_one_line(
    pair_bundle: Path, pair_inputs: tuple[NDArray[Any], ...], change: Any, words: str
) -> None:
    with pytest.raises(DataError) as error:
        device.load(pair_bundle, **ON_ORT)(change(pair_inputs))
    assert words in str(error.value)


# --- which file on which runtime ----------------------------------------------------------------------------------


@pytest.fixture
def two_files(tmp_path: Path, model_file: Path, images: NDArray[np.float32]) -> Path:
    """A bundle of one network in two files; the second is of another network, and far from the golden outputs."""
    other = tmp_path / "other.onnx"
    other.write_bytes(small_model(seed=5).SerializeToString())
    models = (ModelFile("a.onnx"), ModelFile("b.onnx", "int8", limits=Limits(1e-3, 0.9)))
    return write_bundle(
        tmp_path / "two.bundle",
        {"a.onnx": model_file, "b.onnx": other},
        manifest=Manifest("two", models, PREPROCESSING),
        golden_inputs=images,
        golden_outputs=expected(images).astype(np.float32),
    )


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch, caches: Path) -> dict[str, Any]:
    """What each file is said to take, by its name and runtime; `asked` keeps what was measured. No earlier figures."""
    shutil.rmtree(caches / "compressor", ignore_errors=True)
    table: dict[str, Any] = {"asked": []}

    def time_files(files: dict[str, Path], images: Any, *, schedule: Any, runtime: str) -> dict[str, Any]:
        (path,) = files.values()
        table["asked"].append((path.name, runtime))
        assert len(images) == schedule.batch == 1
        ms = table.get(f"{path.name} on {runtime}", 5.0)
        if ms is None:
            raise EngineError("the timing was killed by signal 9")
        return {"": SimpleNamespace(p50_ms=ms)}

    monkeypatch.setattr(fastest, "time_files", time_files)
    return table


needs_both = pytest.mark.skipif(bool(available()["openvino"]), reason="openvino is not installed")


@needs_both
def test_the_fastest_is_taken_and_what_was_measured_is_kept(two_files: Path, timed: dict[str, Any]) -> None:
    timed["a.onnx on openvino"] = 1.0
    model = device.load(two_files)
    assert (Path(model.session.path).name, model.session.runtime) == ("a.onnx", "openvino")
    assert model.choice.startswith("a.onnx on openvino: a.onnx on openvino 1 ms, a.onnx on onnxruntime 5 ms, ")
    assert model.choice.endswith("(measured now)")
    assert len(timed["asked"]) == 4

    timed["a.onnx on openvino"] = 9.0
    assert device.load(two_files).choice.endswith("(as measured here before)")
    assert len(timed["asked"]) == 4
    device.load(two_files, threads=1)  # another number of threads is another question
    assert len(timed["asked"]) == 8


@needs_both
def test_a_lead_within_the_noise_is_none(two_files: Path, timed: dict[str, Any]) -> None:
    timed["a.onnx on openvino"] = 4.9
    assert device.load(two_files).session.runtime == "onnxruntime"


@needs_both
def test_a_file_that_is_fast_and_wrong_is_not_taken(two_files: Path, timed: dict[str, Any]) -> None:
    timed |= {"b.onnx on onnxruntime": 1.0, "b.onnx on openvino": 2.0}
    model = device.load(two_files)
    assert Path(model.session.path).name == "a.onnx"
    assert "b.onnx on onnxruntime is not taken: b.onnx on onnxruntime differs from the golden outputs" in model.choice


@needs_both
def test_a_runtime_that_dies_is_left_and_named(two_files: Path, timed: dict[str, Any]) -> None:
    timed["a.onnx on onnxruntime"] = None
    model = device.load(two_files, model="a.onnx")
    assert model.session.runtime == "openvino"
    assert "a.onnx on onnxruntime failed: the timing was killed by signal 9" in model.choice
    timed["a.onnx on openvino"] = None
    with pytest.raises(EngineError, match=r"no model of .* runs here: a\.onnx on onnxruntime failed"):
        device.load(two_files, model="a.onnx", threads=1)


def test_what_is_asked_for_is_not_measured(two_files: Path, timed: dict[str, Any]) -> None:
    model = device.load(two_files, model="int8", **ON_ORT)
    assert model.choice == "b.onnx on onnxruntime: the only one that runs here"
    assert timed["asked"] == []
    with pytest.raises(InputError, match=r"the bundle has no model 'int4'; it has a.onnx \(fp32\), b.onnx \(int8\)"):
        device.load(two_files, model="int4")
    with pytest.raises(InputError, match="no runtime 'onx'"):
        device.load(two_files, runtime="onx")
    with pytest.raises(EngineError, match="tensorrt does not take it"):
        device.load(two_files, runtime="tensorrt")


@needs_both
def test_nothing_is_measured_before_the_hashes_were_compared(two_files: Path, timed: dict[str, Any]) -> None:
    (two_files / "b.onnx").write_bytes(b"\0" * (two_files / "b.onnx").stat().st_size)
    with pytest.raises(GateError, match=r"b\.onnx was changed"):
        device.load(two_files)
    assert timed["asked"] == []


@needs_both
@pytest.mark.parametrize("content", ["{", "[]", '{"schema": "compressor.choice/1", "times_ms": {"x": 1}}', "{}"])
def test_a_damaged_record_is_measured_again(two_files: Path, timed: dict[str, Any], caches: Path, content: str) -> None:
    device.load(two_files)
    (record,) = (caches / "compressor" / "choices").iterdir()
    assert len(json.loads(record.read_text())["times_ms"]) == 4
    record.write_text(content)
    assert device.load(two_files).choice.endswith("(measured now)")


@needs_both
def test_where_nothing_can_be_kept_it_says_so(
    two_files: Path, timed: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv(fastest.CACHE, str(tmp_path / "file"))
    assert "(measured now; not kept: " in device.load(two_files).choice


def test_the_real_measurement_times_what_there_is(two_files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from compressor.device.worker import time_files

    monkeypatch.setattr(fastest, "time_files", time_files)
    ranking = fastest.rank(two_files, read_bundle(two_files), runtime="onnxruntime", threads=1)
    assert ranking.is_new
    assert len(ranking.pairs) == 2


def test_a_bundle_that_is_not_whole_does_not_load(bundle: Path) -> None:
    put(bundle, "name", "another")
    path = bundle / "models/small.onnx"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(GateError, match="is truncated"):
        device.load(bundle, **ON_ORT)


def test_an_archive_is_loaded_and_leaves_nothing(
    bundle: Path, images: NDArray[np.float32], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    archive = pack_bundle(bundle)
    shutil.rmtree(bundle)
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(scratch))
    model = device.load(archive, **ON_ORT)
    assert list(scratch.iterdir()) == []
    for answer, row in zip(model(images), expected(images), strict=True):
        np.testing.assert_allclose(answer.outputs["output"], row, atol=FP32_ABS)

    content = archive.read_bytes()
    archive.write_bytes(content[:2000] + bytes([content[2000] ^ 1]) + content[2001:])
    with pytest.raises(GateError):
        device.load(archive, **ON_ORT)
    assert list(scratch.iterdir()) == []
    assert not bundle.exists()


def test_the_room_says_what_it_has() -> None:
    assert device.load is loading.load
    with pytest.raises(AttributeError, match="no attribute 'lode'"):
        device.lode  # noqa: B018
