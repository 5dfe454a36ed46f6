"""A network in, how long it takes beside the dense one out: exported, in processes of their own, in turns.

Turns are short and many, and each is compared with its neighbour. Where other programs take the machine's cores
away, one thread's processor time is compared instead of the wall clock's, and the ratio says so.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import fx, nn

from ..budgets import Budget
from ..device import feeds
from ..device.feeds import Arrays
from ..device.probes import time_probes
from ..device.runtimes import row_of
from ..device.timing import Schedule, Timing, time_interleaved
from ..device.worker import time_files
from ..export.onnx import export_onnx
from ..placement import CPU, placed
from ..tensors import Inputs, from_arrays
from .correction import Ratio, ratio_of
from .places import Place, place_of

TURNS = 16
SECONDS = 3.0
NARROW = 0.015  # half the interval, relative: half of what a budget may be missed by
_MOST_REPEATS = 3
Images = Arrays


def export_for(network: nn.Module, example: Inputs, path: Path) -> Path:
    """The network as an ONNX file to time; its variant, in the metadata, is the file's name."""
    return export_onnx(network, example, path, metadata={"compressor.variant": path.stem})


def time_ratio(files: tuple[Path, Path], images: Images, budget: Budget) -> Ratio:
    """Pruned over dense for two ONNX files (dense, pruned) on the budget's runtime, until the interval is narrow.

    `images` [N, ...] of every input, of which each turn takes the budget's batch.
    """
    place = place_of(budget)
    if budget.threads == 1 and row_of(budget.runtime).on_processor and place.is_busy():
        return replace(_until_narrow(lambda: _processor_pairs(files, images, budget, place)), clock="processor")

    subjects = {"dense": files[0], "pruned": files[1]}
    schedule = _schedule(budget)
    with place.workers() as start:
        return _until_narrow(
            lambda: _pairs(time_files(subjects, images, schedule=schedule, runtime=budget.runtime, start=start))
        )


def _processor_pairs(files: tuple[Path, Path], images: Images, budget: Budget, place: Place) -> list[float]:
    """Pruned over dense of one thread's processor time, for each round."""
    shape = (budget.batch, *feeds.as_tuple(images)[0].shape[1:])
    name = "the timing of a pruned network"
    with place.workers() as start, start("compressor.device.probes", name=name) as ask:
        turns = time_probes(ask, files, [shape, shape], runtime=budget.runtime, threads=1)
    dense, pruned = turns  # [2, rounds]
    ratios: list[float] = (pruned / dense).tolist()
    return ratios


def time_ratio_eager(networks: tuple[fx.GraphModule, fx.GraphModule], images: Images, budget: Budget) -> Ratio:
    """The same for PyTorch on the CPU, in this process; `threads` of the budget hold meanwhile."""
    dense, pruned = networks
    subjects = {"dense": _caller(placed(dense, CPU)), "pruned": _caller(placed(pruned, CPU))}
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(budget.threads or before)
        return _until_narrow(lambda: _pairs(time_interleaved(subjects, images, schedule=_schedule(budget))))
    finally:
        torch.set_num_threads(before)


def _schedule(budget: Budget) -> Schedule:
    return Schedule(
        budget.batch, rounds=TURNS, seconds=SECONDS, runs=3 * TURNS, warmup_limit_s=3.0, threads=budget.threads
    )


def _until_narrow(measure: Callable[[], list[float]]) -> Ratio:
    """Of all measurements together; the last is taken as it is when three were not enough."""
    pairs: list[float] = []
    for _ in range(_MOST_REPEATS):
        pairs += measure()
        ratio = ratio_of(pairs)
        if ratio.high - ratio.low <= 2 * NARROW * ratio.value:
            break
    return ratio


def _pairs(timings: Mapping[str, Timing]) -> list[float]:
    """Turn n of the pruned network over turn n of the dense one, which ran beside it."""
    ratios: list[float] = (_turn_medians(timings["pruned"]) / _turn_medians(timings["dense"])).tolist()
    return ratios


def _turn_medians(timing: Timing) -> NDArray[np.float64]:
    """[turns] milliseconds."""
    samples, turns = np.asarray(timing.samples_ms), np.asarray(timing.turns)
    return np.array([np.median(samples[turns == turn]) for turn in np.unique(turns)])


def _caller(network: nn.Module) -> Callable[[Images], object]:
    def call(images: Images) -> object:
        with torch.inference_mode():
            return network(*from_arrays(images))

    return call
