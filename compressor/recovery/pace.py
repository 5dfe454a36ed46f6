"""How the passes of a training are computed: in bfloat16 where the machine has units for it, images with channels last.

Parameters, their gradients, losses and everything that judges stay in float32. Whether a network bears it is tried on a
batch: what bfloat16 changes in the dense network's answers has to be far less than what there is to learn.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from ..tensors import Inputs, as_tuple, mapped

NOISE = 0.02  # of the distance there is to learn from, at most, may be the arithmetic's own
CPU_UNITS = ("amx_bf16", "avx512_bf16")


@dataclass(frozen=True, slots=True)
class Pace:
    """What convolutions and products are computed in, and whether images lie in memory as [N, H, W, C]."""

    bfloat16: bool = False
    channels_last: bool = False

    def __str__(self) -> str:
        return "bfloat16" if self.bfloat16 else "float32"

    def arithmetic(self, device: torch.device) -> AbstractContextManager[object]:
        """Within it layers compute as this pace says.

        No cast weight is kept: PyTorch forgets those only where the outermost autocast ends, which may be a caller's
        that lasts for the whole training.
        """
        if not self.bfloat16:
            return nullcontext()
        return torch.autocast(device.type, torch.bfloat16, cache_enabled=False)

    def laid_out(self, inputs: Inputs) -> Inputs:
        """The same values; layers behind images follow their layout."""
        if not self.channels_last:
            return inputs
        return mapped(lambda t: t.contiguous(memory_format=torch.channels_last) if _is_image(t) else t, inputs)


PLAIN = Pace()


def paces_on(device: torch.device, inputs: Inputs) -> tuple[Pace, ...]:
    """The paces worth a try, the fastest first; the plain one is not among them."""
    images = any(map(_is_image, as_tuple(inputs)))
    paces = []
    if has_bfloat16_units(device):
        paces.append(Pace(bfloat16=True, channels_last=images))
    if images and device.type == "cpu":
        paces.append(Pace(channels_last=True))
    return tuple(paces)


def has_bfloat16_units(device: torch.device) -> bool:
    """Whether the device multiplies bfloat16 faster than float32, and does not emulate it."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    capabilities: Callable[[], Mapping[str, object]] = getattr(torch.cpu, "get_capabilities", dict)
    return any(capabilities().get(unit) for unit in CPU_UNITS)  # early versions of PyTorch don't say


def first_that_bears(paces: tuple[Pace, ...], noise_of: Callable[[Pace], float]) -> Pace:
    """The first pace whose `noise_of`, a share of the distance there is to learn from, is small; else the plain one.

    What raises a RuntimeError, as layers do that don't know bfloat16 or that layout, does not bear it.
    """
    for pace in paces:
        try:
            if noise_of(pace) <= NOISE:
                return pace
        except RuntimeError:
            continue
    return PLAIN


def _is_image(tensor: Tensor) -> bool:
    return tensor.ndim == 4 and tensor.is_floating_point()
