"""What people get wrong, given to the command line: one clear line on stderr and an exit code of the tree."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from compressor.__main__ import main
from compressor.benchmarking.records import read_measured
from compressor.errors import InputError

Arguments = list[str]
MODEL = """
import torch
from torch import nn

def build():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 96, 1), nn.ReLU(), nn.Conv2d(96, 8, 1),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2),
    )

def on_meta():
    with torch.device("meta"):
        return build()

def quantised():
    return torch.ao.quantization.quantize_dynamic(build(), {nn.Linear}, torch.qint8)
"""
PIXELS = ("--size", "8", "--mean", "0.5,0.5,0.5", "--std", "0.5,0.5,0.5")
QUICK = (*PIXELS, "--criterion", "l1", "--normalisation", "mean", "--finetune-epochs", "0", "--targets", "")


def _images(folder: Path) -> Path:
    """40 PNGs in two classes, and `set.npz` of them."""
    pixels = np.random.default_rng(0).integers(0, 256, (40, 8, 8, 3), np.uint8)
    for i, image in enumerate(pixels):
        path = folder / "set" / "ab"[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
    np.savez(folder / "set.npz", images=pixels, labels=np.arange(40) % 2)
    return folder / "set"


def _compress(folder: Path, model: str, data: Path) -> Arguments:
    (folder / "model.py").write_text(MODEL)
    spec = f"{folder / 'model.py'}:{model}"
    return ["compress", "--model", spec, "--data", str(data), "--out", str(folder / "run"), *QUICK]


def _model(name: str) -> Callable[[Path], Arguments]:
    def make(folder: Path) -> Arguments:
        _images(folder)
        return _compress(folder, name, folder / "set.npz")

    make.__name__ = f"model {name}"
    return make


def _empty_class(folder: Path) -> Arguments:
    (_images(folder) / "c").mkdir()
    return _compress(folder, "build", folder / "set")


def _copies_to_evaluate(folder: Path) -> Arguments:
    for path in sorted(_images(folder).rglob("*.png")):
        copy = folder / "held" / path.relative_to(folder / "set").with_suffix(".bmp")
        copy.parent.mkdir(parents=True, exist_ok=True)
        Image.open(path).save(copy)
    return [*_compress(folder, "build", folder / "set"), "--evaluation-data", str(folder / "held")]


def _an_id_for_a_label(folder: Path) -> Arguments:
    Image.new("RGB", (8, 8)).save(folder / "0.png")
    (folder / "labels.csv").write_text("filename,label\n0.png,1000000000\n")
    return _compress(folder, "build", folder)


def _recipe_of_bytes(folder: Path) -> Arguments:
    (folder / "r.toml").write_bytes(b'model = "\xff\xfe"\n')
    return ["compress", "--recipe", str(folder / "r.toml"), "--dry-run"]


def _nested_recipe(folder: Path) -> Arguments:
    (folder / "r.toml").write_text("units = " + "[" * 5000)
    return ["compress", "--recipe", str(folder / "r.toml"), "--dry-run"]


def _nested_composite(folder: Path) -> Arguments:
    (folder / "c.json").write_text('{"low": ' + "[" * 100_000)
    return ["compress", "--composite", str(folder / "c.json"), "--dry-run"]


def _nested_text(folder: Path) -> Arguments:
    return ["compress", "--composite", '{"low": ' + "[" * 100_000, "--dry-run"]


def _huge_number(folder: Path) -> Arguments:
    return ["compress", "--composite", '{"epsilon": ' + "9" * 400 + "}", "--dry-run"]


def _load_nothing(folder: Path) -> Arguments:
    return ["load", str(folder)]


def _load_nested(folder: Path) -> Arguments:
    (folder / "network.json").write_text('{"schema": ' + "[" * 100_000)
    return ["load", str(folder)]


def _load_without_weights(folder: Path) -> Arguments:
    (folder / "network.json").write_text('{"schema": "network/3"}')
    return ["load", str(folder)]


def _run_that_is_no_json(folder: Path) -> Arguments:
    _images(folder)
    (folder / "run").mkdir()
    (folder / "run" / "run.json").write_text("[" * 100_000)
    return _compress(folder, "build", folder / "set.npz")


CASES: list[tuple[Callable[[Path], Arguments], int, str]] = [
    (_model("on_meta"), 2, "has no values for"),
    (_model("quantised"), 2, "Give the float model"),
    (_empty_class, 2, "hold no images ('c')"),
    (_copies_to_evaluate, 2, "are also among the evaluation images"),
    (_an_id_for_a_label, 2, "has label '1000000000'"),
    (_recipe_of_bytes, 2, "is not valid TOML"),
    (_nested_recipe, 2, "is not valid TOML"),
    (_nested_composite, 2, "is not valid JSON"),
    (_nested_text, 2, "is not valid JSON"),
    (_huge_number, 2, "is not a number"),
    (_load_nothing, 2, "holds no pruned network"),
    (_load_nested, 2, "is not JSON"),
    (_load_without_weights, 2, "was changed since it was written"),
    (_run_that_is_no_json, 2, "is not JSON"),
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("make", "code", "said"), CASES, ids=[make.__name__.strip("_") for make, *_ in CASES])
def test_bad_input_is_one_clear_line(
    make: Callable[[Path], Arguments], code: int, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(make(tmp_path)) == code
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert said in lines[0]


@pytest.mark.parametrize("content", ["[" * 100_000, "{}", '{"schema": "benchmark/1"}', "\ud800"])
def test_a_benchmark_that_is_none_is_one_line(tmp_path: Path, content: str) -> None:
    (tmp_path / "b.json").write_bytes(content.encode(errors="surrogatepass"))
    with pytest.raises(InputError, match=r"b\.json") as caught:
        read_measured(tmp_path / "b.json")
    assert "\n" not in str(caught.value)
