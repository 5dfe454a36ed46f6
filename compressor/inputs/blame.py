"""An exception out of the user's code in, what to say of it out: its kind, its words, and the line that raised it."""

from __future__ import annotations

import re
import traceback
from collections.abc import Iterator
from pathlib import Path

from .trust import is_installed

_PACKAGE = Path(__file__).resolve().parents[1]
_FRAME = re.compile(r'File "([^"]+)", line (\d+)')  # of a traceback as text, which a worker process sends


def raised(error: BaseException) -> str:
    """`ValueError: no such file, at data.py:12`; the last line outside of installed libraries, where there is one."""
    words = _words(str(error))
    kind = f"{type(error).__name__}:"
    if not words.startswith(kind):
        words = f"{kind} {words}"
    users = [f"{file}:{line}" for file, line in _places(error) if _is_users(file)]
    if not users:
        return words
    return f"{words}, at {users[-1]}"


def _words(text: str) -> str:
    """The line of an error's text that says what happened: the first, of a traceback the last."""
    lines = text.strip().splitlines() or ["no message"]
    line = lines[-1] if "Traceback" in text else lines[0]
    return line.strip()[:300]


def _places(error: BaseException) -> Iterator[tuple[str, int]]:
    """File and line of every call that led to the error, the outermost first."""
    for frame in traceback.extract_tb(error.__traceback__):
        yield frame.filename, frame.lineno or 0
    for file, line in _FRAME.findall(str(error)):
        yield file, int(line)


def _is_users(file: str) -> bool:
    path = Path(file).resolve()
    is_ours = path.is_relative_to(_PACKAGE)
    return path.suffix == ".py" and not is_ours and not is_installed(path)
