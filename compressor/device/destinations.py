"""Where a verb may write: a file that is free, or what the verb wrote before; it appears whole or not at all.

What else would be lost stays: a device or a link that has a file's name, a bundle's files, the samples themselves.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from ..errors import FolderError
from .folders import is_plain_file, reason_of


def require_destination(name: str, path: Path, *, kept: Sequence[Path] = ()) -> None:
    """Raises FolderError where no file can be written, or would replace what is none, or lie at or in one of `kept`.

    `name` is what messages call it, such as its flag.
    """
    if path.is_dir():
        raise FolderError(f"{name} {path} is a folder; name a file in it, such as {path / 'outputs.npz'}")
    if not path.parent.is_dir():
        raise FolderError(f"{name} {path}: there is no folder {path.parent}")
    if os.path.lexists(path) and not is_plain_file(path):
        raise FolderError(f"{name} {path} is a link or a device, which a file would replace; name an ordinary file")
    actual = path.resolve()
    for place in kept:
        if place.resolve() in (actual, *actual.parents):
            raise FolderError(f"{name} {path} would change {place}, which is to stay as it is; name another file")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A scratch file that becomes `path` when the context ends without an error; FolderError where the disk won't.

    So `path` is the old file or the new one at every moment.
    """
    scratch = path.with_name(f".{path.name}.{os.getpid()}")  # renaming is atomic within a folder only
    try:
        yield scratch
        os.replace(scratch, path)
    except OSError as error:
        raise FolderError(f"can't write {path}: {reason_of(error)}") from error
    finally:
        with suppress(OSError):  # renamed, never made, or on a disk that is gone
            scratch.unlink()


@contextmanager
def written(path: Path) -> Iterator[IO[str]]:
    """A text that appears as the file, as `replacing` has it."""
    with (
        replacing(path) as scratch,
        scratch.open("w", encoding="utf-8", errors="backslashreplace", newline="") as file,
    ):
        yield file


def write_json(path: Path, content: Mapping[str, object]) -> None:
    """The file holds that object, as `replacing` has it."""
    with replacing(path) as scratch:
        scratch.write_bytes((json.dumps(content, indent=1) + "\n").encode())
