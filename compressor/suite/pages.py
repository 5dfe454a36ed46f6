"""A benchmark's record in, its page out: what was measured, how, what it means, what was not run."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from ..device.percentiles import CONFIDENCE, estimate, least_samples
from ..device.timing import Speedup, Timing, compare, summarise
from ..report import LatencyRow, ParetoPoint, facts
from ..report.plots import Drawing, draw, draw_latency, draw_pareto
from ..report.sections import Figure, KeyFigure, Section, pareto_caption, slug
from ..report.tables import TOO_FEW, Table, pairs_table
from ..report.write import Page
from .comparison import Change
from .records import SINGLE, Measured, ScenarioTiming, SubjectRow


def page_of(measured: Measured, changes: tuple[Change, ...] = (), before: str = "") -> Page:
    images = draw(_drawings(measured))
    sections = (
        *([_changes(changes, before)] if changes else []),
        _accuracy(measured),
        _latency(measured, images),
        _cold(measured),
        _not_run(measured),
        _how(measured),
    )
    title = f"{measured.title}: benchmark"
    said = crowd_of(measured)
    warnings = (
        (f"{said} when the timing began: times and ratios may be off; measure again on a quiet one",) if said else ()
    )
    shown = tuple(_without_empty_tables(section) for section in sections)
    return Page(title, _verdict(measured), (), _key_figures(measured), shown, images, warnings)


def _without_empty_tables(section: Section) -> Section:
    parts = tuple(part for part in section.parts if isinstance(part, Figure) or part.rows)
    return replace(section, parts=parts)


def crowd_of(measured: Measured) -> str:
    """How crowded the machine was when the busiest of its timings began; empty where none was."""
    states = [t.timing.environment for t in measured.timings]
    busiest = max(states, key=lambda e: facts.load_of(e.state), default=None)
    return "" if busiest is None else facts.crowd(busiest.state, busiest.machine)


def speedups(measured: Measured) -> Iterator[tuple[ScenarioTiming, Speedup]]:
    """Every subject against the dense one of its place under the same conditions."""
    held = {(t.timing.name, t.timing.runtime, t.scenario): t.timing for t in measured.timings}
    for found in measured.timings:
        place, _, subject = found.timing.name.rpartition("/")
        dense = held.get((f"{place}/dense" if place else "dense", found.timing.runtime, found.scenario))
        if subject != "dense" and dense is not None:
            yield found, compare(dense, found.timing)


def _verdict(measured: Measured) -> tuple[str, ...]:
    lines = []
    by_runtime: dict[str, list[str]] = {}
    for found, speedup in speedups(measured):
        if found.scenario == SINGLE:
            shown = f"{found.timing.name} {speedup.ratio:.2f}× ({speedup.low:.2f}–{speedup.high:.2f})"
            by_runtime.setdefault(found.timing.runtime, []).append(shown)
    care = f" ({crowd_of(measured)})" if crowd_of(measured) else ""
    for runtime, ratios in by_runtime.items():
        lines.append(f"{runtime}, one image at a time, against dense by medians: {', '.join(ratios)}{care}.")
    unstable = sorted({t.timing.name for t in measured.timings if not t.timing.stable})
    if unstable:
        lines.append(f"The machine was not quiet: {', '.join(unstable)} did not settle while warming up.")
    if measured.cache_bytes and measured.pool_bytes <= measured.cache_bytes:
        lines.append("The images fit into the caches: latencies may be better than in use.")
    return tuple(lines) or ("Nothing could be timed here.",)


def _key_figures(measured: Measured) -> tuple[KeyFigure, ...]:
    rows = {s.name: s for s in measured.subjects}
    found: list[KeyFigure] = []
    for t in measured.timings:
        if t.scenario == SINGLE and t.timing.runtime == "onnxruntime" and len(found) < 6:
            row = rows.get(t.timing.name)
            detail = f"{facts.percent(row.accuracy.top1)} top-1" if row and row.accuracy else "accuracy not measured"
            value = f"{facts.milliseconds(t.timing.p50_ms)} ms"
            found.append(KeyFigure(f"{t.timing.name}, p50", value, detail))
    return tuple(found)


def _drawings(measured: Measured) -> Iterator[tuple[str, Drawing]]:
    yield "pareto", lambda: draw_pareto(_points(measured))
    for scenario, runtime in dict.fromkeys((t.scenario, t.timing.runtime) for t in measured.timings):
        rows = [
            _latency_row(t.timing) for t in measured.timings if (t.scenario, t.timing.runtime) == (scenario, runtime)
        ]
        yield _figure_name(scenario, runtime), lambda rows=rows: draw_latency(rows)  # type: ignore[misc]


def _figure_name(scenario: str, runtime: str) -> str:
    return f"{slug(scenario)}-{slug(runtime)}"


def _latency_row(timing: Timing) -> LatencyRow:
    found = summarise(timing)
    percentiles = {"p50": found["p50_ms"], "p90": found["p90_ms"], "p99": found["p99_ms"]}
    place, _, subject = timing.name.rpartition("/")
    variant, _, precision = subject.partition("-")
    shown = f"{place}/{variant}" if place else variant
    return LatencyRow(
        timing.runtime, precision or "fp32", timing.schedule.batch, shown, np.array(timing.samples_ms), percentiles
    )


def _points(measured: Measured) -> list[ParetoPoint]:
    """Files with an accuracy, where ONNX Runtime took them one image at a time; equal dense networks once."""
    rows = {s.name: s for s in measured.subjects if s.accuracy is not None}
    points: dict[str, ParetoPoint] = {}
    for t in measured.timings:
        row = rows.get(t.timing.name)
        if row is None or row.accuracy is None or (t.scenario, t.timing.runtime) != (SINGLE, "onnxruntime"):
            continue
        dense = row.variant == "dense"
        label = "dense" if dense else f"{row.name}{f' ({row.budget})' if row.budget and '/' in row.name else ''}"
        points.setdefault(label, ParetoPoint(label, t.timing.p50_ms, row.accuracy, reference=dense))
    return list(points.values())


def _changes(changes: tuple[Change, ...], before: str) -> Section:
    rows = tuple(
        (
            c.subject,
            c.runtime,
            c.scenario,
            facts.milliseconds(c.before_ms),
            facts.milliseconds(c.after_ms),
            f"{c.speedup.ratio:.2f}×",
            f"{c.speedup.low:.2f}–{c.speedup.high:.2f}",
        )
        for c in changes
    )
    head = ("subject", "runtime", "scenario", "before ms", "now ms", "speed-up", "95 %")
    note = "Ratio of medians; the interval redraws whole turns. The two were taken at different times."
    return Section("changes", "Against the other benchmark", (f"Compared with {before}.",), (
        Table("Changes", head, "lllrrrr", rows, note),
    ))  # fmt: skip


def _accuracy(measured: Measured) -> Section:
    rows = tuple(_subject_cells(s) for s in measured.subjects)
    head = ("subject", "top-1", "95 % interval", "top-5", "n", "MACs", "FLOPs", "parameters", "size", "file")
    note = "ONNX Runtime on held-out images; Wilson interval. FLOPs are 2 per MAC. MACs and parameters: of the network."
    missing = (
        () if any(s.accuracy for s in measured.subjects) else ("Accuracy was not measured; see what was not run.",)
    )
    caption = pareto_caption(_points(measured))
    pareto = Figure("pareto", "Points: top-1 against median latency of every file", caption)
    parts: tuple[Table | Figure, ...] = (Table("Subjects", head, "crrrrrrrrc", rows, note),)
    if len(_points(measured)) > 1:
        parts = (*parts, pareto)
    return Section("accuracy", "Accuracy and size", missing, parts)


def _subject_cells(row: SubjectRow) -> tuple[str, ...]:
    if row.accuracy is None:
        judged = ("–", "–", "–", "–")
    else:
        low, high = row.accuracy.interval
        top5 = row.accuracy.correct_top5
        judged = (
            facts.percent(row.accuracy.top1),
            f"{100 * low:.1f}–{100 * high:.1f}",
            facts.percent(top5 / row.accuracy.n) if top5 >= 0 else "–",
            f"{row.accuracy.n:,}",
        )
    costs = tuple(facts.count(v) if v >= 0 else "–" for v in (row.macs, 2 * row.macs, row.parameters))
    return (row.name, *judged, *costs, facts.size(row.bytes), row.file)


def _latency(measured: Measured, images: dict[str, bytes]) -> Section:
    ratios = {id(found): speedup for found, speedup in speedups(measured)}
    rows: dict[str, list[tuple[str, ...]]] = {}
    for found in measured.timings:
        heading = f"{found.timing.runtime}, {found.scenario}, batch {found.timing.schedule.batch}"
        rows.setdefault(heading, []).append(_timing_cells(found, ratios.get(id(found))))
    table = tuple(row for heading, below in rows.items() for row in ((heading,), *below))
    head = ("subject", "p50 ms", "speed-up", "95 %", "p90 ms", "p99 ms", "images/s", "n", "spread")
    note = (
        f"p90 and p99 by LoadGen's early stopping at {100 * CONFIDENCE:.0f} % confidence: they need "
        f"{least_samples(0.9)} and {least_samples(0.99)} runs. Spread: standard deviation over mean, nothing left out."
    )
    text = (
        "Dense and shipped took turns, each in processes of its own. Single-stream: one image, the next when it is "
        "done; offline: batches back to back; camera: one image at a fixed rate.",
    )
    caption = "{}: share of runs finished within a time, every sample shown; further left is faster."
    figures = [
        Figure(_figure_name(s, r), f"Curves: share of runs finished by a time, {r}, {s}", caption.format(f"{r}, {s}"))
        for s, r in dict.fromkeys((t.scenario, t.timing.runtime) for t in measured.timings)
        if _figure_name(s, r) in images
    ]
    parts: tuple[Table | Figure, ...] = (Table("Latency", head, "crrrrrrrr", table, note), *figures)
    return Section("latency", "Latency and throughput", text, parts if measured.timings else ())


def _timing_cells(found: ScenarioTiming, speedup: Speedup | None) -> tuple[str, ...]:
    timing, samples = found.timing, np.asarray(found.timing.samples_ms)
    return (
        timing.name,
        facts.milliseconds(timing.p50_ms),
        "" if speedup is None else f"{speedup.ratio:.2f}×",
        "" if speedup is None else f"{speedup.low:.2f}–{speedup.high:.2f}",
        *(_percentile(timing, p) for p in (0.9, 0.99)),
        facts.three_digits(timing.images_per_s),
        f"{len(samples):,}",
        facts.percent(float(samples.std() / samples.mean()), 0),
    )


def _percentile(timing: Timing, percentile: float) -> str:
    value = estimate(timing.samples_ms, percentile)
    return TOO_FEW if value is None else facts.milliseconds(value)


def _cold(measured: Measured) -> Section:
    rows = tuple(
        (
            c.name,
            c.runtime,
            facts.milliseconds(float(np.median(c.load_ms))),
            facts.milliseconds(float(np.median(c.first_run_ms))),
            facts.size(float(np.median(c.peak_bytes))) if min(c.peak_bytes) >= 0 else "–",
            str(len(c.load_ms)),
        )
        for c in measured.cold
    )
    head = ("subject", "runtime", "load ms", "first run ms", "peak memory", "processes")
    note = (
        "Medians over fresh processes. Load has the import of the runtime in it; the file is in the system's cache. "
        "Peak memory: the process's resident set, runtime and interpreter included, for PyTorch the pool of images too."
    )
    return Section("cold", "Cold start and memory", (), (Table("Cold start", head, "clrrrr", rows, note),))


def _not_run(measured: Measured) -> Section:
    rows = tuple((line,) for line in measured.not_run)
    text = () if rows else ("Everything was run.",)
    return Section("not-run", "What was not run", text, (Table("Not run", ("what and why",), "l", rows),))


def _how(measured: Measured) -> Section:
    options, environment = measured.options, measured.environment
    way = {
        "threads": options.threads,
        "pinned to cores": ", ".join(map(str, options.cores)) or "not pinned: the system can't",
        "least seconds per subject and scenario": options.seconds,
        "least runs": options.runs,
        "processes per subject": options.repeats,
        "images drawn from": facts.size(measured.pool_bytes),
        "largest cache": facts.size(measured.cache_bytes) if measured.cache_bytes else "unknown",
        "warm-up": "by time, then until two windows' medians agree",
        "fingerprint": environment.fingerprint,
    }
    stages = {name: f"{s:.1f} s" for name, s in measured.seconds.items()}
    stages["all"] = f"{math.fsum(measured.seconds.values()):.1f} s"
    parts = (
        pairs_table("Way of measuring", way),
        pairs_table("Environment", {**environment.machine, **environment.libraries, **environment.state}),
        pairs_table("Time by part", stages),
    )
    return Section("how", "How it was measured", (), parts)
