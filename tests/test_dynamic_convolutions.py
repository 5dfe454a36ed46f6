"""The whole job for networks that compute their kernels for each image: files of every precision, gates and bundle."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import compressor

PX, IMAGES = 32, 40


class Mixed(nn.Module):
    """Experts of a pointwise kernel, of a grouped one, and of a depthwise one in strides, padded in front of it."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.route, self.norm = nn.Conv2d(3, 16, 3, 2, 1), nn.Linear(16, 3), nn.BatchNorm2d(24)
        self.point = nn.Parameter(torch.randn(3, 24 * 16) * 0.2)
        self.grouped = nn.Parameter(torch.randn(3, 24 * 6 * 9) * 0.1)
        self.depthwise = nn.Parameter(torch.randn(3, 24 * 16) * 0.2)
        self.b, self.head = nn.Conv2d(24, 20, 3, 2, 1), nn.Linear(20, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.a(x))
        n, _, h, w = y.shape
        routing = self.route(y.mean((2, 3))).sigmoid()
        y = F.conv2d(y.reshape(1, -1, h, w), (routing @ self.point).view(-1, 16, 1, 1), groups=n)
        y = F.relu(self.norm(y.view(n, 24, h, w)))
        kernels = (routing @ self.grouped).view(-1, 6, 3, 3)
        y = F.relu(F.conv2d(y.reshape(1, -1, h, w), kernels, padding=1, groups=4 * n).view(n, 24, h, w))
        folded, kernels = F.pad(y.reshape(1, -1, h, w), (1, 2, 1, 2)), (routing @ self.depthwise).view(-1, 1, 4, 4)
        y = F.conv2d(folded, kernels, stride=2, groups=24 * n).view(n, 24, h // 2, w // 2)
        return self.head(F.relu(self.b(F.relu(y))).mean((2, 3)))  # type: ignore[no-any-return]


@pytest.mark.slow
def test_the_default_job_holds_for_dynamic_convolutions(tmp_path: Path) -> None:
    torch.manual_seed(0)
    images = np.random.default_rng(0).standard_normal((IMAGES, 3, PX, PX)).astype(np.float32)
    run = compressor.compress(
        Mixed().eval(),
        (images, np.arange(IMAGES) % 2),
        out=str(tmp_path / "run"),
        budget="macs 0.5",
        calibration=24,
        evaluation=0.3,
        finetune_epochs=0,
        precisions=("fp32", "int8"),
        runtimes=("onnxruntime",),
        latency_batches=(1,),
        latency_seconds=0.05,
        max_accuracy_loss=100.0,
        max_int8_loss=100.0,
    )
    assert run.summary["macs_shipped"] <= 0.5 * run.summary["macs_dense"]
    assert (run.folder / "bundle" / "manifest.json").is_file()
