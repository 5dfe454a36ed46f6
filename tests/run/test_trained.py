"""After one's own training: the same plan and the same dense reference, with the weights that the loop left."""

from __future__ import annotations

import argparse
import ast
import copy
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

import compressor
from compressor import pipeline
from compressor.device.bundle import verify_bundle
from compressor.device.runtimes import open_model
from compressor.errors import CompressorError, DataError, FolderError, ModelError, RecipeError
from compressor.graph import trace
from compressor.run.saved import example_of
from compressor.run.trained import state_of, with_trained

PARITY = 1e-4  # float32 sums in another order, on outputs of about 1
QUICK: dict[str, Any] = {
    "criterion": "l1",
    "budget": "macs 0.6",
    "multiple": 1,
    "normalisation": "mean",
    "reduction": "mean",
    "per_cost": 0.0,
    "finetune_epochs": 0,
    "targets": "",
    "runtimes": "onnxruntime",
    "latency_batches": 1,
    "latency_seconds": 0.0,
    "max_accuracy_loss": 100,
    "batch_size": 8,
    "size": 12,
    "mean": (0.5, 0.5, 0.5),
    "std": (0.5, 0.5, 0.5),
}

SOURCE = """
import torch
from torch import nn


class Tiny(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 16, 3, 2, 1), nn.BatchNorm2d(16)
        self.mid, self.drop, self.head = nn.Conv2d(16, 24, 3, 2, 1), nn.Dropout(0.3), nn.Linear(24, 4)

    def forward(self, x):
        x = self.norm(self.stem(x)).relu()
        return self.head(self.drop(self.mid(x).relu().mean((2, 3))))


def build():
    torch.manual_seed(0)
    return Tiny()
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A factory's file and images, as somebody has them."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "net.py").write_text(SOURCE)
    generator, labels = np.random.default_rng(0), np.arange(60) % 4
    pixels = generator.integers(0, 60, (60, 12, 12, 3)) + 60 * labels[:, None, None, None]
    np.savez(folder / "images.npz", images=pixels.astype(np.uint8), labels=labels)
    return folder


@pytest.fixture(scope="module")
def run(place: Path, short_runs: None) -> compressor.Run:
    return compressor.compress(
        f"{place / 'net.py'}:build", place / "images.npz", weights="none", out=str(place / "run"), **QUICK
    )


def _train(network: nn.Module, steps: int = 20) -> nn.Module:
    """A loop as anybody writes it."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(32, 3, 12, 12, generator=generator)
    y = torch.arange(32) % 4
    x = x + y[:, None, None, None]
    optimiser = torch.optim.SGD(network.parameters(), lr=0.05, momentum=0.9)
    network.train()
    for _ in range(steps):
        optimiser.zero_grad()
        nn.functional.cross_entropy(network(x), y).backward()
        optimiser.step()
    return network.eval()


@pytest.fixture(scope="module")
def trained(run: compressor.Run) -> nn.Module:
    return _train(run.network())


@pytest.fixture(scope="module")
def shipped(run: compressor.Run, trained: nn.Module) -> compressor.Run:
    return run.ship(trained)


def _hashes(folder: Path) -> dict[str, str]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@torch.no_grad()
def _answers(network: nn.Module, file: Path) -> tuple[np.ndarray, np.ndarray]:
    x = torch.randn(5, 3, 12, 12, generator=torch.Generator().manual_seed(3))
    return network(x).numpy(), np.asarray(open_model(file).run(x.numpy()))


def test_what_ships_answers_as_the_trained_weights_do(
    run: compressor.Run, trained: nn.Module, shipped: compressor.Run
) -> None:
    expected, answer = _answers(trained, shipped.folder / "bundle" / "model.onnx")
    before, _ = _answers(run.network(), shipped.folder / "model.onnx")

    assert np.abs(answer - expected).max() < PARITY
    assert np.abs(before - expected).max() > 0.1
    assert verify_bundle(shipped.folder / "bundle").passed
    with torch.no_grad():
        x = example_of((3, 12, 12))
        torch.testing.assert_close(shipped.network()(x), trained(x))


def test_the_run_and_its_dense_reference_stay_as_they_are(run: compressor.Run, shipped: compressor.Run) -> None:
    assert shipped.folder == run.folder.parent / "run-trained"
    for key in ("accuracy_dense", "accuracy_removed", "accuracy_repaired", "macs_dense", "macs_shipped", "budgets"):
        assert shipped.summary[key] == run.summary[key], key
    dense = [open_model(folder / "dense.onnx") for folder in (run.folder, shipped.folder)]
    x = example_of((3, 12, 12)).numpy()
    assert np.array_equal(*(session.run(x) for session in dense))
    assert compressor.load(run.folder, trust=True) is not None


def test_its_figures_are_named_as_trained_by_the_user(shipped: compressor.Run) -> None:
    assert shipped.summary["shipped"] == "trained"
    assert shipped.summary["accuracy_shipped"] == shipped.summary["accuracy_trained"]
    report = (shipped.folder / "report.md").read_text()
    assert "shipped: trained" in report
    assert "trained: by you, afterwards" in report
    assert next(iter(shipped.summary["gates"])).startswith("identity")


@pytest.mark.thorough
def test_the_same_call_goes_on_and_other_weights_are_refused(
    run: compressor.Run, trained: nn.Module, shipped: compressor.Run
) -> None:
    assert shipped.folder.is_dir()
    again = run.ship(trained.state_dict())
    assert all(cost["reused"] for cost in again.summary["stages"].values())

    other = copy.deepcopy(trained)
    with torch.no_grad():
        next(other.parameters()).mul_(1.5)
    before = _hashes(run.folder.parent / "run-trained")
    with pytest.raises(FolderError, match="other trained weights; give another --out"):
        run.ship(other)
    with pytest.raises(FolderError, match="before your training"):
        run.ship(trained, out=run.folder)
    assert _hashes(run.folder.parent / "run-trained") == before


@pytest.mark.slow
def test_one_that_was_cut_off_goes_on_where_it_stopped(
    run: compressor.Run, trained: nn.Module, shipped: compressor.Run, tmp_path: Path
) -> None:
    def stop(stage: str, share: float) -> None:
        if stage == "parity":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run.ship(trained, out=tmp_path / "cut", notify=stop)
    assert not (tmp_path / "cut" / "bundle").exists()
    again = run.ship(trained, out=tmp_path / "cut")
    assert again.summary["stages"]["onnx"]["reused"]
    assert again.summary["accuracy_shipped"] == shipped.summary["accuracy_shipped"]


def _command(place: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "compressor", "rebundle", *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": str(Path(compressor.__file__).parents[1])}
    return subprocess.run(command, capture_output=True, text=True, cwd=place, env=environment, check=False)


@pytest.mark.thorough
def test_a_checkpoint_ships_from_the_command_line(
    run: compressor.Run, trained: nn.Module, place: Path, tmp_path: Path
) -> None:
    state = {f"module.{name}": tensor for name, tensor in trained.state_dict().items()}
    torch.save({"state_dict": state, "epoch": 3, "args": argparse.Namespace(lr=0.1)}, tmp_path / "last.pth.tar")
    done = _command(place, "run", tmp_path / "last.pth.tar", "--out", tmp_path / "out")

    assert done.returncode == 0, done.stderr
    assert re.search(r"^1 of (\d+): keeping the weights of your training\n(.*\n)*\1 of \1: ", done.stderr, re.MULTILINE)
    summary = json.loads(done.stdout.splitlines()[-1])
    assert summary["shipped"] == "trained"
    expected, answer = _answers(trained, tmp_path / "out" / "model.onnx")
    assert np.abs(answer - expected).max() < PARITY


# what training loops leave


@pytest.fixture(scope="module")
def bare(run: compressor.Run) -> tuple[Any, nn.Module]:
    """The run's network as a graph with other weights, and the dense module."""
    network = run.network()
    return trace(network, example_of((3, 12, 12))), _dense(run)


def _dense(run: compressor.Run) -> nn.Module:
    from compressor.inputs.models import load_model

    return load_model(run.recipe.model, "none").module


@torch.no_grad()
def _holds(bare: tuple[Any, nn.Module], left: object, trained: nn.Module, entry: str = "") -> bool:
    network, dense = bare
    filled = with_trained(network, state_of(left, entry), dense)
    x = example_of((3, 12, 12))
    return bool((filled(x) - trained(x)).abs().max() < PARITY)


class Lightning(nn.Module):
    """As a trainer's module: the network, and what measures it."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x)  # type: ignore[no-any-return]


def test_every_form_that_a_loop_leaves_is_taken(
    bare: tuple[Any, nn.Module], trained: nn.Module, tmp_path: Path
) -> None:
    state = trained.state_dict()
    wrapped = Lightning(trained)
    average = AveragedModel(trained, use_buffers=True)
    average.update_parameters(trained)
    forms: dict[str, object] = {
        "module": trained,
        "state": state,
        "nested": {"model": state, "optimizer": {"lr": 0.1}},
        "trainer's module": wrapped,
        "trainer's checkpoint": {"state_dict": wrapped.state_dict(), "epoch": 1},
        "compiled": {f"_orig_mod.{name}": tensor for name, tensor in state.items()},
        "compiled inside": {f"network._orig_mod.{name}": tensor for name, tensor in state.items()},
        "average": average,
        "average's state": average.state_dict(),
        "wrapped": nn.DataParallel(trained),
    }
    assert [name for name, left in forms.items() if not _holds(bare, left, trained)] == []
    torch.save(forms["trainer's checkpoint"], tmp_path / "last.ckpt")
    assert _holds(bare, tmp_path / "last.ckpt", trained)


def test_the_modules_state_fits_too(run: compressor.Run, bare: tuple[Any, nn.Module]) -> None:
    module = _train(run.module(trust=True))
    assert _holds(bare, module, module)
    assert _holds(bare, module.state_dict(), module)


def test_averaged_weights_beside_others_are_named_and_can_be_asked_for(
    bare: tuple[Any, nn.Module], trained: nn.Module
) -> None:
    others = {name: tensor + 1 for name, tensor in trained.state_dict().items()}
    left = {"state_dict": others, "state_dict_ema": trained.state_dict()}
    assert not _holds(bare, left, trained)
    assert "also holds 'state_dict_ema'" in state_of(left).notes[0]
    assert _holds(bare, left, trained, "state_dict_ema")

    twice = {f"{prefix}.{name}": tensor for prefix in ("model", "ema") for name, tensor in trained.state_dict().items()}
    with pytest.raises(ModelError, match=r"several times, under 'model\.' and 'ema\.'"):
        _holds(bare, twice, trained)
    assert _holds(bare, twice, trained, "ema")


def test_what_does_not_fit_is_named_with_the_remedy(bare: tuple[Any, nn.Module], trained: nn.Module) -> None:
    state = trained.state_dict()
    lacking = {name: tensor for name, tensor in state.items() if name != "head.bias"}
    refused: list[tuple[object, str]] = [
        (lacking, r"1 missing \('head.bias'\)"),
        ({**state, "extra.weight": torch.zeros(2)}, r"1 unexpected \('extra.weight'\)"),
        (bare[1], r"other shape .*dense network's shapes: train run.network\(\) or run.module\(\)"),
        ({**state, "head.bias": torch.full((4,), torch.nan)}, "NaN .*failed training"),
        ({"epoch": 3}, r"no tensors by name \(it has 'epoch'\)"),
        (3, "expected a module, a state dict or a checkpoint's path"),
        ("nowhere.pth", "don't exist"),
    ]
    for left, message in refused:
        with pytest.raises(ModelError, match=message):
            _holds(bare, left, trained)
    with pytest.raises(ModelError, match="no tensors under 'state_dict_ema'"):
        state_of({"state_dict": state}, "state_dict_ema")


# runs that can't be shipped from


def test_a_run_that_is_damaged_or_not_finished_is_refused(
    run: compressor.Run, trained: nn.Module, place: Path, tmp_path: Path
) -> None:
    def refused(match: str, name: str | None, content: str = "") -> None:
        copied = tmp_path / "copy"
        shutil.rmtree(copied, ignore_errors=True)
        shutil.copytree(run.folder, copied)
        if name is not None and content:
            (copied / name).write_text(content)
        elif name is not None:
            (copied / name).unlink()
        with pytest.raises(CompressorError, match=match):
            compressor.ship(copied, trained)
        assert not (tmp_path / "copy-trained").exists()

    refused("holds no pruned network", "network.json")
    refused("has not come past 'repair-1'", "stages/repair-1.json")
    refused("scores-1.json in .* was changed", "scores-1.json", "{}")
    refused("holds no run", "run.json")
    with pytest.raises(FolderError, match="holds no run"):
        compressor.ship(place, trained)


def test_code_and_data_are_those_of_the_run(
    run: compressor.Run, trained: nn.Module, place: Path, tmp_path: Path
) -> None:
    other = tmp_path / "images.npz"
    with np.load(place / "images.npz") as arrays:
        np.savez(other, images=arrays["images"][::-1], labels=arrays["labels"][::-1])
    with pytest.raises(DataError, match="images are not those"):
        compressor.ship(run.folder, trained, images=other, out=tmp_path / "out")
    dense = _dense(run)
    with torch.no_grad():
        next(dense.parameters()).mul_(2)
    with pytest.raises(ModelError, match="dense model is not the one"):
        compressor.ship(run.folder, trained, model=dense, out=tmp_path / "out")
    with pytest.raises(RecipeError, match="takes no 'budget'"):
        compressor.ship(run.folder, trained, budget="macs 0.5")  # type: ignore[arg-type]
    source = (place / "net.py").read_text()
    try:
        (place / "net.py").write_text(source + "# changed\n")
        with pytest.raises(ModelError, match="not the file it was made with"):
            compressor.ship(run.folder, trained, out=tmp_path / "out")
    finally:
        (place / "net.py").write_text(source)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_network_of_which_nothing_was_removed_ships_trained_beside_the_dense_one(
    place: Path, short_runs: None, tmp_path: Path
) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        dense = _dense_of(place)
    with np.load(place / "images.npz") as arrays:
        data = (arrays["images"].copy(), arrays["labels"].copy())
    run = compressor.compress(dense, data, out=str(tmp_path / "run"), **{**QUICK, "budget": "none"})
    trained = _train(run.network())
    shipped = run.ship(trained)

    expected, answer = _answers(trained, shipped.folder / "model.onnx")
    assert np.abs(answer - expected).max() < PARITY
    before, dense_answer = _answers(dense.eval(), shipped.folder / "dense.onnx")
    assert np.abs(before - dense_answer).max() < PARITY
    assert shipped.summary["accuracy_dense"] == run.summary["accuracy_dense"]
    report = (shipped.folder / "report.md").read_text()
    assert "Nothing was removed: the network ships with the weights of your training." in report
    assert "made smaller" not in report
    with pytest.raises(ModelError, match="began with a model object"):
        pipeline.ship(run.folder, trained)


def _dense_of(place: Path) -> nn.Module:
    from compressor.inputs.models import load_model

    return load_model(f"{place / 'net.py'}:build", "none").module


# the page of documentation


PAGE = Path(__file__).parents[2] / "docs" / "training-afterwards.md"


def _block(heading: str) -> str:
    """The code below a heading of the page."""
    section = PAGE.read_text().partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    code = re.search(r"```python\n(.*?)```", section, re.DOTALL)
    assert code is not None
    return code[1]


@pytest.mark.parametrize(
    ("heading", "library"),
    [("PyTorch", "torch"), pytest.param("timm", "timm", marks=pytest.mark.slow), ("Lightning", "lightning")],
)
def test_the_pages_loop_trains_and_ships(run: compressor.Run, tmp_path: Path, heading: str, library: str) -> None:
    code = _block(heading)
    ast.parse(code)
    pytest.importorskip(library, reason=f"{library} is not installed: its loop was read, and not run")
    network = run.network()
    runs: list[compressor.Run] = []

    class InHand:
        """The run, shipped to a folder of this test's."""

        def network(self) -> nn.Module:
            return network

        def ship(self, trained: object, **options: Any) -> None:
            runs.append(run.ship(trained, out=tmp_path / "out", **options))

    generator = torch.Generator().manual_seed(0)
    loader = [(torch.randn(8, 3, 12, 12, generator=generator), torch.arange(8) % 4) for _ in range(3)]
    names = {"run": InHand(), "network": network, "loader": loader, "epochs": 1, "folder": str(tmp_path)}
    optimiser = torch.optim.SGD(network.parameters(), lr=0.05)
    exec(compile(code, str(PAGE), "exec"), {"torch": torch, "optimiser": optimiser, **names})
    assert runs[0].summary["shipped"] == "trained"
    assert not [text for text in runs[0].summary["warnings"] if "also holds" in text and heading == "timm"]
