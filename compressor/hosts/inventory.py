"""The file that names devices, TOML in, devices out: each with a name, an address, and where things lie there."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..errors import InputError, did_you_mean
from ..toml import parse_toml
from .address import Device, read_address, require_safe

FILE = "devices.toml"
"""Where it lies if nothing else is said, in the current folder; COMPRESSOR_DEVICES names another."""
_FIELDS = ("name", "address", "path", "python")
_EXAMPLE = '[[device]] with name = "kitchen" and address = "pi@kitchen.local"'


def inventory_path() -> Path | None:
    """The file that is read where none is named; None where there is none."""
    path = Path(os.environ.get("COMPRESSOR_DEVICES") or FILE)
    if not path.is_file():
        return None
    return path


def read_inventory(path: Path) -> tuple[Device, ...]:
    """The devices of a file, each name once; raises InputError naming what is wrong in it."""
    content = _read(path)
    unknown = sorted(set(content) - {"device", "ssh_config"})
    if unknown:
        raise InputError(f"{path}: {unknown[0]!r} is no part of it; write {_EXAMPLE}")
    rows = content.get("device")
    if not isinstance(rows, list) or not rows:
        raise InputError(f"{path}: it names no device; write {_EXAMPLE}")
    settings = _text(path, content, "ssh_config", "")
    if settings:
        settings = str(path.parent / os.path.expanduser(settings))
    devices = tuple(_device(path, row, settings) for row in rows)
    twice = _named_twice(devices)
    if twice:
        raise InputError(f"{path} names {twice!r} twice; give each device a name of its own")
    return devices


def _named_twice(devices: Sequence[Device]) -> str:
    """The first name that several devices have; empty where none is."""
    counts = Counter(device.name for device in devices)
    return next((name for name, count in counts.items() if count > 1), "")


def find_devices(words: Sequence[str], inventory: Path | None, *, python: str = "", settings: str = "") -> list[Device]:
    """Devices by their names in an inventory or by address; all of the inventory where no word is given.

    `python` and `settings` stand in place of what is said of every one. Raises InputError for an address that is none,
    and a device that is named twice.
    """
    listed: dict[str, Device] = {}
    if inventory is not None:
        listed = {device.name: device for device in read_inventory(inventory)}
    names = words or list(listed)
    if not names:
        raise InputError(f"no device is named; give user@host, or name them in {FILE}: {_EXAMPLE}")

    devices = []
    for device in [_device_named(name, listed) for name in names]:
        device = replace(device, python=python or device.python, settings=settings or device.settings)
        require_safe(device)
        _require_settings(device)
        devices.append(device)
    twice = _named_twice(devices)
    if twice:
        raise InputError(f"{twice} is named twice; a device gets a bundle once")
    return devices


def _require_settings(device: Device) -> None:
    """Raises InputError where ssh's configuration is named and not there; `none` is ssh's own word for no file."""
    names_file = device.settings not in ("", "none")
    if names_file and not os.path.exists(device.settings):
        raise InputError(f"{device.settings} is no file; name a configuration of ssh that is there, or leave it out")


def _device_named(word: str, listed: dict[str, Device]) -> Device:
    """The inventory's device of that name, else the one at that address."""
    if word in listed:
        return listed[word]
    try:
        return read_address(word)
    except InputError as error:
        raise InputError(f"{error}{did_you_mean(word, list(listed))}") from error


def _device(path: Path, row: object, settings: str) -> Device:
    if not isinstance(row, dict):
        raise InputError(f"{path}: a device is a table; write {_EXAMPLE}")
    unknown = sorted(set(row) - set(_FIELDS))
    if unknown:
        raise InputError(f"{path}: a device has no {unknown[0]!r}; it has {', '.join(_FIELDS)}")
    address = read_address(_text(path, row, "address"))
    device = Device(
        _text(path, row, "name", address.name),
        address.login,
        _text(path, row, "path", address.root),
        _text(path, row, "python", "python3"),
        settings,
    )
    require_safe(device)
    return device


def _text(path: Path, row: dict[str, Any], key: str, default: str | None = None) -> str:
    value = row.get(key, default)
    if not isinstance(value, str):
        raise InputError(f"{path}: {key} is {value!r}, expected a text; write {_EXAMPLE}")
    return value


def _read(path: Path) -> dict[str, Any]:
    try:
        return parse_toml(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path} can't be read ({error.strerror}); it names devices: {_EXAMPLE}") from error
    except (ValueError, RecursionError) as error:  # also numbers of thousands of digits, and depths
        raise InputError(f"{path} is no TOML that can be read: {error}; write {_EXAMPLE}") from error
