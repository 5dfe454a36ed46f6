"""A gate passes only where it shows something: not on too few images, nor for a network that guesses."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from torch import nn

from compressor.accuracy import chance_of
from compressor.delivery.gates import accuracy_of, doubt_of, gate_accuracy, least_images, too_few
from compressor.device.parity import compare
from compressor.errors import GateError
from compressor.export.onnx import export_onnx
from compressor.graph import trace
from compressor.inputs.checkpoints import state_hash
from compressor.inputs.images import Images
from compressor.inputs.models import Model
from compressor.recipe import make_recipe
from compressor.records import Accuracy
from compressor.run.saved import example_of
from compressor.run.work import Work, prepare

from .conftest import QUICK


@pytest.fixture
def work(small: nn.Module, images: Images, tmp_path: Path) -> Work:
    recipe = make_recipe({**QUICK, "model": "Small", "out": tmp_path / "run", "max_accuracy_loss": 3.0})
    given = Model(small, "", "given", None, None, state_hash(small))
    return prepare(recipe, lambda stage, share: None, given, images)


def _gated(work: Work, dense: Accuracy, shipped: Accuracy) -> tuple[str, str]:
    gate_accuracy(work, {"dense": dense, "shipped": shipped})
    return work.gates[-1].state, " ".join(work.warnings)


def test_a_limit_that_was_kept_on_enough_images_is_passed(work: Work) -> None:
    assert _gated(work, Accuracy(900, 1000, chance=0.1), Accuracy(890, 1000)) == ("passed", "")


def test_a_dense_network_that_guesses_shows_nothing(work: Work) -> None:
    state, said = _gated(work, Accuracy(0, 28, chance=0.0), Accuracy(0, 28))
    assert state == "not shown"
    assert "right on 0 of 28 evaluation images (95 % interval 0.0 to 12.1 %)" in said
    assert "labels, the order of the classes or the pre-processing are probably wrong" in said
    assert not work.gates[-1].passed


def test_few_images_cannot_show_few_points(work: Work) -> None:
    state, said = _gated(work, Accuracy(12, 12, chance=0.1), Accuracy(12, 12))
    assert state == "not shown"
    assert "12 images are too few to show a loss of at most 3 points: with none lost, 22.1 points may be" in said
    assert "it takes 99" in said


def test_a_loss_above_the_limit_fails_on_any_images(work: Work) -> None:
    with pytest.raises(GateError, match="top-1 lost"):
        gate_accuracy(work, {"dense": Accuracy(12, 12, chance=0.1), "shipped": Accuracy(2, 12)})
    assert work.gates[-1].state == "FAILED"


@pytest.mark.parametrize(("limit", "least"), [(3, 99), (1, 299), (50, 5), (100, 1), (0, 1), (-100, 1)])
def test_so_many_images_rule_a_larger_loss_out(limit: float, least: int) -> None:
    assert least_images(limit) == least
    assert too_few(least, limit) == ""
    assert least == 1 or too_few(least - 1, limit)


def test_chance_is_what_the_same_answers_would_get_in_another_order() -> None:
    truths = np.arange(100) % 10
    assert chance_of(truths, truths) == pytest.approx(0.1)
    assert chance_of(np.zeros(100, int), truths) == pytest.approx(0.1)
    assert chance_of(np.zeros(100, int), np.zeros(100, int)) == 1.0
    assert chance_of(truths + 500, truths) == 0.0
    shuffled = np.random.default_rng(0).permutation(truths)
    assert chance_of(shuffled, truths) == chance_of(truths, truths)


def test_a_network_that_always_says_the_same_is_not_above_chance() -> None:
    assert doubt_of(Accuracy(600, 1000, chance=0.6), 3.0) != ""
    assert doubt_of(Accuracy(985, 1000, chance=0.9), 3.0) == ""


def test_no_image_is_no_accuracy_and_no_output_no_parity(work: Work, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    export_onnx(trace(work.model.module, example_of((3, 12, 12))), work.example, path)
    with pytest.raises(GateError, match="nothing was measured"):
        accuracy_of(path, [])  # type: ignore[arg-type]
    with pytest.raises(GateError, match="nothing was compared"):
        compare(np.zeros((0, 4)), np.zeros((0, 4)))
    with pytest.raises(GateError, match="nothing was compared"):
        compare(np.zeros((4, 0)), np.zeros((4, 0)))
