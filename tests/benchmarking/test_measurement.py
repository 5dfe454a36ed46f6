"""What is measured and how often, by a timer that only writes down what it was asked for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from compressor.benchmarking import measurement
from compressor.benchmarking.measurement import measure, pool_of, resolved, subject_name
from compressor.benchmarking.places import File, Place
from compressor.benchmarking.records import CAMERA, OFFLINE, SINGLE, Options
from compressor.delivery.artifacts import Artifact
from compressor.device.timing import Schedule, Timing
from compressor.errors import InputError
from compressor.tasks import Predict

from .made import ENVIRONMENT, timing

IMAGES = np.arange(3 * 4, dtype=np.float32).reshape(3, 1, 2, 2)
OPTIONS = Options(seconds=3.0, runs=30, offline_batch=8, repeats=3, threads=1, cores=(0,), on=("onnxruntime",))


@dataclass
class Timer:
    """In place of `time_files`: 2 ms for whatever it is given, one sample a turn."""

    calls: list[tuple[tuple[str, ...], Schedule, str]] = field(default_factory=list)

    def __call__(self, files: Mapping[str, Path], images: Any, *, schedule: Schedule, runtime: str, **more: Any) -> Any:
        self.calls.append((tuple(files), schedule, runtime))
        turns = tuple(range(schedule.rounds))
        made = {"schedule": schedule, "turns": turns, "samples_ms": (2.0,) * len(turns)}
        return {name: timing(name, 2.0, runtime, **made) for name in files}


@pytest.fixture
def timer(monkeypatch: pytest.MonkeyPatch) -> Timer:
    timer = Timer()
    monkeypatch.setattr(measurement, "time_files", timer)
    monkeypatch.setattr(measurement, "_POOL_LIMIT_BYTES", 2**10)
    monkeypatch.setattr(measurement, "read_environment", lambda: ENVIRONMENT)
    monkeypatch.setattr(measurement, "available", lambda: {"onnxruntime": "", "openvino": "not installed"})
    return timer


def place_of(folder: Path, label: str = "run", subjects: tuple[str, ...] = ("dense", "shipped")) -> Place:
    files = []
    for subject in subjects:
        variant, _, precision = subject.partition("-")
        path = folder / f"{label}.{subject}.onnx"
        path.write_bytes(subject.encode())
        files.append(File(Artifact(path.name, variant, precision or "fp32"), path, macs=7))  # type: ignore[arg-type]
    return Place(label, folder, "macs 0.5", tuple(files), IMAGES, None, (f"{label} lacks labels",))


def _silent(stage: str, share: float) -> None:
    """Says nothing."""


def test_every_file_is_timed_in_every_scenario_and_started_cold(tmp_path: Path, timer: Timer) -> None:
    taken = measure([place_of(tmp_path)], replace(OPTIONS, rate_hz=30.0), tmp_path / "out", _silent)
    assert [(timed.scenario, timed.timing.name) for timed in taken.timings] == [
        (scenario, name) for scenario in (SINGLE, OFFLINE, CAMERA) for name in ("dense", "shipped")
    ]
    assert [cold.name for cold in taken.cold] == ["dense", "shipped"]
    assert [len(cold.load_ms) for cold in taken.cold] == [3, 3]  # one for each process
    assert all(names == ("dense", "shipped") for names, _, _ in timer.calls)  # they take turns


def test_the_processes_of_a_scenario_share_its_time_and_runs(tmp_path: Path, timer: Timer) -> None:
    taken = measure([place_of(tmp_path)], OPTIONS, tmp_path / "out", _silent)
    single, offline, cold = timer.calls[:3], timer.calls[3:6], timer.calls[6:]
    assert {(schedule.seconds, schedule.runs, schedule.batch) for _, schedule, _ in single} == {(1.0, 10, 1)}
    assert {(schedule.seconds, schedule.batch) for _, schedule, _ in offline} == {(1.0, 8)}
    assert {(schedule.runs, schedule.rounds, schedule.warmup_s) for _, schedule, _ in cold} == {(1, 1, 0)}
    assert taken.timings[0].timing.schedule.seconds == 3.0  # all processes together
    assert all(schedule.threads == 1 and schedule.cores == (0,) for _, schedule, _ in timer.calls)


def test_turns_of_several_processes_are_counted_on(tmp_path: Path, timer: Timer) -> None:
    taken = measure([place_of(tmp_path)], OPTIONS, tmp_path / "out", _silent)
    joined = taken.timings[0].timing
    assert joined.turns == tuple(range(3 * measurement.ROUNDS))
    assert len(joined.samples_ms) == 3 * measurement.ROUNDS
    assert joined.warmup_runs == 3 * 3


def test_one_process_that_did_not_settle_is_enough_to_say_so() -> None:
    calm, restless = timing("a", 2.0), timing("a", 2.0, stable=False)
    assert measurement._joined([calm, calm]).stable
    assert not measurement._joined([calm, restless]).stable


def test_a_runtime_that_is_not_here_and_what_a_place_lacks_are_said(tmp_path: Path, timer: Timer) -> None:
    options = replace(OPTIONS, on=("onnxruntime", "openvino"))
    taken = measure([place_of(tmp_path)], options, tmp_path / "out", _silent)
    assert taken.not_run == ("openvino: not installed", "run lacks labels")
    assert {timed.timing.runtime for timed in taken.timings} == {"onnxruntime"}


def test_an_unknown_runtime_is_refused_before_anything_is_timed(tmp_path: Path, timer: Timer) -> None:
    with pytest.raises(InputError, match=r"no runtime 'openvion'.*Did you mean 'openvino'"):
        measure([place_of(tmp_path)], replace(OPTIONS, on=("openvion",)), tmp_path / "out", _silent)
    assert timer.calls == []


def test_rows_say_what_each_file_is(tmp_path: Path, timer: Timer) -> None:
    place = place_of(tmp_path, subjects=("dense", "shipped-int8"))
    dense, shipped = measure([place], OPTIONS, tmp_path / "out", _silent).subjects
    assert (dense.name, dense.variant, dense.precision, dense.budget) == ("dense", "dense", "fp32", "")
    assert (shipped.name, shipped.variant, shipped.precision) == ("shipped-int8", "shipped", "int8")
    assert (shipped.budget, shipped.macs, shipped.parameters) == ("macs 0.5", 7, -1)
    assert shipped.bytes == len("shipped-int8")
    assert shipped.accuracy is None


def test_several_places_have_names_of_their_own(tmp_path: Path, timer: Timer) -> None:
    places = [place_of(tmp_path, "a"), place_of(tmp_path, "b", ("shipped",))]
    taken = measure(places, OPTIONS, tmp_path / "out", _silent)
    assert [row.name for row in taken.subjects] == ["a/dense", "a/shipped", "b/shipped"]
    assert taken.title == "a and b"
    assert subject_name(places[:1], places[0], "dense") == "dense"


def test_what_was_measured_is_taken_from_disk_until_a_file_or_the_machine_changes(
    tmp_path: Path, timer: Timer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def calls_of_another_start() -> int:
        timer.calls.clear()
        measure([place], OPTIONS, tmp_path / "out", _silent)
        return len(timer.calls)

    place = place_of(tmp_path)
    assert calls_of_another_start() == 9
    assert calls_of_another_start() == 0
    place.files[0].path.write_bytes(b"another model")
    assert calls_of_another_start() == 9
    monkeypatch.setattr(measurement, "read_environment", lambda: replace(ENVIRONMENT, fingerprint="other"))
    assert calls_of_another_start() == 9


def test_the_pool_holds_copies_of_the_images_in_no_pattern(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measurement, "cache_bytes", lambda: 800)
    images = np.arange(10, dtype=np.float32).reshape(10, 1, 1, 1)
    pool = pool_of(images)
    assert pool.nbytes == 1600  # twice the cache
    assert set(pool.ravel()) == set(range(10))
    assert not (np.diff(pool.ravel()) == 1).all()
    np.testing.assert_array_equal(pool_of(images), pool)  # the same in every process
    monkeypatch.setattr(measurement, "cache_bytes", lambda: 0)
    assert pool_of(np.zeros((1, 1, 1024, 1024), np.float32)).nbytes == 2 * measurement._CACHE_GUESS_BYTES


@pytest.mark.parametrize(
    ("cores", "threads", "expected"),
    [((), 0, ((2, 5), 2)), ((5,), 0, ((5,), 1)), ((), 7, ((2, 5), 7)), ((2, 5), 1, ((2, 5), 1))],
)
def test_cores_and_threads_are_all_that_may_be_used_unless_told_otherwise(
    monkeypatch: pytest.MonkeyPatch, cores: tuple[int, ...], threads: int, expected: tuple[tuple[int, ...], int]
) -> None:
    monkeypatch.setattr(measurement, "affinity", lambda: (2, 5))
    options = resolved(Options(cores=cores, threads=threads))
    assert (options.cores, options.threads) == expected


def test_a_core_that_may_not_be_used_is_refused_where_the_system_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measurement, "affinity", lambda: (2, 5))
    with pytest.raises(InputError, match="core 3 is not among those this process may use: 2, 5"):
        resolved(Options(cores=(2, 7, 3)))
    monkeypatch.setattr(measurement, "affinity", lambda: ())
    assert resolved(Options(cores=(3,))).cores == (3,)


def test_networks_in_pytorch_are_timed_by_one_process_each(
    tmp_path: Path, timer: Timer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measurement, "unavailable", lambda way: "")
    place = replace(place_of(tmp_path), networks=tmp_path)
    taken = measure([place], replace(OPTIONS, on=("pytorch",)), tmp_path / "out", _silent)
    assert [runtime for _, _, runtime in timer.calls] == ["pytorch"] * 2  # single and offline, no cold starts
    assert [schedule.seconds for _, schedule, _ in timer.calls] == [3.0, 3.0]
    assert [(cold.name, len(cold.load_ms)) for cold in taken.cold] == [("dense", 1), ("shipped", 1)]
    alone = measure([place_of(tmp_path)], replace(OPTIONS, on=("pytorch",)), tmp_path / "other", _silent)
    assert alone.timings == ()
    assert isinstance(taken.timings[0].timing, Timing)


LEAVES = {"dense": torch.eye(3), "shipped": torch.eye(3)[[0, 1, 1]]}  # the shipped network is wrong on the third


def judged_place(folder: Path, monkeypatch: pytest.MonkeyPatch, labels: list[int], task: str) -> Place:
    """Two files of which each answers three images with three classes."""

    def predict_of_file(path: Path) -> Predict:
        return lambda inputs: {"output": LEAVES["dense" if "dense" in path.name else "shipped"]}

    monkeypatch.setattr(measurement, "predict_of_file", predict_of_file)
    evaluation: Any = [(torch.zeros(3, 1), torch.tensor(labels))]
    return replace(place_of(folder), evaluation=evaluation, task=task)


def test_files_are_judged_by_the_task_and_without_labels_by_the_dense_file(
    tmp_path: Path, timer: Timer, monkeypatch: pytest.MonkeyPatch
) -> None:
    for task, metric in (("classification", "agreement"), ("any", "fidelity")):
        place = judged_place(tmp_path, monkeypatch, [-1, -1, -1], task)
        dense, shipped = measure([place], OPTIONS, tmp_path / task, _silent).subjects
        assert dense.accuracy is not None
        assert shipped.accuracy is not None
        assert (dense.accuracy.metric, dense.accuracy.value) == (metric, 1.0)
        assert shipped.accuracy.value < 1
    agreeing = measure([judged_place(tmp_path, monkeypatch, [-1] * 3, "classification")], OPTIONS, tmp_path, _silent)
    assert agreeing.subjects[1].accuracy is not None
    assert agreeing.subjects[1].accuracy.value == pytest.approx(2 / 3)


def test_what_only_a_users_code_can_judge_is_a_line_of_what_was_not_run(
    tmp_path: Path, timer: Timer, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = judged_place(tmp_path, monkeypatch, [-1, -1, -1], "detection")
    taken = measure([place], OPTIONS, tmp_path / "out", _silent)
    assert [row.accuracy for row in taken.subjects] == [None, None]
    assert [line.partition(": ")[0] for line in taken.not_run[1:]] == ["accuracy of dense", "accuracy of shipped"]
    assert all("decode" in line for line in taken.not_run[1:])
    assert taken.timings != ()
