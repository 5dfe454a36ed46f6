"""JSON objects from elsewhere, field by field: of the kind and size expected, or a ValueError that names the field.

Nothing here knows what a field means; who reads a manifest or a sidecar adds its path and the remedy.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

Object = Mapping[str, object]  # as JSON has it: what a field holds is not known before it was looked at

MOST_TEXT = 10_000  # characters of a text that is only ever printed
MOST_ENTRIES = 10_000
_SHOWN = 60
_SHA256 = re.compile(r"[0-9a-f]{64}")
_HALF_PAIR = re.compile(r"[\ud800-\udfff]")  # of UTF-16, which JSON can spell and no file can hold


def read_object(path: Path, most_bytes: int) -> dict[str, object]:
    """The object in a JSON file of at most that size, each name once; raises OSError where there is no file.

    Links are refused: they may lead out of the bundle.
    """
    if path.is_symlink():
        raise ValueError("it is a link")
    if path.stat().st_size > most_bytes:
        raise ValueError(f"it is longer than {most_bytes} bytes")
    return parse_object(path.read_bytes())


def parse_object(data: bytes) -> dict[str, object]:
    """The object in a text of JSON, each name once."""
    try:
        content = json.loads(data.decode(), object_pairs_hook=_each_once, parse_constant=_refused)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if not isinstance(content, dict):
        raise ValueError(f"it holds {shown(content)}, expected an object")
    return content


def _each_once(pairs: Iterable[tuple[str, object]]) -> dict[str, object]:
    content: dict[str, object] = {}
    for name, value in pairs:
        if name in content:
            raise ValueError(f"it holds {shown(name)} twice")
        content[name] = value
    return content


def _refused(constant: str) -> None:
    raise ValueError(f"it holds {constant}, which is no JSON")


def field(content: Object, key: str) -> object:
    """Whatever the field holds."""
    if key not in content:
        raise ValueError(f"it has no {shown(key)}")
    return content[key]


def only(content: Object, keys: Iterable[str], subject: str) -> None:
    """Refuses an object that holds anything beside `keys`; `subject` is what the message calls it, as below."""
    unknown = sorted(content.keys() - set(keys))
    if unknown:
        raise ValueError(f"{subject} has a field {shown(unknown[0])}, which this version does not know")


def record(value: object, keys: Iterable[str], subject: str) -> dict[str, object]:
    """The value, if it is an object that holds nothing beside `keys`."""
    content = as_object(value, subject)
    only(content, keys, subject)
    return content


def text(content: Object, key: str, *, most: int = MOST_TEXT) -> str:
    """The field's text, of at most that many characters."""
    return as_text(field(content, key), shown(key), most=most)


def as_text(value: object, subject: str, *, most: int = MOST_TEXT) -> str:
    """The value, if it is a text of at most that many characters."""
    if not isinstance(value, str) or len(value) > most:
        raise ValueError(f"{subject} is {shown(value)}, expected a text of at most {most} characters")
    if _HALF_PAIR.search(value):
        raise ValueError(f"{subject} is {shown(value)}, which is no text in Unicode")
    return value


def texts(content: Object, key: str, *, most: int = MOST_ENTRIES) -> tuple[str, ...]:
    """The field's list of texts, of at most that many entries."""
    subject = f"an entry of {shown(key)}"
    return tuple(as_text(value, subject) for value in entries(content, key, most=most))


def whole(content: Object, key: str, *, least: int = 0, most: int = 1 << 62) -> int:
    """The field's whole number, bounds included."""
    return as_whole(field(content, key), shown(key), least=least, most=most)


def as_whole(value: object, subject: str, *, least: int, most: int) -> int:
    """The value, if it is a whole number within the bounds; true and false are none."""
    if type(value) is not int or not least <= value <= most:  # a bool is an int too
        raise ValueError(f"{subject} is {shown(value)}, expected a whole number from {least} to {most}")
    return value


def number(content: Object, key: str, *, least: float, most: float) -> float:
    """The field's number, bounds included."""
    return as_number(field(content, key), shown(key), least=least, most=most)


def as_number(value: object, subject: str, *, least: float, most: float) -> float:
    """The value as a float, if it is a number within the bounds; true, false and NaN are none."""
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not least <= value <= most:
        raise ValueError(f"{subject} is {shown(value)}, expected a number from {least:g} to {most:g}")
    return float(value)


def flag(content: Object, key: str) -> bool:
    """The field's true or false."""
    value = field(content, key)
    if not isinstance(value, bool):
        raise ValueError(f"{shown(key)} is {shown(value)}, expected true or false")
    return value


def sha256(content: Object, key: str) -> str:
    """The field's hash, in 64 small hexadecimal digits."""
    value = field(content, key)
    if isinstance(value, str) and _SHA256.fullmatch(value):
        return value
    raise ValueError(f"{shown(key)} is {shown(value)}, expected 64 hexadecimal digits")


def entries(content: Object, key: str, *, least: int = 0, most: int = MOST_ENTRIES) -> list[object]:
    """The field's list, of that many entries of any kind."""
    value = field(content, key)
    if not isinstance(value, list) or not least <= len(value) <= most:
        raise ValueError(f"{shown(key)} is {shown(value)}, expected a list of {least} to {most} entries")
    return value


def inner(content: Object, key: str, *, most: int = MOST_ENTRIES) -> dict[str, object]:
    """The field's object, of at most that many fields."""
    return as_object(field(content, key), shown(key), most=most)


def as_object(value: object, subject: str, *, most: int = MOST_ENTRIES) -> dict[str, object]:
    """The value, if it is an object of at most that many fields."""
    if not isinstance(value, dict) or len(value) > most:
        raise ValueError(f"{subject} is {shown(value)}, expected an object of at most {most} fields")
    return value


def shown(value: object) -> str:
    """A value of unknown kind and size for a message: one short line of printable characters."""
    match value:
        case dict():
            return f"an object of {len(value)} fields"
        case list():
            return f"a list of {len(value)} entries"
        case str() if len(value) > _SHOWN:
            return f"{value[:_SHOWN]!r}... ({len(value)} characters)"
        case None | bool():
            return json.dumps(value)
    line = repr(value)
    if len(line) > 2 * _SHOWN + 2:
        return f"{line[:_SHOWN]}..."
    return line


def printable(line: str) -> str:
    """The line with what a terminal would not print, or would obey, as escapes."""
    return "".join(map(_escaped, line))


def _escaped(char: str) -> str:
    """`a` as it is, a line's end as backslash and `n`."""
    return char if char.isprintable() else repr(char)[1:-1]
