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
_END_S = 5.0
_MOST_LINE = 1 << 24
_MOST_CHATTER = 1 << 16  # bytes that a login shell's own files may print first
_NO_PYTHON = {126: "can't run", 127: "has no"}  # what a shell's exit code says of a program
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

_REFUSALS = {  # by the agent's own word for what is wrong
    "full": "its disk is full ({message}); free space there and run the same command again",
    "disk": "{message}; mend that there, or name another path: user@host:path",
    "locked": "{message}; wait until that ends, then run the same command again",
}
_AGAIN = "run the same command again, it goes on from there"

Answer = dict[str, Any]
Opened = Callable[["subprocess.Popen[bytes]"], None]


def ssh_command(device: Device, words: str, *options: str) -> list[str]:
    """What runs `words`, a shell's line, on the device."""
    return [*ssh_program(device, *options), "-T", "--", device.login, words]


def ssh_program(device: Device, *options: str) -> list[str]:
    """ssh with its options, to be followed by whom to connect to."""
    if shutil.which("ssh") is None:
        raise MissingPackageError("there is no ssh here; install OpenSSH's client (Debian: openssh-client)")
    words = ["ssh"]
    if device.settings:
        words += ["-F", device.settings]
    for option in (*_OPTIONS, *options):
        words += ["-o", option]
    return words


def pipe(stream: IO[bytes] | None) -> IO[bytes]:
    """A stream of a process that was started with pipes, where it is never None."""
    assert stream is not None
    return stream


def said_lines(text: str) -> list[str]:
    """The lines of what a program printed, without empty ones."""
    lines = (line.strip() for line in text.splitlines())
    return list(filter(None, lines))


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
        request = {"do": do, **facts}
        if payload is not None:  # of no bytes, too: an empty file is a file
            request["bytes"] = len(payload)
        content = payload or b""
        with self._within(timeout_s):
            self._send(json.dumps(request).encode() + b"\n" + content)
            self.sent_bytes += len(content)
            answer = self._answer()
        if "refused" in answer:
            raise self._refusal(str(answer["refused"]), printable(str(answer.get("message", "")))[:500])
        return answer

    def _send(self, content: bytes) -> None:
        requests = pipe(self.process.stdin)
        try:
            requests.write(content)
            requests.flush()
        except OSError as error:
            raise self._death() from error

    @property
    def sharing(self) -> tuple[str, ...]:
        """Options by which another ssh to this device goes through this connection."""
        return _sharing(self.folder, "no")

    def _answer(self) -> Answer:
        answers = pipe(self.process.stdout)
        line = answers.readline(_MOST_LINE)
        if not line.endswith(b"\n"):
            raise self._death()
        with self.understood():
            answer = json.loads(line)
            size = int(answer.pop("bytes"))
        if not 0 <= size <= _MOST_LINE:
            raise self._death()
        payload = answers.read(size)
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
            return HostError(f"{self.device.name}: {self.killed[0]}; {_AGAIN}")
        code = _exit_code(self.process, CONNECT_S)
        self.noise.seek(0)
        lines = said_lines(self.noise.read()[-_MOST_CHATTER:])
        last = printable(lines[-1])[:300] if lines else f"ssh ended with code {code}"
        if code in _NO_PYTHON:
            return HostError(
                f"{self.device.name} {_NO_PYTHON[code]} {self.device.python} ({last}); install Python "
                f'{_version(OLDEST_PYTHON)} or later there, or name it: --python, or python = "..." in the inventory'
            )
        said = " ".join(lines).lower()
        remedy = next((hint for words, hint in _REMEDIES.items() if words in said), _AGAIN)
        return HostError(f"{self.device.name}: the connection ended: {last}; {remedy.format(login=self.device.login)}")

    def _refusal(self, kind: str, message: str) -> CompressorError:
        sentence = _REFUSALS.get(kind, "{message}").format(message=message)
        return HostError(f"{self.device.name}: {sentence}")


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
    text = Path(agent.__file__).read_bytes()
    with session._within(_GREETING_S):
        version = _greeting(session, token)
        if version < OLDEST_PYTHON:
            raise HostError(
                f"{session.device.name}: {session.device.python} there is Python {_version(version)}, and "
                f"{_version(OLDEST_PYTHON)} or later is needed; install it, or name another: --python, or "
                'python = "..." in the inventory'
            )
        session._send(f"{len(text)}\n".encode() + text)
        session._answer()


def _greeting(session: Session, token: str) -> tuple[int, ...]:
    """The version of Python there, on the line that begins with the token; what stands before it is a shell's."""
    answers = pipe(session.process.stdout)
    read_bytes = 0
    while read_bytes < _MOST_CHATTER:
        line = answers.readline(_MOST_CHATTER)
        if not line:
            raise session._death()
        word, _, version = line.decode(errors="replace").strip().rpartition(" ")
        if word.endswith(token):
            session.greets = read_bytes > 0 or word != token
            return tuple(int(number) for number in version.split("."))
        read_bytes += len(line)
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
    for stream in (process.stdin, process.stdout):
        with contextlib.suppress(OSError):
            pipe(stream).close()
    _exit_code(process, _END_S)


def _exit_code(process: subprocess.Popen[bytes], timeout_s: float) -> int:
    """How it ends by itself within that time, or by being killed."""
    try:
        return process.wait(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        process.kill()
        return process.wait()


def facts_of(answer: Mapping[str, Any]) -> dict[str, Any]:
    """What an answer says, without the bytes beside it."""
    return {key: value for key, value in answer.items() if key != "payload"}
