"""A run's report once its bundle was shipped: what devices said is its last section, and stands there once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from compressor.errors import FolderError
from compressor.report.sections import Section
from compressor.report.shipped import devices_in, show_devices
from compressor.report.tables import Table
from compressor.report.write import SCHEMA, Page, write_page

EVIL = "</main><script>"


def report_of(device: str, *, failure: str = "") -> dict[str, Any]:
    """As `shipping` writes it of a device."""
    timed = {"model": "model.onnx", "runtime": "onnxruntime", "p50_ms": 1.5, "p90": "2.100 ms", "n": 64}
    facts = {"libraries": {"numpy": "2.1.0"}, "board": "", "gpu": "", "architecture": "aarch64", "python": "3.11.2"}
    return {
        "device": device,
        "current": {
            "release": "small-0123",
            "when": "2026-01-02T03:04:05Z",
            "address": f"pi@{device}",
            "signed": "",
            "device": facts,
            "latency": [timed],
            "compared": [{"model": "model.onnx", "relative": 2e-7}],
            "not_compared": [],
            "not_timed": {"engines/x.plan": f"no GPU {EVIL}"},
        },
        "attempt": {"failure": failure},
    }


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    sections = (Section("gates", "Gates", ("All passed.",), (Table("Gates", ("gate",), "l", (("parity",),)),)),)
    page = Page("small, made smaller", ("Half is gone.",), (), (), sections, {})
    write_page(page, tmp_path, "report", {"schema": SCHEMA, "model": "small"})
    return tmp_path


def test_what_devices_said_is_the_reports_last_section_once(folder: Path) -> None:
    assert devices_in(folder) == []
    show_devices(folder, [report_of("kitchen")])
    both = [report_of("kitchen"), report_of("Hall", failure="the link dropped")]
    show_devices(folder, both)
    html, text = (folder / "report.html").read_text(), (folder / "report.md").read_text()
    for content in (html, text):
        assert content.count("On the devices") == (2 if content is html else 1)  # the page links to it
        assert content.count("kitchen: small-0123, since 2026-01-02T03:04:05Z") == 1
        assert content.index("All passed.") < content.rindex("On the devices") < content.index("Hall: small-0123")
        for words in (
            "1.500",
            "2.0e-07",
            "aarch64",
            "The last attempt on Hall failed",
            "the link dropped; small-0123 runs there",
            "runs on 2 of 2 devices",
        ):
            assert words in content
    assert EVIL not in html
    assert html.endswith("</html>")
    assert (html.count("</main>"), html.count("<section>"), html.count("</nav>")) == (1, 2, 1)
    assert devices_in(folder) == both


def test_a_folder_without_a_report_is_one_line(tmp_path: Path, folder: Path) -> None:
    (folder / "report.html").unlink()
    with pytest.raises(FolderError, match=r"can't read .*report\.html"):
        show_devices(folder, [report_of("kitchen")])
    assert devices_in(tmp_path / "none") == []
