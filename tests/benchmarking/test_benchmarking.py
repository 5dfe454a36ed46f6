"""The benchmark on a finished run and on a bundle: what is measured, what is said, what is refused."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from compressor import benchmarking
from compressor.benchmarking import measurement, pages
from compressor.benchmarking.comparison import compare_benchmarks, require_alike
from compressor.benchmarking.places import Place
from compressor.benchmarking.records import CAMERA, OFFLINE, SINGLE, Measured, Options, read_measured
from compressor.cli import app
from compressor.device.environment import cache_bytes
from compressor.errors import FolderError, GateError, InputError
from compressor.report.tables import Table

QUICK = Options(seconds=0.0, runs=70, offline_batch=4, repeats=1, threads=1, on=("onnxruntime",))
SUBJECTS = ["dense", "shipped", "shipped-fp16", "shipped-int8"]


def _silent(stage: str, share: float) -> None:
    """Says nothing."""


@pytest.fixture(scope="module", autouse=True)
def small_pool() -> Any:
    """The pool of images is as large as the caches of a server: too much to write for every process of a test."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measurement, "_POOL_LIMIT_BYTES", 2**18)
        yield


@pytest.fixture(scope="module")
def taken(run: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    out = tmp_path_factory.mktemp("benchmark")
    options = replace(QUICK, rate_hz=400.0, on=("onnxruntime", "onnxruntime-cuda"))
    found = benchmarking.benchmark([benchmarking.open_place(run)], options=options, out=out, notify=_silent)
    return found, out


@pytest.mark.thorough
def test_every_file_is_measured_in_every_scenario(taken: tuple[dict[str, Any], Path]) -> None:
    found, out = taken
    measured = read_measured(out / "benchmark.json")
    assert [s.name for s in measured.subjects] == SUBJECTS
    assert {(t.scenario, t.timing.name) for t in measured.timings} == {
        (scenario, name) for scenario in (SINGLE, OFFLINE, CAMERA) for name in SUBJECTS
    }
    for t in measured.timings:
        assert len(t.timing.samples_ms) >= (24 if t.scenario == OFFLINE else 70)
        assert t.timing.schedule.batch == (4 if t.scenario == OFFLINE else 1)
        assert t.timing.schedule.threads == 1
        assert t.timing.affinity == measured.options.cores != ()
    assert found["speed_up"]["onnxruntime"][SINGLE].keys() == set(SUBJECTS) - {"dense"}


@pytest.mark.thorough
def test_costs_sizes_and_accuracy_are_those_of_the_run(taken: tuple[dict[str, Any], Path], run: Path) -> None:
    measured = read_measured(taken[1] / "benchmark.json")
    summary = json.loads((run / "summary.json").read_text())
    rows = {s.name: s for s in measured.subjects}
    assert (rows["dense"].macs, rows["shipped"].macs) == (summary["macs_dense"], summary["macs_shipped"])
    assert rows["shipped-int8"].parameters == summary["params_shipped"]
    assert rows["shipped-int8"].bytes == (run / "model.int8.onnx").stat().st_size
    for name, file in (("shipped", "model.onnx"), ("shipped-int8", "model.int8.onnx")):
        accuracy = rows[name].accuracy
        assert accuracy is not None
        assert round(accuracy.top1, 4) == summary["precisions"][file]["accuracy"]
        assert accuracy.n == summary["evaluation_images"]
        assert accuracy.correct_top5 >= accuracy.correct


@pytest.mark.thorough
def test_cold_starts_are_of_fresh_processes(taken: tuple[dict[str, Any], Path]) -> None:
    measured = read_measured(taken[1] / "benchmark.json")
    assert [c.name for c in measured.cold] == SUBJECTS
    for cold in measured.cold:
        assert len(cold.load_ms) == len(cold.peak_bytes) == 1
        assert 10**7 < cold.peak_bytes[0] < 5 * 10**8  # a runtime without torch; its parent holds more


@pytest.mark.thorough
def test_the_page_says_what_was_not_run_and_the_parts_are_gone(taken: tuple[dict[str, Any], Path]) -> None:
    found, out = taken
    text = (out / "benchmark.md").read_text()
    assert "n too small" in text  # 70 runs are too few for a p99
    if found["not_run"]:
        assert found["not_run"][0].startswith("onnxruntime-cuda: ")
        assert found["not_run"][0] in text
    assert (out / "benchmark.html").read_text().count("data:image/png") >= 4
    assert not (out / "parts").exists()


@pytest.mark.thorough
def test_it_compares_with_itself_and_refuses_another_machine(taken: tuple[dict[str, Any], Path]) -> None:
    measured = read_measured(taken[1] / "benchmark.json")
    changes = compare_benchmarks(measured, measured)
    assert len(changes) == 3 * len(SUBJECTS)
    assert all(c.speedup.low <= c.speedup.ratio == 1.0 <= c.speedup.high for c in changes)
    other = dict(measured.environment.machine, cpu="another CPU")
    moved = replace(measured, environment=replace(measured.environment, machine=other, fingerprint="0"))
    with pytest.raises(GateError, match=r"cpu was another CPU and is .*measure both again"):
        compare_benchmarks(moved, measured)
    with pytest.raises(GateError, match="threads was 1 and is 2"):
        require_alike(measured, measured.environment, replace(measured.options, threads=2))
    with pytest.raises(GateError, match="nothing is compared"):
        compare_benchmarks(replace(measured, timings=()), measured)


@pytest.mark.thorough
def test_a_comparison_that_will_be_refused_measures_nothing(
    taken: tuple[dict[str, Any], Path], run: Path, tmp_path: Path
) -> None:
    content = json.loads((taken[1] / "benchmark.json").read_text())
    content["environment"]["libraries"]["onnxruntime"] = "0.1"
    content["environment"]["fingerprint"] = "0"
    (tmp_path / "old.json").write_text(json.dumps(content))
    with pytest.raises(GateError, match=r"onnxruntime was 0\.1 and is"):
        benchmarking.benchmark(
            [benchmarking.open_place(run)],
            options=QUICK,
            out=tmp_path / "new",
            notify=_silent,
            other=tmp_path / "old.json",
        )
    assert not (tmp_path / "new").exists()


def _light(folder: Path) -> Place:
    """Dense and shipped alone: every file more is two processes more."""
    place = benchmarking.open_place(folder)
    return replace(place, files=place.files[:2])


class Killed(BaseException):
    """Stands for kill -9."""


@pytest.mark.thorough
def test_what_was_measured_before_an_interruption_is_not_measured_again(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = _light(run)
    time_files, calls = measurement.time_files, []

    def killed_at_the_second(files: Any, images: Any, **more: Any) -> Any:
        calls.append(more["schedule"].batch)
        if len(calls) == 2:
            raise Killed
        return time_files(files, images, **more)

    monkeypatch.setattr(measurement, "time_files", killed_at_the_second)
    with pytest.raises(Killed):
        benchmarking.benchmark([place], options=QUICK, out=tmp_path, notify=_silent)
    said: list[str] = []
    benchmarking.benchmark([place], options=QUICK, out=tmp_path, notify=lambda stage, share: said.append(stage))
    assert "single-stream, onnxruntime (done before)" in said
    assert calls == [1, 4, 4, 1]  # single, killed, offline, cold


@pytest.mark.thorough
def test_a_bundle_is_measured_and_says_what_it_lacks(run: Path, folder: Path) -> None:
    place = benchmarking.open_place(run / "bundle")
    assert [f.artifact.subject for f in place.files] == SUBJECTS[1:]
    assert [f.macs > 0 for f in place.files] == [True] * 3
    assert any("no dense network" in line for line in place.lacks)
    assert any("give --evaluation-data" in line for line in place.lacks)
    judged = benchmarking.open_place(run / "bundle", evaluation_data=str(folder / "images.npz"))
    assert judged.evaluation is not None
    assert len(judged.evaluation.images) == 48


@pytest.mark.thorough
@pytest.mark.slow
def test_two_places_keep_their_names_apart(run: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(run, other)
    places = [_light(run), _light(other)]
    found = benchmarking.benchmark(places, options=QUICK, out=tmp_path / "out", notify=_silent)
    assert set(found["accuracy"]) == {f"{label}/{name}" for label in ("run", "other") for name in SUBJECTS[:2]}
    ratios = found["speed_up"]["onnxruntime"][SINGLE]
    assert set(ratios) == {f"{label}/{name}" for label in ("run", "other") for name in SUBJECTS[1:2]}


def test_the_pool_is_larger_than_the_caches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    images = np.zeros((3, 1, 8, 8), np.float32)
    wanted = min(2**28, 2 * (cache_bytes() or 2**25))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measurement, "_POOL_LIMIT_BYTES", 2**28)
        assert wanted <= measurement.pool_of(images).nbytes < wanted + images.nbytes
        assert len(measurement.pool_of(np.zeros((3, 3, 4000, 4000), np.float32))) >= 3


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("options", "said"),
    [
        (replace(QUICK, on=("onnxruntme",)), "Did you mean 'onnxruntime'"),
        (replace(QUICK, cores=(4711,)), "core 4711 is not among those"),
    ],
)
def test_what_is_not_here_is_refused(run: Path, tmp_path: Path, options: Options, said: str) -> None:
    with pytest.raises(InputError, match=said):
        benchmarking.benchmark([benchmarking.open_place(run)], options=options, out=tmp_path / "x", notify=_silent)
    assert not (tmp_path / "x").exists()


def test_what_is_no_place_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FolderError, match="neither the folder of a finished run nor a bundle"):
        benchmarking.open_place(tmp_path)
    with pytest.raises(InputError, match="cores are written as '0,1'"):
        benchmarking.read_cores("0;1")
    with pytest.raises(InputError, match="no benchmark at"):
        read_measured(tmp_path / "none.json")


@pytest.mark.thorough
@pytest.mark.slow
def test_pytorch_is_timed_in_processes_of_its_own(run: Path, tmp_path: Path) -> None:
    options = replace(QUICK, on=("pytorch", "pytorch-compile"), runs=20)
    found = benchmarking.benchmark([benchmarking.open_place(run)], options=options, out=tmp_path, notify=_silent)
    measured: Measured = read_measured(tmp_path / "benchmark.json")
    assert {t.timing.name for t in measured.timings if t.timing.runtime == "pytorch"} == {"dense", "shipped"}
    assert set(found["speed_up"]) <= {"pytorch", "pytorch-compile"}


def test_the_command_is_there() -> None:
    assert app.registered_commands
    assert "benchmark" in {c.callback.__name__ for c in app.registered_commands if c.callback}


@pytest.mark.thorough
def test_a_busy_machine_is_said_in_the_headline_and_nothing_empty_is_shown(taken: tuple[dict[str, Any], Path]) -> None:
    measured = read_measured(taken[1] / "benchmark.json")

    def loaded(load: str, cores: str) -> Measured:
        environment = measured.environment
        state, machine = {**environment.state, "load_average": load}, {**environment.machine, "cores": cores}
        crowded = replace(environment, state=state, machine=machine)
        timings = tuple(replace(t, timing=replace(t.timing, environment=crowded)) for t in measured.timings)
        return replace(measured, timings=timings, not_run=())

    busy, quiet = (pages.page_of(loaded(load, "2")) for load in ("16.44 9.0 4.0", "1.0 9.0 9.0"))
    assert busy.verdict[0].endswith("(busy machine: load 16.4 on 2 cores).")
    assert busy.warnings[0].startswith("busy machine: load 16.4 on 2 cores when the timing began")
    assert quiet.warnings == ()
    assert "busy" not in quiet.verdict[0]
    tables = [part for section in busy.sections for part in section.parts if isinstance(part, Table)]
    assert [part.title for part in tables if not part.rows] == []
    assert next(s for s in busy.sections if s.anchor == "not-run").text == ("Everything was run.",)
