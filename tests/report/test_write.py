"""A report on disk: JSON of plain values, headline numbers for a machine, and pictures inside the page."""

from __future__ import annotations

import base64
import json
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest

from compressor.files import read_json
from compressor.records import Accuracy, Cost
from compressor.report import AccuracyRow, GateRow, LatencyRow, ReportInput
from compressor.report.sections import Figure, KeyFigure, Section
from compressor.report.write import Page, _plain, summarise, write_page


@dataclass(frozen=True)
class Record:
    array: np.ndarray[tuple[int], np.dtype[np.float64]]
    path: Path


@pytest.mark.parametrize(
    ("value", "plain"),
    [
        (np.float32(0.5), 0.5),
        (np.int64(3), 3),
        (np.bool_(True), True),
        (float("nan"), None),
        (np.array([[1.0, np.inf], [2.0, -np.inf]]), [[1.0, None], [2.0, None]]),
        ((1, "a", None, True), [1, "a", None, True]),
        ({1: np.array([2])}, {"1": [2]}),
        (Record(np.array([1.0]), Path("a/b")), {"array": [1.0], "path": "a/b"}),
    ],
)
def test_any_value_becomes_jsons_own(value: object, plain: object) -> None:
    assert _plain(value) == plain
    assert json.loads(json.dumps(_plain(value), allow_nan=False)) == plain


def test_the_headline_is_shares_accuracy_and_ratios(bare: ReportInput) -> None:
    def row(variant: str, ms: float) -> LatencyRow:
        return LatencyRow("cpu", "fp32", 1, variant, np.array([ms]), {"p50": ms})

    run = replace(
        bare,
        cost_dense=Cost(1000, 400, 1),
        cost_shipped=Cost(400, 300, 1),
        accuracy=(AccuracyRow("dense", Accuracy(9, 10)), AccuracyRow("tuned", Accuracy(8, 10))),
        latency=(row("dense", 3.0), row("shipped", 2.0)),
        gates=(GateRow("budget", 0.5, 0.6, False),),
        shipped="tuned",
        warnings=("careful",),
    )
    summary = summarise(run)
    assert summary["macs_removed_share"] == pytest.approx(0.6)
    assert summary["parameters_removed_share"] == pytest.approx(0.25)
    assert (summary["accuracy_dense"], summary["accuracy_final"], summary["final_variant"]) == (0.9, 0.8, "tuned")
    assert summary["speed_up"] == [
        {"runtime": "cpu", "precision": "fp32", "batch": 1, "variant": "shipped", "ratio": 1.5}
    ]
    assert (summary["failures"], summary["warnings"], summary["shipped"]) == (["budget"], ["careful"], "tuned")


def test_a_headline_of_nothing_measured_has_no_numbers(bare: ReportInput) -> None:
    summary = summarise(bare)
    assert [summary[name] for name in ("accuracy_dense", "accuracy_final", "final_variant")] == [None] * 3
    assert summary["speed_up"] == []


def page(images: dict[str, bytes]) -> Page:
    figure = Figure("one", "words", "a caption")
    return Page(
        title="A <title>",
        verdict=("Said & done.",),
        failures=(("a gate", "do <this>"),),
        key_figures=(KeyFigure("MACs", "4 k", "dense 8 k"),),
        sections=(Section("s", "A section", (), (figure,)),),
        images=images,
        warnings=("careful",),
    )


def test_a_picture_is_a_file_beside_the_markdown_and_inside_the_page(tmp_path: Path) -> None:
    png = b"\x89PNG picture"
    paths = write_page(page({"one": png}), tmp_path / "new", "page", {"schema": "page/1", "n": 1})
    assert [path.read_bytes() for path in paths.plots] == [png]
    assert "(plots/one.png)" in paths.markdown.read_text()
    assert base64.b64encode(png).decode() in paths.html.read_text()
    assert read_json(paths.json, "page/1")["n"] == 1


def test_everything_on_the_page_is_escaped(tmp_path: Path) -> None:
    html = write_page(page({"one": b""}), tmp_path, "page", {"schema": "page/1"}).html.read_text()
    assert "A &lt;title&gt;" in html
    assert "do &lt;this&gt;" in html
    assert "Said &amp; done." in html
    assert "<this>" not in html


def test_a_figure_without_its_picture_is_an_error_and_no_hole(tmp_path: Path) -> None:
    with pytest.raises(Exception, match="one"):
        write_page(page({}), tmp_path, "page", {"schema": "page/1"})
