"""What is drawn, read back from the figure before it becomes pixels: bars, dots, curves and points by their numbers."""

from __future__ import annotations

import struct
from dataclasses import replace

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from compressor.records import Accuracy
from compressor.report import GroupRow, LatencyRow, LayerRow, ParetoPoint, RecoveryRow, ReportInput, TradePoint, plots

# Numbers that go through matplotlib's float64 transforms and back.
DRAWN = 1e-9


def axes_of(figure: Figure | None) -> Axes:
    assert figure is not None
    (axes,) = figure.axes
    return axes


def bars(axes: Axes, label: str) -> list[float]:
    (container,) = [one for one in axes.containers if one.get_label() == label]
    return [bar.get_width() for bar in container]


def group(name: str, size: int, kept: int, scores: list[float] | None = None) -> GroupRow:
    return GroupRow(name, "channel", (name,), size, np.arange(kept), np.array(scores or []))


def test_bars_of_kept_and_removed_units_fill_each_group() -> None:
    axes = axes_of(plots._removed([group("a", 8, 2), group("b", 10, 10)]))
    assert bars(axes, "kept") == [0.25, 1.0]
    assert bars(axes, "removed") == [0.75, 0.0]
    assert [text.get_text() for text in axes.texts] == ["2/8", "10/10"]
    assert [tick.get_text() for tick in axes.get_yticklabels()] == ["a", "b"]
    top, bottom = sorted(axes.get_ylim())
    assert axes.get_ylim() == (bottom, top)  # the first group stands on top


def test_dots_are_shares_of_the_groups_largest_score_kept_above_removed() -> None:
    groups = [group("a", 4, 2, [8.0, -4.0, 2.0, 1.0]), group("unscored", 4, 2), group("c", 2, 1, [0.0, 0.0])]
    axes = axes_of(plots._relevance(groups, "relevance"))
    kept, removed, kept_zero, removed_zero = (dots.get_offsets() for dots in axes.collections)
    assert np.asarray(kept)[:, 0].tolist() == [1.0, -0.5]
    assert np.asarray(removed)[:, 0].tolist() == [0.25, 0.125]
    assert np.asarray(kept_zero)[:, 0].tolist() == np.asarray(removed_zero)[:, 0].tolist() == [0.0]
    assert np.asarray(kept)[:, 1].max() < np.asarray(removed)[:, 1].min() + 0.36
    assert [tick.get_text() for tick in axes.get_yticklabels()] == ["a", "c"]
    assert plots._relevance([group("unscored", 4, 2)], "relevance") is None


def test_a_legend_names_each_colour_once() -> None:
    groups = [group(name, 2, 1, [2.0, 1.0]) for name in "abc"]
    assert axes_of(plots._relevance(groups, "relevance")).get_legend_handles_labels()[1] == ["kept", "removed"]


def test_layers_are_in_millions_of_macs_and_those_without_any_are_left_out(bare: ReportInput) -> None:
    layers = (LayerRow("", "linear", 4, 2, 3_000_000, 1_500_000), LayerRow("relu", "relu", 0, 0, 0, 0))
    axes = axes_of(plots._layers(replace(bare, layers=layers)))
    assert (bars(axes, "dense"), bars(axes, "shipped")) == ([3.0], [1.5])
    assert axes.get_yticklabels()[0].get_text() == "(top level)"
    assert plots._layers(replace(bare, layers=layers[1:])) is None


def test_the_slowest_layers_have_a_bar_where_the_dense_one_was_timed(bare: ReportInput) -> None:
    layers = (LayerRow("a", "conv2d", 1, 1, 1, 1, None, 0.5), LayerRow("b", "conv2d", 1, 1, 1, 1, 3.0, 2.0))
    axes = axes_of(plots._time(replace(bare, layers=layers)))
    assert (bars(axes, "dense"), bars(axes, "shipped")) == ([3.0, 0.0], [2.0, 0.5])
    assert plots._time(bare) is None


@pytest.mark.parametrize(("rows", "named"), [(1, 1), (60, 60), (61, 31), (100, 34), (400, 40)])
def test_many_rows_are_named_in_steps(rows: int, named: int) -> None:
    assert len(range(0, rows, plots.label_step(rows))) == named


@pytest.mark.parametrize(("name", "shown"), [("x" * 26, "x" * 26), ("a" * 10 + "b" * 25, "…" + "b" * 25)])
def test_of_a_long_name_the_end_is_shown(name: str, shown: str) -> None:
    assert plots.shortened(name) == shown
    assert len(shown) == 26


def test_the_trade_is_in_percent_and_the_ring_lies_on_what_ships(bare: ReportInput) -> None:
    points = (TradePoint("dense", 1.0, 0.9), TradePoint("tuned", 0.5, 0.85, chosen=True), TradePoint("tuned", 0.4, 0.8))
    axes = axes_of(plots._trade(replace(bare, trade=points)))
    drawn = {str(dots.get_label()): np.asarray(dots.get_offsets()).tolist() for dots in axes.collections}
    assert drawn["dense: 90.0 %"] == [[100.0, 90.0]]
    assert drawn["tuned"] == [[50.0, 85.0], [40.0, 80.0]]
    assert drawn["shipped"] == [[50.0, 85.0]]
    assert plots._trade(replace(bare, trade=points[:1])) is None


def test_the_front_is_a_line_and_intervals_are_bars() -> None:
    points = [
        ParetoPoint("dense", 4.0, Accuracy(90, 100), reference=True),
        ParetoPoint("small", 2.0, Accuracy(88, 100)),
        ParetoPoint("beaten", 3.0, Accuracy(80, 100)),
    ]
    figure = plots.draw_pareto(points)
    axes = axes_of(figure)
    front, *intervals = axes.lines
    assert np.asarray(front.get_xydata()).tolist() == [[2.0, 88.0], [4.0, 90.0]]
    for point, interval in zip(points, intervals, strict=True):
        assert np.asarray(interval.get_xdata()).tolist() == [point.ms] * 2
        assert np.asarray(interval.get_ydata()) == pytest.approx([100 * end for end in point.accuracy.interval])
    assert axes.get_xlim()[0] == 0
    labels = [str(dots.get_label()) for dots in axes.collections]
    assert labels == ["dense: 4.00 ms, 90.0 %", "small: 2.00 ms, 88.0 %", "beaten: 3.00 ms, 80.0 %"]
    assert plots.draw_pareto(points[:1]) is None


def row(samples: list[float], variant: str = "shipped", batch: int = 1, precision: str = "fp32") -> LatencyRow:
    return LatencyRow("cpu", precision, batch, variant, np.array(samples), {"p50": float(np.median(samples or [0]))})


def test_a_curve_is_the_share_of_runs_finished_by_a_time() -> None:
    (curve,) = axes_of(plots.draw_latency([row([3.0, 1.0, 2.0, 2.0])])).lines
    points = np.asarray(curve.get_xydata())
    for ms in (1.0, 2.0, 3.0):
        finished = sum(sample <= ms for sample in (3.0, 1.0, 2.0, 2.0)) / 4
        assert points[points[:, 0] == ms][:, 1].max() == pytest.approx(100 * finished, abs=DRAWN)


def test_each_batch_size_has_a_panel_with_its_own_rows() -> None:
    figure = plots.draw_latency([row([1.0], "dense"), row([1.0]), row([8.0], batch=8), row([], batch=64)])
    assert figure is not None
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["batch 1", "batch 8"]
    assert [len(axes.lines) for axes in figure.axes] == [2, 1]
    assert plots.draw_latency([row([])]) is None


def test_a_few_slow_runs_put_the_axis_on_a_logarithm() -> None:
    assert axes_of(plots.draw_latency([row([1.0, 9.0])])).get_xscale() == "linear"
    assert axes_of(plots.draw_latency([row([1.0, 11.0])])).get_xscale() == "log"


def test_the_dense_network_is_grey_and_each_precision_has_a_line_of_its_own() -> None:
    rows = [row([1.0], "dense"), *(row([1.0], precision=precision) for precision in ("fp32", "fp16", "int8"))]
    lines = axes_of(plots.draw_latency(rows)).lines
    assert lines[0].get_color() == plots.DENSE
    assert len({(line.get_color(), line.get_linestyle()) for line in lines}) == 4


def test_a_picture_has_the_figures_size_and_no_name_of_the_software() -> None:
    png = plots.to_png(Figure(figsize=(1.0, 0.5)))
    width, height = struct.unpack(">II", png[16:24])
    assert (width, height) == (plots.DPI, plots.DPI // 2)
    assert b"Software" not in png


def test_only_what_has_something_to_show_becomes_a_picture() -> None:
    images = plots.draw([("nothing", lambda: None), ("something", lambda: Figure(figsize=(0.1, 0.1)))])
    assert list(images) == ["something"]


def test_a_recovery_is_drawn_in_minutes_with_a_ring_on_what_was_kept(bare: ReportInput) -> None:
    rows = (RecoveryRow(0.0, 0, 0.8, 0.7), RecoveryRow(90.0, 3200, 0.9, 0.75, kept=True))
    axes = axes_of(plots._recovery(replace(bare, recovery=rows)))
    assert axes.lines[0].get_xdata().tolist() == [0.0, 1.5]
    assert axes.collections[0].get_offsets().tolist() == [[1.5, 0.9]]
    assert plots._recovery(bare) is None
