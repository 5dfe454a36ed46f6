"""What the documentation says is there: files, flags, criteria, fields, commands; and its examples run."""

from __future__ import annotations

import os
import re
import runpy
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch

import compressor
from compressor import errors, shipping
from compressor.cli import app
from compressor.criteria import CRITERIA
from compressor.device.__main__ import VERBS
from compressor.device.options import make_parser
from compressor.device.runtimes import REFERENCE, runtime_names
from compressor.recipe import Recipe
from compressor.searching.options import SearchOptions

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), ROOT / "benchmarks" / "README.md"])
EXAMPLES = sorted(ROOT.glob("examples/*.py"))
MOST_WORDS = 900  # of a README that somebody reads to the end
MOST_LINES = 25  # of an example that somebody reads at a glance


def _ids(paths: list[Path]) -> list[str]:
    return [str(path.relative_to(ROOT)) for path in paths]


def test_the_readme_is_short_enough_to_be_read() -> None:
    assert len((ROOT / "README.md").read_text().split()) <= MOST_WORDS


@pytest.mark.parametrize("page", PAGES, ids=_ids(PAGES))
def test_every_link_leads_to_a_file(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    places = [place for place in re.findall(r"\]\(([^)#]+)[^)]*\)", text) if "://" not in place]
    included = re.findall(r"```\{include\} (\S+)", page.read_text())

    assert [place for place in (*places, *included) if not (page.parent / place).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=_ids(PAGES))
def test_every_file_of_the_project_that_a_page_names_exists(page: Path) -> None:
    named = re.findall(r"\b((?:compressor|benchmarks|tests|models|docs|examples)/[\w/.-]+\.\w+)", page.read_text())
    expected = {"models/net.py"}  # of somebody else's

    assert [name for name in named if name not in expected and not (ROOT / name).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=_ids(PAGES))
def test_every_flag_of_a_command_exists(page: Path) -> None:
    known = _flags_of_commands()

    shown = {command: re.findall(r"(?<![\w-])(--[a-z][\w-]*)", command) for command in _commands(page.read_text())}
    unknown = {command: set(given) - known for command, given in shown.items() if set(given) - known}

    assert unknown == {}


def _commands(text: str) -> Iterator[str]:
    """The lines that call `compressor`, in blocks and between back ticks, continued lines joined."""
    for line in text.replace("\\\n", " ").splitlines():
        if re.match(r"\s*compressor [a-z]", line):
            yield line.split(" #")[0]
        yield from (code for code in re.findall(r"`([^`]+)`", line) if re.match(r"compressor [a-z]", code))


def _flags_of_commands() -> set[str]:
    """Of the recipe, the search and every command's own parameters."""
    names = [f.name for record in (Recipe, SearchOptions) for f in fields(record)]
    flags = {"--" + name.replace("_", "-") for name in names} | {"--recipe", "--version", "--help"}
    for command in app.registered_commands:
        assert command.callback is not None
        flags |= {f"--{name.replace('_', '-')}" for name in command.callback.__annotations__}
        flags |= {f"--{name.replace('_', '-')}" for name in _parameters(command.callback)}
    return flags | _flags_of_the_device()


def _flags_of_the_device() -> set[str]:
    verbs = defaultdict(lambda: lambda options: 0)
    (subparsers,) = (action for action in make_parser(verbs)._actions if isinstance(action.choices, dict))
    return {flag for parser in subparsers.choices.values() for flag in parser._option_string_actions}


def _parameters(function: object) -> list[str]:
    import inspect

    return list(inspect.signature(function).parameters)  # type: ignore[arg-type]


def test_every_criterion_and_runtime_is_documented() -> None:
    criteria, latency = ((ROOT / "docs" / name).read_text() for name in ("criteria.md", "latency.md"))

    assert [name for name in CRITERIA if f"`{name}`" not in criteria] == []
    assert f"`{REFERENCE}`" in latency
    assert f"`{runtime_names('network')[0]}`" in latency


def test_every_verb_that_works_on_a_device_is_on_the_page_of_shipping() -> None:
    page = (ROOT / "docs" / "shipping.md").read_text()

    assert [verb for verb in (*VERBS, "benchmark") if f"\ncompressor {verb} bundle" not in page] == []


def test_no_page_is_overwritten_by_one_that_sphinx_makes() -> None:
    """Its search page took the place of `search.md`, without a warning."""
    made = {"search", "genindex", "py-modindex"}
    assert made.isdisjoint(page.stem for page in (ROOT / "docs").glob("*.md"))


def test_every_public_name_is_on_the_page_of_the_python_api() -> None:
    page = (ROOT / "docs" / "api.md").read_text()

    assert [name for name in compressor.__all__ if not name.startswith("__") and f"compressor.{name}" not in page] == []


def test_what_ships_is_on_the_page_of_the_python_api() -> None:
    page = (ROOT / "docs" / "api.md").read_text()
    documented = set(re.findall(r"compressor\.shipping\.(\w+)", page))
    of_the_command_line = {"age_s", "in_words"}
    assert documented == set(shipping.__all__) - of_the_command_line
    named = re.findall(r"shipping\.([A-Za-z_]+)\(", (ROOT / "docs" / "shipping.md").read_text())
    assert set(named) <= documented


def test_every_error_is_on_the_page_of_the_python_api_and_says_when_it_comes() -> None:
    page = (ROOT / "docs" / "api.md").read_text()
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type)]
    assert len(kinds) == 13
    assert [kind.__name__ for kind in kinds if f"autoexception:: compressor.errors.{kind.__name__}\n" not in page] == []
    assert [kind.__name__ for kind in kinds if not kind.__doc__] == []


@pytest.mark.parametrize("example", EXAMPLES, ids=_ids(EXAMPLES))
def test_an_example_is_read_at_a_glance(example: Path) -> None:
    assert len(example.read_text().splitlines()) <= MOST_LINES


@pytest.mark.parametrize("name", ["run_on_a_device", "train_afterwards"])
def test_an_example_without_its_arguments_says_which_it_expects(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    path = ROOT / "examples" / f"{name}.py"
    monkeypatch.setattr(sys, "argv", [str(path)])
    with pytest.raises(SystemExit, match=rf"^expected .*: {name}\.py \S+.*$"):
        runpy.run_path(str(path), run_name="__main__")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that the first example made."""
    folder = tmp_path_factory.mktemp("example") / "run"
    said = _example("compress_a_model", folder)
    assert "top-1" in said
    return folder


@pytest.mark.slow
def test_the_examples_of_a_finished_run_go_on_from_it(finished: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "image.npy", np.zeros((1, *_golden(finished).shape[1:]), np.float32))

    assert "step 1: loss" in _example("train_afterwards", finished)
    assert "label" in _example("run_on_a_device", finished / "bundle", tmp_path / "image.npy")


def _golden(run: Path) -> np.ndarray:
    with np.load(run / "bundle" / "golden.npz") as arrays:
        return np.asarray(arrays["input.input"])


@pytest.mark.slow
def test_a_module_and_arrays_in_memory_are_an_example(tmp_path: Path) -> None:
    assert "Linear" in _example("your_own_module", tmp_path / "run")


@pytest.mark.slow
def test_training_afterwards_and_shipping_is_an_example(tmp_path: Path) -> None:
    assert "trained" in _example("ship_after_training", tmp_path / "run")
    assert (tmp_path / "run-trained" / "bundle" / "manifest.json").is_file()


@pytest.mark.thorough
@pytest.mark.parametrize(("name", "words"), [("prune_in_memory", "of the MACs stay"), ("what_can_go", "head")])
def test_what_needs_no_folder_is_an_example(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str, words: str
) -> None:
    """In this process: a fresh one imports torch for seconds, and the examples above have one each."""
    path = ROOT / "examples" / f"{name}.py"
    monkeypatch.setattr(sys, "argv", [str(path)])
    with torch.random.fork_rng():
        runpy.run_path(str(path), run_name="__main__")
    assert words in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("any_task", "same_pixels "),
        ("two_inputs", "[16, 1, 12, 12]]"),
        ("as_it_is", "manifest.json"),
        ("sweep", "sweep.html"),
        ("milliseconds", " ms shipped"),
    ],
)
def test_every_task_and_budget_is_an_example(tmp_path: Path, name: str, words: str) -> None:
    assert words in _example(name, tmp_path / "run")


@pytest.mark.slow
def test_the_python_of_the_page_on_tasks_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch import nn

    class Detector(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.scores, self.sides = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 2, 1), nn.Conv2d(8, 4, 1)

        def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
            x = self.stem(x).relu()
            return {"scores": self.scores(x), "sides": self.sides(x)}

    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "tasks.md").read_text(), flags=re.DOTALL)
    assert len(blocks) == 2
    quick = {"finetune_epochs": 1, "targets": (), "latency_seconds": 0.0, "max_accuracy_loss": 100.0, "multiple": 1}
    real = compressor.compress
    with torch.random.fork_rng():
        torch.manual_seed(0)
        body = [nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1), nn.ReLU()]
        names = {
            "torch": torch,
            "compressor": compressor,
            "segmenter": nn.Sequential(*body, nn.Conv2d(16, 5, 1)),
            "detector": Detector(),
            "images": torch.randn(40, 3, 12, 12),
            "masks": torch.randint(0, 5, (40, 12, 12)),
        }
        for number, block in enumerate(blocks):
            out = tmp_path / str(number)
            monkeypatch.setattr(
                compressor, "compress", lambda *a, out=out, **o: real(*a, out=out, calibration=20, **quick, **o)
            )
            exec(block, names)
    assert names["run"].summary["metric"] == "box F1 to dense"


def _example(name: str, *arguments: Path) -> str:
    command = [sys.executable, str(ROOT / "examples" / f"{name}.py"), *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout
