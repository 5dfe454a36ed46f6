"""The report says what the records hold, whole, in all three forms, and what was not done."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from matplotlib.colors import to_hex

from compressor.errors import FolderError
from compressor.files import read_json
from compressor.records import Accuracy
from compressor.report import (
    AccuracyRow,
    GateRow,
    LatencyRow,
    LayerRow,
    ParetoPoint,
    ReportInput,
    ReportPaths,
    StageRow,
    TradePoint,
    facts,
    plots,
    tables,
    write_report,
)
from compressor.report.plots import draw_plots
from compressor.report.sections import Figure, build_sections, failures, key_figures, pareto_caption, verdict
from compressor.report.tables import Table
from compressor.report.write import SCHEMA, write_page
from compressor.report.write import Page as Sheet

PNG = b"\x89PNG\r\n\x1a\n"


class Page(HTMLParser):
    """Tags opened and closed, addresses named, and the visible text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.addresses: list[str] = []
        self.tags: list[str] = []
        self.images: list[dict[str, str | None]] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.addresses += [v or "" for k, v in attrs if k in ("src", "href", "action")]
        if tag == "img":
            self.images.append(dict(attrs))
        if tag not in ("meta", "img", "link", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.text += data


def table(run: ReportInput, title: str) -> Table:
    parts = [p for s in build_sections(run, ()) for p in s.parts]
    return next(p for p in parts if isinstance(p, Table) and p.title == title)


def test_every_file_of_the_report_is_written(written: ReportPaths) -> None:
    found = {p.name for p in written.html.parent.iterdir()}
    assert found == {"report.md", "report.json", "report.html", "plots"}
    assert {p.name for p in written.plots} == {
        "removed.png", "relevance.png", "layers.png", "trade.png", "pareto.png", "time.png",
        "latency-onnxruntime-cpu.png", "latency-pytorch.png",
    }  # fmt: skip
    assert all(p.read_bytes().startswith(PNG) for p in written.plots)


def test_the_page_needs_nothing_from_outside(written: ReportPaths) -> None:
    page = Page(written.html.read_text())
    assert page.open == []
    assert "script" not in page.tags
    assert "link" not in page.tags
    assert [a[:30] for a in page.addresses if not a.startswith(("#", "data:image/png;base64,"))] == []
    assert len(page.images) == 8
    assert all(image["alt"] for image in page.images)


def test_names_from_the_model_are_escaped(bare: ReportInput, tmp_path: Path) -> None:
    paths = write_report(replace(bare, model="<script>alert(1)</script>", recipe={"note": "a | b\nc"}), tmp_path)
    assert "<script>" not in paths.html.read_text()
    assert "a \\| b c" in paths.markdown.read_text()


def test_json_gives_back_every_number(run: ReportInput, written: ReportPaths) -> None:
    value = read_json(written.json, SCHEMA)
    assert value["latency"][3]["samples_ms"] == run.latency[3].samples_ms.tolist()
    assert value["groups"][5]["kept"] == run.groups[5].kept.tolist()
    assert value["cost_shipped"]["macs"] == run.cost_shipped.macs
    assert value["summary"]["accuracy_dense"] == 713 / 719
    assert value["summary"]["accuracy_final"] == 711 / 719


def test_what_is_no_number_becomes_null(bare: ReportInput, tmp_path: Path) -> None:
    group = replace(bare.groups[0], scores=np.full(bare.groups[0].size, np.nan))
    value = json.loads(write_report(replace(bare, groups=(group,)), tmp_path).json.read_text())
    assert value["groups"][0]["scores"] == [None] * group.size


@pytest.mark.parametrize("form", ["markdown", "html"])
def test_what_was_not_done_is_said(written: ReportPaths, form: str) -> None:
    text = getattr(written, form).read_text()
    for line in (
        "built, not run: no GPU",
        "latency on the target device",
        "group layer3.0.downsample was not scored",
        "layer up was not repaired: a transposed convolution",
        "aten.fft_rfft.default could not be counted",
        "n too small",
    ):
        assert line in text


def test_an_engine_that_was_not_run_is_listed_as_not_checked(run: ReportInput) -> None:
    assert ("model.sm89.engine: built, not run: no GPU",) in table(run, "Not checked, not scored, not counted").rows


def test_what_the_repair_won_back_is_shown_layer_by_layer(run: ReportInput) -> None:
    assert table(run, "Repaired layers").rows == (("layer1.0.conv2", "41.2 %", "8.7 %", "8,192"),)


def test_a_bare_run_says_what_is_missing(bare: ReportInput, tmp_path: Path) -> None:
    text = write_report(bare, tmp_path).markdown.read_text()
    for line in (
        "Accuracy before and after was not measured.",
        "Latency was not measured",
        "No gate was checked",
        "No engine was built.",
        "Parity between runtimes was not measured.",
        "Layers were not timed one by one.",
    ):
        assert line in text


def test_a_failed_gate_leads_the_report(failed: ReportInput, tmp_path: Path) -> None:
    page = write_report(failed, tmp_path).html.read_text()
    assert verdict(failed)[-1].startswith("Failed: accuracy lost")
    assert page.index("Keep more MACs (--budget)") < page.index("<main>")


def test_a_parity_limit_that_fails_is_a_failure_without_a_gate(run: ReportInput) -> None:
    assert [name for name, _ in failures(run)] == ["parity of onnxruntime-cpu, int8, batch 32"]
    assert failures(replace(run, parity=run.parity[:2])) == ()


def test_the_verdict_names_the_last_variant_and_the_difference(run: ReportInput) -> None:
    assert "99.2 % to 98.9 % (\u22120.3 points, shipped: tuned)" in verdict(run)[1]
    without = replace(run, accuracy=run.accuracy[:3])
    assert "97.5 %" in verdict(without)[1]
    assert "repaired" in verdict(without)[1]


def test_slower_is_not_called_faster(run: ReportInput) -> None:
    def row(variant: str, ms: float) -> LatencyRow:
        return LatencyRow("cpu", "fp32", 1, variant, np.full(70, ms), {"p50": ms, "p90": ms})

    said = verdict(replace(run, latency=(row("dense", 2.0), row("shipped", 2.5))))[2]
    assert "cpu at batch 1 0.80×" in said


def test_speed_is_compared_under_the_same_conditions_only(run: ReportInput) -> None:
    rows = [(r.variant, d.variant, d.runtime == r.runtime, d.batch == r.batch) for d, r in facts.latency_pairs(run)]
    assert rows == [("shipped", "dense", True, True)] * 4
    other_threads = tuple(replace(r, threads=1) if r.variant == "dense" else r for r in run.latency)
    assert list(facts.latency_pairs(replace(run, latency=other_threads))) == []


def test_accuracy_on_other_images_is_not_the_final_one(run: ReportInput) -> None:
    elsewhere = AccuracyRow("shipped", Accuracy(1, 10), images="calibration")
    found = facts.final_accuracy(replace(run, accuracy=(run.accuracy[0], elsewhere, *run.accuracy[1:])))
    assert found is not None
    assert found.images == "evaluation"
    assert facts.lost_points(run, elsewhere) is None


def test_a_percentile_without_standing_has_no_number(run: ReportInput) -> None:
    rows = [r for r in table(run, "Latency").rows if len(r) > 1]
    assert {r[4] for r in rows} == {"n too small"}
    assert all(float(r[1]) > 0 for r in rows)


def test_what_the_job_cost_is_said_in_words_with_shares_and_a_total(run: ReportInput) -> None:
    table = tables.job_table(run)
    assert table.head == ("stage", "seconds", "share", "peak memory", "when")
    assert table.rows == (
        ("finding the units that hang together, and checking them", "1.2", "2 %", "410 MB", "re-used"),
        ("scoring every unit", "8.4", "14 %", "530 MB", "re-used"),
        ("removing units and repairing what is left", "9.4", "16 %", "unknown", "done now"),
        ("recovery", "41.0", "68 %", "820 MB", "done now"),
        ("all", "60.0", "100 %", "820 MB", "2 of 4 re-used"),
    )


def test_rounds_are_numbered_where_there_are_several_and_a_gpu_has_its_own_column(bare: ReportInput) -> None:
    stages = (StageRow("scores-1", 1.0, 1), StageRow("scores-2", 1.0, 2, 3_000_000), StageRow("odd", 2.0))
    table = tables.job_table(replace(bare, stages=stages))
    assert [row[0] for row in table.rows] == [
        "scoring every unit, round 1",
        "scoring every unit, round 2",
        "odd",
        "all",
    ]
    assert [row[4] for row in table.rows] == ["unknown", "3.00 MB", "unknown", "3.00 MB"]
    assert tables.job_table(bare).rows == ()


def test_relevance_removed_is_the_share_of_the_groups_sum(run: ReportInput) -> None:
    group = replace(run.groups[0], size=4, kept=np.array([1, 3]), scores=np.array([1.0, 5.0, 1.0, 3.0]))
    assert table(replace(run, groups=(group,)), "Groups").rows[0][1:4] == ("4 → 2", "50 %", "20.0 %")


def test_a_measured_loss_is_not_called_relevance(run: ReportInput) -> None:
    named = replace(run, criterion="lrp, measured")
    assert "measured loss removed" in table(named, "Groups").head
    assert "relevance removed" in table(run, "Groups").head


def test_a_plot_without_data_is_left_out(bare: ReportInput) -> None:
    unscored = replace(bare, groups=(replace(bare.groups[0], scores=np.empty(0)),))
    assert set(draw_plots(unscored)) == {"removed"}
    figures = [p for s in build_sections(unscored, {"removed"}) for p in s.parts if isinstance(p, Figure)]
    assert [f.name for f in figures] == ["removed"]


def test_the_same_run_gives_the_same_bytes(bare: ReportInput, tmp_path: Path) -> None:
    first, second = (write_report(bare, tmp_path / name) for name in "ab")
    assert first.html.read_bytes() == second.html.read_bytes()


def test_a_folder_in_the_way_is_one_clear_error(bare: ReportInput, tmp_path: Path) -> None:
    (tmp_path / "report").write_text("a file, not a folder")
    with pytest.raises(FolderError):
        write_report(bare, tmp_path / "report")


@pytest.mark.parametrize(
    ("write", "value", "expected"),
    [
        (facts.count, 4_089_184_256, "4.09 G"),
        (facts.count, 25_557_032, "25.6 M"),
        (facts.count, 811, "811"),
        (facts.size, 421_870, "422 kB"),
        (facts.milliseconds, 0.0984, "0.098"),
        (facts.milliseconds, 12.34, "12.3"),
        (facts.points, 0.28, "\u22120.3"),
        (facts.points, -1.2, "+1.2"),
        (facts.points, 0.01, "0.0"),
        (facts.percent, 0.5167, "51.7 %"),
        (facts.number, True, "yes"),
        (facts.number, (28, 28), "28, 28"),
    ],
)
def test_numbers_are_written_short(write: Callable[[object], str], value: object, expected: str) -> None:
    assert write(value) == expected


def test_the_front_has_no_point_that_another_beats() -> None:
    def point(label: str, ms: float, right: int) -> ParetoPoint:
        return ParetoPoint(label, ms, Accuracy(right, 100))

    points = [point("dense", 4.0, 90), point("slow", 5.0, 90), point("small", 2.0, 88), point("bad", 3.0, 87)]
    assert [p.label for p in facts.pareto_front(points)] == ["small", "dense"]
    assert [p.label for p in facts.pareto_front([point("a", 1.0, 80), point("b", 1.0, 81)])] == ["b"]


def test_the_layers_that_stay_in_float_are_named(run: ReportInput) -> None:
    found = table(run, "Lower precisions")
    assert found.rows == (("model.int8.onnx", "int8", "percentile", "7", "–", "2: layer1.0.conv1, fc"),)
    assert "without VNNI" in found.note
    halves = tuple(replace(f, rest="fp16") for f in run.files)
    assert [row[4] for row in table(replace(run, files=halves), "Lower precisions").rows] == ["fp16"]


def test_what_is_timed_but_has_no_weights_is_among_the_slowest_and_not_among_the_layers(run: ReportInput) -> None:
    between = LayerRow("(between layers)", "layout changes", 0, 0, 0, 0, 9.0, 8.0)
    more = replace(run, layers=(*run.layers, between))
    assert table(more, "Slowest layers").rows[0][0] == "(between layers)"
    assert [row for row in table(more, "Layers").rows if row[0] == "(between layers)"] == []


def test_precisions_share_a_heading_and_are_told_apart(run: ReportInput) -> None:
    dense, shipped = run.latency[:2]
    rows = table(replace(run, latency=(dense, shipped, replace(shipped, precision="int8"))), "Latency").rows
    assert [row[0] for row in rows] == ["onnxruntime-cpu, batch 1, 2 threads", "dense", "shipped", "shipped, int8"]


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        ("nets/mine/odd.py:build(depth=5)", "odd.py:build(depth=5)"),
        ("odd.py:build", "odd.py:build"),
        ("timm:vit_tiny", "timm:vit_tiny"),
        ("package.module:factory", "package.module:factory"),
    ],
)
def test_a_title_leaves_the_folder_out(given: str, shown: str) -> None:
    assert facts.model_name(given) == shown


def test_a_command_in_a_text_is_code_and_the_rest_is_escaped(run: ReportInput, tmp_path: Path) -> None:
    images = draw_plots(run)
    section = replace(build_sections(run, images.keys())[0], text=("<b> use `compressor run a` & `b`",))
    page = Sheet("title", (), (), (), (section,), images)
    text = write_page(page, tmp_path, "page", {"schema": "page/1"}).html.read_text()
    assert "<p>&lt;b&gt; use <code>compressor run a</code> &amp; <code>b</code></p>" in text


# three states of a gate, and what stands above everything


def _doubtful(run: ReportInput) -> ReportInput:
    gate = GateRow("accuracy: top-1 lost", 3.0, 0.0, False, unit="points", doubt="12 images are too few")
    return replace(run, gates=(*run.gates[:2], gate), parity=(), warnings=("12 images are too few",))


def test_a_gate_that_shows_nothing_has_neither_passed_nor_failed(run: ReportInput) -> None:
    doubtful = _doubtful(run)
    assert failures(doubtful) == ()
    assert verdict(doubtful)[-1] == "2 of 3 gates passed; not shown: accuracy: top-1 lost."
    gates = table(doubtful, "Gates")
    assert [row[1] for row in gates.rows] == ["passed", "passed", "not shown"]
    assert gates.note == "Not shown: 12 images are too few."
    assert "passed" not in {g.state for g in doubtful.gates if g.doubt}


def test_warnings_stand_first_in_every_form(run: ReportInput, tmp_path: Path) -> None:
    paths = write_report(replace(_doubtful(run), groups=(), layers=(), latency=()), tmp_path)
    markdown, page = paths.markdown.read_text(), paths.html.read_text()
    assert markdown.splitlines()[2] == "> **Warning:** 12 images are too few."
    assert page.index("! warning:") < page.index("<main>")
    assert "? not shown" in page
    assert read_json(paths.json, SCHEMA)["summary"]["warnings"] == ["12 images are too few"]


# one name for each network


def test_every_table_calls_the_networks_by_the_same_names(run: ReportInput) -> None:
    names = {"dense", "removed", "repaired", "tuned", "shipped"}
    for title, column in (("Accuracy", 0), ("Latency", 0), ("Files", 2), ("Parity", 0)):
        rows = [row for row in table(run, title).rows if len(row) > 1]
        assert {row[column].partition(":")[0] for row in rows} <= names, title
    assert [row[0] for row in table(run, "Accuracy").rows if len(row) > 1][:5] == [
        *("dense", "removed", "repaired", "tuned"),
        "shipped: tuned",
    ]


def test_why_a_network_ships_is_said(run: ReportInput) -> None:
    said = "The tuned network ships: of 205 images it is right on 204, the repaired one on 203."
    section = next(s for s in build_sections(replace(run, choice=said), ()) if s.anchor == "cost")
    assert said in section.text


def test_the_trade_shows_each_network_in_its_colour_and_hides_none(run: ReportInput) -> None:
    names = ("dense", "removed", "repaired", "tuned")
    points = tuple(TradePoint(name, 1.0 if name == "dense" else 0.5, 0.9, chosen=name == "tuned") for name in names)
    figure = plots._trade(replace(run, trade=points))
    assert figure is not None
    drawn = {str(c.get_label()).partition(":")[0]: c for c in figure.axes[0].collections}
    assert set(drawn) == {*names, "shipped"}
    assert len(figure.axes[0].lines) == 0  # a legend of lines where there are none
    colours = {name: to_hex(drawn[name].get_facecolor()[0]) for name in ("dense", "removed", "tuned")}
    assert colours == {"dense": plots.DENSE, "removed": plots.REMOVED, "tuned": plots.KEPT}
    assert drawn["repaired"].get_sizes()[0] > 2 * drawn["tuned"].get_sizes()[0]  # which lies on it


def test_a_line_is_promised_only_where_there_is_one(run: ReportInput) -> None:
    dense = ParetoPoint("dense", 2.0, Accuracy(90, 100), reference=True)
    better = ParetoPoint("shipped", 1.0, Accuracy(90, 100))
    cheaper = ParetoPoint("shipped", 1.0, Accuracy(80, 100))
    assert "line joins" in pareto_caption((dense, cheaper))
    assert "none beats shipped in both" in pareto_caption((dense, better))


# what a busy machine and a profile are worth


def test_a_busy_machine_is_said_beside_every_timing(run: ReportInput) -> None:
    said = facts.crowd({"load_average": "16.44 8.0 4.0"}, {"cores": "2"})
    assert said == "busy machine: load 16.4 on 2 cores"
    busy = replace(run, busy=said, latency=tuple(replace(row, note=said) for row in run.latency))
    assert "busy machine: load 16.4 on 2 cores when the timing began" in verdict(busy)[2]
    assert {row[-1] for row in table(busy, "Latency").rows if len(row) > 1} == {said}
    assert [f.detail for f in key_figures(busy) if f.label.startswith("p50") and "busy machine" not in f.detail] == []
    for quiet in ("2.1 1.0 1.0", "", "0.3 9.0 9.0"):
        assert facts.crowd({"load_average": quiet}, {"cores": "2"}) == ""
    assert facts.crowd({"load_average": "9.0 9.0 9.0"}, {"cores": ""}) == ""


def test_layers_that_lost_nothing_tell_what_a_profile_is_worth(run: ReportInput) -> None:
    def timed(dense: float, shipped: float) -> ReportInput:
        same = LayerRow("stem", "conv2d", 16, 16, 1000, 1000, dense, shipped)
        return replace(run, layers=(same, LayerRow("deep", "conv2d", 16, 8, 1000, 500, 1.0, 0.5)))

    note = table(timed(0.010, 0.007), "Slowest layers").note
    assert "1 layer that lost nothing took 70 % of their time in the dense file" in note
    assert "lost nothing" not in table(timed(0.010, 0.0099), "Slowest layers").note


@pytest.mark.parametrize(("number", "said"), [(1, "1 layer"), (0, "0 layers"), (1200, "1,200 layers")])
def test_one_is_not_many(number: int, said: str) -> None:
    assert facts.counted(number, "layer") == said
