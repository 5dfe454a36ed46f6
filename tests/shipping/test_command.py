"""`compressor ship` and `compressor devices` as they are typed: last lines, exit codes, and what is refused."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from compressor.__main__ import main
from compressor.cli.screen import DeviceBars, console
from compressor.shipping import flow
from tests.shipping.conftest import Hosts
from tests.shipping.made import make_bundle
from tests.shipping.test_flow import accept_all, survey_quickly


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_bundle(tmp_path_factory.mktemp("bundle") / "small.bundle")


@pytest.fixture
def place(hosts: Hosts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with an inventory of two devices, in which commands are typed."""
    rows = []
    for name in ("kitchen", "hall"):
        hosts.add(name)
        hosts.mend(name)
        rows.append(
            f'[[device]]\nname = "{name}"\naddress = "pi@{name}:{tmp_path.name}"\npython = "{sys.executable}"\n'
        )
    (tmp_path / "devices.toml").write_text("".join(rows))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(flow, "survey", survey_quickly)
    monkeypatch.setattr(flow, "accept", accept_all)
    monkeypatch.setattr(console, "quiet", False)
    return tmp_path


def typed(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, dict[str, Any], str]:
    """Exit code, the last line of stdout as JSON, and stderr."""
    code = main([*map(str, words)])
    said = capsys.readouterr()
    lines = said.out.splitlines()
    return code, json.loads(lines[-1]) if lines and lines[-1].startswith("{") else {}, said.err


def test_all_of_an_inventory_get_it_and_are_listed(
    place: Path, bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, content, said = typed(capsys, "ship", bundle, "--canary", "1")
    assert code == 0, said
    assert [(row["device"], row["result"]) for row in content["devices"]] == [
        ("kitchen", "shipped"),
        ("hall", "shipped"),
    ]
    assert f"ship {content['release']} to kitchen, hall\n" in said
    assert said.index("kitchen: shipped") < said.index("hall: looking it over")
    assert Path(content["page"]).is_file()

    code, content, _ = typed(capsys, "devices", "hall", "--json")
    (row,) = content["devices"]
    assert (code, row["device"], row["failure"], row["latency"][0]["p50_ms"]) == (0, "hall", "", 1.5)
    assert main(["devices"]) == 0
    assert "kitchen" in capsys.readouterr().out


def test_one_that_fails_is_named_after_the_json_and_its_kind_is_the_code(
    place: Path, hosts: Hosts, bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hosts.fault("hall", "deny")
    code, content, said = typed(capsys, "ship", bundle, "--quiet")
    assert code == 7
    assert [row["result"] for row in content["devices"]] == ["shipped", "failed"]
    assert said.splitlines() == [
        "error: 1 of 2 devices did not get it (hall): hall: the connection ended: hall: Permission denied (publickey)"
        ".; ssh pi@hall must work without a password: a key in your agent, or in your configuration"
    ]


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (("pi@-oProxyCommand=id",), "'pi@-oProxyCommand=id' is no address of a device"),
        (("kitchen", "--key", "none.pem"), "--key none.pem can't be read"),
        (("kitchen", "--inventory", "none.toml"), "none.toml can't be read"),
        (("kitchen", "pi@kitchen"), "kitchen is named twice"),
    ],
)
def test_what_is_wrong_is_refused_before_anybody_is_asked(
    place: Path, hosts: Hosts, bundle: Path, capsys: pytest.CaptureFixture[str], words: tuple[str, ...], reason: str
) -> None:
    calls = hosts.folder / "calls"
    before = calls.read_text() if calls.is_file() else ""
    code, _, said = typed(capsys, "ship", bundle, *words)
    assert code == 2
    assert reason in said
    assert (calls.read_text() if calls.is_file() else "") == before


def test_a_row_of_each_device_moves_and_brackets_are_no_markup(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console, "quiet", False)
    bars = DeviceBars(["a", "kitchen"])
    with bars as notify:
        notify("kitchen", "copying", 0.25)
        notify("a", "failed: [red]x[/]", 0.0)
        tasks = {task.fields["name"].strip(): task for task in bars.bar.tasks}
        assert (tasks["kitchen"].completed, tasks["kitchen"].total) == (0.25, 1.0)
        assert tasks["a"].description == r"failed: \[red]x\[/]"
