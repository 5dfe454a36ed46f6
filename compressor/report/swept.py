"""What a sweep came to, for people: `SweepReport` to sweep.md, sweep.json, a self-contained sweep.html and plots.

One row a budget: what is left, how often it is right, how fast it is, where its bundle lies. Plain numbers come in.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
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
        return facts.axis_title(self.metric, self.is_share)

    def value(self, quality: float) -> str:
        return facts.told(quality, self.is_share)

    def lost_by(self, point: SweptPoint) -> float | None:
        """What is lost against dense: points of a share, else per cent of the dense value; None where unknown."""
        dense = self.dense.quality
        if dense is None or point.quality is None:
            return None
        lost = 100 * (dense - point.quality)
        if self.is_share:
            return lost
        return lost / abs(dense) if dense else None


def write_sweep_report(report: SweepReport, folder: Path, content: Mapping[str, Any]) -> ReportPaths:
    """Writes into `folder`, over an earlier page; `content` becomes sweep.json.

    Raises FolderError when the disk is in the way.
    """
    images = draw(_drawings(report))
    failed = [point for point in report.points if point.failure]
    page = Page(
        title=f"{facts.model_name(report.model)}: {facts.counted(len(report.points), 'budget')}",
        verdict=(_verdict(report),),
        failures=(),
        key_figures=(),
        sections=(_curves(report, images),),
        images=images,
        warnings=tuple(f"{point.budget} came to no bundle: {point.failure}" for point in failed),
    )
    return write_page(page, folder, "sweep", content)


def _verdict(report: SweepReport) -> str:
    shipped = [point for point in report.points if point.bundle]
    if not shipped:
        return "No budget led to a network that may ship."
    return f"{len(shipped)} of {facts.counted(len(report.points), 'run')} ended with a bundle."


def _curves(report: SweepReport, drawn: Iterable[str]) -> Section:
    metric = facts.metric_title(report.metric)
    figures = []
    for name in drawn:
        caption = f"{metric} against {_AXES[name].title}; the grey mark is the dense network."
        figures.append(Figure(name, f"Points: {caption}", caption))
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
    lost = None if point is report.dense else report.lost_by(point)
    share = None
    if point.macs is not None and report.dense.macs:
        share = point.macs / report.dense.macs
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
    for name, axis in _AXES.items():
        # bound now: the drawing is called when the loop is further on
        yield name, lambda axis=axis: _curve(report, axis)  # type: ignore[misc]


@dataclass(frozen=True, slots=True)
class _Axis:
    """A cost, as `read` finds it in a point, told in multiples of `unit`."""

    title: str
    read: Callable[[SweptPoint], float | None]
    unit: float = 1.0


_AXES: Mapping[str, _Axis] = {
    "sweep-macs": _Axis("MACs, millions", lambda point: point.macs, 1e6),
    "sweep-size": _Axis("fp32 file, MB", lambda point: point.bytes, 1e6),
    "sweep-latency": _Axis("median milliseconds, one image", lambda point: point.ms),
}


def _places(report: SweepReport, points: Sequence[SweptPoint], axis: _Axis) -> list[tuple[float, float]]:
    """(cost, quality) of the points that have both."""
    scale = facts.scale_of(report.is_share)
    places = []
    for point in points:
        cost = axis.read(point)
        if cost is not None and point.quality is not None:
            places.append((cost / axis.unit, scale * point.quality))
    return places


def _curve(report: SweepReport, axis: _Axis) -> Sheet | None:
    """Quality over one cost, the points joined in the cost's order; None where fewer than two networks have both."""
    shipped = sorted(_places(report, report.points, axis))
    dense = _places(report, [report.dense], axis)
    if len(shipped) + len(dense) < 2:
        return None
    sheet = Sheet(figsize=(WIDTH_IN, 3.0), layout="constrained")
    axes = sheet.add_subplot()
    costs, qualities = zip(*shipped, strict=True)  # not empty: of the dense network there is one place at most
    axes.plot(costs, qualities, color=KEPT, marker="o", label="shipped")
    for x, y in dense:
        axes.scatter(x, y, color=DENSE, marker="s", label="dense", zorder=3)
    axes.set_xlim(left=0)
    axes.set_xlabel(axis.title)
    axes.set_ylabel(report.axis)
    axes.grid(color="#dddddd", linewidth=0.6)
    axes.legend(fontsize=8, loc="lower right")
    return sheet
