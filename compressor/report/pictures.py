"""Two networks' answers to one image, side by side: the image, what both answer, and which pixels speak for it.

In: `views.Comparison`. Out: one PNG. Knows no task and no network.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.patches import Patch, Rectangle

from ..device.images import label_of
from ..records import FloatArray
from .explanation import draw_mask, draw_relevance, limit_of
from .plots import DENSE, KEPT, STYLE, WIDTH_IN, to_png
from .views import Bars, Boxes, Comparison, Curve, Heat, Masks, Shown, View

GREY = "#e4e4e4"  # of a panel with nothing to show
MOST_CLASSES = 6  # of a mask that the legend names
_NAME = 20  # letters of a class's name


def draw_comparison(comparison: Comparison) -> bytes:
    """The picture as PNG bytes: a column for each network, answers above and relevance below, then masks if any."""
    import matplotlib

    with matplotlib.rc_context(STYLE):
        return to_png(figure_of(comparison))


def figure_of(comparison: Comparison) -> Figure:
    """Image and keys in the first column, the dense network in the second, the shipped one in the third."""
    masks = (comparison.mask_dense, comparison.mask_shipped)
    has_masks = any(mask is not None for mask in masks)
    rows = 3 if has_masks else 2
    figure = Figure(figsize=(WIDTH_IN, 1.75 * rows), layout="constrained")
    axes = figure.subplots(rows, 3)
    _draw_image(axes[0, 0], comparison.image)
    _draw_view(axes[0, 1], comparison.dense, comparison.image, "dense: answer")
    _draw_view(axes[0, 2], comparison.shipped, comparison.image, "shipped: answer")

    heats = (comparison.relevance_dense, comparison.relevance_shipped)
    # one scale for both, so that a network that finds less relevant is paler
    limit = max((limit_of(heat) for heat in heats if heat is not None), default=1.0)
    drawn = [
        _draw_heat(panel, heat, comparison.image, limit, title)
        for panel, heat, title in zip(axes[1, 1:], heats, ("dense: relevance", "shipped: relevance"), strict=True)
    ]
    if has_masks:
        axes[2, 0].axis("off")
        for panel, mask, title in zip(axes[2, 1:], masks, ("dense: selector", "shipped: selector"), strict=True):
            _draw_mask(panel, mask, comparison.image, title)
    _draw_keys(figure, axes[1, 0], comparison, next((heat for heat in drawn if heat is not None), None))
    return figure


def _titled(axes: Axes, title: str) -> None:
    axes.set_title(title, fontsize=8.5, loc="left")
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines[:].set_visible(False)


def _draw_image(axes: Axes, image: FloatArray | None) -> None:
    if image is None:
        _nothing(axes, "no picture")
    else:
        axes.imshow(image, interpolation="nearest")
    _titled(axes, "image")


def _nothing(axes: Axes, why: str) -> None:
    axes.set_facecolor(GREY)
    axes.text(0.5, 0.5, why, ha="center", va="center", fontsize=8, transform=axes.transAxes)


def _draw_heat(
    axes: Axes, heat: FloatArray | None, image: FloatArray | None, limit: float, title: str
) -> AxesImage | None:
    drawn = None
    if heat is None or image is None:
        _nothing(axes, "no relevance")
    else:
        drawn = draw_relevance(axes, heat, image, limit)
    _titled(axes, title)
    return drawn


def _draw_mask(axes: Axes, mask: FloatArray | None, image: FloatArray | None, title: str) -> None:
    if mask is None or image is None:
        _nothing(axes, "no mask")
    else:
        draw_mask(axes, mask, image)
    _titled(axes, title)


def _draw_view(axes: Axes, view: View, image: FloatArray | None, title: str) -> None:
    match view:
        case Bars():
            _draw_bars(axes, view)
        case Masks():
            _draw_masks(axes, view, image)
        case Boxes():
            _draw_boxes(axes, view, image)
        case Shown():
            axes.imshow(np.clip(view.pixels, 0, 1), interpolation="nearest")
        case Heat():
            aspect = _aspect(view.values)
            axes.imshow(view.values, vmin=view.low, vmax=view.high, interpolation="nearest", aspect=aspect)
        case Curve():
            _draw_curve(axes, view)
    _titled(axes, title)


def _aspect(values: FloatArray) -> Literal["equal", "auto"]:
    """Places of an image are squares; a long table fills the panel."""
    height, width = values.shape
    if max(height, width) <= 2 * min(height, width):
        return "equal"
    return "auto"


def _draw_bars(axes: Axes, bars: Bars) -> None:
    rows = np.arange(len(bars.names))
    axes.barh(rows, bars.shares, color=KEPT, alpha=0.35, height=0.8)
    for row, (name, share) in enumerate(zip(bars.names, bars.shares, strict=True)):
        axes.text(0.02, row, _cut(name), va="center", fontsize=8)
        axes.text(1.0, row, f"{100 * share:.0f} %", va="center", ha="right", fontsize=8)
    axes.set_xlim(0, 1)
    axes.set_ylim(2.6, -0.6)  # three rows, the first on top


def _cut(name: str) -> str:
    """The beginning of a class's name, which tells it best."""
    if len(name) <= _NAME:
        return name
    return name[: _NAME - 1] + "…"


def _colour(kind: int) -> tuple[float, float, float]:
    """One of twenty by number, the same in every picture; the ten dark ones first."""
    from matplotlib import colormaps

    half, place = divmod(kind % 20, 10)
    red, green, blue, _ = colormaps["tab20"](2 * place + half)  # a dark and a light one in turns
    return red, green, blue


def _draw_masks(axes: Axes, masks: Masks, image: FloatArray | None) -> None:
    height, width = masks.classes.shape
    alpha = 1.0
    if image is not None:
        height, width = image.shape[:2]  # so that a smaller map lies over all of it
        alpha = 0.6
        extent = (0, width, height, 0)
        axes.imshow(image.mean(axis=2), cmap="gray", vmin=0, vmax=1, interpolation="nearest", extent=extent)
    colours = np.array(list(map(_colour, range(20))))  # [20, RGB]
    coloured = colours[masks.classes % 20]  # [h, w, RGB]
    axes.imshow(coloured, alpha=alpha, interpolation="nearest", extent=(0, width, height, 0))


_PLATE: Any = {"facecolor": "white", "edgecolor": "none", "pad": 1.5, "alpha": 0.8}  # under words on an image


def _draw_boxes(axes: Axes, boxes: Boxes, image: FloatArray | None) -> None:
    if image is None:
        axes.set_facecolor(GREY)
        far = boxes.corners.max() if boxes.corners.size else 1.0
        axes.set_xlim(0, far)
        axes.set_ylim(far, 0)
    else:
        height, width = image.shape[:2]
        axes.imshow(image, interpolation="nearest", extent=(0, width, height, 0))
    for (x0, y0, x1, y1), label, kind in zip(boxes.corners, boxes.labels, boxes.kinds, strict=True):
        colour = _colour(int(kind))
        axes.add_patch(Rectangle((x0, y0), x1 - x0, y1 - y0, fill=False, edgecolor=colour, linewidth=1.4))
        behind = {**_PLATE, "facecolor": colour, "pad": 0.8}
        axes.text(x0, y0, _cut(label), fontsize=6, color="white", va="bottom", bbox=behind, clip_on=True)
    if not len(boxes.corners):
        axes.text(0.5, 0.04, "no box", ha="center", fontsize=8, transform=axes.transAxes, bbox=_PLATE)


def _draw_curve(axes: Axes, curve: Curve) -> None:
    """The dense network's in grey, and over it another's."""
    marker = "o" if len(curve.values) < 12 else ""
    places = np.arange(len(curve.values))
    dense = curve.values if curve.dense is None else curve.dense
    axes.plot(places, dense, color=DENSE, linewidth=1.6, marker=marker)
    if curve.dense is not None:
        axes.plot(places, curve.values, color=KEPT, linewidth=0.9, marker=marker, markersize=3)
    axes.margins(x=0.02)


def _draw_keys(figure: Figure, axes: Axes, comparison: Comparison, heat: AxesImage | None) -> None:
    """What colours mean: of masks, of curves and of relevance."""
    axes.axis("off")
    handles = _handles(comparison)
    if handles:
        axes.legend(handles=handles, loc="upper left", fontsize=7, borderaxespad=0, handlelength=1.2)
    if heat is not None:
        low, high = heat.get_clim()
        place = axes.inset_axes((0.12, 0.16, 0.76, 0.07))
        bar = figure.colorbar(heat, cax=place, orientation="horizontal", ticks=[low, 0, high])
        bar.ax.set_xticklabels(["against", "0", "for"], fontsize=7)
        bar.outline.set_visible(False)


def _handles(comparison: Comparison) -> list[Patch]:
    match comparison.dense, comparison.shipped:
        case Masks() as dense, Masks() as shipped:
            return [Patch(color=_colour(kind), label=_name(dense.names, kind)) for kind in _largest(dense, shipped)]
        case Curve(), _:
            return [Patch(color=DENSE, label="dense"), Patch(color=KEPT, label="shipped")]
        case _:
            return []


def _largest(dense: Masks, shipped: Masks) -> list[int]:
    """The classes of most places in either mask, by number."""
    classes = np.concatenate([dense.classes.ravel(), shipped.classes.ravel()])
    kinds, counts = np.unique(classes, return_counts=True)
    most_first = np.argsort(-counts, kind="stable")
    return sorted(map(int, kinds[most_first][:MOST_CLASSES]))


def _name(names: tuple[str, ...], kind: int) -> str:
    return _cut(label_of(kind, names))
