"""Devices that are folders here, reached by a stand-in for ssh."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from compressor.hosts.address import Device, read_address

FAKE = Path(__file__).parents[1] / "fake_ssh.py"


@dataclass(frozen=True)
class Hosts:
    """Each host is a folder; `fault` is what its next connection suffers."""

    folder: Path

    def add(self, name: str, root: str = "") -> Device:
        """A device whose Python is this one."""
        (self.folder / name).mkdir(exist_ok=True)
        return read_address(f"user@{name}" + (f":{root}" if root else ""), python=sys.executable)

    def fault(self, name: str, words: str) -> None:
        (self.folder / name / "fault").write_text(words)

    def mend(self, name: str) -> None:
        (self.folder / name / "fault").unlink(missing_ok=True)

    def root(self, device: Device) -> Path:
        return self.folder / device.login.rpartition("@")[2] / device.root

    def current(self, device: Device) -> str:
        link = self.root(device) / "current"
        return os.path.basename(os.readlink(link)) if link.is_symlink() else ""


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosts]:
    """No rsync: what it does is tested apart."""
    place = tmp_path_factory.mktemp("fake")
    (place / "bin").mkdir()
    (place / "hosts").mkdir()
    program = place / "bin" / "ssh"
    # not as the script's own interpreter, whose path may hold no space
    program.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} {shlex.quote(str(FAKE))} "$@"\n')
    program.chmod(0o755)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", f"{place / 'bin'}{os.pathsep}{os.environ['PATH']}")
        patch.setenv("FAKE_HOSTS", str(place / "hosts"))
        patch.delenv("COMPRESSOR_DEVICES", raising=False)
        yield Hosts(place / "hosts")


@pytest.fixture
def without_rsync(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine that lacks it."""
    which = shutil.which
    monkeypatch.setattr(shutil, "which", lambda name, *more: None if name == "rsync" else which(name, *more))
