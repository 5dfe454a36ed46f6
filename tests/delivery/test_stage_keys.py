"""What could not be built or run here is tried again once it can, and is said in every run until then."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from compressor.delivery import engines, latency
from compressor.delivery.artifacts import DENSE, SHIPPED, Findings
from compressor.errors import EngineError, MissingPackageError
from compressor.run.stages import Stages, open_run
from compressor.run.work import Work

NOT_HERE = "an engine for SM86 needs: not installed: pip install tensorrt-rtx"
GPU = ("a card", "SM86")


class Machine:
    """What of a machine the stages ask for."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.library, self.gpu = "", False
        self.built: list[str] = []
        self.timed: list[list[str]] = []
        patch.setattr(engines, "supported_targets", lambda: {"SM86": "" if self.library else NOT_HERE})
        patch.setattr(engines, "version_of", lambda name: self.library if name == "tensorrt_rtx" else "")
        patch.setattr(engines, "build_engine", self.build)
        patch.setattr(engines, "record_fields", lambda record: record)
        for module in (engines, latency):
            patch.setattr(module.cuda, "unavailable", lambda: "" if self.gpu else "no GPU")
            patch.setattr(module.cuda, "device", lambda: GPU)
        patch.setattr(latency, "available", lambda: {"tensorrt_rtx": ""})
        patch.setattr(latency, "time_files", self.time)

    def build(self, source: Path, path: Path, *, target: str, **rest: object) -> dict[str, Any]:
        if not self.library:
            raise MissingPackageError(NOT_HERE)
        if self.library == "broken":
            raise EngineError("the builder failed")
        self.built.append(target)
        path.write_bytes(f"engine of {self.library}".encode())
        path.with_name(path.name + ".json").write_text("{}")
        return {"library": "tensorrt_rtx", "status": "built, not run: no GPU"}

    def time(self, files: dict[str, Path], *rest: object, **more: object) -> dict[str, Any]:
        self.timed.append(sorted(files))
        return {}


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    return Machine(monkeypatch)


def _work(folder: Path) -> Work:
    """As a new process has it."""
    stages: Stages = open_run(folder, {}, lambda stage, share: None)
    recipe = SimpleNamespace(
        targets=("SM86",), latency_batches=(1,), latency_seconds=0.0, runtimes=("tensorrt_rtx",), precisions=("fp32",)
    )
    with stages.begun():
        for artifact in (DENSE, SHIPPED):
            (folder / artifact.name).write_bytes(artifact.name.encode())
    fields = {"recipe": recipe, "stages": stages, "example": torch.zeros(2, 3, 8, 8), "not_checked": []}
    return cast(Work, SimpleNamespace(**fields, sample=lambda count: None))


def _built(folder: Path) -> tuple[Work, Findings]:
    work, found = _work(folder), Findings(folder)
    engines.build_engines(work, found)
    return work, found


def test_an_engine_is_tried_again_once_its_library_is_here(machine: Machine, tmp_path: Path) -> None:
    _, found = _built(tmp_path / "run")
    assert [e["path"] for e in found.engines] == [""]
    work, found = _built(tmp_path / "run")
    assert work.stages.reused == ["engines"]
    assert any(NOT_HERE in line for line in work.not_checked)
    machine.library = "1.0"
    work, found = _built(tmp_path / "run")
    assert [e["path"] for e in found.engines] == ["engines/sm86.fp32.engine"]
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


def _timed(folder: Path) -> Work:
    work, found = _built(folder)
    latency.measure_latency(work, found, {})
    return work


def test_no_engine_for_this_gpu_is_said_in_every_run_and_one_that_is_built_then_is_timed(
    machine: Machine, tmp_path: Path
) -> None:
    said = "latency on tensorrt_rtx: no engine was built for this GPU"
    for expected in ([], ["engines", "latency"]):
        work = _timed(tmp_path / "run")
        assert work.stages.reused == expected
        assert said in work.not_checked
    assert machine.timed == []
    machine.library = "1.0"
    work = _timed(tmp_path / "run")
    assert said not in work.not_checked
    assert machine.timed == [["shipped"]]
