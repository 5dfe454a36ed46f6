"""The benchmark: finished runs or bundles in, `benchmark.json` with raw samples and a page out; comparisons refused
where machine, libraries or the way of measuring differ.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from ..device.environment import read_environment
from ..device.feeds import as_tuple
from ..device.timing import Speedup
from ..errors import InputError
from ..files import read_json
from ..report.write import write_page
from ..run.stages import Notify
from .comparison import Change, compare_benchmarks, require_alike
from .measurement import measure, resolved
from .pages import crowd_of, metric_of, page_of, speedups
from .places import STEM, Place, open_place, opened_place, results_folder
from .records import SINGLE, Measured, Options, SubjectRow, Summary, read_measured, write_measured

__all__ = ["STEM", "Options", "benchmark", "open_place", "opened_place", "read_cores", "results_folder"]


def benchmark(
    places: Sequence[Place],
    *,
    options: Options | None = None,
    out: Path,
    notify: Notify,
    other: Path | None = None,
) -> Summary:
    """Measures the places and writes `out`/benchmark.{json,md,html}; returns the headline figures.

    `other` is a benchmark.json to compare with. Raises GateError before measuring when its machine or libraries are
    not these, InputError when places take inputs of different shapes.
    """
    shapes = set(map(_shapes, places))
    if len(shapes) > 1:
        raise InputError(
            f"the places take inputs of different shapes ({'; '.join(sorted(shapes))}); measure them apart"
        )
    options = resolved(options or Options())
    before = None
    if other is not None:
        before = read_measured(other)
        require_alike(before, read_environment(), options)

    measured = measure(places, options, out, notify)
    path = out / f"{STEM}.json"
    write_measured(measured, path)

    changes: tuple[Change, ...] = ()
    if before is not None:
        changes = compare_benchmarks(before, measured)
    page = page_of(measured, changes, str(other or ""))
    write_page(page, out, STEM, read_json(path, "benchmark/2"))

    shutil.rmtree(out / "parts", ignore_errors=True)  # only an interrupted benchmark needs them
    return summary_of(measured, changes, out)


def _shapes(place: Place) -> str:
    """`[3, 32, 32]`, of several inputs `[3, 32, 32], [7]`: one sample's shapes."""
    return ", ".join(str(list(array.shape[1:])) for array in as_tuple(place.images))


def read_cores(text: str) -> tuple[int, ...]:
    """`0,1` to (0, 1), an empty text to none. Raises InputError for anything but numbers."""
    numbers = [number.strip() for number in text.split(",") if number.strip()]
    if not all(map(str.isdigit, numbers)):
        raise InputError(f"cores are written as '0,1', not {text!r}")
    return tuple(map(int, numbers))


def summary_of(measured: Measured, changes: Sequence[Change], out: Path) -> Summary:
    """One JSON object: medians, ratios to dense with their intervals, accuracy, and where the page is."""
    return {
        "benchmark": str(out / f"{STEM}.json"),
        "page": str(out / f"{STEM}.html"),
        "fingerprint": measured.environment.fingerprint,
        "metric": metric_of(measured),
        "accuracy": {row.name: _accuracy(row) for row in measured.subjects},
        "p50_ms": _medians_ms(measured),
        "speed_up": _ratios(measured),
        "changes": [(change.subject, change.runtime, change.scenario, *_rounded(change.speedup)) for change in changes],
        "busy": crowd_of(measured),
        "not_run": list(measured.not_run),
    }


def _accuracy(row: SubjectRow) -> float | None:
    return None if row.accuracy is None else round(row.accuracy.value, 4)


def _medians_ms(measured: Measured) -> dict[str, float]:
    """Of single images, by subject and runtime."""
    medians_ms = {}
    for timed in measured.timings:
        if timed.scenario == SINGLE:
            medians_ms[f"{timed.timing.name} on {timed.timing.runtime}"] = round(timed.timing.p50_ms, 4)
    return medians_ms


def _ratios(measured: Measured) -> dict[str, dict[str, dict[str, tuple[float, float, float]]]]:
    """Ratio to dense with its interval, by runtime, scenario and subject."""
    ratios: dict[str, dict[str, dict[str, tuple[float, float, float]]]] = {}
    for timed, speedup in speedups(measured):
        by_scenario = ratios.setdefault(timed.timing.runtime, {})
        by_subject = by_scenario.setdefault(timed.scenario, {})
        by_subject[timed.timing.name] = _rounded(speedup)
    return ratios


def _rounded(speedup: Speedup) -> tuple[float, float, float]:
    return round(speedup.ratio, 4), round(speedup.low, 4), round(speedup.high, 4)
