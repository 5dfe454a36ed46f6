"""`blocks = "drop"` through a whole run: blocks go, then units; the network is rebuilt, continued, trained on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import compressor
from compressor.budgets import Budget
from compressor.choices import Choices, Scoring
from compressor.device.bundle import verify_bundle
from compressor.errors import BudgetError, RecipeError
from compressor.files import read_record
from compressor.graph.cost import measure_cost
from compressor.planning import RankingOptions
from compressor.recipe import Recipe
from compressor.records import Depth
from compressor.rounds import choose_depth, make_prunable

pytestmark = [pytest.mark.usefixtures("short_runs"), pytest.mark.thorough]
RECIPE: dict[str, Any] = {
    "criterion": "l1",
    "multiple": 1,
    "targets": "",
    "latency_batches": "1",
    "latency_seconds": 0.0,
    "max_accuracy_loss": 100,
    "finetune_epochs": 1,
    "recovery_minutes": 0.02,
    "batch_size": 8,
    "blocks": "drop",
    "budget": "macs 0.5",
    "size": 16,
    "mean": (0.5, 0.5, 0.5),
    "std": (0.5, 0.5, 0.5),
}


class Faint(nn.Module):
    """A stem, four residual blocks of which two do next to nothing, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16)) for _ in range(4)
        )
        self.scales = (1.0, 1e-3, 1.0, 1e-3)
        self.head = nn.Linear(16, 4)

    def forward(self, images: Tensor) -> Tensor:
        x = self.stem(images).relu()
        for block, scale in zip(self.blocks, self.scales, strict=True):
            x = (x + scale * block(x)).relu()
        return self.head(x.mean((2, 3)))


def faint() -> nn.Module:
    torch.manual_seed(0)
    return Faint().eval()


def pictures(count: int = 48) -> tuple[np.ndarray, np.ndarray]:
    numbers = np.random.default_rng(0)
    return numbers.integers(0, 256, (count, 16, 16, 3), dtype=np.uint8), np.arange(count) % 4


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> compressor.Run:
    out = tmp_path_factory.mktemp("blocks") / "run"
    return compressor.compress(faint(), pictures(), out=out, **RECIPE)


def test_blocks_that_do_little_go_and_the_budget_holds(run: compressor.Run) -> None:
    depth = read_record(run.folder / "depth.json", Depth)
    assert {branch.layer for branch in depth.gone} <= {"blocks.1.0", "blocks.3.0"}
    assert run.summary["blocks_dropped"] == depth.taken > 0
    assert run.summary["macs_shipped"] <= 0.5 * run.summary["macs_dense"]
    verify_bundle(run.folder / "bundle")


def test_the_network_is_rebuilt_without_them(run: compressor.Run) -> None:
    network = run.network()
    assert measure_cost(network).macs == run.summary["macs_shipped"]
    names = {name for name, _ in network.named_parameters()}
    gone = {branch.layer for branch in read_record(run.folder / "depth.json", Depth).gone}
    assert not any(name.startswith(tuple(gone)) for name in names)


def test_the_report_names_them(run: compressor.Run) -> None:
    text = (run.folder / "report.md").read_text()
    assert "went whole; of what was left" in text
    assert "Blocks that went whole" in text


def test_the_same_command_goes_on(run: compressor.Run) -> None:
    heard: list[str] = []
    again = compressor.compress(
        faint(), pictures(), out=run.folder, notify=lambda stage, share: heard.append(stage), **RECIPE
    )
    assert again.summary["macs_shipped"] == run.summary["macs_shipped"]
    assert "depth (done before)" in heard
    assert "repair-1 (done before)" in heard


def test_weights_of_another_training_ship_in_it(run: compressor.Run, tmp_path: Path) -> None:
    trained = run.network()
    with torch.no_grad():
        for parameter in trained.parameters():
            parameter.mul_(1.01)
    shipped = run.ship(trained, out=tmp_path / "trained")
    assert shipped.summary["blocks_dropped"] == run.summary["blocks_dropped"]
    image = torch.randn(1, 3, 16, 16)
    torch.testing.assert_close(shipped.network()(image), trained.eval()(image))


def test_masks_of_blocks_that_may_go_are_refused() -> None:
    with pytest.raises(RecipeError, match="isp"):
        Recipe(criterion="isp", blocks="drop")


def labelled(count: int = 32) -> list[tuple[Tensor, Tensor]]:
    images = torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    return [(part, torch.zeros(len(part), dtype=torch.int64)) for part in images.split(8)]


def test_a_depth_that_no_plan_reaches_is_passed_over() -> None:
    """Nine tenths of every group stay, so the budget needs a block to go."""
    dense = make_prunable(faint(), labelled()[0][0])
    choices = Choices(scoring=Scoring("l1", measured=False), ranking=RankingOptions(least=0.9, multiple=1))
    depth = choose_depth(dense, Budget("macs", 0.7), labelled(), images=labelled()[0][0], choices=choices)
    assert depth.errors[0] == 1e6
    assert depth.taken > 0


def test_a_budget_beyond_all_of_them_is_refused() -> None:
    dense = make_prunable(faint(), labelled()[0][0])
    choices = Choices(scoring=Scoring("l1", measured=False), ranking=RankingOptions(least=0.95))
    with pytest.raises(BudgetError, match="macs"):
        choose_depth(dense, Budget("macs", 0.02), labelled(), images=labelled()[0][0], choices=choices)
