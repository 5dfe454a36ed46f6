"""Many small model files in, raw latency samples of each out: one fresh process, all files taking turns.

For tables of layers, where what counts is how files compare with each other: rounds go over all of them, so
that a busy moment of the machine hits all alike. On one thread the processor's time is taken: what the machine
does beside is no part of a layer. `python -m compressor.device.probes` is the child.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from . import child
from .runtimes import open_model

ON_THE_PROCESSOR = ("onnxruntime", "openvino", "pytorch")
ROUNDS = 12  # a busy machine is quiet in some of them
TURN_S = 0.002
_MOST_RUNS = 20
_POLISHINGS = 4
_QUICK = 0.1  # quantile of the rounds


def time_probes(
    ask: child.Ask, files: Sequence[Path], shapes: Sequence[tuple[int, ...]], *, runtime: str, threads: int = 0
) -> NDArray[np.float64]:
    """[files, rounds] the median microseconds of each turn, by a child of `child.start("compressor.device.probes")`.

    `shapes` are the inputs', batch included. Raises what `open_model` raises, and EngineError when the child dies.
    """
    request = {"files": [str(f) for f in files], "shapes": [list(s) for s in shapes]}
    answer = ask({**request, "runtime": runtime, "threads": threads})
    return np.array(answer["turns_us"], dtype=np.float64)


def _answer(request: Mapping[str, object], report: child.Report) -> child.Event:
    files, shapes = request["files"], request["shapes"]
    assert isinstance(files, list)
    assert isinstance(shapes, list)
    runtime, threads = str(request["runtime"]), int(str(request["threads"]))
    sessions = [open_model(file, runtime=runtime, threads=threads) for file in files]
    generator = np.random.default_rng(0)
    inputs: list[NDArray[np.float32]] = [generator.random(tuple(shape), dtype=np.float32) for shape in shapes]
    calls = [partial(session.run, images) for session, images in zip(sessions, inputs, strict=True)]
    return {"turns_us": take_rounds(calls, by_processor=threads == 1 and runtime in ON_THE_PROCESSOR)}


def take_rounds(calls: Sequence[Callable[[], object]], *, by_processor: bool) -> list[list[float]]:
    """[calls][rounds] medians. A turn is one run, or as many as fit into its time: short ones need more of them."""
    clock = time.process_time_ns if by_processor else time.perf_counter_ns
    turns: list[list[float]] = [[] for _ in calls]
    for call in (*calls, *calls):
        call()
    for _ in range(ROUNDS):
        for taken, call in zip(turns, calls, strict=True):
            taken.append(_turn(call, clock))
    return turns


def _turn(call: Callable[[], object], clock: Callable[[], int]) -> float:
    samples: list[float] = []
    end = time.perf_counter() + TURN_S
    while not samples or (len(samples) < _MOST_RUNS and time.perf_counter() < end):
        start = clock()
        call()
        samples.append((clock() - start) / 1e3)
    return float(np.median(samples))


def steadied(turns_us: NDArray[np.float64]) -> NDArray[np.float64]:
    """[files] one time each from [files, rounds], as of the quickest rounds: what slows a round slows all in it.

    Two-way median polish of the logarithms: files and rounds explain a turn, the odd one out does not count.
    """
    logs = np.log(np.maximum(turns_us, 1e-3))
    of_file = np.median(logs, axis=1)
    of_round = np.zeros(logs.shape[1])
    for _ in range(_POLISHINGS):
        of_round = np.median(logs - of_file[:, None], axis=0)
        of_file = np.median(logs - of_round, axis=1)
    steady: NDArray[np.float64] = np.exp(of_file + np.quantile(of_round, _QUICK))
    return steady


if __name__ == "__main__":
    child.serve(_answer)
