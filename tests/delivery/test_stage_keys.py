"""Delivery's stages are done again for every change that they depend on, and for no other.

What could not be built or run here is tried again once it can, and is said in every run until then.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from torch import fx, nn

from compressor.delivery import engines, flow, gates, latency, precisions
from compressor.delivery.artifacts import DENSE, SHIPPED, Artifact
from compressor.delivery.results import Delivery, Engines, Files, Outcome
from compressor.device.builder import EngineRecord
from compressor.device.parity import Parity
from compressor.errors import EngineError, MissingPackageError
from compressor.export.int8 import Quantised
from compressor.files import write_bytes
from compressor.inputs.images import Preprocessing
from compressor.records import Accuracy, InputSpec
from compressor.run.fingerprints import Known
from compressor.run.stages import Stages, open_run
from compressor.run.task_choice import Chosen
from compressor.run.tasking import NetworkTask
from compressor.run.work import Work

NOT_HERE = "an engine for SM86 needs: not installed: pip install tensorrt-rtx"
GPU = ("a card", "SM86")
RECIPE: dict[str, Any] = {
    "model": "small",
    "budget": "macs 0.5",
    "targets": ("SM86",),
    "latency_batches": (1,),
    "latency_seconds": 0.0,
    "runtimes": ("tensorrt_rtx",),
    "precisions": ("int8",),
    "max_parity": 1.0,
    "max_accuracy_loss": 100.0,
    "max_int8_loss": 100.0,
    "batch_size": 8,
}
TASK = NetworkTask(Chosen("classification", "as asked for"), None, fx.symbolic_trace(nn.Linear(4, 4)), "classes")
SAME = Parity(16, 0.0, 0.0, 1.0, 300.0, 1.0, 1.0)


class Machine:
    """What of a machine the stages ask for, with quick stand-ins for what takes long."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.library, self.gpu = "", False
        self.onnxruntime, self.fingerprint, self.exporter = "1.0", "a machine", "an exporter"
        self.built: list[str] = []
        self.timed: list[list[str]] = []
        self._builds_engines(patch)
        self._makes_files(patch)
        self._measures(patch)

    def _builds_engines(self, patch: pytest.MonkeyPatch) -> None:
        patch.setattr(engines, "supported_targets", lambda: {"SM86": "" if self.library else NOT_HERE})
        patch.setattr(engines, "version_of", lambda name: self.library if name == "tensorrt_rtx" else "")
        patch.setattr(engines, "build_engine", self.build)
        for module in (engines, latency):
            patch.setattr(module.cuda, "unavailable", lambda: "" if self.gpu else "no GPU")
            patch.setattr(module.cuda, "device", lambda: GPU)

    def _makes_files(self, patch: pytest.MonkeyPatch) -> None:
        patch.setattr(flow, "export_onnx", self.export)
        patch.setattr(precisions, "collect", lambda path, images: None)
        patch.setattr(precisions, "find_rounding", lambda path, images: None)
        patch.setattr(precisions, "node_layers", lambda path, layers: {})
        patch.setattr(precisions, "gathered", lambda batches, count: (np.zeros((count, 1)), np.zeros(count)))
        patch.setattr(precisions, "_judge", lambda *images: lambda path, placement: 0.9)
        patch.setattr(precisions, "to_fp16", _halved)
        patch.setattr(precisions, "quantise", _quantised)

    def _measures(self, patch: pytest.MonkeyPatch) -> None:
        patch.setattr(gates, "version_of", lambda name: self.onnxruntime)
        patch.setattr(gates, "measure_export", lambda path, network, images, fused: {1: SAME})
        patch.setattr(gates, "accuracy_of", lambda path, images, fused, metric: Accuracy(900, 1000, metric=metric))
        patch.setattr(latency, "read_environment", lambda: SimpleNamespace(fingerprint=self.fingerprint))
        patch.setattr(latency, "available", lambda: {"tensorrt_rtx": "", "onnxruntime": ""})
        patch.setattr(latency, "time_files", self.time)
        patch.setattr(latency, "profile_kernels", lambda path, images: [])
        patch.setattr(latency, "layer_times_ms", lambda path, kernels, layers: {"stem": 1.0})

    def export(self, network: object, example: object, path: Path, **more: object) -> None:
        write_bytes(path, f"{path.name} of {self.exporter}".encode())

    def build(self, source: Path, path: Path, *, target: str, **rest: object) -> EngineRecord:
        if not self.library:
            raise MissingPackageError(NOT_HERE)
        if self.library == "broken":
            raise EngineError("the builder failed")
        self.built.append(target)
        path.write_bytes(f"engine of {self.library}".encode())
        path.with_name(path.name + ".json").write_text("{}")
        status = "built, not run: no GPU"
        return EngineRecord(str(path), "", 1, "", "", "tensorrt_rtx", self.library, (), "fp32", {}, 1.0, False, status)

    def time(self, files: dict[str, Path], *rest: object, **more: object) -> dict[str, Any]:
        self.timed.append(sorted(files))
        return {}


def _halved(path: Path, out: Path, **more: object) -> SimpleNamespace:
    write_bytes(out, b"half of " + path.read_bytes())
    return SimpleNamespace(islands={"node": 1.0})


def _quantised(path: Path, out: Path, *, placement: Any, **more: object) -> Quantised:
    write_bytes(out, b"int8 of " + path.read_bytes())
    return Quantised(str(out), placement, "minmax", {"minmax": 0.9}, (), 0.9, 0.9, 8)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    return Machine(monkeypatch)


def _work(folder: Path, *, hashes: dict[str, str] | None = None, pixel: float = 0.0, **asked: Any) -> Work:
    """As a new process has it; `asked` are the recipe's."""
    stages: Stages = open_run(folder, {}, lambda stage, share: None)
    with stages.begun():
        pass
    stages.keys.update(groups="groups", finetune="finetune")
    parts = {"calibration": "c", "search": "s", "evaluation": "e", **(hashes or {})}
    return cast(
        Work,
        SimpleNamespace(
            recipe=SimpleNamespace(**{**RECIPE, **asked}),
            stages=stages,
            splits=SimpleNamespace(hashes=parts, calibration=range(40), search=range(0)),
            dense=fx.symbolic_trace(nn.Linear(4, 4)),
            calibration=None,
            prepared_as={},
            inputs=(InputSpec((3, 8, 8)),),
            evaluation_images=Known(None, parts["evaluation"]),
            preprocessing=Preprocessing((8, 8), (8,), "bilinear", (0.5,) * 3, (0.5,) * 3),
            sample=lambda count: np.full((count, 3, 8, 8), pixel, np.float32),
        ),
    )


# every stage, and what it depends on


def _delivered(work: Work) -> Delivery:
    """All of delivery's stages."""
    accuracy = {"dense": Accuracy(900, 1000), "shipped": Accuracy(900, 1000)}
    nothing: Any = None
    return list(flow._steps(work, Outcome(nothing, nothing, work.dense, accuracy, {}, TASK)))[-1]


STAGES = {"onnx", "fp16", "int8", "parity", "accuracy of the files", "engines", "latency", "layers"}
FROM_FILES = STAGES - {"onnx"}
LOWERED = {"fp16", "int8"}
RUN = {"parity", "accuracy of the files"}

CHANGES: dict[str, tuple[dict[str, Any], set[str]]] = {
    "nothing": ({}, set()),
    "the budget, which is in the files": ({"budget": "macs 0.6"}, {"onnx"}),
    "the loss that int8 may have": ({"max_int8_loss": 50.0}, {"int8"}),
    "fp32's limit": ({"max_parity": 0.5}, set()),
    "the accuracy that may go": ({"max_accuracy_loss": 50.0}, set()),
    "fewer precisions": ({"precisions": ("fp16",)}, RUN | {"engines", "latency"}),
    "other calibration images": ({"hashes": {"calibration": "d"}}, LOWERED),
    "other spare images": ({"hashes": {"search": "t"}}, {"int8"}),
    "other evaluation images": ({"hashes": {"evaluation": "f"}}, {"accuracy of the files"}),
    "other pixels": ({"pixel": 1.0}, {"parity", "latency", "layers"}),
    "another batch size": ({"latency_batches": (1, 32)}, {"engines", "latency"}),
    "more time": ({"latency_seconds": 1.0}, {"latency"}),
    "another runtime": ({"runtimes": ("tensorrt_rtx", "onnxruntime")}, {"latency"}),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_does_again_what_depends_on_it_and_nothing_else(machine: Machine, tmp_path: Path, change: str) -> None:
    asked, again = CHANGES[change]
    _delivered(_work(tmp_path / "run"))
    work = _work(tmp_path / "run", **asked)
    _delivered(work)
    done = set(work.stages.costs)
    assert done == STAGES - ({"int8"} if asked.get("precisions") else set())
    assert done - set(work.stages.reused) == again


@pytest.mark.parametrize(
    ("what", "value", "again"),
    [
        ("exporter", "a newer one", FROM_FILES),
        ("onnxruntime", "1.1", LOWERED | RUN),
        ("fingerprint", "another machine", {"latency", "layers"}),
        ("library", "1.0", {"engines", "latency"}),
        ("gpu", True, {"engines"}),
    ],
)
def test_another_machine_does_again_what_depends_on_it(
    machine: Machine, tmp_path: Path, what: str, value: object, again: set[str]
) -> None:
    _delivered(_work(tmp_path / "run"))
    setattr(machine, what, value)
    work = _work(tmp_path / "run")
    if what == "exporter":
        (work.stages.folder / SHIPPED.name).unlink()  # so that the files are exported at all
        again = {*again, "onnx"}
    _delivered(work)
    assert set(work.stages.costs) - set(work.stages.reused) == again


def test_another_network_is_exported_compared_and_timed_anew(machine: Machine, tmp_path: Path) -> None:
    _delivered(_work(tmp_path / "run"))
    work = _work(tmp_path / "run")
    work.stages.keys["finetune"] = "of more epochs"
    _delivered(work)
    assert set(work.stages.costs) - set(work.stages.reused) == {"onnx", "parity", "latency"}


def test_every_input_of_every_stage_is_in_its_key(
    machine: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[tuple[str, Callable[..., Any], Any, dict[str, Any]]] = []
    make = Stages.make

    def noted(stages: Stages, name: str, compute: Any, keeper: Any, **inputs: Any) -> Any:
        made.append((name, compute, keeper, inputs))
        return make(stages, name, compute, keeper, **inputs)

    monkeypatch.setattr(Stages, "make", noted)
    _delivered(_work(tmp_path / "run"))
    assert {name for name, *_ in made} == STAGES

    for name, compute, keeper, inputs in made:
        for changed, given in inputs.items():
            value = given.value if isinstance(given, Known) else given
            other = "elsewhere" if changed == "place" else Known(value, "another")
            stages = open_run(tmp_path / "run", {}, lambda stage, share: None)
            make(stages, name, compute, keeper, **{**inputs, changed: other})
            assert stages.reused == [], f"{name} without {changed}"
            make(stages, name, compute, keeper, **inputs)  # as it was, for the next


# what is not here


def _built(folder: Path) -> tuple[Work, Engines]:
    work = _work(folder)
    return work, engines.build_engines(work, _files(folder))


def _files(folder: Path) -> Files:
    """The two networks' files, as if they had been exported."""
    paths: dict[Artifact, Path] = {artifact: folder / artifact.name for artifact in (DENSE, SHIPPED)}
    for artifact, path in paths.items():
        path.write_bytes(artifact.name.encode())
    return Files(paths)


def test_an_engine_is_tried_again_once_its_library_is_here(machine: Machine, tmp_path: Path) -> None:
    _, asked = _built(tmp_path / "run")
    assert [engine.path for engine in asked.asked] == [""]
    work, asked = _built(tmp_path / "run")
    assert work.stages.reused == ["engines"]
    assert any(NOT_HERE in line for line in asked.checks.not_checked)
    machine.library = "1.0"
    work, asked = _built(tmp_path / "run")
    assert [engine.path for engine in asked.built] == ["engines/sm86.fp32.engine"]
    assert (tmp_path / "run" / "engines" / "sm86.fp32.engine").read_bytes() == b"engine of 1.0"
    work, _ = _built(tmp_path / "run")
    assert (work.stages.reused, machine.built) == (["engines"], ["SM86"])


@pytest.mark.parametrize("change", ["version", "gpu", "engine", "sidecar"])
def test_engines_are_built_anew_for_another_version_or_gpu_and_where_they_are_damaged(
    machine: Machine, tmp_path: Path, change: str
) -> None:
    machine.library = "1.0"
    _built(tmp_path / "run")
    file = tmp_path / "run" / "engines" / "sm86.fp32.engine"
    if change == "version":
        machine.library = "1.1"
    elif change == "gpu":
        machine.gpu = True
    else:
        (file if change == "engine" else file.with_name(file.name + ".json")).write_bytes(b"x")
    work, _ = _built(tmp_path / "run")
    assert (work.stages.reused, len(machine.built)) == ([], 2)
    assert file.read_bytes() == f"engine of {machine.library}".encode()


def test_no_engine_for_this_gpu_is_said_in_every_run_and_one_that_is_built_then_is_timed(
    machine: Machine, tmp_path: Path
) -> None:
    said = "latency on tensorrt_rtx: no engine was built for this GPU"
    networks = Known({}, "networks")

    def timed() -> tuple[Work, tuple[str, ...]]:
        work, asked = _built(tmp_path / "run")
        measured = latency.measure_latency(work, _files(tmp_path / "run"), asked, networks)
        return work, measured.checks.not_checked

    for expected in ([], ["engines", "latency"]):
        work, not_checked = timed()
        assert work.stages.reused == expected
        assert said in not_checked
    assert machine.timed == []
    machine.library = "1.0"
    _, not_checked = timed()
    assert said not in not_checked
    assert machine.timed == [["shipped"]]


def test_a_gate_that_fails_ends_the_stages_and_is_the_last_of_the_checks(machine: Machine, tmp_path: Path) -> None:
    work = _work(tmp_path / "run", max_accuracy_loss=-1.0)
    nothing: Any = None
    accuracy = {"dense": Accuracy(900, 1000), "shipped": Accuracy(890, 1000)}
    delivery, failure = flow._delivered(work, Outcome(nothing, nothing, work.dense, accuracy, {}, TASK))
    assert "accuracy: top-1 lost" in str(failure)
    assert [gate.failed for gate in delivery.checks.gates] == [True]
    assert set(work.stages.costs) == set()


def test_a_file_that_cannot_be_measured_is_a_failed_gate_behind_those_that_were(
    machine: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(path: Path, network: object, images: object, fused: bool) -> dict[int, Parity]:
        raise gates.GateError("the file has a fixed batch")

    monkeypatch.setattr(gates, "measure_export", refused)
    work = _work(tmp_path / "run")
    nothing: Any = None
    accuracy = {"dense": Accuracy(900, 1000), "shipped": Accuracy(900, 1000)}
    delivery, failure = flow._delivered(work, Outcome(nothing, nothing, work.dense, accuracy, {}, TASK))
    assert str(failure) == "the file has a fixed batch"
    names = [gate.name for gate in delivery.checks.gates]
    assert names[0] == "accuracy: top-1 lost"
    assert names[-1] == "parity: dense.onnx"
    assert delivery.checks.gates[-1].failed
    assert len(delivery.files.paths) == 5
    assert not delivery.accuracy.by_file
