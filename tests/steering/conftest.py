"""Four small networks with every kind of unit: residual streams, depthwise channels, neurons, heads and windows."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache

import torch
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, fx, nn
from torchvision.models.mobilenetv2 import InvertedResidual
from torchvision.models.resnet import BasicBlock

from compressor.graph import trace
from compressor.pruning import Structure, find_structure

PX, CLASSES = 16, 5


def resnet() -> nn.Module:
    stem = [nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2)]
    shortcut = nn.Sequential(nn.Conv2d(8, 12, 1, stride=2, bias=False), nn.BatchNorm2d(12))
    blocks = [BasicBlock(8, 8), BasicBlock(8, 12, 2, shortcut)]
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, CLASSES))


def depthwise() -> nn.Module:
    blocks = [InvertedResidual(8, 8, 1, 2), InvertedResidual(8, 12, 2, 3)]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, CLASSES)]
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), *blocks, *head)


def vit() -> nn.Module:
    return VisionTransformer(img_size=PX, patch_size=4, embed_dim=16, depth=2, num_heads=4, num_classes=CLASSES)


def swin() -> nn.Module:
    return SwinTransformer(
        img_size=PX, patch_size=2, embed_dim=8, depths=(1, 2), num_heads=(2, 4), window_size=4, num_classes=CLASSES
    )


class Grouped(nn.Module):
    """Convolution groups, and a layer that writes the stream that it reads."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 12, 3, padding=1)
        self.same = nn.Conv2d(12, 12, 3, padding=1)
        self.grouped = nn.Conv2d(12, 12, 3, padding=1, groups=3)
        self.out = nn.Linear(12, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        x = x + self.same(x)
        pooled: Tensor = self.out(self.grouped(x).relu().mean((2, 3)))
        return pooled


class Normed(nn.Module):
    """Normalisations and a mean over units."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.first = nn.Conv2d(3, 12, 3, padding=1), nn.GroupNorm(1, 12)
        self.same, self.second = nn.Conv2d(12, 12, 3, padding=1), nn.GroupNorm(3, 12)
        self.third = nn.RMSNorm(12)
        self.out = nn.Linear(12, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(self.stem(x)).relu()
        x = x + self.second(self.same(x)).relu()
        x = x * x.mean(1, keepdim=True).sigmoid()
        answer: Tensor = self.out(self.third(x.mean((2, 3))))
        return answer


BUILDERS: Mapping[str, Callable[[], nn.Module]] = {
    "resnet": resnet,
    "depthwise": depthwise,
    "vit": vit,
    "swin": swin,
    "grouped": Grouped,
    "normed": Normed,
}


@dataclass(frozen=True)
class Subject:
    """A traced network in float64 whose channels all differ, and its units."""

    graph: fx.GraphModule
    structure: Structure
    images: Tensor


@cache
def subject_of(name: str) -> Subject:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = BUILDERS[name]().double().eval()
        images = torch.randn(4, 3, PX, PX, dtype=torch.float64)
        with torch.no_grad():
            for key, tensor in [*model.named_parameters(), *model.named_buffers()]:
                if tensor.is_floating_point():
                    low = 0.5 if "var" in key.rsplit(".", 1)[-1] else -0.3
                    tensor.copy_(torch.rand(tensor.shape) + low)
    graph = trace(model, images[:2])
    return Subject(graph, find_structure(graph, images[:2]), images)
