"""The benchmark's last line, from a measurement made up: medians, ratios, changes, and refusals before any work."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from compressor import benchmarking
from compressor.__main__ import main
from compressor.benchmarking import read_cores, summary_of
from compressor.benchmarking.comparison import Change
from compressor.benchmarking.places import Place
from compressor.benchmarking.records import SINGLE, Options, read_measured, write_measured
from compressor.device.timing import Speedup
from compressor.errors import GateError, InputError

from .made import ENVIRONMENT, OPTIONS, measured, subject


@pytest.mark.parametrize(("text", "cores"), [("0,1", (0, 1)), (" 3 , 0 ", (3, 0)), ("", ()), ("7,", (7,))])
def test_cores_are_numbers_between_commas(text: str, cores: tuple[int, ...]) -> None:
    assert read_cores(text) == cores


@pytest.mark.parametrize("text", ["0-1", "a", "-1", "0;1", "1.5"])
def test_anything_else_is_no_list_of_cores(text: str) -> None:
    with pytest.raises(InputError, match=f"not '{text}'"):
        read_cores(text)


def test_the_last_line_holds_the_figures_of_the_page() -> None:
    change = Change("dense", "onnxruntime", SINGLE, 4.0, 2.0, Speedup("dense", "dense", 2.0, 1.91239, 2.1))
    taken = measured(not_run=("openvino: not installed",), subjects=(subject("dense", 90), subject("shipped", None)))
    summary = json.loads(json.dumps(summary_of(taken, [change], Path("out"))))  # as it is printed
    assert summary["benchmark"] == "out/benchmark.json"
    assert summary["page"] == "out/benchmark.html"
    assert summary["fingerprint"] == ENVIRONMENT.fingerprint
    assert summary["accuracy"] == {"dense": 0.9, "shipped": None}
    assert summary["p50_ms"] == {
        "dense on onnxruntime": 4.0,
        "shipped on onnxruntime": 2.0,
        "shipped-int8 on onnxruntime": 1.0,
    }
    assert summary["speed_up"]["onnxruntime"][SINGLE] == {"shipped": [2.0] * 3, "shipped-int8": [4.0] * 3}
    assert summary["changes"] == [["dense", "onnxruntime", SINGLE, 2.0, 1.9124, 2.1]]
    assert (summary["busy"], summary["not_run"]) == ("", ["openvino: not installed"])


def place(label: str, size_px: int = 4) -> Place:
    return Place(label, Path(label), "", (), np.zeros((2, 3, size_px, size_px), np.float32), None, ())


def _silent(stage: str, share: float) -> None:
    """Says nothing."""


@pytest.fixture
def measuring(monkeypatch: pytest.MonkeyPatch) -> list[Options]:
    """What was asked to be measured; nothing is."""
    asked: list[Options] = []

    def measure(places: object, options: Options, out: Path, notify: object) -> object:
        asked.append(options)
        return measured()

    monkeypatch.setattr(benchmarking, "measure", measure)
    monkeypatch.setattr(benchmarking, "read_environment", lambda: ENVIRONMENT)
    monkeypatch.setattr(benchmarking, "resolved", lambda options: options)
    monkeypatch.setattr(benchmarking.pages, "draw", lambda drawings: {name: b"" for name, _ in drawings})
    return asked


def test_places_of_different_images_are_refused_before_anything_is_measured(
    measuring: list[Options], tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=r"\[3, 4, 4\]; \[3, 8, 8\]\); measure them apart"):
        benchmarking.benchmark([place("a"), place("b", 8)], options=OPTIONS, out=tmp_path, notify=_silent)
    assert measuring == []


def test_a_comparison_that_would_be_refused_measures_nothing(measuring: list[Options], tmp_path: Path) -> None:
    old = tmp_path / "old.json"
    write_measured(measured(options=replace(OPTIONS, threads=2)), old)
    with pytest.raises(GateError, match="threads was 2 and is 1"):
        benchmarking.benchmark([place("a")], options=OPTIONS, out=tmp_path / "out", notify=_silent, other=old)
    assert measuring == []
    assert not (tmp_path / "out").exists()


def test_what_was_measured_is_written_whole_and_compared(measuring: list[Options], tmp_path: Path) -> None:
    old, out = tmp_path / "old.json", tmp_path / "out"
    write_measured(measured(), old)
    (out / "parts").mkdir(parents=True)
    summary = benchmarking.benchmark([place("a")], options=OPTIONS, out=out, notify=_silent, other=old)
    assert read_measured(out / "benchmark.json") == measured()
    assert len(summary["changes"]) == len(measured().timings)
    assert f"Compared with {old}." in (out / "benchmark.md").read_text()
    assert "shipped-int8" in (out / "benchmark.html").read_text()
    assert not (out / "parts").exists()


@pytest.mark.parametrize(
    ("more", "data"),
    [
        ((), ""),  # and not the evaluation images of the model that is taken where none is named
        (("--evaluation-data", "photos"), "photos"),
        (("--recipe", "r.toml"), "apart"),
    ],
)
def test_a_bundle_is_judged_on_images_that_were_named_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, more: tuple[str, ...], data: str
) -> None:
    (tmp_path / "r.toml").write_text('evaluation_data = "apart"')
    monkeypatch.chdir(tmp_path)
    asked: list[str] = []

    def opened(path: Path, *, evaluation_data: str, trust: bool, key: Path | None) -> None:
        asked.append(evaluation_data)
        raise InputError("enough")

    monkeypatch.setattr(benchmarking, "opened_place", opened)
    assert main(["benchmark", "bundle", *more]) == InputError.exit_code
    assert asked == [data]
