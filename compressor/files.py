"""Records, arrays and JSON to and from disk: written whole or not at all, hashed, never pickled.

Arrays are safetensors, everything else JSON with a `schema` field. A file appears under its name only
once it is complete. Knows the records, not what they mean.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import fields, is_dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray

from . import records
from .errors import FolderError, GateError, MissingPackageError

# errors of a disk or of rights, which the user can mend; not every system has all of them
_MENDABLE_NAMES = "ENOSPC EDQUOT EFBIG EACCES EPERM EROFS EIO ENOTDIR EISDIR EEXIST ENAMETOOLONG"
_MENDABLE = {getattr(errno, name, None) for name in _MENDABLE_NAMES.split()} - {None}
_SHOWN = 80  # characters of a foreign value in a message
_BLOCK_BYTES = 1 << 20
Record = TypeVar("Record")
# what JSON can hold, as it is read
Json: TypeAlias = "bool | int | float | str | Sequence[Json] | Mapping[str, Json] | None"
Arrays = dict[str, NDArray[Any]]  # by name, of types that only their reader knows
Place = str | os.PathLike[str]
_WRITTEN: ContextVar[set[Path] | None] = ContextVar("written", default=None)


@contextmanager
def recorded() -> Iterator[set[Path]]:
    """The absolute paths of the files that are written inside; an inner block keeps its own to itself."""
    written: set[Path] = set()
    token = _WRITTEN.set(written)
    try:
        yield written
    finally:
        _WRITTEN.reset(token)


def note(path: Place) -> None:
    """Records a file that was written by other means than `replacing`."""
    written = _WRITTEN.get()
    if written is not None:
        written.add(Path(os.path.abspath(path)))


@contextmanager
def replacing(path: Place) -> Iterator[Path]:
    """A temporary path in the same folder, of the same suffix, that takes `path`'s place when the block ends well.

    On any failure the temporary file is removed and what was at `path` stays. Its name is this process's own: what a
    killed one left can't be told from what another is writing, and goes when a run's folder is locked. Raises
    FolderError when the disk or the folder's rights are in the way.
    """
    target = Path(path)
    if target.exists() and not (target.is_file() or target.is_dir()):
        raise FolderError(f"{str(target)!r} is a device or a pipe, which a file would replace; name an ordinary file")
    temporary = target.with_name(f".part-{os.getpid()}-{secrets.token_hex(4)}-{target.name}")
    with _explained(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(b"")  # a folder without rights is an error before the work, not after it
        try:
            yield temporary
            _settle(temporary, target)
            note(target)
        finally:
            temporary.unlink(missing_ok=True)


@contextmanager
def _explained(target: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in _MENDABLE:
            raise
        raise FolderError(
            f"{str(target)!r} can't be written ({error.strerror or error}); nothing was changed there. "
            "Free space or rights in that folder, or choose another with --out, and run the same command again"
        ) from error


def _settle(temporary: Path, target: Path) -> None:
    """Onto the disk first, then under its name: a power cut leaves the old file or the new one."""
    with temporary.open("rb+") as file:
        os.fsync(file.fileno())
    os.replace(temporary, target)
    folder = os.open(target.parent, os.O_RDONLY)  # the new name is an entry of the folder, which has its own sync
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def write_bytes(path: Place, data: bytes) -> None:
    """The whole file or, with FolderError, none of it; the folder is made where there is none."""
    with replacing(path) as temporary:
        temporary.write_bytes(data)


def write_text(path: Place, text: str) -> None:
    """As `write_bytes`, in UTF-8."""
    write_bytes(path, text.encode())


def write_json(path: Place, value: Mapping[str, object]) -> None:
    """`value` needs a `schema` field; numbers that JSON doesn't know (NaN, infinity) are a GateError."""
    if "schema" not in value:
        raise ValueError(f"what goes to {str(path)!r} has no 'schema' field")
    try:
        text = json.dumps(value, indent=2, allow_nan=False, default=_plain)
    except ValueError as error:
        place = next(_not_finite(value, ""), str(error))
        raise GateError(
            f"{str(path)!r} would hold {place}, which is no finite number: the network's values overflow. Look for "
            "weights or images of extreme size (1e30 is none that was trained)"
        ) from error
    write_text(path, text + "\n")


def _not_finite(value: object, place: str) -> Iterator[str]:
    """`nan at pruned/32/max_abs` for every number that JSON doesn't know."""
    match value:
        case Mapping():
            for key, inner in value.items():
                yield from _not_finite(inner, f"{place}/{key}")
        case list() | tuple():
            for index, inner in enumerate(value):
                yield from _not_finite(inner, f"{place}/{index}")
        case np.ndarray():
            yield from _not_finite(value.tolist(), place)
        case float() | np.floating() if not math.isfinite(value):
            yield f"{value} at {place.lstrip('/')!r}"


def _plain(value: object) -> object:
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray):
        return value.tolist()
    raise TypeError(f"{type(value).__name__} has no place in JSON")


def read_json(path: Place, schema: str) -> dict[str, Any]:
    """The object in a JSON file; raises FolderError unless it is there, readable and of that schema."""
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise FolderError(f"{str(path)!r} doesn't exist; expected a file of schema {schema!r}") from error
    except OSError as error:
        raise FolderError(f"{str(path)!r} can't be read ({error.strerror}); expected a file of {schema!r}") from error
    except (ValueError, RecursionError) as error:
        raise FolderError(f"{str(path)!r} is not JSON ({error}); delete it and run the stage again") from error
    content: dict[str, Any] = value if isinstance(value, dict) else {}
    stated = content.get("schema")
    if stated != schema:
        shown = repr(stated)[:_SHOWN]
        raise FolderError(f"{str(path)!r} has schema {shown}, expected {schema!r}; it comes from another version")
    return content


def signed(value: Mapping[str, object]) -> dict[str, object]:
    """JSON with a hash of its own content in it, for what is read back and believed."""
    return {**value, "digest": content_hash(value)}


def read_signed(path: Place, schema: str) -> dict[str, Any]:
    """The object that was `signed` before it was written; raises FolderError where a digit of it is another."""
    value = read_json(path, schema)
    digest = value.pop("digest", None)
    try:
        intact = digest == content_hash(value)
    except RecursionError:  # nested deeper than anything that was written here
        intact = False
    if not intact:
        raise FolderError(f"{str(path)!r} was changed since it was written; run the command that wrote it again")
    return value


def write_arrays(
    path: Place, arrays: Mapping[str, NDArray[np.generic]], metadata: Mapping[str, str] | None = None
) -> None:
    """Arrays to a safetensors file, in row-major order whatever order they have in memory."""
    save = _safetensors().save
    contiguous = {name: np.asarray(array, order="C") for name, array in arrays.items()}
    write_bytes(path, save(contiguous, metadata=dict(metadata) if metadata else None))


def read_arrays(path: Place) -> Arrays:
    """The arrays of a safetensors file; raises FolderError where it is missing or damaged."""
    safetensors = _safetensors()
    try:
        loaded: Arrays = safetensors.load(Path(path).read_bytes())
    except FileNotFoundError as error:
        raise FolderError(f"{str(path)!r} doesn't exist; expected a safetensors file") from error
    except Exception as error:
        raise FolderError(f"{str(path)!r} is not a safetensors file ({error}); delete it and run again") from error
    return loaded


def _safetensors() -> ModuleType:
    try:
        import safetensors.numpy
    except ImportError as error:
        raise MissingPackageError(
            "arrays are stored as safetensors, which is not installed; pip install safetensors"
        ) from error
    return safetensors.numpy


def write_record(path: Place, record: object) -> None:
    """One of the records as `path` (JSON) and, where it holds arrays, a .safetensors file beside it.

    The arrays go first, under a name made of their hash's start: the JSON that names them is either
    the old or the new one, and each finds its own arrays. Arrays that no JSON names any more are removed.
    """
    arrays: Arrays = {}
    value = _unfolded(record, "", arrays)
    target = Path(path)
    body = {"schema": _schema(type(record)), "value": value}
    beside = ""
    if arrays:
        sha256 = _arrays_sha256(arrays)
        beside = f"{target.stem}-{sha256[:12]}.safetensors"
        body |= {"sha256": sha256, "arrays": beside}
        write_arrays(target.with_name(beside), arrays)
    write_json(target, body)

    for stale in target.parent.glob(f"{target.stem}-{'[0-9a-f]' * 12}.safetensors"):
        if stale.name != beside:
            stale.unlink(missing_ok=True)


def read_record(path: Place, kind: type[Record]) -> Record:
    """The record that `write_record` put there; raises FolderError for anything else."""
    body = read_json(path, _schema(kind))
    try:
        record = _record_of(path, body)
    except FolderError:
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"[:_SHOWN]
        raise FolderError(
            f"{str(path)!r} holds no {kind.__name__} ({reason}); delete it and run the stage again"
        ) from error
    if not isinstance(record, kind):
        raise FolderError(f"{str(path)!r} holds no {kind.__name__}; delete it and run the stage again")
    return record


def _record_of(path: Place, body: Mapping[str, Any]) -> object:
    arrays: Arrays = {}
    if "arrays" in body:
        arrays = read_arrays(Path(path).with_name(body["arrays"]))
        if _arrays_sha256(arrays) != body["sha256"]:
            raise FolderError(f"the arrays of {str(path)!r} are not those it was written with; run the stage again")
    return _folded(body["value"], arrays)


def _arrays_sha256(arrays: Arrays) -> str:
    """Over names and contents, in alphabetical order."""
    contents: list[object] = []
    for name in sorted(arrays):
        contents += [name, arrays[name]]
    return content_hash(*contents)


def _schema(kind: type[object]) -> str:
    return f"{kind.__name__.lower()}/1"


def _entries_of(record: Any) -> dict[str, Any]:
    """A record's fields by name."""
    return {field.name: getattr(record, field.name) for field in fields(record)}


def _unfolded(value: Any, place: str, arrays: Arrays) -> object:
    """JSON for a record; arrays are put aside in `arrays` under the place they were found at, `/sites/0/units`."""
    match value:
        case np.ndarray():
            arrays[place] = value
            return {"array": place}
        case _ if is_dataclass(type(value)):
            return {"record": type(value).__name__, "fields": _unfolded_entries(_entries_of(value), place, arrays)}
        case Mapping():
            return {"mapping": _unfolded_entries(value, place, arrays)}
        case tuple() | list():
            return [_unfolded(entry, f"{place}/{index}", arrays) for index, entry in enumerate(value)]
        case np.generic():
            return value.item()
        case _:
            return value


def _unfolded_entries(entries: Mapping[Any, object], place: str, arrays: Arrays) -> dict[str, object]:
    return {str(key): _unfolded(entry, f"{place}/{key}", arrays) for key, entry in entries.items()}


def _folded(value: Any, arrays: Arrays) -> Any:
    """What `_unfolded` took apart; sequences come back as tuples, which is what records hold."""
    match value:
        case list():
            return tuple(_folded(entry, arrays) for entry in value)
        case {"array": name}:
            return arrays[name]
        case {"mapping": entries}:
            return {key: _folded(entry, arrays) for key, entry in entries.items()}
        case dict():
            kind = _record_named(value["record"])
            return kind(**{name: _folded(entry, arrays) for name, entry in value["fields"].items()})
        case _:
            return value


def _record_named(name: str) -> Any:
    """A kind of record. Raises TypeError for anything else: a file names it, which may say what it likes."""
    kind = getattr(records, name)
    if not isinstance(kind, type) or not is_dataclass(kind):
        raise TypeError(f"{name!r} is no record")
    return kind


def file_sha256(path: Place) -> str:
    """sha256 of a file's bytes, in hexadecimal, read block by block."""
    digest = hashlib.sha256()
    with Path(path).open("rb") as file:
        for block in iter(lambda: file.read(_BLOCK_BYTES), b""):
            digest.update(block)
    return digest.hexdigest()


def content_hash(*contents: object) -> str:
    """sha256 of numbers, strings, bytes, arrays, records, mappings (in any order) and sequences of them.

    Everything goes in with its type and length, so that ("ab", "c") and ("a", "bc") differ. Raises TypeError for
    what is none of these.
    """
    digest = hashlib.sha256()
    for value in contents:
        _feed(digest.update, value)
    return digest.hexdigest()


def _feed(update: Callable[[bytes], None], value: Any) -> None:
    match value:
        case np.ndarray():
            _feed_bytes(update, f"array {value.dtype.str} {value.shape}", np.ascontiguousarray(value).tobytes())
        case _ if is_dataclass(type(value)):
            _feed(update, (type(value).__name__, _entries_of(value)))
        case Mapping():
            update(f"mapping {len(value)};".encode())
            for key in sorted(value, key=repr):  # keys may be of several types, which don't compare
                _feed(update, key)
                _feed(update, value[key])
        case tuple() | list():
            update(f"sequence {len(value)};".encode())
            for entry in value:
                _feed(update, entry)
        case bytes():
            _feed_bytes(update, "bytes", value)
        case np.generic():  # before the numbers of Python, some of which it is too
            _feed_plain(update, value.item())
        case None | str() | bool() | int() | float():
            _feed_plain(update, value)
        case _:
            raise TypeError(f"{type(value).__name__} has no content to hash")


def _feed_plain(update: Callable[[bytes], None], value: object) -> None:
    _feed_bytes(update, type(value).__name__, repr(value).encode())


def _feed_bytes(update: Callable[[bytes], None], kind: str, data: bytes) -> None:
    update(f"{kind} {len(data)};".encode())
    update(data)
