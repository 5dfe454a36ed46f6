"""A search goes by the task's quality: masks, no labels, a user's own measure, several inputs."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import compressor
from compressor.errors import CompressorError

pytestmark = pytest.mark.thorough

QUICK: dict[str, Any] = {
    "calibration": 16,
    "evaluation": 0.2,
    "batch_size": 8,
    "multiple": 1,
    "trials": 2,
    "search_images": 24,
    "trial_images": 24,
    "budgets": (0.6,),
    "families": ("l1",),
    "criterion": "l1",
    "normalisation": "mean",
}


def segmenter() -> nn.Module:
    torch.manual_seed(0)
    body = [nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU()]
    return nn.Sequential(*body, nn.Conv2d(8, 4, 1)).eval()


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.image, self.depth = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(1, 8, 3, padding=1)
        self.mix, self.head = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 1, 1)

    def forward(self, image: Tensor, depth: Tensor) -> dict[str, Tensor]:
        x = self.mix(self.image(image).relu() + self.depth(depth).relu()).relu()
        return {"height": self.head(x), "mean": x.mean((2, 3))}


def images(count: int = 60) -> Tensor:
    return torch.randn(count, 3, 12, 12, generator=torch.Generator().manual_seed(1))


def searched(model: nn.Module, data: object, folder: Path, **options: Any) -> dict[str, Any]:
    """What search.json holds."""
    compressor.search(model, data, out=str(folder), **QUICK, **options)
    content: dict[str, Any] = json.loads((folder / "search.json").read_text())
    return content


def test_masks_are_judged_by_mean_iou(tmp_path: Path) -> None:
    model = segmenter()
    with torch.no_grad():
        masks = model(images()).argmax(1)  # the dense network is right everywhere
    content = searched(model, (images(), masks), tmp_path)
    assert (content["task"], content["metric"]) == ("segmentation", "mIoU")
    assert content["dense"]["search"] == pytest.approx(1.0)
    assert 0 < content["area"]["search"] <= 1
    assert "mIoU in %" in (tmp_path / "search.md").read_text()


def test_without_labels_the_dense_network_judges(tmp_path: Path) -> None:
    content = searched(segmenter(), images(), tmp_path)
    assert content["task"] == "segmentation"
    assert content["dense"]["search"] == pytest.approx(1.0)


def test_a_users_own_quality_with_two_inputs_decides(tmp_path: Path) -> None:
    def loudness(predict: Any, data: Iterable[Any]) -> float:
        return sum(float(predict(inputs)["height"].square().sum()) for inputs, _ in data)

    depth = torch.randn(60, 1, 12, 12, generator=torch.Generator().manual_seed(2))
    content = searched(Two().eval(), (images(), depth), tmp_path, task="any", quality=loudness)
    assert content["metric"] == "loudness"
    assert content["dense"]["search"] > 1  # no share
    assert "%" not in (tmp_path / "search.md").read_text().partition("## The best recipe")[0]


def test_a_quality_that_says_nothing_ends_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(CompressorError, match="quality"):
        searched(segmenter(), images(), tmp_path / "run", quality=lambda predict, data: float("nan"))
    assert not (tmp_path / "run" / "best.toml").exists()
