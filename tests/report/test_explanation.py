"""The picture of one image: its figures are right and it is a picture."""

from __future__ import annotations

import numpy as np
import pytest

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
