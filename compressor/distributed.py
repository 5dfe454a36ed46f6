"""Who am I among the processes of a run, and sums over all of them; no-ops in a process that is alone.

Knows nothing of what is summed. The process group is made by whoever launched the run (`torchrun`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import distributed

from .records import FloatArray


def _in_group() -> bool:
    """Whether whoever launched this process made a group of it and others."""
    return distributed.is_available() and distributed.is_initialized()


def rank() -> int:
    """This process's number among all of the run, 0 for the one that is alone."""
    return distributed.get_rank() if _in_group() else 0


def world() -> int:
    """How many processes the run has."""
    return distributed.get_world_size() if _in_group() else 1


def _device() -> torch.device:
    """NCCL sums only what lies on a GPU."""
    return torch.device("cuda") if distributed.get_backend() == "nccl" else torch.device("cpu")


def sum_over_ranks(values: Mapping[str, FloatArray]) -> dict[str, FloatArray]:
    """Entry-wise float64 sums; every rank gets the same bits. All ranks pass the same names and shapes."""
    if world() == 1:
        return dict(values)
    names = sorted(values)  # ranks may have met the names in another order
    flat = np.concatenate([np.asarray(values[name], np.float64).ravel() for name in names])
    packed = torch.from_numpy(flat).to(_device())
    distributed.all_reduce(packed)
    sums = packed.cpu().numpy()

    ends = np.cumsum([values[name].size for name in names])[:-1]
    sum_of = dict(zip(names, np.split(sums, ends), strict=True))
    return {name: sum_of[name].reshape(values[name].shape).copy() for name in names}


def sum_count(count: int) -> int:
    """A whole number summed over all ranks, below 2**53, which float64 holds exactly."""
    return int(sum_over_ranks({"count": np.array([count], np.float64)})["count"][0])


def joined_over_ranks(values: Mapping[str, FloatArray]) -> dict[str, FloatArray]:
    """Every rank's arrays one behind the other along the first axis, in the order of ranks; all pass the same names."""
    if world() == 1:
        return dict(values)
    of_ranks: list[Any] = [None] * world()  # filled in place
    distributed.all_gather_object(of_ranks, dict(values))

    joined: dict[str, FloatArray] = {}
    for name in values:
        joined[name] = np.concatenate([arrays[name] for arrays in of_ranks])
    return joined
