"""One gate for each unit, learned while the cost is pressed down: images and what is to be kept in, scores out.

A gate is v = sigmoid((logit + g + 3) / 0.4), g from Gumbel's distribution, so that it begins open; what is paid is
log(max(T / T_dense, p) / p) of the MACs, or parameters, T of gates set to 0 or 1 (Ganjdanesh et al. 2022). Here p falls
from all to a tenth, and a unit's score is the part of that way its gate was open: an order, and not one network.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, fx

from ..distributed import sum_over_ranks, world
from ..placement import device_of, within_memory
from ..records import FloatArray
from ..tensors import Inputs, count
from .augmentation import Augmentation, varied
from .checkpoints import Checkpoint, optimiser_state, restore_optimiser
from .costs import CostOfGates, opened
from .gating import Gating
from .lessons import Lessons, lessons_from, uniform
from .options import GateOptions

OPEN = 3.0  # added to every logit: a gate whose logit is 0 is open 99 times of a hundred
TEMPERATURE = 0.4
Lost = Callable[[Inputs, Tensor], Tensor]  # inputs and gates [units] to what is lost, a number
Progress = Callable[[float], None]


def learn_gates(
    gating: Gating,
    batches: Lessons,
    lost: Lost,
    *,
    options: GateOptions,
    augmentation: Augmentation,
    seed: int,
    start: Tensor,
    checkpoint: Checkpoint,
    progress: Progress,
) -> FloatArray:
    """[units] the part of the way that each gate was open, 0 to 1; `start` are the logits to begin with.

    The graph's weights stay as they are. The same images, options and seed give the same scores, also where the
    training was ended in the middle and begun again.
    """
    device = device_of(gating.graph)
    logits = start.detach().clone().float().to(device).requires_grad_()
    rate = options.travel / options.steps
    optimiser = torch.optim.AdamW([logits], lr=rate, weight_decay=options.weight_decay)
    done, open_sum = _resumed(logits, optimiser, checkpoint)
    cost = CostOfGates(gating, options.counted)
    lessons = lessons_from(batches, seed, done)
    for step in range(done, options.steps):
        gates = drawn_gates(logits, uniform(seed, step, len(logits), like=logits))
        inputs = varied(next(lessons), augmentation, seed, step)
        optimiser.zero_grad(set_to_none=True)
        slope = _slope(gates.detach(), gating.graph, inputs, lost, paid_at(step, cost, options))
        gates.backward(slope)  # type: ignore[no-untyped-call]
        optimiser.step()

        open_sum += chance_to_be_open(logits.detach()).cpu()
        state = {"logits": logits, "open_sum": open_sum, **optimiser_state(optimiser)}
        checkpoint.write(step + 1, state)
        progress((step + 1) / options.steps)
    checkpoint.close()
    return (open_sum / options.steps).numpy()


def _resumed(logits: Tensor, optimiser: torch.optim.Optimizer, checkpoint: Checkpoint) -> tuple[int, Tensor]:
    """The steps that are done and, of each gate, the sum of its chances to be open; all as it was put aside."""
    earlier = checkpoint.read()
    if earlier is None:
        return 0, torch.zeros(len(logits), dtype=torch.float64)
    done, state = earlier
    with torch.no_grad():
        logits.copy_(state["logits"])
    restore_optimiser(optimiser, state)
    return done, state["open_sum"]


def _slope(
    gates: Tensor, graph: fx.GraphModule, inputs: Inputs, lost: Lost, paid: Callable[[Tensor], Tensor]
) -> Tensor:
    """[units] the gradient of what is lost and paid, the images in parts where all of them pass the memory."""
    gates = gates.requires_grad_()
    _back(paid(gates))
    images = count(inputs)
    for few, _ in within_memory([(inputs, None)], graph):
        _back(lost(few, gates) * (count(few) / images))
    assert gates.grad is not None
    slope = gates.grad
    if world() > 1:  # every rank has images of its own
        total = sum_over_ranks({"slope": slope.double().cpu().numpy()})["slope"]
        slope = torch.from_numpy(total / world()).to(slope)
    return slope


def _back(loss: Tensor) -> None:
    loss.backward()  # type: ignore[no-untyped-call]


def paid_at(step: int, cost: CostOfGates, options: GateOptions) -> Callable[[Tensor], Tensor]:
    """The price of gates [units] at a step."""

    def paid(gates: Tensor) -> Tensor:
        return options.pressure * price(cost(opened(gates)) / cost.dense, share_at(step, options))

    return paid


def drawn_gates(logits: Tensor, numbers: Tensor) -> Tensor:
    """Gates in 0 to 1 of logits and uniform numbers in (0, 1)."""
    gumbel = -(-numbers.log()).log()
    return ((logits + gumbel + OPEN) / TEMPERATURE).sigmoid()


def chance_to_be_open(logits: Tensor) -> Tensor:
    """How often a gate is nearer to 1: P(g > -(logit + 3)) = 1 - exp(-exp(logit + 3)), in float64."""
    return -torch.expm1(-(logits.double() + OPEN).exp())


def share_at(step: int, options: GateOptions) -> float:
    """The share of the cost that costs nothing at a step."""
    if not options.falls:
        return options.least
    return 1 - (1 - options.least) * (step + 1) / options.steps


def price(share: Tensor, least: float) -> Tensor:
    """log(max(share, least) / least): 0 where the share is low enough."""
    return (share.clamp_min(least)).log() - math.log(least)
