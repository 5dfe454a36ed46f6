"""Small networks of every construction the exporter must carry over exactly."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from compressor.export.onnx import export_onnx
from compressor.graph import trace

SIZE = 16


class Residual(nn.Module):
    """Convolutions with batch norms that have statistics of their own, a strided projection, a depthwise."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.depthwise = nn.Sequential(nn.Conv2d(8, 8, 3, 2, 1, groups=8, bias=False), nn.BatchNorm2d(8), nn.ReLU6())
        self.pointwise = nn.Sequential(nn.Conv2d(8, 12, 1, bias=False), nn.BatchNorm2d(12))
        self.projection = nn.Sequential(nn.Conv2d(8, 12, 1, 2, bias=False), nn.BatchNorm2d(12))
        self.dropout = nn.Dropout(0.5)
        self.head = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = torch.relu(self.pointwise(self.depthwise(x)) + self.projection(x))
        return self.head(self.dropout(x.mean((2, 3))))


class Attentive(nn.Module):
    """Patches, class token, two-head attention with a fused qkv, GELU, layer norms, a gather of the token."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 12, 8, 8)
        self.token = nn.Parameter(torch.randn(1, 1, 12))
        self.norm = nn.LayerNorm(12)
        self.qkv, self.out = nn.Linear(12, 36), nn.Linear(12, 12)
        self.mlp = nn.Sequential(nn.LayerNorm(12), nn.Linear(12, 20), nn.GELU(), nn.Linear(20, 12))
        self.head = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1)
        q, k, v = self.qkv(self.norm(x)).reshape(x.shape[0], -1, 3, 2, 6).permute(2, 0, 3, 1, 4)
        attended = nn.functional.scaled_dot_product_attention(q, k, v)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        return self.head((x + self.mlp(x))[:, 0])


def seeded(build: Callable[[], nn.Module]) -> nn.Module:
    """Weights and statistics away from their neutral start, or a lost bias or norm would go unseen."""
    torch.manual_seed(0)
    model = build().eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, std=0.3)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter, std=0.3)
    return model


@pytest.fixture(scope="session")
def residual() -> nn.Module:
    return seeded(Residual)


@pytest.fixture(scope="session")
def attentive() -> nn.Module:
    return seeded(Attentive)


@pytest.fixture(scope="session")
def residual_file(residual: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("residual") / "model.onnx"
    return export_onnx(residual, torch.zeros(2, 3, SIZE, SIZE), path, metadata={"labels": "a,b"})


@pytest.fixture(scope="session")
def attentive_file(attentive: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("attentive") / "model.onnx"
    return export_onnx(trace(attentive, torch.zeros(2, 3, SIZE, SIZE)), torch.zeros(1, 3, SIZE, SIZE), path)


@pytest.fixture(scope="session")
def images() -> NDArray[np.float32]:
    return np.random.default_rng(0).standard_normal((6, 3, SIZE, SIZE)).astype(np.float32)
