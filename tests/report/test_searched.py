"""What a search reports: the verdict's clauses against curves made for them, and tables and plots read back."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from compressor.report import searched
from compressor.report.searched import Curve, SearchReport, Tried, write_search_report


def curve(name: str, area: float, *, part: str = "search", preset: str = "", best: bool = False) -> Curve:
    points = ((0.3, area - 0.1, 0.29, 400), (0.6, area + 0.1, 0.58, 400))
    return Curve(name, part, points, area, best, preset)


def tried(number: int, value: float | None, *, state: str = "complete", preset: str = "") -> Tried:
    points = () if value is None else ((0.3, value - 0.1), (0.6, value + 0.1))
    return Tried(number, state, value, preset, points, seconds=1.5)


@pytest.fixture
def report() -> SearchReport:
    return SearchReport(
        model="nets/mine.py:build",
        best="trial 7",
        preset="epsilon",
        dense={"search": 0.95, "evaluation": 0.94},
        metric="top-1",
        is_share=True,
        settings=(("normalisation", "mean"),),
        composite=(("conv2d", "gamma 0.25"),),
        curves=(
            curve("trial 7", 0.8, best=True),
            curve("epsilon", 0.75, preset="epsilon"),
            curve("gamma", 0.7, preset="gamma"),
        ),
        tried=(tried(0, 0.75, preset="epsilon"), tried(1, 0.4, state="stopped"), tried(7, 0.8), tried(8, None)),
        importance=(("rule of conv2d", 0.7), ("normalisation", 0.3)),
        images={"search": 400, "evaluation": 500},
        hashes={"search": "ab" * 32, "evaluation": "cd" * 32},
        trial_images=200,
        score_images=64,
        repaired=True,
    )


def said(report: SearchReport) -> str:
    return " ".join(searched._verdict(report))


def test_trials_are_counted_and_the_best_is_named(report: SearchReport) -> None:
    assert said(report).startswith("4 trials, 1 of them stopped early; the best is trial 7.")


def test_the_lead_is_over_the_best_preset_in_points(report: SearchReport) -> None:
    assert "80.00 %, 5.00 points ahead of the best preset there (epsilon, 75.00 %)" in said(report)
    behind = replace(report, curves=(curve("trial 7", 0.7, best=True), *report.curves[1:]))
    assert "5.00 points behind the best preset there" in said(behind)
    level = replace(report, curves=(curve("trial 7", 0.75, best=True), *report.curves[1:]))
    assert "0.00 points level with" in said(level)


def test_images_that_the_search_never_saw_judge_where_they_were_counted(report: SearchReport) -> None:
    unseen = tuple(replace(one, part="evaluation", area=one.area - 0.1) for one in report.curves)
    assert "On images the search never saw" in said(replace(report, curves=(*report.curves, *unseen)))
    assert "On search images" in said(report)


def test_a_preset_that_won_is_said_to_have(report: SearchReport) -> None:
    won = replace(report, best="epsilon", curves=(replace(report.curves[1], best=True), report.curves[2]))
    assert "No trial beat the best preset on the search images" in said(won)
    assert "ahead" not in said(won)


def test_the_noise_is_a_shares_standard_error(report: SearchReport) -> None:
    """Mean accuracy 0.8 on 400 images: 1.96 sqrt(0.8 x 0.2 / 400) = 3.92 points."""
    assert searched._noise(report.curves[0]) == pytest.approx(196 * math.sqrt(0.8 * 0.2 / 400))
    assert "400 images carry about ±3.9 points" in said(report)
    certain = replace(report.curves[0], points=((0.3, 1.0, 0.3, 400),))
    assert searched._noise(certain) == 0.0


@pytest.mark.parametrize(
    ("areas", "alike"), [((0.80, 0.79), True), ((0.80, 0.60), False), ((0.80,), False), ((0.80, None), False)]
)
def test_trials_within_chance_of_each_other_are_said_to_be_alike(
    report: SearchReport, areas: tuple[float | None, ...], alike: bool
) -> None:
    trials = tuple(tried(number, area) for number, area in enumerate(areas))
    stopped = tried(99, 0.1, state="stopped")  # of which nothing follows: it saw other budgets
    assert ("hardly matters" in said(replace(report, tried=(*trials, stopped)))) == alike


def test_the_figures_on_top_are_areas_by_part_and_the_time_of_all(report: SearchReport) -> None:
    figures = list(searched._figures(report))
    assert [(figure.label, figure.value) for figure in figures] == [
        ("Area, search images", "80.00 %"),
        ("Trials", "4"),
    ]
    assert figures[0].detail == "best preset there 75.00 %"
    assert figures[1].detail == "6 s in all"
    alone = replace(report, curves=report.curves[:1])
    assert next(searched._figures(alone)).detail == "no preset was completed"


def test_curves_are_listed_by_area_with_the_chosen_one_marked(report: SearchReport) -> None:
    (table,) = searched._curve_tables(replace(report, curves=report.curves[::-1]))
    assert table.head == ("recipe", "area, %", "30 % of MACs", "60 % of MACs")
    assert table.rows[0] == ("trial 7 (chosen)", "80.00", "70.0", "90.0")
    assert [row[0] for row in table.rows[1:]] == ["epsilon", "gamma"]
    assert table.note == "Top-1 in %, 400 images; dense 95.0."


def test_a_trial_without_an_area_has_an_empty_cell(report: SearchReport) -> None:
    rows = searched._trial_table(report).rows
    assert rows[0] == ("0", "complete", "epsilon", "75.00", "65.0, 85.0", "1.5")
    assert rows[3] == ("8", "complete", "–", "", "", "1.5")


def test_a_recipe_without_a_composite_has_no_table_of_rules(report: SearchReport) -> None:
    assert [table.title for table in searched._recipe_tables(report)] == ["Scores and ranking", "LRP composite"]
    assert [table.title for table in searched._recipe_tables(replace(report, composite=()))] == ["Scores and ranking"]


def test_repair_is_said_where_it_was_done(report: SearchReport) -> None:
    assert "scored and repaired with 64 calibration images" in searched._images_text(report)
    assert "Trials scored with 64" in searched._images_text(replace(report, repaired=False))
    assert "neither repaired" in searched._curve_figure(replace(report, repaired=False)).caption


def test_the_best_curve_is_drawn_last_and_other_trials_not_at_all(report: SearchReport) -> None:
    other = curve("trial 3", 0.79)
    axes = searched._curve(replace(report, curves=(*report.curves, other))).axes[0]
    *presets, best, dense = axes.lines
    assert [str(line.get_label()) for line in presets] == ["gamma: area 70.0 %", "epsilon: area 75.0 %"]
    assert str(best.get_label()) == "trial 7: area 80.0 %"
    np.testing.assert_allclose(best.get_xydata(), [[30.0, 70.0], [60.0, 90.0]])
    assert np.asarray(dense.get_ydata()).tolist() == [95.0, 95.0]


def test_the_line_of_the_best_rises_over_complete_trials_alone(report: SearchReport) -> None:
    trials = (tried(0, 0.5), tried(1, 0.9, state="stopped"), tried(2, 0.4), tried(3, 0.7), tried(4, None))
    axes = searched._history(replace(report, tried=trials)).axes[0]
    (best,) = axes.lines
    assert np.asarray(best.get_xdata(orig=True)).tolist() == [0, 2, 3]
    assert np.asarray(best.get_ydata(orig=True)) == pytest.approx([50.0, 50.0, 70.0])
    drawn = {str(dots.get_label()): np.asarray(dots.get_offsets())[:, 0].tolist() for dots in axes.collections}
    assert drawn == {"complete": [0, 2, 3], "stopped": [1]}


def test_weights_are_drawn_largest_on_top_and_only_where_there_are_any(report: SearchReport) -> None:
    figure = searched._importance(report.importance)
    assert figure is not None
    axes = figure.axes[0]
    assert [bar.get_width() for bar in axes.containers[0]] == pytest.approx([70.0, 30.0])
    assert axes.yaxis_inverted()
    assert searched._importance(()) is None


def test_the_page_is_written_in_its_three_forms_without_the_models_folder(
    report: SearchReport, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(searched, "draw", lambda drawings: {"search-curve": b"png", "search-history": b"png"})
    paths = write_search_report(report, tmp_path, {"schema": "search/2", "best": "trial 7"})
    text = paths.markdown.read_text()
    assert text.startswith("# mine.py:build: attribution searched for pruning")
    assert "nets/" not in text
    assert "Too few trials were completed to say which choices count." in text
    assert "ab" * 32 in text
    assert '"best": "trial 7"' in paths.json.read_text()
    assert "trial 7 (chosen)" in paths.html.read_text()
