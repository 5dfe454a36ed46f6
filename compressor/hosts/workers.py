"""The device side's workers on a device: started as they are here, each over the connection that is there.

A file that a request names is sent along, and taken away once the worker has read it.
"""

from __future__ import annotations

import contextlib
import hashlib
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path

from ..device import agent, child
from .address import Device
from .carrying import DeviceSide, carry, store
from .connection import connected, ssh_command

_NAMING = ("path", "pool", "files")  # what names files in a worker's requests


@contextlib.contextmanager
def device_side(device: Device) -> Iterator[DeviceSide]:
    """The device side on a connected device; raises HostError where there is no way to it."""
    with connected(device) as session:
        answer = session.ask("survey", root=device.root, libraries=[])
        yield carry(session, str(answer.get("installed", "")))


@contextlib.contextmanager
def workers_on(device: Device) -> Iterator[child.Starter]:
    """What starts workers there, as `child.start` does here; the connection lasts as long as the block."""
    with device_side(device) as side:

        @contextlib.contextmanager
        def start(module: str, *, name: str, timeout_s: float = 3600.0) -> Iterator[child.Ask]:
            where = f"{name} on {device.name}"
            with child.start(module, name=where, timeout_s=timeout_s, command=_command(side, module)) as ask:
                yield _carrying(side, ask)

        yield start


def _command(side: DeviceSide, module: str) -> list[str]:
    session = side.session
    python = session.device.python.removeprefix("~/")
    _, *words = agent.module_command(module, side.place)  # the first is this machine's Python
    return ssh_command(session.device, f"exec {shlex.join([python, *words])}", *session.sharing)


def _carrying(side: DeviceSide, ask: child.Ask) -> child.Ask:
    """The worker's `ask`, to which files here are files there."""

    def ask_there(request: Mapping[str, object], on_progress: child.Report | None = None) -> child.Event:
        sent: dict[str, str] = {}  # by path here, the path there
        moved = dict(request)
        for key, value in request.items():
            if key in _NAMING:
                moved[key] = _moved(side, value, sent)
        try:
            return ask(moved, on_progress)
        finally:
            names = [Path(path).name for path in sent.values()]
            if names:
                side.session.ask("forget", names=names)

    return ask_there


def _moved(side: DeviceSide, value: object, sent: dict[str, str]) -> object:
    if isinstance(value, (list, tuple)):
        return [_moved(side, entry, sent) for entry in value]
    path = Path(str(value))
    if str(path) not in sent:
        content = path.read_bytes()
        name = f"timed-{hashlib.sha256(content).hexdigest()[:24]}{path.suffix}"
        sent[str(path)] = store(side.session, name, content)
    return sent[str(path)]
