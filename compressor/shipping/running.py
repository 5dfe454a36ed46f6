"""What runs where: every device is asked, and of those that don't answer what they last said, with its age."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from ..device import fields
from ..errors import CompressorError, HostError
from ..hosts.address import Device
from ..hosts.connection import connected, facts_of
from .flow import Outcome
from .reports import now, read_known, write_known

Row = dict[str, Any]
_AT_ONCE = 8
_MOST_ROWS = 100


def running(devices: Sequence[Device], known: Path | None, notify: Callable[[str], None]) -> list[Row]:
    """A row for each device, as it answers now, or as it last did; `failure` says why it does not answer.

    `known` is the file that keeps the answers, None where nothing is kept.
    """
    earlier = read_known(known)

    def ask(device: Device) -> Row:
        notify(device.name)
        try:
            return {**_asked(device), "when_asked": now(), "failure": ""}
        except CompressorError as error:
            last = earlier.get(device.name)
            row = {**_EMPTY, **(last if isinstance(last, dict) else {})}
            return {**row, "device": device.name, "address": device.address, "failure": str(error)}

    with ThreadPoolExecutor(max(1, min(_AT_ONCE, len(devices)))) as pool:
        rows = list(pool.map(ask, devices))
    write_known(known, {row["device"]: row for row in rows if not row["failure"]})
    return rows


def remember(known: Path | None, outcomes: Sequence[Outcome]) -> None:
    """What was just shipped is what devices last said."""
    rows = {}
    for outcome in outcomes:
        if outcome.has_it:
            rows[outcome.device.name] = {
                **_EMPTY,
                "device": outcome.device.name,
                "address": outcome.device.address,
                "release": outcome.release,
                "when": now(),
                "latency": [dict(row) for row in outcome.latency],
                "when_asked": now(),
            }
    if rows:
        write_known(known, rows)


_EMPTY: Mapping[str, Any] = {"release": "", "bundle": "", "when": "", "by": "", "latency": [], "when_asked": ""}


def _asked(device: Device) -> Row:
    with connected(device) as session:
        content = facts_of(session.ask("state", root=device.root))
    try:
        return {"device": device.name, "address": device.address, **_row(content)}
    except ValueError as error:
        raise HostError(f"{device.name} answers with what is no state: {error}") from error


def _row(content: fields.Object) -> Row:
    """The state's own figures count only where they are of what is current."""
    current, state = fields.printable(fields.text(content, "current")), fields.inner(content, "state")
    if not current or state.get("release") != current:
        return {**_EMPTY, "release": current}
    texts = {key: fields.printable(fields.text(state, key)) for key in ("bundle", "when", "by")}
    entries = [fields.as_object(entry, "a timing") for entry in fields.entries(state, "latency", most=_MOST_ROWS)]
    latency = [
        {
            **{key: fields.printable(fields.text(entry, key)) for key in ("model", "runtime")},
            "p50_ms": fields.number(entry, "p50_ms", least=0, most=1e9),
        }
        for entry in entries
    ]
    return {"release": current, **texts, "latency": latency}
