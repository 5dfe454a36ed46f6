"""Code that a folder names is run where it is the recorded file outside the folder, or where the user says so."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from compressor.__main__ import main
from compressor.benchmarking import open_place, places
from compressor.errors import CompressorError, DataError, FolderError, ModelError
from compressor.files import file_sha256, read_signed, signed, write_json
from compressor.graph import trace
from compressor.inputs.models import load_model
from compressor.inputs.trust import loader_sha256, require_trusted, require_trusted_loader
from compressor.pruning import find_structure
from compressor.pruning.check import random_units
from compressor.recipe import make_recipe, read_recipe, to_toml
from compressor.records import InputSpec
from compressor.run.saved import Network, example_of, load_saved, read_network, rebuild, save
from compressor.run.user_code import code_sha256s

SHAPE = (3, 8, 8)
FACTORY = """
from pathlib import Path
from torch import nn

Path(__file__).with_name("ran").touch()

def build():
    return nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 8, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`run/` and, beside it, the `factory.py` its network is built by."""
    folder = tmp_path_factory.mktemp("made")
    (folder / "factory.py").write_text(FACTORY)
    builder = f"{folder / 'factory.py'}:build"
    graph = trace(load_model(builder, "none").module, example_of(SHAPE))
    structure = find_structure(graph, example_of(SHAPE))
    kept = random_units(structure, 0)
    network = Network(builder, (InputSpec(SHAPE),), structure.tied, structure.frozen, kept)
    save(folder / "run", network, rebuild(graph, structure, kept))
    return folder


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    """A copy whose builder lies beside it; nothing of it has run yet."""
    shutil.copytree(made, tmp_path / "x")
    (tmp_path / "x" / "ran").unlink(missing_ok=True)
    run = tmp_path / "x" / "run"
    _rewrite(run, builder=f"{tmp_path / 'x' / 'factory.py'}:build")
    return run


def _rewrite(run: Path, **fields: Any) -> None:
    """As somebody who can make a right digest would."""
    content = read_signed(run / "network.json", "network/3")
    write_json(run / "network.json", signed({**content, **fields}))


def _ran(run: Path) -> bool:
    return (run.parent / "ran").exists() or (run / "ran").exists()


def test_the_recorded_file_is_run_without_a_word(folder: Path) -> None:
    assert load_saved(folder)(example_of(SHAPE)).shape == (2, 8)
    assert _ran(folder)


def test_another_file_is_named_and_runs_only_with_trust(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with (folder.parent / "factory.py").open("a") as file:
        file.write("\n# edited\n")
    with pytest.raises(ModelError, match=r"names code to run, '.*factory\.py', which is not the file it was made with"):
        load_saved(folder)
    assert main(["load", str(folder)]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert said.count("\n") == 1
    assert "--trust" in said
    assert not _ran(folder)
    assert main(["load", str(folder), "--trust"]) == 0
    assert json.loads(capsys.readouterr().out)["parameters"] > 0
    assert _ran(folder)


def test_a_file_that_came_along_is_not_trusted_for_its_hash(folder: Path) -> None:
    shutil.copy(folder.parent / "factory.py", folder / "factory.py")
    _rewrite(folder, builder=f"{folder / 'factory.py'}:build")
    with pytest.raises(ModelError, match="came along inside it"):
        load_saved(folder)
    assert not _ran(folder)
    assert load_saved(folder, trust=True)(example_of(SHAPE)).shape == (2, 8)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"builder_sha256": ""}, "whose hash it does not hold"),
        ({"builder_sha256": "0" * 64}, "is not the file it was made with"),
        ({"builder": "elsewhere/none.py:build"}, "there is no file of 'elsewhere/none.py'"),
        ({"builder": "subprocess:call(args=['touch', 'ran'])"}, "names code to run"),
        ({"builder": "nowhere.at.all:build"}, "there is no file of 'nowhere.at.all'"),
        ({"builder": "builtins:exec"}, "there is no file of 'builtins'"),
        ({"builder": "timm:resnet18(checkpoint_path='/tmp/evil.pth')"}, "'checkpoint_path' may name a file"),
        ({"builder": "torchvision:resnet18(weights='a/b')"}, "'weights' may name a file"),
    ],
)
def test_nothing_else_is_run(folder: Path, fields: dict[str, str], said: str) -> None:
    _rewrite(folder, **fields)
    with pytest.raises(ModelError, match=said):
        load_saved(folder)
    assert not _ran(folder)


def test_an_installed_module_is_not_trusted_for_its_hash() -> None:
    import subprocess

    from compressor.files import file_sha256

    with pytest.raises(ModelError, match="installed library's"):
        require_trusted("subprocess:call(args=['x'])", file_sha256(str(subprocess.__file__)), Path("run"))


@pytest.mark.parametrize("builder", ["digits-resnet", "torchvision:resnet18(num_classes=2)", "timm:resnet18"])
def test_models_of_libraries_need_no_trust(builder: str, recwarn: pytest.WarningsRecorder) -> None:
    require_trusted(builder, "", Path("run"))  # raises where code would have to be trusted
    assert not recwarn.list


@pytest.mark.parametrize(
    "fields",
    [
        {"inputs": [{"shape": [3, 10**6, 10**6], "dtype": "float32"}]},
        {"inputs": [{"shape": [3, -8, 8], "dtype": "float32"}]},
        {"inputs": [{"shape": "abc", "dtype": "float32"}]},
        {"inputs": [{"shape": [3, 8, 8], "dtype": "object"}]},
        {"inputs": [{"shape": [3, 8, 8], "dtype": "float32"}] * 65},
        {"inputs": []},
        {"inputs": "abc"},
        {"keywords": [1]},
        {"code_sha256s": []},
        {"code_sha256s": {"data = my.py:loader": 1}},
        {"kept": {"g": [10**30]}},
        {"kept": {"g": [[1], 2]}},
        {"kept": []},
        {"tied": [1]},
        {"builder": None},
        {"weights_sha256": 5},
    ],
)
def test_a_description_of_no_network_is_one_line(folder: Path, fields: dict[str, Any]) -> None:
    _rewrite(folder, **fields)
    with pytest.raises(FolderError, match="describes no network"):
        load_saved(folder)


@pytest.mark.parametrize("units", [[-1, 2], [0, 500], [2, 1], [1, 1], []])
def test_units_that_a_group_does_not_have_are_refused(folder: Path, units: list[int]) -> None:
    kept = {name: units.tolist() for name, units in read_network(folder).kept.items()}
    _rewrite(folder, kept={**kept, next(iter(kept)): units})
    with pytest.raises(FolderError, match="keeps units of group"):
        load_saved(folder)


def test_the_recipe_of_a_run_names_no_other_code(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    evil = folder.parent / "evil.py"
    evil.write_text("from pathlib import Path\nPath(__file__).with_name('ran').touch()\n")
    (folder / "recipe.toml").write_text(f"model = {json.dumps(f'{evil}:build')}\n")
    write_json(folder / "summary.json", {"schema": "summary/2"})
    for builder in (read_network(folder).builder, ""):  # an empty one: a run of a model object
        _rewrite(folder, builder=builder)
        with pytest.raises(CompressorError):
            open_place(folder)
    assert main(["benchmark", str(folder)]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert not _ran(folder)


LOADER = """
from pathlib import Path
import numpy as np

Path(__file__).with_name("ran").touch()

def loader():
    random = np.random.default_rng(0)
    return random.integers(0, 256, (40, 8, 8, 3), dtype=np.uint8), np.arange(40) % 8

def judge(predict, data):
    return 1.0
"""
TASK_PARTS = ("quality", "loss", "says", "distance", "decode")


@pytest.fixture
def run_of_code(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The run's folder with a recipe whose data and quality are in `code/mine.py`; no other file of a run is there."""
    (tmp_path / "code").mkdir()
    mine = tmp_path / "code" / "mine.py"
    mine.write_text(LOADER)
    _name(folder, data=f"{mine}:loader", quality=f"{mine}:judge")
    _rewrite(folder, code_sha256s=code_sha256s(read_recipe(folder / "recipe.toml")))
    write_json(folder / "summary.json", {"schema": "summary/2"})
    monkeypatch.setattr(places, "_files_of", lambda folder: ())
    monkeypatch.setattr(places, "_require_unchanged", lambda folder, names: None)
    return folder


def _name(run: Path, **fields: str) -> None:
    """The folder's recipe, of its own model without trained weights and with few images."""
    builder = read_network(run).builder
    recipe = make_recipe({"model": builder, "weights": "none", "size": 8, "mean": (0.5,) * 3, "std": (0.5,) * 3})
    (run / "recipe.toml").write_text(to_toml(replace(recipe, calibration=10, **fields)))


def _code_ran(run: Path) -> bool:
    return (run.parent.parent / "code" / "ran").exists()


def test_the_recorded_loader_is_run_without_a_word(run_of_code: Path) -> None:
    place = open_place(run_of_code)
    assert place.evaluation is not None
    assert len(place.evaluation.images) == 12  # 30 % of 40
    assert place.lacks == ()
    assert _code_ran(run_of_code)


@pytest.mark.parametrize("field", ["data", "evaluation_data"])
def test_another_loader_is_named_and_runs_only_with_trust(run_of_code: Path, field: str) -> None:
    mine = run_of_code.parent.parent / "code" / "mine.py"
    _name(run_of_code, **{"data": "digits", field: f"{mine}:loader"})
    _rewrite(run_of_code, code_sha256s=code_sha256s(read_recipe(run_of_code / "recipe.toml")))
    mine.write_text(f"{LOADER}# edited\n")
    with pytest.raises(DataError, match=r"names code to run, '.*mine\.py', which is not the file .*--trust") as caught:
        open_place(run_of_code)
    assert "\n" not in str(caught.value)
    assert main(["benchmark", str(run_of_code)]) == 2
    assert not _code_ran(run_of_code)
    open_place(run_of_code, trust=True)
    assert _code_ran(run_of_code)


@pytest.mark.parametrize("name", ["inside", "another function", "a module", "nowhere"])
def test_no_other_loader_is_run(run_of_code: Path, name: str) -> None:
    mine = run_of_code.parent.parent / "code" / "mine.py"
    shutil.copy(mine, run_of_code / "mine.py")
    loader = {
        "inside": f"{run_of_code / 'mine.py'}:loader",
        "another function": f"{mine}:judge",
        "a module": "subprocess:call(args=['touch', 'ran'])",
        "nowhere": "nowhere/none.py:loader",
    }[name]
    _name(run_of_code, data=loader)
    if name == "inside":
        _rewrite(run_of_code, code_sha256s={f"data = {loader}": file_sha256(mine)})
    with pytest.raises(DataError, match="came along inside it" if name == "inside" else "the folder .* names"):
        open_place(run_of_code)
    assert not _code_ran(run_of_code)
    assert not _ran(run_of_code)


@pytest.mark.parametrize("part", TASK_PARTS)
def test_code_of_the_task_is_recorded_and_no_folder_runs_it(run_of_code: Path, part: str) -> None:
    code = run_of_code.parent.parent / "code"
    (code / "judging.py").write_text(LOADER.replace('"ran"', '"judged"'))
    judge = f"{code / 'judging.py'}:judge"
    _name(run_of_code, data="digits", **{part: judge})
    recipe = read_recipe(run_of_code / "recipe.toml")
    assert code_sha256s(recipe) == {f"{part} = {judge}": file_sha256(code / "judging.py")}
    open_place(run_of_code, trust=True)
    assert not (code / "judged").exists()


def test_a_loader_is_trusted_as_a_builder_is(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    for place in (tmp_path, tmp_path / "run"):
        (place / "my.py").write_text("def loader():\n    return []\n")
    loader = f"{tmp_path / 'my.py'}:loader"
    recorded = loader_sha256(loader)
    require_trusted_loader(loader, recorded, tmp_path / "run")
    for source in ("photos", "digits:training", "torchvision:CIFAR10(root='data')", "x.npz"):
        assert loader_sha256(source) == ""
        require_trusted_loader(source, "", tmp_path / "run")
    for source, sha256, words in (
        (loader, "0" * 64, "its hash is another"),
        (loader, "", "whose hash it does not hold"),
        (f"{tmp_path / 'run' / 'my.py'}:loader", recorded, "which came along inside it"),
        ("gone.py:loader", recorded, "names the loader 'gone.py:loader', and there is no file"),
    ):
        with pytest.raises(DataError, match=words):
            require_trusted_loader(source, sha256, tmp_path / "run")
        require_trusted_loader(source, sha256, tmp_path / "run", trust=True)
