"""More processes at the trials of a search, on this machine: started here, and ended here.

Each reads on its standard input what to do, and ends when that closes: this process closes it, and so does its death.
Knows nothing of trials.
"""

from __future__ import annotations

import json
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import IO

import torch

from ..device.isolation import command, environment
from ..files import Json

ENDING_S = 25.0
"""Given to a process to stop its trial and say so; longer than it takes to end itself by force (`worker`)."""
_THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


@dataclass(frozen=True, slots=True)
class Helper:
    """A process that was started; `words` is the file that holds what it says."""

    name: str
    process: subprocess.Popen[str]
    words: IO[str]


@contextmanager
def crew(
    requests: Sequence[Mapping[str, Json]], threads: int, lose: Callable[[str], None]
) -> Iterator[tuple[Helper, ...]]:
    """A process for each request while the block runs, with so many threads each.

    They go on without one that ends before it is done; `lose` is told which, and its last line.
    """
    started: list[Helper] = []
    try:
        for index, request in enumerate(requests):
            started.append(_start(f"worker {index + 2} of {len(requests) + 1}", request, threads))
        yield tuple(started)
        for helper in started:
            _say_if_it_failed(helper, lose)
    finally:
        _end(started)


def wait_for(helpers: Sequence[Helper]) -> None:
    """Until each has ended by itself."""
    for helper in helpers:
        helper.process.wait()


@contextmanager
def limited_threads(count: int) -> Iterator[None]:
    """PyTorch computes with so many threads inside."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def share_of_threads(workers: int) -> int:
    """Of the threads that PyTorch has in this process, what each of so many gets; one at least."""
    return max(1, torch.get_num_threads() // workers)


def device_of(device: str, index: int, gpus: int) -> str:
    """The recipe's device for worker `index`: where no GPU is named and there are several, they take turns."""
    return f"cuda:{index % gpus}" if gpus > 1 and device in ("auto", "cuda") else device


def _start(name: str, request: Mapping[str, Json], threads: int) -> Helper:
    words = tempfile.TemporaryFile("w+")  # noqa: SIM115  it is read when the process has ended
    # not on the command line, which everybody can read: an address may hold a password
    process = subprocess.Popen(
        command("compressor.searching.worker"),
        stdin=subprocess.PIPE,
        stdout=words,
        stderr=words,
        env={**environment(), **dict.fromkeys(_THREAD_VARIABLES, str(threads))},
        text=True,
        start_new_session=True,  # a terminal's Ctrl-C comes here alone
    )
    assert process.stdin is not None
    with suppress(BrokenPipeError):  # it ended already; that is said later
        process.stdin.write(json.dumps(request) + "\n")
        process.stdin.flush()
    return Helper(name, process, words)


def _say_if_it_failed(helper: Helper, lose: Callable[[str], None]) -> None:
    code = helper.process.poll()
    if code:  # it ended, and not because it was done
        lose(f"{helper.name} ended with {code} ({_last_line(helper)}); the others went on")


def _last_line(helper: Helper) -> str:
    helper.words.seek(0)
    lines = helper.words.read().splitlines()
    return lines[-1] if lines else "it said nothing"


def _end(helpers: Sequence[Helper]) -> None:
    """Lets all go at once, then waits; one that does not end is killed, and its trial taken up later."""
    for helper in helpers:
        assert helper.process.stdin is not None
        with suppress(BrokenPipeError):
            helper.process.stdin.close()
    give_up_s = time.monotonic() + ENDING_S
    for helper in helpers:
        try:
            helper.process.wait(max(0.0, give_up_s - time.monotonic()))
        except subprocess.TimeoutExpired:
            helper.process.kill()
            helper.process.wait()
        helper.words.close()
