"""A finished run's folder, damaged: a continued run names the file, does that stage again and ends as it was."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import compressor
from compressor.benchmarking import open_place
from compressor.device.bundle import verify_bundle
from compressor.errors import FolderError
from compressor.inputs.images import Images
from compressor.report.shipped import devices_in, show_devices
from compressor.run import saved

QUICK: dict[str, Any] = {
    "criterion": "l1",
    "multiple": 1,
    "reduction": "mean",
    "per_cost": 0.0,
    "normalisation": "mean",
    "targets": "",
    "runtimes": "onnxruntime",
    "latency_batches": "1",
    "latency_seconds": 0.0,
    "max_accuracy_loss": 100,
    "finetune_epochs": 0,
    "batch_size": 8,
    "budget": "macs 0.6",
}
RESULTS = ("weights.safetensors", "model.onnx", "dense.onnx", "network.json", "plan.json", "accuracy.json")


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.inner = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 96, 1)
        self.outer, self.head = nn.Conv2d(96, 16, 1), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        return self.head((x + self.outer(self.inner(x).relu())).mean((2, 3)))


@pytest.fixture(scope="module")
def compress(images: Images, short_runs: None) -> Callable[..., compressor.Run]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Small().eval()
    return lambda out, **more: compressor.compress(model, images, out=str(out), **{**QUICK, **more})


@pytest.fixture(scope="module")
def run(compress: Callable[..., compressor.Run], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compress(tmp_path_factory.mktemp("runs") / "whole").folder


@pytest.fixture
def copy(run: Path, tmp_path: Path) -> Path:
    shutil.copytree(run, tmp_path / "run")
    return tmp_path / "run"


def _hashes(folder: Path) -> dict[str, str]:
    return {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in RESULTS}


def flipped(path: Path) -> None:
    """One bit of the last third, where the numbers are."""
    data = bytearray(path.read_bytes())
    data[2 * len(data) // 3] ^= 0x10
    path.write_bytes(data)


def halved(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def other_digit(path: Path) -> None:
    """The last digit of the file's last number of several."""
    text = path.read_text()
    place = [match.end() - 1 for match in re.finditer(r"\d\d+", text)][-1]
    path.write_text(text[:place] + str((int(text[place]) + 1) % 10) + text[place + 1 :])


def other_key(path: Path) -> None:
    """The innermost keys, so that the schema stays."""
    head, _, rest = path.read_text().partition(",")
    path.write_text(head + "," + re.sub(r'"(\w+)":', r'"\1x":', rest))


WEIGHTS = ("weights.safetensors", "stages/repaired-1.safetensors", "model.onnx", "dense.onnx")
FIGURES = ("accuracy.json", "accuracy-files.json", "parity.json", "latency.json", "layers.json")
RECORDS = ("check.json", "groups.json", "scores-1.json", "repair-1.json")
DAMAGES: dict[str, dict[str, Callable[[Path], None]]] = {
    "a bit or a digit": {
        **dict.fromkeys(WEIGHTS, flipped),
        **dict.fromkeys((*FIGURES, "groups.json"), other_digit),
    },
    "cut": dict.fromkeys((*WEIGHTS, *FIGURES, *RECORDS), halved),
    "other keys": dict.fromkeys((*FIGURES, *RECORDS), other_key),
    "gone": dict.fromkeys((*WEIGHTS, *FIGURES, *RECORDS), Path.unlink),
}
IN_EVERY_RUN = ("a bit or a digit",)  # of the tests: each goes through all stages once more


@pytest.mark.parametrize(
    "kind", [pytest.param(k, marks=[] if k in IN_EVERY_RUN else [pytest.mark.slow]) for k in DAMAGES]
)
def test_damaged_files_are_named_and_made_again_as_they_were(
    run: Path, copy: Path, compress: Callable[..., compressor.Run], kind: str
) -> None:
    for name, damage in DAMAGES[kind].items():
        damage(copy / name)
    said: list[str] = []
    again = compress(copy, notify=lambda stage, share: said.append(stage))
    told = " ".join(line for line in said if "(again: " in line)
    missing = [name for name in DAMAGES[kind] if f"{name} is gone" not in told and f"{name} was changed" not in told]
    assert not missing
    assert _hashes(copy) == _hashes(run)
    assert again.summary["accuracy_shipped"] == json.loads((run / "summary.json").read_text())["accuracy_shipped"]
    assert verify_bundle(copy / "bundle").passed


def test_weights_trained_by_hand_do_not_pass_for_the_runs(copy: Path, run: Path) -> None:
    tensors = saved._read_tensors(copy / "weights.safetensors")
    tensors["head.bias"] += 1
    (copy / "weights.safetensors").write_bytes(saved.safetensors.torch.save(tensors))
    with pytest.raises(FolderError, match=r"weights\.safetensors was changed since it was written .*run the command"):
        saved.load_saved(copy, Small())
    x = torch.randn(2, 3, 12, 12)
    with torch.no_grad():
        assert saved.load_saved(run, Small())(x).shape == (2, 4)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("model.onnx", "model.onnx in .* was changed since it was written"),
        ("dense.onnx", "dense.onnx in .* was changed since it was written"),
        ("network.json", "network.json' was changed since it was written"),
    ],
)
def test_a_benchmark_does_not_measure_a_changed_file(copy: Path, name: str, said: str) -> None:
    (other_digit if name.endswith("json") else flipped)(copy / name)
    with pytest.raises(FolderError, match=said):
        open_place(copy)


@pytest.mark.parametrize("change", ["macs_dense", "precisions", "outside"])
def test_a_summary_that_says_nothing_of_use_is_one_line(copy: Path, change: str) -> None:
    summary = json.loads((copy / "summary.json").read_text())
    if change == "outside":
        summary["precisions"] = {"../../other.onnx": {"precision": "fp32"}}
    else:
        summary[change] = ["of another type"]
    (copy / "summary.json").write_text(json.dumps(summary))
    with pytest.raises(FolderError, match=r"summary\.json"):
        open_place(copy)


def test_a_run_of_a_model_object_is_measured_without_it(run: Path) -> None:
    place = open_place(run)
    assert [f.artifact.name for f in place.files] == ["dense.onnx", "model.onnx"]
    assert place.networks is None
    assert isinstance(place.images, np.ndarray)
    assert place.images.dtype == np.float32


@pytest.mark.thorough
def test_a_finished_run_remembers_the_module_it_was_given(compress: Callable[..., compressor.Run], copy: Path) -> None:
    again = compress(copy)
    x = torch.randn(2, 3, 12, 12)
    with torch.no_grad():
        torch.testing.assert_close(again.network()(x), again.module()(x))
    assert "dense=" not in repr(again)  # a network's many lines


@pytest.mark.thorough
def test_a_run_that_is_made_again_keeps_what_devices_said_of_its_bundle(
    compress: Callable[..., compressor.Run], copy: Path
) -> None:
    show_devices(copy, [{"device": "kitchen", "current": None, "attempt": {"failure": "no link"}}])
    compress(copy)
    assert [report["device"] for report in devices_in(copy)] == ["kitchen"]
    assert "The last attempt on kitchen failed: no link" in (copy / "report.md").read_text()
    (copy / "model.onnx").unlink()  # what ships is made anew, and was not on any device
    compress(copy)
    assert devices_in(copy) == []
