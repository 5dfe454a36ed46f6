"""A bundle as one file: the same bytes for the same folder, and read back only where it is exactly such a file.

A plain POSIX tar (ustar), so that any tar lists it: manifest and listed files, then the signature where there is one,
sorted, each with one owner, mode and time. The reader takes a header only where it is the one that the writer would
have written for that name and size; so nothing but files can come out, each once and inside the folder. Weights
hardly compress, so nothing is compressed, and no archive can unpack to more than its own size.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import IO

from ..errors import CompressorError, FolderError, GateError, InputError
from . import fields
from .built import shipped_files
from .bundle import verify_files
from .destinations import replacing, require_destination
from .folders import reason_of
from .manifest import BUILT, MANIFEST, SIGNATURE, inside, read_bundle

SUFFIX = ".tar"
_BLOCK = 512
_END = bytes(2 * _BLOCK)
_PIECE_BYTES = 1 << 20
_MOST_FILES = 1000  # of a bundle; its files are few and large
_MOST_FILE_BYTES = (1 << 33) - 1  # eleven octal digits
_SPARE_BYTES = 1 << 24  # left free on the disk that is unpacked to
_MOST_BASE, _MOST_PREFIX = 100, 155  # bytes of a name
_KINDS = {
    b"1": "a hard link",
    b"2": "a symbolic link",
    b"3": "a device",
    b"4": "a device",
    b"5": "a folder",
    b"6": "a pipe",
    b"S": "a sparse file",
    b"L": "a long name",
    b"K": "a long link",
    b"x": "an extended header",
    b"g": "an extended header",
}
_REMEDY = "take an archive that `compressor pack` wrote, or unpack this one yourself and give the folder"
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZ": "bzip2", b"\xfd7": "xz", b"(\xb5": "zstd", b"PK": "zip"}


def pack_bundle(folder: Path | str, target: Path | None = None) -> Path:
    """Writes the whole, unchanged bundle as `target`, or as FOLDER.tar beside it, over an earlier archive.

    Engines that were built on this device stay here. Raises what `read_bundle` and `verify_files` raise, InputError
    for files that no archive can hold, FolderError where the disk is in the way.
    """
    folder = Path(folder)
    target = target or archive_of(folder)
    verify_files(folder, read_bundle(folder))
    _require_target(target, folder)
    names = sorted(shipped_files(folder))  # verified: what is listed, the manifest and the signature
    if len(names) > _MOST_FILES:
        raise InputError(f"{folder} holds {len(names)} files, an archive at most {_MOST_FILES}; ship the folder itself")

    with replacing(target) as scratch, scratch.open("wb") as archive:
        for name in names:
            _write_member(archive, name, folder / name)
        archive.write(_END)
    return target


def _require_target(target: Path, folder: Path) -> None:
    """FolderError or InputError where no verb would take an archive, or it would replace anything but one."""
    if target.is_dir():
        raise FolderError(f"{target} is a folder; name a file, such as {target / archive_of(folder).name}")
    if target.suffix != SUFFIX:
        raise InputError(f"{target} is no name of an archive; let it end with {SUFFIX}")
    require_destination("the archive", target, kept=[folder])
    if target.is_file() and target.stat().st_size:
        try:
            with target.open("rb") as file:
                _member(file.read(_BLOCK), target)
        except (CompressorError, OSError) as error:
            raise FolderError(f"{target} is there and no archive of a bundle; name another file") from error


def archive_of(folder: Path) -> Path:
    """Where a bundle's archive lies unless somebody says otherwise."""
    named = folder.resolve() if folder.name in ("", "..") else folder  # `.` has no name
    return named.with_name(named.name + SUFFIX)


def _write_member(archive: IO[bytes], name: str, path: Path) -> None:
    with path.open("rb") as file:
        size_bytes = os.fstat(file.fileno()).st_size
        archive.write(_header(name, size_bytes))
        shutil.copyfileobj(file, archive, _PIECE_BYTES)
        archive.write(bytes(-size_bytes % _BLOCK))


def _header(name: str, size_bytes: int) -> bytes:
    """The one header that a file of this name and size has; InputError where the format has no room for either.

    Source: POSIX.1-1988, ustar; numbers are octal, and the checksum counts its own eight bytes as spaces.
    """
    prefix, base = _split(name.encode())
    if size_bytes > _MOST_FILE_BYTES:
        raise InputError(f"{fields.shown(name)} is longer than {_MOST_FILE_BYTES} bytes, which no archive can hold")
    before = base.ljust(100, b"\0") + b"0000644\0" + 2 * b"0000000\0" + b"%011o\0" % size_bytes + b"%011o\0" % 0
    behind = b"0" + bytes(100) + b"ustar\00000".ljust(88, b"\0") + prefix.ljust(167, b"\0")
    checksum = sum(before) + 8 * ord(" ") + sum(behind)
    return before + b"%06o\0 " % checksum + behind


def _split(name: bytes) -> tuple[bytes, bytes]:
    """The name in the format's two parts, of at most 155 and 100 bytes, the first one empty where it can be."""
    if len(name) <= _MOST_BASE:
        return b"", name
    place = name.find(b"/", len(name) - _MOST_BASE - 1)  # the first that leaves at most a hundred bytes behind it
    if not 0 < place <= _MOST_PREFIX or place == len(name) - 1:
        raise InputError(f"{fields.shown(name.decode())} is too long a name for an archive")
    return name[:place], name[place + 1 :]


def unpack_bundle(archive: Path | str, folder: Path | None = None) -> Path:
    """The bundle in an archive as `folder`, or as ARCHIVE without its suffix; written whole or not at all.

    A folder that holds this very bundle already stays as it is, with the engines that were built in it. Raises
    GateError for an archive that is damaged or none that `pack_bundle` writes, FolderError where the folder holds
    anything else or the disk is in the way.
    """
    archive = Path(archive)
    folder = folder or _folder_of(archive)
    with _beside(folder) as scratch:
        unpacked = _unpack(archive, scratch / folder.name)
        if _is_same(unpacked, folder):
            verify_files(folder, read_bundle(folder))  # it may have been changed since
            return folder
        if folder.exists():
            raise FolderError(f"{folder} is there already and is not the bundle of {archive}; name another folder")
        try:
            os.replace(unpacked, folder)
        except OSError as error:
            raise FolderError(f"can't write {folder}: {reason_of(error)}") from error
    return folder


@contextmanager
def _beside(folder: Path) -> Iterator[Path]:
    """A folder next to the one that is to be made, as long as the block lasts; FolderError where there can be none."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        scratch = tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}.")
    except OSError as error:
        raise FolderError(f"can't write {folder}: {reason_of(error)}; name another place with --out") from error
    try:
        yield Path(scratch)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


@contextmanager
def as_folder(bundle: Path, *, keep: bool = False) -> Iterator[Path]:
    """The bundle as a folder: its own, or its archive's, unpacked for as long as the block lasts.

    With `keep` it is unpacked beside the archive and stays.
    """
    if not bundle.is_file():
        yield bundle
    elif keep:
        yield unpack_bundle(bundle)
    else:
        with tempfile.TemporaryDirectory(prefix="compressor-") as scratch:
            yield _unpack(bundle, Path(scratch) / _folder_of(bundle).name)


def _folder_of(archive: Path) -> Path:
    if archive.suffix != SUFFIX:
        raise InputError(f"{archive} is no bundle: neither a folder with a {MANIFEST} nor an archive called *{SUFFIX}")
    if archive.stem.strip(".") == "":  # `..tar` would be unpacked to `.`
        raise InputError(f"{archive} has a name that no folder can have; rename it")
    return archive.with_suffix("")


def _is_same(unpacked: Path, folder: Path) -> bool:
    """Whether manifests and signatures are the same bytes."""
    names = (MANIFEST, SIGNATURE)
    return all(_content(unpacked / name) == _content(folder / name) for name in names)


def _content(path: Path) -> bytes:
    """Nothing of a file that is not there."""
    return path.read_bytes() if path.is_file() else b""


def _unpack(archive: Path, folder: Path) -> Path:
    """The archive's files in a folder that is not there yet, each as the manifest says, or GateError."""
    folder.mkdir()
    try:
        with archive.open("rb") as file:
            _require_room(archive, folder)
            _extract(file, archive, folder)
    except (FileExistsError, NotADirectoryError) as error:  # into an empty folder: the archive's own doing
        raise GateError(f"{archive} holds a file in the place of a folder; {_REMEDY}") from error
    except OSError as error:
        raise FolderError(f"can't unpack {archive}: {reason_of(error)}") from error
    try:
        verify_files(folder, read_bundle(folder))
    except (GateError, InputError) as error:  # where it was unpacked to is gone when this is read
        reason = str(error).replace(f"{folder}{os.sep}", "").replace(str(folder), "it")
        raise GateError(f"{archive} holds no whole bundle: {reason}") from error
    return folder


def _require_room(archive: Path, folder: Path) -> None:
    needed_bytes, free_bytes = archive.stat().st_size + _SPARE_BYTES, shutil.disk_usage(folder).free
    if needed_bytes > free_bytes:
        raise FolderError(
            f"unpacking {archive} takes {needed_bytes} bytes and {folder.parent} has {free_bytes}; free some, or set "
            "TMPDIR to a folder of another disk"
        )


def _extract(file: IO[bytes], archive: Path, folder: Path) -> None:
    """Every member in its place; GateError for the first that the writer would not have written there."""
    last = ""
    headers = iter(partial(file.read, _BLOCK), _END[:_BLOCK])
    for count, header in enumerate(headers, 1):
        name, size_bytes = _member(header, archive)
        if count > _MOST_FILES:
            raise GateError(f"{archive} holds more than {_MOST_FILES} files; no bundle does")
        if name <= last:
            raise GateError(f"{archive} holds {fields.shown(name)} twice, or out of order; {_REMEDY}")
        _extract_one(file, folder / name, size_bytes, archive)
        last = name
    if file.read(_BLOCK + 1) != _END[_BLOCK:]:
        raise GateError(f"{archive} goes on behind its end, or has none; {_REMEDY}")


def _member(header: bytes, archive: Path) -> tuple[str, int]:
    """Name and size of the file behind a header, if it is the header that the writer makes of them."""
    try:
        prefix, base = _text(header[345:500]), _text(header[:100])
        name = b"/".join(filter(None, (prefix, base))).decode()
        size_bytes = int(_text(header[124:136]), 8)
        is_ours = size_bytes >= 0 and _header(name, size_bytes) == header
    except (ValueError, InputError):
        is_ours = False
    if not is_ours:
        raise GateError(f"{archive} {_fault(header)}; {_REMEDY}")
    path = inside(name)
    if str(path) != name or path.parts[0] == BUILT:  # engines are built where they run, no archive brings one
        raise GateError(f"{archive} holds {fields.shown(name)}, which is no path of a bundle's file; {_REMEDY}")
    return name, size_bytes


def _text(part: bytes) -> bytes:
    """A header's field without the zeros behind it."""
    return part.split(b"\0", 1)[0]


def _fault(header: bytes) -> str:
    """What is wrong with a header that is not ours."""
    if header[257:262] == b"ustar":
        kind = _KINDS.get(header[156:157], "no file as the writer of bundles has them")
        return f"holds {fields.shown(_text(header[:100]).decode(errors='replace'))}, which is {kind}"
    for magic, compression in _COMPRESSED.items():
        if header.startswith(magic):
            return f"is compressed ({compression})"
    if len(header) < _BLOCK:
        return "is cut off"
    return "is damaged, or no tar archive"


def _extract_one(file: IO[bytes], target: Path, size_bytes: int, archive: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    left_bytes = size_bytes
    with target.open("xb") as out:  # never over another file
        while left_bytes:
            piece = file.read(min(left_bytes, _PIECE_BYTES))
            if not piece:
                raise GateError(f"{archive} is cut off in {fields.shown(target.name)}; get it again")
            out.write(piece)
            left_bytes -= len(piece)
    padding = file.read(-size_bytes % _BLOCK)
    if padding != bytes(-size_bytes % _BLOCK):
        raise GateError(f"{archive} is cut off or damaged behind {fields.shown(target.name)}; get it again")
