"""A finished bundle onto devices over ssh: copied, verified and timed there, then switched to, or left out and why."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..errors import InputError
from ..hosts.inventory import find_devices, inventory_path
from .acceptance import Timing
from .cargo import Cargo, opened_cargo, read_cargo
from .fleet import failure_of, ship_all
from .flow import Options, Outcome
from .reports import age_s, in_words, known_path, read_reports
from .running import remember, running

__all__ = [
    "Cargo",
    "Options",
    "Outcome",
    "Timing",
    "age_s",
    "failure_of",
    "find_devices",
    "in_words",
    "inventory_path",
    "keep_outcomes",
    "known_path",
    "opened_cargo",
    "read_cargo",
    "read_key",
    "running",
    "ship_all",
]

_MOST_KEY_BYTES = 1 << 16


def read_key(path: Path) -> bytes:
    """A public key's file. Raises InputError for none, and for a private key, which no device is to see."""
    try:
        content = path.read_bytes()[: _MOST_KEY_BYTES + 1]
    except OSError as error:
        raise InputError(f"--key {path} can't be read: {error.strerror}") from error
    if not content or len(content) > _MOST_KEY_BYTES:
        raise InputError(f"--key {path} is no key's file")
    if b"PRIVATE KEY" in content:
        raise InputError(f"--key {path} is a private key, which stays here; give the public one that belongs to it")
    return content


def keep_outcomes(cargo: Cargo, outcomes: Sequence[Outcome], inventory: Path | None) -> Path:
    """Writes the page over all devices' reports, and what they last said beside the inventory; returns the page.

    A run whose bundle it was shows the devices in its own report too.
    """
    from ..report.shipped import show_devices, write_shipped_page  # brings jinja2, once everything is done

    remember(None if inventory is None else known_path(inventory), outcomes)
    folder, reports = cargo.reports, read_reports(cargo.reports)
    if (folder.parent / "report.json").is_file() and cargo.is_of_run:
        show_devices(folder.parent, reports)
    return write_shipped_page(cargo.manifest.name, reports, folder.parent, folder.name).html
