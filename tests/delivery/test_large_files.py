"""A network above protobuf's 2 GB: its weights lie beside each file, and go wherever the file goes."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import nn

import compressor
from compressor.device.archive import pack_bundle, unpack_bundle
from compressor.device.builder import content_of, sha256_of
from compressor.device.bundle import open_bundle, read_bundle, verify_bundle
from compressor.device.external import aside_of, files_of
from compressor.device.runtimes import open_model
from compressor.errors import GateError
from compressor.export import onnx as export
from compressor.export.calibration import collect, ranges
from compressor.export.onnx import export_onnx, write_model
from compressor.export.precision import to_fp16, to_int8

from ..device.tampering import replace_file

Compress = Callable[..., compressor.Run]
FILES = ("model.onnx", "model.fp16.onnx", "model.int8.onnx", "model.int8.tensorrt.onnx")
LIMIT_BYTES = 1000  # of a message, in place of 2 GB


@pytest.fixture(scope="module")
def _small_messages() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(export, "_PROTOBUF_LIMIT_BYTES", LIMIT_BYTES)
        yield


@pytest.fixture(scope="module")
def large_run(
    _small_messages: None,
    compress: Compress,
    shorten: Callable[[pytest.MonkeyPatch], None],
    tmp_path_factory: pytest.TempPathFactory,
) -> compressor.Run:
    with pytest.MonkeyPatch.context() as patch:
        shorten(patch)
        return compress(tmp_path_factory.mktemp("runs") / "large", precisions="int8", targets="SM86")


def test_every_file_has_its_weights_beside_it_and_their_bytes_are_counted(large_run: compressor.Run) -> None:
    for name in FILES:
        files = files_of(large_run.folder / name)
        assert large_run.summary["precisions"][name]["bytes"] == sum(file.stat().st_size for file in files)
        if "int8" not in name:  # whose tensors here are all below what onnx leaves inside, 1 kB
            assert files == (large_run.folder / name, aside_of(large_run.folder / name))
    assert large_run.summary["onnx_bytes_shipped"] == read_bundle(large_run.folder / "bundle").model_bytes("model.onnx")


def test_the_bundle_holds_them_and_verifies_wherever_it_is_carried(large_run: compressor.Run, tmp_path: Path) -> None:
    archive = pack_bundle(large_run.folder / "bundle", tmp_path / "bundle.tar")
    unpack_bundle(archive, tmp_path / "unpacked")
    report = verify_bundle(tmp_path / "unpacked")
    assert report.passed, report
    assert {check.what for check in report.checks if check.parity is not None} == set(FILES)


def test_a_model_whose_weights_are_damaged_is_not_opened(large_run: compressor.Run, tmp_path: Path) -> None:
    bundle = tmp_path / "bundle"
    shutil.copytree(large_run.folder / "bundle", bundle)
    weights = aside_of(bundle / "model.onnx")
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    report = verify_bundle(bundle)
    assert [check.what for check in report.having("failed")] == [weights.name, "model.onnx"]
    assert report.having("failed")[1].detail == f"takes weights from '{weights.name}', which are not whole"
    assert {check.what for check in report.checks if check.parity is not None} == set(FILES[1:])
    with pytest.raises(GateError, match=weights.name):
        open_bundle(bundle, model="model.onnx")


@pytest.mark.parametrize("place", ["", ".", "nowhere", "plan.json/x"])
def test_weights_that_lie_in_no_listed_file_fail_their_model(
    large_run: compressor.Run, tmp_path: Path, place: str
) -> None:
    """Such a model must not be left out of a verification that the others pass."""
    bundle = tmp_path / "bundle"
    shutil.copytree(large_run.folder / "bundle", bundle)
    content = onnx.load(bundle / "model.onnx", load_external_data=False)
    for tensor in content.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = place
    replace_file(bundle, "model.onnx", content.SerializeToString())
    report = verify_bundle(bundle)
    assert [check.what for check in report.having("failed")] == ["model.onnx"]


@pytest.fixture
def wide(_small_messages: None) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(48, 40), nn.ReLU(), nn.Linear(40, 5)).eval()


def test_a_file_written_again_holds_nothing_of_the_one_before(wide: nn.Module, tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    export_onnx(wide, torch.zeros(2, 3, 4, 4), path)
    first = aside_of(path).stat().st_size
    export_onnx(wide, torch.zeros(2, 3, 4, 4), path)
    assert aside_of(path).stat().st_size == first
    assert sorted(file.name for file in tmp_path.iterdir()) == ["m.onnx", "m.onnx.data"]


def test_one_that_became_small_leaves_no_weights_beside(
    wide: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = export_onnx(wide, torch.zeros(2, 3, 4, 4), tmp_path / "m.onnx")
    monkeypatch.setattr(export, "_PROTOBUF_LIMIT_BYTES", 2**31)
    write_model(onnx.load(path), path)
    assert [file.name for file in tmp_path.iterdir()] == ["m.onnx"]


def test_an_engine_is_known_by_the_weights_beside_too(wide: nn.Module, tmp_path: Path) -> None:
    path = export_onnx(wide, torch.zeros(2, 3, 4, 4), tmp_path / "m.onnx")
    before, weights = content_of(path, sha256_of(path)), aside_of(path)
    weights.write_bytes(np.ones(weights.stat().st_size // 4, np.float32).tobytes())
    assert content_of(path, sha256_of(path)) != before


@pytest.mark.slow
def test_one_that_really_is_larger_is_exported_and_lowered(tmp_path: Path) -> None:
    """2.2 GB of weights, 9 GB of memory."""
    layers = (nn.Linear(3072, 90_000), nn.ReLU(), nn.Linear(90_000, 3000), nn.ReLU(), nn.Linear(3000, 10))
    model, x = nn.Sequential(nn.Flatten(), *layers).eval(), torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = model(x).numpy()
    path = export_onnx(model, x, tmp_path / "m.onnx")
    del model, layers
    half = Path(to_fp16(path, tmp_path / "half.onnx").path)
    in_steps = to_int8(path, tmp_path / "int8.onnx", ranges=ranges(collect(path, x.numpy())))
    for file, tolerance in ((path, 1e-5), (half, 1e-3), (in_steps, 0.03)):
        assert np.abs(open_model(file).run(x.numpy()) - expected).max() < tolerance
