"""An uncompressed tar in; its plain files by name, place and length out, from the headers alone.

Formats: ustar, GNU's long names and sizes, POSIX.1-2001's extended headers (`path`, `size`). What a header declares is
held to its checksum and to the file's end before anything of it is used. Nothing is unpacked; knows no images.
"""

from __future__ import annotations

import os
import posixpath
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from ..device.listings import shown
from ..errors import DataError

COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst", ".tar.lz4")
"""Endings of tars of which no member can be read by itself."""

_BLOCK = 512
_ZEROS = bytes(_BLOCK)
_CHECKSUM = slice(148, 156)
_ADLER_BASE = 65521
_MAGICS = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")  # gzip, bzip2, xz, zstd
_MOST_NAME_BYTES = 1 << 16  # of a long name, and of an extended header
_HAS_PREAD = hasattr(os, "pread")  # not on Windows
_MOST_DIGITS = 20  # of a length in bytes

_PLAIN = b"\0" + b"07"
_FOLDER, _VOLUME, _LONG_NAME, _LONG_LINK, _EXTENDED, _EXTENDED_FOR_ALL = b"5VLKxg"
_KINDS = {b"1": "a link", b"2": "a link", b"3": "a device", b"4": "a device", b"6": "a pipe", b"S": "a sparse file"}


@dataclass(frozen=True, slots=True)
class Member:
    """A plain file: `length` bytes from `offset` on."""

    name: str
    offset: int
    length: int


def compressed_error(path: str) -> DataError:
    """What to say of a tar that is compressed as a whole."""
    return DataError(
        f"{path!r} is compressed, and no sample of it can be read by itself; unpack it to a plain .tar (images hardly "
        "shrink)"
    )


def members(path: Path) -> Iterator[Member]:
    """The plain files of a tar, in their order; folders are passed over.

    Raises DataError, naming tar and member, for links and devices, names that lead outside, damaged headers, a file
    that ends before what is declared or without the mark of an archive's end.
    """
    try:
        with path.open("rb", buffering=0) as file:
            yield from _members(file, str(path))
    except OSError as error:
        raise DataError(f"{str(path)!r} can't be read ({error.strerror}); give a tar that can") from error


def _members(file: BinaryIO, path: str) -> Iterator[Member]:
    end = os.fstat(file.fileno()).st_size
    offset = 0
    long_name, declared = "", -1  # what a header in front says of the next one; -1: nothing
    while True:
        header = _header(file, offset, path)
        if header == _ZEROS:
            return _require_end(file, offset, end, path)
        kind = header[156]
        is_declared = declared >= 0 and kind in _PLAIN
        length = declared if is_declared else _number(header[124:136], offset, path)
        name = long_name or _name(header)
        start = offset + _BLOCK
        if start + length > end:
            raise DataError(
                f"{path!r} is cut off: {shown(name)} declares {length} bytes, and the file ends after "
                f"{max(0, end - start)} of them; copy it again"
            )

        if kind == _LONG_NAME:
            long_name = _text(_short_content(file, start, length, path))
        elif kind == _EXTENDED:
            fields = _extended(_short_content(file, start, length, path), offset, path)
            long_name = fields.get("path", long_name)
            declared = int(fields.get("size", "-1"))
        elif kind not in (_LONG_LINK, _EXTENDED_FOR_ALL):
            long_name, declared = "", -1
            is_folder = kind in (_FOLDER, _VOLUME) or name.endswith("/")  # so it was written before ustar
            if not is_folder:
                _require_plain(kind, name, path)
                yield Member(_inside(name, path), start, length)
        offset = start + -(-length // _BLOCK) * _BLOCK  # 700 bytes take two blocks


def _header(file: BinaryIO, offset: int, path: str) -> bytes:
    """The 512 bytes at `offset`, zeros at the archive's end; their checksum holds."""
    file.seek(offset)
    header = file.read(_BLOCK)
    if len(header) < _BLOCK:
        raise DataError(f"{path!r} ends after {offset + len(header)} bytes without a tar's end mark; copy it again")
    if header == _ZEROS:
        return header
    # the low half of Adler-32 is 1 + the sum of the bytes; the checksum's own eight count as spaces
    blanked = b"".join((header[:148], b" " * 8, header[156:]))
    if zlib.adler32(blanked) & 0xFFFF != (1 + _number(header[_CHECKSUM], offset, path)) % _ADLER_BASE:
        raise _damaged(offset, path, header)
    return header


def _damaged(offset: int, path: str, header: bytes) -> DataError:
    if offset == 0 and header.startswith(_MAGICS):
        return compressed_error(path)
    return DataError(f"{path!r} has no tar header at byte {offset}: it is damaged or no tar; write it again")


def _number(field: bytes, offset: int, path: str) -> int:
    """Octal digits, or where the first bit is set a whole number of that many bytes, as GNU writes large ones."""
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    digits = field.strip(b" \0") or b"0"
    if digits.strip(b"01234567"):
        raise _damaged(offset, path, digits)
    return int(digits, 8)


def _name(header: bytes) -> str:
    """ustar has up to 155 bytes of folders in a field of their own."""
    name = header[:100].partition(b"\0")[0]
    is_ustar = header[257:263] == b"ustar\0"
    prefix = header[345:500].partition(b"\0")[0] if is_ustar else b""
    if prefix:
        name = prefix + b"/" + name
    return _text(name)


def _text(content: bytes) -> str:
    return content.partition(b"\0")[0].decode("utf-8", "backslashreplace")


def _short_content(file: BinaryIO, start: int, length: int, path: str) -> bytes:
    if length > _MOST_NAME_BYTES:
        raise DataError(f"{path!r} has a name of {length} bytes at byte {start}; write it again")
    file.seek(start)
    return file.read(length)


def _extended(content: bytes, offset: int, path: str) -> dict[str, str]:
    """`30 path=some/name\\n` one behind the other, each led by its own length."""
    fields = {}
    position = 0
    while position < len(content):
        digits, _, _ = content[position : position + 20].partition(b" ")
        length = int(digits) if digits.isdigit() else 0
        record = content[position : position + length]
        key, equals, value = record[len(digits) + 1 :].partition(b"=")
        if not equals or not value.endswith(b"\n"):
            raise _damaged(offset, path, content)
        fields[_text(key)] = _text(value[:-1])
        position += len(record)
    if any(key.startswith("GNU.sparse") for key in fields):
        raise _refused("a sparse file", fields.get("path", ""), path)
    size = fields.get("size", "0")
    if not size.isdecimal() or len(size) > _MOST_DIGITS:
        raise _damaged(offset, path, content)
    return fields


def _require_plain(kind: int, name: str, path: str) -> None:
    if kind not in _PLAIN:
        raise _refused(_KINDS.get(bytes([kind]), f"of the kind {chr(kind)!r}"), name, path)


def _refused(what: str, name: str, path: str) -> DataError:
    return DataError(f"{path!r} holds {shown(name)}, which is {what}; write it of plain files alone")


def _inside(name: str, path: str) -> str:
    """The name without `./` in front."""
    plain = posixpath.normpath(name)
    if posixpath.isabs(plain) or plain.split("/")[0] == "..":
        raise DataError(f"{path!r} holds {shown(name)}, which leads outside; write it with names below one folder")
    return plain


def _require_end(file: BinaryIO, offset: int, end: int, path: str) -> None:
    """Behind the mark are zeros; two tars put together would be half read."""
    file.seek(offset)
    while block := file.read(1 << 20):
        if block.count(0) < len(block):
            raise DataError(f"{path!r} goes on behind its end mark at byte {offset}; keep tars that were joined apart")


class OpenFile:
    """A file that several threads read from, and that closes when nobody does any more."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))

    def __del__(self) -> None:
        if hasattr(self, "_descriptor"):
            os.close(self._descriptor)

    def content(self, offset: int, length: int) -> bytes:
        """So many bytes. Raises OSError where the file holds fewer."""
        if _HAS_PREAD:
            content = os.pread(self._descriptor, length, offset)
        else:
            with self.path.open("rb") as file:
                file.seek(offset)
                content = file.read(length)
        if len(content) < length:
            raise OSError(f"{self.path.name} ends {length - len(content)} bytes too early: it was changed since")
        return content
