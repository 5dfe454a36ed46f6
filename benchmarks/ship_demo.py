"""A bundle onto two devices that are SSH servers on this machine, each with an environment of numpy and ONNX Runtime.

    make ship-demo                                       # the bundle of runs/digits-resnet, made if need be
    python benchmarks/ship_demo.py --bundle RUN --seconds 2
It ships to both, ships another that takes its place, one that is broken and is refused, and one while a server is
killed; then the same command again, which finishes. Servers (Debian: apt-get install openssh-server rsync), keys and
environments are this script's own and go with it. What is not as expected ends it; the last line is one JSON object.
"""

from __future__ import annotations

import argparse
import contextlib
import getpass
import io
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from compressor.device.bundle import GOLDEN, read_bundle, write_bundle
from compressor.device.feeds import mapped
from compressor.device.golden import read_golden
from compressor.hosts.carrying import archive

REMEDY = "install an SSH server first: apt-get install openssh-server (rsync is used where it is there)"
NAMES = ("alpha", "beta")
_STARTED_S = 10.0
_IMPORT = """
import sys, time, numpy, onnxruntime
wall, processor = time.perf_counter(), time.process_time()
import compressor.device, compressor.device.commands
print(1e3 * (time.perf_counter() - wall), 1e3 * (time.process_time() - processor))
"""
HEAVY = ("torch", "zennit", "torch_pruning", "optuna")


@dataclass
class Server:
    """One sshd on a free port of this machine, for the user who runs this; `folder` holds its keys and its files.

    With `within`, a folder that holds another system, whatever is asked for over SSH is done in that one.
    """

    name: str
    folder: Path
    python: str
    within: Path | None = None
    port: int = 0
    process: subprocess.Popen[bytes] | None = field(default=None, repr=False)

    def start(self) -> None:
        """Starts it and waits until it answers; after the first time on the same port."""
        self.port = self.port or _free_port()
        config = self.folder / "sshd_config"
        elsewhere = f'ForceCommand chroot {self.within} /bin/sh -c "$SSH_ORIGINAL_COMMAND"\n' if self.within else ""
        config.write_text(
            f"Port {self.port}\nListenAddress 127.0.0.1\nHostKey {self.folder}/host_key\n"
            f"AuthorizedKeysFile {self.folder}/authorized_keys\nPidFile {self.folder}/pid\nStrictModes no\n"
            f"UsePAM no\nPasswordAuthentication no\nKbdInteractiveAuthentication no\nPrintMotd no\n{elsewhere}"
        )
        command = [sshd(), "-D", "-e", "-f", str(config)]
        with (self.folder / "log").open("ab") as log:
            self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        end = time.monotonic() + _STARTED_S
        while True:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 1):
                return
            if self.process.poll() is not None or time.monotonic() > end:
                sys.exit(f"the SSH server {self.name} did not start: {(self.folder / 'log').read_text()[-300:]}")
            time.sleep(0.05)

    def kill(self) -> None:
        """Ends it with every connection and all that runs in them, as when the power goes."""
        if self.process is None:
            return
        for number in (self.process.pid, *_below(self.process.pid)):
            with contextlib.suppress(ProcessLookupError):
                os.kill(number, signal.SIGKILL)
        self.process.wait()
        self.process = None


def sshd() -> str:
    """Where the server's program is; ends with what to install where there is none."""
    found = shutil.which("sshd", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin")
    if found is None or shutil.which("ssh-keygen") is None:
        sys.exit(REMEDY)
    return found


@contextlib.contextmanager
def servers(
    folder: Path, pythons: Sequence[str], names: Sequence[str] = NAMES, within: Path | None = None
) -> Iterator[list[Server]]:
    """Running servers, by `folder/ssh_config` and `folder/devices.toml` reached under their names; ended afterwards."""
    if os.geteuid() == 0:
        Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)  # sshd asks for it when it may change users
    sshd()
    _keygen(folder / "key")
    found = [_prepared(name, folder, python, within) for name, python in zip(names, pythons, strict=True)]
    try:
        for server in found:
            server.start()
        _write_settings(folder, found)
        yield found
    finally:
        for server in found:
            server.kill()


def _prepared(name: str, folder: Path, python: str, within: Path | None) -> Server:
    place = folder / name
    place.mkdir()
    _keygen(place / "host_key")
    shutil.copy(folder / "key.pub", place / "authorized_keys")
    return Server(name, place, python, within)


def _write_settings(folder: Path, found: Sequence[Server]) -> None:
    hosts, devices, known = [], ['ssh_config = "ssh_config"\n'], []
    for server in found:
        hosts.append(
            f"Host {server.name}\n  HostName 127.0.0.1\n  Port {server.port}\n  User {getpass.getuser()}\n"
            f"  IdentityFile {folder}/key\n  IdentitiesOnly yes\n  UserKnownHostsFile {folder}/known_hosts\n"
            f"  HostKeyAlias {server.name}\n  StrictHostKeyChecking yes\n"
        )
        known.append(f"{server.name} {(server.folder / 'host_key.pub').read_text()}")
        devices.append(
            f'[[device]]\nname = "{server.name}"\naddress = "{server.name}"\npath = "{server.folder}/my models"\n'
            f'python = "{server.python}"\n'
        )
    (folder / "ssh_config").write_text("\n".join(hosts))
    (folder / "known_hosts").write_text("".join(known))
    (folder / "devices.toml").write_text("\n".join(devices))


def _keygen(path: Path) -> None:
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(path)], check=True)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _below(number: int) -> list[int]:
    """The processes that a process began, and theirs."""
    parents: dict[int, int] = {}
    for place in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError, IndexError, ValueError):
            parents[int(place.name)] = int((place / "stat").read_text().rpartition(")")[2].split()[1])
    found, latest = [], [number]
    while latest:
        latest = [child for child, parent in parents.items() if parent in latest]
        found += latest
    return found


def variants(bundle: Path, folder: Path) -> dict[str, Path]:
    """The bundle, others that differ in a line, and one whose golden outputs are not its models'."""
    manifest = read_bundle(bundle)
    golden = read_golden(bundle, manifest)
    files = {name: bundle / name for name in manifest.files if name != GOLDEN}
    made = {"first": bundle}
    for name in ("second", "broken", "fourth"):
        outputs = (
            mapped(lambda array: array + array.dtype.type(1), golden.outputs) if name == "broken" else golden.outputs
        )
        licences = (*manifest.licences, f"the {name} of a demonstration")
        made[name] = write_bundle(
            folder / name,
            files,
            manifest=replace(manifest, licences=licences),
            golden_inputs=golden.inputs,
            golden_outputs=outputs,
        )
    return made


@dataclass(frozen=True)
class Shipped:
    """What a call of `compressor ship` ended with: its code, what it printed as JSON, and its errors."""

    code: int
    rows: dict[str, dict[str, Any]]
    said: str


def ship(folder: Path, bundle: Path, *flags: str, killed: Server | None = None) -> Shipped:
    """Ships to both; `killed` is ended in the middle, while models are timed there."""
    command = [sys.executable, "-m", "compressor", "ship", str(bundle), "--inventory", str(folder / "devices.toml")]
    process = subprocess.Popen([*command, *flags], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    lines: list[str] = []

    def read() -> None:
        assert process.stderr is not None
        for line in process.stderr:
            print(f"    {line}", end="", file=sys.stderr, flush=True)
            lines.append(line)
            if killed is not None and line.startswith(f"{killed.name}: timing"):
                killed.kill()

    reader = threading.Thread(target=read)
    reader.start()
    out = process.stdout.read()
    code = process.wait()
    reader.join()
    content = json.loads(out.splitlines()[-1]) if out.strip() else {"devices": []}
    return Shipped(code, {row["device"]: row for row in content["devices"]}, "".join(lines))


def require(holds: bool, what: str) -> None:
    """Ends the demonstration where something is not as it should be."""
    print(f"{'yes' if holds else 'NO'}: {what}", file=sys.stderr, flush=True)
    if not holds:
        sys.exit(1)


def demonstrate(folder: Path, bundle: Path, seconds: float, found: Sequence[Server]) -> dict[str, Any]:
    """All of it, in order; returns what was measured."""
    alpha, beta = found
    made = variants(bundle, folder)
    flags = ("--seconds", f"{seconds:g}")

    def current(server: Server) -> str:
        return os.path.basename(os.readlink(server.folder / "my models" / "current"))

    print("1. a bundle to both", file=sys.stderr)
    first = ship(folder, made["first"], *flags, "--canary", "1")
    require(first.code == 0, "both got it")
    medians = {name: {row["model"]: row["p50_ms"] for row in rows["latency"]} for name, rows in first.rows.items()}
    require(all(medians[name] for name in NAMES), f"verified and timed there, p50 in ms: {medians}")

    print("2. another takes its place", file=sys.stderr)
    with _watched(alpha) as readable:
        second = ship(folder, made["second"], *flags)
    require(second.code == 0 and current(alpha) != first.rows["alpha"]["release"], "both switched")
    require(bool(readable) and all(readable), f"current could be read at each of {len(readable)} looks meanwhile")
    sent = second.rows["alpha"]["copied_bytes"]
    require(sent < first.rows["alpha"]["copied_bytes"], f"{sent} bytes were sent, what the first one had was not")

    print("3. one whose golden outputs are not its models'", file=sys.stderr)
    broken = ship(folder, made["broken"], *flags)
    require(broken.code == 4, "it is refused, with the code of a gate")
    require(current(alpha) == second.rows["alpha"]["release"] == current(beta), "the second one runs on")

    print("4. beta is killed in the middle", file=sys.stderr)
    fourth = ship(folder, made["fourth"], *flags, killed=beta)
    require(fourth.code == 7 and "beta: the connection ended" in fourth.said, "beta is named")
    require(fourth.rows["alpha"]["result"] == "shipped", "alpha went on")
    require(current(beta) == second.rows["beta"]["release"], "beta runs what it ran")

    print("5. the same again, with beta back", file=sys.stderr)
    beta.start()
    again = ship(folder, made["fourth"], *flags)
    results = {name: row["result"] for name, row in again.rows.items()}
    require(again.code == 0 and results == {"alpha": "already there", "beta": "shipped"}, f"it finishes: {results}")
    require(again.rows["beta"]["copied_bytes"] == 0, "nothing was sent twice")
    command = [sys.executable, "-m", "compressor", "devices", "--inventory", str(folder / "devices.toml")]
    subprocess.run(command, check=True, stdout=sys.stderr)
    return {"p50_ms": medians, "second_sent_bytes": sent, "seconds": {n: r["seconds"] for n, r in first.rows.items()}}


@contextlib.contextmanager
def _watched(server: Server) -> Iterator[list[bool]]:
    """Looks a thousand times a second whether `current` leads to a manifest."""
    looks: list[bool] = []
    path, over = server.folder / "my models" / "current" / "manifest.json", threading.Event()

    def look() -> None:
        while not over.wait(0.001):
            looks.append(path.is_file())

    watcher = threading.Thread(target=look)
    watcher.start()
    try:
        yield looks
    finally:
        over.set()
        watcher.join()


def environment(folder: Path) -> str:
    """A Python with numpy and ONNX Runtime alone."""
    uv = shutil.which("uv") or shutil.which("uv", path=str(Path(sys.executable).parent))
    python = str(folder / "bin" / "python")
    if uv is not None:
        subprocess.run([uv, "venv", "--quiet", "--python", sys.executable, str(folder)], check=True)
        subprocess.run([uv, "pip", "install", "--quiet", "--python", python, "numpy", "onnxruntime"], check=True)
    else:
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", "numpy", "onnxruntime"], check=True)
    return python


def device_figures(folder: Path, python: str) -> dict[str, Any]:
    """An environment's size, and what the device side's import takes beyond numpy's and the runtime's."""
    side = folder / "device"
    with zipfile.ZipFile(io.BytesIO(archive())) as file:
        file.extractall(side)
    size_bytes = sum(path.lstat().st_size for path in Path(python).parents[1].rglob("*") if path.is_file())
    times_ms = [[float(time_ms) for time_ms in _said(python, _IMPORT, side).split()] for _ in range(6)]
    wall_ms, processor_ms = (min(column) for column in zip(*times_ms, strict=True))
    heavy = f"import importlib.util as u; print([n for n in {HEAVY!r} if u.find_spec(n)])"
    require(_said(python, heavy, side) == "[]", f"none of {', '.join(HEAVY)} is importable there")
    return {
        "environment_mb": round(size_bytes / 1e6, 1),
        "device_side_kb": round(len(archive()) / 1e3, 1),
        "import_ms": round(wall_ms, 1),
        "import_processor_ms": round(processor_ms, 1),
    }


def _said(python: str, code: str, side: Path) -> str:
    command = [python, "-c", code]
    there = {**os.environ, "PYTHONPATH": str(side)}
    return subprocess.run(command, capture_output=True, text=True, check=True, env=there).stdout.strip()


def _bundle(place: str) -> Path:
    """The bundle of a run or a folder; without one, the embedded classifier's, made now if it is not there."""
    folder = Path(place or "runs/digits-resnet")
    if not place and not (folder / "bundle").is_dir():
        subprocess.run(
            [sys.executable, "-m", "compressor", "compress", "--out", str(folder)], check=True, stdout=sys.stderr
        )
    return folder / "bundle" if (folder / "bundle").is_dir() else folder


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", default="", help="a run or a bundle; runs/digits-resnet by default")
    parser.add_argument("--seconds", type=float, default=2.0, help="how long each model is timed there")
    options = parser.parse_args()
    sshd()
    with tempfile.TemporaryDirectory(prefix="ship-demo-") as name:
        folder = Path(name)
        bundle = Path(shutil.copytree(_bundle(options.bundle), folder / "first"))
        print("making two environments", file=sys.stderr, flush=True)
        pythons = [environment(folder / f"venv-{name}") for name in NAMES]
        figures = device_figures(folder, pythons[0])
        with servers(folder, pythons) as found:
            figures |= demonstrate(folder, bundle, options.seconds, found)
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
