"""A function and its arguments in order in; what it gives of each, in the same order, out, some of it made ahead.

In threads, as decoders, resizing and files let go of Python's lock. The order is the arguments', whatever the number of
threads. Knows no images.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Argument = TypeVar("Argument")
Value = TypeVar("Value")

_MOST_IN_PIECE = 32  # arguments a task: handing over single ones would cost as much as decoding small images
_MOST_WORKERS = 8  # what each image holds Python's lock for keeps no more of them busy


def usable_workers() -> int:
    """One for each core that this process may use, shared with those that `torchrun` started beside it; 8 at most."""
    beside = int(os.environ.get("LOCAL_WORLD_SIZE") or 1)
    return max(1, min(_MOST_WORKERS, _cores() // beside))


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):  # not everywhere
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def in_order(
    function: Callable[[Argument], Value], arguments: Sequence[Argument], *, workers: int, ahead: int
) -> Generator[Value, None, None]:
    """`function` of each argument; while one is in use, about `ahead` further ones are made by `workers` threads.

    Without workers nothing is made ahead. What the function raises is raised in its argument's turn; what no turn has
    come for is dropped when the iterator is closed.
    """
    if workers < 1 or len(arguments) <= 1:
        yield from map(function, arguments)
        return
    piece = max(1, min(_MOST_IN_PIECE, ahead // workers, len(arguments) // workers))
    pending: deque[Future[list[Value]]] = deque()
    pool = ThreadPoolExecutor(workers, thread_name_prefix="images")
    try:
        for start in range(0, len(arguments), piece):
            pending.append(pool.submit(_values, function, arguments[start : start + piece]))
            if len(pending) > max(workers, ahead // piece):
                yield from pending.popleft().result()
        while pending:
            yield from pending.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def _values(function: Callable[[Argument], Value], arguments: Sequence[Argument]) -> list[Value]:
    return [function(argument) for argument in arguments]
