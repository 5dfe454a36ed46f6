"""A run's folder: stages that finished are read back, the others are done and written.

A stage counts as finished when its marker holds the hash of everything that went into it, and every file it wrote
still has the hash it had then; the result is always read from disk, so that a continued run and an uninterrupted one
see the same values.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar, cast

from ..device import usage
from ..device.usage import Usage
from ..distributed import by_first, bytes_from_first, from_first, gathered, rank, world
from ..errors import CompressorError, FolderError, RanksError
from ..files import (
    content_hash,
    file_sha256,
    read_json,
    read_record,
    read_signed,
    recorded,
    replacing,
    signed,
    write_bytes,
    write_json,
    write_record,
)
from ..inputs.images import Batches
from .fingerprints import Known, fingerprint, source_hash
from .locks import LOCK, locked, require_unlocked

T = TypeVar("T")
Notify = Callable[[str, float], None]

SHIPPED = ("summary.json", "report.md", "report.html", "report.json", "bundle")
_LEFTOVERS = (".part-*", ".*.onnx.*", ".*.engine.*", ".bundle.*", ".build-*")  # of writers that were killed
_MARKER = "stage/2"
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO}


class Progress(Protocol):
    """What a stage's function says of how far it has come: a share of one, and what it does just now."""

    def __call__(self, share: float, phase: str = "") -> None: ...


@dataclass(frozen=True, slots=True)
class Marker:
    """`key` is of what went into a stage, `files` the sha256 of what it wrote, by paths in the run's folder."""

    key: str
    files: Mapping[str, str]
    cost: Usage


@dataclass(frozen=True, slots=True)
class Keeper(Generic[T]):
    """How a stage's result lies on disk: both take the run's folder."""

    write: Callable[[Path, T], None]
    read: Callable[[Path], T]


def kept_as_record(file: str, kind: type[T]) -> Keeper[T]:
    """A frozen record as JSON, its arrays beside it."""

    def write(folder: Path, record: T) -> None:
        write_record(folder / file, record)

    def read(folder: Path) -> T:
        return read_record(folder / file, kind)

    return Keeper(write, read)


@dataclass
class Stages:
    """`costs` of each stage as measured when it was done; `reused` names those taken from disk.

    `keys` says of each stage what it stands for: its inputs and the content of every file it wrote.
    """

    folder: Path
    notify: Notify
    identity: dict[str, str] = field(default_factory=dict)
    costs: dict[str, Usage] = field(default_factory=dict)
    reused: list[str] = field(default_factory=list)
    keys: dict[str, str] = field(default_factory=dict)

    @property
    def output(self) -> Known:
        """The folder, as an input of a function that writes files too large to hold: where it lies changes nothing."""
        return Known(self.folder, "the run's folder")

    @property
    def seconds(self) -> dict[str, float]:
        """What each stage took when it was done."""
        return {name: cost.seconds for name, cost in self.costs.items()}

    def holds(self, name: str, inputs: object) -> bool:
        """Whether the stage was finished with these inputs and its files are those it wrote."""
        try:
            return self._finished(name, _key_of(name, inputs)) is not None
        except (FolderError, OSError):
            return False

    def do(
        self,
        name: str,
        inputs: object,
        write: Callable[[], None],
        read: Callable[[], T],
        *,
        spent: Usage | None = None,
        together: bool = False,
    ) -> T:
        """Writes the stage's files unless they stand for the same inputs, then reads them.

        Files that are gone, changed, damaged or not understood count as not written, and are named. `spent` went into
        the stage before it was written. Of several processes (`distributed`) the first decides, and its files are what
        all of them read, each in a folder of its own; it writes alone, or all do, `together`, each from its own share.
        """
        key = _key_of(name, inputs)
        if world() == 1:
            return self._of_one(name, key, write, read, spent)
        if not together:
            by_first(lambda: self._of_one(name, key, write, lambda: None, spent))
        else:
            _require_alike(name, key)
            if not by_first(lambda: self._reused(name, key, lambda: None)[0]):
                self._write_anew(name, key, write, spent)
        self._take_from_first(name)
        return read()

    def _of_one(self, name: str, key: str, write: Callable[[], None], read: Callable[[], T], spent: Usage | None) -> T:
        reused, result = self._reused(name, key, read)
        if reused:
            return cast(T, result)
        self._write_anew(name, key, write, spent)
        return read()

    def _reused(self, name: str, key: str, read: Callable[[], T]) -> tuple[bool, T | None]:
        """Whether the stage was finished with that key, and then its result."""
        try:
            marker = self._finished(name, key)
            result = None if marker is None else read()
        except Exception as error:  # whatever is wrong with the files, they are made anew
            self.notify(f"{name} (again: {_reason(error)})", 0.0)
            self._discard(name)
        else:
            if marker is not None:
                self.notify(f"{name} (done before)", 1.0)
                self.reused.append(name)
                self._keep(name, marker)
                return True, result
        return False, None

    def _write_anew(self, name: str, key: str, write: Callable[[], None], spent: Usage | None) -> None:
        self.notify(name, 0.0)
        self.retract()
        self._path(name).unlink(missing_ok=True)
        meter = usage.begin()
        with recorded() as written:
            write()
        cost = meter.read() if spent is None else meter.read().after(spent)
        marker = Marker(key, self._hashed(written), replace(cost, seconds=round(cost.seconds, 3)))
        write_json(self._path(name), signed({"schema": _MARKER, **asdict(marker)}))
        self._keep(name, marker)
        self.notify(name, 1.0)

    def _take_from_first(self, name: str) -> None:
        """The stage's files as the first process wrote them, in place of this one's."""
        is_first = rank() == 0
        marker = from_first(_read_marker(self._path(name)) if is_first else None)
        assert marker is not None
        for file in (*marker.files, f"stages/{name}.json"):
            path = self.folder / file
            data = bytes_from_first(path.read_bytes() if is_first else None)
            if not is_first:
                write_bytes(path, data)
        if not is_first:
            self._keep(name, marker)

    def make(
        self,
        name: str,
        compute: Callable[..., T],
        keeper: Keeper[T],
        *,
        place: object = None,
        together: bool = False,
        **inputs: object,
    ) -> T:
        """What `compute` makes of the inputs, from disk where the stage was finished with the same ones.

        `compute` is a plain function and gets each input by its name, and `progress` (see `Progress`): it sees nothing
        else, so that the key, made from the very same inputs, holds all that the result depends on. An input that is
        `Known` goes in by what is known of it; its value is what `compute` gets. `place` is what the result depends on
        and nobody is given: the versions of libraries, the machine, its GPU. A stage that is given one process's share
        of images is done by all `together` (see `do`).
        """
        if getattr(compute, "__closure__", None) or not hasattr(compute, "__code__"):
            raise TypeError(f"{compute} sees more than its arguments; a stage is a function of what it is given")
        arguments = {key: _value_of(entry) for key, entry in inputs.items()}

        def progress(share: float, phase: str = "") -> None:
            self.notify(f"{name}: {phase}" if phase else name, share)

        def write() -> None:
            keeper.write(self.folder, compute(**arguments, progress=progress))

        prints = {key: fingerprint(entry) for key, entry in inputs.items()}
        together = together or any(map(_is_share, arguments.values()))
        key = [compute.__qualname__, place, prints]
        return self.do(name, key, write, lambda: keeper.read(self.folder), together=together)

    def _keep(self, name: str, marker: Marker) -> None:
        self.keys[name] = content_hash(marker.key, marker.files)
        self.costs[name] = marker.cost

    def _finished(self, name: str, key: str) -> Marker | None:
        """The marker of the stage with that key; None where it was not done, or with other inputs.

        Raises FolderError naming what is not as the stage left it.
        """
        path = self._path(name)
        if not path.is_file():
            return None
        marker = _read_marker(path)
        if marker.key != key:
            return None
        changes = [f"{file} {reason}" for file, reason in changed_files(self.folder, marker.files).items()]
        if changes:
            raise FolderError(", ".join(changes))
        return marker

    def _discard(self, name: str) -> None:
        """Takes away what is not as the stage left it: a builder that keeps what it finds must not keep that."""
        with suppress(FolderError, OSError):
            for file in changed_files(self.folder, _read_marker(self._path(name)).files):
                (self.folder / file).unlink(missing_ok=True)

    def _hashed(self, written: Iterable[Path]) -> dict[str, str]:
        """Those in the run's folder that are still there; what a stage needed for a while is not its result."""
        folder = Path(os.path.abspath(self.folder))
        inside = sorted(path for path in written if path.is_relative_to(folder) and path.is_file())
        return {path.relative_to(folder).as_posix(): file_sha256(path) for path in inside}

    def retract(self) -> None:
        """Takes away what ships: it does not stand for the stages any more, or not yet."""
        for name in SHIPPED:
            _remove(self.folder / name)

    @contextmanager
    def begun(self) -> Iterator[None]:
        """The folder is written inside, by this process alone; a full or read-only disk becomes a FolderError."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise FolderError(f"can't make the folder {self.folder} ({error.strerror}); give another --out") from error
        try:
            with locked(self.folder):
                self._sweep()
                write_json(self.folder / "run.json", {"schema": "run/1", **self.identity})
                yield
        except OSError as error:
            if error.errno is not None and error.errno not in _FULL:  # numpy's short writes carry no number
                raise
            raise FolderError(
                f"{error.filename or self.folder} can't be written ({error.strerror or error}); free space or "
                "rights there, and run the same command again: it continues after the last finished stage"
            ) from error

    def _sweep(self) -> None:
        """What killed writers left; nobody else writes here while the folder is locked."""
        for pattern in _LEFTOVERS:
            for path in list(self.folder.rglob(pattern)):  # all of them, before the folder changes
                _remove(path)

    def _path(self, name: str) -> Path:
        return self.folder / "stages" / f"{name}.json"


def _key_of(name: str, inputs: object) -> str:
    """Of all that goes into a stage: its inputs, and the code as it is now."""
    return content_hash(name, source_hash(), inputs)


def _value_of(entry: object) -> Any:
    """What a stage's function gets of an input."""
    return entry.value if isinstance(entry, Known) else entry


def _is_share(argument: object) -> bool:
    """Whether these are one process's batches among others'."""
    return isinstance(argument, Batches) and argument.turns[1] > 1


def _remove(path: Path) -> None:
    """A file or a whole folder, if there is one."""
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)


def _require_alike(name: str, key: str) -> None:
    """Raises RanksError in every process where one of them was given something else."""
    first_key, *keys = gathered(key)
    unlike = [str(number) for number, other_key in enumerate(keys, start=1) if other_key != first_key]
    if unlike:
        raise RanksError(
            f"{name}: process {', '.join(unlike)} of this run has other code, weights or images than process 0; give "
            "all of them the same"
        )


def recorded_files(folder: Path) -> dict[str, str]:
    """The sha256 of every file that a stage of the run wrote, as its marker says; of markers that can be read."""
    hashes: dict[str, str] = {}
    for path in sorted((folder / "stages").glob("*.json")):
        try:
            hashes |= _read_marker(path).files
        except (FolderError, OSError):
            continue
    return hashes


def hand_on(source: Path, target: Path, names: Iterable[str], *, begun: Iterable[str] = ()) -> None:
    """Copies finished stages of one run to another of the same model and data, which need not be there yet.

    Whether a stage stands for the other run's inputs is its key's to tell, as ever: what does not is done again. Stages
    that the other has with the same key stay, and those of `begun` whatever their key is. Raises FolderError where
    somebody writes to the other folder.
    """
    target.mkdir(parents=True, exist_ok=True)
    with locked(target):
        if not (target / "run.json").is_file():  # first, so that a copy that was cut off is a run's folder
            _copy(source, target, "run.json")
        copy_stages(source, target, names, begun=begun)


def copy_stages(source: Path, target: Path, names: Iterable[str], *, begun: Iterable[str] = ()) -> None:
    """The same into a folder that this process writes to."""
    begun = tuple(begun)
    for name in (*names, *begun):
        marker = _marker_at(source, name)
        if marker is None or changed_files(source, marker.files):
            continue
        marker_there = _marker_at(target, name)
        if marker_there is not None and (name in begun or marker_there.key == marker.key):
            continue
        for file in (*marker.files, f"stages/{name}.json"):  # the marker last
            _copy(source, target, file)


def require_finished(folder: Path, names: Iterable[str], *, remedy: str) -> None:
    """Raises FolderError, with the remedy, for a stage that was not done, or whose files are not as it left them."""
    for name in names:
        marker = _marker_at(folder, name)
        if marker is None:
            raise FolderError(f"the run in {folder} has not come past {name!r}; {remedy}")
        for file, reason in changed_files(folder, marker.files).items():
            raise FolderError(f"{file} in {folder} {reason}; {remedy}")


def _marker_at(folder: Path, name: str) -> Marker | None:
    """None where the stage was not finished, or can't be read."""
    path = folder / "stages" / f"{name}.json"
    try:
        return _read_marker(path) if path.is_file() else None
    except (FolderError, OSError):
        return None


def _copy(source: Path, target: Path, file: str) -> None:
    with replacing(target / file) as temporary:
        shutil.copyfile(source / file, temporary)


def changed_files(folder: Path, hashes: Mapping[str, str]) -> dict[str, str]:
    """What is wrong with each file that is not as its hash says."""
    reasons = {}
    for name, sha256 in hashes.items():
        if not (folder / name).is_file():
            reasons[name] = "is gone"
        elif file_sha256(folder / name) != sha256:
            reasons[name] = "was changed since it was written"
    return reasons


def _reason(error: Exception) -> str:
    if isinstance(error, (CompressorError, OSError)):
        return str(error)
    lines = str(error).strip().splitlines() or ["no message"]
    return f"{type(error).__name__}: {lines[0]}"


def _read_marker(path: Path) -> Marker:
    """Raises FolderError for a marker that is damaged or of an earlier version."""
    content = read_signed(path, _MARKER)
    try:
        marker = Marker(content["key"], dict(content["files"]), Usage(**content["cost"]))
        outside = [name for name in marker.files if Path(name).is_absolute() or ".." in Path(name).parts]
    except (KeyError, TypeError, ValueError) as error:
        raise FolderError(f"stages/{path.name} is no stage's marker") from error
    if outside:
        raise FolderError(f"stages/{path.name} names files outside the run's folder")
    return marker


def _is_leftover(path: Path) -> bool:
    """Of a run that was killed before it had a name."""
    return path.name == LOCK or path.name.startswith(".part-")


def _is_foreign(folder: Path) -> bool:
    """Whether what is there was not left by a run."""
    return not folder.is_dir() or any(not _is_leftover(path) for path in folder.iterdir())


def _identity_in(folder: Path) -> dict[str, Any] | None:
    """Whose run the folder says that it holds; None where it does not say, or not in words that can be read."""
    marker = folder / "run.json"
    if not marker.is_file():
        return None
    try:
        return read_json(marker, "run/1")
    except FolderError:
        if recorded_files(folder):
            return None
        raise


def _difference(key: str, was: object, now: str) -> str:
    """What the run in a folder is of, in words; of weights and images there are hashes alone, which say nothing."""
    if key == "model":
        return f"model {was!r} (now {now!r})"
    if key == "trained" and not was:
        return "the network as it was before your training"
    words = {"weights": "other weights", "data": "other evaluation images", "trained": "other trained weights"}
    return words.get(key, f"another {key}")


def open_run(folder: Path, identity: dict[str, str], notify: Notify) -> Stages:
    """The stages of a run in that folder, new or continued; nothing is written before `begun`.

    Raises FolderError when it holds another run (another model, weights or data) or anything else, or when another
    process writes there now. Where its name is gone or damaged, its stages say what they stand for.
    """
    require_unlocked(folder)
    earlier = _identity_in(folder)
    if earlier is not None:
        _require_same_run(folder, earlier, identity)
    elif folder.exists() and not recorded_files(folder) and _is_foreign(folder):
        raise FolderError(f"{folder} exists and is no run of this program; give another --out")
    place = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not place.is_dir() or not os.access(place, os.W_OK):
        raise FolderError(f"{folder} can't be made: {place} is not a folder you may write to; give another --out")
    return Stages(folder, notify, identity)


def _require_same_run(folder: Path, earlier: Mapping[str, Any], identity: Mapping[str, str]) -> None:
    differences = []
    for key, now in {"trained": "", **identity}.items():
        if earlier.get(key, "") != now:
            differences.append(_difference(key, earlier.get(key), now))
    if differences:
        raise FolderError(
            f"{folder} holds the run of {' and '.join(differences)}; give another --out, or delete that folder"
        )
