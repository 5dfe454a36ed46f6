"""Many small model files in, raw latency samples of each out: one fresh process, all files taking turns.

For tables of layers, where what counts is how files compare with each other: rounds go over all of them, so
that a busy moment of the machine hits all alike. On one thread the processor's time is taken: what the machine
does beside is no part of a layer. `python -m compressor.device.probes` is the child.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TypedDict

import numpy as np
from numpy.typing import NDArray

from . import child
from .feeds import Array
from .runtimes import Session, open_model, row_of

ROUNDS = 12  # a busy machine is quiet in some of them
TURN_S = 0.002
_MOST_RUNS = 20
_POLISHINGS = 4
_QUICK = 0.1  # quantile of the rounds


class ProbeRequest(TypedDict):
    """What is to be timed; `shapes` are each file's first input's, batch included."""

    files: list[str]
    shapes: list[list[int]]
    runtime: str
    threads: int


def time_probes(
    ask: child.Ask, files: Sequence[Path], shapes: Sequence[tuple[int, ...]], *, runtime: str, threads: int = 0
) -> NDArray[np.float64]:
    """[files, rounds] the median microseconds of each turn, by a child of `child.start("compressor.device.probes")`.

    `shapes` are each file's first input's, batch included; what else a file takes has as many samples. Raises what
    `open_model` raises, and EngineError when the child dies.
    """
    request: ProbeRequest = {
        "files": list(map(str, files)),
        "shapes": list(map(list, shapes)),
        "runtime": runtime,
        "threads": threads,
    }
    answer = ask(request)
    return np.array(answer["turns_us"], dtype=np.float64)


def _answer(request: ProbeRequest, report: child.Report) -> child.Event:
    runtime, threads = request["runtime"], request["threads"]
    generator = np.random.default_rng(0)
    calls = []
    for file, shape in zip(request["files"], request["shapes"], strict=True):
        session = open_model(file, runtime=runtime, threads=threads)
        calls.append(partial(session.run, _made_up(session, tuple(shape), generator)))

    by_processor = threads == 1 and row_of(runtime).on_processor
    return {"turns_us": take_rounds(calls, by_processor=by_processor)}


def _made_up(session: Session, shape: tuple[int, ...], generator: np.random.Generator) -> tuple[Array, ...]:
    """An array for each input, the first of that shape: noise, and 0 of what is no float, which may be an index."""
    arrays: list[Array] = []
    for port in session.inputs:
        sizes = shape if not arrays else (shape[0], *port.shape[1:])
        if port.dtype.startswith("float"):
            arrays.append(generator.random(sizes, dtype=np.float32).astype(port.fed_dtype))
        else:
            arrays.append(np.zeros(sizes, port.dtype))
    return tuple(arrays)


def take_rounds(calls: Sequence[Callable[[], object]], *, by_processor: bool) -> list[list[float]]:
    """[calls][rounds] median microseconds of each turn, of this process's processor time or of the wall clock.

    A turn is one run, or as many as fit into its time: short ones need more of them.
    """
    clock = time.process_time_ns if by_processor else time.perf_counter_ns
    for call in (*calls, *calls):  # each warmed up twice
        call()

    turns_us = [[_turn_us(call, clock) for call in calls] for _ in range(ROUNDS)]  # [rounds][calls]
    return list(map(list, zip(*turns_us, strict=True)))  # [calls][rounds]


def _turn_us(call: Callable[[], object], clock: Callable[[], int]) -> float:
    samples_us: list[float] = []
    end = time.perf_counter() + TURN_S
    for _ in range(_MOST_RUNS):
        start_ns = clock()
        call()
        samples_us.append((clock() - start_ns) / 1e3)
        if time.perf_counter() >= end:
            break
    return float(np.median(samples_us))


def steadied(turns_us: NDArray[np.float64]) -> NDArray[np.float64]:
    """[files] one time each from [files, rounds], as of the quickest rounds: what slows a round slows all in it.

    Two-way median polish of the logarithms: files and rounds explain a turn, the odd one out does not count.
    """
    logs = np.log(np.maximum(turns_us, 1e-3))  # a clock's tick may be longer than a turn, which then is 0
    file_logs = np.median(logs, axis=1)  # [files]
    round_logs = np.zeros(logs.shape[1])  # [rounds]
    for _ in range(_POLISHINGS):
        round_logs = np.median(logs - file_logs[:, None], axis=0)
        file_logs = np.median(logs - round_logs, axis=1)
    steady: NDArray[np.float64] = np.exp(file_logs + np.quantile(round_logs, _QUICK))
    return steady


if __name__ == "__main__":
    child.serve(_answer)
