"""The files below a bundle's folder by name, whatever is no folder; links are files here and are never followed."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath


def files_below(folder: Path) -> Iterator[str]:
    """Paths in the folder, in order; raises OSError for a folder that can't be read. A linked folder is one file."""

    def stop(error: OSError) -> None:
        raise error  # os.walk would pass over a folder that it can't read

    for place, folders, names in os.walk(folder, onerror=stop):
        parent = Path(place)
        below = parent.relative_to(folder)
        links = [name for name in folders if (parent / name).is_symlink()]
        folders.sort()  # in place: the order os.walk goes on in
        for name in sorted([*names, *links]):
            yield (below / name).as_posix()


def reason_of(error: Exception) -> str:
    """What the system says, such as `No space left on device`; of an error that is not its own, the text."""
    return str(getattr(error, "strerror", None) or error)


def is_plain_file(path: Path) -> bool:
    """Whether a file lies there itself, and no link to one."""
    return path.is_file() and not path.is_symlink()


def reaches_out(name: str) -> bool:
    """Whether a path could lead out of the folder it is to lie in, by its text, on any system."""
    path = PurePosixPath(name)
    is_windows_path = not {"\\", ":"}.isdisjoint(name)
    return is_windows_path or path.is_absolute() or ".." in path.parts
