"""The whole command under `torchrun`: the plan and the files of one process, also where one of two is killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import compressor
from compressor.__main__ import main
from compressor.files import file_sha256

MODEL = """
from torch import nn


def tiny():
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4),
    )
"""
RECIPE: dict[str, Any] = {
    "calibration": 48,
    "evaluation": 0.2,
    "batch_size": 8,
    "size": 12,
    "mean": (0.5, 0.5, 0.5),
    "std": (0.25, 0.25, 0.25),
    "targets": (),
    "precisions": ("fp32",),
    "runtimes": ("onnxruntime",),
    "latency_batches": (1,),
    "latency_seconds": 0.02,
    "recovery_minutes": 5.0,
    "finetune_epochs": 40,
    "max_accuracy_loss": 100.0,
    "multiple": 1,
}
SAME = ("plan.json", "stages/repaired-1.safetensors")


def flags(fields: dict[str, Any]) -> list[str]:
    """The recipe as it is typed."""
    typed = []
    for name, value in fields.items():
        text = ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
        typed.append(f"--{name.replace('_', '-')}={text}")
    return typed


@pytest.fixture
def given(tmp_path: Path) -> dict[str, Any]:
    """A model in a file, images and a recipe."""
    (tmp_path / "net.py").write_text(MODEL)
    generator = np.random.default_rng(0)
    images = generator.integers(0, 256, (160, 12, 12, 3), dtype=np.uint8)
    np.savez(tmp_path / "images.npz", images=images, labels=np.arange(160) % 4)
    return {**RECIPE, "model": f"{tmp_path}/net.py:tiny", "data": str(tmp_path / "images.npz")}


def process_of(rank: int, launcher: int) -> int:
    """The process of that number which a launcher has started."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            is_child = f"\nPPid:\t{launcher}\n" in (folder / "status").read_text()
            environment = (folder / "environ").read_bytes().split(b"\0")
        except OSError:
            continue
        if is_child and f"RANK={rank}".encode() in environment:
            return int(folder.name)
    raise AssertionError("no such process")


@pytest.mark.thorough
@pytest.mark.skipif(not Path("/proc/self/environ").is_file(), reason="processes are found by /proc, which is not here")
def test_one_of_two_processes_is_killed_and_the_run_is_that_of_one(given: dict[str, Any], tmp_path: Path) -> None:
    alone, together = tmp_path / "alone", tmp_path / "together"
    compressor.compress(**given, out=str(alone))

    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=2"]
    command = [*launcher, "-m", "compressor", "compress", *flags({**given, "out": together})]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    latest = time.monotonic() + 240
    while not (together / "stages" / "measured-1.json").is_file():
        assert process.poll() is None, process.communicate()[1][-2000:]
        assert time.monotonic() < latest
        time.sleep(0.02)
    os.kill(process_of(1, process.pid), signal.SIGKILL)
    out, said = process.communicate(timeout=400)
    assert process.returncode == 0, said[-3000:]
    assert "(done before)" in said
    last = json.loads(out.strip().splitlines()[-1])
    assert last["run_dir"] == str(together)
    assert out.count('"run_dir"') == 1
    for name in SAME:
        assert file_sha256(alone / name) == file_sha256(together / name), name
    verified = subprocess.run([sys.executable, "-m", "compressor", "verify", str(together / "bundle")], check=False)
    assert verified.returncode == 0


@pytest.mark.parametrize("arguments", [["compress", "--budget", "macs 0.7,0.5"], ["search"], ["list", "criteria"]])
def test_what_one_process_does_is_refused_under_torchrun(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    assert main(arguments) == 2
    assert "is one process's work; torchrun is for `compress` at one budget" in capsys.readouterr().err
