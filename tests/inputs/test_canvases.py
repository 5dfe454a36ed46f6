from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from PIL import Image

from compressor.errors import DataError
from compressor.files import content_hash
from compressor.inputs import canvases
from compressor.inputs.canvases import SIDE_PX, Canvases, digit_canvases

COUNT = 60
# of the first eight: other canvases would not be those that the embedded models are measured on
FIRST_SHA256 = "106edadedd3b79a4abe3203adf5e580b3385d723a70b67c284ce9d16b2dbddae"
FLOAT32 = 1e-6  # Pillow resizes in float32


@pytest.fixture(scope="module")
def drawn() -> Canvases:
    return digit_canvases("training", COUNT, seed=0)


def test_canvases_are_images_masks_and_boxes(drawn: Canvases) -> None:
    assert len(drawn) == COUNT
    assert (drawn.images.dtype, drawn.masks.dtype) == (np.uint8, np.int64)
    assert drawn.images.shape == drawn.masks.shape == (COUNT, SIDE_PX, SIDE_PX)
    assert {boxes.dtype for boxes in drawn.boxes} == {np.dtype(np.float32)}
    assert {labels.dtype for labels in drawn.labels} == {np.dtype(np.int64)}
    assert [boxes.shape for boxes in drawn.boxes] == [(len(labels), 4) for labels in drawn.labels]


def test_every_canvas_has_two_to_five_digits_and_all_numbers_of_them_come_up(drawn: Canvases) -> None:
    assert {len(labels) for labels in drawn.labels} == {2, 3, 4, 5}
    assert set(np.concatenate(drawn.labels)) == set(range(10))


def test_a_box_is_the_smallest_around_its_digit_and_masks_lie_in_boxes(drawn: Canvases) -> None:
    for mask, boxes, labels in zip(drawn.masks, drawn.boxes, drawn.labels, strict=True):
        covered = np.zeros_like(mask)
        for (x0, y0, x1, y1), label in zip(boxes.astype(int), labels, strict=True):
            inside = mask[y0:y1, x0:x1]
            covered[y0:y1, x0:x1] = inside
            assert set(np.unique(inside)) <= {0, label + 1}
            rims = inside[0], inside[-1], inside[:, 0], inside[:, -1]
            assert all(rim.any() for rim in rims)
        assert np.array_equal(covered, mask)


def test_digits_do_not_overlap_and_are_two_to_three_times_as_high_as_scans(drawn: Canvases) -> None:
    for boxes in drawn.boxes:
        for first, second in combinations(boxes, 2):
            shared = np.minimum(first[2:], second[2:]) - np.maximum(first[:2], second[:2])
            assert shared.min() <= 0
    heights = np.concatenate(drawn.boxes)[:, 3] - np.concatenate(drawn.boxes)[:, 1]
    assert (heights.min(), heights.max()) == (16, 24)


def test_ink_is_brighter_than_paper(drawn: Canvases) -> None:
    for image, mask in zip(drawn.images, drawn.masks, strict=True):
        assert image[mask > 0].mean() > image[mask == 0].mean() + 25


def test_a_canvas_depends_on_part_seed_and_its_place_alone(drawn: Canvases) -> None:
    again = digit_canvases("training", 5, seed=0)
    assert np.array_equal(again.images, drawn.images[:5])
    assert np.array_equal(again.masks, drawn.masks[:5])
    assert not np.array_equal(digit_canvases("training", 5, seed=1).images, again.images)
    evaluated = digit_canvases("evaluation", 5, seed=0)
    assert [len(labels) for labels in evaluated.labels] != [len(labels) for labels in again.labels]


def test_canvases_stay_what_they_are(drawn: Canvases) -> None:
    assert content_hash(drawn.images[:8], drawn.masks[:8]) == FIRST_SHA256


def test_only_the_scans_of_the_part_are_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    sources: list[str] = []
    load = canvases.digit_scans
    monkeypatch.setattr(canvases, "digit_scans", lambda source: sources.append(source) or load(source))
    for part in ("training", "evaluation", ""):
        digit_canvases(part, 1, seed=0)
    assert sources == ["digits:training", "digits:evaluation", "digits"]


def test_no_canvas_has_a_shape_and_another_part_is_refused() -> None:
    assert digit_canvases("training", 0, seed=0).masks.shape == (0, SIDE_PX, SIDE_PX)
    with pytest.raises(DataError, match="has no part 'test'"):
        digit_canvases("test", 1, seed=0)


@pytest.mark.parametrize("side", [8, 16, 19, 24])
def test_scans_are_enlarged_as_pillow_does(side: int) -> None:
    scan = np.random.default_rng(side).random((8, 8))
    resized = Image.fromarray(scan.astype(np.float32)).resize((side, side), Image.Resampling.BILINEAR)
    assert np.abs(canvases._enlarged(scan, side) - np.asarray(resized)).max() < FLOAT32


def test_a_rectangle_goes_where_nothing_is_taken() -> None:
    taken = np.ones((SIDE_PX, SIDE_PX), np.bool_)
    taken[10:14, 20:25] = False
    draws = canvases._Draws("a rectangle")
    assert canvases._free_corner(taken, (4, 5), draws) == (10, 20)
    assert canvases._free_corner(taken, (5, 4), draws) is None
    assert {canvases._free_corner(taken, (4, 4), draws) for _ in range(40)} == {(10, 20), (10, 21)}


def test_draws_are_uniform_and_noise_has_variance_one() -> None:
    draws = canvases._Draws("statistics", 1)
    uniform, noise = draws.uniform(100_000), draws.noise(100_000)
    assert (uniform.min() >= 0, uniform.max() < 1) == (True, True)
    assert uniform.mean() == pytest.approx(0.5, abs=0.005)  # five standard deviations of the mean
    assert noise.mean() == pytest.approx(0, abs=0.016)
    assert noise.var() == pytest.approx(1, abs=0.02)
    assert {draws.whole(2, 5) for _ in range(200)} == {2, 3, 4, 5}
