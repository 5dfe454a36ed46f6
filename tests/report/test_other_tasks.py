"""A report on a network whose answers are no classes: every figure under its measure's name, and fidelity beside it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from compressor.records import Accuracy, Quality
from compressor.report import (
    AccuracyRow,
    ParetoPoint,
    PictureRow,
    ReportInput,
    TradePoint,
    facts,
    plots,
    tables,
    write_report,
)
from compressor.report.sections import Figure, build_sections, key_figures, pareto_caption, subtitle, verdict
from compressor.report.swept import SweepReport, SweptPoint, write_sweep_report
from compressor.report.write import summarise

IOU, PSNR = Quality("mIoU", 0.8, 100, 0.75, 0.85), Quality("PSNR", 30.0, 100, 29.0, 31.0, is_share=False)
FIDELITY = Quality("fidelity", 0.9421, 256, 0.93, 0.95)


def judged(run: ReportInput, dense: Accuracy | Quality, shipped: Accuracy | Quality, **more: object) -> ReportInput:
    rows = (AccuracyRow("dense", dense), AccuracyRow("shipped", shipped))
    return replace(run, accuracy=rows, fidelity={"repaired": FIDELITY, "shipped": FIDELITY}, shipped="repaired", **more)  # type: ignore[arg-type]


def test_a_share_loses_points_and_a_figure_with_a_unit_per_cent_of_itself(bare: ReportInput) -> None:
    share = tables.accuracy_table(judged(bare, IOU, replace(IOU, value=0.7)))
    assert share.title == "mIoU"
    assert share.head == ("network", "mIoU", "points", "95 % interval")
    assert share.rows[2][1:3] == ("70.0 %", "\u221210.0")
    decibels = tables.accuracy_table(judged(bare, PSNR, replace(PSNR, value=27.0)))
    assert decibels.head == ("network", "PSNR", "change", "95 % interval")
    assert decibels.rows[1][1:] == ("30.00", "", "29.00–31.00")
    assert decibels.rows[2][1:3] == ("27.00", "\u221210.0 %")
    assert "in per cent of its figure" in decibels.note
    assert "Wilson" not in decibels.note


def test_a_top5_column_is_there_where_some_network_has_one(bare: ReportInput) -> None:
    without, with_it = Accuracy(90, 100), Accuracy(80, 100, 95)
    assert "top-5" not in tables.accuracy_table(judged(bare, without, without)).head
    table = tables.accuracy_table(judged(bare, without, with_it))
    assert [row[-1] for row in table.rows] == ["pytorch, fp32, 100 evaluation images", "–", "95.0 %"]


def test_without_labels_it_is_agreement_with_the_dense_network(bare: ReportInput) -> None:
    run = judged(bare, Accuracy(50, 50, metric="agreement"), Accuracy(48, 50, metric="agreement"))
    assert verdict(run)[1].startswith("Agreement with the dense network on 50 evaluation images went from 100.0 %")
    assert "Agreement with the dense network" in [figure.label for figure in key_figures(run)]
    assert tables.accuracy_table(run).title == "Agreement with the dense network"
    assert "top-1" not in "".join(verdict(run))


def test_fidelity_stands_beside_every_other_measure_and_is_said_once_where_it_is_the_measure(
    bare: ReportInput,
) -> None:
    run = judged(bare, IOU, IOU)
    table = tables.fidelity_table(run)
    assert table.rows == (
        ("repaired", "0.942", "0.930–0.950", "256"),
        ("shipped: repaired", "0.942", "0.930–0.950", "256"),
    )
    assert facts.MEANING_OF_FIDELITY in table.note
    assert [figure.value for figure in key_figures(run) if figure.label.startswith("Fidelity")] == ["0.942"]
    itself = judged(bare, replace(FIDELITY, value=1.0), FIDELITY)
    assert tables.fidelity_table(itself).rows == ()
    assert [figure.label for figure in key_figures(itself)].count("Fidelity to the dense network") == 1


def test_plots_have_the_measure_on_their_axis(bare: ReportInput) -> None:
    points = tuple(TradePoint(name, 1.0, 30.0, metric="PSNR", is_share=False) for name in ("dense", "repaired"))
    figure = plots._trade(replace(bare, trade=points))
    assert figure is not None
    (axes,) = figure.axes
    assert axes.get_ylabel() == "PSNR"
    assert [str(dots.get_label()) for dots in axes.collections] == ["dense: 30.00", "repaired: 30.00"]
    caption = pareto_caption((ParetoPoint("a", 1.0, PSNR), ParetoPoint("b", 2.0, PSNR)))
    assert caption.startswith("PSNR against median latency")
    assert caption.endswith("95 % interval of the PSNR.")


@pytest.mark.parametrize(
    ("reason", "said"),
    [
        ("", ""),
        ("segmentation, as asked for", "Task: segmentation, as asked for."),
        (
            "taken as any: several outputs, and no labels; say task=... otherwise",
            "Task taken as any: several outputs, and no labels; say task=... otherwise (--task on the command line).",
        ),
    ],
)
def test_which_task_it_is_and_how_to_say_otherwise_stands_under_the_title(
    bare: ReportInput, reason: str, said: str
) -> None:
    assert subtitle(replace(bare, task_reason=reason)) == said


def test_a_guess_is_said_under_the_title_and_not_a_second_time_as_a_warning(bare: ReportInput, tmp_path: Path) -> None:
    guess = "taken as any: several outputs, and no labels; say task=... otherwise"
    run = replace(bare, groups=(), task_reason=guess, warnings=("careful", guess))
    paths = write_report(run, tmp_path, {})
    for page in (paths.markdown.read_text(), paths.html.read_text()):
        assert page.count("several outputs, and no labels") == 1
        assert "careful" in page


def test_a_machine_reads_task_measure_and_fidelity(bare: ReportInput) -> None:
    summary = summarise(judged(bare, IOU, replace(IOU, value=0.7), task="segmentation"))
    assert (summary["task"], summary["metric"], summary["fidelity_shipped"]) == ("segmentation", "mIoU", 0.9421)
    assert (summary["accuracy_dense"], summary["accuracy_final"]) == (0.8, 0.7)
    assert [summarise(bare)[name] for name in ("metric", "fidelity_shipped")] == [None, None]


def test_pictures_are_named_as_the_worst_and_each_has_its_distance(bare: ReportInput) -> None:
    rows = (
        PictureRow("seen-1", "a.png", 0.8314, "coloured masks"),
        PictureRow("seen-2", "b.png", 0.5, "coloured masks"),
    )
    run = replace(bare, pictures=rows, pictured_of=64)
    seen = next(section for section in build_sections(run, {"seen-1", "seen-2"}) if section.anchor == "seen")
    assert "2 images of 64" in seen.text[0]
    assert "not typical" in seen.text[0]
    assert "coloured masks" in seen.text[0]
    assert "for its own answer (warm" in seen.text[0]
    segmenting = build_sections(replace(run, task="segmentation"), ())
    assert "for the dense network's answer (warm" in next(one for one in segmenting if one.anchor == "seen").text[0]
    figures = [part for part in seen.parts if isinstance(part, Figure)]
    assert [figure.name for figure in figures] == ["seen-1", "seen-2"]
    assert figures[0].caption == "Image 'a.png': distance 0.831, where 1 is as far off as the mean answer."
    none = next(section for section in build_sections(bare, ()) if section.anchor == "seen")
    assert (none.text, none.parts) == (("No picture was drawn.",), ())


@pytest.mark.parametrize(("is_share", "dense", "change"), [(True, "92.0 %", "−2.0"), (False, "31.50", "−3.2")])
def test_a_sweep_is_told_in_the_metric_of_its_task(tmp_path: Path, is_share: bool, dense: str, change: str) -> None:
    qualities = (0.92, 0.90) if is_share else (31.5, 30.5)
    report = SweepReport(
        model="digits-unet",
        dense=SweptPoint("dense", qualities[0], macs=100),
        points=(SweptPoint("macs 0.5", qualities[1], macs=50, bundle="macs-0.5/bundle"),),
        images=400,
        runtime="onnxruntime",
        metric="mIoU" if is_share else "PSNR",
        is_share=is_share,
    )
    page = write_sweep_report(report, tmp_path, {"schema": "sweep/1"}).markdown.read_text()
    assert "top-1" not in page.lower()
    assert f"| `dense` | {dense} |" in page
    assert f"| {change} |" in page
