"""Two networks' answers to one image as a picture: what stands where, on whose scale, and what is said of nothing."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from matplotlib.figure import Figure

from compressor.report import pictures
from compressor.report.explanation import DIMMED, limit_of
from compressor.report.views import Bars, Boxes, Comparison, Curve, Heat, Masks, Shown

RNG = np.random.default_rng(0)
IMAGE, HEAT = RNG.random((16, 16, 3)), RNG.normal(size=(16, 16))
BARS = Bars(("daisy", "a name of more than twenty letters"), np.array([0.7, 0.3]))
SEEN = Comparison(IMAGE, BARS, BARS, HEAT, 0.5 * HEAT)


def texts(figure: Figure, row: int, column: int) -> list[str]:
    return [text.get_text() for text in figure.axes[3 * row + column].texts]


@pytest.mark.parametrize(
    "view",
    [
        BARS,
        Masks(np.arange(16).reshape(4, 4), ("background",)),
        Boxes(np.array([[1.0, 2.0, 9.0, 9.0]]), ("cat 97%",), np.array([3])),
        Shown(IMAGE),
        Heat(HEAT, -1.0, 1.0),
        Curve(HEAT[0]),
    ],
    ids=lambda view: type(view).__name__,
)
@pytest.mark.parametrize("image", [IMAGE, None], ids=["image", "no image"])
def test_every_answer_is_drawn_with_and_without_an_image(view: object, image: np.ndarray | None) -> None:
    figure = pictures.figure_of(replace(SEEN, image=image, dense=view, shipped=view))  # type: ignore[arg-type]
    titles = [axes.get_title(loc="left") for axes in figure.axes[:6]]
    assert titles == ["image", "dense: answer", "shipped: answer", "", "dense: relevance", "shipped: relevance"]
    assert texts(figure, 0, 0) == ([] if image is not None else ["no picture"])


def test_a_selectors_masks_are_a_row_of_their_own_where_there_are_any() -> None:
    mask = np.zeros((16, 16))
    mask[4:8, 4:8] = 1
    figure = pictures.figure_of(replace(SEEN, mask_dense=mask, mask_shipped=1 - mask))
    titles = [axes.get_title(loc="left") for axes in figure.axes[6:9]]
    assert titles == ["", "dense: selector", "shipped: selector"]
    shown = np.asarray(figure.axes[7].images[0].get_array())
    assert np.allclose(shown[5, 5], IMAGE[5, 5])
    assert np.allclose(shown[0, 0], DIMMED * IMAGE[0, 0])
    assert len(pictures.figure_of(SEEN).axes) < len(figure.axes)
    texts_of_none = texts(pictures.figure_of(replace(SEEN, image=None, mask_dense=mask, mask_shipped=mask)), 2, 1)
    assert texts_of_none == ["no mask"]


def test_a_picture_is_a_png() -> None:
    assert pictures.draw_comparison(SEEN).startswith(b"\x89PNG")


def test_a_class_is_named_by_its_beginning_beside_its_share() -> None:
    assert texts(pictures.figure_of(SEEN), 0, 1) == ["daisy", "70 %", "a name of more than…", "30 %"]


def test_both_networks_relevance_has_one_scale_so_that_less_is_paler() -> None:
    figure = pictures.figure_of(SEEN)
    limits = [axes.images[-1].get_clim() for axes in figure.axes[4:6]]
    assert limits == [(-limit_of(HEAT), limit_of(HEAT))] * 2


def test_relevance_that_is_not_there_is_said_and_has_no_scale() -> None:
    figure = pictures.figure_of(replace(SEEN, relevance_dense=None, relevance_shipped=None))
    assert texts(figure, 1, 1) == texts(figure, 1, 2) == ["no relevance"]
    assert len(figure.axes) == 6


def test_a_mask_names_the_classes_of_most_places_in_the_colours_of_both() -> None:
    dense, shipped = np.zeros((4, 4), np.int64), np.full((4, 4), 2)
    figure = pictures.figure_of(
        replace(SEEN, dense=Masks(dense, ("sky", "sea")), shipped=Masks(shipped, ("sky", "sea")))
    )
    legend = figure.axes[3].get_legend()
    assert legend is not None
    assert [text.get_text() for text in legend.get_texts()] == ["sky", "2"]
    colours = [figure.axes[column].images[-1].get_array()[0, 0] for column in (1, 2)]
    patches = [patch.get_facecolor()[:3] for patch in legend.get_patches()]
    assert np.allclose(colours, patches)


def test_a_smaller_mask_lies_over_the_whole_image() -> None:
    masks = Masks(np.zeros((4, 4), np.int64))
    figure = pictures.figure_of(replace(SEEN, dense=masks, shipped=masks))
    assert [list(image.get_extent()) for image in figure.axes[1].images] == [[0, 16, 16, 0]] * 2


def test_a_vector_is_drawn_over_the_dense_networks() -> None:
    figure = pictures.figure_of(replace(SEEN, dense=Curve(HEAT[0]), shipped=Curve(HEAT[1], HEAT[0])))
    (alone,), (dense, shipped) = figure.axes[1].lines, figure.axes[2].lines
    assert np.array_equal(alone.get_ydata(), dense.get_ydata())
    assert np.array_equal(shipped.get_ydata(), HEAT[1])


def test_no_box_is_said() -> None:
    none = Boxes(np.zeros((0, 4)), (), np.zeros(0, np.int64))
    figure = pictures.figure_of(replace(SEEN, dense=none, shipped=none))
    assert texts(figure, 0, 1) == ["no box"]
