"""What is known of devices, on disk: a file for each in the bundle's reports, and the last answers of an inventory.

A file holds what runs there, as it was accepted, and the last attempt; a failed one leaves the first as it is.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from ..errors import FolderError
from ..files import read_json, write_json

SCHEMA = "shipped/1"
KNOWN_SCHEMA = "devices/1"
Report = Mapping[str, Any]


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
        if seconds >= size:
            number = int(seconds // size)
            return f"{number} {unit}{'' if number == 1 else 's'} ago"
    return "just now"


def write_report(folder: Path, device: str, *, attempt: Report, accepted: Report | None) -> Path:
    """The device's file with its last attempt, and with what was `accepted` in it; None: what ran there runs on."""
    path = folder / f"{device}.json"
    current = accepted if accepted is not None else _current(path)
    write_json(path, {"schema": SCHEMA, "device": device, "current": current, "attempt": attempt})
    return path


def _current(path: Path) -> Any:
    """What the file says runs there; None where there is none, or one that is damaged, which the next replaces."""
    try:
        return read_report(path).get("current") if path.is_file() else None
    except FolderError:
        return None


def read_report(path: Path) -> dict[str, Any]:
    """A device's file; FolderError for what is none."""
    return read_json(path, SCHEMA)


def read_reports(folder: Path) -> list[dict[str, Any]]:
    """Every device's, by name."""
    return [read_report(path) for path in sorted(folder.glob("*.json")) if path.stem != "devices"]


def known_path(inventory: Path) -> Path:
    """Beside the inventory: what its devices last said."""
    return inventory.with_name(f"{inventory.stem}.known.json")


def read_known(path: Path | None) -> dict[str, Any]:
    """By device; a file that is gone or damaged holds nothing, since devices can be asked again."""
    if path is None or not path.is_file():
        return {}
    try:
        known = read_json(path, KNOWN_SCHEMA).get("devices")
    except FolderError:
        return {}
    return dict(known) if isinstance(known, dict) else {}


def write_known(path: Path | None, rows: Mapping[str, Any]) -> None:
    """Adds what devices said now to what is known of others."""
    if path is not None:
        write_json(path, {"schema": KNOWN_SCHEMA, "devices": {**read_known(path), **rows}})
