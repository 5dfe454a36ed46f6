"""Which devices run a bundle, for people: their reports in, shipped.md, shipped.json and a self-contained shipped.html.

A row for each device and model: how fast it is there, how far its answers lie from the golden ones. Plain values. The
same is the last section of the report of the run that made the bundle; it is put there when the bundle ships.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import FolderError
from ..files import read_json, write_json, write_text
from . import facts
from .markdown import section_to_markdown
from .sections import Section
from .tables import Table
from .write import SCHEMA as REPORT_SCHEMA
from .write import Page, ReportPaths, section_to_html, write_page

SCHEMA = "shipped-page/1"
_DEVICES = "devices"
_MARK = "<!-- devices -->"  # what stands behind it in a report's page, its links and its Markdown is this section
Report = Mapping[str, Any]  # as `shipping.reports` has it


def write_shipped_page(name: str, reports: Sequence[Report], folder: Path, stem: str) -> ReportPaths:
    """Writes into `folder`, over an earlier page; `name` is the bundle's. FolderError when the disk is in the way."""
    page = Page(
        title=f"{facts.model_name(name)} on {facts.counted(len(reports), 'device')}",
        verdict=_verdict(reports),
        failures=tuple(_failures(reports)),
        key_figures=(),
        sections=(_running(reports), _devices(reports)),
        images={},
    )
    return write_page(page, folder, stem, {"schema": SCHEMA, "devices": list(reports)})


def devices_in(folder: Path) -> list[Report]:
    """The devices that the report in a run's folder shows; none where there is no report."""
    try:
        return list(read_json(folder / "report.json", REPORT_SCHEMA).get(_DEVICES, []))
    except FolderError:
        return []


def show_devices(folder: Path, reports: Sequence[Report]) -> None:
    """The devices as the last section of a run's report, over what it showed of them; FolderError without a report."""
    content = read_json(folder / "report.json", REPORT_SCHEMA)
    markdown, html = folder / "report.md", folder / "report.html"
    try:
        page, text = html.read_text(), markdown.read_text().partition(_MARK)[0].rstrip()
    except OSError as error:
        raise FolderError(f"can't read {error.filename}: {error.strerror}; make the run's report again") from error

    section = _section(reports)
    link = f'<a href="#{section.anchor}">{section.title}</a>'
    page = _before(_before(page, "</nav>", link), "</main>", section_to_html(section))
    write_text(markdown, f"{text}\n\n{_MARK}\n\n{section_to_markdown(section)}\n")
    write_text(html, page)
    write_json(folder / "report.json", {**content, _DEVICES: list(reports)})


def _before(page: str, end: str, content: str) -> str:
    """The page with the content, behind a mark, as the last thing before `end`, a closing tag such as `</nav>`."""
    before, tag, behind = page.rpartition(end)
    opening = before.rfind(end.replace("</", "<").rstrip(">"))  # `<nav`, whatever its attributes
    mark = before.find(_MARK, opening)  # of this element, not of an earlier
    if mark >= 0:
        before = before[:mark]
    return f"{before.rstrip()}\n{_MARK}\n{content.strip()}\n{tag}{behind}"


def _section(reports: Sequence[Report]) -> Section:
    running, devices = _running(reports), _devices(reports)
    failures = [f"{name[:1].upper()}{name[1:]} failed: {reason}." for name, reason in _failures(reports)]
    text = (*_verdict(reports), *failures, *running.text, *devices.text)
    return Section(_DEVICES, "On the devices", text, (*running.parts, *devices.parts))


def _with_release(reports: Sequence[Report]) -> list[Report]:
    """Those of devices that run a release of the bundle."""
    return [report for report in reports if report["current"]]


def _verdict(reports: Sequence[Report]) -> tuple[str, ...]:
    running = [report["current"]["release"] for report in _with_release(reports)]
    releases = set(running)
    same = "all the same release" if len(releases) == 1 else f"{len(releases)} different releases"
    return (f"It runs on {len(running)} of {facts.counted(len(reports), 'device')}, {same}.",)


def _failures(reports: Sequence[Report]) -> Iterator[tuple[str, str]]:
    for report in reports:
        failure = report["attempt"].get("failure", "")
        if failure:
            runs = report["current"]["release"] if report["current"] else "nothing of it"
            yield f"the last attempt on {report['device']}", f"{failure}; {runs} runs there"


def _running(reports: Sequence[Report]) -> Section:
    rows: list[tuple[str, ...]] = []
    for report in _with_release(reports):
        current = report["current"]
        rows.append((f"{report['device']}: {current['release']}, since {current['when']}",))
        rows += [_timing(row, current) for row in current["latency"]]
    head = ("model", "runtime", "p50, ms", "p90", "runs", "off the reference")
    table = Table("Latency there", head, "clrrrr", tuple(rows))
    text = (
        "Timed on each device by its own runtime, one image at a time. Its answers were fetched and compared here, "
        "with the golden outputs and with answers computed here to inputs drawn for it; the larger difference is shown "
        "as a share of the largest magnitude.",
    )
    return Section("running", "What runs where", text, (table,))


def _timing(row: Mapping[str, Any], current: Mapping[str, Any]) -> tuple[str, ...]:
    differences = [entry["relative"] for entry in current["compared"] if entry["model"] == row["model"]]
    largest = max(differences, default=None)
    off = facts.written(largest, "{:.1e}".format, unknown="not compared")
    return row["model"], row["runtime"], f"{row['p50_ms']:.3f}", row["p90"], str(row["n"]), off


def _devices(reports: Sequence[Report]) -> Section:
    rows: list[tuple[str, ...]] = []
    text: list[str] = []
    for report in _with_release(reports):
        rows.append(_device(report))
        text += [f"Not checked: {report['device']}: {line}." for line in _not_checked(report["current"])]
    head = ("device", "address", "architecture", "Python", "libraries", "signature")
    return Section("devices", "The devices", tuple(text), (Table("Devices", head, "lclrll", tuple(rows)),))


def _device(report: Report) -> tuple[str, ...]:
    current = report["current"]
    device = current["device"]
    libraries = ", ".join(f"{name} {version}" for name, version in device["libraries"].items())
    architecture = device["architecture"]
    board = device["board"] or device["gpu"]
    if board:
        architecture += f" ({board})"
    signature = "verified there" if current["signed"] else "none asked for: integrity only"
    return report["device"], current["address"], architecture, device["python"], libraries, signature


def _not_checked(current: Mapping[str, Any]) -> list[str]:
    not_timed = [f"latency of {model}: {reason}" for model, reason in current["not_timed"].items()]
    return [*current["not_compared"], *not_timed]
