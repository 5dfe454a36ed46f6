"""Where networks are timed: this machine, or a device over SSH by the very same workers.

A budget names it; whoever times is given a place and does not ask which.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache
from typing import Protocol

from ..budgets import Budget
from ..device import child, fields
from ..device.place import describe, is_busy
from ..device.runtimes import available
from ..errors import HostError
from ..hosts.address import Device
from ..hosts.inventory import find_devices, inventory_path
from ..hosts.workers import device_side, workers_on

_ASKED_S = 120.0


class Place(Protocol):
    """A machine that times files."""

    def workers(self) -> AbstractContextManager[child.Starter]:
        """What starts workers there, for as long as the context lasts."""
        ...

    def is_busy(self) -> bool:
        """Whether something else runs there now."""
        ...

    def stands_for(self, runtime: str) -> tuple[str, ...]:
        """What a time taken there on a runtime stands for: another place, or other libraries, give others."""
        ...

    def lacks(self, runtime: str) -> str:
        """Why the runtime can't run there, in words; empty where it can."""
        ...

    @property
    def where(self) -> str:
        """The place, as a message ends with it."""
        ...


class _Here:
    """This machine."""

    def workers(self) -> AbstractContextManager[child.Starter]:
        return nullcontext(child.start)

    def is_busy(self) -> bool:
        return is_busy()

    def stands_for(self, runtime: str) -> tuple[str, ...]:
        facts = describe(runtime)
        return facts["fingerprint"], runtime, facts["version"]

    def lacks(self, runtime: str) -> str:
        return available().get(runtime, "")

    @property
    def where(self) -> str:
        return "here"


HERE: Place = _Here()


@dataclass(frozen=True, slots=True)
class _There:
    """A device; what it is is asked once, whether it is busy every time."""

    device: Device

    @contextlib.contextmanager
    def workers(self) -> Iterator[child.Starter]:
        with workers_on(self.device) as start:
            yield start

    def is_busy(self) -> bool:
        return bool(_asked(self.device, "onnxruntime")["busy"])

    def stands_for(self, runtime: str) -> tuple[str, ...]:
        facts = _known(self.device, runtime)
        return str(facts["fingerprint"]), runtime, str(facts["version"])

    def lacks(self, runtime: str) -> str:
        return str(_known(self.device, runtime)["lacks"])

    @property
    def where(self) -> str:
        return f"on {self.device.name}"


def place_of(budget: Budget) -> Place:
    """Where a budget's networks are timed; a host is a name of the inventory, or as ssh knows it."""
    if not budget.host:
        return HERE
    (device,) = find_devices([budget.host], inventory_path())
    return _There(device)


@cache
def _known(device: Device, runtime: str) -> fields.Object:
    return _asked(device, runtime)


def _asked(device: Device, runtime: str) -> fields.Object:
    """Raises HostError for a device that does not say what it is."""
    with device_side(device) as side:
        code, out, err = side.run("compressor.device.place", runtime, timeout_s=_ASKED_S)
    try:
        lines = out.strip().splitlines()
        content = fields.as_object(json.loads(lines[-1]) if lines else None, "its answer")
        for key in ("fingerprint", "version", "lacks"):
            fields.text(content, key)
        fields.flag(content, "busy")
    except ValueError as error:
        last = fields.printable(err.strip().splitlines()[-1])[:300] if err.strip() else f"it ended with code {code}"
        raise HostError(f"{device.name} can't time networks: {last}; it needs numpy and {runtime}") from error
    return content
