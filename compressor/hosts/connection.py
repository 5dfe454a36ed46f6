"""A device in, a conversation with the agent that runs on it out: one ssh process, whose end is the agent's end too.

Passwords are nobody's to ask for here: what the user's keys, agent and configuration don't open stays closed. What a
device answers is data and held to limits; nothing that it says is run here.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shlex
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from ..device import agent
from ..device.fields import printable
from ..errors import CompressorError, HostError, MissingPackageError
from .address import Device

OLDEST_PYTHON = (3, 10)
CONNECT_S = 20.0
_GREETING_S = 60.0  # jump hosts, and a slow device's first Python
_ANSWER_S = 600.0
_MOST_LINE = 1 << 24
_MOST_CHATTER = 1 << 16  # bytes that a login shell's own files may print first
_OPTIONS = (
    *("BatchMode=yes", f"ConnectTimeout={CONNECT_S:.0f}", "ServerAliveInterval=5", "ServerAliveCountMax=3"),
    *("ClearAllForwardings=yes", "ForwardAgent=no"),  # of what a configuration may open, a device needs nothing
)
_BOOT = (
    "import sys;i=sys.stdin.buffer;"
    'print("{token} %d.%d"%sys.version_info[:2],flush=True);'
    "exec(i.read(int(i.readline())))"
)
_REMEDIES = {
    "identification has changed": "its host key is not the one that is known: if you know why, remove the old one "
    "(ssh-keygen -R, as ssh {login} says), else don't connect",
    "host key verification failed": "connect to it once by hand, and look at its key: ssh {login}",
    "permission denied": "ssh {login} must work without a password: a key in your agent, or in your configuration",
    "could not resolve": "is the name right? ssh {login} must find it",
    "connection refused": "is its SSH server running, on the port of your configuration?",
    "connection timed out": "is it on, and in this network?",
    "no route to host": "is it on, and in this network?",
    "can't open user config file": "name a configuration of ssh that is there, or leave it out",
}

Answer = dict[str, Any]
Opened = Callable[["subprocess.Popen[bytes]"], None]


def ssh_command(device: Device, words: str, *options: str) -> list[str]:
    """What runs `words`, a shell's line, on the device."""
    return [*ssh_program(device, *options), "-T", "--", device.login, words]


def ssh_program(device: Device, *options: str) -> list[str]:
    """ssh with its options, to be followed by whom to connect to."""
    if shutil.which("ssh") is None:
        raise MissingPackageError("there is no ssh here; install OpenSSH's client (Debian: openssh-client)")
    settings = ["-F", device.settings] if device.settings else []
    pairs = [word for option in (*_OPTIONS, *options) for word in ("-o", option)]
    return ["ssh", *settings, *pairs]


@dataclass
class Session:
    """A conversation with one device; whatever it asks is answered, or an error of our tree that names the device."""

    device: Device
    process: subprocess.Popen[bytes]
    noise: IO[str]
    folder: Path
    sent_bytes: int = 0
    greets: bool = False  # its login shell prints before anything else, also to a program
    killed: list[str] = field(default_factory=list)

    def ask(self, do: str, payload: bytes | None = None, *, timeout_s: float = _ANSWER_S, **facts: object) -> Answer:
        """The agent's answer, in whose `payload` the bytes lie that came with it.

        Raises HostError when the device refuses, dies or says nothing for longer than that.
        """
        request = {"do": do, **facts, **({} if payload is None else {"bytes": len(payload)})}
        assert self.process.stdin is not None
        with self._within(timeout_s):
            try:
                self.process.stdin.write(json.dumps(request).encode() + b"\n" + (payload or b""))
                self.process.stdin.flush()
            except OSError as error:
                raise self._death() from error
            self.sent_bytes += len(payload or b"")
            answer = self._answer()
        if "refused" in answer:
            raise self._refusal(str(answer["refused"]), printable(str(answer.get("message", "")))[:500])
        return answer

    @property
    def sharing(self) -> tuple[str, ...]:
        """Options by which another ssh to this device goes through this connection."""
        return _sharing(self.folder, "no")

    def _answer(self) -> Answer:
        assert self.process.stdout is not None
        line = self.process.stdout.readline(_MOST_LINE)
        if not line.endswith(b"\n"):
            raise self._death()
        with self.understood():
            answer = json.loads(line)
            size = int(answer.pop("bytes"))
        payload = self.process.stdout.read(size) if 0 < size <= _MOST_LINE else b""
        if len(payload) != size:
            raise self._death()
        return {**answer, "payload": payload}

    @contextlib.contextmanager
    def understood(self) -> Iterator[None]:
        """Inside, what an answer holds is read: HostError for what is not of the kind that was asked for."""
        try:
            yield
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise HostError(
                f"{self.device.name} answers with what is no answer of ours; is its login shell its own?"
            ) from error

    @contextlib.contextmanager
    def _within(self, timeout_s: float) -> Iterator[None]:
        def stop() -> None:
            self.killed.append(f"it said nothing for {timeout_s:.0f} s")
            self.process.kill()

        timer = threading.Timer(timeout_s, stop)
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()

    def _death(self) -> HostError:
        """Why the conversation ended, in ssh's own last words, with what can be done about it."""
        if self.killed:
            return HostError(f"{self.device.name}: {self.killed[0]}; run the same command again, it goes on from there")
        try:
            code = self.process.wait(timeout=CONNECT_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            code = self.process.wait()
        self.noise.seek(0)
        lines = [line.strip() for line in self.noise.read()[-_MOST_CHATTER:].splitlines() if line.strip()]
        last = printable(lines[-1])[:300] if lines else f"ssh ended with code {code}"
        if code in (126, 127):
            found = "can't run" if code == 126 else "has no"
            return HostError(
                f"{self.device.name} {found} {self.device.python} ({last}); install Python "
                f'{_version(OLDEST_PYTHON)} or later there, or name it: --python, or python = "..." in the inventory'
            )
        said = " ".join(lines).lower()
        hints = [hint.format(login=self.device.login) for words, hint in _REMEDIES.items() if words in said]
        remedy = hints[0] if hints else "run the same command again, it goes on from there"
        return HostError(f"{self.device.name}: the connection ended: {last}; {remedy}")

    def _refusal(self, kind: str, message: str) -> CompressorError:
        name = self.device.name
        if kind == "full":
            return HostError(f"{name}: its disk is full ({message}); free space there and run the same command again")
        if kind == "disk":
            return HostError(f"{name}: {message}; mend that there, or name another path: user@host:path")
        if kind == "locked":
            return HostError(f"{name}: {message}; wait until that ends, then run the same command again")
        return HostError(f"{name}: {message}")


@contextlib.contextmanager
def connected(device: Device, opened: Opened = lambda process: None) -> Iterator[Session]:
    """A session with the device's agent, which is gone when the context ends; `opened` is told of its process.

    Raises HostError where there is no way to it, or no Python that is new enough, with the remedy.
    """
    token = secrets.token_hex(8)
    boot = _BOOT.format(token=token)
    python = device.python.removeprefix("~/")  # the login shell begins in the home folder
    words = f"exec {shlex.quote(python)} -I -c {shlex.quote(boot)}"
    with _short_folder() as folder, tempfile.TemporaryFile("w+", errors="replace") as noise:
        process = subprocess.Popen(
            ssh_command(device, words, *_sharing(folder, "yes")),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=noise,
        )
        opened(process)
        session = Session(device, process, noise, folder)
        try:
            _greet(session, token)
            yield session
        finally:
            _end(process)


def _greet(session: Session, token: str) -> None:
    """Waits for the device's Python, and sends it the agent."""
    process = session.process
    assert process.stdin is not None
    assert process.stdout is not None
    text = Path(agent.__file__).read_bytes()
    with session._within(_GREETING_S):
        version = _greeting(session, token)
        if version < OLDEST_PYTHON:
            raise HostError(
                f"{session.device.name}: {session.device.python} there is Python {_version(version)}, and "
                f"{_version(OLDEST_PYTHON)} or later is needed; install it, or name another: --python, or "
                'python = "..." in the inventory'
            )
        try:
            process.stdin.write(f"{len(text)}\n".encode() + text)
            process.stdin.flush()
        except OSError as error:
            raise session._death() from error
        session._answer()


def _greeting(session: Session, token: str) -> tuple[int, ...]:
    """The version of Python there, on the line that begins with the token; what stands before it is a shell's."""
    assert session.process.stdout is not None
    read = 0
    while read < _MOST_CHATTER:
        line = session.process.stdout.readline(_MOST_CHATTER)
        if not line:
            raise session._death()
        session.greets = session.greets or read > 0
        read += len(line)
        word, _, version = line.decode(errors="replace").strip().rpartition(" ")
        if word.endswith(token):
            session.greets = session.greets or word != token
            return tuple(int(number) for number in version.split("."))
    raise HostError(
        f"{session.device.name}: its login shell prints without an end; see ssh {session.device.login} true"
    )


def _version(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))


def _sharing(folder: Path, role: str) -> tuple[str, ...]:
    """One connection for all, where the system's ssh can: the first is the others' master."""
    if os.name == "nt":
        return ()
    return (f"ControlMaster={role}", f"ControlPath={folder}/s", "ControlPersist=no")


@contextlib.contextmanager
def _short_folder() -> Iterator[Path]:
    """For the master's socket, whose path may have some hundred characters."""
    place = "/tmp" if os.path.isdir("/tmp") else None
    with tempfile.TemporaryDirectory(prefix="ship-", dir=place, ignore_cleanup_errors=True) as folder:
        yield Path(folder)


def _end(process: subprocess.Popen[bytes]) -> None:
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with contextlib.suppress(OSError):
                pipe.close()
    try:
        process.wait(timeout=5)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def facts_of(answer: Mapping[str, Any]) -> dict[str, Any]:
    """What an answer says, without the bytes beside it."""
    return {key: value for key, value in answer.items() if key != "payload"}
