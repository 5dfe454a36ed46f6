"""Files of numpy arrays from elsewhere in, arrays out: a header is judged before anything of its size is allocated.

Numbers only, nothing is unpickled. Whatever is wrong with a file is a ValueError that continues "the file ...".
Source of the format: numpy.lib.format, versions 1.0 and 2.0 (3.0 is for structured arrays).
"""

from __future__ import annotations

import io
import math
import warnings
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from ..errors import CompressorError

Array = NDArray[Any]

_MAGIC = b"\x93NUMPY"
_LENGTH_BYTES = {(1, 0): 2, (2, 0): 4}
_MOST_HEADER_BYTES = 10_000  # numpy's own limit for headers it can't trust
_NUMBERS = "biuf"


def read_npy(file: IO[bytes], *, most_bytes: int) -> Array:
    """The array of an open .npy file."""
    with _explained():
        size_bytes = file.seek(0, io.SEEK_END)
        file.seek(0)
        return _read_array(file, size_bytes, most_bytes)


def read_npz(file: IO[bytes], choose: Callable[[Sequence[str]], Sequence[str]], *, most_bytes: int) -> dict[str, Array]:
    """The arrays of an open .npz file that `choose` picks from its names, together of at most that size."""
    arrays: dict[str, Array] = {}
    with _explained(), zipfile.ZipFile(file) as archive:
        members = {member.filename.removesuffix(".npy"): member for member in archive.infolist()}
        for name in choose(list(members)):
            with archive.open(members[name]) as data:
                arrays[name] = _read_array(data, members[name].file_size, most_bytes)
            most_bytes -= arrays[name].nbytes
    return arrays


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
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"is damaged or no numpy file ({reason[:200]})") from error


def _read_array(data: IO[bytes], size_bytes: int, most_bytes: int) -> Array:
    shape, by_columns, dtype = _header(data)
    if dtype.kind not in _NUMBERS:
        raise ValueError(f"holds values of type {str(dtype)[:60]}, expected numbers")
    if any(type(length) is not int or length < 0 for length in shape) or len(shape) > 8:
        raise ValueError("has a shape that no array of images or outputs has")
    count, there_bytes = math.prod(shape), size_bytes - data.tell()
    if count * dtype.itemsize > most_bytes:
        raise ValueError(f"declares {count * dtype.itemsize} bytes of numbers, at most {most_bytes} are read at once")
    if count * dtype.itemsize > there_bytes:
        raise ValueError(f"is truncated: it declares {count * dtype.itemsize} bytes of numbers and holds {there_bytes}")
    flat = np.empty(count, dtype)
    if count:
        _fill(flat.data.cast("B"), data)
    return flat.reshape(shape, order="F" if by_columns else "C")


def _header(data: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """Shape, whether the first axis runs fastest, and type, from the open file's start."""
    start = data.read(len(_MAGIC) + 2)
    version = tuple(start[len(_MAGIC) :])
    if not start.startswith(_MAGIC) or version not in _LENGTH_BYTES:
        raise ValueError("is no numpy file of version 1 or 2")
    length = data.read(_LENGTH_BYTES[version])
    header_bytes = int.from_bytes(length, "little")
    if header_bytes > _MOST_HEADER_BYTES:
        raise ValueError(f"has a header of {header_bytes} bytes, at most {_MOST_HEADER_BYTES} are read")
    header = io.BytesIO(length + data.read(header_bytes))
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # headers as Python 2 wrote them
            shape, by_columns, dtype = read(header)
    except Exception as error:
        raise ValueError("has a header that can't be read") from error
    return shape, by_columns, dtype


def _fill(view: memoryview, data: IO[bytes]) -> None:
    filled = 0
    while filled < len(view):
        taken = data.readinto(view[filled:])  # type: ignore[attr-defined]
        if not taken:
            raise ValueError(f"ends after {filled} of {len(view)} bytes of numbers")
        filled += taken
