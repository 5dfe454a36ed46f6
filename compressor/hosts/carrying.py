"""The device side of this very version as one file, for devices that don't have it installed.

An archive of Python sources that `python FILE` and `PYTHONPATH` take; the same sources give the same bytes.
"""

from __future__ import annotations

import hashlib
import io
import zipfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from .. import __version__
from ..device import agent
from .connection import Session

_PACKAGE = Path(__file__).resolve().parents[1]
_MAIN = b"import sys\nfrom compressor.device.__main__ import main\nsys.exit(main())\n"
_EPOCH = (1980, 1, 1, 0, 0, 0)  # the earliest that an archive can say
_SLACK_S = 30.0  # by which the device gives up before we do


@dataclass(frozen=True, slots=True)
class DeviceSide:
    """The device side on a device: `place` is its folder there, empty where it is installed."""

    session: Session
    place: str

    def run(self, module: str, *arguments: str, timeout_s: float) -> tuple[int, str, str]:
        """Exit code, stdout and stderr of one of its modules; HostError when the device or the time ends first."""
        answer = self.session.ask(
            "run",
            timeout_s=timeout_s + _SLACK_S,
            module=module,
            arguments=arguments,
            place=self.place,
            most_s=timeout_s,
        )
        with self.session.understood():
            return int(answer["code"]), str(answer["out"]), str(answer["err"])


def carry(session: Session, installed: str) -> DeviceSide:
    """The device side there: what is installed, where its digest says that it is this version's, else ours, carried.

    What lies there is taken only while archive and sources have our sha256.
    """
    if installed == digest():
        return DeviceSide(session, "")
    content = archive()
    name = f"device-{__version__}-{hashlib.sha256(content).hexdigest()[:16]}.pyz"
    store(session, name, content)
    answer = session.ask("unpack", name=name, digest=digest())
    with session.understood():
        return DeviceSide(session, str(answer["folder"]))


def store(session: Session, name: str, content: bytes) -> str:
    """The path there of a file of our own, sent unless it lies there already."""
    sha256 = hashlib.sha256(content).hexdigest()
    answer = session.ask("store", name=name, sha256=sha256)
    if not answer.get("is_here"):
        answer = session.ask("store", content, name=name, sha256=sha256)
    with session.understood():
        return str(answer["path"])


@cache
def archive() -> bytes:
    """The package's device side as a zip file with a `__main__`."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as file:
        _add(file, "__main__.py", _MAIN)
        for name in agent.package_files(str(_PACKAGE)):
            _add(file, f"compressor/{name}", (_PACKAGE / name).read_bytes())
    return buffer.getvalue()


@cache
def digest() -> str:
    """Of this version's device side, as the agent finds it of an installed one."""
    return agent.package_digest(str(_PACKAGE))


def _add(file: zipfile.ZipFile, name: str, content: bytes) -> None:
    entry = zipfile.ZipInfo(name, _EPOCH)
    entry.compress_type = zipfile.ZIP_DEFLATED
    entry.external_attr = 0o644 << 16
    file.writestr(entry, content)
