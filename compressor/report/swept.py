"""What a sweep came to, for people: `SweepReport` to sweep.md, sweep.json, a self-contained sweep.html and plots.

One row a budget: what is left, how often it is right, how fast it is, where its bundle lies. Plain numbers come in.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
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
    """One run: `quality` by the report's metric, `ms` the median of one image on the reference runtime; None: unknown.

    `bundle` is empty where none shipped; `failure` says why.
    """

    budget: str
    quality: float | None = None
    macs: int | None = None
    bytes: int | None = None
    ms: float | None = None
    bundle: str = ""
    failure: str = ""


@dataclass(frozen=True, slots=True)
class SweepReport:
    """`dense` is the network that all points were made from; `images` evaluated them, on `runtime` they were timed.

    Qualities are by `metric`, shares of one where `is_share`; the higher the better.
    """

    model: str
    dense: SweptPoint
    points: tuple[SweptPoint, ...]
    images: int
    runtime: str
    metric: str = "top-1"
    is_share: bool = True

    @property
    def axis(self) -> str:
        """What stands beside the curve's values."""
        return f"{self.metric}, %" if self.is_share else self.metric

    def value(self, quality: float) -> str:
        return facts.percent(quality) if self.is_share else f"{quality:.2f}"

    def change(self, quality: float) -> float | None:
        """What is lost against dense: points of a share, else per cent of the dense value."""
        dense = self.dense.quality
        if dense is None or (not self.is_share and dense == 0):
            return None
        return 100 * (dense - quality) if self.is_share else 100 * (dense - quality) / abs(dense)


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
    metric = facts.capitalised(facts.metric_in_words(report.metric))
    captions = {
        name: f"{metric} against {title}; the grey mark is the dense network." for name, (title, _) in _AXES.items()
    }
    figures = tuple(Figure(name, f"Points: {captions[name]}", captions[name]) for name in drawn)
    timed = f"milliseconds are medians of one image on {report.runtime}"
    text = f"{metric} on {report.images:,} evaluation images; {timed}."
    return Section("curve", "What is left at each budget", (text,), (*figures, _table(report)))


def _table(report: SweepReport) -> Table:
    rows = tuple(_cells(report, point) for point in (report.dense, *report.points))
    change = "points" if report.is_share else "change, %"
    head = ("budget", report.metric, change, "MACs", "kept", "fp32 file", "ms", "bundle")
    note = f"{facts.capitalised(change)}: of {facts.metric_in_words(report.metric)}, against the dense network."
    return Table("Runs", head, "crrrrrrc", rows, note)


def _cells(report: SweepReport, point: SweptPoint) -> tuple[str, ...]:
    dense = report.dense
    lost = None if point is dense or point.quality is None else report.change(point.quality)
    share = None if point.macs is None or not dense.macs else point.macs / dense.macs
    return (
        point.budget,
        facts.written(point.quality, report.value),
        facts.written(lost, facts.points, unknown=""),
        facts.written(point.macs, facts.count),
        facts.written(share, facts.percent),
        facts.written(point.bytes, facts.size),
        facts.written(point.ms, facts.milliseconds),
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


def _places(points: Sequence[SweptPoint], read: Read, scale: float) -> list[tuple[float, float]]:
    """(cost, quality) of the points that have both."""
    pairs = [(read(point), point.quality) for point in points]
    return [(x, scale * quality) for x, quality in pairs if x is not None and quality is not None]


def _curve(report: SweepReport, title: str, read: Read) -> Sheet | None:
    """Quality over one cost, the points joined in the cost's order; None where fewer than two networks have both."""
    scale = 100 if report.is_share else 1
    shipped = sorted(_places(report.points, read, scale))
    dense = _places([report.dense], read, scale)
    if len(shipped) + len(dense) < 2:
        return None
    sheet = Sheet(figsize=(WIDTH_IN, 3.0), layout="constrained")
    axes = sheet.add_subplot()
    axes.plot([x for x, _ in shipped], [y for _, y in shipped], color=KEPT, marker="o", label="shipped")
    for x, y in dense:
        axes.scatter(x, y, color=DENSE, marker="s", label="dense", zorder=3)
    axes.set_xlim(left=0)
    axes.set_xlabel(title)
    axes.set_ylabel(report.axis)
    axes.grid(color="#dddddd", linewidth=0.6)
    axes.legend(fontsize=8, loc="lower right")
    return sheet
