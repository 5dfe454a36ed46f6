"""What a search found, for people: `SearchReport` to search.md, search.json, a self-contained search.html and plots.

The best composite, its curve against the presets', which choices count, every trial. Plain numbers come in;
knows nothing of how they were found.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
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
from .tables import Table, stated
from .write import Page, ReportPaths, write_page

_PART_TITLES = {"search": "search images", "evaluation": "images the search never saw"}
COUNTED = ("top-1", "agreement")  # metrics that are shares of right answers
_LINES: tuple[Any, ...] = ("--", ":", "-.", (0, (5, 1)), (0, (1, 1)), (0, (3, 1, 1, 1)))


@dataclass(frozen=True, slots=True)
class Curve:
    """One finalist on one part of the images: (budget, quality, MACs kept, images) at each budget."""

    name: str
    part: str
    points: tuple[tuple[float, float, float, int], ...]
    area: float
    best: bool
    preset: str


@dataclass(frozen=True, slots=True)
class Tried:
    """One trial: (budget, quality) at each budget it reached."""

    number: int
    state: str
    value: float | None
    preset: str
    points: tuple[tuple[float, float], ...]
    seconds: float


@dataclass(frozen=True, slots=True)
class SearchReport:
    """`dense` is the dense network's quality on each part, by `metric`; `preset` the best preset's name on the search
    images. Where `is_share`, a quality of 1 is the best there is and all are told in per cent."""

    model: str
    best: str
    preset: str
    dense: Mapping[str, float]
    metric: str
    is_share: bool
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


def write_search_report(report: SearchReport, folder: Path, content: Mapping[str, Any]) -> ReportPaths:
    """Writes into `folder`, over an earlier report; `content` becomes search.json.

    Raises FolderError when the disk is in the way.
    """
    images = draw(_drawings(report))
    title = f"{model_name(report.model)}: attribution searched for pruning"
    page = Page(title, tuple(_verdict(report)), (), tuple(_figures(report)), _sections(report, images), images)
    return write_page(page, folder, "search", content)


def _curves_on(report: SearchReport, image_part: str) -> list[Curve]:
    return [curve for curve in report.curves if curve.part == image_part]


def _best_on(report: SearchReport, image_part: str) -> Curve | None:
    """The chosen recipe's curve there."""
    return next((curve for curve in _curves_on(report, image_part) if curve.name == report.best), None)


def _best_preset_on(report: SearchReport, image_part: str) -> Curve | None:
    """The preset with the largest area there."""
    presets = [curve for curve in _curves_on(report, image_part) if curve.preset]
    return max(presets, key=lambda curve: curve.area, default=None)


def _judged(report: SearchReport) -> str:
    """The part the verdict is about: images the search never saw, where they were counted."""
    return "evaluation" if _curves_on(report, "evaluation") else "search"


def _verdict(report: SearchReport) -> Iterator[str]:
    image_part = _judged(report)
    best, rival = _best_on(report, image_part), _best_preset_on(report, image_part)
    stopped = sum(trial.state == "stopped" for trial in report.tried)
    yield f"{facts.counted(len(report.tried), 'trial')}, {stopped} of them stopped early; the best is {report.best}."
    if _all_alike(report):
        yield (
            "All complete trials lie within what the images can tell apart: on this network the recipe hardly matters "
            "at these budgets. Search at harder budgets (--budgets), or with more images."
        )
    if best is None or rival is None:
        return
    if best.preset:
        yield "No trial beat the best preset on the search images: the recipe is that preset's."
        return
    yield _lead_sentence(report, best, rival)
    if _counts(report):
        images = f"{_images_of(best)} images"
        yield f"{images} carry about ±{_noise(best):.1f} points at each budget; all recipes share them."


def _lead_sentence(report: SearchReport, best: Curve, rival: Curve) -> str:
    lead = _scale(report) * (best.area - rival.area)
    unit = "points" if report.is_share else ""
    return (
        f"On {_PART_TITLES[best.part]} its area under {report.metric} over MACs is {_told(report, best.area)}, "
        f"{abs(lead):.2f} {unit} {_standing(lead)} the best preset there ({rival.name}, {_told(report, rival.area)})."
    )


def _scale(report: SearchReport) -> float:
    return facts.scale_of(report.is_share)


def _told(report: SearchReport, value: float, digits: int = 2) -> str:
    """With its unit, where it is a share."""
    unit = " %" if report.is_share else ""
    return f"{_scale(report) * value:.{digits}f}{unit}"


def _counts(report: SearchReport) -> bool:
    """Whether a quality is a share of right answers, whose noise follows from how many there are."""
    return report.metric in COUNTED


def _standing(lead: float) -> str:
    if lead > 0:
        return "ahead of"
    if lead < 0:
        return "behind"
    return "level with"


def _all_alike(report: SearchReport) -> bool:
    """Whether the best and the worst complete trial differ by less than one of them may by chance."""
    _, areas = _numbered_areas(_complete(report))
    if len(areas) < 2 or not _counts(report):
        return False
    images = max(1, report.trial_images)
    best = Accuracy(round(max(areas) * images), images)  # an area is a mean of shares, so as uncertain as one
    low, _ = best.interval
    return min(areas) >= low


def _noise(curve: Curve) -> float:
    """Half of a 95 % interval of the curve's mean accuracy, in points: 1.96 standard errors of a share."""
    mean = float(np.mean([quality for _, quality, _, _ in curve.points]))
    variance = max(mean * (1 - mean), 0.0)
    return 196 * float(np.sqrt(variance / _images_of(curve)))


def _images_of(curve: Curve) -> int:
    """How many images every point was judged on."""
    return curve.points[0][3]


def _figures(report: SearchReport) -> Iterator[KeyFigure]:
    for image_part in _image_parts(report):
        best, rival = _best_on(report, image_part), _best_preset_on(report, image_part)
        detail = "no preset was completed"
        if rival is not None:
            detail = f"best preset there {_told(report, rival.area)}"
        if best is not None:
            yield KeyFigure(f"Area, {image_part} images", _told(report, best.area), detail)
    total_s = sum(trial.seconds for trial in report.tried)
    yield KeyFigure("Trials", str(len(report.tried)), f"{total_s:.0f} s in all")


def _image_parts(report: SearchReport) -> list[str]:
    """Each part that a curve was counted on, in the curves' order."""
    return list(dict.fromkeys(curve.part for curve in report.curves))


def _sections(report: SearchReport, images: Mapping[str, bytes]) -> tuple[Section, ...]:
    usage = "Use it with `compressor compress --recipe best.toml`."
    return (
        Section("best", "The best recipe", (usage,), _recipe_tables(report)),
        Section("curve", "Against the presets", (), (_curve_figure(report), *_curve_tables(report))),
        _choices(weights_drawn=_WEIGHTS.name in images),
        Section("trials", "The trials", (), (_HISTORY, _trial_table(report))),
        Section("images", "The images", (_images_text(report),), (_hash_table(report),)),
    )


def _curve_figure(report: SearchReport) -> Figure:
    repair = "repaired, no fine-tuning" if report.repaired else "neither repaired nor fine-tuned"
    caption = (
        f"{facts.capitalised(report.metric)} over the MACs that may stay, on {_PART_TITLES[_judged(report)]}; {repair}."
    )
    return Figure("search-curve", "quality over MACs kept, best against presets", caption)


def _choices(*, weights_drawn: bool) -> Section:
    if weights_drawn:
        return Section("choices", "Which choices count", (), (_WEIGHTS,))
    few = "Too few trials were completed to say which choices count."
    return Section("choices", "Which choices count", (few,), ())


_HISTORY = Figure(
    "search-history", "area of every trial in order", "Every trial's area on its images, in order; a line for the best."
)
_WEIGHTS = Figure(
    "search-importance",
    "how far each choice sets the best trials apart",
    "How far each choice sets the best of the complete trials apart (PED-ANOVA); those few had to make are not in it.",
)


def _images_text(report: SearchReport) -> str:
    done = "scored and repaired" if report.repaired else "scored"
    return (
        f"Trials {done} with {report.score_images} calibration images and were judged on "
        f"{report.trial_images} search images; finalists were made again with all calibration images and judged on all "
        "search images, where the choice was made. Evaluation images were counted after it. The parts share no image."
    )


def _recipe_tables(report: SearchReport) -> tuple[Table, ...]:
    settings = Table("Scores and ranking", ("field", "value"), "cl", report.settings)
    if not report.composite:  # the recipe's criterion is not LRP
        return (settings,)
    return settings, Table("LRP composite", ("layers", "rule"), "cl", report.composite)


def _curve_tables(report: SearchReport) -> Iterator[Table]:
    for image_part in _image_parts(report):
        curves = sorted(_curves_on(report, image_part), key=lambda curve: -curve.area)
        rows = [_curve_cells(report, curve) for curve in curves]
        budgets = tuple(f"{100 * budget:g} % of MACs" for budget, *_ in curves[0].points)
        head = ("recipe", facts.axis_title("area", report.is_share), *budgets)
        dense = _scale(report) * report.dense[image_part]
        measured_in = " in %" if report.is_share else ""
        note = f"{facts.capitalised(report.metric)}{measured_in}, {_images_of(curves[0])} images; dense {dense:.1f}."
        yield Table(f"On {_PART_TITLES[image_part]}", head, "lr" + "r" * len(budgets), tuple(rows), note)


def _curve_cells(report: SearchReport, curve: Curve) -> tuple[str, ...]:
    name = f"{curve.name} (chosen)" if curve.best else curve.name
    qualities = [f"{_scale(report) * quality:.1f}" for _, quality, _, _ in curve.points]
    return (name, f"{_scale(report) * curve.area:.2f}", *qualities)


def _trial_table(report: SearchReport) -> Table:
    rows = tuple(_trial_cells(report, trial) for trial in report.tried)
    at_each = f"{report.metric} at each budget, the lowest first"
    area = facts.axis_title("area", report.is_share)
    head = ("trial", "state", "preset", area, at_each, "seconds")
    return Table("Trials", head, "rllrlr", rows, "A stopped trial's area is that of the budgets it reached.")


def _trial_cells(report: SearchReport, trial: Tried) -> tuple[str, ...]:
    scale = _scale(report)
    area = "" if trial.value is None else f"{scale * trial.value:.2f}"
    qualities = ", ".join(f"{scale * quality:.1f}" for _, quality in trial.points)
    return str(trial.number), trial.state, stated(trial.preset), area, qualities, f"{trial.seconds:.1f}"


def _hash_table(report: SearchReport) -> Table:
    rows = tuple((name, str(count), report.hashes[name]) for name, count in report.images.items())
    return Table("Parts", ("part", "images", "sha256 of contents and labels"), "lrc", rows)


def _drawings(report: SearchReport) -> Iterator[tuple[str, Drawing]]:
    yield "search-curve", lambda: _curve(report)
    yield _HISTORY.name, lambda: _history(report)
    yield _WEIGHTS.name, lambda: _importance(report.importance)


def _curve(report: SearchReport) -> Sheet:
    image_part = _judged(report)
    figure, axes = _sheet(4.0)
    shown = [curve for curve in _curves_on(report, image_part) if curve.best or curve.preset]
    best_last = sorted(shown, key=lambda curve: (curve.best, curve.area))  # so that it lies on top
    for curve, line in zip(best_last, cycle(_LINES)):
        style: dict[str, Any] = {"color": DENSE, "linestyle": line, "markersize": 3}
        if curve.best:
            style = {"color": KEPT, "linewidth": 2.2, "markersize": 5}
        _draw_curve(axes, report, curve, style)
    axes.axhline(_scale(report) * report.dense[image_part], color=REMOVED, linewidth=0.9, label="dense")
    axes.set_xlabel("MACs that may stay, % of dense")
    axes.set_ylabel(facts.axis_title(report.metric, report.is_share))
    figure.legend(loc="outside upper left", fontsize=8)
    return figure


def _draw_curve(axes: Axes, report: SearchReport, curve: Curve, style: Mapping[str, Any]) -> None:
    budgets = [100 * budget for budget, *_ in curve.points]
    qualities = [_scale(report) * quality for _, quality, *_ in curve.points]
    label = f"{curve.name}: area {_told(report, curve.area, digits=1)}"
    axes.plot(budgets, qualities, marker="o", label=label, **style)


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


def _mark_of(trial: Tried) -> str:
    if trial.preset:
        return "preset"
    if trial.state == "complete":
        return "complete"
    return "stopped"


def _history(report: SearchReport) -> Sheet:
    figure, axes = _sheet(3.0)
    for mark, style in _MARKS.items():
        trials = [trial for trial in report.tried if _mark_of(trial) == mark]
        numbers, areas = _numbered_areas(trials)
        if numbers:
            axes.scatter(numbers, _scale(report) * np.array(areas), label=mark, zorder=3, **style)
    numbers, areas = _numbered_areas(_complete(report))
    if numbers:
        best = _scale(report) * np.maximum.accumulate(areas)
        axes.step(numbers, best, where="post", color=KEPT, linewidth=1, label="best so far")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.set_xlabel("trial")
    axes.set_ylabel(facts.axis_title("area", report.is_share))
    figure.legend(loc="outside upper left", ncols=4, fontsize=8)
    return figure


def _complete(report: SearchReport) -> list[Tried]:
    return [trial for trial in report.tried if trial.state == "complete"]


def _numbered_areas(trials: Sequence[Tried]) -> tuple[list[int], list[float]]:
    """Numbers and areas of the trials that have an area: a failed one has none."""
    numbers: list[int] = []
    areas: list[float] = []
    for trial in trials:
        if trial.value is not None:
            numbers.append(trial.number)
            areas.append(trial.value)
    return numbers, areas


def _importance(importance: Sequence[tuple[str, float]]) -> Sheet | None:
    shown = importance[:16]
    if not shown:
        return None
    figure, axes = _sheet(0.9 + 0.26 * len(shown))
    names, shares = zip(*shown, strict=True)
    axes.barh(range(len(shown)), 100 * np.array(shares), color=KEPT, height=0.7)
    axes.set_yticks(range(len(shown)), names, fontsize=8)
    axes.invert_yaxis()
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel("share of what sets the best trials apart, %")
    return figure
