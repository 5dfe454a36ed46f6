"""What a benchmark found, as records that go to `benchmark.json` and back; raw samples are in them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..device.environment import Environment
from ..device.timing import Timing, from_json, to_json
from ..errors import InputError
from ..files import read_json, write_json
from ..records import Accuracy

SCHEMA = "benchmark/2"
SINGLE, OFFLINE, CAMERA = "single-stream", "offline", "camera"


@dataclass(frozen=True, slots=True)
class Options:
    """How a benchmark is taken. Times are for each subject and scenario; 0 threads: one for every core."""

    seconds: float = 2.0
    runs: int = 662
    offline_batch: int = 32
    rate_hz: float = 0.0
    threads: int = 0
    cores: tuple[int, ...] = ()
    repeats: int = 3
    on: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class SubjectRow:
    """A file and what it is; `name` is how timings call it. -1 and None: not known here."""

    name: str
    place: str
    variant: str
    precision: str
    file: str
    bytes: int
    budget: str = ""
    macs: int = -1
    parameters: int = -1
    accuracy: Accuracy | None = None


@dataclass(frozen=True, slots=True)
class ColdStart:
    """Fresh processes, one entry each: load (the runtime's import included), first run, peak resident memory."""

    name: str
    runtime: str
    load_ms: tuple[float, ...]
    first_run_ms: tuple[float, ...]
    peak_bytes: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class ScenarioTiming:
    scenario: str
    timing: Timing


@dataclass(frozen=True, slots=True)
class Measured:
    """`pool_bytes` and `cache_bytes`: the images latency runs draw from, and the largest cache they must exceed."""

    title: str
    environment: Environment
    options: Options
    subjects: tuple[SubjectRow, ...]
    timings: tuple[ScenarioTiming, ...]
    cold: tuple[ColdStart, ...]
    not_run: tuple[str, ...]
    pool_bytes: int = 0
    cache_bytes: int = 0
    seconds: Mapping[str, float] = field(default_factory=dict)


def write_measured(measured: Measured, path: Path) -> None:
    content = {f: getattr(measured, f) for f in ("title", "not_run", "pool_bytes", "cache_bytes", "seconds")}
    for name in ("environment", "options"):
        content[name] = asdict(getattr(measured, name))
    for name in ("subjects", "cold"):
        content[name] = [asdict(row) for row in getattr(measured, name)]
    content["timings"] = [{"scenario": t.scenario, **to_json(t.timing)} for t in measured.timings]
    write_json(path, {**content, "schema": SCHEMA})


def read_measured(path: Path) -> Measured:
    """Raises InputError for a file that is none of ours."""
    if not path.is_file():
        raise InputError(f"no benchmark at {path}; give a benchmark.json that `compressor benchmark` wrote")
    held = read_json(path, SCHEMA)
    try:
        return _measured_of(held)
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"[:80]
        raise InputError(
            f"{path} is no whole benchmark ({reason}); give one that `compressor benchmark` wrote"
        ) from error


def _measured_of(held: Mapping[str, Any]) -> Measured:
    """Raises one of many errors for anything but what `write_measured` wrote."""
    options = {**held["options"], **{k: tuple(held["options"][k]) for k in ("cores", "on")}}
    subjects = []
    for row in held["subjects"]:
        accuracy = Accuracy(**row["accuracy"]) if row["accuracy"] else None
        subjects.append(SubjectRow(**{**row, "accuracy": accuracy}))
    return Measured(
        title=held["title"],
        environment=Environment(**held["environment"]),
        options=Options(**options),
        subjects=tuple(subjects),
        timings=tuple(_timing(t) for t in held["timings"]),
        cold=tuple(cold_start(row) for row in held["cold"]),
        not_run=tuple(held["not_run"]),
        pool_bytes=held["pool_bytes"],
        cache_bytes=held["cache_bytes"],
        seconds=held["seconds"],
    )


def cold_start(content: Mapping[str, Any]) -> ColdStart:
    numbers = {key: tuple(content[key]) for key in ("load_ms", "first_run_ms", "peak_bytes")}
    return ColdStart(content["name"], content["runtime"], **numbers)


def _timing(content: Mapping[str, Any]) -> ScenarioTiming:
    rest = {k: v for k, v in content.items() if k != "scenario"}
    return ScenarioTiming(content["scenario"], from_json(rest))
