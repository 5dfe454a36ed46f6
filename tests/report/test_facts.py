"""What a report derives from its records: the compared pairs, the front, the last network, and numbers as written."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from compressor.records import Accuracy
from compressor.report import AccuracyRow, GroupRow, LatencyRow, LayerRow, ParetoPoint, ReportInput, StageRow, facts


def timed(variant: str, ms: float, precision: str = "fp32", runtime: str = "cpu", batch: int = 1) -> LatencyRow:
    return LatencyRow(runtime, precision, batch, variant, np.array([ms]), {"p50": ms}, threads=2)


def test_a_row_is_compared_with_the_dense_one_of_its_precision_else_of_fp32(bare: ReportInput) -> None:
    rows = (
        timed("dense", 4.0),
        timed("dense", 3.0, "int8"),
        timed("shipped", 2.0, "int8"),
        timed("shipped", 2.0, "fp16"),
        timed("shipped", 1.0, batch=8),
    )
    pairs = list(facts.latency_pairs(replace(bare, latency=rows)))
    assert [(dense.precision, row.precision) for dense, row in pairs] == [("int8", "int8"), ("fp32", "fp16")]
    assert [facts.speed_up(dense, row) for dense, row in pairs] == [1.5, 2.0]


def test_a_median_that_was_not_given_is_the_samples() -> None:
    row = LatencyRow("cpu", "fp32", 1, "dense", np.array([1.0, 9.0, 2.0]), {"p50": None})
    assert facts.median_ms(row) == 2.0
    assert facts.median_ms(replace(row, percentiles={})) == 2.0
    assert facts.median_ms(replace(row, percentiles={"p50": 1.5})) == 1.5


def test_the_last_network_is_by_the_runs_order_whatever_the_rows(bare: ReportInput) -> None:
    rows = (timed("shipped", 1.0), timed("elsewhere", 1.0), timed("removed", 1.0), timed("dense", 1.0))
    assert facts.last_variant(replace(bare, latency=rows)) == "shipped"
    assert facts.last_variant(replace(bare, latency=rows[1:])) == "removed"
    assert facts.last_variant(bare) == "dense"


def test_the_final_accuracy_is_of_the_last_network_as_the_dense_one_was_run(bare: ReportInput) -> None:
    rows = (
        AccuracyRow("dense", Accuracy(90, 100)),
        AccuracyRow("tuned", Accuracy(88, 100)),
        AccuracyRow("repaired", Accuracy(80, 100)),
        AccuracyRow("shipped", Accuracy(70, 100), "int8", "onnxruntime"),
    )
    final = facts.final_accuracy(replace(bare, accuracy=rows))
    assert final is rows[1]
    assert facts.final_accuracy(replace(bare, accuracy=rows[:1])) is None
    assert facts.final_accuracy(replace(bare, accuracy=rows[1:])) is rows[3]  # without a dense row all may be


def test_points_lost_are_against_the_dense_network_alike_and_else_on_the_same_images(bare: ReportInput) -> None:
    rows = (
        AccuracyRow("dense", Accuracy(90, 100)),
        AccuracyRow("dense", Accuracy(89, 100), runtime="onnxruntime"),
        AccuracyRow("shipped", Accuracy(85, 100), runtime="onnxruntime"),
        AccuracyRow("shipped", Accuracy(80, 100), "int8", "onnxruntime"),
        AccuracyRow("shipped", Accuracy(1, 100), images="calibration"),
    )
    run = replace(bare, accuracy=rows)
    assert facts.lost_points(run, rows[2]) == pytest.approx(4.0)
    assert facts.lost_points(run, rows[3]) == pytest.approx(10.0)
    assert facts.lost_points(run, rows[4]) is None


def test_the_front_is_the_points_that_none_beats_by_trying_all_pairs() -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        drawn = zip(rng.integers(1, 6, 8), rng.integers(0, 6, 8), strict=True)
        points = [ParetoPoint(str(i), float(ms), Accuracy(int(right), 10)) for i, (ms, right) in enumerate(drawn)]
        front = facts.pareto_front(points)
        best = {(point.ms, point.accuracy.correct) for point in points if not any(_beats(q, point) for q in points)}
        assert {(point.ms, point.accuracy.correct) for point in front} == best
        assert len(front) == len(best)  # of equal points one
        assert all(a.ms < b.ms for a, b in itertools.pairwise(front))


def _beats(a: ParetoPoint, b: ParetoPoint) -> bool:
    as_good = a.ms <= b.ms and a.accuracy.correct >= b.accuracy.correct
    return as_good and (a.ms < b.ms or a.accuracy.correct > b.accuracy.correct)


def test_layers_that_were_timed_come_slowest_first(bare: ReportInput) -> None:
    layers = tuple(LayerRow(f"l{i}", "conv2d", 1, 1, 1, 1, None, ms) for i, ms in enumerate((0.2, None, 0.5, 0.0)))
    assert [(ms, row.layer) for ms, row in facts.timed_layers(replace(bare, layers=layers))] == [
        (0.5, "l2"),
        (0.2, "l0"),
        (0.0, "l3"),
    ]


def test_scores_are_parted_by_the_plan_and_only_finite_ones_count() -> None:
    group = GroupRow("g", "channel", ("l",), 5, np.array([0, 3]), np.array([1.0, 2.0, np.nan, 4.0, np.inf]))
    kept, removed = facts.split_scores(group)
    assert (kept.tolist(), removed.tolist()) == ([1.0, 4.0], [2.0])
    assert [part.size for part in facts.split_scores(replace(group, scores=np.empty(0)))] == [0, 0]


def test_what_went_of_nothing_is_nothing() -> None:
    assert facts.removed_share(0, 0) == 0.0
    assert facts.removed_share(8, 2) == 0.75


@pytest.mark.parametrize(
    ("name", "several", "title"),
    [
        ("scores-2", True, "scoring every unit, round 2"),
        ("scores-1", False, "scoring every unit"),
        ("latency-model", True, "timing single layers, for the latency budget"),
        ("int8", False, "making the int8 files"),
        ("odd", True, "odd"),
        ("odd-3", True, "odd, round 3"),
        ("odd-name", True, "odd-name"),
    ],
)
def test_a_stage_is_named_in_words(name: str, several: bool, title: str) -> None:
    assert facts.title_of(name, several=several) == title


def test_a_round_is_numbered_only_where_a_second_one_is(bare: ReportInput) -> None:
    once = replace(bare, stages=(StageRow("scores-1", 1.0), StageRow("repair-1", 1.0)))
    twice = replace(bare, stages=(*once.stages, StageRow("scores-2", 1.0)))
    assert facts.stage_title(once, "scores-1") == "scoring every unit"
    assert facts.stage_title(twice, "scores-1") == "scoring every unit, round 1"
    assert facts.stage_title(twice, "repair-1") == "removing units and repairing what is left"


@pytest.mark.parametrize(("load", "is_busy"), [("2.5 9 9", False), ("2.51 0 0", True), ("", False)])
def test_a_machine_is_busy_where_more_wants_to_run_than_it_and_we_have_cores(load: str, is_busy: bool) -> None:
    assert bool(facts.crowd({"load_average": load}, {"cores": "2"})) == is_busy
    assert facts.crowd({"load_average": load}, {}) == ""


@pytest.mark.parametrize(
    ("write", "value", "text"),
    [
        (facts.count, 999, "999"),
        (facts.count, 1000, "1.00 k"),
        (facts.count, -2_500_000, "-2.50 M"),
        (facts.size, 999, "999 B"),
        (facts.size, 1e9, "1.00 GB"),
        (facts.three_digits, 9.999, "10.00"),
        (facts.three_digits, 10.0, "10.0"),
        (facts.three_digits, -272.4, "-272"),
        (facts.milliseconds, 1.0, "1.00"),
        (facts.milliseconds, 0.9996, "1.000"),
        (facts.points, -0.05, "+0.1"),
        (facts.points, -0.04, "0.0"),
        (facts.number, None, "–"),
        (facts.number, False, "no"),
        (facts.number, 1234.5678, "1235"),
        (facts.number, float("nan"), "nan"),
        (facts.number, (1, None, 0.25), "1, –, 0.25"),
        (facts.number, "text", "text"),
    ],
)
def test_a_number_is_written_short_and_never_without_its_sign_or_unit(
    write: Callable[[object], str], value: object, text: str
) -> None:
    assert write(value) == text


def test_what_a_units_number_is_called_is_the_criterions_to_say(bare: ReportInput) -> None:
    assert facts.worth(replace(bare, criterion="lrp, measured")) == "measured loss"
    assert facts.worth(replace(bare, criterion="measured by hand")) == "relevance"
