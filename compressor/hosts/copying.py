"""Files of a folder onto a device, by rsync where both have it, else by pieces; a copy that was cut off goes on.

What lies there with the right sha256 is left alone. What was copied is proven with a number drawn for it: a device
can't answer for bytes that it does not have.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import secrets
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from ..device.fields import printable
from ..errors import GateError, HostError
from .connection import Session, pipe, said_lines, ssh_program

Progress = Callable[[float], None]  # the share that is there
_PIECE_BYTES = 1 << 20
_BLOCK_BYTES = 1 << 20
_SHARE = re.compile(r"(\d+)%")
_RSYNC_TIMEOUT_S = 60  # without a byte
_FULL = ("No space left on device", "File too large", "Disk quota")  # in rsync's words


@dataclass(frozen=True, slots=True)
class File:
    """A file of a folder: its length and hash."""

    bytes: int
    sha256: str


Files = Mapping[str, File]  # by path in the folder


@dataclass(frozen=True, slots=True)
class CopyPlan:
    """What the files are called there as a whole, `who` copies, and whether the device has rsync."""

    release: str
    who: str
    rsync: bool


def read_files(folder: Path, names: list[str]) -> dict[str, File]:
    """Lengths and hashes of a folder's files."""
    return {name: File((folder / name).stat().st_size, sha256_of(folder / name)) for name in names}


def copy_files(session: Session, folder: Path, files: Files, plan: CopyPlan, progress: Progress) -> int:
    """Makes the files of a folder lie on the device as a release, and returns the bytes that were sent.

    Raises HostError when the link or the device ends (the same call goes on), its disk is full or another ships there;
    GateError where the device's files are not ours in the end.
    """
    wanted = {name: [file.bytes, file.sha256] for name, file in files.items()}
    answer = session.ask("begin", release=plan.release, files=wanted, who=plan.who)
    with session.understood():
        hashes, target = dict(answer["hashes"]), str(answer["folder"])
        here = {str(name): File(int(size), str(sha256)) for name, (size, sha256) in hashes.items()}
    missing = {name: file for name, file in files.items() if here.get(name) != file}
    if missing and _can_rsync(session, plan):
        _copy_by_rsync(session, folder, list(missing), target, progress)
        sent_bytes = sum(file.bytes for file in missing.values())
    else:
        sent_bytes = _copy_by_pieces(session, folder, missing, here, progress)
    prove_files(session, folder, files)
    session.ask("settle", release=plan.release)
    return sent_bytes


def _can_rsync(session: Session, plan: CopyPlan) -> bool:
    """Whether both sides have rsync and can talk: what a login shell prints is no protocol of rsync's own."""
    is_here = shutil.which("rsync") is not None
    return plan.rsync and is_here and not session.greets


def prove_files(session: Session, folder: Path, files: Files) -> None:
    """Raises GateError unless the device shows that it has every byte."""
    salt = secrets.token_bytes(32)
    answer = session.ask("prove", salt, names=list(files))
    with session.understood():
        proofs = dict(answer["proofs"])
    for name in files:
        if proofs.get(name) != sha256_of(folder / name, salt):
            raise GateError(
                f"{session.device.name} does not have {name} as it is here, whatever it says of its hash; "
                "its disk or the device itself is not to be trusted"
            )


def sha256_of(path: Path, before: bytes = b"", most: int = sys.maxsize) -> str:
    """Of `before` and the file, or of its first `most` bytes."""
    digest = hashlib.sha256(before)
    left = most
    with path.open("rb") as file:
        while block := file.read(min(_BLOCK_BYTES, left)):  # none at the file's end, and where nothing is left to read
            digest.update(block)
            left -= len(block)
    return digest.hexdigest()


def _copy_by_pieces(session: Session, folder: Path, missing: Files, here: Files, progress: Progress) -> int:
    """What lies there of a file is gone on with where it is the beginning of ours."""
    total = max(1, sum(file.bytes for file in missing.values()))
    done, sent = 0, 0
    for name, file in missing.items():
        offset = _offset(folder / name, file, here.get(name))
        done += offset
        for piece_bytes in _send(session, folder / name, name, offset):
            done, sent = done + piece_bytes, sent + piece_bytes
            progress(done / total)
    return sent


def _send(session: Session, path: Path, name: str, offset: int) -> Iterator[int]:
    """Sends what lies behind the offset, piece by piece; gives the bytes of each."""
    if offset == 0:
        session.ask("put", b"", name=name, offset=0)  # begins anew; of an empty file that is all
    with path.open("rb") as source:
        source.seek(offset)
        for piece in iter(lambda: source.read(_PIECE_BYTES), b""):
            session.ask("put", piece, name=name, offset=offset)
            offset += len(piece)
            yield len(piece)


def _offset(path: Path, file: File, here: File | None) -> int:
    """Where to go on: 0 where nothing, or something else, lies there."""
    if here is None or not 0 < here.bytes < file.bytes:
        return 0
    if sha256_of(path, most=here.bytes) != here.sha256:
        return 0
    return here.bytes


def _copy_by_rsync(session: Session, folder: Path, names: list[str], target: str, progress: Progress) -> None:
    device = session.device
    shell = shlex.join(ssh_program(device, *session.sharing))
    command = [
        *("rsync", "--recursive", "--checksum", "--inplace", "--partial", "--protect-args", "--info=progress2"),
        *(f"--timeout={_RSYNC_TIMEOUT_S}", "--from0", "--files-from=-", f"--rsh={shell}"),
        *("--", f"{folder.resolve()}/", f"{device.login}:{target}/"),
    ]
    with tempfile.TemporaryFile("w+", errors="replace") as noise:
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=noise)
        requests, answers = pipe(process.stdin), pipe(process.stdout)
        try:
            with contextlib.suppress(OSError):  # of an rsync that ended early, whose code and last words say why
                requests.write("\0".join(names).encode())
                requests.close()
                _report_shares(answers, progress)
            code = process.wait()
        finally:
            process.kill()  # nothing where it has ended
            process.wait()
            answers.close()
        if code:
            noise.seek(0)
            raise _rsync_error(session, noise.read(), code)


def _report_shares(answers: IO[bytes], progress: Progress) -> None:
    """Tells of each share, `45%`, that rsync prints until it ends."""
    while chunk := os.read(answers.fileno(), 1 << 12):
        shares = _SHARE.findall(chunk.decode(errors="replace"))
        if shares:
            progress(int(shares[-1]) / 100)


def _rsync_error(session: Session, said: str, code: int) -> HostError:
    name = session.device.name
    if any(words in said for words in _FULL):
        return HostError(f"{name}: its disk is full; free space there and run the same command again")
    lines = said_lines(said)
    from_rsync = [line for line in lines if "rsync" in line]  # not what a login shell says on its way
    first = next(iter(from_rsync or lines), f"rsync ended with code {code}")
    reason = printable(first)[:300]
    return HostError(f"{name}: the copy was cut off: {reason}; run the same command again, it goes on from there")
