"""Model files in, timings out: each file in a fresh process of its own, the parent alternating their turns ABAB.

So neither file's allocator, caches or threads help or hurt the other's. `python -m compressor.device.worker` is
the child: it opens, warms up and takes turns when told to.
"""

from __future__ import annotations

import contextlib
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypedDict

import numpy as np

from . import child
from .environment import Environment, affinity, pin, read_environment, resident_bytes
from .feeds import Arrays
from .runtimes import REFERENCE, Session, open_model
from .timing import Samples, Schedule, Timing, alternate, make_batches, schedule_from_json, take_turn, warm_up


class OpenRequest(TypedDict):
    """Load the model at `path` and run it once, on images of the file `pool`; `schedule` as JSON has it."""

    do: Literal["open"]
    path: str
    pool: str
    schedule: dict[str, Any]
    runtime: str


class NextRequest(TypedDict):
    """What else is asked of a child that has opened its model."""

    do: Literal["warm", "turn", "close"]


def time_files(
    files: Mapping[str, Path],
    images: Arrays,
    *,
    schedule: Schedule,
    runtime: str = REFERENCE,
    module: str = "compressor.device.worker",
    start: child.Starter = child.start,
) -> dict[str, Timing]:
    """Times model files by name on one runtime; adds load time, first run and peak memory to the samples.

    `images` [M, ...], or a tuple of all inputs', is a pool that batches are drawn from in order.
    `module` is the child, where something else than a file is opened; `start` starts it, here or elsewhere. Raises what
    `open_model` raises, and EngineError when a worker dies.
    """
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="compressor-"))
        pool = _saved(images, Path(folder))
        workers = {name: stack.enter_context(start(module, name=f"the timing of {name}")) for name in files}
        opened = {name: ask(_open_request(files[name], pool, schedule, runtime)) for name, ask in workers.items()}
        warmups = {name: ask({"do": "warm"}) for name, ask in workers.items()}
        samples = alternate({name: partial(_turn_of, ask) for name, ask in workers.items()}, schedule.rounds)
        closed = {name: ask({"do": "close"}) for name, ask in workers.items()}

    timings = {}
    for name in files:
        facts = {**opened[name], **warmups[name], **closed[name]}
        timings[name] = _timing(name, runtime, schedule, samples[name], facts)
    return timings


def _timing(name: str, runtime: str, schedule: Schedule, samples: Samples, facts: child.Event) -> Timing:
    """The record of one file, with what its worker answered when it opened, warmed up and closed."""
    return Timing(
        name=name,
        runtime=runtime,
        schedule=schedule,
        samples_ms=tuple(samples.ms),
        turns=tuple(samples.turns),
        warmup_runs=facts["runs"],
        stable=facts["stable"],
        environment=Environment(**facts["environment"]),
        affinity=tuple(facts["affinity"]),
        load_ms=facts["load_ms"],
        first_run_ms=facts["first_run_ms"],
        peak_bytes=facts["peak_bytes"],
        details=facts["details"],
    )


def _saved(images: Arrays, folder: Path) -> Path:
    """An .npy file, or of several inputs an .npz with each under its number."""
    if not isinstance(images, tuple):
        np.save(folder / "images.npy", images)
        return folder / "images.npy"
    arrays: dict[str, Any] = {str(index): array for index, array in enumerate(images)}
    np.savez(folder / "images.npz", **arrays)
    return folder / "images.npz"


def _loaded(pool: Path) -> Arrays:
    """What `_saved` wrote."""
    content = np.load(pool, allow_pickle=False)
    if pool.suffix == ".npy":
        return np.asarray(content)
    with content:
        return tuple(content[str(index)] for index in range(len(content.files)))


def _turn_of(ask: child.Ask) -> list[float]:
    """A worker's turn, in ms."""
    turn_ms: list[float] = ask({"do": "turn"})["samples_ms"]
    return turn_ms


def _open_request(path: Path, pool: Path, schedule: Schedule, runtime: str) -> OpenRequest:
    return {
        "do": "open",
        "path": str(Path(path).resolve()),
        "pool": str(pool),
        "schedule": asdict(schedule),
        "runtime": runtime,
    }


Opener = Callable[[Path, str, int], Session]


def _open_file(path: Path, runtime: str, threads: int) -> Session:
    return open_model(path, runtime=runtime, threads=threads)


class Worker:
    """The child's state between requests: one session, its batches and its schedule."""

    session: Session
    batches: list[Arrays]
    schedule: Schedule

    def __init__(self, opener: Opener = _open_file) -> None:
        self.opener = opener

    def answer(self, request: OpenRequest | NextRequest, report: child.Report) -> child.Event:
        """What `do` asks for: `open`, `warm`, `turn` or, to end with, the peak memory."""
        if request["do"] == "open":
            return self.open(request)
        if request["do"] == "warm":
            runs, stable = warm_up(self.session.run, self.batches, self.schedule)
            return {"runs": runs, "stable": stable}
        if request["do"] == "turn":
            return {"samples_ms": take_turn(self.session.run, self.batches, self.schedule)}
        return {"peak_bytes": resident_bytes()}

    def open(self, request: OpenRequest) -> child.Event:
        """Loads the model and runs it once, cold; returns both times and what was measured where."""
        self.schedule = schedule_from_json(request["schedule"])
        pin(self.schedule.cores)  # before the runtime starts its threads, which inherit it
        self.batches = make_batches(_loaded(Path(request["pool"])), self.schedule.batch)

        start_s = time.perf_counter()
        self.session = self.opener(Path(request["path"]), request["runtime"], self.schedule.threads)
        loaded_s = time.perf_counter()
        self.session.run(self.batches[0])
        answered_s = time.perf_counter()
        return {
            "load_ms": 1e3 * (loaded_s - start_s),
            "first_run_ms": 1e3 * (answered_s - loaded_s),
            "affinity": affinity(),
            "details": dict(self.session.details),
            "environment": asdict(read_environment()),
        }


if __name__ == "__main__":
    child.serve(Worker().answer)
