"""One run on two hosts: two network namespaces, joined by a cable that is cut in the middle and put back.

In: a folder to write to, the seconds after which a host counts as lost. Out: what each host said, how long it took to
say so, and whether the same command then went on from where it was and came to the plan of one process alone. Needs
root and `ip` (Debian's iproute2); without them it says so and ends with 0.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from compressor.distributed import TIMEOUT_VARIABLE
from compressor.errors import RanksError
from compressor.files import file_sha256

HOSTS = ("compressor-a", "compressor-b")
ADDRESSES = ("10.77.0.1", "10.77.0.2")
PORT = 29517
RECIPE = (
    "--model digits-resnet --calibration 128 --targets= --latency-seconds 0.05 --recovery-minutes 0.5 "
    "--runtimes onnxruntime --precisions fp32"
).split()
CUT_AT = "recovery"  # what the first host says when the cable is cut
LONGEST_S = 900


def main() -> None:
    options = _options()
    reason = _missing()
    if reason:
        print(f"skipped: {reason}")
        return
    shutil.rmtree(options.out, ignore_errors=True)
    options.out.mkdir(parents=True)
    alone = [sys.executable, "-m", "compressor", "compress", *RECIPE, "--out", str(options.out / "alone")]
    subprocess.run(alone, check=True, capture_output=True)
    with cabled():
        cut = _run(options, cut=True)
        whole = _run(options, cut=False)
    plans = [file_sha256(options.out / name / "plan.json") for name in ("alone", "together")]
    result = {"timeout_s": options.timeout, "cut": cut, "again": whole, "same_plan": plans[0] == plans[1]}
    print(json.dumps(result, indent=1))
    as_expected = all(end["code"] != 0 for end in cut["hosts"]) and all(end["code"] == 0 for end in whole["hosts"])
    sys.exit(0 if as_expected and result["same_plan"] else 1)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/two-hosts"))
    parser.add_argument("--timeout", type=float, default=20.0, help="seconds after which a host counts as lost")
    return parser.parse_args()


def _missing() -> str:
    if os.geteuid() != 0:
        return "network namespaces need root"
    if shutil.which("ip") is None:
        return "`ip` is not there (Debian: apt-get install iproute2)"
    tried = subprocess.run(["ip", "netns", "add", "compressor-tried"], capture_output=True, text=True, check=False)
    if tried.returncode:
        return f"this machine lets nobody make network namespaces ({tried.stderr.strip()})"
    _ip("netns del compressor-tried")
    return ""


def _ip(arguments: str) -> None:
    subprocess.run(["ip", *arguments.split()], check=True, capture_output=True)


@contextmanager
def cabled() -> Iterator[None]:
    """Two hosts with an address each and one cable between them."""
    for host in HOSTS:
        _ip(f"netns add {host}")
    try:
        _ip(f"link add eth0 netns {HOSTS[0]} type veth peer name eth0 netns {HOSTS[1]}")
        for host, address in zip(HOSTS, ADDRESSES, strict=True):
            _ip(f"-n {host} addr add {address}/24 dev eth0")
            for device in ("lo", "eth0"):
                _ip(f"-n {host} link set {device} up")
        yield
    finally:
        for host in HOSTS:
            _ip(f"netns del {host}")


def _started(options: argparse.Namespace, number: int) -> subprocess.Popen[str]:
    torchrun = f"-m torch.distributed.run --nnodes 2 --node-rank {number} --nproc-per-node 1 --max-restarts 0"
    meeting = f"--master-addr {ADDRESSES[0]} --master-port {PORT}"
    run = ["-m", "compressor", "compress", *RECIPE, "--out", str(options.out / "together")]
    command = ["ip", "netns", "exec", HOSTS[number], sys.executable, *torchrun.split(), *meeting.split(), *run]
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "eth0", TIMEOUT_VARIABLE: str(options.timeout)}
    said = (options.out / f"{HOSTS[number]}.txt").open("w")
    return subprocess.Popen(command, env=environment, stdout=said, stderr=said, text=True)


def _run(options: argparse.Namespace, *, cut: bool) -> dict[str, object]:
    """Both hosts to their end; with `cut` the cable is pulled once the first has come to `CUT_AT`."""
    processes = [_started(options, number) for number in range(2)]
    pulled = 0.0
    ends: list[dict[str, object]] = []
    if cut:
        _wait_for(options.out / f"{HOSTS[0]}.txt", CUT_AT, processes)
        time.sleep(3)
        _ip(f"-n {HOSTS[0]} link set eth0 down")
        pulled = time.monotonic()
    waiting = dict(enumerate(processes))
    while waiting:
        for number, process in list(waiting.items()):
            if process.poll() is not None:
                del waiting[number]
                said = (options.out / f"{HOSTS[number]}.txt").read_text()
                errors = [line for line in said.splitlines() if line.startswith("error: ")]
                after = {"seconds_after_the_cut": round(time.monotonic() - pulled, 1)} if cut else {}
                ends.append({"host": number, "code": process.returncode, "error": errors[-1:], **after})
        time.sleep(0.2)
    if cut:
        _ip(f"-n {HOSTS[0]} link set eth0 up")
    return {"hosts": ends, "our_exit_code": RanksError.exit_code}


def _wait_for(path: Path, text: str, processes: Sequence[subprocess.Popen[str]]) -> None:
    latest = time.monotonic() + LONGEST_S
    while text not in path.read_text():
        if time.monotonic() > latest or any(process.poll() is not None for process in processes):
            sys.exit(f"a host ended before it came to {text!r}:\n{path.read_text()[-2000:]}")
        time.sleep(0.2)


if __name__ == "__main__":
    main()
