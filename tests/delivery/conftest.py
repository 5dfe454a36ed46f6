"""One small run with every precision, made once: two blocks with a residual sum on four brightnesses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import compressor
from compressor.inputs.images import Images

QUICK: dict[str, Any] = {
    "criterion": "l1",
    "multiple": 1,
    "per_cost": 0.0,
    "reduction": "mean",
    "targets": "",
    "latency_batches": "1",
    "latency_seconds": 0.0,
    "runtimes": "onnxruntime",
    "max_accuracy_loss": 100,
    "max_int8_loss": 30.0,
    "finetune_epochs": 0,
    "normalisation": "mean",
    "batch_size": 8,
    "budget": "macs 0.6",
}


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.inner = nn.Conv2d(16, 96, 1, bias=False)
        self.outer = nn.Conv2d(96, 16, 1)  # many channels: fine steps to a budget
        self.norm = nn.BatchNorm2d(96)
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        x = x + self.outer(self.norm(self.inner(x)).relu())
        return self.head(x.mean((2, 3)))


@pytest.fixture(scope="session")
def small() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Small().eval()


Shorten = Callable[[pytest.MonkeyPatch], None]
Compress = Callable[..., compressor.Run]


@pytest.fixture(scope="session")
def compress(small: nn.Module, images: Images) -> Compress:
    return lambda out, **more: compressor.compress(small, images, out=str(out), **{**QUICK, **more})


@pytest.fixture
def short_run(
    run: compressor.Run, shorten: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Runs of the test in their short form; the shared one draws, and times in processes of their own."""
    shorten(monkeypatch)


@pytest.fixture(scope="session")
def run(compress: Compress, tmp_path_factory: pytest.TempPathFactory) -> compressor.Run:
    """All precisions; asking for int8 brings fp16 along. One target, so that TensorRT's form is made too."""
    return compress(tmp_path_factory.mktemp("runs") / "whole", precisions="int8", targets="SM86")
