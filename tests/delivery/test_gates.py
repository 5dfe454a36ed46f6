"""A gate passes only where it shows something: not on too few images, nor for a network that guesses."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from compressor.accuracy import chance_of
from compressor.delivery import gates
from compressor.delivery.artifacts import DENSE
from compressor.delivery.gates import (
    _parity_checks,
    accuracy_checks,
    accuracy_of,
    doubt_of,
    least_images,
    no_better_than_chance,
    too_few,
)
from compressor.delivery.results import Files
from compressor.device.parity import Parity, compare
from compressor.errors import GateError
from compressor.export.gate import measure_export, measure_rounding
from compressor.export.onnx import export_onnx
from compressor.graph import trace
from compressor.inputs.checkpoints import state_hash
from compressor.inputs.images import Images
from compressor.inputs.models import Model
from compressor.recipe import make_recipe
from compressor.records import Accuracy, Quality
from compressor.run.checks import Checks, gate, require_passed, until_failed
from compressor.run.saved import example_of
from compressor.run.work import Request, Work, prepare

from .conftest import QUICK


@pytest.fixture
def work(small: nn.Module, images: Images, tmp_path: Path) -> Work:
    recipe = make_recipe({**QUICK, "model": "Small", "out": tmp_path / "run", "max_accuracy_loss": 3.0})
    given = Model(small, "", "given", None, None, state_hash(small))
    return prepare(Request(recipe, given, images), lambda stage, share: None)


LIMIT = 3.0  # points
SAME = Parity(n=4, max_abs=0.0, mean_abs=0.0, cosine=1.0, sqnr_db=200.0, top1_agreement=1.0, reference_max_abs=1.0)


def _checked(dense: Accuracy, shipped: Accuracy) -> Checks:
    return accuracy_checks({"dense": dense, "shipped": shipped}, LIMIT)


def test_a_limit_that_was_kept_on_enough_images_is_passed() -> None:
    checks = _checked(Accuracy(900, 1000, chance=0.1), Accuracy(890, 1000))
    assert ([row.state for row in checks.gates], checks.warnings, checks.failure) == (["passed"], (), "")


def test_a_dense_network_that_guesses_shows_nothing() -> None:
    checks = _checked(Accuracy(0, 28, chance=0.0), Accuracy(0, 28))
    (row,), (warning,) = checks.gates, checks.warnings
    assert row.state == "not shown"
    assert not row.passed
    assert "right on 0 of 28 evaluation images (95 % interval 0.0 to 12.1 %)" in warning
    assert "labels, the order of the classes or the pre-processing are probably wrong" in warning


def test_only_right_answers_are_an_accuracy() -> None:
    for metric, name in (("fidelity", "quality: fidelity lost"), ("mIoU", "quality: mIoU lost")):
        figure = Quality(metric, 0.9, 200, 0.88, 0.92, chance=0.0)
        checks = accuracy_checks({"dense": figure, "shipped": figure}, LIMIT)
        assert [row.name for row in checks.gates] == [name]
    assert _checked(Accuracy(9, 9), Accuracy(9, 9)).gates[0].name == "accuracy: top-1 lost"
    agreeing = Accuracy(9, 9, metric="agreement")
    assert _checked(agreeing, agreeing).gates[0].name == "quality: agreement lost"


def test_few_images_cannot_show_few_points() -> None:
    checks = _checked(Accuracy(12, 12, chance=0.1), Accuracy(12, 12))
    (row,), (warning,) = checks.gates, checks.warnings
    assert row.state == "not shown"
    assert "12 images are too few to show a loss of at most 3 points: with none lost, 22.1 points may be" in warning
    assert "it takes 99" in warning
    assert checks.failure == ""


def test_a_loss_above_the_limit_fails_on_any_images(work: Work) -> None:
    checks = _checked(Accuracy(12, 12, chance=0.1), Accuracy(2, 12))
    assert checks.gates[-1].state == "FAILED"
    with pytest.raises(GateError, match=r"top-1 lost' failed: 83.33 points, at most 3 allowed; raise the budget"):
        require_passed(work.stages, checks)


def test_checks_add_up_in_order_and_a_warning_is_said_once() -> None:
    first = gate("first", 1.0, limit=2.0, remedy="", doubt="too few") + Checks(not_checked=("a GPU",))
    both = first + gate("second", 2.0, limit=2.0, remedy="", doubt="too few")
    assert [row.name for row in both.gates] == ["first", "second"]
    assert (both.not_checked, both.warnings, both.failure) == (("a GPU",), ("too few",), "")


def test_nothing_is_looked_at_behind_a_gate_that_failed() -> None:
    values = iter([1.0, 3.0, math.nan])
    checks = until_failed(gate(str(value), value, limit=2.0, remedy="look") for value in values)
    assert [row.name for row in checks.gates] == ["1.0", "3.0"]
    assert checks.failure == "gate '3.0' failed: 3 found, at most 2 allowed; look"
    assert math.isnan(next(values))


def test_what_is_no_number_keeps_to_no_limit() -> None:
    assert gate("identity", math.nan, limit=1.0, remedy="").gates[0].failed


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


class Cancelling(nn.Module):
    """Float32 loses what float64 keeps."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return ((x + 2.0**21) - 2.0**21).mean((2, 3))


@pytest.mark.parametrize(
    ("network", "difference", "said"),
    [
        (Cancelling(), 0.05, "this network multiplies rounding, so that no file can be shown to be right"),
        (nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()), 0.05, "its export differs"),
    ],
)
def test_a_network_that_multiplies_rounding_is_not_blamed_on_its_export(
    network: nn.Module, difference: float, said: str
) -> None:
    images = torch.rand(4, 3, 1, 1, generator=torch.Generator().manual_seed(0))
    graph = trace(network.eval(), images)
    files, by_file = Files({DENSE: Path("dense.onnx")}), {DENSE.name: {1: replace(SAME, max_abs=difference)}}
    checks = until_failed(_parity_checks(files, by_file, 1e-3, lambda artifact: measure_rounding(graph, images)))
    assert said in checks.failure
    assert checks.gates[0].value == difference


def test_rounding_is_not_asked_of_a_file_that_agrees() -> None:
    def never(artifact: object) -> Parity:
        raise AssertionError("a whole pass in float64 for nothing")

    checks = list(_parity_checks(Files({DENSE: Path("dense.onnx")}), {DENSE.name: {1: SAME}}, 1e-3, never))
    assert [check.failure for check in checks] == [""]


class TwoUnits(nn.Module):
    """Boxes in pixels beside the scores of three classes, in one output [N, 7, places], each by a layer of its own."""

    def __init__(self, *, rounding: float = 0.0) -> None:
        super().__init__()
        self.boxes, self.classes = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 3, 3)
        self.rounding = rounding  # what is added to scores and taken away again

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scores = (self.classes(x).sigmoid() + self.rounding) - self.rounding
        return torch.cat([640 * self.boxes(x).sigmoid(), scores], 1).flatten(2)


def _two_units(folder: Path, *, rounding: float = 0.0) -> tuple[TwoUnits, torch.Tensor, Path]:
    torch.manual_seed(0)
    network = TwoUnits(rounding=rounding).eval()
    images = torch.rand(6, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    path = folder / "two-units.onnx"
    export_onnx(trace(network, images), images, path)
    return network, images, path


def _checked_file(network: nn.Module, images: torch.Tensor, path: Path) -> Checks:
    graph = trace(network, images)
    by_file = {DENSE.name: measure_export(path, graph, images.numpy())}
    rounding = measure_rounding(graph, images)
    return until_failed(_parity_checks(Files({DENSE: path}), by_file, 1e-3, lambda artifact: rounding))


def test_a_fault_among_small_numbers_does_not_hide_behind_large_ones(tmp_path: Path) -> None:
    network, images, path = _two_units(tmp_path)
    sound = _checked_file(network, images, path)
    assert [row.state for row in sound.gates] == ["passed", "passed"]

    with torch.no_grad():
        network.classes.weight[1] *= 1.3
    faulty = _checked_file(network, images, path)
    assert [row.state for row in faulty.gates] == ["passed", "FAILED"]  # of the whole output it is too little to see
    assert "its export differs in channel 5 of axis 1" in faulty.failure


def test_a_channel_below_its_own_rounding_fails_no_sound_file(tmp_path: Path) -> None:
    """Scores that keep 0.06 of a number near 1: the file and PyTorch round them apart."""
    network, images, path = _two_units(tmp_path, rounding=2.0**20)
    graph = trace(network, images)
    by_file = {DENSE.name: {1: replace(SAME, channel_relative=0.06, channel="channel 5 of axis 1")}}
    checks = until_failed(
        _parity_checks(Files({DENSE: path}), by_file, 1e-3, lambda artifact: measure_rounding(graph, images))
    )
    assert [row.state for row in checks.gates] == ["passed", "passed"]
    assert checks.gates[1].limit > 0.06


class Answering:
    """In a session's place: for every image the classes in the order that its first pixel names."""

    def __init__(self, orders: list[list[int]]) -> None:
        self.orders = orders

    def run(self, images: np.ndarray) -> np.ndarray:
        orders = [self.orders[int(image[0, 0, 0])] for image in images]
        return np.array([[-order.index(c) for c in range(len(order))] for order in orders], dtype=np.float32)


def _answered(monkeypatch: pytest.MonkeyPatch, orders: list[list[int]], labels: list[int], size: int) -> Accuracy:
    """The accuracy of a file that answers so, of batches of `size` images."""
    monkeypatch.setattr(gates, "open_model", lambda path, **options: Answering(orders))
    pixels = torch.arange(len(orders)).reshape(-1, 1, 1, 1)
    pairs = zip(pixels.split(size), torch.tensor(labels).split(size), strict=True)
    return accuracy_of(Path("model.onnx"), list(pairs))  # type: ignore[arg-type]


@pytest.mark.parametrize("size", [1, 2, 3])
def test_answers_are_counted_over_uneven_batches(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    orders = [[3, 1, 0, 2, 4, 5], [5, 4, 3, 2, 1, 0], [0, 1, 2, 3, 4, 5]]
    accuracy = _answered(monkeypatch, orders, [3, 0, 4], size)
    assert (accuracy.correct, accuracy.correct_top5, accuracy.n) == (1, 2, 3)  # of the second the label comes sixth


def test_of_five_classes_no_top5_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    accuracy = _answered(monkeypatch, [[1, 0, 2, 3, 4]], [0], 1)
    assert (accuracy.correct, accuracy.correct_top5) == (0, -1)


def test_of_equal_answers_the_first_class_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gates, "open_model", lambda path, **options: SimpleNamespace(run=lambda x: np.zeros((2, 6))))
    batch = (torch.zeros(2, 1, 1, 1), torch.tensor([0, 5]))
    accuracy = accuracy_of(Path("model.onnx"), [batch])  # type: ignore[arg-type]
    assert (accuracy.correct, accuracy.correct_top5) == (1, 1)


@pytest.mark.parametrize("images", [1, 5, 12, 50, 98])
def test_what_few_images_may_hide_is_what_would_stay_unseen_once_in_twenty(images: int) -> None:
    words = too_few(images, 3.0)
    possible = float(words.split("with none lost, ")[1].split(" ")[0]) / 100
    assert (1 - possible) ** images == pytest.approx(0.05, abs=0.006)
    assert words.endswith("it takes 99")


@pytest.mark.parametrize("limit", [0.5, 1.0, 3.0, 10.0, 50.0])
def test_the_least_images_rule_the_limit_out_and_one_fewer_does_not(limit: float) -> None:
    least = least_images(limit)
    assert (1 - limit / 100) ** least <= 0.05 < (1 - limit / 100) ** (least - 1)


def test_guessing_comes_before_too_few_images() -> None:
    guessing = Accuracy(1, 10, chance=0.1)
    assert "where chance would be right on 10.0 %" in doubt_of(guessing, 3.0)
    assert "too few" in doubt_of(Accuracy(10, 10, chance=0.1), 3.0)
    assert no_better_than_chance(Accuracy(10, 10)) == ""  # chance was not counted
