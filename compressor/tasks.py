"""stub"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from torch import Tensor

Targets: TypeAlias = "Tensor | Sequence[Any]"
Leaves = Mapping[str, Tensor]


@dataclass(frozen=True, slots=True)
class Task:
    name: str
    says: Callable[[Leaves, Targets], Tensor]
    loss: Callable[[Leaves, Targets], Tensor]
    quality: Callable[..., Any]
    distance: Callable[[Leaves, Leaves], Tensor]


def is_labelled(targets: Targets) -> bool:
    """Whether any sample has a target: unlabelled ones are -1 [N]."""
    if isinstance(targets, Tensor) and targets.ndim == 1 and not targets.is_floating_point():
        return bool((targets >= 0).any())
    return True
