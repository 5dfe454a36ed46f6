"""torch_pruning as the peer of a comparison: its pruner, its importances, its scopes, brought to the same MACs.

In: a subject (model, images), a share of the MACs. Out: the physically pruned module, or why there is none.
torch_pruning has no budget in MACs: the pruning ratio is bisected. Its best is the best of `SETTINGS`, all tried.
"""

from __future__ import annotations

import copy
import functools
import io
import itertools
import warnings
from collections.abc import Callable, Iterable
from contextlib import redirect_stdout
from dataclasses import dataclass

import torch
import torch_pruning as tp
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

Batch = tuple[Tensor, Tensor]
Gradients = dict[str, Tensor]  # by parameter
IMPORTANCES: dict[str, Callable[[], tp.importance.Importance]] = {
    "l1": lambda: tp.importance.GroupMagnitudeImportance(p=1),
    "l2": lambda: tp.importance.GroupMagnitudeImportance(p=2),
    "taylor": tp.importance.GroupTaylorImportance,
    "hessian": tp.importance.GroupHessianImportance,
    "fpgm": tp.importance.FPGMImportance,
    "random": tp.importance.RandomImportance,
}
SCOPES = {"local": {}, "global": {"global_pruning": True}, "isomorphic": {"global_pruning": True, "isomorphic": True}}
STEPS = 10  # of bisection: the ratio to a thousandth


@dataclass(frozen=True, slots=True)
class Setting:
    """`inner` leaves the residual stream alone, which on some networks is the peer's better half."""

    importance: str
    scope: str
    inner: bool

    def __str__(self) -> str:
        return f"{self.importance}, {self.scope}{', residual stream kept' if self.inner else ''}"


SETTINGS = tuple(Setting(*chosen) for chosen in itertools.product(IMPORTANCES, SCOPES, (False, True)))


@dataclass(frozen=True)
class Subject:
    """`stream` are the layers whose outputs the residual stream ties together, `heads` a fused projection's heads."""

    module: nn.Module
    example: Tensor
    classes: int
    stream: frozenset[str]
    heads: dict[str, int]
    batches: Iterable[Batch]  # of calibration images and labels

    @functools.cached_property
    def mean_gradients(self) -> list[Gradients]:
        """Of the loss summed over all images: what Taylor takes."""
        module = copy.deepcopy(self.module).eval()
        for images, labels in self.batches:
            functional.cross_entropy(module(images), labels, reduction="sum").backward()
        return [_gradients(module)]

    @functools.cached_property
    def sample_gradients(self) -> list[Gradients]:
        """Of one image's loss, the last one's: what torch_pruning's Hessian keeps of many."""
        module = copy.deepcopy(self.module).eval()
        *_, (images, labels) = self.batches
        functional.cross_entropy(module(images[-1:]), labels[-1:]).backward()
        return [_gradients(module)]


def macs_of(module: nn.Module, example: Tensor) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        module(example[:1])
    return int(counter.get_total_flops()) // 2


def prune_to(subject: Subject, setting: Setting, share: float, *, seed: int) -> tuple[nn.Module, float]:
    """The pruned copy with the most MACs not above `share`, and its share. Raises what torch_pruning raises."""
    dense = macs_of(subject.module, subject.example)
    gathered = _gathered(subject, setting)
    best: tuple[nn.Module, float] | None = None
    low, high = 0.0, 1.0
    for _ in range(STEPS):
        ratio = (low + high) / 2
        torch.manual_seed(seed)
        try:
            pruned = _pruned(subject, setting, ratio, gathered)
            kept = macs_of(pruned, subject.example) / dense
        except (RuntimeError, ValueError, AssertionError) as failure:
            if best is None and ratio < 0.01:
                raise
            last = failure
            high = ratio  # a ratio that breaks the network is too much of it
            continue
        if kept <= share:
            high = ratio
            if best is None or kept > best[1]:
                best = (pruned, kept)
        else:
            low = ratio
    if best is None:
        raise RuntimeError(f"no ratio brings it to {share:g} of the MACs" + (f" ({last})" if high < 1 else ""))
    return best


def _gathered(subject: Subject, setting: Setting) -> list[Gradients]:
    if setting.importance == "taylor":
        return subject.mean_gradients
    return subject.sample_gradients if setting.importance == "hessian" else []


def _gradients(module: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


def _pruned(subject: Subject, setting: Setting, ratio: float, gathered: list[dict[str, Tensor]]) -> nn.Module:
    module = copy.deepcopy(subject.module).eval().requires_grad_(True)
    layers = dict(module.named_modules())
    importance = IMPORTANCES[setting.importance]()
    for gradients in gathered:
        for name, parameter in module.named_parameters():
            parameter.grad = gradients[name].clone() if name in gradients else None
        if setting.importance == "hessian":
            importance.accumulate_grad(module)
    heads = {layers[name]: count for name, count in subject.heads.items()}
    ignored = [m for m in layers.values() if isinstance(m, nn.Linear) and m.out_features == subject.classes]
    if setting.inner:
        ignored += [layers[name] for name in subject.stream if name in layers]
    with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        pruner = tp.pruner.BasePruner(
            module,
            subject.example[:1],
            importance,
            pruning_ratio=ratio,
            ignored_layers=ignored,
            num_heads=heads,
            prune_num_heads=bool(heads),
            prune_head_dims=not heads,
            head_pruning_ratio=ratio,
            in_channel_groups={},
            out_channel_groups={},
            **SCOPES[setting.scope],
        )
        pruner.step()
    for name, count in subject.heads.items():
        _tell_heads(module, name, count, pruner.num_heads[layers[name]])
    return module


def _tell_heads(module: nn.Module, name: str, before: int, after: int) -> None:
    """Whole heads went: the count a block holds as a plain number follows, as the library's own examples do it."""
    block = module.get_submodule(name.rpartition(".")[0])
    for attribute, value in list(vars(block).items()):
        if isinstance(value, int) and not isinstance(value, bool) and value == before:
            setattr(block, attribute, after)
