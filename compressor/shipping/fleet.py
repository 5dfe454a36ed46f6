"""One bundle onto several devices at once: the first ones alone where that is asked for, and an outcome for each."""

from __future__ import annotations

import subprocess
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

from ..device.manifest import SIGNATURE
from ..errors import CompressorError, GateError, HostError
from ..hosts.address import Device
from .cargo import Cargo
from .flow import Options, Outcome, ship_to

Notify = Callable[[str, str, float], None]  # a device, what happens there, the share of it that is done


def ship_all(cargo: Cargo, devices: Sequence[Device], options: Options, notify: Notify) -> list[Outcome]:
    """Ships to all, `at_once` of them at a time; where one of the first `canary` fails, the others are not begun.

    A device that fails among the others stops nobody else: each has its own outcome, in the order given. Raises
    GateError where there is a key and nothing that was signed.
    """
    if options.key and SIGNATURE not in cargo.files:
        raise GateError(f"{cargo.folder} is not signed: `compressor sign` does it, or leave --key out")
    canaries, followers = devices[: options.canary], devices[options.canary :]
    outcomes = _together(cargo, canaries, options, notify)
    failed = next((outcome for outcome in outcomes if not outcome.has_it), None)
    if failed is None:
        return outcomes + _together(cargo, followers, options, notify)
    for device in followers:
        notify(device.name, f"not begun: {failed.device.name} went first and failed", 0.0)
        outcomes.append(_not_begun(cargo, device, failed))
    return outcomes


def failure_of(outcomes: Sequence[Outcome]) -> CompressorError | None:
    """One error for all that did not get it, of the first one's kind; None where all did."""
    failed = [outcome for outcome in outcomes if not outcome.has_it]
    if not failed:
        return None
    first = failed[0].error
    assert first is not None  # every outcome that is none of success says why
    if len(outcomes) == 1:
        return first
    names = ", ".join(outcome.device.name for outcome in failed)
    return type(first)(f"{len(failed)} of {len(outcomes)} devices did not get it ({names}): {first}")


def _not_begun(cargo: Cargo, device: Device, failed: Outcome) -> Outcome:
    error = HostError(f"{device.name}: not begun, since {failed.device.name} went first and failed")
    return Outcome(device, "not begun", cargo.release, error=error)


def _together(cargo: Cargo, devices: Sequence[Device], options: Options, notify: Notify) -> list[Outcome]:
    connections = _Connections()

    def ship_one(device: Device) -> Outcome:
        def say(text: str, share: float) -> None:
            notify(device.name, text, share)

        outcome = ship_to(cargo, device, options, say, connections.add)
        end = outcome.result if outcome.error is None else f"failed: {outcome.error}"
        notify(device.name, end, 1.0)
        return outcome

    with ThreadPoolExecutor(max(1, min(options.at_once, len(devices)))) as pool:
        futures = [pool.submit(ship_one, device) for device in devices]
        try:
            return [future.result() for future in futures]
        except BaseException:  # an interrupt: nobody may go on behind its back
            pool.shutdown(wait=False, cancel_futures=True)
            connections.end()
            raise


class _Connections:
    """The ssh processes of all devices, to end them at once."""

    def __init__(self) -> None:
        self.processes: list[subprocess.Popen[bytes]] = []
        self.ended = False
        self.lock = threading.Lock()

    def add(self, process: subprocess.Popen[bytes]) -> None:
        """One that was begun; it ends right away where all were to end."""
        with self.lock:
            self.processes.append(process)
            if self.ended:
                process.kill()

    def end(self) -> None:
        """Ends all, and what is begun later."""
        with self.lock:
            self.ended = True
            for process in self.processes:
                process.kill()
