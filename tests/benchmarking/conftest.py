"""A user's own module, compressed with three precisions: a place that can be benchmarked on its own."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import compressor

from ..conftest import Shortened

MODEL = """
import torch
from torch import nn

def build():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 96, 1), nn.ReLU(), nn.Conv2d(96, 16, 1),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 6),
    )
"""


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("user")
    (place / "model.py").write_text(MODEL)
    generator, labels = np.random.default_rng(0), np.arange(48) % 6
    pixels = generator.integers(0, 50, (48, 12, 12, 3)) + 40 * labels[:, None, None, None]
    np.savez(place / "images.npz", images=pixels.astype(np.uint8), labels=labels)
    return place


@pytest.fixture(scope="session")
def run(folder: Path, shorten: Shortened) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        shorten(patch)
        _compress(folder)
    return folder / "run"


def _compress(folder: Path) -> None:
    compressor.compress(
        f"{folder / 'model.py'}:build",
        str(folder / "images.npz"),
        out=str(folder / "run"),
        size=12,
        mean="0.5,0.5,0.5",
        std="0.5,0.5,0.5",
        criterion="l1",
        multiple=1,
        budget="macs 0.6",
        precisions="fp32,int8",
        targets="",
        runtimes="onnxruntime",
        latency_batches=1,
        latency_seconds=0.0,
        max_accuracy_loss=100,
        max_int8_loss=50,
        finetune_epochs=0,
        normalisation="mean",
    )
