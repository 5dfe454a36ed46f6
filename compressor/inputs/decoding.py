"""A named way from a detector's leaves to boxes, as the device knows it too, for tensors.

What it is called and its parameters go into a bundle, so that a device decodes alike.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..device.decoding import decode_dense

DENSE = "dense"


@dataclass(frozen=True, slots=True)
class NamedDecode:
    """`decode_dense` with its parameters; called with leaves [N, ...] by name, it gives N times boxes [k, 4]."""

    parameters: Mapping[str, Any]
    kind: str = DENSE

    def at(self, size: tuple[int, int]) -> NamedDecode:
        """The same: cells are counted from the leaves themselves."""
        return self

    def __call__(self, leaves: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
        arrays = {name: leaf.detach().cpu().float().numpy() for name, leaf in leaves.items()}
        detections = decode_dense(arrays, **self.parameters)
        return [{key: torch.from_numpy(values) for key, values in one.items()} for one in detections]
