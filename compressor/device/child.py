"""A Python module run as a child process that answers requests in JSON lines.

For what may crash, what must be fresh, or what must not share memory. The child imports nothing from the current
folder. Its own stdout stays clean: whatever libraries print goes to stderr, whose last line explains a death.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import IO, Any, Protocol, TypeVar

from ..errors import CompressorError, EngineError
from . import isolation

Request = TypeVar("Request")
Event = dict[str, Any]  # a line of JSON, which whoever asked knows how to read
Report = Callable[[Event], None]


class Starter(Protocol):
    """Starts a worker by its module: `start`, or what starts one on another machine."""

    def __call__(
        self, module: str, *, name: str, timeout_s: float = 3600.0
    ) -> contextlib.AbstractContextManager[Ask]: ...


class Ask(Protocol):
    """Sends a request and returns the child's answer to it."""

    def __call__(self, request: Mapping[str, object], on_progress: Report | None = None) -> Event: ...


@contextlib.contextmanager
def start(module: str, *, name: str, timeout_s: float = 3600.0, command: Sequence[str] = ()) -> Iterator[Ask]:
    """Yields `ask(request, on_progress=None)`, which returns the child's answer; `command` runs it, where one is given.

    Raises EngineError when the child dies or exceeds its time, and whatever error of our tree it reports.
    The child is gone when the context ends, also after an exception.
    """
    with tempfile.TemporaryFile("w+", errors="replace") as noise:
        process = subprocess.Popen(
            command or isolation.command(module),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=noise,
            text=True,
            env=isolation.environment(),
        )
        timer = threading.Timer(timeout_s, process.kill)
        timer.start()

        def death() -> EngineError:
            return _death(process, noise, name, timer, timeout_s)

        def ask(request: Mapping[str, object], on_progress: Report | None = None) -> Event:
            return _converse(process, request, on_progress, death)

        try:
            yield ask
        finally:
            timer.cancel()
            for pipe in (process.stdin, process.stdout):
                _close(pipe)
            _end(process)


def serve(answer: Callable[[Request, Report], Event]) -> None:
    """The child's side: answers each request until stdin ends; errors of our tree travel as answers.

    `answer(request, report)` returns what the parent's `ask` does; `report(event)` calls the parent's `on_progress`.
    """
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print to stdout goes to stderr; the channel is ours alone

    def send(event: Event) -> None:
        channel.write(json.dumps(event) + "\n")
        channel.flush()

    for line in sys.stdin:
        try:
            send({"event": "answer", **answer(json.loads(line), send)})
        except CompressorError as error:
            send({"event": "error", "type": type(error).__name__, "message": str(error)})


def _converse(
    process: subprocess.Popen[str],
    request: Mapping[str, object],
    on_progress: Report | None,
    death: Callable[[], EngineError],
) -> Event:
    """Sends one request and reads lines until its answer; every other line but an error is progress."""
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        process.stdin.write(json.dumps(request) + "\n")
        process.stdin.flush()
    except OSError as error:
        raise death() from error
    for line in process.stdout:
        if not line.startswith("{"):  # a login shell's own words, on another machine
            continue
        event: Event = json.loads(line)
        if event["event"] == "answer":
            return event
        if event["event"] == "error":
            raise _error_of(event)
        if on_progress is not None:
            on_progress(event)
    raise death()


def _error_of(event: Event) -> CompressorError:
    """The child's error as it was raised there, so that its exit code stays the same."""
    from .. import errors

    error_type = getattr(errors, event["type"], None)
    if isinstance(error_type, type) and issubclass(error_type, CompressorError):
        return error_type(event["message"])
    return EngineError(event["message"])


def _death(
    process: subprocess.Popen[str], noise: IO[str], name: str, timer: threading.Timer, timeout_s: float
) -> EngineError:
    """Why no answer came: out of time, or what the child said last on stderr."""
    if timer.finished.is_set():
        return EngineError(f"{name} took longer than {timeout_s:.0f} s and was stopped")

    code = process.wait()
    ending = f"was killed by signal {-code}" if code < 0 else f"ended with code {code}"
    noise.seek(0)
    lines = noise.read().strip().splitlines()
    last_line = lines[-1] if lines else "no output"
    return EngineError(f"{name} {ending}: {last_line[:300]}")


def _close(pipe: IO[str] | None) -> None:
    if pipe is not None:
        with contextlib.suppress(OSError):  # closing flushes, which fails where the child is dead
            pipe.close()


def _end(process: subprocess.Popen[str]) -> None:
    """A child whose stdin has ended leaves by itself; one that does not is killed."""
    try:
        process.wait(timeout=5)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
