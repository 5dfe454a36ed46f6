#!/usr/bin/env python3
"""A stand-in for `ssh` on the PATH: runs the command in a shell here, each host in a home folder of its own.

FAKE_HOSTS names the folder of hosts; a host without a folder is not found. In a host's folder, `fault` is a line:
`drop N` ends the connection after N bytes from the client, once; `limit KiB` bounds the size of files, as a full disk
would; `deny` refuses the key; `chatter` prints before the command does. Every call is a line of FAKE_HOSTS/calls.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

WITH_VALUE = ("-o", "-F", "-l", "-p", "-S")
hosts = Path(os.environ["FAKE_HOSTS"])


def parsed(words: list[str]) -> tuple[str, str]:
    """The host and the command, without options, as ssh takes them."""
    while words and words[0].startswith("-"):
        word = words.pop(0)
        if word == "--":
            break
        if word in WITH_VALUE:
            words.pop(0)
    return words[0].rpartition("@")[2], " ".join(words[1:])


def main() -> int:
    with (hosts / "calls").open("a") as calls:
        calls.write("\t".join(sys.argv[1:])[:500].replace("\n", " ") + "\n")
    host, command = parsed(sys.argv[1:])
    home = hosts / host
    if not home.is_dir():
        print(f"ssh: Could not resolve hostname {host}: Name or service not known", file=sys.stderr)
        return 255
    fault = home / "fault"
    words = fault.read_text().split() if fault.is_file() else ["none"]
    if words[0] == "deny":
        print(f"{host}: Permission denied (publickey).", file=sys.stderr)
        return 255
    if words[0] == "chatter":
        print("Welcome to the kitchen\n" * 3, flush=True)
    prefix = f"ulimit -f {words[1]}; " if words[0] == "limit" else ""
    environment = {**os.environ, "HOME": str(home)}
    shell = ["bash", "-c", prefix + command]
    if words[0] != "drop":
        os.chdir(home)
        os.execvpe("bash", shell, environment)
    fault.unlink()
    return dropping(shell, environment, home, int(words[1]))


def dropping(shell: list[str], environment: dict[str, str], home: Path, after: int) -> int:
    """Passes so many bytes on; then both ends are gone, as when a cable is pulled."""
    process = subprocess.Popen(shell, env=environment, cwd=home, stdin=subprocess.PIPE, start_new_session=True)
    assert process.stdin is not None

    def pump() -> None:
        assert process.stdin is not None
        passed = 0
        while piece := os.read(0, 1 << 14):
            passed += len(piece)
            if passed > after:
                os.killpg(process.pid, signal.SIGKILL)
                print("Connection to host closed by remote host.", file=sys.stderr, flush=True)
                os._exit(255)
            process.stdin.write(piece)
            process.stdin.flush()
        process.stdin.close()

    threading.Thread(target=pump, daemon=True).start()
    return process.wait()


if __name__ == "__main__":
    sys.exit(main())
