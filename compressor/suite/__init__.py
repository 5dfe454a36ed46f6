"""The benchmark: finished runs or bundles in, `benchmark.json` with raw samples and a page out; comparisons refused
where machine, libraries or the way of measuring differ.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..device.environment import read_environment
from ..errors import InputError
from ..files import read_json
from ..report.write import write_page
from ..stages import Notify
from .comparison import Change, compare_benchmarks, require_alike
from .measurement import measure, resolved
from .pages import crowd_of, page_of, speedups
from .places import Place, open_place
from .records import SINGLE, Measured, Options, read_measured, write_measured

STEM = "benchmark"

__all__ = ["STEM", "Options", "benchmark", "open_place", "read_cores"]


def benchmark(
    places: Sequence[Place],
    *,
    options: Options | None = None,
    out: Path,
    notify: Notify,
    other: Path | None = None,
) -> dict[str, Any]:
    """Measures the places and writes `out`/benchmark.{json,md,html}; returns the headline figures.

    `other` is a benchmark.json to compare with. Raises GateError before measuring when its machine or libraries are
    not these, InputError when places take images of different shapes.
    """
    shapes = {place.images.shape[1:] for place in places}
    if len(shapes) > 1:
        listed = ", ".join(map(str, sorted(shapes)))
        raise InputError(f"the places take images of different shapes ({listed}); measure them apart")
    options = resolved(options or Options())
    before = read_measured(other) if other is not None else None
    if before is not None:
        require_alike(before, read_environment(), options)
    measured = measure(places, options, out, notify)
    write_measured(measured, out / f"{STEM}.json")
    changes: tuple[Change, ...] = ()
    if before is not None:
        changes = compare_benchmarks(before, measured)
    write_page(page_of(measured, changes, str(other or "")), out, STEM, read_json(out / f"{STEM}.json", "benchmark/2"))
    shutil.rmtree(out / "parts", ignore_errors=True)
    return summary_of(measured, changes, out)


def read_cores(text: str) -> tuple[int, ...]:
    """`0,1` to (0, 1)."""
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not all(part.isdigit() for part in parts):
        raise InputError(f"cores are written as '0,1', not {text!r}")
    return tuple(map(int, parts))


def summary_of(measured: Measured, changes: Sequence[Change], out: Path) -> dict[str, Any]:
    """One JSON object: medians, ratios to dense with their intervals, accuracy, and where the page is."""
    ratios: dict[str, Any] = {}
    for found, speedup in speedups(measured):
        at = ratios.setdefault(found.timing.runtime, {}).setdefault(found.scenario, {})
        at[found.timing.name] = [round(v, 4) for v in (speedup.ratio, speedup.low, speedup.high)]
    return {
        "benchmark": str(out / f"{STEM}.json"),
        "page": str(out / f"{STEM}.html"),
        "fingerprint": measured.environment.fingerprint,
        "accuracy": {s.name: s.accuracy and round(s.accuracy.top1, 4) for s in measured.subjects},
        "p50_ms": {
            f"{t.timing.name} on {t.timing.runtime}": round(t.timing.p50_ms, 4)
            for t in measured.timings
            if t.scenario == SINGLE
        },
        "speed_up": ratios,
        "changes": [
            [c.subject, c.runtime, c.scenario, *(round(v, 4) for v in (c.speedup.ratio, c.speedup.low, c.speedup.high))]
            for c in changes
        ],
        "busy": crowd_of(measured),
        "not_run": list(measured.not_run),
    }
