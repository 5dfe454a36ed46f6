"""Where a key's password comes from: the terminal, an environment variable or a file descriptor that the user names.

Never a flag's value or a file's name, which others can read; and never into a message.
"""

from __future__ import annotations

import getpass
import os
import re
import warnings
from pathlib import Path

from ..errors import InputError
from ..signing import is_locked

_MOST_BYTES = 1024
# nine digits: what C takes for a number of a descriptor
_PLACE = re.compile(r"env:(?P<variable>.+)|fd:(?P<descriptor>[0-9]{1,9})", re.DOTALL)
_WAYS = "env:NAME (an environment variable) or fd:NUMBER (an open file descriptor, its first line)"


def password_of(key: Path, source: str) -> bytes:
    """The password of a private key, from `source` or else asked for; empty for a key that has none."""
    if source:
        return password_from(source)
    return _asked(f"password of {key}: ") if is_locked(key) else b""


def new_password(source: str) -> bytes:
    """The password that a new key is to have, from `source` or else asked for twice."""
    if source:
        return password_from(source)
    password = _asked("password of the new key: ")
    if _asked("the same again: ") != password:
        raise InputError("the two passwords differ; nothing was written")
    return password


def password_from(source: str) -> bytes:
    """What `env:NAME` or `fd:NUMBER` holds; raises InputError, which never repeats what was given."""
    place = _PLACE.fullmatch(source)
    if place is None:
        raise InputError(f"--password-from takes {_WAYS}; a password itself is no place to find one")
    if place["variable"]:
        return _of_variable(place["variable"])
    return _of_descriptor(int(place["descriptor"]))


def _of_variable(name: str) -> bytes:
    value = os.environ.get(name)
    if value is None:
        raise InputError("--password-from names an environment variable that is not set; export it, or leave it out")
    return _required(os.fsencode(value))


def _of_descriptor(number: int) -> bytes:
    try:
        with os.fdopen(number, "rb") as file:
            line = file.readline(_MOST_BYTES + 1)
    except OSError as error:
        raise InputError(f"--password-from names a file descriptor that can't be read: {error}") from error
    return _required(line.rstrip(b"\r\n"))


def _asked(prompt: str) -> bytes:
    """A line that the terminal does not show. Raises InputError where there is none: it would be shown."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", getpass.GetPassWarning)
            return _required(getpass.getpass(prompt).encode())
    except (getpass.GetPassWarning, EOFError) as error:
        raise InputError(
            f"the key has a password and there is no terminal to ask on; --password-from {_WAYS}"
        ) from error


def _required(password: bytes) -> bytes:
    if not password:
        raise InputError("the password is empty, which locks nothing; give one")
    if len(password) > _MOST_BYTES:
        raise InputError(f"the password is longer than {_MOST_BYTES} bytes; give a shorter one")
    return password
