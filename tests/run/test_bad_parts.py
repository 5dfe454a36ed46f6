"""Data and functions of a user's that a run would end at: one line that says what, where and what to do, at once."""

from __future__ import annotations

import copy
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, fx, nn

import compressor
from compressor.__main__ import main
from compressor.errors import CompressorError, DataError, ModelError, RecipeError, TaskError
from compressor.graph import trace
from compressor.run import rehearsal, work
from compressor.tensors import Inputs, as_tuple

N = 24
QUICK: dict[str, Any] = {
    "calibration": 12,
    "batch_size": 8,
    "finetune_epochs": 0,
    "targets": (),
    "latency_seconds": 0.0,
    "multiple": 1,
    "max_accuracy_loss": 100,
}


def _body() -> list[nn.Module]:
    return [nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU()]


class Detector(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.scores, self.sides = nn.Sequential(*_body()), nn.Conv2d(8, 2, 1), nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = self.body(x)
        return {"scores": self.scores(x), "sides": self.sides(x)}


@pytest.fixture(scope="module")
def models() -> dict[str, nn.Module]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)]
        return {
            "classifier": nn.Sequential(*_body(), *head).eval(),
            "segmenter": nn.Sequential(*_body(), nn.Conv2d(8, 5, 1)).eval(),
            "detector": Detector().eval(),
        }


X = torch.randn(N, 3, 8, 8, generator=torch.Generator().manual_seed(1))
LABELS = torch.arange(N) % 4
MASKS = torch.arange(N * 64).reshape(N, 8, 8) % 5
BOX = torch.tensor([[1.0, 1.0, 4.0, 4.0]])
LABELLED = (X, LABELS)
Leaves = Mapping[str, Tensor]


def boxed(*corners: float) -> list[Any]:
    return [(x, {"boxes": torch.tensor([corners]), "labels": torch.zeros(1, dtype=torch.int64)}) for x in X]


def decode(leaves: Leaves, **other: Any) -> list[dict[str, Any]]:
    image = {"boxes": BOX, "scores": torch.ones(1), "labels": torch.zeros(1, dtype=torch.int64), **other}
    return [image] * len(leaves["scores"])


def fails(*arguments: Any) -> Any:
    raise KeyError("out")


def spoilt() -> Iterator[Any]:
    yield X[:8], LABELS[:8]
    fails()


HERE = r"test_bad_parts\.py"
MINE = rf"\(.*{HERE}, line \d+\), given as"

QUALITIES: dict[str, tuple[Callable[..., Any], str]] = {
    "NaN": (lambda predict, data: float("nan"), rf"{MINE} quality, answers with nan, expected a finite number"),
    "infinity": (lambda predict, data: float("inf"), "answers with inf, expected a finite number"),
    "a text": (lambda predict, data: "0.5", "answers with a str, expected a number or a Quality"),
    "a bool": (lambda predict, data: True, "answers with a bool, expected a number"),
    "numpy's bool": (lambda predict, data: np.bool_(True), "answers with a bool, expected a number"),
    "two values": (lambda predict, data: torch.ones(2), r"answers with a tensor \[2\] of float32, expected a number"),
    "nothing": (lambda predict, data: None, "answers with a NoneType, expected a number"),
    "an error": (fails, rf"fails {MINE} quality, raises KeyError: 'out', at .*{HERE}:\d+"),
    "one argument": (lambda predict: 1.0, rf"{MINE} quality, raises TypeError: .*takes 1 positional argument but 2"),
}
OBJECTIVES: dict[str, tuple[str, Callable[..., Any], str]] = {
    "two axes": ("says", lambda leaves, targets: leaves["output"], r"a tensor \[8, 4\] of float32, expected one real"),
    "cut off": ("says", lambda leaves, targets: leaves["output"].detach().sum(1), "has no gradient; expected torch op"),
    "numpy": ("says", lambda leaves, targets: leaves["output"].numpy().sum(1), rf"raises RuntimeError.*{HERE}:\d+"),
    "no such leaf": ("says", lambda leaves, targets: leaves["logits"].sum(1), "raises KeyError: 'logits'"),
    "a number": ("loss", lambda leaves, targets: 1.0, "given as loss, answers with a float, expected one real number"),
    "a mean": (
        "loss",
        lambda leaves, targets: nn.functional.cross_entropy(leaves["output"], targets),
        r"answers with a tensor \[\] of float32, .*reduction='none'",
    ),
    "NaN": ("loss", lambda leaves, targets: leaves["output"].sum(1) * torch.nan, "is not finite for 8 of 8 samples"),
    "below zero": (
        "distance",
        lambda leaves, dense: (leaves["output"] - dense["output"]).sum(1) - 1,
        "given as distance, answers with -.*; expected squared distances, which are 0 or more",
    ),
    "an error": ("distance", fails, rf"fails {MINE} distance, raises KeyError: 'out', at .*{HERE}:\d+"),
}
DECODERS: dict[str, tuple[Callable[..., Any], str]] = {
    "an error": (fails, rf"fails {MINE} decode, raises KeyError: 'out', at .*{HERE}:\d+"),
    "other keys": (lambda leaves: [{"box": BOX}] * len(leaves["scores"]), "has an image with box, expected a dict of"),
    "one image": (lambda leaves: decode(leaves)[:1], r"answers with a list of 1, expected a list of \d dicts"),
    "nothing": (lambda leaves: None, r"answers with a NoneType, expected a list of \d dicts"),
    "NaN": (lambda leaves: decode(leaves, boxes=BOX * torch.nan), "has a box or a score that is not finite"),
    "other lengths": (lambda leaves: decode(leaves, scores=torch.ones(3)), r"boxes \[1, 4\], scores \[3\], labels"),
    "texts": (lambda leaves: decode(leaves, scores="high"), r"scores \(str\), .*expected tensors of numbers"),
    "fractions": (lambda leaves: decode(leaves, labels=torch.full((1,), 0.5)), "labels that are no whole numbers"),
}
Case = tuple[type[CompressorError], str, Any, dict[str, Any], str]
CASES: dict[str, Case] = {
    **{f"quality: {n}": (TaskError, "classifier", LABELLED, {"quality": f}, w) for n, (f, w) in QUALITIES.items()},
    **{f"{part}: {n}": (TaskError, "classifier", LABELLED, {part: f}, w) for n, (part, f, w) in OBJECTIVES.items()},
    **{f"decode: {n}": (TaskError, "detector", X, {"decode": f}, w) for n, (f, w) in DECODERS.items()},
    "quality: no function": (RecipeError, "classifier", X, {"quality": 3}, "quality is an int, expected a function"),
    "quality: no file": (RecipeError, "classifier", X, {"quality": "my_map"}, "write file.py:function"),
    "a loader of nothing": (DataError, "classifier", [], {}, "yields nothing; give a loader"),
    "a generator of nothing": (DataError, "classifier", lambda: iter([]), {}, "yields nothing; give a loader"),
    "a loader that raises": (
        DataError, "classifier", lambda: spoilt(), {}, rf"raised KeyError: 'out', at .*{HERE}:\d+; correct it",
    ),
    "two shapes": (
        DataError, "classifier", [(X[:8], LABELS[:8]), (torch.randn(8, 3, 10, 10), LABELS[:8])], {},
        r"batch 1 of .* is float32 \[3, 10, 10\], the first float32 \[3, 8, 8\]; give all samples one shape",
    ),
    "fewer targets": (
        DataError, "classifier", [(X, LABELS[1:])], {}, "batch 0 of .* holds 24 of the input, 23 of targets; give as",
    ),
    "other keys": (
        DataError, "classifier", [{"input": X[:8], "label": LABELS[:8]}, {"image": X[8:], "label": LABELS[8:]}], {},
        "batch 1 of .* has the inputs without names, those before it input; give the same in all",
    ),
    "targets that end": (
        DataError, "classifier", [LABELLED, X], {}, "batch 1 of .* has no targets, those before it have some; give",
    ),
    "kinds of targets": (
        DataError, "classifier", [LABELLED, (X, MASKS)], {}, "has a target of the kind 'mask', the first 'class'",
    ),
    "NaN": (DataError, "classifier", (X * torch.nan, LABELS), {}, "sample '00' of .* holds NaN; remove it"),
    "masks for a vector": (
        ModelError, "classifier", (X, MASKS), {"task": "segmentation"},
        r"needs a leaf \[N, C, height, width\] .* answers with output \[8, 4\] .*; say another task",
    ),
    "masks for classes": (
        DataError, "classifier", (X, MASKS), {"task": "classification"}, "are masks, and classification takes one",
    ),
    "floats for classes": (
        DataError, "classifier", (X, LABELS.float()), {"task": "classification"}, "other numbers than one whole one a",
    ),
    "boxes for classes": (
        DataError, "classifier", boxed(1, 1, 4, 4), {"task": "classification"}, "are boxes, and classification",
    ),
    "classes there are not": (
        DataError, "classifier", (X, LABELS + 3), {"task": "classification"}, r"has label \d, but the model tells 4",
    ),
    "classes for maps": (
        ModelError, "segmenter", LABELLED, {"task": "classification"}, r"with \[N, 5, 8, 8\], and classification takes",
    ),
    "classes for many": (
        ModelError, "detector", LABELLED, {"task": "classification"}, r"\[N, 2, 8, 8\], \[N, 4, 8, 8\], and class",
    ),
    "rows for maps": (ModelError, "segmenter", X, {"task": "embedding"}, r"needs a leaf \[N, classes\] or \[N, featu"),
    "classes for masks": (DataError, "segmenter", LABELLED, {"task": "segmentation"}, r"masks are \[8\], the network"),
    "masks of more classes": (
        DataError, "segmenter", (X, MASKS + 4), {"task": "segmentation"}, "a mask holds 4 to 8, the network answers wi",
    ),
    "masks of another size": (
        DataError, "segmenter", (X, MASKS[:, :5, :7]), {"task": "segmentation"}, r"masks are \[8, 5, 7\], .*; give m",
    ),
    "masks of fractions": (
        DataError, "segmenter", (X, MASKS + 0.5), {"task": "segmentation"}, "numbers with a fraction; segmentation tak",
    ),
    "flags that are none": (
        DataError, "classifier", (X, torch.full((N, 4), 3)), {"task": "multi-label"}, "labels are 3 to 3, and multi-la",
    ),
    "values of another form": (
        ModelError, "classifier", (X, torch.randn(N, 7)), {"task": "regression"}, r"needs a leaf of \[8, 7\], as the",
    ),
    "values that are NaN": (
        DataError, "classifier", (X, torch.full((N, 4), torch.nan)), {"task": "regression"}, "every target is 0 or not",
    ),
    "identities that are none": (
        DataError, "classifier", (X, torch.randn(N, 4)), {"task": "embedding"}, "embedding takes one whole number a",
    ),
    "no such task": (
        RecipeError, "classifier", X, {"task": "segmentaton"}, r"task = 'segmentaton' is not one of classification, .* "
        r"Did you mean 'segmentation'\?",
    ),
    "a box outside": (
        DataError, "detector", boxed(40, 1, 70, 4), {"decode": decode}, "has the box 40 1 70 4, outside of the in",
    ),
    "a turned box": (
        DataError, "detector", boxed(4, 1, 1, 4), {"decode": decode}, "entry 0 of .* 4 1 1 4, which ends before it",
    ),
    "a box of NaN": (
        DataError, "detector", boxed(torch.nan, 1, 4, 4), {"decode": decode}, "entry 0 of .*a box with NaN or inf",
    ),
    "boxes and no decode": (TaskError, "detector", boxed(1, 1, 4, 4), {}, r"needs decode\(leaves\).*; say decode="),
    "classes for boxes": (
        DataError, "detector", LABELLED, {"task": "detection", "decode": decode}, r"are a tensor \[8\]",
    ),
    "a decode for classes": (
        RecipeError, "classifier", LABELLED, {"decode": decode}, "decode makes boxes, and the task is class",
    ),
    "data that are none": (DataError, "classifier", 5, {}, "data are given as an int, expected a folder"),
}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def _each_model_traced_once() -> Iterator[None]:
    """What is wrong here is never the model, of which there are three."""
    graphs: dict[Any, fx.GraphModule] = {}

    def traced(model: nn.Module, example: Inputs, keywords: Sequence[str]) -> fx.GraphModule:
        key = (model, *(tensor.shape for tensor in as_tuple(example)), *keywords)
        graphs[key] = graphs.get(key) or trace(model, example, keywords)
        return copy.deepcopy(graphs[key])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(work, "trace", traced)
        yield


@pytest.mark.parametrize("name", CASES)
def test_what_is_wrong_is_named_before_anything_is_written(
    models: dict[str, nn.Module], tmp_path: Path, name: str
) -> None:
    kind, model, data, options, words = CASES[name]
    with pytest.raises(kind, match=words) as caught:
        compressor.compress(models[model], data, out=tmp_path / "run", **{**QUICK, **options})
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.thorough
def test_a_quality_that_only_some_images_suit_is_left_to_the_run(
    models: dict[str, nn.Module], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fewer images than there are may lack what the metric needs; then the run itself says so."""

    def picky(predict: Any, data: Any) -> float:
        if sum(len(x) for x, _ in data) < 5:
            raise DataError("too few to tell")
        raise DataError("none of all images will do")

    monkeypatch.setattr(rehearsal, "REHEARSED_IMAGES", 4)
    with pytest.raises(DataError, match="none of all images will do"):
        compressor.compress(models["classifier"], LABELLED, out=tmp_path / "run", quality=picky, **QUICK)
    assert (tmp_path / "run").exists()


CODE = """
import torch

def nan(predict, data):
    return float("nan")

def fails(predict, data):
    return {}["out"]

def empty():
    return []

def mixed():
    return [(torch.randn(8, 1, 8, 8), torch.zeros(8).long()), (torch.randn(8, 1, 9, 9), torch.zeros(8).long())]
"""


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--quality", "mine.py:nan"], r"nan \(.*mine\.py, line 4\), given as quality, answers with nan"),
        (["--quality", "mine.py:fails"], r"fails \(.*given as quality, raises KeyError: 'out', at .*mine\.py:8"),
        (["--quality", "mine.py:nam"], r"'mine\.py' has no function 'nam'\. Did you mean 'nan'\?"),
        (["--data", "mine.py:empty"], "yields nothing; give a loader"),
        (["--data", "mine.py:mixed"], r"batch 1 of .*\[1, 9, 9\], the first float32 \[1, 8, 8\]"),
        (["--task", "segmentation"], r"needs a leaf \[N, C, height, width\]"),
        (["--task", "boxes"], "task = 'boxes' is not one of classification"),
    ],
)
def test_the_command_line_says_it_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], flags: list[str], words: str
) -> None:
    (tmp_path / "mine.py").write_text(CODE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    assert main(["compress", *flags, "--calibration", "16", "--quiet"]) == 2
    error = capfd.readouterr().err
    assert re.search(words, " ".join(error.split())), error
    assert "Traceback" not in error
    assert not (tmp_path / "runs").exists()
