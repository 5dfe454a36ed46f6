"""The command line as a user types it: what runs through, what is refused in one line, what a signal leaves."""

from __future__ import annotations

import hashlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from compressor.__main__ import main
from compressor.recipe import Recipe
from compressor.report import facts

MODELS = """
import torch
from torch import nn

class Gated(nn.Module):
    def __init__(self, classes):
        super().__init__()
        self.stem, self.left, self.right = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 1), nn.Conv2d(16, 16, 1)
        self.head = nn.Linear(16, classes)

    def forward(self, x):
        x = self.stem(x).relu()
        x = torch.einsum('bchw,bchw->bchw', self.left(x), self.right(x).sigmoid()) + x
        return self.head(x.amax((2, 3)))

def gated(classes=2):
    torch.manual_seed(0)
    return Gated(classes)

class Pair(Gated):
    def __init__(self, classes):
        super().__init__(classes)
        self.maps = nn.Conv2d(3, 4, 3)

    def forward(self, x):
        return self.maps(x), super().forward(x)

class Branching(Gated):
    def forward(self, x):
        return super().forward(x if x.sum() > 0 else -x)

class Failing(Gated):
    def forward(self, x):
        return self.head(self.stem(x))

pair, branching, failing = lambda: Pair(2), lambda: Branching(2), lambda: Failing(2)
"""
RGB = "--size 16 --mean 0.5,0.5,0.5 --std 0.5,0.5,0.5"
QUICK = "--criterion l1 --finetune-epochs 0 --latency-seconds 0 --latency-batches 1 --targets= --multiple 2"
QUICK += " --max-accuracy-loss 100 --runtimes onnxruntime"


@dataclass(frozen=True)
class Answer:
    code: int
    stdout: str
    stderr: str


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as a user's: models.py, images/ of two classes, and things that are no good."""
    folder = tmp_path_factory.mktemp("user")
    (folder / "models.py").write_text(MODELS)
    generator = np.random.default_rng(0)
    for i in range(24):
        path = folder / "images" / ("ants", "bees")[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 256, (20, 16, 3), dtype=np.uint8)).save(path)
    (folder / "empty").mkdir()
    (folder / "unlabelled").mkdir()
    for i in range(6):
        shutil.copy(folder / "images" / "ants" / f"{2 * i}.png", folder / "unlabelled" / f"{i}.png")
    for number, name in enumerate(("ants", "bees")):
        shutil.copytree(folder / "images" / name, folder / "numbered" / str(number))
    pixels = generator.integers(0, 256, (24, 16, 16, 3), dtype=np.uint8)
    np.savez(folder / "integers.npz", images=pixels, labels=np.arange(24) % 4)
    shutil.copytree(folder / "images", folder / "corrupt")
    (folder / "corrupt" / "bees" / "1.png").write_bytes((folder / "images" / "bees" / "1.png").read_bytes()[:90])
    save_file({"head.weight": torch.zeros(2, 8)}, folder / "other.safetensors")
    return folder


@pytest.fixture
def command(place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Answer]:
    """The command line in this process, in the user's folder."""
    monkeypatch.chdir(place)
    monkeypatch.setattr(sys, "path", list(sys.path))

    def run(*words: str) -> Answer:
        code = main([part for text in words for part in (text.split(" ") if text.startswith("--") else [text])])
        captured = capsys.readouterr()
        return Answer(code, captured.out, captured.err)

    return run


Command = Callable[..., Answer]


def _compress(command: Command, out: Path, *more: str, model: str = "models.py:gated") -> Answer:
    return command("compress", "--model", model, "--data", "images", QUICK, RGB, "--out", str(out), *more)


# what runs through


@pytest.fixture(scope="module")
def finished(place: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """One run of a user's own module on a user's own images, in a process of its own."""
    out = tmp_path_factory.mktemp("finished") / "run"
    return out, _process(place, out).run()


def test_a_users_own_module_and_images_run_through(finished: tuple[Path, Any]) -> None:
    out, done = finished
    assert done.returncode == 0, done.stderr
    assert [len(done.stdout.splitlines()), done.stdout.count("\n")] == [1, 1]
    summary = json.loads(done.stdout)
    assert (summary["run_dir"], summary["accuracy_tuned"], summary["engines"]) == (str(out), None, [])
    assert (summary["shipped"], summary["accuracy_shipped"]) == ("repaired", summary["accuracy_repaired"])
    assert 0.49 <= summary["macs_kept"] <= 0.5
    assert f"report: {out / 'report.html'}" in done.stderr.replace("\n", "")


def test_the_bundle_verifies_and_runs_and_the_network_loads(command: Command, finished: tuple[Path, Any]) -> None:
    out, _ = finished
    assert command("verify", str(out / "bundle")).code == 0
    answer = command("run", str(out / "bundle"), "images/ants/0.png", "images/bees/1.png")
    assert (answer.code, len(answer.stdout.splitlines())) == (0, 2)
    assert "ants" in answer.stdout
    first, second = (json.loads(command("load", str(out)).stdout) for _ in range(2))
    assert first == second
    assert len(first["outputs_sha256"]) == 64


def test_inspect_prints_the_groups_and_what_is_left_alone_and_why(command: Command) -> None:
    text = command("inspect", "--model", "models.py:gated", "--size", "16").stdout
    assert "left" in text
    assert "head" in text
    assert "is the model's output" in " ".join(text.split())
    answer = command("inspect", "--model", "models.py:gated", "--size", "16", "--units", "head", "--json")
    assert {group["may_go"] for group in json.loads(answer.stdout)["groups"]} == {False}
    assert answer.stderr.splitlines() == ["reading the model and trying it", facts.STAGES["groups"]]
    found = json.loads(command("inspect", "--model", "torchvision:resnet18", "--size", "32", "--json").stdout)
    assert sum(group["units"] for group in found["groups"]) > 1000
    assert [x["reason"] for x in found["left_alone"] if x["layer"] == "fc"] == ["is the model's output"]


def test_a_dry_run_shows_what_it_would_cost_and_does_nothing_else(command: Command, tmp_path: Path) -> None:
    answer = _compress(command, tmp_path / "run", "--dry-run", "--budget", "macs 0.65")
    predicted = json.loads(answer.stdout)
    assert answer.code == 0
    assert 0.637 <= predicted["macs_predicted"] / predicted["macs_dense"] <= 0.65
    assert predicted["size"] == [3, 16, 16]
    assert predicted["images"] == {"calibration": 17, "evaluation": 7, "spare": 0}
    for shown in ("predicted", "MMACs", "kept", "budget: macs 0.65", "17 calibration, 7 evaluation"):
        assert shown in answer.stderr
    assert answer.stderr.splitlines()[2] == facts.STAGES["groups"]
    assert "interpolation" not in answer.stderr  # the recipe is in the JSON
    assert list(tmp_path.iterdir()) == []


DRY_REFUSED: dict[str, tuple[list[str], int, str]] = {
    "label outside": (
        ["--model", "models.py:gated(classes=1)", "--task", "classification"],
        2,
        "tells 1 classes apart",
    ),
    "corrupt image": (["--data", "corrupt"], 2, "can't be decoded"),
    "more outputs than classes": (["--model", "models.py:gated(classes=3)"], 2, "for 2 classes"),
    "budget out of reach": (["--budget", "macs 0.001"], 3, "ask for at least --budget 'macs 0."),
    "folder of something else": (["--out", "images"], 2, "is no run of this program"),
}


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # Pillow leaves a broken file open
@pytest.mark.parametrize("case", DRY_REFUSED)
def test_a_dry_run_refuses_what_the_run_refuses(command: Command, tmp_path: Path, case: str) -> None:
    words, code, said = DRY_REFUSED[case]
    answer = _compress(command, tmp_path / "new", "--dry-run", *words)
    assert (answer.code, answer.stdout) == (code, ""), answer.stderr
    assert said in answer.stderr.splitlines()[-1]
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_asks_for_the_pre_processing_that_the_run_asks_for(command: Command) -> None:
    answer = command("compress", "--model", "models.py:gated", "--data", "images", "--dry-run")
    assert (answer.code, answer.stdout) == (2, "")
    assert "give --size, --mean, --std" in answer.stderr
    unseen = command("compress", "--model", "models.py:gated", "--dry-run")  # costs depend on a size it does not guess
    assert (unseen.code, unseen.stdout) == (2, "")
    assert "give --size" in unseen.stderr


def test_a_dry_run_warns_of_a_budget_that_is_beaten_and_does_not_refuse_it(command: Command, tmp_path: Path) -> None:
    answer = _compress(command, tmp_path / "run", "--dry-run", "--budget", "macs 0.6", "--multiple", "8")
    assert answer.code == 0, answer.stderr
    (warning,) = json.loads(answer.stdout)["warnings"]
    assert "where 0.6 may stay" in warning
    assert f"warning: {warning}" in answer.stderr


def test_a_dry_run_names_the_budget_that_the_run_names(command: Command, tmp_path: Path) -> None:
    asked = ("--budget", "macs 0.001")
    refusals = [
        _compress(command, tmp_path / "run", *asked, *more).stderr.splitlines()[-1] for more in ((), ("--dry-run",))
    ]
    assert refusals[0] == refusals[1]
    assert "ask for at least --budget 'macs 0." in refusals[0]


GUESSED = {
    "without labels": (["--data", "unlabelled"], "classification", "one output [4, 2], no labels"),
    "one output for two classes": (["--model", "models.py:gated(classes=1)"], "multi-label", "labels that are 0 or 1"),
    "two outputs": (["--model", "models.py:pair"], "classification", "one output [17, 2]"),
}


@pytest.mark.parametrize("case", GUESSED)
def test_a_dry_run_warns_of_the_task_that_the_run_would_guess(command: Command, tmp_path: Path, case: str) -> None:
    words, task, because = GUESSED[case]
    answer = _compress(command, tmp_path / "new", "--dry-run", *words)
    assert answer.code == 0, answer.stderr
    predicted = json.loads(answer.stdout)
    warning, *of_the_budget = predicted["warnings"]
    assert all("may stay" in text for text in of_the_budget)
    assert predicted["task"] == task
    assert warning.startswith(f"taken as {task}: ")
    assert because in warning
    assert f"warning: {warning}" in answer.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.thorough
@pytest.mark.usefixtures("short_runs")
def test_of_two_outputs_the_one_that_tells_classes_is_counted(command: Command, tmp_path: Path) -> None:
    answer = _compress(command, tmp_path / "run", model="models.py:pair")
    assert answer.code == 0, answer.stderr
    summary = json.loads(answer.stdout)
    assert (summary["task"], summary["metric"]) == ("classification", "top-1")
    assert summary["macs_kept"] <= 0.5
    assert command("verify", str(tmp_path / "run" / "bundle")).code == 0


def test_least_runs_has_the_devices_name_too(command: Command) -> None:
    text = command("benchmark", "--help").stdout
    assert "--least-runs" in text
    assert "--runs" in text.replace("--least-runs", "")


@pytest.mark.parametrize("source", ["numbered", "integers.npz"])
def test_numbers_are_the_models_own_classes(command: Command, tmp_path: Path, source: str) -> None:
    answer = _compress(
        command, tmp_path / "run", "--dry-run", "--data", source, "--multiple", "1", model="models.py:gated(classes=5)"
    )
    assert answer.code == 0, answer.stderr


def test_quiet_leaves_errors_and_the_last_line(command: Command, tmp_path: Path) -> None:
    answer = _compress(command, tmp_path / "run", "--dry-run", "--quiet")
    assert (answer.code, answer.stderr, answer.stdout.count("\n")) == (0, "", 1)
    refused = _compress(command, tmp_path / "run", "--quiet", "--data", "empty")
    assert refused.code == 2
    assert [line[:7] for line in refused.stderr.splitlines()] == ["error: "]


def test_stages_are_counted_and_in_plain_words(finished: tuple[Path, Any]) -> None:
    lines = [line for line in finished[1].stderr.splitlines() if " of 13: " in line and ": timing networks" not in line]
    lines = [line for line in lines if "(" not in line]  # what a stage is at
    assert [line.split(":")[0] for line in lines] == [f"{i} of 13" for i in (1, 2, 3, 4, 5, 6, 7, 8, 9, 11, 12, 13)]
    assert lines[2] == "3 of 13: measuring what each layer may lose"
    assert "measured-1" not in finished[1].stderr


def test_the_terminal_says_gates_warnings_and_the_next_command(finished: tuple[Path, Any]) -> None:
    out, done = finished
    said = done.stderr
    assert f"next: compressor verify {out / 'bundle'}" in said
    summary = json.loads(done.stdout)
    assert summary["gates"]["accuracy: top-1 lost"] in ("passed", "not shown")
    assert all(f"warning: {text}" in said for text in summary["warnings"])


def test_help_names_kinds_of_values_and_not_pythons(command: Command) -> None:
    text = command("compress", "--help-all").stdout + command("benchmark", "--help-all").stdout
    assert "<str>" not in text
    assert "<float>" not in text
    text += "".join(command(*words, "--help").stdout for words in ([], ["load"], ["list"], ["search"]))
    assert "<bool>" not in text
    assert "BOOL" not in text
    assert "WHOLE" in text
    assert "Budget and ranking" in text


def test_help_all_without_a_command_is_the_help_and_says_where_there_is_more(command: Command) -> None:
    answers = [command(flag) for flag in ("--help", "--help-all")]
    assert [answer.code for answer in answers] == [0, 0]
    assert answers[0].stdout == answers[1].stdout
    assert "COMMAND --help-all" in " ".join(answers[0].stdout.split())


def test_help_shows_what_most_runs_need_and_all_of_it_when_asked(command: Command) -> None:
    short, whole = (command("compress", flag).stdout for flag in ("--help", "--help-all"))

    assert "--budget" in short
    assert "--help-all" in short
    assert "--max-identity-error" not in short
    assert all("--" + field.name.replace("_", "-") in whole for field in fields(Recipe))
    assert len(short.splitlines()) < 80


@pytest.mark.parametrize("what", ["models", "criteria", "runtimes", "targets"])
def test_what_can_be_named_is_listed(command: Command, what: str) -> None:
    known = {"models": "digits-vit", "criteria": "lrp", "runtimes": "onnxruntime", "targets": "SM87"}[what]

    assert known in command("list", what).stdout
    assert known in json.loads(command("list", what, "--json").stdout)


def test_a_list_is_filtered_and_says_what_can_be_listed(command: Command) -> None:
    models = json.loads(command("list", "models", "ResNet18", "--json").stdout)
    assert "torchvision:resnet18" in models
    assert all("resnet18" in name for name in models)
    assert list(json.loads(command("list", "targets", "orin", "--json").stdout)) == ["SM87"]
    assert "pytorch" in json.loads(command("list", "runtimes", "--json").stdout)
    assert list(json.loads(command("list", "--json").stdout)) == ["models", "criteria", "runtimes", "targets"]

    unknown = command("list", "criteria", "tailor")
    assert (unknown.code, unknown.stderr.count("\n")) == (2, 1)
    assert "Did you mean 'taylor'?" in unknown.stderr


def test_a_list_that_is_not_there_is_refused_with_those_that_are(command: Command) -> None:
    answer = command("list", "models2")

    assert (answer.code, answer.stderr) == (
        2,
        "error: there is no list of 'models2'; there are models, criteria, runtimes, targets. Did you mean 'models'?\n",
    )


def test_every_field_of_a_recipe_is_a_flag_and_the_file_is_read(command: Command, tmp_path: Path) -> None:
    text = command("compress", "--help-all").stdout
    squeezed = "".join(text.split())
    assert [f.name for f in fields(Recipe) if f"--{f.name.replace('_', '-')}"[:20] not in squeezed] == []
    (tmp_path / "mine.toml").write_text('model = "models.py:gated"\nbudget = "macs 0.65"\nsize = [16]\nmultiple = 2\n')
    answer = command("compress", "--recipe", str(tmp_path / "mine.toml"), "--no-compensate", "--dry-run")
    resolved = json.loads(answer.stdout)["recipe"]
    assert (resolved["budget"], resolved["compensate"], resolved["multiple"]) == ("macs 0.65", False, 2)


# what is refused: one line, its exit code, nothing written

REFUSED: dict[str, tuple[list[str], int, str]] = {
    "unknown torchvision model": (["--model", "torchvision:resnet81"], 2, "Did you mean 'resnet18'"),
    "unknown timm model": (["--model", "timm:vit_tny_patch16_224"], 2, "Did you mean 'vit_tiny_patch16_224'"),
    "unknown embedded model": (["--model", "digits-resent"], 2, "Did you mean 'digits-resnet'"),
    "unknown factory": (["--model", "models.py:gate"], 2, "Did you mean 'gated'"),
    "forward fails": (["--model", "models.py:failing"], 2, "forward fails on an input of shape [2, 3, 16, 16]"),
    "forward branches": (["--model", "models.py:branching"], 2, "must not branch on values"),
    "no images": (["--data", "empty"], 2, "holds no images"),
    "no folder": (["--data", "nowhere"], 2, "neither a folder nor a file"),
    "corrupt image": (["--data", "corrupt"], 2, "'bees/1.png' of corrupt can't be decoded"),
    "images twice": (["--evaluation-data", "images"], 2, "are also among the evaluation images"),
    "none held out": (["--evaluation", "0"], 2, "0 are held out for evaluation"),
    "label outside": (
        ["--model", "models.py:gated(classes=1)", "--task", "classification"],
        2,
        "tells 1 classes apart",
    ),
    "more outputs than classes": (
        ["--model", "torchvision:resnet18", "--weights", "none"],
        2,
        "torchvision:resnet18(num_classes=2)",
    ),
    "more outputs than classes, a factory": (["--model", "models.py:gated(classes=3)"], 2, "for 2 classes, or give"),
    "other checkpoint": (["--weights", "other.safetensors"], 2, "doesn't fit the model"),
    "no checkpoint": (["--weights", "nowhere.pt"], 2, "don't exist"),
    "budget out of reach": (["--budget", "macs 0.001"], 3, "ask for at least --budget 'macs 0."),
    "budget nonsense": (["--budget", "half"], 2, "write 'macs S', 'parameters S', 'size S' or"),
    "unknown criterion": (["--criterion", "lpr"], 2, "Did you mean 'lrp'?"),
    "unknown composite": (["--composite", "yeom"], 2, "Did you mean 'yeom2021'?"),
    "unknown kind of unit": (["--units", "heads"], 2, "Did you mean 'head'"),
    "unknown target": (["--targets", "SM866"], 2, "Did you mean 'SM86'"),
    "unknown flag": (["--bugdet", "macs 0.5"], 2, "--budget"),
    "no number": (["--calibration", "many"], 2, "calibration = 'many' is not understood; expected a whole number"),
    "no recipe": (["--recipe", "nowhere.toml"], 2, "can't read the recipe nowhere.toml"),
    "folder of something else": (["--out", "images"], 2, "is no run of this program"),
    "folder below a file": (["--out", "models.py/run"], 2, "not a folder you may write to"),
}


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # Pillow leaves a broken file open
@pytest.mark.parametrize("case", REFUSED)
def test_bad_input_is_one_line_and_an_exit_code_and_nothing_written(
    command: Command, place: Path, tmp_path: Path, case: str
) -> None:
    words, code, said = REFUSED[case]
    before = _files_of(place)
    answer = _compress(command, tmp_path / "new", *words)
    lines = [line for line in answer.stderr.splitlines() if not line.startswith(("compress ", "1 of "))]
    assert (answer.code, answer.stdout, len(lines)) == (code, "", 1), answer.stderr
    assert lines[0].startswith("error: ")
    assert said in lines[0]
    assert list(tmp_path.iterdir()) == []
    assert _files_of(place) == before


def _files_of(folder: Path) -> list[Path]:
    """All but the bytecode that Python leaves beside a user's module."""
    return [path for path in sorted(folder.rglob("*")) if "__pycache__" not in path.parts]


def test_an_own_module_needs_its_preprocessing(command: Command, tmp_path: Path) -> None:
    answer = command("compress", "--model", "models.py:gated", "--data", "images", "--out", str(tmp_path / "new"))
    first, error = answer.stderr.splitlines()
    assert (answer.code, first.split()[:2]) == (2, ["compress", "models.py:gated"])
    assert "give --size, --mean, --std" in error


def test_a_folder_with_another_run_is_refused_and_left_as_it_is(command: Command, finished: tuple[Path, Any]) -> None:
    out, _ = finished
    before = {p: p.stat().st_mtime_ns for p in out.rglob("*")}
    answer = _compress(command, out, model="models.py:gated(classes=2)")
    assert (answer.code, answer.stderr.count("\n")) == (2, 2)
    assert "holds the run of model 'models.py:gated'" in answer.stderr.splitlines()[-1]
    assert {p: p.stat().st_mtime_ns for p in out.rglob("*")} == before


@pytest.mark.usefixtures("short_runs")
def test_a_failed_gate_has_its_own_exit_code_and_leaves_its_report(
    command: Command, finished: tuple[Path, Any], tmp_path: Path
) -> None:
    shutil.copytree(finished[0], tmp_path / "run")
    answer = _compress(command, tmp_path / "run", "--max-accuracy-loss", "-100")
    assert (answer.code, answer.stdout) == (4, "")
    assert answer.stderr.splitlines()[-1].startswith("error: gate 'accuracy: top-1 lost' failed")
    assert (tmp_path / "run" / "report.html").is_file()
    assert not (tmp_path / "run" / "bundle").exists()


@pytest.mark.usefixtures("short_runs")
def test_a_target_that_cannot_be_built_here_is_said_and_does_not_stop_the_run(
    command: Command, finished: tuple[Path, Any], tmp_path: Path
) -> None:
    shutil.copytree(finished[0], tmp_path / "run")
    answer = _compress(command, tmp_path / "run", "--targets", "SM87")
    summary = json.loads(answer.stdout)
    assert (answer.code, summary["engines"]) == (0, [])
    assert any("SM87" in line and "not built" in line for line in summary["not_checked"])


# signals and a full disk, in processes of their own


def _hears_ctrl_c() -> None:
    """A shell starts what it runs in the background deaf to it, and children inherit that."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@dataclass(frozen=True)
class _Started:
    arguments: list[str]
    options: dict[str, Any]

    def run(self) -> subprocess.CompletedProcess[str]:
        return subprocess.run(self.arguments, capture_output=True, timeout=500, check=False, **self.options)

    def stopped(self, at: str, number: signal.Signals, *, after_s: float = 0.0) -> tuple[int, str]:
        """Sends the signal once the stage is named on stderr."""
        pipe = subprocess.PIPE
        with subprocess.Popen(
            self.arguments,
            stdout=pipe,
            stderr=pipe,
            start_new_session=True,
            preexec_fn=_hears_ctrl_c,
            **self.options,
        ) as child:
            assert child.stderr is not None
            said = ""
            for line in child.stderr:
                said += line
                if line.strip().endswith(f": {at}"):
                    time.sleep(after_s)
                    child.send_signal(number)
                    break
            said += child.stderr.read()
        return child.returncode, said


def _process(place: Path, out: Path, *more: str, **options: Any) -> _Started:
    words = ["compress", "--model", "models.py:gated", "--data", "images", *QUICK.split(), *RGB.split()]
    root = Path(__file__).parent.parent
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    arguments = [sys.executable, "-m", "compressor", *words, "--out", str(out), *more]
    return _Started(arguments, {"cwd": place, "env": environment, "text": True, **options})


def _facts(folder: Path) -> dict[str, Any]:
    summary = json.loads((folder / "summary.json").read_text())
    timed = ("run_dir", "latency_ms", "latency_ratio_b1", "busy", "warnings", "seconds", "stages")
    files = ["weights.safetensors", "model.onnx", "network.json", "plan.json", "scores-1.json"]
    hashes = {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in files}
    return {**{k: v for k, v in summary.items() if k not in timed}, **hashes}


@pytest.mark.thorough
def test_ctrl_c_is_one_line_and_exit_130(place: Path, tmp_path: Path) -> None:
    code, said = _process(place, tmp_path / "run").stopped("exporting to ONNX", signal.SIGINT)
    assert (code, said.splitlines()[-1]) == (130, "interrupted; the same command goes on from here")
    assert said.count("interrupted") == 1
    assert "Traceback" not in said


def _small_files() -> None:
    """No file may grow above 12 kB, and the signal that would end the process is an error instead."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (12_000, 12_000))


@pytest.mark.slow
def test_a_disk_that_fills_up_is_one_line_and_leaves_no_half_files(
    place: Path, finished: tuple[Path, Any], tmp_path: Path
) -> None:
    out = tmp_path / "run"
    full = _process(place, out, preexec_fn=_small_files).run()
    assert full.returncode == 2, full.stderr
    assert full.stderr.splitlines()[-1].startswith("error: ")
    assert "can't" in full.stderr.splitlines()[-1]
    assert "Traceback" not in full.stderr
    assert [p for p in out.rglob("*") if p.is_file() and (p.name.startswith(".") or p.stat().st_size >= 12_000)] == []
    again = _process(place, out).run()
    assert (again.returncode, "(done before)" in again.stderr) == (0, True)
    assert _facts(out) == _facts(finished[0])


@pytest.mark.slow
def test_killed_at_several_moments_it_continues_and_ends_the_same(
    place: Path, finished: tuple[Path, Any], tmp_path: Path
) -> None:
    """kill -9, the same command, and so on; each time it goes on after the last finished stage."""
    out, finished_stages = tmp_path / "run", 0
    for name in ("groups", "scores", "repair", "accuracy", "onnx", "latency"):
        stage = facts.STAGES[name]
        code, said = _process(place, out).stopped(stage, signal.SIGKILL, after_s=0.02)
        assert code == -signal.SIGKILL, said
        assert said.count("(done before)") >= finished_stages
        finished_stages = said.count("(done before)")
    done = _process(place, out).run()
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("(done before)") >= 6
    assert _facts(out) == _facts(finished[0])


@pytest.mark.slow
@pytest.mark.parametrize(
    "model", ["torchvision:resnet18(num_classes=2)", "timm:vit_tiny_patch16_224(img_size=64, num_classes=2)"]
)
def test_a_library_model_without_weights_runs_through_on_a_folder_of_images(
    command: Command, tmp_path: Path, model: str
) -> None:
    words = [
        "--model",
        model,
        "--weights",
        "none",
        "--data",
        "images",
        "--size",
        "64",
        "--units",
        "channel,neuron,head",
    ]
    answer = command("compress", *words, QUICK, "--budget", "macs 0.7", "--out", str(tmp_path / "run"))
    assert answer.code == 0, answer.stderr
    assert 0.68 <= json.loads(answer.stdout)["macs_kept"] <= 0.7
    assert command("verify", str(tmp_path / "run" / "bundle")).code == 0
