"""The files that an ONNX file takes weights from, read off its bytes: a runtime would open them, wherever they lie.

Walks protobuf's wire format over the messages that can hold a tensor, and allocates nothing of a size that the file
states. Source: onnx.proto3, protobuf's encoding; knows no runtime.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from pathlib import Path

from ..errors import ModelError
from . import fields
from .folders import reaches_out

# message -> field -> the message that the field holds; other fields hold no tensor
_MESSAGES = {
    "model": {7: "graph", 20: "training", 25: "function"},
    "training": {1: "graph", 2: "graph"},
    "function": {7: "node", 11: "attribute"},
    "graph": {1: "node", 5: "tensor", 15: "sparse tensor"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse tensor", 23: "sparse tensor"},
    "sparse tensor": {1: "tensor", 2: "tensor"},
    "tensor": {13: "entry"},
}
_KEY, _VALUE = 1, 2  # of an entry
_VARINT, _BYTES = 0, 2  # kinds of a field
_FIXED_BYTES = {1: 8, 5: 4}  # of the kinds whose length is fixed
_MOST_VARINT = 10  # bytes
_MOST_LOCATION = 1000  # bytes
ASIDE = ".data"  # ends the name of the file that holds another's weights
_Span = tuple[int, int]


def require_weights_beside(path: Path) -> None:
    """Raises ModelError where the ONNX file takes weights from elsewhere than its folder and what lies below that.

    ValueError for a file that is no ONNX, OSError for one that can't be read.
    """
    _weights_beside(path)


def _weights_beside(path: Path) -> tuple[str, ...]:
    """Their places in the file's folder; raises as `require_weights_beside`."""
    locations = external_locations(path)
    for location in locations:
        if reaches_out(location):
            raise ModelError(f"{path} takes weights from {fields.shown(location)}, outside its folder; don't use it")
    return locations


def aside_of(path: Path) -> Path:
    """Where this project puts the weights of an ONNX file at `path` that is larger than one message may be."""
    return path.with_name(path.name + ASIDE)


def files_of(path: Path) -> tuple[Path, ...]:
    """The model's file and, of an ONNX file, those that it takes weights from; of a damaged one itself alone.

    Raises ModelError where they lie outside its folder, OSError for a file that can't be read.
    """
    if path.suffix != ".onnx":
        return (path,)
    try:
        return (path, *(path.parent / location for location in _weights_beside(path)))
    except ValueError:
        return (path,)


def model_bytes(path: Path) -> int:
    """Of all its files."""
    return sum(file.stat().st_size for file in files_of(path))


def external_locations(path: Path) -> tuple[str, ...]:
    """What its tensors name as places of their values, each once; ValueError for a file that is no ONNX."""
    if path.stat().st_size == 0:  # nothing to map
        raise ValueError("it is empty")
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        return tuple(dict.fromkeys(_locations(data)))


def _locations(data: mmap.mmap) -> Iterator[str]:
    waiting: list[tuple[str, _Span]] = [("model", (0, len(data)))]
    while waiting:
        message, span = waiting.pop()
        if message == "entry":
            yield from _location(data, span)
            continue
        inner = _MESSAGES[message]
        waiting += [(inner[number], part) for number, part in _parts(data, span) if number in inner]


def _location(data: mmap.mmap, span: _Span) -> Iterator[str]:
    """The entry's value, if it is that of `location`."""
    texts = [(number, _start_of(data, part)) for number, part in _parts(data, span)]
    if (_KEY, b"location") not in texts:
        return
    for number, text in texts:
        if number == _VALUE:
            yield text.decode(errors="replace")


def _start_of(data: mmap.mmap, span: _Span) -> bytes:
    start, end = span
    return data[start : min(end, start + _MOST_LOCATION)]


def _parts(data: mmap.mmap, span: _Span) -> Iterator[tuple[int, _Span]]:
    """A message's fields that hold bytes: their numbers, and where the bytes lie."""
    place, end = span
    while place < end:
        key, place = _varint(data, place, end)
        number, kind = key >> 3, key & 7
        if kind == _BYTES:
            length, place = _varint(data, place, end)
            yield number, (place, place + length)
            place += length
        elif kind == _VARINT:
            _, place = _varint(data, place, end)
        elif kind in _FIXED_BYTES:
            place += _FIXED_BYTES[kind]
        else:
            raise ValueError(f"a field is of kind {fields.shown(kind)}, which ONNX has none of")
        if place > end:  # before the caller, who takes all parts at once, looks at any
            raise ValueError("a field is longer than what holds it")


def _varint(data: mmap.mmap, place: int, end: int) -> tuple[int, int]:
    """A number of seven bits a byte, lowest first, and where what follows it begins."""
    value = 0
    for index in range(_MOST_VARINT):
        if place + index >= end:
            raise ValueError("it ends within a number")
        byte = data[place + index]
        value |= (byte & 0x7F) << (7 * index)
        if byte < 0x80:
            return value, place + index + 1
    raise ValueError("a number has more than ten bytes")
