"""Where a measurement was taken: read from a system of files made up here, and what the fingerprint rests on."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from compressor.device import environment
from compressor.device.environment import cache_bytes, pin, read_environment, resident_bytes


def caches(folder: Path, *sizes: str) -> Path:
    for index, size in enumerate(sizes):
        (folder / f"index{index}").mkdir()
        (folder / f"index{index}" / "size").write_text(f"{size}\n")
    return folder


@pytest.mark.parametrize(
    ("sizes", "expected_bytes"),
    [
        (("32K", "1M", "512K"), 2**20),
        (("48K", "36608K"), 36_608 * 2**10),
        (("1G",), 2**30),
        (("unknown", "32K"), 32 * 2**10),
        (("32", "K", ""), 0),
        ((), 0),
    ],
)
def test_the_largest_cache_counts_whatever_its_unit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sizes: tuple[str, ...], expected_bytes: int
) -> None:
    monkeypatch.setattr(environment, "_CACHES", caches(tmp_path, *sizes))
    assert cache_bytes() == expected_bytes


@pytest.fixture
def calm(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A machine whose every line is chosen by the test."""
    monkeypatch.setattr(environment, "_cpu_name", lambda: "a CPU")
    monkeypatch.setattr(environment, "_load_average", lambda: "0.10 0.20 0.30")
    versions = {"onnxruntime": "1.0", "onnxruntime-cuda": "1.0"}  # one library, two ways into it
    monkeypatch.setattr(environment, "version_of", lambda name: versions.get(name, ""))
    monkeypatch.setattr(environment.cuda, "unavailable", lambda: "no GPU")
    return monkeypatch


def test_the_fingerprint_is_of_machine_and_libraries(calm: pytest.MonkeyPatch) -> None:
    first = read_environment()
    assert read_environment().fingerprint == first.fingerprint
    calm.setattr(environment, "_load_average", lambda: "99.00 0.20 0.30")
    assert read_environment().fingerprint == first.fingerprint
    calm.setattr(environment, "_cpu_name", lambda: "another CPU")
    second = read_environment()
    calm.setattr(environment, "version_of", lambda name: "1.1" if name == "onnxruntime" else "")
    third = read_environment()
    assert len({first.fingerprint, second.fingerprint, third.fingerprint}) == 3
    assert all(len(one.fingerprint) == 16 and int(one.fingerprint, 16) >= 0 for one in (first, second, third))


def test_a_gpu_is_part_of_the_machine_and_its_fingerprint(calm: pytest.MonkeyPatch) -> None:
    without = read_environment()
    calm.setattr(environment.cuda, "unavailable", lambda: "")
    calm.setattr(environment.cuda, "device", lambda: ("A GPU", "SM86"))
    assert without.machine["gpu"] == ""
    assert read_environment().machine["gpu"] == "A GPU SM86"
    assert read_environment().fingerprint != without.fingerprint


def test_a_library_is_listed_once_and_only_where_it_is(calm: pytest.MonkeyPatch) -> None:
    assert set(read_environment().libraries) == {"python", "numpy", "onnxruntime"}


@pytest.mark.parametrize(
    ("lines", "name"),
    [
        ("processor : 0\nmodel name\t: Fast CPU @ 3.00GHz\n", "Fast CPU @ 3.00GHz"),
        ("processor : 0\nHardware\t: BCM2835: rev 2\n", "BCM2835: rev 2"),
    ],
)
def test_the_name_of_the_processor_is_the_systems(monkeypatch: pytest.MonkeyPatch, lines: str, name: str) -> None:
    monkeypatch.setattr(environment, "_read", lambda path: lines if path == Path("/proc/cpuinfo") else "")
    assert environment._cpu_name() == name


def test_the_board_is_named_without_its_zero_byte(calm: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "model").write_bytes(b"A board rev 1\0")
    calm.setattr(environment, "_BOARD", tmp_path / "model")
    assert read_environment().machine["board"] == "A board rev 1"


def test_what_a_system_does_not_say_is_empty(calm: pytest.MonkeyPatch, tmp_path: Path) -> None:
    calm.setattr(environment, "_BOARD", tmp_path / "none")
    calm.setattr(environment, "_GOVERNOR", tmp_path / "none")
    found = read_environment()
    assert (found.machine["board"], found.state["governor"]) == ("", "")


def test_a_system_without_a_load_average_has_an_empty_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "getloadavg")
    assert environment._load_average() == ""


def test_the_peak_is_the_high_water_mark_in_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    status = "VmPeak:  999999 kB\nVmHWM:\t  1234 kB\nVmRSS:   99 kB\n"
    monkeypatch.setattr(environment, "_read", lambda path: status)
    assert resident_bytes() == 1234 * 1024


def test_pinning_to_nothing_changes_nothing() -> None:
    before = environment.affinity()
    assert pin(()) == before == environment.affinity()
