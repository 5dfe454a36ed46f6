"""Records, arrays and JSON to and from disk: written whole or not at all, hashed, never pickled.

Arrays are safetensors, everything else JSON with a `schema` field. A file appears under its name only
once it is complete. Knows the records, not what they mean.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from . import records
from .errors import FolderError, MissingPackageError

_WRITING = {
    getattr(errno, name, None)
    for name in "ENOSPC EDQUOT EFBIG EACCES EPERM EROFS EIO ENOTDIR EISDIR EEXIST ENAMETOOLONG".split()
} - {None}
Record = TypeVar("Record")
Arrays = dict[str, NDArray[Any]]
Place = str | os.PathLike[str]


@contextmanager
def replacing(path: Place) -> Iterator[Path]:
    """A temporary path in the same folder, of the same suffix, that takes `path`'s place when the block ends well.

    On any failure the temporary file is removed and what was at `path` stays; what a killed process left
    is swept away by the next writer. Raises FolderError when the disk or the folder's rights are in the way.
    """
    target = Path(path)
    temporary = target.with_name(f".part-{target.name}")
    with _explained(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(b"")
        try:
            yield temporary
            _settle(temporary, target)
        finally:
            temporary.unlink(missing_ok=True)


@contextmanager
def _explained(target: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in _WRITING:
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
    folder = os.open(target.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def write_bytes(path: Place, data: bytes) -> None:
    with replacing(path) as temporary:
        temporary.write_bytes(data)


def write_text(path: Place, text: str) -> None:
    write_bytes(path, text.encode())


def write_json(path: Place, value: Mapping[str, Any]) -> None:
    """`value` needs a `schema` field; numbers that JSON doesn't know (NaN, infinity) are refused."""
    if "schema" not in value:
        raise ValueError(f"what goes to {str(path)!r} has no 'schema' field")
    write_text(path, json.dumps(value, indent=2, allow_nan=False, default=_plain) + "\n")


def _plain(value: Any) -> Any:
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray):
        return value.tolist()
    raise TypeError(f"{type(value).__name__} has no place in JSON")


def read_json(path: Place, schema: str) -> dict[str, Any]:
    """The object in a JSON file, checked to be of that schema."""
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise FolderError(f"{str(path)!r} doesn't exist; expected a file of schema {schema!r}") from error
    except ValueError as error:
        raise FolderError(f"{str(path)!r} is not JSON ({error}); delete it and run the stage again") from error
    found = value.get("schema") if isinstance(value, dict) else None
    if found != schema:
        raise FolderError(f"{str(path)!r} has schema {found!r}, expected {schema!r}; it comes from another version")
    assert isinstance(value, dict)
    return value


def write_arrays(path: Place, arrays: Mapping[str, NDArray[Any]], metadata: Mapping[str, str] | None = None) -> None:
    """Arrays to a safetensors file."""
    save = _safetensors().save
    contiguous = {name: np.asarray(array, order="C") for name, array in arrays.items()}
    write_bytes(path, save(contiguous, metadata=dict(metadata) if metadata else None))


def read_arrays(path: Place) -> Arrays:
    """The arrays of a safetensors file."""
    safetensors = _safetensors()
    try:
        loaded: Arrays = safetensors.load(Path(path).read_bytes())
    except FileNotFoundError as error:
        raise FolderError(f"{str(path)!r} doesn't exist; expected a safetensors file") from error
    except Exception as error:
        raise FolderError(f"{str(path)!r} is not a safetensors file ({error}); delete it and run again") from error
    return loaded


def _safetensors() -> Any:
    try:
        import safetensors.numpy
    except ImportError as error:
        raise MissingPackageError(
            "arrays are stored as safetensors, which is not installed; pip install safetensors"
        ) from error
    return safetensors.numpy


def write_record(path: Place, record: Any) -> None:
    """One of the records as `path` (JSON) and, where it holds arrays, `path` with suffix .safetensors.

    The arrays go first, under a name made of their hash's start: the JSON that names them is either
    the old or the new one, and each finds its own arrays.
    """
    arrays: Arrays = {}
    value = _unfolded(record, "", arrays)
    target = Path(path)
    body: dict[str, Any] = {"schema": _schema(type(record)), "value": value}
    if arrays:
        body["sha256"] = content_hash(*(part for name in sorted(arrays) for part in (name, arrays[name])))
        body["arrays"] = f"{target.stem}-{body['sha256'][:12]}.safetensors"
        write_arrays(target.with_name(body["arrays"]), arrays)
    write_json(target, body)
    for stale in target.parent.glob(f"{target.stem}-{'[0-9a-f]' * 12}.safetensors"):
        if stale.name != body.get("arrays"):
            stale.unlink()


def read_record(path: Place, kind: type[Record]) -> Record:
    """The record that `write_record` put there."""
    body = read_json(path, _schema(kind))
    arrays = read_arrays(Path(path).with_name(body["arrays"])) if "arrays" in body else {}
    if arrays and content_hash(*(part for name in sorted(arrays) for part in (name, arrays[name]))) != body["sha256"]:
        raise FolderError(f"the arrays of {str(path)!r} are not those it was written with; run the stage again")
    record = _folded(body["value"], arrays)
    assert isinstance(record, kind)
    return record


def _schema(kind: type[Any]) -> str:
    return f"{kind.__name__.lower()}/1"


def _unfolded(value: Any, place: str, arrays: Arrays) -> Any:
    """JSON for a record; arrays are put aside in `arrays` under the place they were found at."""
    if isinstance(value, np.ndarray):
        arrays[place] = value
        return {"array": place}
    if is_dataclass(value) and not isinstance(value, type):
        inside = {f.name: _unfolded(getattr(value, f.name), f"{place}/{f.name}", arrays) for f in fields(value)}
        return {"record": type(value).__name__, "fields": inside}
    if isinstance(value, Mapping):
        return {"mapping": {str(k): _unfolded(v, f"{place}/{k}", arrays) for k, v in value.items()}}
    if isinstance(value, (tuple, list)):
        return [_unfolded(v, f"{place}/{i}", arrays) for i, v in enumerate(value)]
    return value.item() if isinstance(value, np.generic) else value


def _folded(value: Any, arrays: Mapping[str, NDArray[Any]]) -> Any:
    if isinstance(value, list):
        return tuple(_folded(v, arrays) for v in value)
    if not isinstance(value, dict):
        return value
    if "array" in value:
        return arrays[value["array"]]
    if "mapping" in value:
        return {k: _folded(v, arrays) for k, v in value["mapping"].items()}
    kind = getattr(records, value["record"])
    return kind(**{k: _folded(v, arrays) for k, v in value["fields"].items()})


def file_sha256(path: Place) -> str:
    digest = hashlib.sha256()
    with Path(path).open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def content_hash(*parts: Any) -> str:
    """sha256 of numbers, strings, bytes, arrays, records, mappings (in any order) and sequences of them.

    Every part goes in with its type and length, so that ("ab", "c") and ("a", "bc") differ.
    """
    digest = hashlib.sha256()
    for part in parts:
        _feed(digest.update, part)
    return digest.hexdigest()


def _feed(update: Callable[[bytes], None], value: Any) -> None:
    if isinstance(value, np.ndarray):
        _feed_bytes(update, f"array {value.dtype.str} {value.shape}", np.ascontiguousarray(value).tobytes())
    elif is_dataclass(value) and not isinstance(value, type):
        _feed(update, (type(value).__name__, {f.name: getattr(value, f.name) for f in fields(value)}))
    elif isinstance(value, Mapping):
        update(f"mapping {len(value)};".encode())
        for key in sorted(value, key=repr):
            _feed(update, key)
            _feed(update, value[key])
    elif isinstance(value, (tuple, list)):
        update(f"sequence {len(value)};".encode())
        for item in value:
            _feed(update, item)
    elif isinstance(value, bytes):
        _feed_bytes(update, "bytes", value)
    elif value is None or isinstance(value, (str, bool, int, float, np.generic)):
        plain = value.item() if isinstance(value, np.generic) else value
        _feed_bytes(update, type(plain).__name__, repr(plain).encode())
    else:
        raise TypeError(f"{type(value).__name__} has no content to hash")


def _feed_bytes(update: Callable[[bytes], None], kind: str, data: bytes) -> None:
    update(f"{kind} {len(data)};".encode())
    update(data)
