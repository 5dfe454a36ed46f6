"""What a benchmark found, as records that go to `benchmark.json` and back; raw samples are in them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypedDict

from ..device.environment import Environment
from ..device.timing import Timing, from_json, to_json
from ..errors import InputError
from ..files import read_json, write_json
from ..records import Figure, figure_fields, figure_of

SCHEMA = "benchmark/2"
SINGLE, OFFLINE, CAMERA = "single-stream", "offline", "camera"
Content = Mapping[str, Any]
"""A JSON object as it was read: what is wrong in it raises one of many errors where it becomes a record."""

# a subject, a runtime, a scenario, and how much faster it is than before: ratio, lower and upper end of its interval
ChangeRow = tuple[str, str, str, float, float, float]


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
    accuracy: Figure | None = None


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
    """`timing.name` is the subject's; `scenario` one of `SINGLE`, `OFFLINE` and `CAMERA`."""

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


class Summary(TypedDict):
    """What the command prints last. `benchmark` and `page` are paths; accuracies are in `metric`, most often a share.

    `p50_ms` is of single images, by `subject on runtime`. `speed_up` is the ratio to dense with the ends of its
    interval, by runtime, scenario and subject.
    """

    benchmark: str
    page: str
    fingerprint: str
    metric: str | None
    accuracy: dict[str, float | None]
    p50_ms: dict[str, float]
    speed_up: dict[str, dict[str, dict[str, tuple[float, float, float]]]]
    changes: list[ChangeRow]
    busy: str
    not_run: list[str]


def write_measured(measured: Measured, path: Path) -> None:
    """The record as JSON, raw samples and all. Raises GateError for a number that JSON doesn't know."""
    content = {
        "title": measured.title,
        "not_run": measured.not_run,
        "pool_bytes": measured.pool_bytes,
        "cache_bytes": measured.cache_bytes,
        "seconds": measured.seconds,
        "environment": asdict(measured.environment),
        "options": asdict(measured.options),
        "subjects": list(map(_subject_fields, measured.subjects)),
        "cold": list(map(asdict, measured.cold)),
        "timings": list(map(_timing_fields, measured.timings)),
        "schema": SCHEMA,
    }
    write_json(path, content)


def read_measured(path: Path) -> Measured:
    """Raises InputError for a file that is none of ours."""
    if not path.is_file():
        raise InputError(f"no benchmark at {path}; give a benchmark.json that `compressor benchmark` wrote")
    content = read_json(path, SCHEMA)
    try:
        return _measured_of(content)
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"[:80]
        raise InputError(
            f"{path} is no whole benchmark ({reason}); give one that `compressor benchmark` wrote"
        ) from error


def _measured_of(content: Content) -> Measured:
    """Raises one of many errors for anything but what `write_measured` wrote."""
    options = content["options"]
    # lists in JSON
    sequences = {name: tuple(options[name]) for name in ("cores", "on")}
    return Measured(
        title=content["title"],
        environment=Environment(**content["environment"]),
        options=Options(**{**options, **sequences}),
        subjects=tuple(map(_subject, content["subjects"])),
        timings=tuple(map(_timing, content["timings"])),
        cold=tuple(map(cold_start, content["cold"])),
        not_run=tuple(content["not_run"]),
        pool_bytes=content["pool_bytes"],
        cache_bytes=content["cache_bytes"],
        seconds=content["seconds"],
    )


def _subject_fields(row: SubjectRow) -> dict[str, object]:
    return {**asdict(row), "accuracy": None if row.accuracy is None else figure_fields(row.accuracy)}


def _subject(content: Content) -> SubjectRow:
    accuracy = figure_of(content["accuracy"]) if content["accuracy"] else None
    return SubjectRow(**{**content, "accuracy": accuracy})


def cold_start(content: Content) -> ColdStart:
    """The inverse of `asdict`, from JSON's lists. Raises KeyError or TypeError for anything else."""
    numbers = {name: tuple(content[name]) for name in ("load_ms", "first_run_ms", "peak_bytes")}
    return ColdStart(content["name"], content["runtime"], **numbers)


def _timing_fields(timed: ScenarioTiming) -> dict[str, object]:
    return {"scenario": timed.scenario, **to_json(timed.timing)}


def _timing(content: Content) -> ScenarioTiming:
    timing = {name: value for name, value in content.items() if name != "scenario"}
    return ScenarioTiming(content["scenario"], from_json(timing))
