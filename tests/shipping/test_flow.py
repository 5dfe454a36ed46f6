"""A bundle onto devices: what is shipped was tried there first, and what fails leaves what ran there."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from compressor.device.archive import pack_bundle
from compressor.errors import GateError, HostError, InputError
from compressor.hosts.address import Device
from compressor.hosts.connection import Session, connected
from compressor.report.write import SCHEMA, Page, write_page
from compressor.shipping import (
    Cargo,
    Options,
    Outcome,
    Timing,
    failure_of,
    flow,
    keep_outcomes,
    opened_cargo,
    preflight,
    read_cargo,
    read_key,
    running,
    ship_all,
)
from compressor.shipping.acceptance import Acceptance
from compressor.shipping.preflight import Survey, read_survey, require_fit
from compressor.shipping.reports import age_s, in_words, known_path, now, read_report, read_reports, write_report
from tests.device.signing import sign, write_keys
from tests.shipping.conftest import Hosts
from tests.shipping.made import make_bundle

QUICK = Timing(seconds=0.0, runs=8, rounds=1)
LIBRARIES = {"numpy": "2.1.0", "onnxruntime": "1.22.0"}
OPTIONS = Options(timing=QUICK, at_once=2)
ROW = {"model": "models/small net.onnx", "runtime": "onnxruntime", "p50_ms": 1.5, "p90": "2 ms", "n": 8}


def silent(device: str, text: str, share: float) -> None:
    return None


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    place = tmp_path_factory.mktemp("bundles")
    return {
        "first": make_bundle(place / "first bundle"),
        "second": make_bundle(place / "second", seed=3),
        "broken": make_bundle(place / "broken", broken=True),
        "signed": sign(make_bundle(place / "signed"), write_keys(place, "key")[0]),
    }


@pytest.fixture
def cargoes(bundles: dict[str, Path], tmp_path: Path) -> dict[str, Cargo]:
    """Each with a folder of reports of this test's own."""
    return {name: replace(read_cargo(path), reports=tmp_path / "shipped") for name, path in bundles.items()}


@pytest.fixture(scope="module", autouse=True)
def _onnxruntime_alone() -> Iterator[None]:
    """Of the libraries that a device is asked for: OpenVINO's import takes longer than all that is tested here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(preflight, "_runtimes_for", lambda manifest: ["onnxruntime"])
        yield


def survey_quickly(session: Session, manifest: object, *, signed: bool) -> Survey:
    """Libraries take seconds to import: all are said to be there."""
    answer = session.ask("survey", root=session.device.root, libraries=[])
    libraries = {**LIBRARIES, **({"cryptography": "44.0.0"} if signed else {})}
    return read_survey({**answer, "libraries": libraries}, session.device.name)


def accept_all(*given: Any, **more: Any) -> Acceptance:
    """What arrived is accepted."""
    return Acceptance(({"what": "x", "outcome": "passed", "detail": ""},), (), (), (ROW,), {})


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests that look at the flow."""
    monkeypatch.setattr(flow, "survey", survey_quickly)
    monkeypatch.setattr(flow, "accept", accept_all)


def ship(cargo: Cargo, *devices: Device, options: Options = OPTIONS) -> list[Outcome]:
    return ship_all(cargo, devices, options, silent)


# the whole of it, with nothing left out


@pytest.fixture(scope="module")
def scene(hosts: Hosts, bundles: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A device that got a bundle, and refused a broken one."""
    reports = tmp_path_factory.mktemp("reports") / "shipped"
    device = hosts.add("whole", "my models")
    cargo = replace(read_cargo(bundles["first"]), reports=reports)
    (outcome,) = ship(cargo, device)
    first = read_report(reports / f"{device.name}.json")
    (refused,) = ship(replace(read_cargo(bundles["broken"]), reports=reports), device)
    return {"device": device, "cargo": cargo, "outcome": outcome, "first": first, "refused": refused}


def test_a_bundle_is_verified_compared_and_timed_there(scene: dict[str, Any], hosts: Hosts) -> None:
    outcome = scene["outcome"]
    assert (outcome.result, outcome.error) == ("shipped", None)
    (row,) = outcome.latency
    assert (row["model"], row["runtime"]) == ("models/small net.onnx", "onnxruntime")
    assert row["p50_ms"] > 0
    assert row["n"] >= 8

    current = scene["first"]["current"]
    assert {entry["against"] for entry in current["compared"]} == {"golden outputs", "answers here to fresh inputs"}
    assert all(entry["relative"] < 1e-3 for entry in current["compared"])
    assert current["not_compared"] == []
    assert {check["outcome"] for check in current["checks"]} == {"passed"}
    assert current["device"]["python"].startswith("3.")
    assert "onnxruntime" in current["device"]["libraries"]


def test_a_broken_bundle_is_refused_there_and_the_last_good_one_runs_on(scene: dict[str, Any], hosts: Hosts) -> None:
    refused, device = scene["refused"], scene["device"]
    assert refused.result == "failed"
    assert isinstance(refused.error, GateError)
    assert "whole-my-models: models/small net.onnx in onnxruntime" in str(refused.error)
    assert hosts.current(device) == scene["cargo"].release == refused.current
    assert [path.name for path in (hosts.root(device) / "releases").iterdir()] == [scene["cargo"].release]
    report = read_report(scene["cargo"].reports / f"{device.name}.json")
    assert report["current"] == scene["first"]["current"]
    assert report["attempt"]["result"] == "failed"


def test_devices_say_what_runs_there_and_the_last_answer_stands_in(
    scene: dict[str, Any], hosts: Hosts, tmp_path: Path
) -> None:
    device, known = scene["device"], known_path(tmp_path / "devices.toml")
    (row,) = running([device], known, lambda name: None)
    assert (row["release"], row["failure"]) == (scene["cargo"].release, "")
    assert row["latency"][0]["p50_ms"] == scene["outcome"].latency[0]["p50_ms"]

    hosts.fault("whole", "deny")
    (row,) = running([device], known, lambda name: None)
    hosts.mend("whole")
    assert (row["release"], row["latency"][0]["model"]) == (scene["cargo"].release, "models/small net.onnx")
    assert "Permission denied" in row["failure"]
    assert age_s(row["when_asked"]) < 60


def test_the_page_says_which_devices_got_it(scene: dict[str, Any], tmp_path: Path) -> None:
    page = keep_outcomes(scene["cargo"], [scene["outcome"]], tmp_path / "devices.toml")
    text = page.with_suffix(".md").read_text()
    assert page.name == "shipped.html"
    assert f"whole-my-models: {scene['cargo'].release}, since" in text
    assert "models/small net.onnx" in text
    assert "integrity only" in text
    assert json.loads(page.with_suffix(".json").read_text())["devices"][0]["device"] == "whole-my-models"
    assert known_path(tmp_path / "devices.toml").is_file()


def test_a_run_shows_the_devices_of_its_bundle_in_its_report(
    scene: dict[str, Any], bundles: dict[str, Path], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(bundles["first"], run / "bundle")
    (run / "run.json").write_text("{}")
    write_page(Page("small", (), (), (), (), {}), run, "report", {"schema": SCHEMA})
    cargo = read_cargo(run)
    assert cargo.is_of_run
    shutil.copytree(scene["cargo"].reports, cargo.reports)
    keep_outcomes(cargo, [scene["outcome"]], None)
    assert f"whole-my-models: {cargo.release}, since" in (run / "report.md").read_text()
    assert not scene["cargo"].is_of_run


def test_answers_that_are_not_the_models_are_caught_here(
    hosts: Hosts, cargoes: dict[str, Cargo], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A device that says `passed` and knows the golden outputs by heart still has to answer what nobody saw before."""
    from compressor.device.arrays import read_npz, write_npz

    device = hosts.add("pretending")
    ask = Session.ask

    def pretend(self: Session, do: str, payload: bytes | None = None, **facts: Any) -> dict[str, Any]:
        if do == "fetch":
            path = hosts.root(device) / ".shipping" / "answers.npz"
            with path.open("rb") as file:
                arrays = read_npz(file, lambda names: names, most_bytes=1 << 20)
            arrays["0.1.0"] = arrays["0.0.0"]  # golden outputs for everything
            write_npz(path, arrays)
        return ask(self, do, payload, **facts)

    monkeypatch.setattr(Session, "ask", pretend)
    (outcome,) = ship(cargoes["first"], device)
    assert isinstance(outcome.error, GateError)
    assert "answers there unlike the answers here to fresh inputs" in str(outcome.error)
    assert hosts.current(device) == ""


def test_with_a_key_an_unsigned_bundle_goes_nowhere(hosts: Hosts, cargoes: dict[str, Cargo]) -> None:
    device = hosts.add("keyed")
    with pytest.raises(GateError, match="is not signed: `compressor sign` does it, or leave --key out"):
        ship(cargoes["first"], device, options=replace(OPTIONS, key=b"a key"))
    assert list((hosts.folder / "keyed").iterdir()) == []


def test_a_device_is_asked_for_what_checks_a_signature_where_it_is_to(hosts: Hosts, cargoes: dict[str, Cargo]) -> None:
    cargo = cargoes["signed"]
    with connected(hosts.add("asked")) as session:
        plain, keyed = (preflight.survey(session, cargo.manifest, signed=signed) for signed in (False, True))
    assert keyed.libraries.keys() - plain.libraries.keys() == {"cryptography"}
    require_fit("kitchen", keyed, cargo.manifest, cargo.bytes, signed=True)
    with pytest.raises(HostError, match=r"checks a signature \(--key\): it has no cryptography; there: python3\."):
        require_fit("kitchen", plain, cargo.manifest, cargo.bytes, signed=True)


# the order of things


@pytest.mark.usefixtures("quick", "without_rsync")
def test_the_second_takes_the_firsts_place_and_the_last_good_one_stays(hosts: Hosts, cargoes: dict[str, Cargo]) -> None:
    device = hosts.add("switching")
    names = ["first", "second", "broken"]  # quick: nobody looks at its answers
    for name in names:
        (outcome,) = ship(cargoes[name], device)
        assert (outcome.result, hosts.current(device)) == ("shipped", cargoes[name].release)
    kept = {path.name for path in (hosts.root(device) / "releases").iterdir()}
    assert kept == {cargoes["second"].release, cargoes["broken"].release}
    state = json.loads((hosts.root(device) / ".shipping" / "state.json").read_text())
    assert (state["release"], state["previous"]) == (cargoes["broken"].release, cargoes["second"].release)


@pytest.mark.usefixtures("quick", "without_rsync")
def test_what_runs_already_is_not_tried_again_unless_asked(hosts: Hosts, cargoes: dict[str, Cargo]) -> None:
    device, cargo = hosts.add("already"), cargoes["signed"]
    assert [ship(cargo, device)[0].result for _ in range(2)] == ["shipped", "already there"]
    assert ship(cargo, device, options=replace(OPTIONS, again=True))[0].result == "shipped"
    keyed = replace(OPTIONS, key=b"a key")  # it was accepted without one
    assert [ship(cargo, device, options=keyed)[0].result for _ in range(2)] == ["shipped", "already there"]
    assert ship(cargo, device, options=replace(OPTIONS, key=b"another"))[0].result == "shipped"
    shutil.rmtree(cargo.reports)  # who has seen nothing of it believes nothing
    assert ship(cargo, device)[0].result == "shipped"


@pytest.mark.usefixtures("quick", "without_rsync")
def test_one_that_dies_is_named_while_the_other_goes_on_and_again_finishes(
    hosts: Hosts, cargoes: dict[str, Cargo]
) -> None:
    good, dying, cargo = hosts.add("good"), hosts.add("dying"), cargoes["first"]
    hosts.fault("dying", "drop 40000")
    outcomes = ship(cargo, dying, good)
    assert [outcome.result for outcome in outcomes] == ["failed", "shipped"]
    failure = failure_of(outcomes)
    assert isinstance(failure, HostError)
    assert str(failure).startswith("1 of 2 devices did not get it (dying): dying: the connection ended")

    outcomes = ship(cargo, dying, good)
    assert [outcome.result for outcome in outcomes] == ["shipped", "already there"]
    assert failure_of(outcomes) is None


@pytest.mark.usefixtures("quick", "without_rsync")
def test_a_canary_that_fails_stops_the_others(hosts: Hosts, cargoes: dict[str, Cargo]) -> None:
    canary, other = hosts.add("canary"), hosts.add("other")
    hosts.fault("canary", "deny")
    options = replace(OPTIONS, canary=1)
    outcomes = ship(cargoes["first"], canary, other, options=options)
    assert [outcome.result for outcome in outcomes] == ["failed", "not begun"]
    assert not hosts.root(other).exists()
    assert "canary, other" in str(failure_of(outcomes))

    hosts.mend("canary")
    assert [outcome.result for outcome in ship(cargoes["first"], canary, other, options=options)] == ["shipped"] * 2


@pytest.mark.usefixtures("quick", "without_rsync")
def test_a_current_that_is_no_link_is_left_alone(hosts: Hosts, cargoes: dict[str, Cargo]) -> None:
    device = hosts.add("own")
    (hosts.root(device) / "current").mkdir(parents=True)
    (outcome,) = ship(cargoes["first"], device)
    assert "is no link of ours; move it away, or ship to another path" in str(outcome.error)
    assert (hosts.root(device) / "current").is_dir()


@pytest.mark.usefixtures("quick", "without_rsync")
def test_a_switch_that_can_not_be_read_through_is_taken_back(
    hosts: Hosts, cargoes: dict[str, Cargo], monkeypatch: pytest.MonkeyPatch
) -> None:
    device = hosts.add("back")
    ship(cargoes["first"], device)
    wrong = replace(cargoes["second"].manifest_file, sha256="0" * 64)
    monkeypatch.setattr(Cargo, "manifest_file", wrong)
    (outcome,) = ship(cargoes["second"], device)
    assert "can't be read through current: it is not the file that was shipped" in str(outcome.error)
    assert hosts.current(device) == cargoes["first"].release


@pytest.mark.usefixtures("quick")
def test_an_interrupt_ends_every_connection(
    hosts: Hosts, cargoes: dict[str, Cargo], monkeypatch: pytest.MonkeyPatch
) -> None:
    processes: list[subprocess.Popen[bytes]] = []

    def stopped(cargo: Cargo, device: Device, options: Options, say: object, opened: Callable[..., None]) -> Outcome:
        with connected(device, lambda process: (opened(process), processes.append(process))[0]) as session:
            if device.name == "second-to-stop":
                session.ask("run", module="time", arguments=[], place="", most_s=60.0)
                session.process.wait(30)
                raise HostError("it was ended")
            raise KeyboardInterrupt

    from compressor.shipping import fleet

    monkeypatch.setattr(fleet, "ship_to", stopped)
    with pytest.raises(KeyboardInterrupt):
        ship(cargoes["first"], hosts.add("first-to-stop"), hosts.add("second-to-stop"))
    assert [process.poll() is not None for process in processes] == [True, True]


# what is refused before anything is sent


def survey_of(**changes: Any) -> Survey:
    texts = {"architecture": "aarch64", "system": "Linux", "python": "3.11.2", "board": "", "gpu": "", "rsync": ""}
    facts = {**texts, "libraries": LIBRARIES, "installed": "", "free_bytes": 10**9, "root": "/data/compressor"}
    return Survey(**{**facts, "current": "", "releases": (), "state": {}, **changes})


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"libraries": {"onnxruntime": "1.22"}}, r"kitchen lacks numpy: .* python3\.11 -m pip install numpy"),
        ({"libraries": {"numpy": "2.1"}}, r"it has no onnxruntime; there: python3\.11 -m pip install onnxruntime"),
        (
            {"libraries": {"numpy": "2.1", "onnxruntime": "error: libgomp is missing"}},
            r"onnxruntime can't be imported \(libgomp is missing\)",
        ),
        ({"free_bytes": 10**6}, r"has 1 MB free at /data/compressor, .* another disk: user@host:path"),
        ({"system": "Windows"}, r"is a Windows system"),
    ],
)
def test_a_device_that_can_not_run_it_is_refused_with_the_remedy(
    cargoes: dict[str, Cargo], changes: dict[str, Any], words: str
) -> None:
    cargo = cargoes["first"]
    require_fit("kitchen", survey_of(), cargo.manifest, cargo.bytes)
    with pytest.raises(HostError, match=words):
        require_fit("kitchen", survey_of(**changes), cargo.manifest, cargo.bytes)


def test_rsync_of_another_make_is_none() -> None:
    assert survey_of(rsync="rsync  version 3.2.7  protocol version 31").has_rsync
    assert not survey_of(rsync="openrsync: protocol version 29").has_rsync
    assert not survey_of(rsync="rsync  version 2.6.9  protocol version 29").has_rsync


def test_what_ships_is_a_bundle_or_a_run_that_has_one(bundles: dict[str, Path], tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(bundles["first"], run / "bundle")
    (run / "run.json").write_text("{}")
    (run / "bundle" / "built").mkdir()
    (run / "bundle" / "built" / "a.plan").touch()
    cargo, bare = read_cargo(run), read_cargo(bundles["first"])
    assert cargo.release == bare.release  # whatever was built here stays here
    assert cargo.reports == run.resolve() / "shipped"
    assert bare.reports.name == "first bundle.shipped"
    assert read_cargo(bundles["second"]).release != bare.release

    with pytest.raises(InputError, match="is no bundle and no finished run with one"):
        read_cargo(tmp_path)
    model = run / "bundle" / "models" / "small net.onnx"
    model.write_bytes(model.read_bytes()[:-1])
    with pytest.raises(GateError, match="truncated"):
        read_cargo(run)


@pytest.mark.usefixtures("quick", "without_rsync")
def test_a_report_that_was_damaged_and_a_bundle_that_changes_are_told(
    hosts: Hosts, bundles: dict[str, Path], tmp_path: Path
) -> None:
    device = hosts.add("unlucky")
    shutil.copytree(bundles["first"], tmp_path / "bundle")
    cargo = replace(read_cargo(tmp_path / "bundle"), reports=tmp_path / "shipped")
    (tmp_path / "shipped").mkdir()
    (tmp_path / "shipped" / "unlucky.json").write_text("{")
    model = tmp_path / "bundle" / "models" / "small net.onnx"
    model.rename(model.with_suffix(".gone"))
    (outcome,) = ship(cargo, device)
    assert "small net.onnx: No such file or directory; the bundle changed meanwhile" in str(outcome.error)
    model.with_suffix(".gone").rename(model)
    assert ship(cargo, device)[0].result == "shipped"
    assert read_report(tmp_path / "shipped" / "unlucky.json")["current"]["release"] == cargo.release


def test_every_device_has_its_report_whatever_it_is_called(tmp_path: Path) -> None:
    for name in ("devices", "kitchen"):
        write_report(tmp_path, name, attempt={"result": "shipped"}, accepted=None)
    assert [report["device"] for report in read_reports(tmp_path)] == ["devices", "kitchen"]


def test_an_archive_ships_as_its_folder_does(bundles: dict[str, Path], tmp_path: Path) -> None:
    archive = pack_bundle(bundles["first"], tmp_path / "small.tar")
    with opened_cargo(archive) as packed, opened_cargo(bundles["first"]) as cargo:
        assert (packed.release, packed.files) == (cargo.release, cargo.files)
        assert packed.reports == tmp_path.resolve() / "small.shipped"
        assert packed.folder.is_dir()
    assert not packed.folder.exists()


def test_a_private_key_stays_here(tmp_path: Path) -> None:
    (tmp_path / "public.pem").write_text("-----BEGIN PUBLIC KEY-----")
    assert read_key(tmp_path / "public.pem").startswith(b"-----BEGIN")
    (tmp_path / "private.pem").write_text("-----BEGIN EC PRIVATE KEY-----")
    with pytest.raises(InputError, match="is a private key, which stays here"):
        read_key(tmp_path / "private.pem")
    with pytest.raises(InputError, match="can't be read"):
        read_key(tmp_path / "none.pem")


def test_a_key_goes_along_and_the_device_is_asked_to_use_it(cargoes: dict[str, Cargo]) -> None:
    from compressor.shipping import acceptance

    asked: list[tuple[str, ...]] = []

    class Side:
        class session:
            device = Device("kitchen", "kitchen")

            @staticmethod
            def ask(do: str, payload: bytes | None = None, **facts: Any) -> dict[str, Any]:
                return {"is_here": payload is not None, "path": f"/there/{facts['name']}"}

            understood = nullcontext

        def run(self, module: str, *words: str, timeout_s: float) -> tuple[int, str, str]:
            asked.append(words)
            return 4, "", "error: signed by another key\n"

    with pytest.raises(GateError, match="kitchen: signed by another key"):
        acceptance.accept(Side(), cargoes["first"], "/r", key=b"k", timing=QUICK, say=lambda text: None)  # type: ignore[arg-type]
    assert asked == [("verify", "/r", "--json", "--key", "/there/key.pem")]


def test_ages_are_told_in_words() -> None:
    assert [in_words(seconds) for seconds in (-1, 5, 60, 7200, 200_000)] == [
        *("at an unknown time", "just now", "1 minute ago", "2 hours ago", "2 days ago"),
    ]
    assert 0 <= age_s(now()) < 60
    assert age_s("2999-01-01T00:00:00Z") == 0  # clocks differ
    assert age_s("yesterday") == -1
