"""What runs where: every device is asked, and of those that don't answer what they last said, with its age."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from ..device import fields
from ..errors import CompressorError, HostError
from ..hosts.address import Device
from ..hosts.connection import connected, facts_of
from .flow import Outcome
from .preflight import printed
from .reports import Row, State, TimedModel, now, read_known, write_known

_AT_ONCE = 8
_MOST_ROWS = 100


def running(devices: Sequence[Device], known: Path | None, notify: Callable[[str], None]) -> list[Row]:
    """A row for each device, as it answers now, or as it last did; `failure` says why it does not answer.

    `known` is the file that keeps the answers, None where nothing is kept.
    """
    last_states = read_known(known)

    def ask(device: Device) -> Row:
        notify(device.name)
        try:
            return {**_ask_state(device), "failure": ""}
        except CompressorError as error:
            nothing = _nothing_on(device)
            last: State = {**nothing, **last_states.get(device.name, nothing)}
            return {**last, "device": device.name, "address": device.address, "failure": str(error)}

    with ThreadPoolExecutor(max(1, min(_AT_ONCE, len(devices)))) as pool:
        rows = list(pool.map(ask, devices))
    write_known(known, {row["device"]: row for row in rows if not row["failure"]})
    return rows


def remember(known: Path | None, outcomes: Sequence[Outcome]) -> None:
    """What was just shipped is what devices last said."""
    states = {outcome.device.name: _state_after(outcome) for outcome in outcomes if outcome.has_it}
    if states:
        write_known(known, states)


def _state_after(outcome: Outcome) -> State:
    return {
        **_nothing_on(outcome.device),
        "release": outcome.release,
        "when": now(),
        "latency": outcome.latency,
        "when_asked": now(),
    }


def _nothing_on(device: Device) -> State:
    return {
        "device": device.name,
        "address": device.address,
        "release": "",
        "bundle": "",
        "when": "",
        "by": "",
        "latency": [],
        "when_asked": "",
    }


def _ask_state(device: Device) -> State:
    with connected(device) as session:
        content = facts_of(session.ask("state", root=device.root))
    try:
        return _read_state(content, device)
    except ValueError as error:
        raise HostError(f"{device.name} answers with what is no state: {error}") from error


def _read_state(content: fields.Object, device: Device) -> State:
    """The state's own figures count only where they are of what is current."""
    current, state = printed(content, "current"), fields.inner(content, "state")
    answer: State = {**_nothing_on(device), "release": current, "when_asked": now()}
    if not current or state.get("release") != current:
        return answer

    timings = fields.entries(state, "latency", most=_MOST_ROWS)
    return {
        **answer,
        "bundle": printed(state, "bundle"),
        "when": printed(state, "when"),
        "by": printed(state, "by"),
        "latency": [_read_timing(fields.as_object(entry, "a timing")) for entry in timings],
    }


def _read_timing(entry: fields.Object) -> TimedModel:
    return {
        "model": printed(entry, "model"),
        "runtime": printed(entry, "runtime"),
        "p50_ms": fields.number(entry, "p50_ms", least=0, most=1e9),
    }
