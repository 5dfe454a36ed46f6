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
    if words[0] == "drop":
        fault.unlink()
    prefix = f"ulimit -f {words[1]}; " if words[0] == "limit" else ""
    return joined(["bash", "-c", prefix + command], home, int(words[1]) if words[0] == "drop" else -1)


def joined(shell: list[str], home: Path, most: int) -> int:
    """Runs the server's side with pipes of its own: where this process is killed, it sees its input end.

    After `most` bytes from the client both ends are gone, as when a cable is pulled; -1 for never.
    """
    environment = {**os.environ, "HOME": str(home)}
    server = subprocess.Popen(
        shell, env=environment, cwd=home, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True
    )
    assert server.stdin is not None
    assert server.stdout is not None

    def send() -> None:
        assert server.stdin is not None
        passed = 0
        while piece := os.read(0, 1 << 16):
            passed += len(piece)
            if 0 <= most < passed:
                os.killpg(server.pid, signal.SIGKILL)
                print("Connection to host closed by remote host.", file=sys.stderr, flush=True)
                os._exit(255)
            os.write(server.stdin.fileno(), piece)
        server.stdin.close()

    threading.Thread(target=send, daemon=True).start()
    while piece := os.read(server.stdout.fileno(), 1 << 16):
        sys.stdout.buffer.write(piece)
        sys.stdout.buffer.flush()
    return server.wait()


if __name__ == "__main__":
    sys.exit(main())
