"""Tables of a report: cells against the records by hand, one cell for each column, and what an absent figure shows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from compressor.records import Accuracy, Cost, LeftAlone
from compressor.report import (
    AccuracyRow,
    EngineRow,
    FileRow,
    GateRow,
    GroupRow,
    LatencyRow,
    LayerRow,
    ParityRow,
    RecoveryRow,
    ReportInput,
    StageRow,
    tables,
)
from compressor.report.tables import Table

Maker = Callable[[ReportInput], Table]
MAKERS: tuple[Maker, ...] = (
    tables.gate_table,
    tables.group_table,
    tables.layer_table,
    tables.left_alone_table,
    tables.repair_table,
    tables.accuracy_table,
    tables.parity_table,
    tables.latency_table,
    tables.cost_table,
    tables.file_table,
    tables.precision_table,
    tables.engine_table,
    tables.job_table,
    tables.slowest_table,
)


def cells(table: Table, row: int = 0) -> dict[str, str]:
    """One row by the names of its columns; rows that head others are passed over."""
    rows = [line for line in table.rows if len(line) > 1]
    return dict(zip(table.head, rows[row], strict=True))


@pytest.mark.parametrize("make", MAKERS)
def test_every_row_has_a_cell_for_each_column_or_heads_others(make: Maker, run: ReportInput) -> None:
    table = make(run)
    assert table.rows
    assert len(table.align) == len(table.head)
    assert set(table.align) <= set("clr")
    assert {len(row) for row in table.rows} <= {1, len(table.head)}
    assert all(isinstance(cell, str) for row in table.rows for cell in row)


@pytest.mark.parametrize("make", MAKERS)
def test_a_run_that_did_nothing_has_no_row_but_its_costs_and_groups(make: Maker, bare: ReportInput) -> None:
    assert bool(make(bare).rows) == (make in (tables.cost_table, tables.group_table))


def test_a_gate_shows_what_was_found_and_what_may_be(bare: ReportInput) -> None:
    gates = (
        GateRow("parity", 1e-4, 2.5e-6, True),
        GateRow("top-1", 0.9, 0.85, False, ">=", "share"),
        GateRow("loss", 3.0, 0.0, False, unit="points", doubt="12 images are too few"),
        GateRow("loss, int8", 3.0, 0.0, False, doubt="12 images are too few"),
    )
    table = tables.gate_table(replace(bare, gates=gates))
    assert cells(table) == {"gate": "parity", "result": "passed", "found": "2.5e-06", "limit": "≤ 0.0001", "unit": ""}
    assert [row[1] for row in table.rows] == ["passed", "FAILED", "not shown", "not shown"]
    assert cells(table, 1)["limit"] == "≥ 0.9"
    assert table.note == "Not shown: 12 images are too few."  # one reason once


def test_a_group_shows_what_went_of_its_units_and_of_their_scores(bare: ReportInput) -> None:
    group = GroupRow("g", "channel", ("a", "b"), 4, np.array([0, 2]), np.array([6.0, -1.0, 2.0, 1.0]))
    row = cells(tables.group_table(replace(bare, groups=(group,))))
    assert row == {
        "group": "g",
        "units": "4 → 2",
        "removed": "50 %",
        "relevance removed": "20.0 %",  # 1 + 1 of 10: sizes without signs
        "kind": "channel",
        "layers": "2",
    }


@pytest.mark.parametrize(("scores", "text"), [((), "–"), ((np.nan,) * 4, "–"), ((0.0,) * 4, "0.0 %")])
def test_a_group_without_scores_has_a_dash_and_one_of_zeros_a_zero(
    bare: ReportInput, scores: tuple[float, ...], text: str
) -> None:
    group = GroupRow("g", "channel", ("a",), 4, np.array([0, 2]), np.array(scores))
    assert cells(tables.group_table(replace(bare, groups=(group,))))["relevance removed"] == text


def test_a_layer_shows_width_and_macs_before_and_after(bare: ReportInput) -> None:
    layers = (LayerRow("", "linear", 1000, 250, 4_000_000, 1_000_000), LayerRow("relu", "relu", 0, 0, 0, 0))
    table = tables.layer_table(replace(bare, layers=layers))
    assert len(table.rows) == 1
    assert cells(table) == {
        "layer": "(top level)",
        "width": "1,000 → 250",
        "MACs": "4.00 M → 1.00 M",
        "MACs removed": "75 %",
        "operation": "linear",
    }


def test_a_layer_left_alone_is_named_with_the_operation_in_its_way(bare: ReportInput) -> None:
    table = tables.left_alone_table(replace(bare, left_alone=(LeftAlone("", "aten.sort", "its order matters"),)))
    assert table.rows == (("(top level)", "aten.sort", "its order matters"),)


def test_accuracies_are_headed_by_their_conditions_and_the_dense_one_has_no_points(bare: ReportInput) -> None:
    rows = (
        AccuracyRow("dense", Accuracy(90, 100, 99)),
        AccuracyRow("shipped", Accuracy(85, 100)),
        AccuracyRow("shipped", Accuracy(1700, 2000), "int8", "onnxruntime"),
    )
    table = tables.accuracy_table(replace(bare, accuracy=rows, shipped="tuned"))
    assert [row[0] for row in table.rows if len(row) == 1] == [
        "pytorch, fp32, 100 evaluation images",
        "onnxruntime, int8, 2,000 evaluation images",
    ]
    low, high = Accuracy(90, 100).interval
    assert cells(table) == {
        "network": "dense",
        "top-1": "90.0 %",
        "points": "",
        "95 % interval": f"{100 * low:.1f}–{100 * high:.1f}",
        "top-5": "99.0 %",
    }
    assert cells(table, 1)["points"] == "\u22125.0"
    assert cells(table, 1)["top-5"] == "–"
    assert [cells(table, row)["network"] for row in (1, 2)] == ["shipped: tuned", "shipped"]


def test_a_parity_is_judged_by_the_absolute_distance(bare: ReportInput) -> None:
    row = ParityRow("pytorch", "onnxruntime", "fp16", 4, max_abs=2e-3, max_rel=7.0, limit=2e-3)
    table = tables.parity_table(replace(bare, parity=(row, replace(row, max_abs=2.1e-3))))
    assert table.rows[0] == ("pytorch → onnxruntime, fp16, batch 4",)
    assert table.rows[1] == ("shipped", "passed", "2.0e-03", "2e-03", "7.0e+00")
    assert table.rows[2][1] == "FAILED"


def latency(variant: str, ms: float, precision: str = "fp32", note: str = "") -> LatencyRow:
    percentiles = {"p50": ms, "p90": 2 * ms, "p99": None}
    return LatencyRow("cpu", precision, 1, variant, np.full(1200, ms), percentiles, threads=2, note=note)


def test_a_latency_stands_beside_the_dense_one_of_its_conditions(bare: ReportInput) -> None:
    rows = (latency("dense", 3.0), latency("shipped", 1.5), latency("shipped", 1.0, "int8"))
    table = tables.latency_table(replace(bare, latency=rows))
    assert table.rows[0] == ("cpu, batch 1, 2 threads",)
    assert cells(table)["speed-up"] == ""
    assert cells(table, 1) == {
        "network": "shipped",
        "p50 ms": "1.50",
        "speed-up": "2.00×",
        "p90 ms": "3.00",
        "p99 ms": tables.TOO_FEW,
        "n": "1,200",
    }
    assert (cells(table, 2)["network"], cells(table, 2)["speed-up"]) == ("shipped, int8", "3.00×")


def test_a_percentile_that_nobody_took_is_a_dash_and_a_note_has_a_column(bare: ReportInput) -> None:
    row = replace(latency("dense", 3.0, note="busy"), percentiles={"p50": 3.0})
    table = tables.latency_table(replace(bare, latency=(row, latency("shipped", 1.0))))
    assert (cells(table)["p90 ms"], cells(table)["p99 ms"], cells(table)["note"]) == ("–", "–", "busy")
    assert cells(table, 1)["note"] == ""


def test_what_one_image_costs_counts_two_flops_a_mac(bare: ReportInput) -> None:
    run = replace(bare, cost_dense=Cost(4000, 800, 100), cost_shipped=Cost(1000, 800, 50))
    assert tables.cost_table(run).rows == (
        ("MACs", "4.00 k", "1.00 k", "75.0 %"),
        ("FLOPs (2 per MAC)", "8.00 k", "2.00 k", "75.0 %"),
        ("parameters", "800", "800", "0.0 %"),
        ("activations", "100", "50", "50.0 %"),
    )


def test_weights_of_7_bits_are_explained_only_where_there_are_any(bare: ReportInput) -> None:
    eight = FileRow("model.int8.onnx", "CPUs", "shipped", "int8", 1000, (), "minmax", 8)
    table = tables.precision_table(replace(bare, files=(FileRow("model.onnx", "all", "shipped", "fp32", 4000), eight)))
    assert table.rows == (("model.int8.onnx", "int8", "minmax", "8", "–", "none"),)
    assert "7 bits" not in table.note
    assert "7 bits" in tables.precision_table(replace(bare, files=(replace(eight, bits=7),))).note


def test_an_engine_that_was_not_built_has_dashes(bare: ReportInput) -> None:
    engines = (
        EngineRow("a.plan", "tensorrt-rtx", "sm 8.9", "fp16", 2_000_000, "built", 1234, build_s=12.34),
        EngineRow("b.plan", "tensorrt-rtx", "sm 8.7", "fp16", 0, "refused"),
    )
    table = tables.engine_table(replace(bare, engines=engines))
    assert [cells(table)[name] for name in ("size", "kernels", "build s")] == ["2.00 MB", "1,234", "12.3"]
    assert [cells(table, 1)[name] for name in ("size", "kernels", "build s")] == ["–", "–", "–"]


def test_seconds_add_up_and_of_memory_the_largest_peak_counts(bare: ReportInput) -> None:
    stages = (StageRow("groups", 1.0, 5_000_000, reused=True), StageRow("scores-1", 3.0, 9_000_000), StageRow("x", 0.0))
    table = tables.job_table(replace(bare, stages=stages))
    assert [row[2] for row in table.rows] == ["25 %", "75 %", "0 %", "100 %"]
    assert table.rows[-1] == ("all", "4.0", "100 %", "9.00 MB", "1 of 3 re-used")
    instant = tables.job_table(replace(bare, stages=(StageRow("groups", 0.0),)))
    assert [row[2] for row in instant.rows] == ["0 %", "100 %"]


def test_the_slowest_layers_are_a_few_and_their_shares_are_of_all(bare: ReportInput) -> None:
    layers = tuple(LayerRow(f"l{i}", "conv2d", 1, 1, 9, 1, None, 1.0) for i in range(tables.SLOWEST + 5))
    table = tables.slowest_table(replace(bare, layers=layers))
    assert len(table.rows) == tables.SLOWEST
    assert cells(table)["share"] == "5.0 %"  # of 20 layers alike
    assert cells(table)["dense ms"] == "–"


def test_fields_without_content_are_a_dash() -> None:
    table = tables.pairs_table("Recipe", {"seed": 0, "weights": "", "on": (), "gpu": None})
    assert table.rows == (("seed", "0"), ("weights", "–"), ("on", "–"), ("gpu", "–"))


TAUGHT = (
    RecoveryRow(0.0, 0, 0.8, 0.7),
    RecoveryRow(61.2, 3200, 0.9, 0.75, kept=True),
    RecoveryRow(90, 6400, 0.89, 0.74),
)


def test_a_recovery_is_shown_over_its_time_and_is_nothing_without_one(bare: ReportInput) -> None:
    rows = tables.recovery_table(replace(bare, recovery=TAUGHT)).rows
    assert rows[0] == ("repaired", "0", "0.8000", "0.7000", "")
    assert rows[1] == ("61 s", "3,200", "0.9000", "0.7500", "kept")
    assert tables.recovery_table(bare).rows == ()
