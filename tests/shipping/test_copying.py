"""Files onto a device: links that drop, disks that are full, two at once, paths with spaces, hashes that lie."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from compressor.device.agent import BESIDE, package_digest, package_files
from compressor.errors import GateError, HostError, MissingPackageError
from compressor.hosts import connection, copying
from compressor.hosts.address import Device
from compressor.hosts.carrying import archive, carry, digest, store
from compressor.hosts.connection import Session, connected
from compressor.hosts.copying import CopyPlan, copy_files, prove_files, read_files
from tests.shipping.conftest import Hosts

BIG_BYTES = 3 << 20
PLAN = CopyPlan("r-1", "a test", rsync=False)
SLEEPER = """
import os, time
print(os.getpid(), file=open(os.environ["HOME"] + "/pid", "w"), flush=True)
time.sleep(60)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three files: one of three pieces, one with a space in its path, an empty one."""
    place = tmp_path_factory.mktemp("files")
    (place / "sub folder").mkdir()
    (place / "big.bin").write_bytes(os.urandom(BIG_BYTES))
    (place / "sub folder" / "a 'file'.txt").write_text("text")
    (place / "empty").touch()
    return place


def names_of(folder: Path) -> list[str]:
    return [path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*")) if path.is_file()]


def copy(session: Session, folder: Path, plan: CopyPlan = PLAN) -> int:
    session.ask("state", root=session.device.root)
    return copy_files(session, folder, read_files(folder, names_of(folder)), plan, lambda share: None)


def shipped(hosts: Hosts, device: Device, folder: Path, plan: CopyPlan = PLAN) -> int:
    with connected(device) as session:
        return copy(session, folder, plan)


def same(one: Path, other: Path) -> bool:
    return {name: (one / name).read_bytes() for name in names_of(one)} == {
        name: (other / name).read_bytes() for name in names_of(other)
    }


def test_a_copy_is_whole_and_the_next_sends_nothing(hosts: Hosts, folder: Path) -> None:
    device = hosts.add("plain", "my own models")
    assert shipped(hosts, device, folder) == BIG_BYTES + 4
    target = hosts.root(device) / "releases" / "r-1"
    assert same(folder, target)
    assert shipped(hosts, device, folder) == 0


def test_a_link_that_drops_is_named_and_the_copy_goes_on(hosts: Hosts, folder: Path) -> None:
    device = hosts.add("dropping")
    agent_bytes = Path(connection.agent.__file__).stat().st_size
    hosts.fault("dropping", f"drop {agent_bytes + 2 * BIG_BYTES // 3}")

    with pytest.raises(
        HostError, match=r"dropping: the connection ended: .* closed by remote host.*goes on from there"
    ):
        shipped(hosts, device, folder)
    part = hosts.root(device) / "incoming" / "r-1" / "big.bin"
    assert 0 < part.stat().st_size < BIG_BYTES
    assert not (hosts.root(device) / "releases" / "r-1").exists()

    assert shipped(hosts, device, folder) < BIG_BYTES + 4  # not all of it again
    assert same(folder, hosts.root(device) / "releases" / "r-1")


def test_a_part_that_is_not_ours_is_sent_anew(hosts: Hosts, folder: Path) -> None:
    device = hosts.add("foreign")
    part = hosts.root(device) / "incoming" / "r-1" / "big.bin"
    part.parent.mkdir(parents=True)
    part.write_bytes(b"x" * 1000)
    (part.parent / "stranger").touch()
    assert shipped(hosts, device, folder) == BIG_BYTES + 4
    assert same(folder, hosts.root(device) / "releases" / "r-1")


def test_a_full_disk_is_said_in_words(hosts: Hosts, folder: Path) -> None:
    device = hosts.add("full")
    hosts.fault("full", "limit 1024")  # KiB of a file; big.bin is three times that
    with pytest.raises(HostError, match=r"full: its disk is full .*free space there"):
        shipped(hosts, device, folder)
    hosts.mend("full")
    assert shipped(hosts, device, folder) < BIG_BYTES + 4


def test_two_at_once_is_one_too_many(hosts: Hosts, folder: Path) -> None:
    device = hosts.add("busy")
    with connected(device) as first:
        copy(first, folder)
        with pytest.raises(HostError, match=r"busy: a test, process \d+ on .* ships here now; wait"):
            shipped(hosts, device, folder)
    assert shipped(hosts, device, folder) == 0  # the lock went with whoever held it


def test_what_the_last_release_has_is_not_sent_again(hosts: Hosts, folder: Path, tmp_path: Path) -> None:
    device = hosts.add("again")
    shipped(hosts, device, folder)
    os.symlink("releases/r-1", hosts.root(device) / "current")
    other = tmp_path / "other"
    shutil.copytree(folder, other)
    (other / "empty").write_text("no more")
    assert shipped(hosts, device, other, CopyPlan("r-2", "a test", rsync=False)) == len("no more")
    assert same(folder, hosts.root(device) / "releases" / "r-1")
    assert same(other, hosts.root(device) / "releases" / "r-2")


def test_a_release_that_was_damaged_there_is_made_whole(hosts: Hosts, folder: Path) -> None:
    device = hosts.add("damaged")
    shipped(hosts, device, folder)
    target = hosts.root(device) / "releases" / "r-1"
    (target / "big.bin").write_bytes(b"y" * BIG_BYTES)
    (target / "stranger").touch()
    assert shipped(hosts, device, folder) == BIG_BYTES + 4
    assert same(folder, target)


def test_a_device_that_lies_about_its_hash_is_caught(
    hosts: Hosts, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It says what the manifest says of every file, and has other bytes: nobody told it the number drawn for it."""
    device, files = hosts.add("liar"), read_files(folder, names_of(folder))
    with connected(device) as session:
        copy(session, folder)
        (hosts.root(device) / "releases" / "r-1" / "big.bin").write_bytes(b"y" * BIG_BYTES)
        ask = session.ask

        def lie(do: str, payload: bytes | None = None, **facts: object) -> dict[str, object]:
            if do == "begin":
                hashes = {name: [file.bytes, file.sha256] for name, file in files.items()}
                return {"folder": "x", "hashes": hashes}
            return ask(do, payload, **facts)  # type: ignore[arg-type]

        monkeypatch.setattr(session, "ask", lie)
        with pytest.raises(GateError, match=r"liar does not have big.bin as it is here, whatever it says"):
            copy_files(session, folder, files, PLAN, lambda share: None)
        with pytest.raises(GateError):
            prove_files(session, folder, files)


@pytest.mark.parametrize("name", ["../x", "/etc/x", "a//b", "a/../b", ""])
def test_the_agent_writes_nothing_outside_the_release(hosts: Hosts, folder: Path, name: str) -> None:
    device = hosts.add("inside")
    with connected(device) as session:
        copy(session, folder)
        with pytest.raises(HostError, match="lies outside the release"):
            session.ask("put", b"x", name=name, offset=0)


def test_the_device_side_is_carried_once_and_only_if_it_is_not_installed(hosts: Hosts) -> None:
    device = hosts.add("carrying")
    with connected(device) as session:
        session.ask("state", root=device.root)
        side = carry(session, "")
        kept = Path(side.place).with_suffix("")  # the archive that the folder was made of
        assert kept.read_bytes() == archive()
        before = session.sent_bytes
        assert carry(session, "").place == side.place
        assert session.sent_bytes == before
        assert carry(session, digest()).place == ""

        kept.write_bytes(b"not ours any more")
        errors = Path(side.place) / "compressor" / "errors.py"
        errors.write_text("raise SystemExit(3)")
        carry(session, "")
        assert kept.read_bytes() == archive()
        assert package_digest(str(errors.parent)) == digest()
        code, out, err = side.run("compressor.device", "--help", timeout_s=60)
        assert (code, err) == (0, "")
        assert "verify" in out
        with pytest.raises(HostError, match="is no name here"):
            store(session, "../x", b"x")


def test_the_device_side_is_carried_with_all_it_imports() -> None:
    """Of this package: what else it may import is held by the rooms' own tests."""
    package = Path(connection.__file__).parents[1]
    named = {
        step
        for path in (package / "device").rglob("*.py")
        for step in re.findall(r"^ *from \.\.(\w+)[\w.]* import", path.read_text(), re.MULTILINE)
    }
    assert named <= {name.removesuffix(".py") for name in BESIDE}
    carried = set(package_files(str(package)))
    assert {"device/agent.py", "device/__main__.py", *BESIDE} <= carried
    assert not [name for name in carried if "__pycache__" in name]


def test_the_device_side_is_the_same_file_every_time() -> None:
    first = archive()
    archive.cache_clear()
    assert archive() == first


def _rsync_is_here() -> bool:
    return shutil.which("rsync") is not None


@pytest.mark.skipif(not _rsync_is_here(), reason="rsync is not installed")
def test_rsync_copies_where_both_have_it(hosts: Hosts, folder: Path) -> None:
    device = hosts.add("rsyncing", "my 'own' models")
    shares: list[float] = []
    with connected(device) as session:
        session.ask("state", root=device.root)
        files = read_files(folder, names_of(folder))
        assert copy_files(session, folder, files, CopyPlan("r-1", "a test", rsync=True), shares.append) == BIG_BYTES + 4
    assert same(folder, hosts.root(device) / "releases" / "r-1")
    assert shares[-1] == 1
    assert "rsync" in (hosts.folder / "calls").read_text()


@pytest.mark.skipif(not _rsync_is_here(), reason="rsync is not installed")
def test_a_full_disk_is_said_by_rsync_too(hosts: Hosts, folder: Path) -> None:
    device = hosts.add("rsync-full")
    hosts.fault("rsync-full", "limit 1024")
    with pytest.raises(HostError, match="rsync-full: its disk is full"):
        shipped(hosts, device, folder, CopyPlan("r-1", "a test", rsync=True))


# who can't be talked to


def test_hosts_that_are_no_use_are_named_with_the_remedy(hosts: Hosts, monkeypatch: pytest.MonkeyPatch) -> None:
    denied = hosts.add("denied")
    hosts.fault("denied", "deny")
    for device, words in (
        (Device("nowhere", "user@nowhere"), r"nowhere: the connection ended: .*Could not resolve.*is the name right\?"),
        (denied, r"denied: .*Permission denied.*ssh user@denied must work without a password"),
        (Device("bare", hosts.add("bare").login, python="no-such-python"), r"bare has no no-such-python .*--python"),
    ):
        with pytest.raises(HostError, match=words), connected(device):
            pass
    monkeypatch.setenv("PATH", "")
    with pytest.raises(MissingPackageError, match="there is no ssh here"), connected(denied):
        pass


def test_a_python_that_is_too_old_is_named(hosts: Hosts, tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text(
        "#!/bin/sh\nprintf '%s\\n' \"$3\" | sed 's/.*print(\"\\([0-9a-f]*\\).*/\\1 3.8/'\ncat > /dev/null\n"
    )
    python.chmod(0o755)
    with (
        pytest.raises(HostError, match=r"old: .* there is Python 3\.8, and 3\.10 or later is needed"),
        connected(Device("old", hosts.add("old").login, python=str(python))),
    ):
        pass


def test_what_a_login_shell_prints_is_passed_over(hosts: Hosts) -> None:
    device = hosts.add("talking")
    hosts.fault("talking", "chatter")
    with connected(device) as session:
        assert session.ask("state", root=device.root)["current"] == ""


def test_one_that_says_nothing_is_not_waited_for_and_what_it_ran_ends_too(hosts: Hosts, tmp_path: Path) -> None:
    """The agent's child would otherwise run on, on a device that nobody looks at."""
    device = hosts.add("silent")
    (tmp_path / "sleeper.py").write_text(SLEEPER)
    with connected(device) as session:
        session.ask("state", root=device.root)
        with pytest.raises(HostError, match=r"silent: it said nothing for 2 s; run the same command again"):
            session.ask("run", timeout_s=2.0, module="sleeper", arguments=[], place=str(tmp_path), most_s=60.0)
    pid = int((hosts.folder / "silent" / "pid").read_text())
    assert _ended(lambda: not Path(f"/proc/{pid}").exists())


def test_a_program_there_that_takes_too_long_is_stopped(hosts: Hosts, tmp_path: Path) -> None:
    device = hosts.add("slow")
    (tmp_path / "sleeper.py").write_text(SLEEPER)
    with connected(device) as session:
        session.ask("state", root=device.root)
        with pytest.raises(HostError, match=r"slow: it took longer than 1 s and was stopped"):
            session.ask("run", module="sleeper", arguments=[], place=str(tmp_path), most_s=1.0)
        assert session.ask("state", root=device.root)["current"] == ""  # and can be talked to


def _ended(is_over: Callable[[], bool]) -> bool:
    for _ in range(50):
        if is_over():
            return True
        subprocess.run(["sleep", "0.1"], check=True)
    return False


@pytest.mark.parametrize(
    "answer",
    [
        {},
        {"hashes": 3, "folder": "x"},
        {"hashes": {"big.bin": ["many", "x"]}, "folder": "x"},
        {"hashes": {"big.bin": [1]}, "folder": "x"},
        {"hashes": {}, "folder": "x", "proofs": "all"},
    ],
)
def test_answers_of_another_kind_are_not_believed(
    hosts: Hosts, folder: Path, monkeypatch: pytest.MonkeyPatch, answer: dict[str, object]
) -> None:
    with connected(hosts.add("strange")) as session:
        monkeypatch.setattr(session, "ask", lambda *given, **facts: answer)
        with pytest.raises(HostError, match="strange answers with what is no answer of ours"):
            copy_files(session, folder, read_files(folder, names_of(folder)), PLAN, lambda share: None)
        if not answer:
            for said in (lambda: carry(session, ""), lambda: carry(session, digest()).run("x", timeout_s=1.0)):
                with pytest.raises(HostError, match="is no answer of ours"):
                    said()


def test_a_device_that_answers_nonsense_is_not_believed(hosts: Hosts) -> None:
    device = hosts.add("odd")
    with connected(device) as session:
        for line in (b"{}\n", b"[]\n", b"no\n", b'{"bytes": "x"}\n', b'{"bytes": ' + b"[" * 5000 + b"\n"):
            read, write = os.pipe()
            os.write(write, line)
            os.close(write)
            with os.fdopen(read, "rb") as pipe, pytest.MonkeyPatch.context() as patch:
                patch.setattr(session.process, "stdout", pipe)
                with pytest.raises(HostError, match="odd answers with what is no answer of ours"):
                    session.ask("state", root=device.root)


def test_a_login_shell_that_prints_is_spared_rsync(hosts: Hosts, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(copying, "_copy_by_rsync", lambda *given: pytest.fail("it would take the words for its own"))
    monkeypatch.setattr(shutil, "which", lambda name: name)
    device = hosts.add("greeter")
    hosts.fault("greeter", "chatter")
    with connected(device) as session:
        session.ask("survey", root=device.root, libraries=[])
        files = read_files(folder, [path.name for path in folder.iterdir() if path.is_file()])
        assert copy_files(session, folder, files, CopyPlan("r-1", "a test", True), lambda share: None) > 0


def test_a_state_that_is_none_is_written_anew(hosts: Hosts) -> None:
    device = hosts.add("scribbled")
    state = hosts.root(device) / ".shipping" / "state.json"
    state.parent.mkdir(parents=True)
    for text in ("[]", "[" * 100_000, "5"):
        state.write_text(text)
        with connected(device) as session:
            assert session.ask("state", root=device.root)["state"] == {}


def test_a_python_that_can_not_be_run_is_named(hosts: Hosts, tmp_path: Path) -> None:
    (tmp_path / "python").write_text("")
    device = replace(hosts.add("rightless"), python=str(tmp_path / "python"))
    with pytest.raises(HostError, match=r"rightless can't run .*python .*--python"), connected(device):
        pass
