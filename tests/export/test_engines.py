"""Engines: targets resolved or refused in words, files built in another process, cached by content, read back."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from compressor.device import tensorrt
from compressor.device.builder import EngineJob, EngineRecord, engine_key, read_sidecar, sha256_of, sidecar_of
from compressor.device.runtimes import available
from compressor.errors import EngineError, InputError, ModelError
from compressor.export.calibration import collect, ranges
from compressor.export.engines import build_engine, build_recipe, image_profile, supported_targets
from compressor.export.precision import to_fp16, to_int8
from compressor.export.targets import RTX_CAPABILITIES, TARGETS, resolve_target

PROFILE = image_profile((3, 16, 16), batches=(1, 1, 8))
MAGIC = b"ftrt", b"vtrt", b"ptrt"  # what TensorRT and TensorRT-RTX plans begin with

rtx = pytest.mark.skipif(bool(tensorrt.buildable("tensorrt_rtx")), reason=tensorrt.buildable("tensorrt_rtx"))


@pytest.fixture(scope="module")
def built(residual_file: Path, tmp_path_factory: pytest.TempPathFactory) -> EngineRecord:
    if tensorrt.buildable("tensorrt_rtx"):
        pytest.skip(tensorrt.buildable("tensorrt_rtx"))
    folder = tmp_path_factory.mktemp("engine")
    return build_engine(residual_file, folder / "fp32.plan", target="SM86", profiles=PROFILE, cache=folder / "cache")


def test_targets_are_named_in_many_ways() -> None:
    for name in ("SM86", "sm86", "sm_86", "8.6", "86"):
        assert resolve_target(name).name == "SM86"
    assert resolve_target("Orin") is TARGETS["SM87"]
    with pytest.raises(InputError, match=r"no target 'SM88'.*Did you mean"):
        resolve_target("SM88")


@pytest.mark.parametrize("name", ["SM87", "orin", "SM90", "h100", "SM110"])
def test_devices_rtx_does_not_serve_are_refused_in_words(name: str, residual_file: Path, tmp_path: Path) -> None:
    if not available()["tensorrt"]:
        pytest.skip("TensorRT runs here")
    with pytest.raises(EngineError, match=r"TensorRT does.*compressor build BUNDLE") as caught:
        build_engine(residual_file, tmp_path / "e.plan", target=name, profiles=PROFILE)
    assert resolve_target(name).name in str(caught.value)
    assert list(tmp_path.iterdir()) == []


@rtx
def test_supported_targets_are_rtxs() -> None:
    free = {name for name, reason in supported_targets().items() if not reason}
    assert free == {"rtx", *RTX_CAPABILITIES} | ({"this-gpu"} & free)


def test_an_engine_has_a_record_and_a_sidecar(built: EngineRecord, residual_file: Path) -> None:
    engine = Path(built.path)
    assert engine.read_bytes()[:4] in MAGIC
    assert (built.sha256, built.size_bytes) == (sha256_of(engine), engine.stat().st_size)
    assert built.onnx_sha256 == sha256_of(residual_file)
    assert built.compute_capabilities == ("SM86",)
    assert not built.cached
    assert read_sidecar(engine) == built
    assert [p.name for p in engine.parent.iterdir() if p.name.startswith(".")] == []


def test_an_engine_that_did_not_run_says_so(built: EngineRecord) -> None:
    if not available()["tensorrt_rtx"]:
        pytest.skip("engines run here")
    assert built.status.startswith("built, not run: no GPU")


def test_the_lowered_layers_are_read(built: EngineRecord) -> None:
    assert built.lowering.available, built.lowering.reason
    assert built.lowering.kinds["correlation"] == 4  # one kernel per convolution
    assert set(built.lowering.types) == {"Float->Float"}
    assert built.lowering.activation_bytes > 0


@rtx
def test_fp16_and_int8_engines_build(
    residual_file: Path, images: NDArray[np.float32], tmp_path: Path, built: EngineRecord
) -> None:
    statistics = collect(residual_file, images)
    half = Path(to_fp16(residual_file, tmp_path / "h.onnx", statistics=statistics).path)
    int8 = to_int8(residual_file, tmp_path / "q.onnx", ranges=ranges(statistics))
    made = {
        name: build_engine(path, tmp_path / f"{name}.plan", target="SM86", profiles=PROFILE, precision=name)
        for name, path in (("fp16", half), ("int8", int8))
    }
    assert made["fp16"].lowering.types["Half->Half"] > 0
    assert made["fp16"].lowering.activation_bytes < built.lowering.activation_bytes
    assert any(kind.startswith("Int8") for kind in made["int8"].lowering.types)


def test_the_same_content_comes_from_the_cache(
    built: EngineRecord, residual_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("compressor.device.child.start", None)  # nothing may be built
    cache = Path(built.path).parent / "cache"
    renamed = tmp_path / "other-name.onnx"
    renamed.write_bytes(residual_file.read_bytes())
    again = build_engine(renamed, tmp_path / "again.plan", target="SM86", profiles=PROFILE, cache=cache)
    assert again == replace(built, path=str(tmp_path / "again.plan"), cached=True)
    assert Path(again.path).read_bytes() == Path(built.path).read_bytes()
    in_place = build_engine(renamed, tmp_path / "again.plan", target="SM86", profiles=PROFILE)
    assert in_place.cached


def test_the_key_holds_all_that_decides_the_engine() -> None:
    job = EngineJob("tensorrt_rtx", PROFILE, ("SM86",))
    keys = {
        engine_key("a", "1.7", job),
        engine_key("b", "1.7", job),
        engine_key("a", "1.8", job),
        engine_key("a", "1.7", replace(job, compute_capabilities=("SM89",))),
        engine_key("a", "1.7", replace(job, profiles=image_profile((3, 16, 16), batches=(1, 1, 9)))),
        engine_key("a", "1.7", replace(job, precision="fp16")),
        engine_key("a", "1.7", replace(job, workspace_bytes=1)),
    }
    assert len(keys) == 7
    assert engine_key("a", "1.7", job) in keys


@pytest.mark.parametrize("damage", ["engine", "sidecar"])
def test_a_damaged_cache_entry_is_built_anew(
    built: EngineRecord, residual_file: Path, tmp_path: Path, damage: str
) -> None:
    cache = tmp_path / "cache"
    cache.mkdir()
    entry = cache / f"{built.key}.plan"
    entry.write_bytes(Path(built.path).read_bytes() + (b"x" if damage == "engine" else b""))
    text = sidecar_of(Path(built.path)).read_text()
    sidecar_of(entry).write_text(text if damage == "engine" else text[:40])
    again = build_engine(residual_file, tmp_path / "e.plan", target="SM86", profiles=PROFILE, cache=cache)
    assert not again.cached
    assert read_sidecar(entry).sha256 == again.sha256


def test_progress_runs_to_the_end(built: EngineRecord, residual_file: Path, tmp_path: Path) -> None:
    shares: list[float] = []
    build_engine(
        residual_file,
        tmp_path / "e.plan",
        target="rtx",
        profiles=PROFILE,
        progress=lambda phase, share: shares.append(share),
    )
    assert len(shares) > 2
    assert shares == sorted(shares)
    assert shares[-1] == 1.0


@rtx
def test_failures_carry_the_builders_reason_and_leave_nothing(residual_file: Path, tmp_path: Path) -> None:
    with pytest.raises(EngineError, match=r"e\.plan can't be built: .*missing dimensions in profile"):
        build_engine(residual_file, tmp_path / "e.plan", target="SM86", profiles={})
    (tmp_path / "bad.onnx").write_bytes(b"hello")
    with pytest.raises(EngineError, match="holds no network"):
        build_engine(tmp_path / "bad.onnx", tmp_path / "e.plan", target="SM86", profiles=PROFILE)
    with pytest.raises(ModelError, match="no ONNX file"):
        build_engine(tmp_path / "gone.onnx", tmp_path / "e.plan", target="SM86", profiles=PROFILE)
    assert [p.name for p in tmp_path.iterdir()] == ["bad.onnx"]


def test_a_changed_engine_is_not_its_sidecars(built: EngineRecord, tmp_path: Path) -> None:
    copy = tmp_path / "e.plan"
    copy.write_bytes(Path(built.path).read_bytes()[:-1])
    sidecar_of(copy).write_text(sidecar_of(Path(built.path)).read_text())
    with pytest.raises(EngineError, match="sha256 differs"):
        read_sidecar(copy)


def test_old_tensorrt_needs_builder_flags_and_new_does_not() -> None:
    assert not tensorrt.is_strongly_typed("tensorrt", "10.3.0")
    assert tensorrt.is_strongly_typed("tensorrt", "10.12.0.36")
    assert tensorrt.is_strongly_typed("tensorrt", "11.4.0")
    assert tensorrt.is_strongly_typed("tensorrt_rtx", "1.7.1.116")


def test_a_recipe_is_plain_json_that_names_the_library() -> None:
    recipe = build_recipe("orin", model="m.onnx", profiles=PROFILE, precision="fp16")
    assert json.loads(json.dumps(recipe)) == recipe
    assert recipe["libraries"] == ["tensorrt"]
    assert recipe["profiles"]["input"] == [[1, 3, 16, 16], [1, 3, 16, 16], [8, 3, 16, 16]]
