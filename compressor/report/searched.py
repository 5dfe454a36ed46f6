"""What a search found, for people: `SearchReport` to search.md, search.json, a self-contained search.html and plots.

The best composite, its curve against the presets', which choices count, every trial. Plain numbers come in;
knows nothing of how they were found.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Sheet
from matplotlib.ticker import MaxNLocator

from ..records import Accuracy
from . import facts
from .facts import model_name
from .plots import DENSE, KEPT, REMOVED, WIDTH_IN, Drawing, draw
from .sections import Figure, KeyFigure, Section
from .tables import Table
from .write import Page, ReportPaths, write_page

_PARTS = {"search": "search images", "evaluation": "images the search never saw"}
_LINES: tuple[Any, ...] = ("--", ":", "-.", (0, (5, 1)), (0, (1, 1)), (0, (3, 1, 1, 1)))


@dataclass(frozen=True, slots=True)
class Curve:
    """One finalist on one part of the images: (budget, accuracy, MACs kept, images) at each budget."""

    name: str
    part: str
    points: tuple[tuple[float, float, float, int], ...]
    area: float
    best: bool
    preset: str


@dataclass(frozen=True, slots=True)
class Tried:
    """One trial: (budget, accuracy) at each budget it reached."""

    number: int
    state: str
    value: float | None
    preset: str
    points: tuple[tuple[float, float], ...]
    seconds: float


@dataclass(frozen=True, slots=True)
class SearchReport:
    """`dense` is the dense network's accuracy on each part; `preset` the best preset's name on the search images."""

    model: str
    best: str
    preset: str
    dense: Mapping[str, float]
    settings: tuple[tuple[str, str], ...]
    composite: tuple[tuple[str, str], ...]
    curves: tuple[Curve, ...]
    tried: tuple[Tried, ...]
    importance: tuple[tuple[str, float], ...]
    images: Mapping[str, int]
    hashes: Mapping[str, str]
    trial_images: int
    score_images: int
    repaired: bool


def write_search_report(found: SearchReport, folder: Path, content: Mapping[str, Any]) -> ReportPaths:
    """Writes into `folder`, over an earlier report; `content` becomes search.json."""
    images = draw(_drawings(found))
    title = f"{model_name(found.model)}: attribution searched for pruning"
    page = Page(title, tuple(_verdict(found)), (), tuple(_figures(found)), _sections(found, images), images)
    return write_page(page, folder, "search", content)


def _of(found: SearchReport, part: str, name: str) -> Curve | None:
    return next((c for c in found.curves if c.part == part and c.name == name), None)


def _judged(found: SearchReport) -> str:
    """The part the verdict is about: images the search never saw, where they were counted."""
    return "evaluation" if any(c.part == "evaluation" for c in found.curves) else "search"


def _best_preset(found: SearchReport, part: str) -> Curve | None:
    """The preset with the largest area there."""
    return max((c for c in found.curves if c.part == part and c.preset), key=lambda c: c.area, default=None)


def _verdict(found: SearchReport) -> Iterator[str]:
    part = _judged(found)
    best, rival = _of(found, part, found.best), _best_preset(found, part)
    stopped = sum(t.state == "stopped" for t in found.tried)
    yield f"{facts.counted(len(found.tried), 'trial')}, {stopped} of them stopped early; the best is {found.best}."
    if _all_alike(found):
        yield (
            "All complete trials lie within what the images can tell apart: on this network the recipe hardly matters "
            "at these budgets. Search at harder budgets (--budgets), or with more images."
        )
    if best is None or rival is None:
        return
    if best.preset:
        yield "No trial beat the best preset on the search images: the recipe is that preset's."
        return
    more = 100 * (best.area - rival.area)
    word = "ahead of" if more > 0 else "behind" if more < 0 else "level with"
    yield (
        f"On {_PARTS[part]} its area under accuracy over MACs is {100 * best.area:.2f} %, {abs(more):.2f} points "
        f"{word} the best preset there ({rival.name}, {100 * rival.area:.2f} %)."
    )
    yield f"{best.points[0][3]} images carry about ±{_noise(best):.1f} points at each budget; all recipes share them."


def _all_alike(found: SearchReport) -> bool:
    """Whether the best and the worst complete trial differ by less than one of them may by chance."""
    areas = [t.value for t in found.tried if t.state == "complete" and t.value is not None]
    if len(areas) < 2:
        return False
    best, images = max(areas), max(1, found.trial_images)
    return min(areas) >= Accuracy(round(best * images), images).interval[0]


def _noise(curve: Curve) -> float:
    """Half of a 95 % interval of the curve's mean accuracy, in points."""
    p = float(np.mean([accuracy for _, accuracy, _, _ in curve.points]))
    return 196 * float(np.sqrt(max(p * (1 - p), 0.0) / curve.points[0][3]))


def _figures(found: SearchReport) -> Iterator[KeyFigure]:
    for part in dict.fromkeys(c.part for c in found.curves):
        best, rival = _of(found, part, found.best), _best_preset(found, part)
        if best is not None:
            detail = f"best preset there {100 * rival.area:.2f} %" if rival else "no preset was completed"
            yield KeyFigure(f"Area, {part} images", f"{100 * best.area:.2f} %", detail)
    yield KeyFigure("Trials", str(len(found.tried)), f"{sum(t.seconds for t in found.tried):.0f} s in all")


def _sections(found: SearchReport, images: Mapping[str, bytes]) -> tuple[Section, ...]:
    few = "Too few trials were completed to say which choices count."
    weights = (_WEIGHTS,) if _WEIGHTS.name in images else ()
    mended = "repaired, no fine-tuning" if found.repaired else "neither repaired nor fine-tuned"
    caption = f"Top-1 over the MACs that may stay, on {_PARTS[_judged(found)]}; {mended}."
    curve = Figure("search-curve", "accuracy over MACs kept, best against presets", caption)
    use = "Use it with `compressor compress --recipe best.toml`."
    return (
        Section("best", "The best recipe", (use,), _recipe_tables(found)),
        Section("curve", "Against the presets", (), (curve, *_curve_tables(found))),
        Section("choices", "Which choices count", () if weights else (few,), weights),
        Section("trials", "The trials", (), (_HISTORY, _trial_table(found))),
        Section("images", "The images", (_images_text(found),), (_hash_table(found),)),
    )


_HISTORY = Figure(
    "search-history", "area of every trial in order", "Every trial's area on its images, in order; a line for the best."
)
_WEIGHTS = Figure(
    "search-importance",
    "how far each choice sets the best trials apart",
    "How far each choice sets the best of the complete trials apart (PED-ANOVA); those few had to make are not in it.",
)


def _images_text(found: SearchReport) -> str:
    done = "scored and repaired" if found.repaired else "scored"
    return (
        f"Trials {done} with {found.score_images} calibration images and were judged on "
        f"{found.trial_images} search images; finalists were made again with all calibration images and judged on all "
        "search images, where the choice was made. Evaluation images were counted after it. The parts share no image."
    )


def _recipe_tables(found: SearchReport) -> tuple[Table, ...]:
    settings = Table("Scores and ranking", ("field", "value"), "cl", found.settings)
    return (
        (settings, Table("LRP composite", ("layers", "rule"), "cl", found.composite))
        if found.composite
        else (settings,)
    )


def _curve_tables(found: SearchReport) -> Iterator[Table]:
    for part in dict.fromkeys(c.part for c in found.curves):
        curves = sorted((c for c in found.curves if c.part == part), key=lambda c: -c.area)
        budgets = tuple(f"{100 * budget:g} % of MACs" for budget, *_ in curves[0].points)
        rows = tuple((_named(c), f"{100 * c.area:.2f}", *(f"{100 * a:.1f}" for _, a, _, _ in c.points)) for c in curves)
        note = f"Top-1 in %, {curves[0].points[0][3]} images; dense {100 * found.dense[part]:.1f}."
        yield Table(f"On {_PARTS[part]}", ("recipe", "area, %", *budgets), "lr" + "r" * len(budgets), rows, note)


def _named(curve: Curve) -> str:
    return f"{curve.name} (chosen)" if curve.best else curve.name


def _trial_table(found: SearchReport) -> Table:
    rows = tuple(
        (
            str(t.number),
            t.state,
            t.preset or "–",
            "" if t.value is None else f"{100 * t.value:.2f}",
            ", ".join(f"{100 * accuracy:.1f}" for _, accuracy in t.points),
            f"{t.seconds:.1f}",
        )
        for t in found.tried
    )
    head = ("trial", "state", "preset", "area, %", "top-1 at each budget, the lowest first", "seconds")
    return Table("Trials", head, "rllrlr", rows, "A stopped trial's area is that of the budgets it reached.")


def _hash_table(found: SearchReport) -> Table:
    rows = tuple((name, str(n), found.hashes[name]) for name, n in found.images.items())
    return Table("Parts", ("part", "images", "sha256 of contents and labels"), "lrc", rows)


def _drawings(found: SearchReport) -> Iterator[tuple[str, Drawing]]:
    yield "search-curve", lambda: _curve(found)
    yield _HISTORY.name, lambda: _history(found.tried)
    yield _WEIGHTS.name, lambda: _importance(found.importance)


def _curve(found: SearchReport) -> Sheet:
    part = _judged(found)
    figure, axes = _sheet(4.0)
    lines = iter(_LINES * (1 + len(found.curves)))
    shown = [c for c in found.curves if c.part == part and (c.best or c.preset)]
    for curve in sorted(shown, key=lambda c: (c.best, c.area)):
        x, y = ([100 * point[i] for point in curve.points] for i in (0, 1))
        look: dict[str, Any] = {"color": DENSE, "linestyle": next(lines), "markersize": 3}
        if curve.best:
            look = {"color": KEPT, "linewidth": 2.2, "markersize": 5}
        axes.plot(x, y, marker="o", label=f"{curve.name}: area {100 * curve.area:.1f} %", **look)
    axes.axhline(100 * found.dense[part], color=REMOVED, linewidth=0.9, label="dense")
    axes.set_xlabel("MACs that may stay, % of dense")
    axes.set_ylabel("top-1, %")
    figure.legend(loc="outside upper left", fontsize=8)
    return figure


def _sheet(height_in: float) -> tuple[Sheet, Axes]:
    figure = Sheet(figsize=(WIDTH_IN, height_in), layout="constrained")
    axes = figure.add_subplot()
    axes.grid(color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    return figure, axes


_MARKS: Mapping[str, dict[str, Any]] = {
    "preset": {"color": REMOVED, "marker": "D", "s": 26},
    "complete": {"color": KEPT, "marker": "o", "s": 20},
    "stopped": {"color": DENSE, "marker": "x", "s": 18},
}


def _kind(trial: Tried) -> str:
    return "preset" if trial.preset else "complete" if trial.state == "complete" else "stopped"


def _history(tried: Sequence[Tried]) -> Sheet:
    figure, axes = _sheet(3.0)
    valued = [(t.number, t, t.value) for t in tried if t.value is not None]
    for label, look in _MARKS.items():
        chosen = [(i, 100 * value) for i, t, value in valued if _kind(t) == label]
        if chosen:
            axes.scatter(*zip(*chosen, strict=True), label=label, zorder=3, **look)
    complete = [(i, value) for i, t, value in valued if t.state == "complete"]
    if complete:
        best = 100 * np.maximum.accumulate([value for _, value in complete])
        axes.step([i for i, _ in complete], best, where="post", color=KEPT, linewidth=1, label="best so far")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.set_xlabel("trial")
    axes.set_ylabel("area, %")
    figure.legend(loc="outside upper left", ncols=4, fontsize=8)
    return figure


def _importance(importance: Sequence[tuple[str, float]]) -> Sheet | None:
    shown = importance[:16]
    if not shown:
        return None
    figure, axes = _sheet(0.9 + 0.26 * len(shown))
    axes.barh(range(len(shown)), [100 * share for _, share in shown], color=KEPT, height=0.7)
    axes.set_yticks(range(len(shown)), [name for name, _ in shown], fontsize=8)
    axes.invert_yaxis()
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel("share of what sets the best trials apart, %")
    return figure
