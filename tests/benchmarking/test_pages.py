"""The page of a benchmark, from numbers made up: sentences and cells by hand, nothing said of what is absent."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import pytest

from compressor.benchmarking import pages
from compressor.benchmarking.comparison import Change
from compressor.benchmarking.records import OFFLINE, SINGLE, ColdStart, Measured, ScenarioTiming
from compressor.device.timing import Speedup, compare
from compressor.records import Quality
from compressor.report.sections import Figure, Section
from compressor.report.tables import Table
from compressor.report.write import Page

from .made import ENVIRONMENT, measured, subject, timing


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty picture under each name that would be drawn, and few draws of turns that are all alike."""
    monkeypatch.setattr(pages, "draw", lambda drawings: {name: b"" for name, _ in drawings})
    monkeypatch.setattr(pages, "compare", partial(compare, draws=10))


def section(page: Page, anchor: str) -> Section:
    return next(section for section in page.sections if section.anchor == anchor)


def table(page: Page, anchor: str, title: str) -> Table:
    parts = section(page, anchor).parts
    return next(part for part in parts if isinstance(part, Table) and part.title == title)


def cells(rows: Table, first: str) -> Mapping[str, str]:
    """The row that begins so, by the names of its columns."""
    row = next(row for row in rows.rows if row[0] == first and len(row) > 1)
    return dict(zip(rows.head, row, strict=True))


def test_the_verdict_is_single_images_against_dense() -> None:
    (line,) = pages.page_of(measured()).verdict
    assert line == (
        "onnxruntime, one image at a time, against dense by medians: "
        "shipped 2.00× (2.00–2.00), shipped-int8 4.00× (4.00–4.00)."
    )


def test_a_machine_that_did_not_settle_and_a_pool_within_the_caches_are_said() -> None:
    timings = tuple(replace(timed, timing=replace(timed.timing, stable=False)) for timed in measured().timings[:1])
    verdict = pages.page_of(measured(timings=timings, pool_bytes=100, cache_bytes=100)).verdict
    assert verdict == (
        "The machine was not quiet: dense did not settle while warming up.",
        "The images fit into the caches: latencies may be better than in use.",
    )
    assert pages.page_of(measured(timings=(), cache_bytes=0)).verdict == ("Nothing could be timed here.",)


def test_places_are_compared_with_their_own_dense_network() -> None:
    timings = [
        ScenarioTiming(SINGLE, timing(name, ms))
        for name, ms in (("a/dense", 4.0), ("a/shipped", 2.0), ("b/dense", 9.0), ("b/shipped", 3.0))
    ]
    ratios = {timed.timing.name: speedup.ratio for timed, speedup in pages.speedups(measured(timings=tuple(timings)))}
    assert ratios == {"a/shipped": 2.0, "b/shipped": 3.0}


def test_nothing_is_compared_across_runtimes_or_scenarios() -> None:
    timings = (
        ScenarioTiming(SINGLE, timing("dense", 4.0)),
        ScenarioTiming(OFFLINE, timing("shipped", 2.0)),
        ScenarioTiming(SINGLE, timing("shipped", 2.0, "openvino")),
    )
    assert list(pages.speedups(measured(timings=timings))) == []


def test_the_busiest_moment_counts_and_is_said_on_top() -> None:
    def loaded(load: str, name: str = "dense") -> ScenarioTiming:
        environment = replace(ENVIRONMENT, state={"load_average": load})
        return ScenarioTiming(SINGLE, timing(name, 4.0, environment=environment))

    page = pages.page_of(measured(timings=(loaded("0.1 0 0"), loaded("7.0 0 0", "shipped"), loaded("3.0 0 0"))))
    assert page.warnings[0].startswith("busy machine: load 7.0 on 2 cores when the timing began")
    assert page.verdict[0].endswith("shipped 1.00× (1.00–1.00) (busy machine: load 7.0 on 2 cores).")
    assert pages.crowd_of(measured(timings=())) == ""


def test_the_key_figures_are_single_images_on_onnx_runtime_six_at_most() -> None:
    figures = pages.page_of(measured()).key_figures
    assert [(figure.label, figure.value, figure.detail) for figure in figures] == [
        ("dense, p50", "4.00 ms", "90.0 % top-1"),
        ("shipped, p50", "2.00 ms", "88.0 % top-1"),
        ("shipped-int8, p50", "1.00 ms", "80.0 % top-1"),
    ]
    many = tuple(ScenarioTiming(SINGLE, timing(f"s{i}", 1.0)) for i in range(9))
    assert len(pages.page_of(measured(timings=many)).key_figures) == 6
    assert pages.page_of(measured(timings=many)).key_figures[0].detail == "accuracy not measured"


def test_a_subjects_costs_are_its_own_and_unknown_ones_a_dash() -> None:
    rows = table(pages.page_of(measured()), "accuracy", "Subjects")
    assert cells(rows, "dense") == {
        "subject": "dense",
        "top-1": "90.0 %",
        "95 % interval": "82.6–94.5",  # Wilson's, of 90 of 100
        "top-5": "99.0 %",
        "n": "100",
        "MACs": "4.00 k",
        "FLOPs": "8.00 k",
        "parameters": "300",
        "size": "1.00 kB",
        "file": "dense.onnx",
    }
    assert [cells(rows, "shipped-int8")[name] for name in ("MACs", "FLOPs", "parameters")] == ["–"] * 3


def test_accuracy_that_was_not_measured_is_said_and_dashed() -> None:
    page = pages.page_of(measured(subjects=(subject("dense", None),)))
    assert section(page, "accuracy").text == ("Quality was not measured; see what was not run.",)
    assert cells(table(page, "accuracy", "Subjects"), "dense")["top-1"] == "–"
    assert [part for part in section(page, "accuracy").parts if isinstance(part, Figure)] == []


def test_latency_is_headed_by_runtime_and_scenario() -> None:
    rows = table(pages.page_of(measured()), "latency", "Latency")
    assert [row[0] for row in rows.rows if len(row) == 1] == [
        "onnxruntime, single-stream, batch 1",
        "onnxruntime, offline, batch 8",
    ]
    assert cells(rows, "shipped") == {
        "subject": "shipped",
        "p50 ms": "2.00",
        "speed-up": "2.00×",
        "95 %": "2.00–2.00",
        "p90 ms": "n too small",
        "p99 ms": "n too small",
        "images/s": "500",
        "n": "4",
        "spread": "0 %",
    }
    assert cells(rows, "dense")["speed-up"] == ""


def test_each_runtime_and_scenario_has_its_curves() -> None:
    parts = section(pages.page_of(measured()), "latency").parts
    assert [part.name for part in parts if isinstance(part, Figure)] == [
        "single-stream-onnxruntime",
        "offline-onnxruntime",
    ]


def test_cold_starts_are_medians_over_processes() -> None:
    cold = (*measured().cold, ColdStart("shipped", "pytorch", (1.0,), (2.0,), (-1,)))
    rows = table(pages.page_of(measured(cold=cold)), "cold", "Cold start")
    assert list(cells(rows, "dense").values()) == ["dense", "onnxruntime", "6.00", "2.00", "20.0 MB", "3"]
    assert cells(rows, "shipped")["peak memory"] == "–"


def test_points_are_files_with_an_accuracy_and_equal_dense_networks_one() -> None:
    timings = tuple(
        ScenarioTiming(SINGLE, timing(name, ms))
        for name, ms in (("a/dense", 4.0), ("a/shipped", 2.0), ("b/dense", 4.1), ("b/shipped", 1.0), ("b/other", 1.0))
    )
    subjects = (
        subject("a/dense", 90),
        subject("a/shipped", 88, budget="macs 0.5"),
        subject("b/dense", 90),
        subject("b/shipped", 80),
        subject("b/other", None),
    )
    points = pages._points(measured(timings=timings, subjects=subjects))
    assert [(point.label, point.ms, point.reference) for point in points] == [
        ("dense", 4.0, True),
        ("a/shipped (macs 0.5)", 2.0, False),
        ("b/shipped", 1.0, False),
    ]


def test_a_name_is_parted_into_place_variant_and_precision() -> None:
    row = pages._latency_row(timing("run/shipped-int8", 2.0))
    assert (row.variant, row.precision, row.percentiles) == (
        "run/shipped",
        "int8",
        {"p50": 2.0, "p90": None, "p99": None},
    )
    assert pages._latency_row(timing("dense", 2.0)).precision == "fp32"


def test_what_was_not_run_has_its_reason_or_nothing_is_missing() -> None:
    assert section(pages.page_of(measured()), "not-run").text == ("Everything was run.",)
    rows = table(pages.page_of(measured(not_run=("openvino: not installed",))), "not-run", "Not run")
    assert rows.rows == (("openvino: not installed",),)


def test_how_it_was_measured_is_told_whole() -> None:
    page = pages.page_of(measured())
    way = dict(table(page, "how", "Way of measuring").rows)
    assert (way["threads"], way["pinned to cores"], way["largest cache"]) == ("1", "0", "1.00 MB")
    assert way["fingerprint"] == ENVIRONMENT.fingerprint
    assert table(page, "how", "Time by part").rows[-1] == ("all", "3.5 s")
    unknown = pages.page_of(measured(cache_bytes=0, options=replace(measured().options, cores=())))
    way = dict(table(unknown, "how", "Way of measuring").rows)
    assert (way["pinned to cores"], way["largest cache"]) == ("not pinned: the system can't", "unknown")


def test_changes_against_another_benchmark_come_first() -> None:
    change = Change("dense", "onnxruntime", SINGLE, 4.0, 2.0, Speedup("dense", "dense", 2.0, 1.9, 2.1))
    page = pages.page_of(measured(), (change,), "old.json")
    assert page.sections[0].text == ("Compared with old.json.",)
    assert table(page, "changes", "Changes").rows == (
        ("dense", "onnxruntime", SINGLE, "4.00", "2.00", "2.00×", "1.90–2.10"),
    )
    assert "changes" not in [section.anchor for section in pages.page_of(measured()).sections]


@pytest.mark.parametrize("changes", [{"subjects": ()}, {"timings": ()}, {"cold": ()}, {"seconds": {}}])
def test_no_table_stands_empty(changes: dict[str, Any]) -> None:
    taken: Measured = measured(**changes)
    tables = [part for section in pages.page_of(taken).sections for part in section.parts if isinstance(part, Table)]
    assert all(one.rows for one in tables)


def test_another_tasks_files_stand_under_its_measure_without_a_column_of_top5() -> None:
    iou = Quality("mIoU", 0.8, 100, 0.75, 0.85)
    page = pages.page_of(measured(subjects=(subject("dense", None, accuracy=iou), subject("shipped", None))))
    rows = table(page, "accuracy", "Subjects")
    assert rows.head[:4] == ("subject", "mIoU", "95 % interval", "n")
    assert len(rows.align) == len(rows.head)
    assert list(cells(rows, "dense").values())[1:4] == ["80.0 %", "75.0–85.0", "100"]
    assert list(cells(rows, "shipped").values())[1:4] == ["–", "–", "–"]
    assert "Wilson" not in rows.note
    assert page.key_figures[0].detail == "80.0 % mIoU"
