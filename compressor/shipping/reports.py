"""What is known of devices, on disk: a file for each in the bundle's reports, and the last answers of an inventory.

A file holds what runs there, as it was accepted, and the last attempt; a failed one leaves the first as it is.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, TypedDict, cast

from ..errors import FolderError
from ..files import read_json, write_json

SCHEMA = "shipped/1"
KNOWN_SCHEMA = "devices/1"
Content = Mapping[str, object]  # an object of JSON that is written here
Report = Mapping[str, Any]  # one as it was read


class TimedModel(TypedDict):
    """A model of the bundle in the runtime that a device took for it, and its median latency."""

    model: str
    runtime: str
    p50_ms: float


class Latency(TimedModel):
    """All that a device says of its timing: percentiles in words, memory in bytes, and how many runs they are of."""

    p90: str
    p99: str
    mean_ms: float
    max_ms: float
    images_per_s: float
    load_ms: float
    first_run_ms: float
    peak_bytes: float
    n: int


class State(TypedDict):
    """What runs on a device, and when it said so; empty texts where nothing of ours runs, or nobody asked."""

    device: str
    address: str
    release: str
    bundle: str
    when: str
    by: str
    latency: Sequence[TimedModel]
    when_asked: str


class Row(State):
    """What is told of a device; `failure` is why it does not answer now, empty where it does."""

    failure: str


def now() -> str:
    """UTC, to the second."""
    return datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")


def age_s(when: str) -> float:
    """Seconds since then; -1 for what is no time, and 0 for one that lies ahead, as clocks differ."""
    try:
        then = datetime.strptime(when, "%Y-%m-%dT%H:%M:%SZ").replace(tzinfo=timezone.utc)
    except ValueError:
        return -1.0
    return max(0.0, time.time() - then.timestamp())


def in_words(seconds: float) -> str:
    """`3 minutes ago`; `at an unknown time` where it is negative."""
    if seconds < 0:
        return "at an unknown time"
    for unit, size in (("day", 86_400), ("hour", 3_600), ("minute", 60)):
        number = int(seconds // size)
        if number == 1:
            return f"1 {unit} ago"
        if number > 1:
            return f"{number} {unit}s ago"
    return "just now"


def write_report(folder: Path, device: str, *, attempt: Content, accepted: Content | None) -> Path:
    """The device's file with its last attempt, and with what was `accepted` in it; None: what ran there runs on."""
    path = folder / f"{device}.json"
    current = read_accepted(path) if accepted is None else accepted
    write_json(path, {"schema": SCHEMA, "device": device, "current": current, "attempt": attempt})
    return path


def read_accepted(path: Path) -> Report | None:
    """What runs on a device by its file; None without one, or for a damaged one, which the next replaces."""
    try:
        accepted = read_report(path).get("current")
    except FolderError:
        return None
    return accepted if isinstance(accepted, dict) else None


def read_report(path: Path) -> Report:
    """A device's file; FolderError for what is none."""
    return read_json(path, SCHEMA)


def read_reports(folder: Path) -> list[Report]:
    """Every device's, by name."""
    return [read_report(path) for path in sorted(folder.glob("*.json"))]


def known_path(inventory: Path) -> Path:
    """Beside the inventory: what its devices last said."""
    return inventory.with_name(f"{inventory.stem}.known.json")


def read_known(path: Path | None) -> dict[str, State]:
    """By device; a file that is gone or damaged holds nothing, since devices can be asked again."""
    if path is None:
        return {}
    try:
        states = read_json(path, KNOWN_SCHEMA).get("devices")
    except FolderError:
        return {}
    if not isinstance(states, dict):
        return {}
    objects = {name: state for name, state in states.items() if isinstance(state, dict)}
    return cast("dict[str, State]", objects)


def write_known(path: Path | None, rows: Mapping[str, State]) -> None:
    """Adds what devices said now to what is known of others."""
    if path is not None:
        write_json(path, {"schema": KNOWN_SCHEMA, "devices": {**read_known(path), **rows}})
