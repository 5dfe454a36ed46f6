"""A run's folder: stages that finished are read back, the others are done and written.

A stage counts as finished when its marker holds the hash of everything that went into it; the result is
always read from disk, so that a continued run and an uninterrupted one see the same values.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from . import __version__
from .errors import FolderError
from .files import content_hash, read_json, write_json

T = TypeVar("T")
Notify = Callable[[str, float], None]


@dataclass
class Stages:
    """`seconds` of each stage as measured when it was done; `reused` names those taken from disk."""

    folder: Path
    notify: Notify
    seconds: dict[str, float] = field(default_factory=dict)
    reused: list[str] = field(default_factory=list)
    keys: dict[str, str] = field(default_factory=dict)

    def do(self, name: str, inputs: Any, write: Callable[[], None], read: Callable[[], T]) -> T:
        """Writes the stage's files unless they stand for the same inputs, then reads them."""
        key = content_hash(name, __version__, inputs)
        self.keys[name] = key
        marker = self.folder / "stages" / f"{name}.json"
        done = read_json(marker, "stage/1") if marker.is_file() else {}
        if done.get("key") == key:
            self.notify(f"{name} (done before)", 1.0)
            self.seconds[name] = float(done["seconds"])
            self.reused.append(name)
            return read()
        self.notify(name, 0.0)
        marker.unlink(missing_ok=True)
        start = time.perf_counter()
        write()
        self.seconds[name] = round(time.perf_counter() - start, 3)
        write_json(marker, {"schema": "stage/1", "key": key, "seconds": self.seconds[name]})
        self.notify(name, 1.0)
        return read()


def open_run(folder: Path, identity: dict[str, str], notify: Notify) -> Stages:
    """The stages of a run in that folder, new or continued.

    Raises FolderError when it holds another run (another model, weights or data) or anything else.
    """
    marker = folder / "run.json"
    if marker.is_file():
        held = read_json(marker, "run/1")
        different = [k for k, v in identity.items() if held.get(k) != v]
        if different:
            was, now = (", ".join(f"{k} {d.get(k)!r}" for k in different) for d in (held, identity))
            raise FolderError(
                f"{folder} holds the run of {was}, not of {now}; give another --out, or delete that folder"
            )
    elif folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FolderError(f"{folder} exists and is no run of this program; give another --out")
    try:
        (folder / "stages").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FolderError(f"can't make the folder {folder}: {error.strerror}; give another --out") from error
    write_json(marker, {"schema": "run/1", **identity})
    return Stages(folder, notify)
