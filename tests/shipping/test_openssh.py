"""The same with OpenSSH itself, where its server is installed: a bundle, a link that is cut, and who is not let in."""

from __future__ import annotations

import importlib
import shutil
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from compressor.errors import HostError
from compressor.hosts.address import Device
from compressor.hosts.connection import Session, connected
from compressor.hosts.copying import CopyPlan, copy_files, read_files
from compressor.hosts.inventory import read_inventory
from compressor.shipping import flow, read_cargo, ship_all
from tests.shipping.made import make_bundle
from tests.shipping.test_flow import OPTIONS, accept_all, silent, survey_quickly

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
pytestmark = pytest.mark.skipif(
    shutil.which("sshd", path="/usr/sbin:/usr/local/sbin:/usr/bin") is None or shutil.which("ssh") is None,
    reason="there is no sshd here: apt-get install openssh-server",
)


@pytest.fixture(scope="module")
def demo() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        yield importlib.import_module("ship_demo")


@pytest.fixture(scope="module")
def servers(demo: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[list[Any], list[Device]]]:
    """Two servers whose Python is this one, and the devices of their inventory."""
    folder = tmp_path_factory.mktemp("ssh")
    with demo.servers(folder, [sys.executable, sys.executable]) as found:
        yield found, list(read_inventory(folder / "devices.toml"))


def test_a_bundle_ships_and_one_that_is_killed_is_named(
    servers: tuple[list[Any], list[Device]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (alpha, beta), devices = servers
    cargo = replace(read_cargo(make_bundle(tmp_path / "a bundle")), reports=tmp_path / "shipped")
    monkeypatch.setattr(flow, "survey", survey_quickly)

    def accept(side: Any, *given: Any, **more: Any) -> Any:
        if side.session.device.name == "beta":
            beta.kill()
            side.session.ask("state", root=side.session.device.root)
        return accept_all(side, *given, **more)

    monkeypatch.setattr(flow, "accept", accept)
    outcomes = ship_all(cargo, devices, OPTIONS, silent)
    assert [outcome.result for outcome in outcomes] == ["shipped", "failed"]
    assert str(outcomes[1].error).startswith("beta: the connection ended: ")

    monkeypatch.setattr(flow, "accept", accept_all)
    beta.start()
    outcomes = ship_all(cargo, devices, OPTIONS, silent)
    assert [outcome.result for outcome in outcomes] == ["already there", "shipped"]
    for server in (alpha, beta):
        link = server.folder / "my models" / "current"
        assert (link / "manifest.json").read_bytes() == (cargo.folder / "manifest.json").read_bytes()


@pytest.mark.skipif(shutil.which("rsync") is None, reason="rsync is not installed")
def test_rsync_goes_through_the_connection_that_is_there(
    servers: tuple[list[Any], list[Device]], tmp_path: Path
) -> None:
    (alpha, _), (device, _) = servers
    (tmp_path / "a file").write_bytes(b"x" * 100_000)
    before = _logins(alpha)
    with connected(device) as session:
        _copy(session, tmp_path, "rsynced")
    assert (alpha.folder / "my models" / "releases" / "rsynced" / "a file").stat().st_size == 100_000
    assert _logins(alpha) == before + 1


def _copy(session: Session, folder: Path, release: str) -> None:
    session.ask("state", root=session.device.root)
    copy_files(session, folder, read_files(folder, ["a file"]), CopyPlan(release, "a test", True), lambda share: None)


def _logins(server: Any) -> int:
    return int((server.folder / "log").read_text().count("Accepted publickey"))


def test_who_is_not_let_in_is_told_what_must_work(servers: tuple[list[Any], list[Device]], tmp_path: Path) -> None:
    _, (device, _) = servers
    settings = Path(device.settings).read_text()
    for line, words in (
        (("IdentityFile ", "IdentityFile /no"), r"Permission denied.*ssh alpha must work without a password"),
        (("HostKeyAlias alpha", "HostKeyAlias other"), r"Host key verification failed.*look at its key: ssh alpha"),
        (("Port ", "Port 1 #"), r"Connection refused.*is its SSH server running"),
    ):
        other = tmp_path / "config"
        other.write_text(settings.replace(*line, 1))
        with (
            pytest.raises(HostError, match=rf"alpha: the connection ended: .*{words}"),
            connected(replace(device, settings=str(other))),
        ):
            pass
