"""One image, explained: where relevance lies in the input, in each layer and in each head, as one PNG.

In: plain arrays. Relevance is signed; warm colours speak for the class, cold ones against it. A layer's
bar is how few of its units carry half of its positive relevance: short bars are the ones pruning can feed on.
"""

from __future__ import annotations

import textwrap
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.gridspec import GridSpec
from matplotlib.image import AxesImage

from ..records import FloatArray
from .plots import LABELS, STYLE, label_step, shortened, to_png

FOR, AGAINST = "#b2182b", "#2166ac"  # the ends of the heat map's own colours
DIMMED = 0.25  # of the light that is left to what a mask hides
BELOW = -0.12  # of the axes' height


@dataclass(frozen=True, slots=True)
class LayerRelevance:
    """[units] relevance of one layer's units for the image, signed."""

    layer: str
    units: FloatArray


@dataclass(frozen=True, slots=True)
class Explanation:
    """`image` [H, W, 3] in 0-1, `heat` [H, W]; `heads` [layers, heads] with NaN where a layer has fewer.

    `mask` [H, W] in 0-1 is what a learned selector shows of the image.
    """

    title: str
    image: FloatArray
    heat: FloatArray
    layers: tuple[LayerRelevance, ...]
    heads: FloatArray
    head_layers: tuple[str, ...]
    mask: FloatArray | None = None


def share_for_half(units: FloatArray) -> float:
    """The smallest share of `units` [units], in 0-1, that carries half of the positive relevance; 0 for none."""
    largest_first = np.sort(np.clip(units, 0, None))[::-1]
    total = largest_first.sum()
    if total <= 0:
        return 0.0

    # the running sum reaches half at an index, which takes one unit more than that: [6, 3, 1] at 0, so 1 unit of 3
    index = np.searchsorted(np.cumsum(largest_first), total / 2)
    return float((index + 1) / len(units))


def draw_explanation(explanation: Explanation) -> bytes:
    """The picture as PNG bytes: image and heat map, bars of the layers, and the heads where there are any."""
    import matplotlib

    layers_in, heads_in = _heights_in(explanation)
    with_heads = heads_in > 0
    height_ratios = [3.0, layers_in, heads_in] if with_heads else [3.0, layers_in]

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(7.0, 3.6 + layers_in + heads_in), layout="constrained")
        figure.suptitle(textwrap.fill(explanation.title, 78), x=0.02, ha="left", fontsize=11)
        grid = figure.add_gridspec(len(height_ratios), 6, height_ratios=height_ratios)
        _draw_top(figure, grid, explanation)
        _draw_layers(figure.add_subplot(grid[1, :3]), figure.add_subplot(grid[1, 3:]), explanation.layers)
        if with_heads:
            _draw_heads(figure, figure.add_subplot(grid[2, :]), explanation)
        return to_png(figure)


def _draw_top(figure: Figure, grid: GridSpec, explanation: Explanation) -> None:
    """Image, heat map and, where there is one, the selector's mask: two or three of a row."""
    width = 3 if explanation.mask is None else 2  # of six columns
    _draw_image(figure.add_subplot(grid[0, :width]), explanation)
    _draw_heat(figure, figure.add_subplot(grid[0, width : 2 * width]), explanation)
    if explanation.mask is not None:
        axes = figure.add_subplot(grid[0, 2 * width :])
        draw_mask(axes, explanation.mask, explanation.image)
        _bare(axes, "what the selector shows")


def _heights_in(explanation: Explanation) -> tuple[float, float]:
    """Inches that the bars of the layers need, and the heads' map; the latter is 0 where there are no heads."""
    layer_count = len(explanation.layers)
    pitch_in = 0.2 if layer_count <= LABELS else 0.07
    layers_in = max(1.6, pitch_in * layer_count)
    heads_in = 0.3 * len(explanation.head_layers) + 0.9 if explanation.heads.size > 0 else 0.0
    return layers_in, heads_in


def _bare(axes: Axes, title: str) -> None:
    axes.set_title(title, fontsize=9, loc="left")
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines[:].set_visible(False)


def _draw_image(axes: Axes, explanation: Explanation) -> None:
    axes.imshow(np.clip(explanation.image, 0, 1), interpolation="nearest")
    _bare(axes, "image, as the network sees it")


def pooled(heat: FloatArray, finest: int = 72) -> FloatArray:
    """[H, W] summed over square blocks so that at most `finest` remain a side: strides leave gaps between pixels."""
    block = max(1, -(-max(heat.shape) // finest))  # rounded up: 224 pixels in at most 72 blocks are 4 a block
    rows, columns = (length // block for length in heat.shape)
    whole_blocks = heat[: rows * block, : columns * block]
    blocks = whole_blocks.reshape(rows, block, columns, block)  # [rows, y in a block, columns, x in a block]
    sums: FloatArray = blocks.sum(axis=(1, 3))  # [rows, columns]
    return sums


def limit_of(heat: FloatArray) -> float:
    """Where the colours of [H, W] relevance end; 1 where all is zero.

    A few pixels carry most of it: the scale ends at the 99.5th percentile so that the rest can be seen.
    """
    return float(np.quantile(np.abs(pooled(heat)), 0.995)) or 1.0


def draw_relevance(axes: Axes, heat: FloatArray, image: FloatArray, limit: float) -> AxesImage:
    """[H, W] relevance over the image [H, W, 3] in grey; colours end at plus and minus `limit`."""
    height, width = heat.shape
    extent = (0, width, height, 0)  # pixels of the image, so that pooled blocks lie where their pixels are
    grey = image.mean(axis=2)  # [H, W]
    axes.imshow(grey, cmap="gray", alpha=0.35, interpolation="nearest", extent=extent)
    return axes.imshow(
        pooled(heat), cmap="RdBu_r", vmin=-limit, vmax=limit, alpha=0.8, interpolation="nearest", extent=extent
    )


def draw_mask(axes: Axes, mask: FloatArray, image: FloatArray) -> None:
    """What a mask [H, W] in 0-1 shows of the image [H, W, 3], the rest dark; a line where half is shown."""
    height, width = mask.shape
    extent = (0, width, height, 0)
    seen = np.clip(image, 0, 1) * (DIMMED + (1 - DIMMED) * mask)[:, :, None]
    axes.imshow(seen, interpolation="nearest", extent=extent)
    if mask.min() < 0.5 < mask.max():
        middles = np.arange(width) + 0.5, np.arange(height) + 0.5
        axes.contour(*middles, mask, levels=[0.5], colors=[FOR], linewidths=1.2)


def _draw_heat(figure: Figure, axes: Axes, explanation: Explanation) -> None:
    limit = limit_of(explanation.heat)
    heat_map = draw_relevance(axes, explanation.heat, explanation.image, limit)
    bar = figure.colorbar(heat_map, ax=axes, shrink=0.8, ticks=[-limit, 0, limit])
    bar.ax.set_yticklabels(["against", "0", "for"], fontsize=8)
    _bare(axes, "relevance of each pixel")


def _draw_layers(sums: Axes, halves: Axes, layers: tuple[LayerRelevance, ...]) -> None:
    rows = np.arange(len(layers))
    positive = [float(np.clip(layer.units, 0, None).sum()) for layer in layers]
    negative = [float(np.clip(layer.units, None, 0).sum()) for layer in layers]
    sums.barh(rows, positive, color=FOR, height=0.8, label="for")
    sums.barh(rows, negative, color=AGAINST, height=0.8, label="against")
    halves.barh(rows, [100 * share_for_half(layer.units) for layer in layers], color="#6a8f5f", height=0.8)

    # both have the ticks, the left one names them
    named_rows = list(rows[:: label_step(len(layers))])
    for axes in (sums, halves):
        axes.set_ylim(len(layers) - 0.4, -0.6)
        axes.tick_params(axis="y", length=0)
        axes.set_yticks(named_rows, [""] * len(named_rows))
    sums.set_yticks(named_rows, [shortened(layers[row].layer) for row in named_rows], fontsize=7.5)

    sums.set_title("relevance of each layer, by sign", fontsize=9, loc="left")
    sums.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, BELOW), ncols=2)  # below the bars, over none
    halves.set_title("units that carry half of it, %", fontsize=9, loc="left")


def _draw_heads(figure: Figure, axes: Axes, explanation: Explanation) -> None:
    limit = float(np.nanmax(np.abs(explanation.heads))) or 1.0  # where all is zero any scale will do
    heat_map = axes.imshow(explanation.heads, cmap="RdBu_r", vmin=-limit, vmax=limit, aspect="auto")
    layer_names = list(map(shortened, explanation.head_layers))
    axes.set_yticks(range(len(layer_names)), layer_names, fontsize=7.5)
    axes.set_xticks(range(explanation.heads.shape[1]))
    axes.tick_params(length=0, labelsize=8)
    axes.set_xlabel("head", fontsize=9)
    axes.set_title("relevance of each head", fontsize=9, loc="left")
    bar = figure.colorbar(heat_map, ax=axes, ticks=[-limit, 0, limit])
    bar.ax.set_yticklabels(["against", "0", "for"], fontsize=8)
