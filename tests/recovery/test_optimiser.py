"""Muon and Adam by hand and against PyTorch's own, and that what is put aside brings both back."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from compressor.recovery.optimiser import ADAM_RMS, MuonOrAdam, is_matrix, levelled
from compressor.steering.checkpoints import optimiser_state, restore_optimiser


def _drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _stepped(parameter: nn.Parameter, optimiser: torch.optim.Optimizer, steps: int, first: int = 0) -> None:
    for step in range(first, first + steps):
        parameter.grad = _drawn(*parameter.shape, seed=10 + step) * 10.0 ** (step % 3)
        optimiser.step()


@pytest.mark.parametrize("shape", [(8, 8), (12, 40), (40, 12), (300, 9)])
def test_a_levelled_matrix_keeps_its_directions_and_loses_their_sizes(shape: tuple[int, int]) -> None:
    matrix = _drawn(*shape) * torch.logspace(0, -1, shape[1])
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    inside = left.T @ levelled(matrix) @ right.T
    assert inside.diagonal().min() > 0.5
    assert inside.diagonal().max() < 1.3
    assert (inside - inside.diagonal().diag()).abs().max() < 1e-3


def test_nothing_is_levelled_to_nothing() -> None:
    assert torch.equal(levelled(torch.zeros(8, 9)), torch.zeros(8, 9))


def test_what_is_no_matrix_goes_as_pytorchs_adam_does() -> None:
    ours, theirs = (nn.Parameter(_drawn(30)) for _ in range(2))
    _stepped(ours, MuonOrAdam([ours], 0.01), 6)
    _stepped(theirs, torch.optim.Adam([theirs], lr=0.01), 6)
    assert torch.allclose(ours, theirs, atol=1e-6)


@pytest.mark.parametrize("shape", [(16, 40), (40, 16)])
def test_a_matrix_goes_as_pytorchs_muon_does(shape: tuple[int, int]) -> None:
    ours, theirs = (nn.Parameter(_drawn(*shape)) for _ in range(2))
    begin = ours.detach().clone()
    _stepped(ours, MuonOrAdam([ours], 0.01), 6)
    muon = torch.optim.Muon([theirs], lr=0.01, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
    _stepped(theirs, muon, 6)
    assert (ours - theirs).norm() < 0.03 * (theirs - begin).norm()  # theirs levels in bfloat16


def test_a_convolution_goes_as_the_matrix_of_its_filters() -> None:
    filters = nn.Parameter(_drawn(16, 4, 3, 3))
    matrix = nn.Parameter(filters.detach().flatten(1).clone())
    for parameter in (filters, matrix):
        parameter.grad = _drawn(16, 36, seed=1).view_as(parameter)
        MuonOrAdam([parameter], 0.1).step()
    assert torch.equal(filters.flatten(1), matrix)


def test_a_step_is_as_large_as_adams() -> None:
    weight = nn.Parameter(torch.zeros(32, 64))
    weight.grad = 1e-6 * _drawn(32, 64)
    MuonOrAdam([weight], 0.5).step()
    assert float(weight.detach().square().mean().sqrt()) == pytest.approx(0.5 * ADAM_RMS, rel=0.2)


def test_narrow_weights_and_biases_are_no_matrices() -> None:
    assert [is_matrix(torch.zeros(shape)) for shape in [(8, 8), (64, 1, 3, 3), (64, 3, 1, 1), (7, 64), (64,), ()]] == [
        True,
        True,
        False,
        False,
        False,
        False,
    ]


@pytest.mark.parametrize("shape", [(16, 40), (30,)])
def test_what_is_put_aside_goes_on_as_if_nothing_had_been(shape: tuple[int, ...]) -> None:
    whole, parted = (nn.Parameter(_drawn(*shape)) for _ in range(2))
    _stepped(whole, MuonOrAdam([whole], 0.01), 6)
    first = MuonOrAdam([parted], 0.01)
    _stepped(parted, first, 3)
    second = MuonOrAdam([parted], 0.01)
    restore_optimiser(second, optimiser_state(first))
    _stepped(parted, second, 3, first=3)
    assert torch.equal(whole, parted)


def test_a_parameter_without_a_gradient_stays() -> None:
    still, moved = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    moved.grad = torch.ones(3)
    MuonOrAdam([still, moved], 0.1).step()
    assert torch.equal(still, torch.ones(3))
    assert not torch.equal(moved, torch.ones(3))
