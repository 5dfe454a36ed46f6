"""The picture of one image: its figures are right and it is a picture."""

from __future__ import annotations

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from compressor.report import explanation
from compressor.report.explanation import Explanation, LayerRelevance, draw_explanation, pooled, share_for_half


def test_half_of_the_relevance_is_counted_from_the_largest_unit() -> None:
    assert share_for_half(np.array([6.0, 2.0, 2.0, 2.0, -9.0])) == pytest.approx(1 / 5)
    assert share_for_half(np.ones(10)) == pytest.approx(0.5)
    assert share_for_half(-np.ones(4)) == 0.0


def test_pooling_keeps_the_sum_of_relevance() -> None:
    heat = np.random.default_rng(0).normal(size=(144, 144))
    small = pooled(heat)
    assert small.shape == (72, 72)
    assert small.sum() == pytest.approx(heat.sum())
    assert pooled(heat[:16, :16]).shape == (16, 16)


@pytest.mark.parametrize("heads", [np.zeros((0, 0)), np.array([[1.0, -2.0], [0.5, np.nan]])], ids=["no heads", "heads"])
def test_it_is_drawn_with_and_without_heads(heads: np.ndarray) -> None:
    layers = (LayerRelevance("conv", np.array([1.0, -0.5, 0.2])), LayerRelevance("fc", np.array([0.3, 0.1])))
    names = tuple(f"block.{i}" for i in range(len(heads)))
    image = np.random.default_rng(0).random((8, 8, 3))
    picture = draw_explanation(Explanation("a model: an image", image, image.mean(2) - 0.5, layers, heads, names))
    assert picture.startswith(b"\x89PNG")


def test_for_and_against_have_the_heat_maps_colours_and_the_legend_covers_no_bar() -> None:
    figure = Figure(figsize=(7.0, 4.0), layout="constrained")
    sums, halves = figure.subplots(1, 2)
    layers = tuple(LayerRelevance(f"layer{i}", np.array([1.0, -1.0])) for i in range(12))
    explanation._draw_layers(sums, halves, layers)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    legend = sums.get_legend()
    assert legend is not None
    covered = legend.get_window_extent(canvas.get_renderer())
    assert [bar for bar in sums.patches if covered.overlaps(bar.get_window_extent())] == []
    reds, blues = ({to_hex(bar.get_facecolor()) for bar in container} for container in sums.containers)
    assert (reds, blues) == ({explanation.FOR}, {explanation.AGAINST})
