"""Addresses of devices and the file that names them: nothing of it may be taken for an option."""

from __future__ import annotations

from pathlib import Path

import pytest

from compressor.errors import InputError
from compressor.hosts.address import ROOT, Device, read_address
from compressor.hosts.connection import ssh_command
from compressor.hosts.inventory import find_devices, inventory_path, read_inventory


@pytest.mark.parametrize(
    ("text", "login", "root", "name"),
    [
        ("kitchen", "kitchen", ROOT, "kitchen"),
        ("pi@kitchen.local", "pi@kitchen.local", ROOT, "kitchen.local"),
        ("pi@kitchen:face models", "pi@kitchen", "face models", "kitchen-face-models"),
        ("pi@[fe80::1%eth0]:/data", "pi@[fe80::1%eth0]", "/data", "fe80-1-eth0-data"),
        ("kitchen:", "kitchen", ROOT, "kitchen"),
    ],
)
def test_an_address_is_read(text: str, login: str, root: str, name: str) -> None:
    device = read_address(text)
    assert (device.login, device.root, device.name) == (login, root, name)


@pytest.mark.parametrize(
    "text",
    [
        *("-oProxyCommand=id", "pi@-oProxyCommand=id", "-l@kitchen", "", "@kitchen", "pi@", "a b", "pi@kit;chen"),
        *("pi@kitchen:-rf", "pi@kitchen:a\nb", "$(id)", "pi@kit`id`", "pi@kitchen\n", "::1"),
    ],
)
def test_what_could_be_an_option_or_a_command_is_refused(text: str) -> None:
    with pytest.raises(InputError):
        read_address(text)


def test_the_host_stands_behind_the_end_of_options() -> None:
    command = ssh_command(Device("kitchen", "pi@kitchen", settings="my config"), "true")
    assert command[-3:] == ["--", "pi@kitchen", "true"]
    assert command[:3] == ["ssh", "-F", "my config"]
    assert {"BatchMode=yes", "ForwardAgent=no", "ClearAllForwardings=yes"} < set(command)


def test_an_inventory_names_devices(tmp_path: Path) -> None:
    path = tmp_path / "devices.toml"
    path.write_text(
        'ssh_config = "config"\n[[device]]\nname = "kitchen"\naddress = "pi@10.0.0.7"\npath = "models"\n'
        'python = "venv/bin/python"\n[[device]]\naddress = "gate:x"\n'
    )
    kitchen, gate = read_inventory(path)
    assert kitchen == Device("kitchen", "pi@10.0.0.7", "models", "venv/bin/python", str(tmp_path / "config"))
    assert (gate.name, gate.login, gate.root, gate.python) == ("gate-x", "gate", "x", "python3")

    (tmp_path / "config").write_text("")
    assert find_devices([], path) == [kitchen, gate]
    named, other = find_devices(["kitchen", "pi@hall"], path, python="python3.12")
    assert (named.login, named.python, other.login, other.python) == (
        "pi@10.0.0.7",
        "python3.12",
        "pi@hall",
        "python3.12",
    )


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "names no device"),
        ('device = "x"', "names no device"),
        ("[[device]]\nname = 3\naddress = 'a'", "expected a text"),
        ("[[device]]\nname = 'x'", "address is None"),
        ("[[device]]\naddress = '-oX'", "is no address"),
        ("[[device]]\naddress = 'a'\npython = '-c'", "Python can't be '-c'"),
        ("[[device]]\naddress = 'a'\nport = 3", "has no 'port'"),
        ("[[device]]\nname = '../x'\naddress = 'a'", "is no name for a device"),
        ("[[device]]\naddress = 'a'\n[[device]]\naddress = 'a'", "twice"),
        ("[[device]\n", "is no TOML"),
        ("[hosts]\n", "'hosts' is no part of it"),
    ],
)
def test_an_inventory_that_is_wrong_is_named(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "devices.toml"
    path.write_text(text)
    with pytest.raises(InputError, match=words):
        read_inventory(path)


def test_who_is_meant_must_be_said_and_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="no device is named"):
        find_devices([], None)
    with pytest.raises(InputError, match="kitchen is named twice"):
        find_devices(["pi@kitchen", "root@kitchen"], None)
    with pytest.raises(InputError, match="can't be read"):
        read_inventory(tmp_path / "none.toml")
    monkeypatch.chdir(tmp_path)
    assert inventory_path() is None
    (tmp_path / "devices.toml").touch()
    assert inventory_path() == Path("devices.toml")


@pytest.mark.parametrize("text", ["a = " + "[" * 5000 + "]" * 5000, "a = " + "1" * 5000, 'ssh_config = "~nobody/x"'])
def test_an_inventory_beyond_reason_is_one_line(tmp_path: Path, text: str) -> None:
    path = tmp_path / "devices.toml"
    path.write_text(f'{text}\n[[device]]\naddress = "pi@kitchen"\n')
    with pytest.raises(InputError, match=r"no TOML that can be read|is no file; name a configuration"):
        find_devices([], path)
