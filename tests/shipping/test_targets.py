"""A device as what a latency budget is measured on: its text, its workers, and that its files are gone afterwards."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from compressor.budgets import Budget, parse_budget, points_of
from compressor.choices import require_known
from compressor.errors import EngineError, HostError, MissingPackageError, RecipeError
from compressor.export.layers import Layer
from compressor.hosts.address import Device
from compressor.hosts.workers import workers_on
from compressor.latency.clocks import Point, file_clock
from compressor.latency.places import HERE, place_of
from compressor.latency.trial import time_ratio
from compressor.recipe import make_recipe
from tests.device.conftest import SIZE, small_model
from tests.shipping.conftest import Hosts


@pytest.mark.parametrize(
    ("text", "written"),
    [
        ("latency 0.6 on ssh:pi@kitchen", ""),
        ("latency 12 ms on ssh:kitchen runtime openvino threads 1", ""),
        ("30 fps on ssh:kitchen batch 8", ""),
        ("latency 0.6 on ssh:kitchen runtime onnxruntime", "latency 0.6 on ssh:kitchen"),
    ],
)
def test_a_budget_names_a_device(text: str, written: str) -> None:
    budget = parse_budget(text)
    assert str(budget) == (written or text)
    assert parse_budget(str(budget)) == budget
    assert budget.host.endswith("kitchen")


def test_a_sweep_is_on_one_device() -> None:
    assert points_of("latency 0.7,0.5 on ssh:kitchen") == ("latency 0.7 on ssh:kitchen", "latency 0.5 on ssh:kitchen")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("latency 0.6 on ssh:-oProxyCommand=id", "is no address of a device"),
        ("latency 0.6 on ssh:", "is no address of a device"),
        ("latency 0.6 on ssh:kitchen runtime pytorch", "on a device, files are timed"),
        ("latency 0.6 on ssh:kitchen runtime tensorrt", "its engines are built one by one"),
        ("latency 0.6 on onnxruntime runtime openvino", "is not understood"),
    ],
)
def test_a_device_that_can_not_be_meant_is_refused(text: str, words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        parse_budget(text)


@pytest.fixture(scope="module")
def device(hosts: Hosts) -> Device:
    return hosts.add("bench", "a bench")


@pytest.fixture
def inventory(device: Device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Names the device, and one that has no such runtime."""
    path = tmp_path / "devices.toml"
    path.write_text(
        f'[[device]]\nname = "bench"\naddress = "user@bench:a bench"\npython = "{sys.executable}"\n'
        '[[device]]\nname = "gone"\naddress = "user@gone"\n'
    )
    monkeypatch.setenv("COMPRESSOR_DEVICES", str(path))
    return path


def _left(hosts: Hosts, device: Device) -> list[str]:
    folder = hosts.root(device) / ".shipping"
    return [path.name for path in folder.glob("timed-*")] if folder.is_dir() else []


@pytest.mark.usefixtures("inventory")
def test_layers_are_timed_there_and_their_files_taken_away(hosts: Hosts, device: Device) -> None:
    kept: dict[str, float] = {}
    place = place_of(Budget("latency", 0.5, runtime="onnxruntime", host="bench"))
    layer = Layer("conv", (14, 14), (3, 3), (1, 1), (1, 1, 1, 1), (1, 1))
    with file_clock(
        "onnxruntime",
        batch=1,
        threads=1,
        remember=lambda name, measure: kept.setdefault(name, measure()),
        place=place,
    ) as clock:
        narrow, wide = clock([Point(layer, 16, 16), Point(layer, 64, 128)])
    assert 0 < narrow < wide
    assert kept["reference"] > 0
    assert (hosts.root(device) / ".shipping").is_dir()
    assert _left(hosts, device) == []


@pytest.mark.usefixtures("inventory")
def test_networks_are_timed_there_in_turns(hosts: Hosts, device: Device, tmp_path: Path) -> None:
    files = (tmp_path / "dense.onnx", tmp_path / "pruned.onnx")
    for file, channels in zip(files, (512, 8), strict=True):
        file.write_bytes(small_model(channels).SerializeToString())
    images = np.zeros((4, 3, SIZE, SIZE), np.float32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("compressor.latency.trial.SECONDS", 0.0)
        patch.setattr("compressor.latency.trial._MOST_REPEATS", 1)
        ratio = time_ratio(files, images, Budget("latency", 0.5, runtime="onnxruntime", threads=2, host="bench"))
    assert ratio.value < 0.9
    assert ratio.clock == "wall"
    assert _left(hosts, device) == []


@pytest.mark.usefixtures("inventory")
def test_a_device_that_is_not_there_or_lacks_the_runtime_is_named_before_the_long_work(hosts: Hosts) -> None:
    with pytest.raises(HostError, match=r"gone: the connection ended: .*is the name right"):
        require_known(make_recipe({"budget": "latency 0.6 on ssh:gone"}))
    text = "latency 0.6 on ssh:bench runtime onnxruntime-cuda"
    with pytest.raises((MissingPackageError, EngineError), match=r"can't be measured on bench: onnxruntime-cuda "):
        require_known(make_recipe({"budget": text}))

    calls = (hosts.folder / "calls").read_text()
    there = place_of(parse_budget(text)).stands_for("onnxruntime-cuda")
    assert there == HERE.stands_for("onnxruntime-cuda")  # the stand-in is this machine
    assert (hosts.folder / "calls").read_text() == calls  # a device is asked once


def test_a_worker_that_dies_there_is_named_with_the_device(device: Device) -> None:
    with (
        workers_on(device) as start,
        start("no.such.module", name="the timing") as ask,
        pytest.raises(EngineError, match=r"the timing on bench-a-bench ended with code 1: .*No module named 'no'"),
    ):
        ask({"do": "x"})


def test_a_login_shells_words_are_no_answers(hosts: Hosts, device: Device) -> None:
    hosts.fault("bench", "chatter")
    try:
        with workers_on(device) as start, start("compressor.device.worker", name="the timing") as ask:
            assert ask({"do": "close"})["peak_bytes"] > 0
    finally:
        hosts.mend("bench")


def test_here_workers_are_this_machines() -> None:
    with HERE.workers() as start, start("compressor.device.worker", name="the timing") as ask:
        assert ask({"do": "close"})["event"] == "answer"
