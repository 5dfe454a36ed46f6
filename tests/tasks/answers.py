"""Answers and data made for the tests of tasks: networks here are tables, inputs are row numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from compressor.tasks import Predict


def network(**leaves: Tensor) -> Predict:
    """Answers with rows of the leaves; dots in a leaf's name are written __."""

    def predict(inputs: Any) -> dict[str, Tensor]:
        return {name.replace("__", "."): leaf[inputs] for name, leaf in leaves.items()}

    return predict


def data(targets: Any, sizes: Sequence[int]) -> list[tuple[Tensor, Any]]:
    """Batches of so many rows each, with their targets."""
    batches, start = [], 0
    for size in sizes:
        batches.append((torch.arange(start, start + size), targets[start : start + size]))
        start += size
    return batches


def unlabelled(sizes: Sequence[int]) -> list[tuple[Tensor, Tensor]]:
    return data(torch.full((sum(sizes),), -1), sizes)


def corners(leaves: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
    """Decodes `boxes` [N, k, 4], `scores` [N, k] and `labels` [N, k]."""
    keys = ("boxes", "scores", "labels")
    return [{key: leaves[key][image] for key in keys} for image in range(len(leaves["boxes"]))]
