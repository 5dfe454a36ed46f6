"""One study, several workers, and what goes wrong with them: a worker killed, the server stopped, the network cut.

    python benchmarks/search_demo.py                     # all four steps; some ten minutes on two cores
    python benchmarks/search_demo.py --steps killed,stopped --trials 12
`here`: `--workers 2` in a folder, one process killed, then Ctrl-C, then the same command. `killed`, `stopped`, `cut`:
two commands on one PostgreSQL (Debian: apt-get install postgresql), for `cut` in two network namespaces joined by a
veth pair, which needs root. Server and namespaces are this script's own and go with it. What can't be run here is
said with its reason; what is not as expected ends it; the last line is one JSON object.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import optuna
from optuna.trial import FrozenTrial, TrialState

from compressor.searching.storage import LOST
from compressor.searching.takeover import is_dead, name_of_worker

STATED_S = 60.0
"""Within which a worker whose storage went away ends with an error (docs/searching-together.md)."""
FINISHED = (TrialState.COMPLETE, TrialState.PRUNED)
NORTH, SOUTH = "search-demo-n", "search-demo-s"
NORTH_ADDRESS, SOUTH_ADDRESS = "10.213.77.1", "10.213.77.2"
_SEARCH = (
    *("--model", "digits-resnet", "--budgets", "0.5,0.7", "--search-images", "60", "--trial-images", "40"),
    *("--score-images", "32", "--calibration", "64", "--finalists", "1", "--normalisation", "mean", "--no-evaluate"),
)


# the server


@dataclass
class Postgres:
    """A server in a folder of its own; `namespace` is the network it listens in, "" for this machine's."""

    folder: Path
    binaries: Path
    address: str = "127.0.0.1"
    namespace: str = ""
    port: int = 0

    def make(self) -> None:
        if os.geteuid() == 0:  # it refuses to run as root
            shutil.chown(self.folder, "postgres")
        self._run("initdb", "-D", self._data, "-U", "me", "-A", "trust", "-N")
        with (self.folder / "data" / "pg_hba.conf").open("a") as rules:
            rules.write("host all all 10.213.77.0/24 trust\n")
        self.port = _free_port()

    def start(self) -> None:
        options = f"-c listen_addresses='{self.address}' -c port={self.port} -c fsync=off -k {self.folder}"
        self._run("pg_ctl", "-D", self._data, "-w", "-o", options, "-l", str(self.folder / "log"), "start")

    def stop(self) -> None:
        self._run("pg_ctl", "-D", self._data, "-w", "-m", "immediate", "stop")

    @property
    def url(self) -> str:
        """By which workers reach it."""
        return f"postgresql://me@{self.address}:{self.port}/postgres"

    @property
    def local_url(self) -> str:
        """By which this script looks at it, past every network."""
        return f"postgresql+psycopg://me@/postgres?host={self.folder}&port={self.port}"

    @property
    def _data(self) -> str:
        return str(self.folder / "data")

    def _run(self, program: str, *words: str) -> None:
        command = [str(self.binaries / program), *words]
        if os.geteuid() == 0:
            command = ["runuser", "-u", "postgres", "--", *command]
        subprocess.run([*_inside(self.namespace), *command], check=True, cwd=self.folder, stdout=subprocess.DEVNULL)


@contextlib.contextmanager
def server(address: str = "127.0.0.1", namespace: str = "") -> Iterator[Postgres]:
    folder = Path(tempfile.mkdtemp(prefix="search-demo-"))
    database = Postgres(folder, binaries(), address, namespace)
    try:
        database.make()
        database.start()
        yield database
    finally:
        with contextlib.suppress(subprocess.CalledProcessError):  # stopped already
            database.stop()
        shutil.rmtree(folder, ignore_errors=True)


def binaries() -> Path:
    programs = [shutil.which("initdb"), *map(str, sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb")))]
    return Path(next(program for program in programs if program)).resolve().parent


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


# two networks


def _inside(namespace: str) -> list[str]:
    return ["ip", "netns", "exec", namespace] if namespace else []


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


@contextlib.contextmanager
def two_networks() -> Iterator[None]:
    """NORTH and SOUTH, joined by a veth pair."""
    try:
        for name in (NORTH, SOUTH):
            _ip("netns", "add", name)
        _ip("link", "add", "demo-n", "netns", NORTH, "type", "veth", "peer", "name", "demo-s", "netns", SOUTH)
        for name, device, address in ((NORTH, "demo-n", NORTH_ADDRESS), (SOUTH, "demo-s", SOUTH_ADDRESS)):
            _ip("-n", name, "address", "add", f"{address}/24", "dev", device)
            _ip("-n", name, "link", "set", device, "up")
            _ip("-n", name, "link", "set", "lo", "up")
        yield
    finally:
        for name in (NORTH, SOUTH):
            with contextlib.suppress(subprocess.CalledProcessError):
                _ip("netns", "delete", name)


def set_link(state: str) -> None:
    """`up` or `down`, at the north's end: what the south sends is lost, and it is not told."""
    _ip("-n", NORTH, "link", "set", "demo-n", state)


# workers


@dataclass
class Worker:
    """One `compressor search`; its words in a file."""

    folder: Path
    words: Sequence[str]
    namespace: str = ""
    process: subprocess.Popen[bytes] | None = field(default=None, repr=False)

    def start(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        command = [
            sys.executable,
            "-m",
            "compressor",
            "search",
            *_SEARCH,
            *self.words,
            "--out",
            str(self.folder / "run"),
        ]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [*_inside(self.namespace), *command],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                preexec_fn=_hear_ctrl_c,
            )

    @property
    def log(self) -> Path:
        return self.folder / "log"

    @property
    def last_error(self) -> str:
        errors = [line for line in self.log.read_text().splitlines() if line.startswith("error: ")]
        return errors[-1] if errors else ""

    def wait(self, limit_s: float) -> int:
        assert self.process is not None
        return self.process.wait(limit_s)

    def signal(self, number: int) -> None:
        assert self.process is not None
        self.process.send_signal(number)


def _hear_ctrl_c() -> None:
    """A shell's background job ignores it, and passes that on."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def trials_at(url: str) -> list[FrozenTrial]:
    """Of the one study there; empty while there is none."""
    storage = optuna.storages.RDBStorage(url, skip_compatibility_check=True, skip_table_creation=True)
    try:
        names = optuna.get_all_study_names(storage)
        return optuna.load_study(study_name=names[0], storage=storage).trials if names else []
    finally:
        storage.remove_session()
        storage.engine.dispose()


def running_of(url: str, pid: int) -> FrozenTrial | None:
    """The trial that the process is at."""
    for trial in trials_at(url):
        process = trial.user_attrs.get("worker", ":0:").split(":")[1]
        if trial.state == TrialState.RUNNING and int(process) == pid:
            return trial
    return None


def until(what: str, happens: Callable[[], object], limit_s: float = 600.0) -> object:
    end = time.monotonic() + limit_s
    while time.monotonic() < end:
        with contextlib.suppress(*LOST):
            seen = happens()
            if seen:
                return seen
        time.sleep(0.05)
    sys.exit(f"not within {limit_s:.0f} s: {what}")


def require(fact: bool, what: str) -> None:
    if not fact:
        sys.exit(f"not as expected: {what}")


def check_study(url: str, total: int) -> dict[str, object]:
    """As many trials finished as were asked for, no point twice, and whatever broke off was tried again once."""
    trials = trials_at(url)
    finished = [trial for trial in trials if trial.state in FINISHED]
    points = Counter(json.dumps(trial.params, sort_keys=True) for trial in finished)
    broken = [t for t in trials if t.state == TrialState.FAIL and "skipped" not in t.user_attrs]
    retries = Counter(t.user_attrs.get("retries") for t in trials if "skipped" not in t.user_attrs)
    require(len(finished) == total, f"{len(finished)} trials finished, {total} asked for")
    require(max(points.values()) == 1, "a point was tried twice")
    require(all(retries[trial.number] == 1 for trial in broken), "a trial was lost, or retried twice")
    require(not any(trial.state == TrialState.RUNNING for trial in trials), "a trial runs for nobody")
    by_worker = Counter(trial.user_attrs["worker"].split(":")[1] for trial in finished)
    return {"finished": len(finished), "broken_off": len(broken), "by_worker": sorted(by_worker.values())}


# steps


def step_here(folder: Path, trials: int) -> dict[str, object]:
    """One command with two processes; the helper is killed, the command interrupted, and given again."""
    worker = Worker(folder, ["--workers", "2", "--trials", str(trials)])
    url = f"sqlite:///{folder / 'run' / 'study.db'}"
    worker.start()
    assert worker.process is not None
    own = worker.process.pid

    def helper() -> int:
        for trial in trials_at(url):
            process = int(trial.user_attrs.get("worker", f":{own}:").split(":")[1])
            if trial.state == TrialState.RUNNING and process != own:
                return process
        return 0

    victim = until("the helper begins a trial", helper)
    assert isinstance(victim, int)
    os.kill(victim, signal.SIGKILL)
    until("a trial runs after it", lambda: running_of(url, own))
    worker.signal(signal.SIGINT)
    code = worker.wait(60)
    require(code == 130, f"Ctrl-C ended it with {code}, not 130")
    left = [t.number for t in trials_at(url) if t.state == TrialState.RUNNING and not is_gone(t)]
    require(not left, f"trials {left} still run")
    worker.start()
    require(worker.wait(900) == 0, f"the same command failed: {worker.last_error}")
    return check_study(url, trials)


def is_gone(trial: FrozenTrial) -> bool:
    return is_dead(trial.user_attrs.get("worker", ""), name_of_worker())


def step_killed(folder: Path, trials: int) -> dict[str, object]:
    """Two commands on one server; one is killed in the middle of a trial, and the other does it."""
    with server() as database:
        words = ["--storage", database.url, "--trials", str(trials)]
        one, other = (Worker(folder / name, words) for name in ("one", "other"))
        one.start()
        other.start()
        for worker in (one, other):
            assert worker.process is not None
            until("both try trials", lambda pid=worker.process.pid: running_of(database.local_url, pid))
        assert other.process is not None
        other.signal(signal.SIGKILL)
        require(one.wait(900) == 0, f"the other worker failed: {one.last_error}")
        return check_study(database.local_url, trials)


def step_stopped(folder: Path, trials: int) -> dict[str, object]:
    """The server stops while two workers are at it, and starts again; the same commands go on."""
    with server() as database:
        words = ["--storage", database.url, "--trials", str(trials)]
        workers = [Worker(folder / name, words) for name in ("one", "other")]
        for worker in workers:
            worker.start()
        for worker in workers:
            assert worker.process is not None
            until("both try trials", lambda pid=worker.process.pid: running_of(database.local_url, pid))
        database.stop()
        stopped_s = time.monotonic()
        for worker in workers:
            require(worker.wait(STATED_S) == 2, f"it did not end as it should: {worker.log.read_text()[-300:]}")
        error_s = time.monotonic() - stopped_s
        said = workers[0].last_error
        require("does not answer any more" in said, f"it said {said!r}")

        database.start()
        for worker in workers:
            worker.start()
        for worker in workers:
            require(worker.wait(900) == 0, f"the same command failed: {worker.last_error}")
        return {**check_study(database.local_url, trials), "error_s": round(error_s, 1), "said": said}


def step_cut(folder: Path, trials: int) -> dict[str, object]:
    """The network between server and one worker is cut; the others' side goes on, then the network is back."""
    with two_networks(), server(NORTH_ADDRESS, NORTH) as database:
        words = ["--storage", database.url, "--trials", str(trials)]
        near, far = Worker(folder / "near", words, NORTH), Worker(folder / "far", words, SOUTH)
        near.start()
        far.start()
        for worker in (near, far):
            assert worker.process is not None
            until("both try trials", lambda pid=worker.process.pid: running_of(database.local_url, pid))
        set_link("down")
        cut_s = time.monotonic()
        require(far.wait(STATED_S) == 2, f"it did not end as it should: {far.log.read_text()[-300:]}")
        error_s = time.monotonic() - cut_s
        said = far.last_error
        require("does not answer any more" in said, f"it said {said!r}")
        set_link("up")
        far.start()
        for worker in (near, far):
            require(worker.wait(900) == 0, f"the same command failed: {worker.last_error}")
        return {**check_study(database.local_url, trials), "error_s": round(error_s, 1), "said": said}


STEPS = {"here": step_here, "killed": step_killed, "stopped": step_stopped, "cut": step_cut}


def reason_to_skip(step: str) -> str:
    """Why a step can't be run here; empty where it can."""
    if step == "here":
        return ""
    if not any([shutil.which("initdb"), *Path("/usr/lib/postgresql").glob("*/bin/initdb")]):
        return "no PostgreSQL server here: apt-get install postgresql"
    try:
        import psycopg  # noqa: F401
    except ImportError:
        return "no driver of PostgreSQL here: pip install 'compressor[postgres]'"
    if step != "cut":
        return ""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        return "network namespaces need root and iproute2"
    try:
        _ip("netns", "add", NORTH)
        _ip("netns", "delete", NORTH)
    except subprocess.CalledProcessError as error:
        return f"this machine permits no network namespaces ({error.stderr.decode().strip()})"
    return ""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", default=",".join(STEPS))
    parser.add_argument("--trials", type=int, default=24, help="of each step's study")
    options = parser.parse_args()
    results: dict[str, object] = {}
    with tempfile.TemporaryDirectory(prefix="search-demo-") as name:
        for step in options.steps.split(","):
            reason = reason_to_skip(step)
            if reason:
                print(f"{step}: skipped, {reason}", flush=True)
                results[step] = {"skipped": reason}
                continue
            began_s = time.monotonic()
            result = STEPS[step](Path(name) / step, options.trials)
            results[step] = {**result, "seconds": round(time.monotonic() - began_s)}
            print(f"{step}: {results[step]}", flush=True)
    print(json.dumps({"stated_s": STATED_S, "trials": options.trials, **results}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
