"""A sweep: one run for each figure, below one folder; what they share is found once, and one page shows them all."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import compressor
from compressor import pipeline
from compressor.budgets import SLACK
from compressor.device.bundle import verify_bundle
from compressor.errors import BudgetError, FolderError, GateError, RecipeError
from compressor.inputs.images import Images
from compressor.recipe import make_recipe
from compressor.sweeping import recipes_of, require_free

pytestmark = [pytest.mark.usefixtures("short_runs"), pytest.mark.thorough]

QUICK: dict[str, Any] = {
    "criterion": "l1",
    "multiple": 1,
    "targets": "",
    "runtimes": "onnxruntime",
    "latency_batches": 1,
    "latency_seconds": 0.0,
    "max_accuracy_loss": 100,
    "finetune_epochs": 0,
    "batch_size": 8,
    "budget": "macs 0.7,0.5",
}


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(3, 24, 3), nn.ReLU(), nn.Conv2d(24, 24, 3), nn.ReLU())
        self.head = nn.Linear(24, 4)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.layers(x).mean((2, 3)))
        return out


def _model() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Small().eval()


Swept = tuple[compressor.Sweep, list[str]]
Sweeping = Callable[..., Swept]


@pytest.fixture(scope="module")
def sweeping(images: Images, short_runs: None) -> Sweeping:
    def swept(out: Path, **more: Any) -> Swept:
        said: list[str] = []

        def notify(stage: str, share: float) -> None:
            said.append(stage)

        return compressor.compress(_model(), images, out=out, notify=notify, **{**QUICK, **more}), said

    return swept


@pytest.fixture(scope="module")
def swept(sweeping: Sweeping, tmp_path_factory: pytest.TempPathFactory) -> Swept:
    return sweeping(tmp_path_factory.mktemp("runs") / "sweep")


def test_every_figure_is_a_run_in_a_folder_of_its_own(swept: Swept) -> None:
    sweep, _ = swept
    assert [run.folder for run in sweep.runs] == [sweep.folder / "macs-0.7", sweep.folder / "macs-0.5"]
    for run, share in zip(sweep.runs, (0.7, 0.5), strict=True):
        assert (1 - 2 * SLACK) * share <= run.summary["macs_kept"] <= share
        assert run.recipe.budget == f"macs {share}"
        assert verify_bundle(run.folder / "bundle").passed
        assert sum(p.numel() for p in run.network().parameters()) == run.summary["params_shipped"]


def test_what_the_runs_share_is_found_once(swept: Swept) -> None:
    sweep, said = swept
    costs = [run.summary["stages"] for run in sweep.runs]
    shared = ["groups", "scores-1", "measured-1"]
    assert [name for name in shared if costs[0][name]["reused"]] == []
    assert [name for name, cost in costs[1].items() if cost["reused"]] == shared
    assert said.count("measured-1 (done before)") == 1


def test_one_page_shows_all_runs_and_names_their_bundles(swept: Swept) -> None:
    sweep, _ = swept
    content = json.loads((sweep.folder / "sweep.json").read_text())
    assert content == {"schema": "sweep/1", **sweep.summary}
    assert [row["budget"] for row in content["points"]] == ["macs 0.7", "macs 0.5"]
    assert content["dense"]["macs"] > content["points"][0]["macs"] > content["points"][1]["macs"]
    assert all(row["latency_ms"]["onnxruntime"]["1"] > 0 for row in content["points"])
    page, text = (sweep.folder / "sweep.html").read_text(), (sweep.folder / "sweep.md").read_text()
    for folder in ("macs-0.7/bundle", "macs-0.5/bundle"):
        assert folder in page
        assert folder in text
    assert page.count("<img src=") == 3  # over MACs, size and latency


def test_the_same_again_does_nothing_again_and_another_figure_is_one_more_run(swept: Swept, sweeping: Sweeping) -> None:
    sweep, _ = swept
    again, said = sweeping(sweep.folder)
    assert [line for line in said if not line.endswith("(done before)")] == []
    assert again.summary["points"] == sweep.summary["points"]
    more, _ = sweeping(sweep.folder, budget="macs 0.7,0.5,0.6")
    assert [all(cost["reused"] for cost in run.summary["stages"].values()) for run in more.runs] == [True, True, False]
    assert more.runs[2].summary["stages"]["measured-1"]["reused"]


def test_a_run_that_ends_early_is_a_row_with_its_reason(sweeping: Sweeping, tmp_path: Path) -> None:
    sweep, _ = sweeping(tmp_path / "sweep", budget="macs 0.001,0.6", normalisation="mean")
    assert [run.recipe.budget for run in sweep.runs] == ["macs 0.6"]
    first, second = sweep.summary["points"]
    assert "can't be met" in first["failure"]
    assert (second["failure"], sweep.summary["failed"]) == ("", ["macs 0.001"])
    assert "macs 0.001 came to no bundle: budget 'macs 0.001' can't be met" in (sweep.folder / "sweep.md").read_text()
    assert "macs 0.001 came to no bundle" in (sweep.folder / "sweep.html").read_text()


@pytest.mark.slow
def test_where_no_run_is_left_the_first_ones_error_is_raised(sweeping: Sweeping, tmp_path: Path) -> None:
    with pytest.raises(BudgetError, match=r"budget 'macs 0\.001'"):
        sweeping(tmp_path / "sweep", budget="macs 0.001,0.002")
    with pytest.raises(GateError):
        sweeping(tmp_path / "gated", normalisation="mean", max_accuracy_loss=-100, evaluation=0.5)


def test_the_folder_of_a_run_is_none_of_a_sweep(swept: Swept, tmp_path: Path) -> None:
    sweep, _ = swept
    for out in (sweep.folder, sweep.folder / "macs-0.7", tmp_path):
        recipe = make_recipe({"budget": "macs 0.3,0.4", "out": out})
        (tmp_path / "notes.txt").write_text("mine")
        if out == sweep.folder:
            require_free(recipe, recipes_of(recipe))
            continue
        with pytest.raises(FolderError, match="give another --out"):
            require_free(recipe, recipes_of(recipe))


def test_one_run_takes_one_point(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="is a sweep of 2 runs"):
        pipeline.run(make_recipe({"budget": "macs 0.7,0.5", "out": tmp_path / "run"}))
    alone = make_recipe({"out": tmp_path / "run"})
    assert recipes_of(alone) == (alone,)
    latency = make_recipe({"budget": "latency 8 ms, 30 fps on onnxruntime threads 1", "out": "x"})
    assert [point.out for point in recipes_of(latency)] == ["x/latency-8-ms", "x/30-fps"]
