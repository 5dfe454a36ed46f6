"""Which engines are taken on a made-up GPU with a made-up library: of this architecture and this version alone."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from compressor import device
from compressor.device import cuda, tensorrt
from compressor.device.built import write_check
from compressor.device.bundle import Manifest, ModelFile, write_bundle
from compressor.device.parity import compare

from .conftest import PREPROCESSING, Command, small_model, small_outputs
from .test_attacks import MODEL, QUICK, plant

HERE, VERSION = "SM86", "10.3"  # `plant` says that an engine is of this version
PLAN = "engines/x.plan"

Gpu = Callable[[str], None]


@pytest.fixture
def gpu(engines_run: None, monkeypatch: pytest.MonkeyPatch) -> Gpu:
    """Makes this machine's GPU one of that architecture."""

    def of(capability: str) -> None:
        monkeypatch.setattr(cuda, "device", lambda: ("a GPU", capability))

    monkeypatch.setattr(cuda, "unavailable", lambda: "")
    monkeypatch.setattr(tensorrt, "version_here", lambda library: VERSION)
    of(HERE)
    return of


def checked(bundle: Path, images: NDArray[np.float32], **changed: str) -> Path:
    """An engine that was built in the bundle and passed its golden outputs on the GPU that is here now."""
    path = plant(bundle, **changed)
    write_check(path, compare(images[:, :, 0, 0], images[:, :, 0, 0]))
    return path


def test_an_engine_of_this_gpu_and_library_is_taken(bundle: Path, images: NDArray[np.float32], gpu: Gpu) -> None:
    path = checked(bundle, images)
    model = device.load(bundle)
    assert (model.session.path, model.unused) == (str(path), ())


@pytest.mark.parametrize(
    ("version", "moved_to", "words"),
    [
        ("10.2", HERE, "it was built by tensorrt 10.2, 10.3 is installed; run `compressor build` on the bundle again"),
        (VERSION, "SM87", "it was checked on a GPU of SM86, this one is SM87; run `compressor build` on the bundle"),
    ],
)
def test_an_engine_of_another_gpu_or_library_is_left_out_with_its_reason(
    bundle: Path,
    images: NDArray[np.float32],
    image: Path,
    gpu: Gpu,
    command: Command,
    version: str,
    moved_to: str,
    words: str,
) -> None:
    checked(bundle, images, library_version=version)
    gpu(moved_to)
    model = device.load(bundle)
    assert model.session.path.endswith(MODEL)
    (line,) = model.unused
    assert line.startswith(f"built/x.plan is not used: {words}")
    assert command("run", bundle, image).err.startswith(f"note: {line}")
    assert words in command("verify", bundle).out
    timed = command("benchmark", bundle, *QUICK, "--runtime", "onnxruntime", "--json")
    assert words in json.loads(timed.out)["not_run"]["built/x.plan"]


@pytest.mark.parametrize("target", [HERE, "SM87"])
def test_of_shipped_engines_the_one_for_this_gpu_is_taken(
    tmp_path: Path, model_file: Path, images: NDArray[np.float32], gpu: Gpu, command: Command, target: str
) -> None:
    models = (ModelFile(PLAN, library="tensorrt", target=target), ModelFile(MODEL))
    files = {PLAN: model_file, MODEL: model_file}
    outputs = small_outputs(small_model(), images).astype(np.float32)
    manifest = Manifest("small", models, PREPROCESSING)
    bundle = write_bundle(tmp_path / "b", files, manifest=manifest, golden_inputs=images, golden_outputs=outputs)
    model = device.load(bundle)
    if target == HERE:
        assert (model.session.path.endswith(PLAN), model.unused) == (True, ())
        return
    reason = "built for SM87, this GPU (a GPU) is SM86; `compressor build` makes one for it"
    assert (model.session.path.endswith(MODEL), model.unused) == (True, (f"{PLAN} is not used: {reason}",))
    assert f"{PLAN}: built, not run: {reason}" in command("verify", bundle).out
