"""A run's folder: stages that finished are read back, the others are done and written.

A stage counts as finished when its marker holds the hash of everything that went into it; the result is
always read from disk, so that a continued run and an uninterrupted one see the same values.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from . import __version__
from .device import usage
from .device.usage import Usage
from .errors import CompressorError, FolderError
from .files import content_hash, read_json, write_json

T = TypeVar("T")
Notify = Callable[[str, float], None]

SHIPPED = ("summary.json", "report.md", "report.html", "report.json", "bundle")
_LEFTOVERS = (".part-*", ".*.onnx.*", ".bundle.*")  # of writers that were killed
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO}


@dataclass
class Stages:
    """`costs` of each stage as measured when it was done; `reused` names those taken from disk."""

    folder: Path
    notify: Notify
    identity: dict[str, str] = field(default_factory=dict)
    costs: dict[str, Usage] = field(default_factory=dict)
    reused: list[str] = field(default_factory=list)
    keys: dict[str, str] = field(default_factory=dict)

    @property
    def seconds(self) -> dict[str, float]:
        return {name: cost.seconds for name, cost in self.costs.items()}

    def holds(self, name: str, inputs: Any) -> bool:
        """Whether the stage was finished with these inputs."""
        return self._marker(name).get("key") == content_hash(name, __version__, inputs)

    def do(
        self, name: str, inputs: Any, write: Callable[[], None], read: Callable[[], T], *, spent: Usage | None = None
    ) -> T:
        """Writes the stage's files unless they stand for the same inputs, then reads them.

        Files that are gone or damaged count as not written. `spent` went into the stage before it was written.
        """
        self.keys[name] = content_hash(name, __version__, inputs)
        if self.holds(name, inputs):
            try:
                found = read()
            except (CompressorError, OSError) as error:
                self.notify(f"{name} (again: {error})", 0.0)
            else:
                self.notify(f"{name} (done before)", 1.0)
                self.costs[name] = _cost_of(self._marker(name))
                self.reused.append(name)
                return found
        self.notify(name, 0.0)
        self.retract()
        self._path(name).unlink(missing_ok=True)
        meter = usage.begin()
        write()
        cost = meter.read() if spent is None else meter.read().after(spent)
        self.costs[name] = replace(cost, seconds=round(cost.seconds, 3))
        write_json(self._path(name), {"schema": "stage/1", "key": self.keys[name], **asdict(self.costs[name])})
        self.notify(name, 1.0)
        return read()

    def retract(self) -> None:
        """Takes away what ships: it does not stand for the stages any more, or not yet."""
        for name in SHIPPED:
            path = self.folder / name
            if path.is_dir():
                shutil.rmtree(path)
            path.unlink(missing_ok=True)

    @contextmanager
    def begun(self) -> Iterator[None]:
        """The folder is written inside; a disk that is full or read-only becomes a FolderError."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise FolderError(f"can't make the folder {self.folder} ({error.strerror}); give another --out") from error
        try:
            write_json(self.folder / "run.json", {"schema": "run/1", **self.identity})
            for left in [p for pattern in _LEFTOVERS for p in self.folder.rglob(pattern)]:
                shutil.rmtree(left) if left.is_dir() else left.unlink(missing_ok=True)
            yield
        except OSError as error:
            if error.errno is not None and error.errno not in _FULL:  # numpy's short writes carry no number
                raise
            raise FolderError(
                f"{error.filename or self.folder} can't be written ({error.strerror or error}); free space or "
                "rights there, and run the same command again: it continues after the last finished stage"
            ) from error

    def _path(self, name: str) -> Path:
        return self.folder / "stages" / f"{name}.json"

    def _marker(self, name: str) -> dict[str, Any]:
        path = self._path(name)
        return read_json(path, "stage/1") if path.is_file() else {}


def _cost_of(marker: dict[str, Any]) -> Usage:
    """Markers of earlier versions say nothing of memory."""
    return Usage(float(marker["seconds"]), marker.get("peak_bytes"), marker.get("gpu_peak_bytes"))


def open_run(folder: Path, identity: dict[str, str], notify: Notify) -> Stages:
    """The stages of a run in that folder, new or continued; nothing is written before `begun`.

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
    elif folder.exists() and (not folder.is_dir() or any(not p.name.startswith(".part-") for p in folder.iterdir())):
        raise FolderError(f"{folder} exists and is no run of this program; give another --out")
    place = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    if not place.is_dir() or not os.access(place, os.W_OK):
        raise FolderError(f"{folder} can't be made: {place} is not a folder you may write to; give another --out")
    return Stages(folder, notify, identity)
