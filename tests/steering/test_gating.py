"""Gates of 0 and 1 are removal, in outputs and in MACs; in between they have the gradients of what they multiply."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

from compressor.graph.cost import measure_cost
from compressor.pruning import prune
from compressor.pruning.check import random_units
from compressor.records import IntArray
from compressor.steering.costs import CostOfGates, opened
from compressor.steering.gating import Gated, Gating, find_gates

from .conftest import BUILDERS, Subject, subject_of

ROUNDING = 1e-10  # float64 over a handful of layers; a gate in the wrong place shows as 1e-2
KINDS = ("channel", "neuron", "stream", "head", "head_dim", "conv_group")
networks = pytest.mark.parametrize("name", list(BUILDERS))
seeds = pytest.mark.parametrize("seed", [0, 1, 2])


def gating_of(subject: Subject) -> Gating:
    return find_gates(subject.graph, subject.structure, KINDS)


def pattern(gating: Gating, kept: Mapping[str, IntArray]) -> Tensor:
    """[units] 1 where a unit stays."""
    gates = torch.ones(gating.count, dtype=torch.float64)
    for name, units in kept.items():
        gates[gating.units[name]] = 0
        gates[gating.units[name].start + torch.from_numpy(units)] = 1
    return gates


@pytest.mark.thorough
@networks
def test_every_unit_of_every_group_has_a_gate(name: str) -> None:
    subject = subject_of(name)
    gating = gating_of(subject)
    assert gating.count == sum(group.size for group in subject.structure.groups.groups)
    assert {group.kind for group in subject.structure.groups.groups} >= {"stream"}


@networks
def test_with_all_gates_open_it_is_the_dense_network(name: str) -> None:
    subject = subject_of(name)
    gating = gating_of(subject)
    ones = torch.ones(gating.count, dtype=torch.float64)
    expected = subject.graph(subject.images)
    (answer,) = Gated(gating).answers(subject.images, ones).values()
    assert (answer - expected).abs().max() < ROUNDING * expected.abs().max()
    cost = measure_cost(subject.graph)
    assert float(CostOfGates(gating)(ones)) == CostOfGates(gating).dense == cost.macs
    assert float(CostOfGates(gating, "parameters")(ones)) == cost.parameters


@networks
@seeds
def test_with_some_gates_shut_it_is_the_pruned_network(name: str, seed: int) -> None:
    subject = subject_of(name)
    gating = gating_of(subject)
    kept = random_units(subject.structure, seed, share=0.4)
    small, _ = prune(subject.graph, subject.structure, kept)
    gates = pattern(gating, kept)
    assert float(gates.min()) == 0

    expected = small(subject.images)
    (answer,) = Gated(gating).answers(subject.images, gates).values()
    assert (answer - expected).abs().max() < ROUNDING * expected.abs().max()
    cost = measure_cost(small)
    assert float(CostOfGates(gating)(gates)) == pytest.approx(cost.macs, abs=1e-6)
    assert float(CostOfGates(gating, "parameters")(gates)) == pytest.approx(cost.parameters, abs=1e-6)


@networks
def test_the_gradient_of_the_macs_is_what_a_unit_costs(name: str) -> None:
    """Of the polynomial in gates: a unit's gate open, less shut, all others as they are."""
    subject = subject_of(name)
    gating = gating_of(subject)
    cost = CostOfGates(gating)
    kept = random_units(subject.structure, 3, share=0.3)
    gates = pattern(gating, kept).requires_grad_()
    (gradient,) = torch.autograd.grad(cost(gates), gates)
    assert bool((gradient >= 0).all())
    for group in subject.structure.groups.groups:
        if group.balanced or group.kind in ("head", "conv_group"):  # rows go as wholes, whose last axis is a mean
            continue
        unit = gating.units[group.name].start + int(kept[group.name][0])
        shut = gates.detach().clone()
        shut[unit] = 0
        assert float(gradient[unit]) == pytest.approx(float(cost(gates.detach()) - cost(shut)), rel=1e-9)


def test_gates_that_are_half_open_count_as_what_they_are_nearer_to_and_keep_their_gradient() -> None:
    gates = torch.tensor([0.2, 0.5, 0.7], requires_grad=True)
    through = opened(gates)
    assert through.tolist() == [0, 0, 1]
    (gradient,) = torch.autograd.grad((through * torch.tensor([1.0, 2.0, 3.0])).sum(), gates)
    assert gradient.tolist() == [1, 2, 3]


@networks
def test_the_gradient_of_an_answer_is_the_one_of_finite_differences(name: str) -> None:
    subject = subject_of(name)
    gating = gating_of(subject)
    run = Gated(gating)
    generator = torch.Generator().manual_seed(0)
    gates = (torch.rand(gating.count, generator=generator, dtype=torch.float64) * 0.5 + 0.5).requires_grad_()

    def total(gates: Tensor) -> Tensor:
        (answer,) = run.answers(subject.images[:2], gates).values()
        return answer.square().sum()

    (gradient,) = torch.autograd.grad(total(gates), gates)
    step = 1e-6
    for unit in torch.randperm(gating.count, generator=generator)[:5].tolist():
        above, below = gates.detach().clone(), gates.detach().clone()
        above[unit] += step
        below[unit] -= step
        slope = float(total(above) - total(below)) / (2 * step)
        assert float(gradient[unit]) == pytest.approx(slope, rel=1e-4, abs=1e-4 * float(gradient.abs().max()))
