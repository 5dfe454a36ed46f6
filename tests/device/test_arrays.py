"""Numpy files with limits: what numpy writes comes back bit for bit, and a header is judged before memory is taken."""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
import pytest
from numpy.typing import NDArray

from compressor.device.arrays import read_npy, read_npz
from compressor.errors import DataError, first_line

from .tampering import archive, archive_of, npy

ROOM = 1 << 16  # bytes, more than any array here has


def every(names: Sequence[str]) -> Sequence[str]:
    return names


def saved(array: NDArray[np.generic]) -> io.BytesIO:
    file = io.BytesIO()
    np.save(file, array)
    return file


@pytest.mark.parametrize("dtype", ["bool", "uint8", "int16", "<i8", ">i4", "float16", "<f4", ">f8"])
@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 3, 4), (1, 2, 1, 2, 1, 2, 1, 2)])
def test_what_numpy_wrote_is_read_bit_for_bit(dtype: str, shape: tuple[int, ...]) -> None:
    numbers = np.random.default_rng(0).integers(0, 2, shape)
    array = np.asarray(numbers).astype(dtype)
    back = read_npy(saved(array), most_bytes=ROOM)
    assert back.dtype == array.dtype
    assert back.shape == array.shape
    np.testing.assert_array_equal(back, array)


def test_an_array_stored_by_columns_keeps_its_places() -> None:
    array = np.asfortranarray(np.arange(24, dtype=np.float32).reshape(2, 3, 4))
    back = read_npy(saved(array), most_bytes=ROOM)
    np.testing.assert_array_equal(back, array)
    assert back.flags.f_contiguous


def test_a_header_of_version_2_is_read() -> None:
    file = io.BytesIO()
    np.lib.format.write_array(file, np.arange(5), version=(2, 0))
    np.testing.assert_array_equal(read_npy(file, most_bytes=ROOM), np.arange(5))


def test_what_was_read_can_be_written_to() -> None:
    back = read_npy(saved(np.zeros(3)), most_bytes=ROOM)
    back[1] = 1.0
    assert back.tolist() == [0, 1, 0]


def test_the_limit_is_of_numbers_and_counts_to_the_byte() -> None:
    file = saved(np.zeros(6, np.float32))  # 24 bytes
    assert read_npy(file, most_bytes=24).size == 6
    with pytest.raises(ValueError, match="declares 24 bytes of numbers, at most 23"):
        read_npy(file, most_bytes=23)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "is no numpy file of version 1 or 2"),
        (b"PK\x03\x04 an archive", "is no numpy file of version 1 or 2"),
        (npy("(2,)", version=3, data=b"\0" * 8), "is no numpy file of version 1 or 2"),
        (npy("(4,)", data=b"\0" * 12), "is truncated: it declares 16 bytes of numbers and holds 12"),
        (npy("(99999999999,)"), "declares 399999999996 bytes"),
        (npy("(-1,)", data=b"\0" * 8), "a shape that no array of images"),
        (npy("(True, 2)", data=b"\0" * 8), "a shape that no array of images"),
        (npy(str((1,) * 9), data=b"\0" * 8), "a shape that no array of images"),
        (npy("(1,)", descr="'|O'", data=b"\0" * 8), "expected numbers"),
        (npy("(1,)", descr="'<U4'", data=b"\0" * 16), "holds values of type <U4, expected numbers"),
        (npy("(1,)", descr="'<c8'", data=b"\0" * 8), "expected numbers"),
        (npy("(1", data=b"\0" * 8), "has a header that can't be read"),
        (b"\x93NUMPY\x02\x00" + (10_001).to_bytes(4, "little"), "has a header of 10001 bytes"),
    ],
)
def test_what_is_no_array_of_numbers_is_refused_in_words(content: bytes, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        read_npy(io.BytesIO(content), most_bytes=ROOM)


def test_chosen_arrays_of_an_archive_come_back_and_no_other() -> None:
    content = archive(first=np.arange(3), second=np.ones((2, 2), np.float32), third=np.zeros(1))
    names: list[str] = []

    def choose(listed: Sequence[str]) -> Sequence[str]:
        names.extend(listed)
        return ["second", "first"]

    arrays = read_npz(io.BytesIO(content), choose, most_bytes=ROOM)
    assert names == ["first", "second", "third"]
    assert list(arrays) == ["second", "first"]
    np.testing.assert_array_equal(arrays["first"], np.arange(3))


def test_the_arrays_of_an_archive_share_one_limit() -> None:
    content = archive(first=np.zeros(4, np.uint8), second=np.zeros(4, np.uint8))
    assert len(read_npz(io.BytesIO(content), every, most_bytes=8)) == 2
    with pytest.raises(ValueError, match="declares 4 bytes of numbers, at most 3"):
        read_npz(io.BytesIO(content), every, most_bytes=7)


def test_a_member_that_unpacks_to_less_than_it_declares_is_truncated() -> None:
    content = archive_of({"first": npy("(100,)", data=b"\0" * 8)})
    with pytest.raises(ValueError, match="is truncated: it declares 400 bytes of numbers and holds 8"):
        read_npz(io.BytesIO(content), every, most_bytes=ROOM)


@pytest.mark.parametrize("content", [b"", b"no archive at all", archive(first=np.zeros(9))[:-9]])
def test_a_damaged_archive_is_one_kind_of_error(content: bytes) -> None:
    with pytest.raises(ValueError, match="is damaged or no numpy file"):
        read_npz(io.BytesIO(content), every, most_bytes=ROOM)


def test_a_flipped_bit_in_an_archive_is_noticed() -> None:
    content = bytearray(archive(first=np.arange(100)))
    content[len(content) // 2] ^= 1  # in the numbers, whose checksum the archive holds
    with pytest.raises(ValueError, match="is damaged or no numpy file"):
        read_npz(io.BytesIO(bytes(content)), every, most_bytes=ROOM)


def test_our_own_errors_pass_through_the_choice() -> None:
    def refuse(names: Sequence[str]) -> Sequence[str]:
        raise DataError(f"{names[0]} is not wanted")

    with pytest.raises(DataError, match="first is not wanted"):
        read_npz(io.BytesIO(archive(first=np.zeros(1))), refuse, most_bytes=ROOM)


def test_memory_that_is_not_there_is_said_without_a_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_memory(*_: object) -> None:
        raise MemoryError

    file = saved(np.zeros(3))
    monkeypatch.setattr(np, "empty", no_memory)
    with pytest.raises(ValueError, match="holds more than there is memory for"):
        read_npy(file, most_bytes=ROOM)


@pytest.mark.parametrize(
    ("error", "line"),
    [(ValueError("first\nsecond"), "first"), (KeyError(), "KeyError"), (OSError("x" * 500), "x" * 200)],
)
def test_a_reason_is_one_line(error: Exception, line: str) -> None:
    assert first_line(error) == line
