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

from ..records import FloatArray
from . import facts
from .contents import GroupRow, LatencyRow, ReportInput
from .sections import slug

KEPT, REMOVED, DENSE, INK = "#0b5394", "#e69138", "#8a8a8a", "#222222"
WIDTH_IN, DPI = 5.0, 200
LABELS = 60  # more rows than this and only some are named
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


def draw_plots(run: ReportInput) -> dict[str, bytes]:
    import matplotlib

    found: dict[str, bytes] = {}
    with matplotlib.rc_context(STYLE):
        for name, drawing in _drawings(run):
            figure = drawing()
            if figure is not None:
                found[name] = _png(figure)
    return found


def _drawings(run: ReportInput) -> Iterable[tuple[str, Callable[[], Figure | None]]]:
    yield "removed", lambda: _removed(run.groups)
    yield "relevance", lambda: _relevance(run.groups)
    yield "layers", lambda: _layers(run)
    yield "trade", lambda: _trade(run)
    for runtime in dict.fromkeys(r.runtime for r in run.latency):
        rows = [r for r in run.latency if r.runtime == runtime]
        yield f"latency-{slug(runtime)}", lambda rows=rows: _latency(rows)  # type: ignore[misc]


def _png(figure: Figure) -> bytes:
    FigureCanvasAgg(figure)
    target = io.BytesIO()
    figure.savefig(target, format="png", dpi=DPI, metadata={"Software": None})
    return target.getvalue()


def _rows_figure(rows: int) -> tuple[Figure, Axes]:
    """A figure as tall as its rows need, first row on top."""
    pitch = 0.24 if rows <= LABELS else 0.08
    figure = Figure(figsize=(WIDTH_IN, 1.0 + pitch * rows), layout="constrained")
    axes = figure.add_subplot()
    axes.set_ylim(rows - 0.4, -0.6)
    return figure, axes


def _name_rows(axes: Axes, names: Sequence[str]) -> None:
    step = 1 if len(names) <= LABELS else -(-len(names) // 40)
    shown = range(0, len(names), step)
    axes.set_yticks(list(shown), [_short(names[i]) for i in shown], fontsize=8)
    axes.tick_params(axis="y", length=0)


def _short(name: str, length: int = 26) -> str:
    """The end of a long qualified name: it tells more than the beginning."""
    return name if len(name) <= length else "…" + name[-(length - 1) :]


def _above(axes: Axes, columns: int) -> None:
    axes.figure.legend(
        *axes.get_legend_handles_labels(), loc="outside upper left", ncols=columns, fontsize=9, markerscale=2.5
    )


def _removed(groups: Sequence[GroupRow]) -> Figure | None:
    if not groups:
        return None
    figure, axes = _rows_figure(len(groups))
    kept = np.array([len(g.kept) / g.size for g in groups])
    rows = np.arange(len(groups))
    axes.barh(rows, kept, color=KEPT, height=0.78, label="kept")
    axes.barh(rows, 1 - kept, left=kept, color=REMOVED, height=0.78, label="removed")
    if len(groups) <= LABELS:
        for row, group in enumerate(groups):
            axes.text(1.01, row, f"{len(group.kept)}/{group.size}", va="center", fontsize=7.5)
    _name_rows(axes, [g.name for g in groups])
    axes.set_xlim(0, 1)
    axes.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0", "25", "50", "75", "100 %"])
    axes.set_xlabel("units")
    _above(axes, 2)
    return figure


def _relevance(groups: Sequence[GroupRow]) -> Figure | None:
    scored = [(g, *facts.split_scores(g)) for g in groups]
    scored = [s for s in scored if s[1].size + s[2].size]
    if not scored:
        return None
    figure, axes = _rows_figure(len(scored))
    for row, (_, kept, removed) in enumerate(scored):
        largest = max(float(np.abs(np.concatenate([kept, removed])).max()), np.finfo(float).tiny)
        first = row == 0
        size = 9 if len(scored) <= LABELS else 3
        _dots(axes, kept / largest, row - 0.18, KEPT, "kept" if first else "", size)
        _dots(axes, removed / largest, row + 0.18, REMOVED, "removed" if first else "", size)
    _name_rows(axes, [g.name for g, _, _ in scored])
    axes.set_xlabel("relevance, as a share of the group's largest")
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
    dense, pruned = (np.array([getattr(r, f"macs_{v}") for r in layers]) / 1e6 for v in ("dense", "pruned"))
    axes.barh(rows, dense, color="#d5d5d5", height=0.8, label="dense")
    axes.barh(rows, pruned, color=KEPT, height=0.5, label="pruned")
    _name_rows(axes, [r.layer or "(top level)" for r in layers])
    axes.set_xlabel("million MACs per image")
    _above(axes, 2)
    return figure


def _trade(run: ReportInput) -> Figure | None:
    if len(run.trade) < 2:
        return None
    figure = Figure(figsize=(WIDTH_IN, 3.2), layout="constrained")
    axes = figure.add_subplot()
    points = sorted(run.trade, key=lambda p: p.macs_share)
    x, y = np.array([100 * p.macs_share for p in points]), np.array([100 * p.accuracy for p in points])
    for name in dict.fromkeys(p.label for p in points):
        mine = [i for i, p in enumerate(points) if p.label == name]
        axes.plot(x[mine], y[mine], marker="o", markersize=4, linewidth=1.2, label=name)
    for i, point in enumerate(points):
        if point.chosen:
            axes.scatter(
                x[i], y[i], s=110, facecolors="none", edgecolors=REMOVED, linewidths=2, label="this run", zorder=3
            )
    axes.set_xlabel("MACs kept, % of dense")
    axes.set_ylabel("top-1, %")
    axes.grid(color="#dddddd", linewidth=0.6)
    axes.legend(fontsize=9)
    return figure


def _latency(rows: Sequence[LatencyRow]) -> Figure | None:
    panels = list(dict.fromkeys((r.batch, r.precision) for r in rows if r.samples_ms.size))
    if not panels:
        return None
    figure = Figure(figsize=(WIDTH_IN, 0.5 + 1.7 * len(panels)), layout="constrained")
    for axes, panel in zip(np.atleast_1d(figure.subplots(len(panels))), panels, strict=True):
        for row in rows:
            if (row.batch, row.precision) == panel and row.samples_ms.size:
                _finished_by(axes, row)
        axes.set_title(f"batch {panel[0]}, {panel[1]}", fontsize=9, loc="left")
        axes.set_ylabel("% finished", fontsize=9)
        axes.grid(color="#dddddd", linewidth=0.6)
        axes.legend(fontsize=8, loc="lower right")
    axes.set_xlabel("milliseconds for the batch")
    return figure


def _finished_by(axes: Axes, row: LatencyRow) -> None:
    """Every sample, sorted: the curve at x is the share of runs that took at most x."""
    samples = np.sort(row.samples_ms)
    share = 100 * np.arange(1, samples.size + 1) / samples.size
    dense = row.variant == "dense"
    label = f"{row.variant}, p50 {facts.milliseconds(facts.median_ms(row))} ms"
    colours = {"dense": DENSE, "pruned": KEPT, "compensated": KEPT, "finetuned": KEPT}
    axes.step(
        samples,
        share,
        where="post",
        color=colours.get(row.variant, REMOVED),
        linestyle="--" if dense else "-",
        label=label,
    )
    if samples[-1] > 10 * samples[0]:
        axes.set_xscale("log")
