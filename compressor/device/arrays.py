"""Files of numpy arrays from elsewhere in, arrays out: a header is judged before anything of its size is allocated.

Numbers only, nothing is unpickled. Whatever is wrong with a file is a ValueError that continues "the file ...".
Source of the format: numpy.lib.format, versions 1.0 and 2.0 (3.0 is for structured arrays).
"""

from __future__ import annotations

import io
import math
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import numpy as np

from ..errors import CompressorError, first_line
from .feeds import Array

_MAGIC = b"\x93NUMPY"
# by the format's version, how many bytes a header's length takes, and what reads that header
_VERSIONS = {
    (1, 0): (2, np.lib.format.read_array_header_1_0),
    (2, 0): (4, np.lib.format.read_array_header_2_0),
}
_MOST_HEADER_BYTES = 10_000  # numpy's own limit for headers it can't trust
_NUMBERS = "biuf"  # numpy's kinds: booleans, whole numbers with and without sign, floats
_MOST_AXES = 8


def read_npy(file: IO[bytes], *, most_bytes: int) -> Array:
    """The array of an open .npy file; ValueError for one of more than `most_bytes` of numbers, or none."""
    with _explained():
        size_bytes = file.seek(0, io.SEEK_END)
        file.seek(0)
        return _read_array(file, size_bytes, most_bytes)


def read_npz(file: IO[bytes], choose: Callable[[Sequence[str]], Sequence[str]], *, most_bytes: int) -> dict[str, Array]:
    """The arrays of an open .npz file that `choose` picks from its names, together of at most `most_bytes` of numbers.

    ValueError for a file that is damaged, too large or holds something else; what `choose` raises passes.
    """
    arrays: dict[str, Array] = {}
    left_bytes = most_bytes
    with _explained(), zipfile.ZipFile(file) as archive:
        members = {member.filename.removesuffix(".npy"): member for member in archive.infolist()}
        for name in choose(list(members)):
            with archive.open(members[name]) as data:
                arrays[name] = _read_array(data, members[name].file_size, left_bytes)
            left_bytes -= arrays[name].nbytes
    return arrays


def write_npz(path: Path, arrays: Mapping[str, Array]) -> None:
    """As np.savez has it, whatever the arrays are called: to that a name is a keyword, and some are its own."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name, array in arrays.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
                np.lib.format.write_array(file, np.asanyarray(array), allow_pickle=False)


@contextmanager
def _explained() -> Iterator[None]:
    """Archives and decompressors fail in many ways; a reader of ours needs one. Our own errors pass."""
    try:
        yield
    except (CompressorError, ValueError):
        raise
    except MemoryError:
        raise ValueError("holds more than there is memory for") from None
    except Exception as error:
        raise ValueError(f"is damaged or no numpy file ({first_line(error)})") from error


def _read_array(data: IO[bytes], size_bytes: int, most_bytes: int) -> Array:
    """The array in a .npy stream of `size_bytes`, header included; judged by its header, then allocated."""
    shape, by_columns, dtype = _header(data)
    if dtype.kind not in _NUMBERS:
        raise ValueError(f"holds values of type {str(dtype)[:60]}, expected numbers")
    if len(shape) > _MOST_AXES or not all(map(_is_length, shape)):
        raise ValueError("has a shape that no array of images or outputs has")

    count = math.prod(shape)
    declared_bytes = count * dtype.itemsize
    stored_bytes = size_bytes - data.tell()
    if declared_bytes > most_bytes:
        raise ValueError(f"declares {declared_bytes} bytes of numbers, at most {most_bytes} are read at once")
    if declared_bytes > stored_bytes:
        raise ValueError(f"is truncated: it declares {declared_bytes} bytes of numbers and holds {stored_bytes}")

    flat = np.empty(count, dtype)
    _fill(flat.view(np.uint8).data, data)
    return flat.reshape(shape, order="F" if by_columns else "C")


def _is_length(length: object) -> bool:
    return type(length) is int and length >= 0  # a bool is an int too, and no length


def _header(data: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[np.generic]]:
    """Shape, whether the first axis runs fastest, and type, from the open file's start."""
    start = data.read(len(_MAGIC) + 2)
    version = tuple(start[len(_MAGIC) :])
    if not start.startswith(_MAGIC) or version not in _VERSIONS:
        raise ValueError("is no numpy file of version 1 or 2")

    length_bytes, read_header = _VERSIONS[version]
    length = data.read(length_bytes)
    header_bytes = int.from_bytes(length, "little")
    if header_bytes > _MOST_HEADER_BYTES:
        raise ValueError(f"has a header of {header_bytes} bytes, at most {_MOST_HEADER_BYTES} are read")

    header = io.BytesIO(length + data.read(header_bytes))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # headers as Python 2 wrote them
            shape, by_columns, dtype = read_header(header)
    except Exception as error:
        raise ValueError("has a header that can't be read") from error
    return shape, by_columns, dtype


def _fill(view: memoryview, data: IO[bytes]) -> None:
    """Reads straight into the array's memory: a file of a gigabyte is not held twice."""
    filled_bytes = 0
    while filled_bytes < len(view):
        chunk_bytes = data.readinto(view[filled_bytes:])  # type: ignore[attr-defined]
        if not chunk_bytes:
            raise ValueError(f"ends after {filled_bytes} of {len(view)} bytes of numbers")
        filled_bytes += chunk_bytes
