"""One writer to a folder: a lock file that the kernel lets go of when its process ends, however it ends.

Where a system or a file system has no such locks there is none. Knows nothing of what is written.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import FolderError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

LOCK = ".lock"
_TRIES, _PAUSE_S = 5, 0.02  # one who only looks holds the lock for a moment
_LONGEST = 200  # characters of a lock file that are shown


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Nobody else writes to the folder inside. Raises FolderError naming who does."""
    handle = _acquired(folder / LOCK)
    try:
        yield
    finally:
        if handle is not None:
            (folder / LOCK).unlink(missing_ok=True)
            os.close(handle)


def require_unlocked(folder: Path) -> None:
    """Raises FolderError where somebody writes to the folder now; leaves nothing behind."""
    path = folder / LOCK
    if fcntl is None or not path.is_file() or not os.access(path, os.R_OK):
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise _refusal(path) from error
    except OSError:  # a file system without locks
        return
    finally:
        os.close(handle)


def _acquired(path: Path) -> int | None:
    """The open lock file; None where there are no locks."""
    if fcntl is None:
        return None
    for _ in range(_TRIES):
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(handle)
            time.sleep(_PAUSE_S)
            continue
        except OSError:  # a file system without locks
            return handle
        if _lies_at(handle, path):
            os.truncate(handle, 0)
            os.write(handle, f"process {os.getpid()} on {socket.gethostname()}".encode())
            return handle
        os.close(handle)  # who held it took the file away in between
    raise _refusal(path)


def _lies_at(handle: int, path: Path) -> bool:
    """Whether the open file is the one that others would find and lock."""
    try:
        return os.path.samestat(os.fstat(handle), path.stat())
    except FileNotFoundError:
        return False


def _refusal(path: Path) -> FolderError:
    try:
        text = path.read_bytes()[:_LONGEST].decode(errors="replace")
    except OSError:
        text = ""
    writer = "".join(character for character in text if character.isprintable()) or "another process"
    return FolderError(
        f"{path.parent} is being written by {writer}; wait until that run ends or stop it, then run the same command "
        "again, or give another --out"
    )
