"""Constructs that other pruners get silently wrong or die on: equal to masked, or left alone and named.

The masked side is a copy of the model in which the producers' removed rows and biases are zero: every operation
between producer and consumer maps zero to zero, or must not be pruned through.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrizations

from compressor.graph import aten, trace
from compressor.pruning import find_structure, operations, prune, rewrites
from compressor.pruning.check import random_units
from compressor.records import Plan

from .conftest import TOLERANCE, images, randomised, removed_channels


class Between(nn.Module):
    """conv a, the construct, then `b`, a convolution of as many channels as the construct gives."""

    def __init__(
        self, construct: Callable[[Tensor], Tensor], *, first: nn.Module | None = None, groups: int = 1
    ) -> None:
        super().__init__()
        self.a, self.construct = first or nn.Conv2d(3, 12, 1), construct
        width = construct(self.a(torch.zeros(2, 3, 4, 4))).shape[1]
        self.b = nn.Conv2d(width, 6, 1, groups=groups)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.construct(self.a(x))).mean((2, 3))


class ToLinear(nn.Module):
    def __init__(self, construct: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.construct = nn.Conv2d(3, 12, 1), construct
        self.b = nn.Linear(construct(self.a(torch.zeros(2, 3, 4, 4))).shape[-1], 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.construct(self.a(x)))


class Owned(nn.Module):
    """A convolution by function, with the module's own parameter, and a buffer with a channel axis."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.kernel, self.b = nn.Conv2d(3, 12, 1), nn.Parameter(torch.zeros(8, 12, 1, 1)), nn.Linear(8, 4)
        self.register_buffer("gain", torch.ones(1, 12, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.b(functional.conv2d(self.a(x) * self.gain, self.kernel).mean((2, 3)))


class Mixed(nn.Module):
    """einsum with a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.mix, self.b = nn.Conv2d(3, 12, 1), nn.Parameter(torch.zeros(12, 7)), nn.Conv2d(7, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.einsum("nchw,cd->ndhw", self.a(x), self.mix)).mean((2, 3))


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.LSTM] | type[nn.GRU]) -> None:
        super().__init__()
        self.a, self.memory, self.b = nn.Linear(3, 12), kind(12, 6, batch_first=True), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.memory(self.a(x.flatten(2).transpose(1, 2)))[0].mean(1))


class GroupedQuery(nn.Module):
    """Four query heads share two key and value heads."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.kv, self.b = nn.Linear(3, 24), nn.Linear(3, 24), nn.Linear(24, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(2).transpose(1, 2)
        n, t, _ = x.shape
        q = self.a(x).reshape(n, t, 4, 6).transpose(1, 2)
        k, v = self.kv(x).reshape(n, t, 2, 2, 6).permute(2, 0, 3, 1, 4).unbind(0)
        y = functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        return self.b(y.transpose(1, 2).reshape(n, t, 24)).mean(1)


class Twice(nn.Module):
    """One layer at two places of the residual stream."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.again, self.b = nn.Conv2d(3, 12, 1), nn.Conv2d(12, 12, 1, bias=False), nn.Conv2d(12, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        x = x + self.again(x)
        return self.b(x + self.again(x)).mean((2, 3))


def shuffled(x: Tensor) -> Tensor:
    n, c, h, w = x.shape
    return x.reshape(n, 3, c // 3, h, w).transpose(1, 2).reshape(n, c, h, w)


def merged(x: Tensor) -> Tensor:
    n, c, h, w = x.shape
    return x.reshape(n, c, h // 2, 2, w // 2, 2).permute(0, 3, 5, 1, 2, 4).reshape(n, 4 * c, h // 2, w // 2)


def partly_added(x: Tensor) -> Tensor:
    return torch.cat([x[:, :4] + x[:, 4:8], x[:, 8:]], 1)


def swapped(x: Tensor) -> Tensor:
    u, v = x.chunk(2, 1)
    return torch.cat([v, u], 1)


def normalised_over_channels(x: Tensor) -> Tensor:
    return x / (1 + x.norm(dim=1, keepdim=True))


# what must come out of it: "pruned" (equal to masked), "alone" (left alone and named), "inexact" (named in the group)
TRAPS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "plain": (lambda: Between(torch.relu), "pruned"),
    "channel shuffle": (lambda: Between(shuffled), "pruned"),
    "nn.ChannelShuffle": (lambda: Between(nn.ChannelShuffle(3)), "any"),
    "shuffle into groups": (lambda: Between(shuffled, groups=3), "any"),
    "flip": (lambda: Between(lambda x: x.flip(1)), "pruned"),
    "roll": (lambda: Between(lambda x: x.roll(5, 1)), "alone"),
    "pad of channels": (lambda: Between(lambda x: functional.pad(x, (0, 0, 0, 0, 2, 3))), "pruned"),
    "channels cut by padding": (lambda: Between(lambda x: functional.pad(x, (0, 0, 0, 0, -2, 1))), "alone"),
    "an image cut by padding": (lambda: Between(lambda x: functional.pad(x, (-1, 0))), "pruned"),
    "channels-last flatten": (lambda: ToLinear(lambda x: x.permute(0, 2, 3, 1).flatten(1)), "pruned"),
    "channels-first flatten": (lambda: ToLinear(lambda x: x.flatten(1)), "pruned"),
    "chunk, swap, cat": (lambda: Between(swapped), "pruned"),
    "cat with itself": (lambda: Between(lambda x: torch.cat([x, x], 1)), "pruned"),
    "glu": (lambda: Between(lambda x: functional.glu(x, 1)), "pruned"),
    "glu by chunk": (lambda: Between(lambda x: x.chunk(2, 1)[0] * x.chunk(2, 1)[1]), "pruned"),
    "every second channel": (lambda: Between(lambda x: x[:, ::2]), "pruned"),
    "every second from the first": (lambda: Between(lambda x: x[:, 1::2]), "pruned"),
    "every fifth channel": (lambda: Between(lambda x: x[:, ::5]), "alone"),
    "narrow": (lambda: Between(lambda x: x.narrow(1, 3, 7)), "pruned"),
    "one channel": (lambda: Between(lambda x: x * x[:, 3:4]), "pruned"),
    "selected channel": (lambda: Between(lambda x: x * x[:, 3].unsqueeze(1)), "pruned"),
    "partial residual": (lambda: Between(partly_added), "pruned"),
    "pixel unshuffle": (lambda: Between(lambda x: functional.pixel_unshuffle(x, 2)), "pruned"),
    "pixel shuffle": (lambda: Between(lambda x: functional.pixel_shuffle(x, 2)), "pruned"),
    "patch merging": (lambda: Between(merged), "pruned"),
    "repeat": (lambda: Between(lambda x: x.repeat(1, 2, 1, 1)), "pruned"),
    "repeat_interleave": (lambda: Between(lambda x: x.repeat_interleave(2, 1)), "pruned"),
    "index by tensor": (lambda: Between(lambda x: x[:, torch.tensor([3, 1, 4, 1, 5, 9, 2, 6])]), "alone"),
    "einsum": (Mixed, "pruned"),
    "own parameter and buffer": (Owned, "pruned"),
    "grouped query attention": (GroupedQuery, "any"),
    "layer used twice": (Twice, "pruned"),
    "grouped transposed convolution": (
        lambda: Between(lambda x: x, first=nn.Sequential(nn.Conv2d(3, 8, 1), nn.ConvTranspose2d(8, 12, 1, groups=4))),
        "pruned",
    ),
    "weight norm": (lambda: Between(torch.relu, first=parametrizations.weight_norm(nn.Conv2d(3, 12, 1))), "any"),
    "lstm": (lambda: Recurrent(nn.LSTM), "pruned"),
    "gru": (lambda: Recurrent(nn.GRU), "pruned"),
    "softmax over channels": (lambda: Between(lambda x: x.softmax(1)), "alone"),
    "cumulative sum over channels": (lambda: Between(lambda x: x.cumsum(1)), "alone"),
    "sort of channels": (lambda: Between(lambda x: x.sort(1)[0]), "alone"),
    "largest channels": (lambda: Between(lambda x: x.topk(4, 1)[0]), "alone"),
    "maximum over channels": (lambda: Between(lambda x: x * x.amax(1, keepdim=True)), "alone"),
    "channel mean gate": (lambda: Between(lambda x: x * x.mean(1, keepdim=True)), "inexact"),
    "norm over channels": (lambda: Between(normalised_over_channels), "pruned"),
    "difference of neighbours": (lambda: Between(lambda x: x[:, 1:] - x[:, :-1]), "any"),
    "outer product of channels": (lambda: Between(lambda x: (x[:, :3, None] * x[:, None, 3:7]).flatten(1, 2)), "any"),
    "convolution over channels": (
        lambda: ToLinear(lambda x: functional.avg_pool1d(x.mean((2, 3)).unsqueeze(1), 3, 1).squeeze(1)),
        "alone",
    ),
}


def first_layers(model: nn.Module) -> tuple[str, ...]:
    if isinstance(getattr(model, "a", None), nn.Sequential):
        return ("a.0", "a.1")
    return ("a",)


@pytest.mark.thorough
@pytest.mark.parametrize("name", TRAPS)
def test_equal_to_masked_or_left_alone_and_named(name: str) -> None:
    build, outcome = TRAPS[name]
    model, x = randomised(build()).double(), images((3, 4, 4), 3)
    graph = trace(model, images((3, 4, 4)))
    structure = find_structure(graph, images((3, 4, 4)))
    groups = structure.groups.groups
    reached = [layer for layer in first_layers(model) if any(layer == s.layer for g in groups for s in g.sites)]
    if reached:
        assert outcome in ("pruned", "inexact", "any")
    else:
        named = [x for x in structure.groups.left_alone if x.layer in first_layers(model)]
        assert outcome in ("alone", "any")
        assert named
        assert all(n.operation and n.reason for n in named)
    inexact = [op for g in groups for op in g.inexact]
    assert bool(inexact) == (outcome == "inexact")
    for seed in (0, 1) if not inexact else ():
        kept = random_units(structure, seed)
        small, _ = prune(graph, structure, Plan(kept, 0, 0))
        expected = copy.deepcopy(model)
        with torch.no_grad():
            for layer in {s.layer for g in groups for s in g.sites}:
                gone = removed_channels(groups, kept, layer)
                assert len(gone) or layer not in reached or outcome == "any"
                _zero(expected.get_submodule(layer), gone)
        torch.testing.assert_close(small(x), expected(x), rtol=TOLERANCE, atol=TOLERANCE)


def _zero(layer: nn.Module, gone: np.ndarray) -> None:
    if isinstance(layer, nn.ConvTranspose2d):
        per_group = layer.weight.shape[1]
        for c in gone:
            block = slice(c // per_group * (layer.in_channels // layer.groups), None)
            rows = range(block.start, block.start + layer.in_channels // layer.groups)
            layer.weight[list(rows), c % per_group] = 0
    elif isinstance(layer, Owned):
        layer.kernel[gone] = 0
    elif hasattr(layer, "parametrizations"):
        layer.parametrizations.weight.original0[gone] = 0
    elif isinstance(layer, (nn.Conv2d, nn.Linear)):
        layer.weight[gone] = 0
    if isinstance(getattr(layer, "bias", None), Tensor):
        layer.bias[gone] = 0


def test_a_form_that_a_rule_does_not_take_is_left_alone_and_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rule that fails is like none: the network's other units still go."""

    def failing(ledger: object, call: object) -> object:
        raise RuntimeError("the expanded size of the tensor must match")

    monkeypatch.setitem(operations.TABLE, aten.roll.default, failing)
    model = Between(lambda x: x.roll(1, 1), first=nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 12, 1)))
    example = images((3, 4, 4))
    structure = find_structure(trace(model.double(), example), example)
    (alone,) = [row for row in structure.groups.left_alone if row.layer == "a.2"]
    assert alone.reason == "reaches aten.roll.default in a form that its pruning rule does not take (RuntimeError)"
    assert [site.layer for group in structure.groups.groups for site in group.sites] == ["a.0"]


def test_sizes_that_a_rewrite_does_not_take_are_left_alone_and_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """The check finds that nothing can be taken away there, before anything is."""

    def failing(node: object, remaining: object) -> None:
        raise IndexError("list index out of range")

    monkeypatch.setitem(rewrites.REWRITES, aten.slice.Tensor, failing)
    model = Between(lambda x: x[:, 2:], first=nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 12, 1)))
    example = images((3, 4, 4))
    structure = find_structure(trace(model.double(), example), example)
    (alone,) = [row for row in structure.groups.left_alone if row.layer == "a.2"]
    assert alone.reason == "failed a trial without some channels at aten.slice.Tensor"
    assert [site.layer for group in structure.groups.groups for site in group.sites] == ["a.0"]
