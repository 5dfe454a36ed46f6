"""A benchmark's record in, its page out: what was measured, how, what it means, what was not run."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace

import numpy as np

from ..device.percentiles import CONFIDENCE, estimate, least_samples
from ..device.runtimes import REFERENCE
from ..device.timing import Speedup, Timing, compare, summarise
from ..records import Accuracy, Quality
from ..report import LatencyRow, ParetoPoint, facts
from ..report.facts import ABSENT
from ..report.plots import Drawing, draw, draw_latency, draw_pareto
from ..report.sections import Figure, KeyFigure, Section, pareto_caption, slug
from ..report.tables import TOO_FEW, Table, headed, lines_table, pairs_table, top5_of, without_empty_column
from ..report.write import Page
from .comparison import Change
from .records import SINGLE, ColdStart, Measured, ScenarioTiming, SubjectRow

_MOST_FIGURES = 6  # on top of the page


def page_of(measured: Measured, changes: tuple[Change, ...] = (), before: str = "") -> Page:
    """The page; `changes` against another benchmark, whose file `before` names, come first where there are any."""
    images = draw(_drawings(measured))
    sections: list[Section] = []
    if changes:
        sections.append(_changes(changes, before))
    sections += [
        _accuracy(measured),
        _latency(measured, images),
        _cold(measured),
        _not_run(measured),
        _how(measured),
    ]

    warnings: tuple[str, ...] = ()
    crowd = crowd_of(measured)
    if crowd:
        warnings = (f"{crowd} when the timing began: times and ratios may be off; measure again on a quiet one",)
    return Page(
        title=f"{measured.title}: benchmark",
        verdict=_verdict(measured),
        failures=(),
        key_figures=_key_figures(measured),
        sections=tuple(_without_empty_tables(section) for section in sections),
        images=images,
        warnings=warnings,
    )


def _without_empty_tables(section: Section) -> Section:
    shown = tuple(element for element in section.parts if isinstance(element, Figure) or element.rows)
    return replace(section, parts=shown)


def crowd_of(measured: Measured) -> str:
    """How crowded the machine was when the busiest of its timings began; empty where none was."""
    environments = [timed.timing.environment for timed in measured.timings]
    busiest = max(environments, key=lambda environment: facts.load_of(environment.state), default=None)
    return "" if busiest is None else facts.crowd(busiest.state, busiest.machine)


def speedups(measured: Measured) -> Iterator[tuple[ScenarioTiming, Speedup]]:
    """Every subject against the dense one of its place under the same conditions.

    Raises GateError when the two were not measured alike.
    """
    timings = {(timed.timing.name, timed.timing.runtime, timed.scenario): timed.timing for timed in measured.timings}
    for timed in measured.timings:
        place, slash, subject = timed.timing.name.rpartition("/")  # of several places `run/shipped-int8`
        dense = timings.get((f"{place}{slash}dense", timed.timing.runtime, timed.scenario))
        if subject != "dense" and dense is not None:
            yield timed, compare(dense, timed.timing)


def _verdict(measured: Measured) -> tuple[str, ...]:
    ratios_by_runtime: dict[str, list[str]] = {}
    for timed, speedup in speedups(measured):
        if timed.scenario == SINGLE:
            ratio = f"{timed.timing.name} {speedup.ratio:.2f}× ({speedup.low:.2f}–{speedup.high:.2f})"
            ratios_by_runtime.setdefault(timed.timing.runtime, []).append(ratio)

    lines = []
    crowd = crowd_of(measured)
    care = f" ({crowd})" if crowd else ""
    for runtime, ratios in ratios_by_runtime.items():
        lines.append(f"{runtime}, one image at a time, against dense by medians: {', '.join(ratios)}{care}.")
    unstable = sorted({timed.timing.name for timed in measured.timings if not timed.timing.stable})
    if unstable:
        lines.append(f"The machine was not quiet: {', '.join(unstable)} did not settle while warming up.")
    if measured.cache_bytes and measured.pool_bytes <= measured.cache_bytes:
        lines.append("The images fit into the caches: latencies may be better than in use.")
    return tuple(lines) or ("Nothing could be timed here.",)


def _single_on_reference(measured: Measured) -> list[Timing]:
    """What headlines and the plot of accuracy over latency show: accuracy is counted by that runtime too."""
    return _by_scenario_and_runtime(measured).get((SINGLE, REFERENCE), [])


def _key_figures(measured: Measured) -> tuple[KeyFigure, ...]:
    accuracies = _accuracies(measured)
    figures = []
    for timing in _single_on_reference(measured)[:_MOST_FIGURES]:
        detail = "accuracy not measured"
        if timing.name in accuracies:
            accuracy = accuracies[timing.name]
            detail = f"{facts.value_of(accuracy)} {accuracy.metric}"
        figures.append(KeyFigure(f"{timing.name}, p50", f"{facts.milliseconds(timing.p50_ms)} ms", detail))
    return tuple(figures)


def _drawings(measured: Measured) -> Iterator[tuple[str, Drawing]]:
    yield "pareto", lambda: draw_pareto(_points(measured))
    for (scenario, runtime), timings in _by_scenario_and_runtime(measured).items():
        rows = [_latency_row(timing) for timing in timings]
        # bound now: the drawing is called when the loop is further on
        yield _figure_name(scenario, runtime), lambda rows=rows: draw_latency(rows)  # type: ignore[misc]


def _by_scenario_and_runtime(measured: Measured) -> dict[tuple[str, str], list[Timing]]:
    timings: dict[tuple[str, str], list[Timing]] = {}
    for timed in measured.timings:
        timings.setdefault((timed.scenario, timed.timing.runtime), []).append(timed.timing)
    return timings


def _figure_name(scenario: str, runtime: str) -> str:
    return f"{slug(scenario)}-{slug(runtime)}"


def _latency_row(timing: Timing) -> LatencyRow:
    statistics = summarise(timing)
    place, slash, subject = timing.name.rpartition("/")
    variant, _, precision = subject.partition("-")  # `shipped-int8`, but `dense` alone is fp32
    return LatencyRow(
        runtime=timing.runtime,
        precision=precision or "fp32",
        batch=timing.schedule.batch,
        variant=f"{place}{slash}{variant}",
        samples_ms=np.array(timing.samples_ms),
        percentiles={"p50": statistics["p50_ms"], "p90": statistics["p90_ms"], "p99": statistics["p99_ms"]},
    )


def _points(measured: Measured) -> list[ParetoPoint]:
    """Files with an accuracy, where ONNX Runtime took them one image at a time; equal dense networks once."""
    rows = {row.name: row for row in measured.subjects}
    accuracies = _accuracies(measured)
    points: dict[str, ParetoPoint] = {}
    for timing in _single_on_reference(measured):
        if timing.name in accuracies:
            row = rows[timing.name]
            label = _point_label(row)
            point = ParetoPoint(label, timing.p50_ms, accuracies[row.name], reference=row.variant == "dense")
            points.setdefault(label, point)
    return list(points.values())


def _point_label(row: SubjectRow) -> str:
    """The subject's name; with its budget where there are several places, which may differ in it."""
    if row.variant == "dense":
        return "dense"
    if row.budget and "/" in row.name:
        return f"{row.name} ({row.budget})"
    return row.name


def _changes(changes: tuple[Change, ...], before: str) -> Section:
    rows = tuple(map(_change_cells, changes))
    head = ("subject", "runtime", "scenario", "before ms", "now ms", "speed-up", "95 %")
    note = "Ratio of medians; the interval redraws whole turns. The two were taken at different times."
    table = Table("Changes", head, "lllrrrr", rows, note)
    return Section("changes", "Against the other benchmark", (f"Compared with {before}.",), (table,))


def _change_cells(change: Change) -> tuple[str, ...]:
    return (
        change.subject,
        change.runtime,
        change.scenario,
        facts.milliseconds(change.before_ms),
        facts.milliseconds(change.after_ms),
        *_speedup_cells(change.speedup),
    )


def _speedup_cells(speedup: Speedup | None) -> tuple[str, str]:
    """Ratio and interval; empty where there is nothing to compare with."""
    if speedup is None:
        return "", ""
    return f"{speedup.ratio:.2f}×", f"{speedup.low:.2f}–{speedup.high:.2f}"


def _accuracy(measured: Measured) -> Section:
    elements: list[Table | Figure] = [_subject_table(measured)]
    points = _points(measured)
    if len(points) > 1:
        alt = f"Points: {facts.metric_in_words(_metric(measured))} against median latency of every file"
        elements.append(Figure("pareto", alt, pareto_caption(points)))
    text = () if _accuracies(measured) else ("Quality was not measured; see what was not run.",)
    title = "Accuracy and size" if _metric(measured) == "top-1" else "Quality and size"
    return Section("accuracy", title, text, tuple(elements))


def _accuracies(measured: Measured) -> dict[str, Accuracy | Quality]:
    """By the subject's name, of those whose accuracy was measured."""
    return {row.name: row.accuracy for row in measured.subjects if row.accuracy is not None}


def metric_of(measured: Measured) -> str | None:
    """What the files are judged by; None where none was."""
    return next((accuracy.metric for accuracy in _accuracies(measured).values()), None)


def _metric(measured: Measured) -> str:
    return metric_of(measured) or "top-1"


def _subject_table(measured: Measured) -> Table:
    """A row for each file; a column of top-5 where some row has it."""
    is_quality = any(isinstance(row.accuracy, Quality) for row in measured.subjects)
    interval = "" if is_quality else "; Wilson interval"
    note = f"ONNX Runtime on held-out images{interval}. FLOPs are 2 per MAC. MACs and parameters: of the network."
    head = ("subject", _metric(measured), "95 % interval", "top-5", *_COSTS)
    rows = tuple(map(_subject_cells, measured.subjects))
    return without_empty_column(Table("Subjects", head, "crrrrrrrrc", rows, note), "top-5")


_COSTS = ("n", "MACs", "FLOPs", "parameters", "size", "file")


def _subject_cells(row: SubjectRow) -> tuple[str, ...]:
    counts = map(_count, (row.macs, 2 * row.macs, row.parameters))
    return (row.name, *_accuracy_cells(row.accuracy), *counts, facts.size(row.bytes), row.file)


def _count(cost: int) -> str:
    """A dash for a negative one, which stands for unknown."""
    return ABSENT if cost < 0 else facts.count(cost)


def _accuracy_cells(accuracy: Accuracy | Quality | None) -> tuple[str, str, str, str]:
    """The figure, its interval, top-5 and the number of images."""
    if accuracy is None:
        return ABSENT, ABSENT, ABSENT, ABSENT
    return (
        facts.value_of(accuracy),
        facts.interval_of(accuracy),
        top5_of(accuracy) or ABSENT,
        f"{accuracy.n:,}",
    )


def _latency(measured: Measured, images: Mapping[str, bytes]) -> Section:
    head = ("subject", "p50 ms", "speed-up", "95 %", "p90 ms", "p99 ms", "images/s", "n", "spread")
    note = (
        f"p90 and p99 by LoadGen's early stopping at {100 * CONFIDENCE:.0f} % confidence: they need "
        f"{least_samples(0.9)} and {least_samples(0.99)} runs. Spread: standard deviation over mean, nothing left out."
    )
    text = (
        "Dense and shipped took turns, each in processes of its own. Single-stream: one image, the next when it is "
        "done; offline: batches back to back; camera: one image at a fixed rate.",
    )
    elements: list[Table | Figure] = []
    if measured.timings:
        elements.append(Table("Latency", head, "crrrrrrrr", _latency_rows(measured), note))
        elements.extend(_latency_figures(measured, images))
    return Section("latency", "Latency and throughput", text, tuple(elements))


def _latency_rows(measured: Measured) -> tuple[tuple[str, ...], ...]:
    """Rows below a heading for each runtime and scenario."""
    # timings hold dictionaries, so that they can't be keys themselves
    by_timing = {id(timed): speedup for timed, speedup in speedups(measured)}
    rows = []
    for timed in measured.timings:
        heading = f"{timed.timing.runtime}, {timed.scenario}, batch {timed.timing.schedule.batch}"
        rows.append((heading, _timing_cells(timed.timing, by_timing.get(id(timed)))))
    return headed(rows)


def _latency_figures(measured: Measured, images: Mapping[str, bytes]) -> Iterator[Figure]:
    for scenario, runtime in _by_scenario_and_runtime(measured):
        name = _figure_name(scenario, runtime)
        if name in images:
            alt = f"Curves: share of runs finished by a time, {runtime}, {scenario}"
            caption = "share of runs finished within a time, every sample shown; further left is faster."
            yield Figure(name, alt, f"{runtime}, {scenario}: {caption}")


def _timing_cells(timing: Timing, speedup: Speedup | None) -> tuple[str, ...]:
    samples = np.asarray(timing.samples_ms)
    return (
        timing.name,
        facts.milliseconds(timing.p50_ms),
        *_speedup_cells(speedup),
        _percentile(timing, 0.9),
        _percentile(timing, 0.99),
        facts.three_digits(timing.images_per_s),
        f"{len(samples):,}",
        facts.percent(float(samples.std() / samples.mean()), 0),
    )


def _percentile(timing: Timing, percentile: float) -> str:
    return facts.written(estimate(timing.samples_ms, percentile), facts.milliseconds, unknown=TOO_FEW)


def _cold(measured: Measured) -> Section:
    rows = tuple(map(_cold_cells, measured.cold))
    head = ("subject", "runtime", "load ms", "first run ms", "peak memory", "processes")
    note = (
        "Medians over fresh processes. Load has the import of the runtime in it; the file is in the system's cache. "
        "Peak memory: the process's resident set, runtime and interpreter included, for PyTorch the pool of images too."
    )
    return Section("cold", "Cold start and memory", (), (Table("Cold start", head, "clrrrr", rows, note),))


def _cold_cells(cold: ColdStart) -> tuple[str, ...]:
    peak = ABSENT
    if min(cold.peak_bytes) >= 0:  # -1 stands for unknown
        peak = facts.size(float(np.median(cold.peak_bytes)))
    return (
        cold.name,
        cold.runtime,
        facts.milliseconds(float(np.median(cold.load_ms))),
        facts.milliseconds(float(np.median(cold.first_run_ms))),
        peak,
        str(len(cold.load_ms)),
    )


def _not_run(measured: Measured) -> Section:
    text = () if measured.not_run else ("Everything was run.",)
    return Section("not-run", "What was not run", text, (lines_table("Not run", "what and why", measured.not_run),))


def _how(measured: Measured) -> Section:
    options, environment = measured.options, measured.environment
    way = {
        "threads": options.threads,
        "pinned to cores": ", ".join(map(str, options.cores)) or "not pinned: the system can't",
        "least seconds per subject and scenario": options.seconds,
        "least runs": options.runs,
        "processes per subject": options.repeats,
        "images drawn from": facts.size(measured.pool_bytes),
        "largest cache": facts.written(measured.cache_bytes or None, facts.size, unknown="unknown"),
        "warm-up": "by time, then until two windows' medians agree",
        "fingerprint": environment.fingerprint,
    }
    stages = {name: f"{seconds:.1f} s" for name, seconds in measured.seconds.items()}
    stages["all"] = f"{math.fsum(measured.seconds.values()):.1f} s"
    tables = (
        pairs_table("Way of measuring", way),
        pairs_table("Environment", {**environment.machine, **environment.libraries, **environment.state}),
        pairs_table("Time by part", stages),
    )
    return Section("how", "How it was measured", (), tables)
