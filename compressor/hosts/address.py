"""Where a device is, in words: `user@host:path` in, an address that can be no option of a program out.

Whatever else is needed to reach it (keys, agent, port, jump hosts) is OpenSSH's configuration to say.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from ..errors import InputError

ROOT = "compressor"  # where bundles lie on a device whose path is not said: a folder in the user's home
_HOST = r"[A-Za-z0-9_][A-Za-z0-9._-]*|\[[0-9A-Fa-f:.]+(%[A-Za-z0-9._-]+)?\]"
_USER = r"[A-Za-z0-9_][A-Za-z0-9._@+-]*"
_LOGIN = re.compile(f"({_USER}@)?({_HOST})")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,99}")
_FORM = "write user@host, host or user@host:path, as ssh knows the host"


@dataclass(frozen=True, slots=True)
class Device:
    """A device by name: `login` is what ssh is given, `root` the folder there, `python` what runs there.

    `settings` is a configuration file for ssh in place of the user's own, where one is named.
    """

    name: str
    login: str
    root: str = ROOT
    python: str = "python3"
    settings: str = ""

    @property
    def address(self) -> str:
        """As it is written."""
        if self.root == ROOT:
            return self.login
        return f"{self.login}:{self.root}"


def read_address(text: str, *, python: str = "python3", settings: str = "") -> Device:
    """The device at `user@host:path`; raises InputError for what is none, or would be read as an option."""
    login, root = _parted(text)
    device = Device(_name_of(login, root), login, root or ROOT, python, settings)
    require_safe(device)
    return device


def require_safe(device: Device) -> None:
    """Raises InputError where a part of an address would be taken for something else by ssh, rsync or a shell."""
    if not _LOGIN.fullmatch(device.login):
        raise InputError(f"{device.login!r} is no address of a device: {_FORM}")
    _require_word(device, "path", device.root)
    _require_word(device, "Python", device.python)
    if not _NAME.fullmatch(device.name):
        raise InputError(f"{device.name!r} is no name for a device; take letters, digits, '.', '_' and '-'")


def _require_word(device: Device, what: str, word: str) -> None:
    """Raises InputError for a path that is empty, that a program would read as an option, or that can't be shown."""
    is_option = word.startswith("-")
    if not word or is_option or not word.isprintable():
        raise InputError(f"{device.login}: its {what} can't be {word!r}; {_FORM}")


def _parted(text: str) -> tuple[str, str]:
    """Login and path; a colon in brackets is part of an IPv6 address."""
    end = text.rfind("]") + 1
    login, _, root = text[end:].partition(":")
    return text[:end] + login, root


def _name_of(login: str, root: str) -> str:
    """`pi@kitchen:face models` to `kitchen-face-models`."""
    host = login.rpartition("@")[2]
    words = re.findall(r"[A-Za-z0-9._]+", f"{host} {root}")
    return "-".join(words)[:100] or "-"
