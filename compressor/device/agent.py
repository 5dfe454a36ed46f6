"""What answers on a device while a bundle ships: surveys, hashes, a lock, files and programs, a JSON line a request.

Standard library alone and no other module of ours: it is sent as text to the Python that the device has. It ends when
its input does, and with it whatever it started and its lock. A line, of a request or of an answer, is followed by as
many bytes as its `bytes` says. Folders: ROOT/current -> releases/ID, ROOT/incoming/ID, ROOT/.shipping for what we need.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import importlib.util
import json
import os
import platform
import re
import select
import shutil
import signal
import socket
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping
from typing import Any

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

CURRENT, RELEASES, INCOMING, OURS, STATE = "current", "releases", "incoming", ".shipping", "state.json"
_IDLE_S = 900.0  # whoever says nothing for so long has gone, though the link stands
_BLOCK = 1 << 20
_MOST_SAID = 1 << 23  # bytes of a program's output
BESIDE = ("__init__.py", "errors.py", "records.py")
"""What the device side imports of the package beside itself."""
_VERBS = "survey state begin put prove settle store unpack fetch forget run switch note discard".split()
_NAME = re.compile(r"[^./][^/]*")  # of a release or of a file of ours: not hidden, nor of several steps
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_VERSIONS = """
import importlib, json, sys
sys.path[:] = [entry for entry in sys.path if entry]
said = {}
for name in sys.argv[1:]:
    try:
        said[name] = str(getattr(importlib.import_module(name), "__version__", "?"))
    except BaseException as error:
        said[name] = "error: " + (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
print("\\n" + json.dumps(said))
"""
_MODULE = """
import sys
sys.path[:] = [entry for entry in sys.path if entry]
sys.path[:0] = [{place!r}] * bool({place!r})
import runpy
runpy.run_module({module!r}, run_name="__main__", alter_sys=True)
"""

Answer = dict[str, Any]
Request = Mapping[str, Any]


class Refusal(Exception):
    """What was asked for can't be; `kind` tells whoever asked which of its errors that is."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


def module_command(module: str, place: str) -> list[str]:
    """What runs a module with nothing of the current folder on its path; `place` is the package's, if not installed."""
    return [sys.executable, "-c", _MODULE.format(module=module, place=place)]


def package_files(package: str) -> list[str]:
    """The files of a package that a device needs: its device side, and what that stands on."""
    names = [name for name in BESIDE if os.path.isfile(os.path.join(package, name))]
    for place, folders, files in os.walk(os.path.join(package, "device")):
        folders[:] = [name for name in folders if name != "__pycache__"]
        folder = os.path.relpath(place, package).replace(os.sep, "/")
        names += [f"{folder}/{name}" for name in files if not name.endswith(".pyc")]
    return sorted(names)


def package_digest(package: str) -> str:
    """sha256 over the files of a package that a device needs, by name: other code has another."""
    digest = hashlib.sha256()
    for name in package_files(package):
        with open(os.path.join(package, *name.split("/")), "rb") as file:
            digest.update(f"{name} {hashlib.sha256(file.read()).hexdigest()}\n".encode())
    return digest.hexdigest()


class Agent:
    """One ship's state here: where its files lie, and the lock that goes when this process does."""

    def __init__(self) -> None:
        self.root = ""
        self.folder = ""  # of the release, while it comes in and afterwards
        self.lock: int | None = None

    def survey(self, request: Request, payload: bytes) -> Answer:
        """What this device is and has; nothing is written."""
        self.root = self._place(request["root"])
        libraries = filter(importlib.util.find_spec, map(str, request["libraries"]))
        return {
            "architecture": platform.machine(),
            "system": platform.system(),
            "python": platform.python_version(),
            "executable": sys.executable,
            "board": _read("/proc/device-tree/model").strip("\0\n"),
            "gpu": _said(["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]),
            "rsync": _said(["rsync", "--version"]).partition("\n")[0],
            "libraries": _versions(list(libraries)),
            "installed": _installed(),
            "free_bytes": shutil.disk_usage(_nearest(self.root)).free,
            "root": self.root,
            **self.state(request, payload),
        }

    def state(self, request: Request, payload: bytes) -> Answer:
        """Which release is current, which others lie here, and what was last said of them."""
        self.root = self._place(request["root"])
        try:
            said = json.loads(_read(os.path.join(self.root, OURS, STATE)))
        except (ValueError, RecursionError):  # nothing was said yet, or it is damaged
            said = {}
        if not isinstance(said, dict):  # whoever wrote it, the next ship writes it anew
            said = {}
        return {"current": _current(self.root), "releases": _listed(os.path.join(self.root, RELEASES)), "state": said}

    def begin(self, request: Request, payload: bytes) -> Answer:
        """Takes the lock and says which files of the release are here: by name their bytes and sha256.

        A release that lies here whole is looked at where it lies. Else it comes in beside, and what the current one has
        of the same size is copied first: most bundles differ from the last in a few files.
        """
        self._take_lock(str(request["who"]))
        release = str(request["release"])
        files: dict[str, list[Any]] = dict(request["files"])
        self.folder = self._inside(RELEASES, release)
        hashes = self._hashes(files)
        if hashes != files:
            self.folder = self._inside(INCOMING, release)
            os.makedirs(self.folder, exist_ok=True)
            self._take_from_current(files)
            hashes = self._hashes(files)
        self._remove_others(files)
        return {"folder": self.folder, "hashes": hashes}

    def put(self, request: Request, payload: bytes) -> Answer:
        """Writes a piece of a file of the release at its offset, which is where the file ends, or 0 to begin anew."""
        path, offset = self._file(request["name"]), int(request["offset"])
        os.makedirs(os.path.dirname(path), exist_ok=True)
        if offset == 0 or os.path.islink(path):
            _remove(path)
        with open(path, "ab") as file:
            if file.tell() != offset:
                raise Refusal("input", f"{request['name']} has {file.tell()} bytes here, {offset} were expected")
            file.write(payload)
        return {"size": offset + len(payload)}

    def prove(self, request: Request, payload: bytes) -> Answer:
        """sha256 of the payload and each file's bytes after it: who lacks the bytes can't know it."""
        return {"proofs": {name: _sha256(self._file(name), payload) for name in request["names"]}}

    def settle(self, request: Request, payload: bytes) -> Answer:
        """The release is whole: from what comes in to the releases, where a damaged one of that name makes way."""
        target = self._inside(RELEASES, str(request["release"]))
        if self.folder != target:
            os.makedirs(os.path.dirname(target), exist_ok=True)
            damaged = f"{self.folder}.damaged"
            if os.path.isdir(target):
                os.rename(target, damaged)
            os.rename(self.folder, target)
            shutil.rmtree(damaged, ignore_errors=True)
            self.folder = target
        return {"folder": target}

    def store(self, request: Request, payload: bytes) -> Answer:
        """A file of our own, whole or not at all; without `bytes` only whether it is here with that sha256."""
        path = self._inside(OURS, str(request["name"]))
        wanted = str(request["sha256"])
        if "bytes" not in request:
            return {"path": path, "is_here": os.path.isfile(path) and _sha256(path) == wanted}
        if hashlib.sha256(payload).hexdigest() != wanted:
            raise Refusal("input", f"{request['name']} was damaged on its way")
        os.makedirs(os.path.dirname(path), exist_ok=True)
        _write(path, payload)
        return {"path": path, "is_here": True}

    def unpack(self, request: Request, payload: bytes) -> Answer:
        """The folder of an archive of ours, in which Python keeps what it compiled; made anew where it is another's."""
        archive = self._inside(OURS, str(request["name"]))
        folder, part = f"{archive}.d", f"{archive}.part"
        try:
            is_ours = package_digest(os.path.join(folder, "compressor")) == request["digest"]
        except OSError:
            is_ours = False
        if not is_ours:
            for place in (folder, part):
                shutil.rmtree(place, ignore_errors=True)
            with zipfile.ZipFile(archive) as file:
                file.extractall(part)
            os.rename(part, folder)
        return {"folder": folder}

    def fetch(self, request: Request, payload: bytes) -> Answer:
        """A file of our own, of at most `most` bytes."""
        path = self._inside(OURS, str(request["name"]))
        if os.path.getsize(path) > int(request["most"]):
            raise Refusal("input", f"{request['name']} is longer than {request['most']} bytes")
        with open(path, "rb") as file:
            return {"payload": file.read()}

    def forget(self, request: Request, payload: bytes) -> Answer:
        """Removes files of our own that are needed no more."""
        for name in request["names"]:
            _remove(self._inside(OURS, str(name)))
        return {}

    def run(self, request: Request, payload: bytes) -> Answer:
        """Runs a module of the device side to its end, or until whoever asked is gone."""
        place = str(request["place"])
        command = [*module_command(str(request["module"]), place), *map(str, request["arguments"])]
        ours = os.path.join(self.root, OURS)
        os.makedirs(ours, exist_ok=True)
        return _finish(command, ours, float(request["most_s"]))

    def switch(self, request: Request, payload: bytes) -> Answer:
        """Makes the release the current one in a single step, and writes down what is said of it."""
        previous, release = _current(self.root), str(request["release"])
        self._point_to(release)
        try:
            with open(os.path.join(self.root, CURRENT, str(request["witness"])), "rb") as file:
                if hashlib.sha256(file.read()).hexdigest() != request["sha256"]:
                    raise OSError(errno.EIO, "it is not the file that was shipped")
            _write(os.path.join(self.root, OURS, STATE), json.dumps(request["state"]).encode())
        except OSError as error:
            if previous:
                self._point_to(previous)
            else:
                os.unlink(os.path.join(self.root, CURRENT))
            raise Refusal("disk", f"{release} can't be read through {CURRENT}: {_reason(error)}") from error
        return {"previous": previous}

    def note(self, request: Request, payload: bytes) -> Answer:
        """Writes down what is said of the current release, which stays."""
        _write(os.path.join(self.root, OURS, STATE), json.dumps(request["state"]).encode())
        return {}

    def discard(self, request: Request, payload: bytes) -> Answer:
        """Removes every release but the current one and those to be kept, and what came in half."""
        kept = {_current(self.root), *map(str, request["keep"])}
        removed = self._discard(RELEASES, kept)
        self._discard(INCOMING, kept)
        return {"removed": removed}

    def _discard(self, kind: str, kept: set[str]) -> list[str]:
        names = [name for name in _listed(os.path.join(self.root, kind)) if name not in kept]
        for name in names:
            shutil.rmtree(self._inside(kind, name))
        return names

    def _place(self, root: object) -> str:
        """A relative root lies in the home folder."""
        return os.path.normpath(os.path.join(os.path.expanduser("~"), os.path.expanduser(str(root))))

    def _inside(self, kind: str, name: str) -> str:
        if not _NAME.fullmatch(name):
            raise Refusal("input", f"{name!r} is no name here")
        return os.path.join(self.root, kind, name)

    def _file(self, name: object) -> str:
        steps = str(name).split("/")
        if not {"", ".", ".."}.isdisjoint(steps) or os.path.isabs(str(name)):
            raise Refusal("input", f"{name!r} lies outside the release")
        return os.path.join(self.folder, *steps)

    def _take_lock(self, who: str) -> None:
        os.makedirs(os.path.join(self.root, OURS), exist_ok=True)
        if fcntl is None or self.lock is not None:
            return
        path = os.path.join(self.root, OURS, "lock")
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(handle)
            raise Refusal("locked", f"{_read(path)[:200].strip() or 'somebody else'} ships here now") from None
        os.truncate(handle, 0)
        os.write(handle, f"{who}, process {os.getpid()} on {socket.gethostname()}".encode())
        self.lock = handle

    def _hashes(self, files: Mapping[str, list[Any]]) -> dict[str, list[Any]]:
        """Of those that are here, [bytes, sha256]."""
        hashes: dict[str, list[Any]] = {}
        for name in files:
            path = self._file(name)
            if os.path.isfile(path):
                hashes[name] = [os.path.getsize(path), _sha256(path)]
        return hashes

    def _take_from_current(self, files: Mapping[str, list[Any]]) -> None:
        current = os.path.join(self.root, CURRENT)
        for name, (size_bytes, _) in files.items():
            earlier, path = os.path.join(current, *name.split("/")), self._file(name)
            has_size = os.path.isfile(earlier) and os.path.getsize(earlier) == size_bytes
            if has_size and not os.path.exists(path):
                os.makedirs(os.path.dirname(path), exist_ok=True)
                shutil.copyfile(earlier, path)  # no hard link: a copy that resumes writes in place

    def _remove_others(self, files: Mapping[str, list[Any]]) -> None:
        """What the release does not name, but for engines built here."""
        for place, folders, names in os.walk(self.folder):
            if place == self.folder and "built" in folders:
                folders.remove("built")
            links = [name for name in folders if os.path.islink(os.path.join(place, name))]
            for name in [*names, *links]:
                path = os.path.join(place, name)
                if os.path.relpath(path, self.folder).replace(os.sep, "/") not in files:
                    os.unlink(path)

    def _point_to(self, release: str) -> None:
        link = os.path.join(self.root, CURRENT)
        if os.path.lexists(link) and not os.path.islink(link):
            raise Refusal("input", f"{link} is no link of ours; move it away, or ship to another path")
        fresh = f"{link}.{os.getpid()}"
        _remove(fresh)
        os.symlink(f"{RELEASES}/{release}", fresh)
        os.replace(fresh, link)
        _settle_folder(self.root)


def serve(agent: Agent) -> None:
    """Answers requests until the input ends, each sent after the answer before; the first answer says it is ready."""
    source = sys.stdin.buffer
    _send({})
    verbs: dict[str, Callable[[Request, bytes], Answer]] = {name: getattr(agent, name) for name in _VERBS}
    for request in _requests():
        payload = source.read(int(request.get("bytes", 0)))
        try:
            answer = verbs[request["do"]](request, payload)
        except Refusal as refusal:
            answer = {"refused": refusal.kind, "message": str(refusal)}
        except OSError as error:
            kind = "full" if error.errno in _FULL else "disk"
            place = f"{error.filename}: " if error.filename else ""
            answer = {"refused": kind, "message": f"{place}{_reason(error)}"}
        _send(answer)


def _requests() -> Iterator[Request]:
    while select.select([0], [], [], _IDLE_S)[0]:
        line = sys.stdin.buffer.readline()
        if not line.endswith(b"\n"):
            return
        yield json.loads(line)


def _send(answer: Answer) -> None:
    payload: bytes = answer.pop("payload", b"")
    line = json.dumps({**answer, "bytes": len(payload)}).encode() + b"\n"
    sys.stdout.buffer.write(line + payload)
    sys.stdout.buffer.flush()


def _finish(command: list[str], folder: str, timeout_s: float) -> Answer:
    """A program's code and what it said; it goes with its own children when time or whoever asked is over."""
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=folder,
        start_new_session=True,
    )
    said = {pipe.fileno(): b"" for pipe in (process.stdout, process.stderr) if pipe is not None}
    streams, end = set(said), time.monotonic() + timeout_s
    try:
        while streams:
            ready = select.select([0, *streams], [], [], max(0.0, end - time.monotonic()))[0]
            if not ready:
                raise Refusal("time", f"it took longer than {timeout_s:.0f} s and was stopped")
            if 0 in ready:  # nobody asks twice before an answer: the link is gone
                sys.exit(1)
            for stream in ready:
                piece = os.read(stream, 1 << 16)
                said[stream] = (said[stream] + piece)[-_MOST_SAID:]
                if not piece:  # its end
                    streams.remove(stream)
        code = process.wait()
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    out, err = (text.decode(errors="replace") for text in said.values())
    return {"code": code, "out": out, "err": err[-20_000:]}


def _reason(error: OSError) -> str:
    """What the system says, such as `No space left on device`."""
    return error.strerror or str(error)


def _current(root: str) -> str:
    try:
        return os.path.basename(os.readlink(os.path.join(root, CURRENT)))
    except OSError:
        return ""


def _listed(folder: str) -> list[str]:
    """By the time they came, the newest last."""
    try:
        names = os.listdir(folder)
    except OSError:
        return []
    return sorted(names, key=lambda name: os.stat(os.path.join(folder, name)).st_mtime_ns)


def _nearest(path: str) -> str:
    """The path, or the folder above it that is there."""
    while not os.path.isdir(path) and os.path.dirname(path) != path:
        path = os.path.dirname(path)
    return path


def _versions(names: list[str]) -> dict[str, str]:
    """Of libraries that can be imported, in a process of its own; why one can't be, after `error: `."""
    said = _said([sys.executable, "-c", _VERSIONS, *names], timeout_s=120.0)
    try:
        versions: dict[str, str] = json.loads(said.splitlines()[-1])
    except (ValueError, IndexError):
        return dict.fromkeys(names, "error: it ends Python")
    return versions


def _installed() -> str:
    """The digest of a compressor that is installed here, empty where none is."""
    try:
        spec = importlib.util.find_spec("compressor")
        if spec is None or not spec.submodule_search_locations:
            return ""
        return package_digest(spec.submodule_search_locations[0])
    except (OSError, ValueError):
        return ""


def _said(command: list[str], timeout_s: float = 10.0) -> str:
    """What a program prints, empty where there is none or it fails."""
    try:
        done = subprocess.run(command, capture_output=True, timeout=timeout_s, stdin=subprocess.DEVNULL, check=True)
    except (OSError, subprocess.SubprocessError):  # too slow, or of another exit code than 0
        return ""
    return done.stdout.decode(errors="replace").strip()


def _sha256(path: str, before: bytes = b"") -> str:
    digest = hashlib.sha256(before)
    with open(path, "rb") as file:
        for block in iter(lambda: file.read(_BLOCK), b""):
            digest.update(block)
    return digest.hexdigest()


def _remove(path: str) -> None:
    """Where it is there."""
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)


def _read(path: str) -> str:
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read()
    except OSError:
        return ""


def _write(path: str, content: bytes) -> None:
    part = f"{path}.part"
    with open(part, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)
    _settle_folder(os.path.dirname(path))


def _settle_folder(folder: str) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _stop(number: int, frame: object) -> None:
    sys.exit(128 + number)


def main() -> None:
    """What runs when this text was sent."""
    for name in ("SIGHUP", "SIGTERM"):
        signal.signal(getattr(signal, name), _stop)
    serve(Agent())


if __name__ == "__main__":
    main()
