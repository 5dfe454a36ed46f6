"""Bundles: written whole, read with suspicion, verified by running, useless to whoever tampers with one."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from compressor.device.bundle import (
    GOLDEN,
    MANIFEST,
    Manifest,
    ModelFile,
    open_bundle,
    read_bundle,
    run_bundle,
    verify_bundle,
    write_bundle,
)
from compressor.device.engines import build_bundle
from compressor.device.golden import read_golden
from compressor.device.images import load_inputs, top_classes
from compressor.device.metrics import Metric
from compressor.device.parity import Limits
from compressor.device.runtimes import available
from compressor.errors import DataError, EngineError, FolderError, GateError, InputError, MissingPackageError

from .conftest import CLASSES, PREPROCESSING, SIZE, small_model, small_outputs
from .tampering import aged

MODEL = "models/small.onnx"
RUNTIMES_REL = 1e-5  # two runtimes in float32, each summing as the processor likes: 2.4e-6 was seen
# Dividing by 255 and by std in float32.
FLOAT32_ABS = 1e-6


def test_a_whole_bundle_passes_on_every_runtime_here(bundle: Path) -> None:
    for runtime in ("", *(name for name in ("onnxruntime", "openvino") if not available()[name])):
        report = verify_bundle(bundle, runtime)
        assert report.passed
        assert {c.what for c in report.checks} == {MODEL, GOLDEN}


def test_reading_gives_what_was_written(bundle: Path) -> None:
    manifest = read_bundle(bundle)
    assert manifest.preprocessing == PREPROCESSING
    assert manifest.models == (ModelFile(MODEL),)
    assert manifest.labels[4] == "eel"
    assert manifest.files[MODEL]["bytes"] == (bundle / MODEL).stat().st_size


def test_figures_and_pages_are_written_listed_and_read(bundle: Path, model_file: Path, tmp_path: Path) -> None:
    metric = Metric(MODEL, "top-1", 0.9, 0.8, 0.95, 719, runtime="onnxruntime")
    manifest = replace(read_bundle(bundle), files={}, metrics=(metric,), not_checked=("engines: no GPU",))
    golden = read_golden(bundle, read_bundle(bundle))

    def describe(listed: Manifest) -> dict[str, bytes]:
        return {"README.md": ", ".join(listed.files).encode()}

    write_bundle(
        bundle,
        {MODEL: model_file},
        manifest=manifest,
        golden_inputs=golden.inputs,
        golden_outputs=golden.outputs,
        describe=describe,
    )
    written = read_bundle(bundle)
    assert (written.metrics, written.not_checked) == ((metric,), ("engines: no GPU",))
    assert (bundle / "README.md").read_text() == f"{GOLDEN}, {MODEL}"
    assert "README.md" in written.files
    assert verify_bundle(bundle).passed
    assert read_bundle(aged(bundle)).metrics == ()


@pytest.mark.parametrize("name", [MODEL, GOLDEN])
@pytest.mark.parametrize("damage", ["flipped", "truncated", "longer", "gone", "linked"])
def test_a_damaged_file_fails_and_is_never_opened(bundle: Path, name: str, damage: str, tmp_path: Path) -> None:
    path = bundle / name
    data = bytearray(path.read_bytes())
    if damage == "flipped":
        data[len(data) // 2] ^= 1
    path.write_bytes({"truncated": data[:-7], "longer": data + b"x"}.get(damage, data))
    if damage in ("gone", "linked"):
        path.rename(tmp_path / "elsewhere")
    if damage == "linked":
        path.symlink_to(tmp_path / "elsewhere")
    report = verify_bundle(bundle)
    assert not report.passed
    assert next(c.what for c in report.checks if c.outcome == "failed") == name
    assert not any(c.parity for c in report.checks)
    if name == MODEL:
        with pytest.raises(GateError, match=MODEL):
            open_bundle(bundle)


def test_a_file_nobody_vouches_for_fails(bundle: Path) -> None:
    (bundle / "models" / "other.onnx").write_bytes(b"x")
    report = verify_bundle(bundle)
    assert not report.passed
    assert any(c.what == "models/other.onnx" and "not in the manifest" in c.detail for c in report.checks)


def test_a_model_with_other_outputs_fails_its_parity(
    tmp_path: Path, model_file: Path, images: NDArray[np.float32]
) -> None:
    outputs = small_outputs(small_model(seed=3), images).astype(np.float32)
    manifest = Manifest("other", (ModelFile("m.onnx"),), PREPROCESSING)
    folder = write_bundle(
        tmp_path / "b", {"m.onnx": model_file}, manifest=manifest, golden_inputs=images, golden_outputs=outputs
    )
    checks = [c for c in verify_bundle(folder).checks if c.outcome == "failed"]
    assert len(checks) == 1
    assert "max |difference|" in checks[0].detail


def test_a_channels_limit_may_be_many_times_its_spread(
    tmp_path: Path, model_file: Path, images: NDArray[np.float32]
) -> None:
    outputs = small_outputs(small_model(), images).astype(np.float32)
    model = ModelFile("m.onnx", limits=Limits(channel=40.0))
    manifest = Manifest("hardly varying", (model,), PREPROCESSING)
    folder = write_bundle(
        tmp_path / "b", {"m.onnx": model_file}, manifest=manifest, golden_inputs=images, golden_outputs=outputs
    )
    assert read_bundle(folder).models == (model,)


def test_a_changed_manifest_is_refused(bundle: Path) -> None:
    path = bundle / MANIFEST
    path.write_text(path.read_text().replace('"ant"', '"wasp"'))
    with pytest.raises(GateError, match="changed after it was written"):
        verify_bundle(bundle)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"schema": "compressor.bundle/1"}'])
def test_a_damaged_manifest_is_one_clear_line(bundle: Path, text: str) -> None:
    (bundle / MANIFEST).write_text(text)
    with pytest.raises(GateError, match="damaged") as caught:
        read_bundle(bundle)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["../out.onnx", "/etc/passwd", "a/../../b", "..\\b", "C:b"])
def test_a_path_out_of_the_bundle_is_refused(tmp_path: Path, model_file: Path, name: str) -> None:
    manifest = Manifest("evil", (ModelFile(name),), PREPROCESSING)
    zeros = np.zeros((1, 3, SIZE, SIZE), np.float32)
    with pytest.raises(GateError, match="outside the bundle"):
        write_bundle(tmp_path / "b", {name: model_file}, manifest=manifest, golden_inputs=zeros, golden_outputs=zeros)
    assert list(tmp_path.iterdir()) == []


def test_another_folders_content_is_left_alone(bundle: Path, model_file: Path, tmp_path: Path) -> None:
    other = tmp_path / "photos"
    other.mkdir()
    (other / "cat.jpg").write_bytes(b"x")
    arguments = {"golden_inputs": np.zeros((1, 3, SIZE, SIZE), np.float32), "golden_outputs": np.zeros((1, CLASSES))}
    manifest = Manifest("m", (ModelFile("m.onnx"),), PREPROCESSING)
    with pytest.raises(FolderError, match="something else"):
        write_bundle(other, {"m.onnx": model_file}, manifest=manifest, **arguments)
    assert [p.name for p in other.iterdir()] == ["cat.jpg"]
    write_bundle(bundle, {"m.onnx": model_file}, manifest=manifest, **arguments)
    assert not (bundle / MODEL).exists()


def test_a_write_that_fails_leaves_the_old_bundle(bundle: Path, tmp_path: Path) -> None:
    manifest = replace(read_bundle(bundle), files={})
    zeros = np.zeros((1, 3, SIZE, SIZE), np.float32)
    with pytest.raises(FolderError, match="can't write the bundle"):
        write_bundle(bundle, {MODEL: tmp_path / "no"}, manifest=manifest, golden_inputs=zeros, golden_outputs=zeros)
    assert verify_bundle(bundle).passed
    assert [p.name for p in bundle.parent.iterdir()] == [bundle.name]


def test_an_engine_that_cannot_run_is_recorded_as_such(
    tmp_path: Path, model_file: Path, images: NDArray[np.float32]
) -> None:
    if not available()["tensorrt_rtx"]:
        pytest.skip("engines run here")
    engine = ModelFile("engines/rtx.plan", "fp16", "tensorrt_rtx", "SM86")
    manifest = Manifest("m", (engine,), PREPROCESSING)
    folder = write_bundle(
        tmp_path / "b",
        {engine.path: model_file},
        manifest=manifest,
        golden_inputs=images,
        golden_outputs=np.zeros((6, 5)),
    )
    report = verify_bundle(folder)
    assert report.checks[-1].outcome == "not run"
    assert report.checks[-1].detail.startswith("built, not run: n")
    assert not report.passed  # hashes alone don't make a verified bundle


def test_running_takes_arrays_and_image_files(bundle: Path, images: NDArray[np.float32], tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (2, SIZE, SIZE, 3), dtype=np.uint8)
    np.save(tmp_path / "ready.npy", images[:2])
    np.savez(tmp_path / "pixels.npz", images=pixels, labels=np.zeros(2))
    Image.fromarray(np.full((40, 30, 3), 128, np.uint8)).save(tmp_path / "grey.png")
    names = ("ready.npy", "pixels.npz", "grey.png")
    ready, quantised, grey = run_bundle(bundle, [tmp_path / n for n in names])
    np.testing.assert_allclose(ready, small_outputs(small_model(), images[:2]), rtol=RUNTIMES_REL, atol=1e-5)
    mean, std = np.array(PREPROCESSING.mean), np.array(PREPROCESSING.std)
    by_hand = ((pixels / 255 - mean) / std).transpose(0, 3, 1, 2)
    np.testing.assert_allclose(
        quantised, small_outputs(small_model(), by_hand.astype(np.float32)), rtol=RUNTIMES_REL, atol=1e-5
    )
    flat = np.broadcast_to(((128 / 255 - mean) / std)[None, :, None, None], (1, 3, SIZE, SIZE)).astype(np.float32)
    np.testing.assert_allclose(grey, small_outputs(small_model(), flat), rtol=RUNTIMES_REL, atol=1e-5)


def test_images_are_resized_by_the_shorter_side_and_cropped_in_the_middle(tmp_path: Path) -> None:
    wide = np.zeros((20, 40, 3), np.uint8)
    wide[:, 12:28] = 255  # 20 high already: the crop of 16 is columns 12 to 27
    Image.fromarray(wide).save(tmp_path / "wide.png")
    batch = load_inputs(tmp_path / "wide.png", PREPROCESSING)
    expected = (1 - np.array(PREPROCESSING.mean)) / PREPROCESSING.std
    np.testing.assert_allclose(batch[0], np.broadcast_to(expected[:, None, None], (3, SIZE, SIZE)), atol=FLOAT32_ABS)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("bad.png", b"no image", "can't be read as an image"),
        ("bad.npz", b"PK no", "can't be read as a numpy file"),
        ("bad.npy", b"", "can't be read as a numpy file"),
    ],
)
def test_unreadable_inputs_are_named(bundle: Path, tmp_path: Path, name: str, content: bytes, words: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=f"{name} {words}"):
        run_bundle(bundle, [tmp_path / name])


def test_arrays_of_another_kind_are_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.zeros((1, SIZE, SIZE + 1, 3), np.uint8))
    with pytest.raises(DataError, match="the model takes"):
        load_inputs(tmp_path / "a.npy", PREPROCESSING)
    np.save(tmp_path / "b.npy", np.array([{}], dtype=object), allow_pickle=True)
    with pytest.raises(DataError, match="can't be read"):
        load_inputs(tmp_path / "b.npy", PREPROCESSING)


def test_top_classes_are_sorted_with_their_softmax() -> None:
    rows = top_classes(np.log(np.array([0.1, 0.7, 0.2])), ("a", "b", "c"), 2)
    assert [r["label"] for r in rows] == ["b", "c"]
    assert rows[0]["share"] == pytest.approx(0.7)


def test_building_without_a_recipe_or_a_library_says_so(bundle: Path, model_file: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no build recipe"):
        build_bundle(bundle)
    if not available()["tensorrt"]:
        pytest.skip("TensorRT runs here")
    recipe = {"target": "SM87", "libraries": ["tensorrt"], "model": "m.onnx", "precision": "fp32", "profiles": {}}
    manifest = Manifest("m", (ModelFile("m.onnx"),), PREPROCESSING, build=(recipe,))
    folder = write_bundle(
        tmp_path / "b",
        {"m.onnx": model_file},
        manifest=manifest,
        golden_inputs=np.zeros((1, 3, SIZE, SIZE), np.float32),
        golden_outputs=np.zeros((1, CLASSES)),
    )
    missing = available()["tensorrt"].startswith("not installed")
    error = MissingPackageError if missing else EngineError
    with pytest.raises(error, match="no library can build an engine for SM87 here: tensorrt: "):
        build_bundle(folder)


def test_manifests_are_json_with_a_schema(bundle: Path) -> None:
    content = json.loads((bundle / MANIFEST).read_text())
    assert content["schema"] == "compressor.bundle/2"
    assert content["inputs"] == [{"name": "input", "shape": [3, SIZE, SIZE], "dtype": "float32"}]
    assert content["outputs"] == [{"name": "output", "shape": [CLASSES], "dtype": "float32"}]
    assert (content["task"], content["decode"]) == ("classification", None)
    assert len(content["digest"]) == 64
