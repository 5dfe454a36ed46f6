"""A benchmark on disk: everything comes back as it was, and what is none is refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from compressor.benchmarking.records import read_measured, write_measured
from compressor.errors import FolderError, GateError, InputError
from compressor.records import Quality

from .made import measured, subject, timing


def test_a_benchmark_comes_back_as_it_went(tmp_path: Path) -> None:
    decibels = Quality("PSNR", 30.0, 100, 29.0, 31.0, is_share=False)
    subjects = (subject("dense", None), subject("shipped", 3), subject("other", None, accuracy=decibels))
    taken = measured(not_run=("openvino: not installed",), subjects=subjects)
    write_measured(taken, tmp_path / "benchmark.json")
    assert read_measured(tmp_path / "benchmark.json") == taken


def test_every_raw_sample_is_in_the_file(tmp_path: Path) -> None:
    write_measured(measured(), tmp_path / "benchmark.json")
    content = json.loads((tmp_path / "benchmark.json").read_text())
    assert [row["samples_ms"] for row in content["timings"]][:3] == [[4.0] * 4, [2.0] * 4, [1.0] * 4]
    assert {row["scenario"] for row in content["timings"]} == {"single-stream", "offline"}


def test_no_file_holds_a_number_that_json_does_not_know(tmp_path: Path) -> None:
    first = measured().timings[0]
    broken = measured(timings=(replace(first, timing=timing("dense", float("nan"))),))
    with pytest.raises(GateError, match="no finite number"):
        write_measured(broken, tmp_path / "benchmark.json")
    assert list(tmp_path.iterdir()) == []


def drop(name: str) -> Callable[[dict[str, Any]], Any]:
    return lambda content: content.pop(name)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (drop("timings"), "KeyError: 'timings'"),
        (drop("environment"), "KeyError: 'environment'"),
        (lambda content: content["options"].update(speed=3), "TypeError"),
        (lambda content: content["subjects"][0].pop("name"), "TypeError"),
        (lambda content: content["cold"][0].pop("load_ms"), "KeyError: 'load_ms'"),
        (lambda content: content["timings"][0].update(schema="other"), "InputError"),
    ],
)
def test_a_file_that_is_no_whole_benchmark_is_one_clear_line(
    tmp_path: Path, damage: Callable[[dict[str, Any]], Any], words: str
) -> None:
    path = tmp_path / "benchmark.json"
    write_measured(measured(), path)
    content = json.loads(path.read_text())
    damage(content)
    path.write_text(json.dumps(content))
    with pytest.raises(InputError, match=f"is no whole benchmark .{words}"):
        read_measured(path)


def test_a_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    (tmp_path / "report.json").write_text('{"schema": "report/2"}')
    with pytest.raises(FolderError, match=r"has schema 'report/2', expected 'benchmark/2'"):
        read_measured(tmp_path / "report.json")
    with pytest.raises(InputError, match="no benchmark at"):
        read_measured(tmp_path / "none.json")
