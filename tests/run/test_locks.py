"""One writer to a folder: refused while it writes, free as soon as it is gone, and no trace of one who only looks."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

import pytest

from compressor.errors import FolderError
from compressor.run import locks
from compressor.run.locks import LOCK, locked, require_unlocked


@pytest.fixture(autouse=True)
def _no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locks, "_PAUSE_S", 0.0)


def test_inside_nobody_else_writes_and_afterwards_everybody_may(tmp_path: Path) -> None:
    with locked(tmp_path):
        with pytest.raises(FolderError, match=f"is being written by process {os.getpid()} on"), locked(tmp_path):
            pass
        with pytest.raises(FolderError, match="wait until that run ends or stop it"):
            require_unlocked(tmp_path)
    require_unlocked(tmp_path)
    with locked(tmp_path):
        pass
    assert list(tmp_path.iterdir()) == []


def test_an_error_inside_gives_the_folder_back(tmp_path: Path) -> None:
    with pytest.raises(KeyError), locked(tmp_path):
        raise KeyError
    assert list(tmp_path.iterdir()) == []
    with locked(tmp_path):
        pass


def test_a_lock_file_that_nobody_holds_stops_nobody(tmp_path: Path) -> None:
    (tmp_path / LOCK).write_text("process 1 on a machine that is off")
    require_unlocked(tmp_path)
    assert (tmp_path / LOCK).exists()
    with locked(tmp_path):
        assert f"process {os.getpid()}" in (tmp_path / LOCK).read_text()


def test_who_looks_needs_no_file_and_leaves_none(tmp_path: Path) -> None:
    require_unlocked(tmp_path)
    require_unlocked(tmp_path / "no folder")
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_was_taken_away_meanwhile_is_not_the_lock(tmp_path: Path) -> None:
    """Two who open it at once: the first removes it when done, and the second must not lock what nobody finds."""
    path = tmp_path / LOCK
    handle = os.open(path, os.O_RDWR | os.O_CREAT)
    try:
        assert locks._lies_at(handle, path)
        path.unlink()
        assert not locks._lies_at(handle, path)
        path.write_text("another's")
        assert not locks._lies_at(handle, path)
    finally:
        os.close(handle)


def test_what_a_lock_file_says_is_shown_short_and_printable(tmp_path: Path) -> None:
    path = tmp_path / LOCK
    path.write_bytes(b"\x1b[2J" + b"x" * 10_000 + b"\xff\n")
    handle = os.open(path, os.O_RDWR)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        with pytest.raises(FolderError) as refused:
            require_unlocked(tmp_path)
    finally:
        os.close(handle)
    assert "\x1b" not in str(refused.value)
    assert len(str(refused.value)) < 600
    path.write_bytes(b"")
    assert "another process" in str(locks._refusal(path))


def test_a_file_system_without_locks_locks_nobody_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unsupported(handle: int, kind: int) -> None:
        raise OSError(95, "not supported")

    monkeypatch.setattr(locks.fcntl, "flock", unsupported)
    with locked(tmp_path):
        require_unlocked(tmp_path)
        assert (tmp_path / LOCK).is_file()
    monkeypatch.setattr(locks, "fcntl", None)
    with locked(tmp_path):
        require_unlocked(tmp_path)
        assert list(tmp_path.iterdir()) == []
