"""The report's plots as PNG bytes: what was removed where, relevance, the trade-off, latency.

In: `ReportInput`. Out: name -> PNG. A plot without data is left out. Sized to stay readable when shown
360 px wide; dark against light as well as blue against orange, for print and for colour-blind readers.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Sequence
from itertools import cycle
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from ..records import Accuracy, FloatArray, Quality
from . import facts
from .contents import GroupRow, LatencyRow, LayerRow, ParetoPoint, ReportInput, TradePoint
from .sections import slug
from .tables import SLOWEST, subject

KEPT, REMOVED, DENSE, INK = "#0b5394", "#e69138", "#8a8a8a", "#222222"
WIDTH_IN, DPI = 5.0, 200
LABELS = 60  # more rows than this and only some are named
_MOST_NAMED = 40  # of them
STYLE: Any = {
    "font.size": 10,
    "axes.edgecolor": "#999999",
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
}

Drawing = Callable[[], Figure | None]


def draw_plots(run: ReportInput) -> dict[str, bytes]:
    """PNGs of everything the run has data for, by the names that figures of the sections use."""
    return draw(_drawings(run))


def draw(drawings: Iterable[tuple[str, Drawing]]) -> dict[str, bytes]:
    """PNGs by name, in one style; a drawing that returns None has nothing to show."""
    import matplotlib

    images: dict[str, bytes] = {}
    with matplotlib.rc_context(STYLE):
        for name, drawing in drawings:
            figure = drawing()
            if figure is not None:
                images[name] = to_png(figure)
    return images


def _drawings(run: ReportInput) -> Iterable[tuple[str, Drawing]]:
    yield "removed", lambda: _removed(run.groups)
    yield "relevance", lambda: _relevance(run.groups, facts.worth(run))
    yield "layers", lambda: _layers(run)
    yield "trade", lambda: _trade(run)
    yield "recovery", lambda: _recovery(run)
    yield "pareto", lambda: draw_pareto(run.pareto)
    yield "time", lambda: _time(run)
    for runtime in facts.timed_runtimes(run):
        rows = [row for row in run.latency if row.runtime == runtime]
        # bound now: the drawing is called when the loop is further on
        yield f"latency-{slug(runtime)}", lambda rows=rows: draw_latency(rows)  # type: ignore[misc]


def to_png(figure: Figure) -> bytes:
    """The figure at `DPI`, without `savefig`, which lays it out twice to the same end."""
    figure.dpi = DPI
    buffer = io.BytesIO()
    # no Software entry: matplotlib's version says nothing of the figure
    FigureCanvasAgg(figure).print_png(buffer, metadata={"Software": None})  # type: ignore[no-untyped-call]
    return buffer.getvalue()


def _rows_figure(rows: int) -> tuple[Figure, Axes]:
    """A figure as tall as its rows need, first row on top."""
    pitch_in = 0.24 if rows <= LABELS else 0.08
    figure = Figure(figsize=(WIDTH_IN, 1.0 + pitch_in * rows), layout="constrained")
    axes = figure.add_subplot()
    axes.set_ylim(rows - 0.4, -0.6)  # downwards: row 0 is the uppermost
    return figure, axes


def _name_rows(axes: Axes, names: Sequence[str]) -> None:
    named_rows = range(0, len(names), label_step(len(names)))
    axes.set_yticks(list(named_rows), [shortened(names[row]) for row in named_rows], fontsize=8)
    axes.tick_params(axis="y", length=0)


def label_step(rows: int) -> int:
    """From one named row to the next: 1 up to `LABELS` rows; of 100 every third."""
    if rows <= LABELS:
        return 1
    return -(-rows // _MOST_NAMED)


def shortened(name: str, length: int = 26) -> str:
    """The end of a long qualified name, of at most `length` letters: it tells more than the beginning."""
    if len(name) <= length:
        return name
    return "…" + name[-(length - 1) :]


def _above(axes: Axes) -> None:
    handles, labels = axes.get_legend_handles_labels()
    axes.figure.legend(handles, labels, loc="outside upper left", ncols=2, fontsize=9, markerscale=2.5)


def _removed(groups: Sequence[GroupRow]) -> Figure | None:
    if not groups:
        return None
    figure, axes = _rows_figure(len(groups))
    kept = np.array([len(group.kept) / group.size for group in groups])
    rows = np.arange(len(groups))
    axes.barh(rows, kept, color=KEPT, height=0.78, label="kept")
    axes.barh(rows, 1 - kept, left=kept, color=REMOVED, height=0.78, label="removed")
    if len(groups) <= LABELS:
        for row, group in enumerate(groups):
            axes.text(1.01, row, f"{len(group.kept)}/{group.size}", va="center", fontsize=7.5)
    _name_rows(axes, [group.name for group in groups])
    axes.set_xlim(0, 1)
    axes.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0", "25", "50", "75", "100 %"])
    axes.set_xlabel("units")
    _above(axes)
    return figure


def _relevance(groups: Sequence[GroupRow], score_name: str) -> Figure | None:
    names: list[str] = []
    split_scores: list[tuple[FloatArray, FloatArray]] = []  # kept, removed
    for group in groups:
        kept, removed = facts.split_scores(group)
        if kept.size + removed.size:
            names.append(group.name)
            split_scores.append((kept, removed))
    if not names:
        return None

    figure, axes = _rows_figure(len(names))
    dot_size = 9 if len(names) <= LABELS else 3
    labels = ("kept", "removed")
    for row, (kept, removed) in enumerate(split_scores):
        largest = max(float(np.abs(np.concatenate([kept, removed])).max()), np.finfo(float).tiny)
        _dots(axes, kept / largest, row - 0.18, KEPT, labels[0], dot_size)
        _dots(axes, removed / largest, row + 0.18, REMOVED, labels[1], dot_size)
        labels = ("", "")  # each once in the legend
    _name_rows(axes, names)
    axes.set_xlabel(f"{score_name}, as a share of the group's largest")
    axes.grid(axis="x", color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    _above(axes)
    return figure


def _dots(axes: Axes, values: FloatArray, row: float, colour: str, label: str, size: float) -> None:
    jitter = 0.13 * np.sin(np.arange(values.size) * 2.4)  # spread without a random number
    axes.scatter(values, row + jitter, s=size, color=colour, alpha=0.6, linewidths=0, label=label or None)


def _layers(run: ReportInput) -> Figure | None:
    layers = [row for row in run.layers if row.macs_dense]
    dense = [layer.macs_dense / 1e6 for layer in layers]
    shipped = [layer.macs_shipped / 1e6 for layer in layers]
    return _layer_bars(layers, dense, shipped, "million MACs per image")


def _layer_bars(
    layers: Sequence[LayerRow], dense: Sequence[float], shipped: Sequence[float], label: str
) -> Figure | None:
    """Both networks' bar of each layer, one inside the other; None without a layer."""
    if not layers:
        return None
    figure, axes = _rows_figure(len(layers))
    rows = np.arange(len(layers))
    axes.barh(rows, dense, color="#d5d5d5", height=0.8, label="dense")
    axes.barh(rows, shipped, color=KEPT, height=0.5, label="shipped")
    _name_rows(axes, [facts.layer_name(layer.layer) for layer in layers])
    axes.set_xlabel(label)
    _above(axes)
    return figure


# as in the bars above: what went is orange, what stays blue, the dense network grey; the later one lies on top, smaller
_NETWORKS: dict[str, tuple[str, str, float]] = {
    "dense": (DENSE, "s", 60),
    "removed": (REMOVED, "o", 60),
    "repaired": ("#6fa8dc", "D", 76),
    "tuned": (KEPT, "o", 26),
    "trained": (KEPT, "^", 40),
}
_RING: Any = {
    "facecolors": "none",
    "edgecolors": INK,
    "linewidths": 1.4,
    "label": "shipped",
    "zorder": 4,
    "clip_on": False,  # whole also where the point lies on the axes' edge
}


def _trade(run: ReportInput) -> Figure | None:
    if len(run.trade) < 2:
        return None
    figure = Figure(figsize=(WIDTH_IN, 3.2), layout="constrained")
    axes = figure.add_subplot()
    for network in dict.fromkeys(point.label for point in run.trade):
        points = [point for point in run.trade if point.label == network]
        colour, marker, size = _NETWORKS.get(network, (INK, "^", 40))
        label = f"{network}: {facts.value_of(points[0])}" if len(points) == 1 else network
        x = [100 * point.macs_share for point in points]
        y = [_height(point) for point in points]
        axes.scatter(x, y, s=size, marker=marker, color=colour, label=label, zorder=3)
    for point in run.trade:
        if point.chosen:
            axes.scatter(100 * point.macs_share, _height(point), s=190, **_RING)
    axes.set_xlabel("MACs kept, % of dense")
    axes.set_ylabel(facts.axis_title(run.trade[0].metric, run.trade[0].is_share))
    axes.grid(color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    figure.legend(fontsize=9, loc="outside upper left", ncols=3)
    return figure


def _recovery(run: ReportInput) -> Figure | None:
    if len(run.recovery) < 2:
        return None
    figure = Figure(figsize=(WIDTH_IN, 2.6), layout="constrained")
    axes = figure.add_subplot()
    minutes = [row.seconds / 60 for row in run.recovery]
    axes.plot(minutes, [row.fidelity for row in run.recovery], marker="o", markersize=4, color=KEPT)
    for row in run.recovery:
        if row.kept:
            axes.scatter(row.seconds / 60, row.fidelity, s=190, **_RING)
    axes.set_xlabel("minutes of recovery")
    axes.set_ylabel("fidelity, held-out images")
    axes.grid(color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    return figure


def _height(figure: Accuracy | Quality | TradePoint) -> float:
    """On an axis: in per cent where the figure is a share."""
    return facts.scale_of(figure.is_share) * figure.value


_COLOURS = (KEPT, REMOVED, "#38761d", "#741b47", "#444444")
_MARKERS = "so^Dvp*X"


def draw_pareto(points: Sequence[ParetoPoint]) -> Figure | None:
    """One panel; the front as a line, the dense model grey."""
    if len(points) < 2:
        return None
    figure = Figure(figsize=(WIDTH_IN, 3.4), layout="constrained")
    axes = figure.add_subplot()
    front = facts.pareto_front(points)
    front_ms = [point.ms for point in front]
    front_values = [_height(point.accuracy) for point in front]
    axes.plot(front_ms, front_values, color="#888888", linewidth=1.4, zorder=1)
    for point, colour, marker in zip(points, cycle(_COLOURS), cycle(_MARKERS)):
        _pareto_point(axes, point, DENSE if point.reference else colour, marker)
    axes.set_xlim(left=0)
    axes.xaxis.set_major_locator(MaxNLocator(6))
    figure.legend(fontsize=8, loc="outside upper left", ncols=1 if len(points) < 4 else 2)
    axes.set_xlabel(f"median milliseconds, batch {points[0].batch}, {points[0].runtime}")
    axes.set_ylabel(facts.axis_title(points[0].accuracy.metric, points[0].accuracy.is_share))
    axes.grid(color="#dddddd", linewidth=0.6)
    return figure


def _pareto_point(axes: Axes, point: ParetoPoint, colour: str, marker: str) -> None:
    """The point, and its accuracy's interval as a bar."""
    accuracy = point.accuracy
    scale = facts.scale_of(accuracy.is_share)
    axes.plot([point.ms] * 2, [scale * accuracy.low, scale * accuracy.high], color=colour, linewidth=0.8, alpha=0.6)
    label = f"{point.label}: {facts.milliseconds(point.ms)} ms, {facts.value_of(accuracy)}"
    axes.scatter(point.ms, _height(accuracy), s=44, marker=marker, color=colour, label=label, zorder=3)


def _time(run: ReportInput) -> Figure | None:
    timed = facts.timed_layers(run)[:SLOWEST]
    layers = [layer for _, layer in timed]
    dense_ms = [layer.ms_dense or 0.0 for layer in layers]
    shipped_ms = [ms for ms, _ in timed]
    return _layer_bars(layers, dense_ms, shipped_ms, "milliseconds")


def draw_latency(rows: Sequence[LatencyRow]) -> Figure | None:
    """Rows of one runtime: a panel for each batch size, a curve for each row; None where no row has samples."""
    timed = [row for row in rows if row.samples_ms.size]
    if not timed:
        return None
    batch_sizes = list(dict.fromkeys(row.batch for row in timed))
    figure = Figure(figsize=(WIDTH_IN, 0.5 + 1.7 * len(batch_sizes)), layout="constrained")
    panels = np.atleast_1d(figure.subplots(len(batch_sizes)))  # of one panel `subplots` gives no array
    for axes, batch_size in zip(panels, batch_sizes, strict=True):
        for row in timed:
            if row.batch == batch_size:
                _finished_by(axes, row)
        axes.set_title(f"batch {batch_size}", fontsize=9, loc="left")
        axes.set_ylabel("% finished", fontsize=9)
        axes.grid(color="#dddddd", linewidth=0.6)
        axes.legend(fontsize=8, loc="best")
    axes.set_xlabel("milliseconds for the batch")  # of the lowest panel
    return figure


_LINES = {"fp32": (KEPT, "-"), "fp16": ("#38761d", ":"), "int8": (REMOVED, "-.")}


def _finished_by(axes: Axes, row: LatencyRow) -> None:
    """Every sample, sorted: the curve at x is the share of runs that took at most x."""
    samples = np.sort(row.samples_ms)
    share = 100 * np.arange(1, samples.size + 1) / samples.size
    label = f"{subject(row)}, p50 {facts.milliseconds(facts.median_ms(row))} ms"
    colour, line = _LINES.get(row.precision, (REMOVED, "-"))
    if row.variant == "dense":
        colour, line = DENSE, "--"
    axes.step(samples, share, where="post", color=colour, linestyle=line, label=label)
    if samples[-1] > 10 * samples[0]:  # a few slow runs would press all others into one line
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 3.0)))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda ms, _: f"{ms:g}"))
        axes.xaxis.set_minor_formatter(NullFormatter())
