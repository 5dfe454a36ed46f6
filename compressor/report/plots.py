"""The report's plots as PNG bytes: what was removed where, relevance, the trade-off, latency.

In: `ReportInput`. Out: name -> PNG. A plot without data is left out. Sized to stay readable when shown
360 px wide; dark against light as well as blue against orange, for print and for colour-blind readers.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from ..records import Accuracy, FloatArray, Quality
from . import facts
from .contents import GroupRow, LatencyRow, ParetoPoint, ReportInput, TradePoint
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
    for runtime in dict.fromkeys(row.runtime for row in run.latency):
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
    return 1 if rows <= LABELS else -(-rows // _MOST_NAMED)


def shortened(name: str, length: int = 26) -> str:
    """The end of a long qualified name, of at most `length` letters: it tells more than the beginning."""
    return name if len(name) <= length else "…" + name[-(length - 1) :]


def _above(axes: Axes, columns: int) -> None:
    axes.figure.legend(
        *axes.get_legend_handles_labels(), loc="outside upper left", ncols=columns, fontsize=9, markerscale=2.5
    )


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
    _above(axes, 2)
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
    for row, (kept, removed) in enumerate(split_scores):
        largest = max(float(np.abs(np.concatenate([kept, removed])).max()), np.finfo(float).tiny)
        kept_label, removed_label = ("kept", "removed") if row == 0 else ("", "")  # each once in the legend
        _dots(axes, kept / largest, row - 0.18, KEPT, kept_label, dot_size)
        _dots(axes, removed / largest, row + 0.18, REMOVED, removed_label, dot_size)
    _name_rows(axes, names)
    axes.set_xlabel(f"{score_name}, as a share of the group's largest")
    axes.grid(axis="x", color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    _above(axes, 2)
    return figure


def _dots(axes: Axes, values: FloatArray, row: float, colour: str, label: str, size: float) -> None:
    jitter = 0.13 * np.sin(np.arange(values.size) * 2.4)  # spread without a random number
    axes.scatter(values, row + jitter, s=size, color=colour, alpha=0.6, linewidths=0, label=label or None)


def _layers(run: ReportInput) -> Figure | None:
    layers = [row for row in run.layers if row.macs_dense]
    if not layers:
        return None
    figure, axes = _rows_figure(len(layers))
    rows = np.arange(len(layers))
    dense = np.array([layer.macs_dense for layer in layers]) / 1e6
    shipped = np.array([layer.macs_shipped for layer in layers]) / 1e6
    axes.barh(rows, dense, color="#d5d5d5", height=0.8, label="dense")
    axes.barh(rows, shipped, color=KEPT, height=0.5, label="shipped")
    _name_rows(axes, [facts.layer_name(layer.layer) for layer in layers])
    axes.set_xlabel("million MACs per image")
    _above(axes, 2)
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
        y = [_scaled(point, point.value) for point in points]
        axes.scatter(x, y, s=size, marker=marker, color=colour, label=label, zorder=3)
    for point in run.trade:
        if point.chosen:
            axes.scatter(100 * point.macs_share, _scaled(point, point.value), s=190, **_RING)
    axes.set_xlabel("MACs kept, % of dense")
    axes.set_ylabel(_axis_of(run.trade[0]))
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


def _axis_of(figure: Accuracy | Quality | TradePoint) -> str:
    """`top-1, %`; without the per cent where it is no share."""
    return f"{figure.metric}, %" if figure.is_share else figure.metric


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
    front_values = [_scaled(point.accuracy, point.accuracy.value) for point in front]
    axes.plot(front_ms, front_values, color="#888888", linewidth=1.4, zorder=1)
    for index, point in enumerate(points):
        colour = DENSE if point.reference else _COLOURS[index % len(_COLOURS)]
        _pareto_point(axes, point, colour, _MARKERS[index % len(_MARKERS)])
    axes.set_xlim(left=0)
    axes.xaxis.set_major_locator(MaxNLocator(6))
    figure.legend(fontsize=8, loc="outside upper left", ncols=1 if len(points) < 4 else 2)
    axes.set_xlabel(f"median milliseconds, batch {points[0].batch}, {points[0].runtime}")
    axes.set_ylabel(_axis_of(points[0].accuracy))
    axes.grid(color="#dddddd", linewidth=0.6)
    return figure


def _scaled(figure: Accuracy | Quality | TradePoint, value: float) -> float:
    """In per cent where the figure is a share."""
    return 100 * value if figure.is_share else value


def _pareto_point(axes: Axes, point: ParetoPoint, colour: str, marker: str) -> None:
    """The point, and its accuracy's interval as a bar."""
    low, high = (_scaled(point.accuracy, bound) for bound in (point.accuracy.low, point.accuracy.high))
    value = _scaled(point.accuracy, point.accuracy.value)
    axes.plot([point.ms] * 2, [low, high], color=colour, linewidth=0.8, alpha=0.6)
    label = f"{point.label}: {facts.milliseconds(point.ms)} ms, {facts.value_of(point.accuracy)}"
    axes.scatter(point.ms, value, s=44, marker=marker, color=colour, label=label, zorder=3)


def _time(run: ReportInput) -> Figure | None:
    timed = [row for _, row in facts.timed_layers(run)][:SLOWEST]
    if not timed:
        return None
    figure, axes = _rows_figure(len(timed))
    rows = np.arange(len(timed))
    axes.barh(rows, [layer.ms_dense or 0.0 for layer in timed], color="#d5d5d5", height=0.8, label="dense")
    axes.barh(rows, [layer.ms_shipped or 0.0 for layer in timed], color=KEPT, height=0.5, label="shipped")
    _name_rows(axes, [facts.layer_name(layer.layer) for layer in timed])
    axes.set_xlabel("milliseconds")
    _above(axes, 2)
    return figure


def draw_latency(rows: Sequence[LatencyRow]) -> Figure | None:
    """Rows of one runtime: a panel for each batch size, a curve for each row; None where no row has samples."""
    batch_sizes = list(dict.fromkeys(row.batch for row in rows if row.samples_ms.size))
    if not batch_sizes:
        return None
    figure = Figure(figsize=(WIDTH_IN, 0.5 + 1.7 * len(batch_sizes)), layout="constrained")
    panels = np.atleast_1d(figure.subplots(len(batch_sizes)))  # of one panel `subplots` gives no array
    for axes, batch_size in zip(panels, batch_sizes, strict=True):
        for row in rows:
            if row.batch == batch_size and row.samples_ms.size:
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
    colour, line = (DENSE, "--") if row.variant == "dense" else _LINES.get(row.precision, (REMOVED, "-"))
    axes.step(samples, share, where="post", color=colour, linestyle=line, label=label)
    if samples[-1] > 10 * samples[0]:  # a few slow runs would press all others into one line
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 3.0)))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda ms, _: f"{ms:g}"))
        axes.xaxis.set_minor_formatter(NullFormatter())
