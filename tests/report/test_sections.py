"""What a report says in sentences: each clause against records made for it, and nothing said of what is not there."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from compressor.records import Accuracy, Compensation, Cost, LeftAlone
from compressor.report import (
    AccuracyRow,
    EngineRow,
    GateRow,
    GroupRow,
    LatencyRow,
    LayerRow,
    ParetoPoint,
    ParityRow,
    ReportInput,
)
from compressor.report.sections import (
    Figure,
    Section,
    build_sections,
    failures,
    key_figures,
    pareto_caption,
    slug,
    verdict,
)
from compressor.report.tables import Table

ANCHORS = ["gates", "removed", "cost", "seen", "gain", "time", "not-done", "how"]


def section(run: ReportInput, anchor: str) -> Section:
    return next(section for section in build_sections(run, ()) if section.anchor == anchor)


def latency(variant: str, ms: float, precision: str = "fp32", batch: int = 1, runtime: str = "cpu") -> LatencyRow:
    return LatencyRow(runtime, precision, batch, variant, np.array([ms]), {"p50": ms})


def test_sections_come_in_one_order_whatever_was_done(run: ReportInput, bare: ReportInput) -> None:
    for filled in (run, bare):
        assert [section.anchor for section in build_sections(filled, ())] == ANCHORS


def test_a_figure_stands_where_its_plot_could_be_drawn(run: ReportInput) -> None:
    for plots in (set(), {"removed"}, {"removed", "pareto", "latency-pytorch"}):
        figures = [part.name for one in build_sections(run, plots) for part in one.parts if isinstance(part, Figure)]
        assert set(figures) == plots


def test_every_figure_that_a_section_names_has_words_for_who_cannot_see_it(run: ReportInput) -> None:
    names = {"removed", "relevance", "layers", "trade", "pareto", "time", "latency-pytorch", "latency-onnxruntime-cpu"}
    figures = [part for one in build_sections(run, names) for part in one.parts if isinstance(part, Figure)]
    assert {figure.name for figure in figures} == names
    assert all(figure.alt and figure.caption for figure in figures)


def test_no_table_stands_empty(bare: ReportInput) -> None:
    assert all(part.rows for one in build_sections(bare, ()) for part in one.parts if isinstance(part, Table))


def test_the_verdict_begins_with_what_went(bare: ReportInput) -> None:
    run = replace(bare, cost_dense=Cost(1000, 800, 1), cost_shipped=Cost(250, 600, 1))
    assert verdict(run)[0] == "75.0 % of the MACs and 25.0 % of the parameters were removed."
    assert len(verdict(run)) == 4


def test_speed_is_listed_by_place_and_only_of_the_last_network(bare: ReportInput) -> None:
    rows = (
        latency("dense", 4.0),
        latency("removed", 1.0),
        latency("shipped", 2.0),
        latency("shipped", 1.0, "int8"),
        latency("dense", 9.0, batch=8),
        latency("shipped", 3.0, batch=8),
    )
    assert verdict(replace(bare, latency=rows))[2] == (
        "Speed against dense, by median latency: cpu at batch 1 2.00×, 4.00× in int8; cpu at batch 8 3.00×."
    )


def test_gates_are_counted_in_the_last_sentence(bare: ReportInput) -> None:
    good, bad = GateRow("budget", 0.5, 0.4, True), GateRow("parity", 1e-4, 1.0, False, remedy="export again")
    doubtful = GateRow("accuracy", 3.0, 0.0, False, doubt="few images")
    assert verdict(replace(bare, gates=(good, good)))[-1] == "All 2 gates passed."
    assert verdict(replace(bare, gates=(good, doubtful)))[-1] == "1 of 2 gates passed; not shown: accuracy."
    failed = replace(bare, gates=(good, bad, doubtful))
    assert verdict(failed)[-1] == "Failed: parity. This result should not ship."
    assert failures(failed) == (("parity", "export again"),)


def test_a_parity_that_a_gate_speaks_for_is_not_named_twice(bare: ReportInput) -> None:
    row = ParityRow("pytorch", "onnxruntime", "fp32", 1, max_abs=1.0, max_rel=1.0, limit=1e-4)
    gate = GateRow("Parity of model.onnx", 1e-4, 1.0, False, remedy="export again")
    assert [name for name, _ in failures(replace(bare, parity=(row,)))] == ["parity of onnxruntime, fp32, batch 1"]
    assert [name for name, _ in failures(replace(bare, parity=(row,), gates=(gate,)))] == ["Parity of model.onnx"]


def test_the_key_figures_are_costs_accuracy_and_three_latencies_at_most(bare: ReportInput) -> None:
    rows = (
        latency("dense", 4.0),
        latency("shipped", 2.0),
        latency("shipped", 1.5, "fp16"),
        latency("shipped", 1.0, "int8"),
        latency("dense", 9.0, batch=8),
        latency("shipped", 3.0, batch=8),
        latency("dense", 90.0, batch=64),
        latency("shipped", 30.0, batch=64),
    )
    accuracy = (AccuracyRow("dense", Accuracy(90, 100)), AccuracyRow("shipped", Accuracy(80, 100)))
    run = replace(bare, latency=rows, accuracy=accuracy, cost_dense=Cost(2000, 10, 1), cost_shipped=Cost(500, 5, 1))
    figures = key_figures(run)
    assert [(figure.label, figure.value) for figure in figures] == [
        ("MACs", "500"),
        ("Parameters", "5"),
        ("Top-1", "80.0 %"),
        ("p50, batch 1", "2.00 ms"),
        ("p50, batch 8", "3.00 ms"),
        ("p50, batch 1", "1.00 ms"),  # the fastest of the other precisions, at the first one's conditions
    ]
    assert figures[0].detail == "dense 2.00 k; 75.0 % removed"
    assert figures[5].detail == "dense 4.00 ms; cpu in int8"


def test_without_fp32_no_latency_leads_the_page(bare: ReportInput) -> None:
    rows = (latency("dense", 4.0), latency("shipped", 1.0, "int8"))
    labels = [figure.label for figure in key_figures(replace(bare, latency=rows))]
    assert labels == ["MACs", "Parameters"]


def test_units_that_went_are_counted_over_the_groups(bare: ReportInput) -> None:
    groups = (
        GroupRow("a", "channel", ("a",), 1500, np.arange(500)),
        GroupRow("b", "channel", ("b",), 10, np.arange(10)),
    )
    said = section(replace(bare, groups=groups), "removed").text[0]
    assert said.startswith("1,000 of 1,510 units went, from 1 of 2 groups.")


def test_how_units_were_ranked_is_said_where_a_criterion_is_known(bare: ReportInput) -> None:
    ranked = section(replace(bare, criterion="lrp", samples=1200), "removed").text
    assert ranked[1] == "Ranked by lrp over 1,200 calibration images; budget: none."
    assert len(section(bare, "removed").text) == 1
    assert "was measured" in section(replace(bare, criterion="lrp, measured"), "removed").text[2]


def test_what_was_not_done_is_listed_once_and_complete(bare: ReportInput) -> None:
    run = replace(
        bare,
        not_checked=("a runtime", "a runtime"),
        engines=(EngineRow("a.plan", "rtx", "sm", "fp16", 1, "built, not run: no GPU"), _built()),
        unscored=("g",),
        uncovered=("aten.erf",),
        cost_dense=Cost(1, 1, 1, {}, ("aten.fft", "aten.a")),
        cost_shipped=Cost(1, 1, 1, {}, ("aten.fft",)),
        repair=Compensation(left_alone=(LeftAlone("", "aten.x", "a reason"),)),
        left_alone=(LeftAlone("fc", "aten.linear", "classes"),) * 2,
    )
    (table,) = section(run, "not-done").parts
    assert isinstance(table, Table)
    assert [row[0] for row in table.rows] == [
        "a runtime",
        "a.plan: built, not run: no GPU",
        "group g was not scored, so all its units stayed",
        "operation aten.erf has no relevance rule; it was passed by input x gradient",
        "operation aten.a could not be counted, so MACs are a lower bound",
        "operation aten.fft could not be counted, so MACs are a lower bound",
        "layer (top level) was not repaired: a reason",
        "2 layers were left alone, for the reason given above",
    ]


def _built() -> EngineRow:
    return EngineRow("b.plan", "rtx", "sm", "fp16", 1, "built and run")


def test_where_nothing_was_left_out_it_is_said(bare: ReportInput) -> None:
    complete = replace(bare, cost_shipped=Cost(1, 1, 1))
    assert section(complete, "not-done").text == ("Nothing was left out.",)
    assert section(complete, "not-done").parts == ()


def test_layers_that_were_timed_are_not_said_to_be_missing(bare: ReportInput) -> None:
    timed = replace(bare, layers=(LayerRow("a", "conv2d", 1, 1, 1, 1, 0.1, 0.1),))
    assert section(timed, "time").text == ()
    assert section(bare, "time").text == ("Layers were not timed one by one.",)


@pytest.mark.parametrize(
    ("text", "expected"),
    [("single-stream", "single-stream"), ("ONNX Runtime (CPU)", "onnx-runtime-cpu"), ("--a__b--", "a-b"), ("", "")],
)
def test_a_slug_is_letters_digits_and_single_hyphens(text: str, expected: str) -> None:
    assert slug(text) == expected


def test_two_runtimes_have_two_plots_with_names_of_their_own(bare: ReportInput) -> None:
    rows = (latency("dense", 1.0, runtime="a b"), latency("dense", 1.0, runtime="a-c"))
    names = {"latency-a-b", "latency-a-c"}
    parts = [part for one in build_sections(replace(bare, latency=rows), names) for part in one.parts]
    assert {part.name for part in parts if isinstance(part, Figure)} == names


def test_a_front_of_none_says_nothing_of_one() -> None:
    assert "beats" not in pareto_caption(())
    assert "none beats a in both" in pareto_caption((ParetoPoint("a", 1.0, Accuracy(1, 2)),))
