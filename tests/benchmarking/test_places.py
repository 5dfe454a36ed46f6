"""Places without a run behind them: the summary's lists, files that were changed, golden inputs that are none."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from compressor.benchmarking import measurement, places
from compressor.benchmarking.places import open_place, opened_place, results_folder
from compressor.device.archive import pack_bundle
from compressor.device.bundle import Manifest, ModelFile, declared, write_bundle
from compressor.device.images import Preprocessing
from compressor.errors import FolderError, GateError, InputError

SUMMARY = {
    "schema": "summary/2",
    "macs_dense": 4000,
    "params_dense": 300,
    "macs_shipped": 2000,
    "params_shipped": 150,
    "precisions": {
        "model.onnx": {"precision": "fp32"},
        "model.int8.onnx": {"precision": "int8"},
        "model.int8.tensorrt.onnx": {"precision": "int8"},
    },
}
IMAGES = np.random.default_rng(0).random((2, 3, 4, 4)).astype(np.float32)


def with_summary(folder: Path, **changes: Any) -> Path:
    content = {name: value for name, value in {**SUMMARY, **changes}.items() if value is not None}
    (folder / "summary.json").write_text(json.dumps(content))
    return folder


def test_the_files_of_a_run_are_the_dense_one_and_those_that_are_run(tmp_path: Path) -> None:
    files = places._files_of(with_summary(tmp_path))
    assert [(file.artifact.subject, file.path.name, file.macs, file.parameters) for file in files] == [
        ("dense", "dense.onnx", 4000, 300),
        ("shipped", "model.onnx", 2000, 150),
        ("shipped-int8", "model.int8.onnx", 2000, 150),
    ]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"macs_dense": None}, "does not say what the run made .KeyError: 'macs_dense'"),
        ({"macs_shipped": "many"}, "does not say what the run made .ValueError"),
        ({"precisions": ["model.onnx"]}, "does not say what the run made .AttributeError"),
        ({"precisions": {"model.onnx": {}}}, "does not say what the run made .KeyError: 'precision'"),
        ({"precisions": {"../model.onnx": {"precision": "fp32"}}}, "which is no file of its folder"),
        ({"precisions": {"/etc/passwd": {"precision": "fp32"}}}, "which is no file of its folder"),
        ({"schema": "summary/1"}, "has schema 'summary/1'"),
    ],
)
def test_a_summary_that_does_not_say_what_was_made_is_refused(
    tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    with pytest.raises(FolderError, match=words):
        places._files_of(with_summary(tmp_path, **changes))


def test_a_file_that_no_stage_vouches_for_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model.onnx").write_bytes(b"a model")
    monkeypatch.setattr(places, "recorded_files", lambda folder: {"model.onnx": hashlib.sha256(b"a model").hexdigest()})
    places._require_unchanged(tmp_path, ["model.onnx"])
    with pytest.raises(FolderError, match=r"dense\.onnx in .* is gone"):
        places._require_unchanged(tmp_path, ["model.onnx", "dense.onnx"])
    (tmp_path / "model.onnx").write_bytes(b"another")
    with pytest.raises(FolderError, match=r"model\.onnx in .* was changed since it was written"):
        places._require_unchanged(tmp_path, ["model.onnx"])


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    (tmp_path / "model.onnx").write_bytes(b"a model")
    names = ("model.onnx", "model.int8.tensorrt.onnx", "small.engine")
    models = (
        ModelFile(names[0]),
        ModelFile(names[1], "int8", made_for="tensorrt"),
        ModelFile(names[2], library="tensorrt_rtx", target="sm86"),
    )
    manifest = Manifest(
        name="small",
        models=models,
        preprocessing=Preprocessing((4, 4), (4,), "bilinear", (0.5,) * 3, (0.5,) * 3),
        provenance={"macs": 2000, "budget": "macs 0.5"},
    )
    files = dict.fromkeys(names, tmp_path / "model.onnx")
    outputs = np.zeros((2, 5), np.float32)
    return write_bundle(
        tmp_path / "small.bundle", files, manifest=manifest, golden_inputs=IMAGES, golden_outputs=outputs
    )


def test_of_a_bundle_the_files_that_any_runtime_takes_are_measured(bundle: Path) -> None:
    place = open_place(bundle)
    assert [file.artifact.name for file in place.files] == ["model.onnx"]
    assert (place.files[0].macs, place.files[0].parameters) == (2000, -1)
    assert (place.label, place.budget) == ("small.bundle", "macs 0.5")
    assert (place.evaluation, place.networks, place.evaluation_hash) == (None, None, "")
    np.testing.assert_array_equal(place.images, IMAGES)
    assert len(place.lacks) == 2
    assert open_place(bundle, label="a name").lacks[0].startswith("a name: ")


def test_a_bundle_that_was_changed_is_refused(bundle: Path) -> None:
    (bundle / "model.onnx").write_bytes(b"another")
    with pytest.raises(GateError, match=r"model\.onnx"):
        open_place(bundle)


def test_an_archive_is_measured_like_its_folder_and_leaves_nothing(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    archive = pack_bundle(bundle)
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(scratch))
    with opened_place(archive) as place:
        assert [file.path.is_file() for file in place.files] == [True]
        assert (place.label, place.budget) == ("small.bundle", "macs 0.5")
        np.testing.assert_array_equal(place.images, IMAGES)
    assert list(scratch.iterdir()) == []

    archive.write_bytes(archive.read_bytes()[:-1])
    with pytest.raises(GateError, match="has none"), opened_place(archive):
        pass
    assert list(scratch.iterdir()) == []


def test_results_never_lie_in_a_bundle(bundle: Path, tmp_path: Path) -> None:
    assert results_folder(bundle) == tmp_path / "small.bundle.benchmark"
    assert results_folder(pack_bundle(bundle)) == tmp_path / "small.bundle.benchmark"
    assert results_folder(tmp_path / "run") == tmp_path / "run" / "benchmark"


def test_several_inputs_are_drawn_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measurement, "_POOL_LIMIT_BYTES", 2**12)
    (tmp_path / "model.onnx").write_bytes(b"a model")
    inputs = (IMAGES, np.arange(2.0).reshape(2, 1))
    outputs = np.zeros((2, 5), np.float32)
    manifest = Manifest(
        name="pair",
        models=(ModelFile("model.onnx"),),
        preprocessing=None,
        inputs=declared(("image", "place"), inputs),
        outputs=declared(("output",), outputs),
    )
    files = {"model.onnx": tmp_path / "model.onnx"}
    bundle = write_bundle(tmp_path / "pair", files, manifest=manifest, golden_inputs=inputs, golden_outputs=outputs)
    place = open_place(bundle)
    pool = measurement.pool_of(place.images)
    assert isinstance(pool, tuple)
    images, places_ = pool
    assert len(images) == len(places_) > 2
    for image, index in zip(images[:20], places_[:20], strict=True):
        np.testing.assert_array_equal(image, IMAGES[int(index[0])])

    np.savez(tmp_path / "held-out.npz", **{"input.place": inputs[1], "input.image": IMAGES, "targets": np.arange(2)})
    judged = open_place(bundle, evaluation_data=str(tmp_path / "held-out.npz"))
    assert judged.evaluation is not None
    for given, gathered in zip(inputs, judged.images, strict=True):
        np.testing.assert_array_equal(given, gathered)
    np.savez(tmp_path / "others.npz", **{"input.place": inputs[1], "input.image": IMAGES[:, :1]})
    with pytest.raises(InputError, match=r"others.npz holds \[\[1, 4, 4\], \[1\]\], .* takes image \[3, 4, 4\], place"):
        open_place(bundle, evaluation_data=str(tmp_path / "others.npz"))


class Batched:
    """Batches of 100 images each, counted as they are taken."""

    def __init__(self, batches: int) -> None:
        self.batches, self.taken = batches, 0

    def __iter__(self) -> Iterator[tuple[Tensor, None]]:
        for index in range(self.batches):
            self.taken += 1
            yield torch.full((100, 1, 1, 1), float(index)), None


@pytest.mark.parametrize(("batches", "taken"), [(1, 1), (6, 6), (20, 6)])
def test_images_are_gathered_until_there_are_enough(batches: int, taken: int) -> None:
    source = Batched(batches)
    gathered = places._gathered(source)  # type: ignore[arg-type]
    assert (source.taken, len(gathered)) == (taken, 100 * taken)
    assert gathered[::100].ravel().tolist() == list(range(taken))


def test_a_folder_of_half_a_run_is_no_place(tmp_path: Path) -> None:
    with pytest.raises(FolderError, match="neither the folder of a finished run nor a bundle"):
        open_place(with_summary(tmp_path))
