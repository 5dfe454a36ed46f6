"""What a sweep came to, for people: `SweepReport` to sweep.md, sweep.json, a self-contained sweep.html and plots.

One row a budget: what is left, how often it is right, how fast it is, where its bundle lies. Plain numbers come in.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure as Sheet

from . import facts
from .plots import DENSE, KEPT, WIDTH_IN, Drawing, draw
from .sections import Figure, Section
from .tables import Table
from .write import Page, ReportPaths, write_page


@dataclass(frozen=True, slots=True)
class SweptPoint:
    """One run: `top1` a share, `ms` the median of one image on the reference runtime; None where it is not known.

    `bundle` is empty where none shipped; `failure` says why.
    """

    budget: str
    top1: float | None = None
    macs: int | None = None
    bytes: int | None = None
    ms: float | None = None
    bundle: str = ""
    failure: str = ""


@dataclass(frozen=True, slots=True)
class SweepReport:
    """`dense` is the network that all points were made from; `images` evaluated them, on `runtime` they were timed."""

    model: str
    dense: SweptPoint
    points: tuple[SweptPoint, ...]
    images: int
    runtime: str


def write_sweep_report(report: SweepReport, folder: Path, content: Mapping[str, Any]) -> ReportPaths:
    """Writes into `folder`, over an earlier page; `content` becomes sweep.json.

    Raises FolderError when the disk is in the way.
    """
    images = draw(_drawings(report))
    page = Page(
        title=f"{facts.model_name(report.model)}: {facts.counted(len(report.points), 'budget')}",
        verdict=(_verdict(report),),
        failures=(),
        key_figures=(),
        sections=(_curves(report, tuple(images)),),
        images=images,
        warnings=tuple(
            f"{point.budget} came to no bundle: {point.failure}" for point in report.points if point.failure
        ),
    )
    return write_page(page, folder, "sweep", content)


def _verdict(report: SweepReport) -> str:
    shipped = [point for point in report.points if point.bundle]
    if not shipped:
        return "No budget led to a network that may ship."
    return f"{len(shipped)} of {facts.counted(len(report.points), 'run')} ended with a bundle."


def _curves(report: SweepReport, drawn: tuple[str, ...]) -> Section:
    captions = {
        name: f"Top-1 against {title}; the grey mark is the dense network." for name, (title, _) in _AXES.items()
    }
    figures = tuple(Figure(name, f"Points: {captions[name]}", captions[name]) for name in drawn)
    text = f"Top-1 on {report.images:,} evaluation images; milliseconds are medians of one image on {report.runtime}."
    return Section("curve", "What is left at each budget", (text,), (*figures, _table(report)))


def _table(report: SweepReport) -> Table:
    rows = tuple(_cells(report.dense, point) for point in (report.dense, *report.points))
    head = ("budget", "top-1", "points", "MACs", "kept", "fp32 file", "ms", "bundle")
    return Table("Runs", head, "crrrrrrc", rows, "Points: of top-1, against the dense network.")


def _cells(dense: SweptPoint, point: SweptPoint) -> tuple[str, ...]:
    lost = None if point is dense or point.top1 is None or dense.top1 is None else 100 * (dense.top1 - point.top1)
    share = None if point.macs is None or not dense.macs else point.macs / dense.macs
    return (
        point.budget,
        "–" if point.top1 is None else facts.percent(point.top1),
        "" if lost is None else facts.points(lost),
        "–" if point.macs is None else facts.count(point.macs),
        "–" if share is None else facts.percent(share),
        "–" if point.bytes is None else facts.size(point.bytes),
        "–" if point.ms is None else facts.milliseconds(point.ms),
        point.bundle,
    )


def _drawings(report: SweepReport) -> Iterator[tuple[str, Drawing]]:
    for name, (title, read) in _AXES.items():
        # bound now: the drawing is called when the loop is further on
        yield name, lambda title=title, read=read: _curve(report, title, read)  # type: ignore[misc]


Read = Callable[[SweptPoint], float | None]
_AXES: Mapping[str, tuple[str, Read]] = {
    "sweep-macs": ("MACs, millions", lambda point: None if point.macs is None else point.macs / 1e6),
    "sweep-size": ("fp32 file, MB", lambda point: None if point.bytes is None else point.bytes / 1e6),
    "sweep-latency": ("median milliseconds, one image", lambda point: point.ms),
}


def _curve(report: SweepReport, title: str, read: Read) -> Sheet | None:
    """Top-1 over one cost, the points joined in the cost's order; None where fewer than two networks have both."""
    known = [(x, point.top1) for point in report.points if (x := read(point)) is not None and point.top1 is not None]
    dense_x, dense_top1 = read(report.dense), report.dense.top1
    has_dense = dense_x is not None and dense_top1 is not None
    if len(known) + has_dense < 2:
        return None
    known.sort()
    sheet = Sheet(figsize=(WIDTH_IN, 3.0), layout="constrained")
    axes = sheet.add_subplot()
    axes.plot([x for x, _ in known], [100 * top1 for _, top1 in known], color=KEPT, marker="o", label="shipped")
    if dense_x is not None and dense_top1 is not None:
        axes.scatter(dense_x, 100 * dense_top1, color=DENSE, marker="s", label="dense", zorder=3)
    axes.set_xlim(left=0)
    axes.set_xlabel(title)
    axes.set_ylabel("top-1, %")
    axes.grid(color="#dddddd", linewidth=0.6)
    axes.legend(fontsize=8, loc="lower right")
    return sheet
