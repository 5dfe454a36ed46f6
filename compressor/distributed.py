"""Who am I among the processes of a run, and sums over all of them; no-ops in a process that is alone.

Processes are started by `torchrun`; each is given its share of the images by whoever calls. What can't be shared out,
the first process does while the others wait (`by_first`). Knows nothing of what is summed.
"""

from __future__ import annotations

import itertools
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import numpy as np
import torch
from torch import distributed

from .errors import CompressorError, RanksError, first_line
from .launch import is_launched, launched_rank
from .records import FloatArray

P = TypeVar("P")
T = TypeVar("T")
TIMEOUT_S = 600.0  # no process works longer than that on its share between two sums
TIMEOUT_VARIABLE = "COMPRESSOR_RANKS_TIMEOUT"  # seconds, in place of `TIMEOUT_S`
_BEAT = 0.25  # of the time-out: so often a process that works alone tells the others that it is alive
_AT_ONCE = 1 << 26  # bytes of a file that are sent at a time
_NOTICE, _KNOCK_S = "compressor/port", 2.0
_WAITING, _DONE, _FAILED = 0, 1, 2


@dataclass
class _Group:
    """The processes of this run; `control` carries what lies on the CPU, `sent_bytes` counts what went to others."""

    control: Any
    timeout_s: float
    sent_bytes: int = 0


_group: _Group | None = None
_alone: ContextVar[bool] = ContextVar("alone", default=False)


@contextmanager
def process_group() -> Iterator[None]:
    """Inside, the processes that `torchrun` started with this one are one group; nothing happens in one that is alone.

    GPUs talk over NCCL where every process of a machine has one of its own, CPUs over gloo. A group that a caller made
    is taken as it is. Raises RanksError where the others can't be reached.
    """
    if not is_launched() or _alone.get() or distributed.is_initialized():
        yield
        return
    _join()
    try:
        yield
    finally:
        _leave()


def _join() -> None:
    timeout = timedelta(seconds=_timeout_s())
    processes_here = int(os.environ.get("LOCAL_WORLD_SIZE", "0"))
    has_gpu = torch.cuda.is_available() and torch.cuda.device_count() >= max(1, processes_here)
    if has_gpu:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    with _reaching_others():
        distributed.init_process_group(
            "nccl" if has_gpu else "gloo",
            timeout=timeout,
            store=_meeting_place(timeout),
            rank=launched_rank(),
            world_size=int(os.environ["WORLD_SIZE"]),
        )


def _meeting_place(timeout: timedelta) -> Any:
    """Where the processes find each other: a store that the first of them opens, and no restart has seen before.

    `torchrun`'s own store outlives a restart with all that was written there, and processes that read where those of
    the attempt before were listening wait for ever (github.com/pytorch/pytorch/issues/135712).
    """
    host, port, rank = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), launched_rank()
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":  # no `torchrun`: the first one opens it there
        return _store(host, port, timeout, opens=rank == 0)
    noticeboard = _store(host, port, timeout, opens=False)
    if rank == 0:
        store = _store(host, 0, timeout, opens=True)
        noticeboard.set(_NOTICE, str(store.port))
        return store
    return _noticed_store(noticeboard, host, timeout)


def _noticed_store(noticeboard: Any, host: str, timeout: timedelta) -> Any:
    """The store that the first process of this attempt opened, once its notice is up."""
    latest = time.monotonic() + timeout.total_seconds()
    while True:
        noticed = int(noticeboard.get(_NOTICE))
        try:
            socket.create_connection((host, noticed), timeout=_KNOCK_S).close()
        except OSError:  # the attempt's before; nobody listens there any more
            if time.monotonic() > latest:
                raise RanksError(f"the first process is not to be reached at {host}, port {noticed}") from None
            time.sleep(_KNOCK_S / 10)
        else:
            return _store(host, noticed, timeout, opens=False)


def _store(host: str, port: int, timeout: timedelta, *, opens: bool) -> Any:
    """PyTorch's store at that port, 0 for a free one."""
    make: Any = getattr(distributed, "TCPStore")  # noqa: B009  the library does not declare it
    return make(host, port, is_master=opens, timeout=timeout, wait_for_workers=False)


def _leave() -> None:
    global _group
    _group = None
    distributed.destroy_process_group()


def _timeout_s() -> float:
    text = os.environ.get(TIMEOUT_VARIABLE, "")
    try:
        seconds = float(text or TIMEOUT_S)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < float("inf"):
        raise RanksError(f"{TIMEOUT_VARIABLE} = {text!r} is no time; write seconds, such as 600")
    return seconds


def _in_group() -> bool:
    """Whether whoever launched this process made a group of it and others, and it is not to go by itself."""
    return not _alone.get() and distributed.is_available() and distributed.is_initialized()


def _of_run() -> _Group:
    """The group, with a second way for what lies on the CPU; made when it is first needed, by all at once."""
    global _group
    if _group is None:
        seconds = _timeout_s()
        with _reaching_others():
            control = distributed.new_group(backend="gloo", timeout=timedelta(seconds=seconds))
        _group = _Group(control, seconds)
    return _group


@contextmanager
def _reaching_others() -> Iterator[None]:
    """What the library says of processes that don't answer, as an error that names the remedy."""
    try:
        yield
    except CompressorError:
        raise
    except RuntimeError as error:
        raise RanksError(
            f"the other processes of this run can't be reached ({first_line(error)}); look for what ended or cut off "
            "one of them, then start the same command again: it goes on after the last finished stage "
            f"({TIMEOUT_VARIABLE} sets how many seconds they may take)"
        ) from error


@contextmanager
def alone() -> Iterator[None]:
    """Inside, this process goes by itself: its sums are its own.

    For a script under `torchrun` of which one process compresses, and the others do something else.
    """
    before = _alone.set(True)
    try:
        yield
    finally:
        _alone.reset(before)


def rank() -> int:
    """This process's number among all of the run, 0 for the one that is alone."""
    return distributed.get_rank() if _in_group() else 0


def world() -> int:
    """How many processes the run has."""
    return distributed.get_world_size() if _in_group() else 1


def shares_out(pieces: int) -> bool:
    """Whether there are processes, and pieces enough that each of them gets one."""
    return 1 < world() <= pieces


def own_share(pieces: Sequence[T]) -> Sequence[T]:
    """Every so many-th piece: of 5 pieces and 2 processes the first has 0, 2 and 4."""
    return pieces[rank() :: world()]


def each(pieces: Sequence[P], work: Callable[[P], T]) -> list[T]:
    """What `work` makes of each piece; every process does its share of them by itself, and all get all."""
    mine = own_share(pieces)
    with alone():
        made = [work(piece) for piece in mine]
    return in_turns(made)


def sent_bytes() -> int:
    """What this process has given to sums and to others, in bytes, since the group was made."""
    return 0 if _group is None else _group.sent_bytes


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
    sum_tensor(packed)
    sums = packed.cpu().numpy()

    ends = np.cumsum([values[name].size for name in names])[:-1]
    sum_of = dict(zip(names, np.split(sums, ends), strict=True))
    return {name: sum_of[name].reshape(values[name].shape).copy() for name in names}


def sum_tensor(tensor: torch.Tensor) -> None:
    """The sum over all ranks, in the tensor's own precision and place; every rank gets the same bits."""
    if world() == 1:
        return
    group = _of_run()
    group.sent_bytes += tensor.numel() * tensor.element_size()
    with _reaching_others():
        distributed.all_reduce(tensor)


def sum_count(count: int) -> int:
    """A whole number summed over all ranks, below 2**53, which float64 holds exactly."""
    return int(sum_over_ranks({"count": np.array([count], np.float64)})["count"][0])


def gathered(value: T) -> list[T]:
    """Every rank's value, in the order of ranks."""
    if world() == 1:
        return [value]
    group = _of_run()
    of_ranks: list[Any] = [None] * world()  # filled in place
    with _reaching_others():
        distributed.all_gather_object(of_ranks, value, group=group.control)
    return of_ranks


def joined_over_ranks(values: Mapping[str, FloatArray]) -> dict[str, FloatArray]:
    """Every rank's arrays one behind the other along the first axis, in the order of ranks; all pass the same names."""
    if world() == 1:
        return dict(values)
    _of_run().sent_bytes += sum(array.nbytes for array in values.values())
    of_ranks = gathered(dict(values))
    joined: dict[str, FloatArray] = {}
    for name in values:
        joined[name] = np.concatenate([arrays[name] for arrays in of_ranks])
    return joined


def in_turns(pieces: Sequence[T]) -> list[T]:
    """All ranks' pieces in the order that they had before `own_share` dealt them out."""
    of_ranks = gathered([[piece] for piece in pieces])  # boxed, as the last turn may have no piece of some rank
    joined: list[T] = []
    for turn in itertools.zip_longest(*of_ranks, fillvalue=()):
        for box in turn:
            joined.extend(box)
    return joined


def from_first(value: T) -> T:
    """The first process's value, in every process."""
    if world() == 1:
        return value
    box: list[Any] = [value]  # what another process puts in is replaced
    with _reaching_others():
        distributed.broadcast_object_list(box, src=0, group=_of_run().control)
    received: T = box[0]
    return received


def bytes_from_first(data: bytes | None) -> bytes:
    """The first process's bytes, in every process; the others give None."""
    if world() == 1:
        return data or b""
    size = from_first(len(data or b""))
    if not size:  # torch makes no tensor of an empty buffer
        return b""
    buffer = torch.frombuffer(bytearray(data or bytes(size)), dtype=torch.uint8)
    group = _of_run()
    for begin in range(0, size, _AT_ONCE):
        with _reaching_others():
            distributed.broadcast(buffer[begin : begin + _AT_ONCE], src=0, group=group.control)
    return buffer.numpy().tobytes()


def by_first(work: Callable[[], T]) -> T:
    """What the first process makes of it by itself, in every process; the others wait, however long it takes.

    An error there is raised there, and RanksError in the others; so it is where the first is not heard of any more.
    """
    if world() == 1:
        return work()
    if rank() > 0:
        awaited: T = _awaited()
        return awaited
    finished = threading.Event()
    beats = threading.Thread(target=_beat, args=(finished,), daemon=True)
    beats.start()
    outcome: tuple[int, Any] = (_FAILED, "it was ended")
    try:
        with alone():
            outcome = (_DONE, work())
    except CompressorError as error:
        outcome = (_FAILED, str(error))
        raise
    finally:
        finished.set()
        beats.join()
        from_first(outcome)
    result: T = outcome[1]
    return result


def _beat(finished: threading.Event) -> None:
    """Tells the others again and again that the first process is at work; whether they hear it, the end will show."""
    with suppress(RanksError):
        while not finished.wait(_BEAT * _of_run().timeout_s):
            from_first((_WAITING, None))


def _awaited() -> Any:
    while True:
        state, result = from_first((_WAITING, None))
        if state == _DONE:
            return result
        if state == _FAILED:
            raise RanksError(f"the first process of this run ended: {result}")
