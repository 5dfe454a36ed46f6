"""A training's arithmetic: fast where machine and network bear it, plain elsewhere, float32 in all that is kept."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from compressor.graph import trace
from compressor.inputs.images import Batches
from compressor.placement import computing
from compressor.recovery import RecoveryOptions, pace, recover
from compressor.recovery.pace import PLAIN, Pace, first_that_bears, has_bfloat16_units, paces_on
from compressor.recovery.teaching import Teaching
from compressor.tasks import reference_of, task_named

from .conftest import pair, pool

CPU = torch.device("cpu")
IMAGES = torch.randn(5, 3, 8, 8, generator=torch.Generator().manual_seed(2))
FAST, LAID_OUT = Pace(bfloat16=True, channels_last=True), Pace(channels_last=True)


@pytest.fixture
def units(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with units for bfloat16."""
    monkeypatch.setattr(pace, "has_bfloat16_units", lambda device: True)


@pytest.mark.parametrize(
    ("inputs", "with_units", "without"),
    [
        (IMAGES, (FAST, LAID_OUT), (LAID_OUT,)),
        ((IMAGES, torch.zeros(5, 2)), (FAST, LAID_OUT), (LAID_OUT,)),
        (torch.zeros(5, 7, 4), (Pace(bfloat16=True),), ()),  # tokens have no layout of images
        (torch.zeros(5, 3, 8, 8, dtype=torch.uint8), (Pace(bfloat16=True),), ()),
    ],
)
def test_what_is_tried_follows_from_the_machine_and_the_inputs(
    inputs: Tensor, with_units: tuple[Pace, ...], without: tuple[Pace, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    for has, paces in ((True, with_units), (False, without)):
        monkeypatch.setattr(pace, "has_bfloat16_units", lambda device, has=has: has)
        assert paces_on(CPU, inputs) == paces


@pytest.mark.parametrize(
    ("capabilities", "has"),
    [
        ({"amx_bf16": True}, True),
        ({"avx512_bf16": True}, True),
        ({"avx2": True, "amx_bf16": False}, False),
        ({}, False),
    ],
)
def test_a_processor_without_units_does_not_emulate_them(
    capabilities: dict[str, bool], has: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    assert has_bfloat16_units(CPU) == has
    monkeypatch.delattr(torch.cpu, "get_capabilities")  # as early versions of PyTorch
    assert not has_bfloat16_units(CPU)


def test_the_first_pace_whose_noise_is_small_is_taken() -> None:
    def noise_of(noises: dict[Pace, float]) -> Pace:
        return first_that_bears(tuple(noises), lambda tried: noises[tried])

    assert noise_of({FAST: 0.01, LAID_OUT: 0.0}) == FAST
    assert noise_of({FAST: 0.03, LAID_OUT: 0.0}) == LAID_OUT
    assert noise_of({FAST: float("nan"), LAID_OUT: float("inf")}) == PLAIN
    assert noise_of({}) == PLAIN


def test_what_a_layer_does_not_know_is_not_taken_and_a_fault_is_not_hidden() -> None:
    def refuse(tried: Pace) -> float:
        if tried.bfloat16:
            raise RuntimeError("not implemented for 'BFloat16'")
        return 0.0

    assert first_that_bears((FAST, LAID_OUT), refuse) == LAID_OUT
    with pytest.raises(ZeroDivisionError):
        first_that_bears((FAST,), lambda tried: 1 / 0)


@pytest.mark.usefixtures("units")
def test_a_recovery_in_bfloat16_keeps_float32_and_comes_nearer(lessons: Batches, held: Batches) -> None:
    dense, small, slices = pair()
    options = RecoveryOptions(minutes=5, passes=5)
    network, recovery = recover(dense, small, lessons, held, slices=slices, options=options)
    assert recovery.precision == "bfloat16"
    assert {parameter.dtype for parameter in network.parameters()} == {torch.float32}
    assert all(parameter.is_contiguous() for parameter in network.parameters())
    assert recovery.moments[recovery.best].distance < 0.9 * recovery.moments[0].distance
    exact = RecoveryOptions(minutes=5, passes=5, precision="float32")
    assert recover(dense, small, lessons, held, slices=slices, options=exact)[1].precision == "float32"


@pytest.mark.usefixtures("units")
def test_inside_an_outer_autocast_weights_are_those_of_the_last_step(lessons: Batches, held: Batches) -> None:
    dense, small, slices = pair()
    options = RecoveryOptions(minutes=5, passes=5)
    alone, _ = recover(dense, small, lessons, held, slices=slices, options=options)
    with computing():
        inside, _ = recover(dense, small, lessons, held, slices=slices, options=options)
    weights = zip(alone.parameters(), inside.parameters(), strict=True)
    assert all(torch.equal(weight, other) for weight, other in weights)


class Far(nn.Module):
    """Answers that are the small difference of large numbers, which bfloat16 does not hold."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, width, 3)
        self.head = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        answer: Tensor = self.head(self.first(x).relu().mean((2, 3)) + 300) - 300 * self.head.weight.sum(1)
        return answer


@pytest.mark.usefixtures("units")
def test_a_network_that_bfloat16_would_blur_is_taught_in_float32() -> None:
    torch.manual_seed(0)
    dense, small = (trace(Far(6).eval(), IMAGES) for _ in range(2))
    reference = reference_of(lambda inputs: {"output": dense(inputs)}, [(IMAGES, None)])
    task = task_named("classification", reference=reference)
    teaching = Teaching(dense, small, task, pool(20), slices=None, options=RecoveryOptions())
    assert teaching.pace == LAID_OUT


@pytest.mark.usefixtures("units")
def test_where_there_is_nothing_to_learn_no_noise_is_borne() -> None:
    dense, _, _ = pair()
    reference = reference_of(lambda inputs: {"output": dense(inputs)}, [(IMAGES, None)])
    task = task_named("classification", reference=reference)
    teaching = Teaching(dense, dense, task, pool(20), slices=None, options=RecoveryOptions())
    assert not teaching.pace.bfloat16
