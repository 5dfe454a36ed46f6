"""Who may see which image: parts of made-up sources, disjoint by pixels, the classes' shares kept in every stretch."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from compressor.errors import DataError
from compressor.inputs.images import Images
from compressor.inputs.splits import require_disjoint, split, split_apart, stratified_order


def source(values: list[int], labels: list[int] | None = None, *, name: str = "made") -> Images:
    """One grey pixel a picture; equal values are equal pixels under different names."""
    names = tuple(f"{name}{index:03d}" for index in range(len(values)))
    by_name = dict(zip(names, values, strict=True))

    def read(one: str) -> Image.Image:
        return Image.new("L", (1, 1), by_name[one])

    def digest(one: str) -> str:
        return f"file of {one}"

    classes = np.array(labels if labels is not None else [0] * len(values), dtype=np.int64)
    return Images(name, names, classes, tuple(map(str, range(classes.max(initial=0) + 1))), None, read, digest)


def pixels(images: Images) -> set[int]:
    return {int(np.asarray(images.read(name))[0, 0]) for name in images.names}


def test_classes_interleave_by_their_shares() -> None:
    names = [f"n{i}" for i in range(6)]
    order = stratified_order(names, np.array([0, 0, 1, 1, 1, 1]), seed=0)
    assert [int(index >= 2) for index in order] == [1, 0, 1, 1, 0, 1]  # b a b b a b


@pytest.mark.parametrize("seed", range(3))
def test_every_stretch_holds_the_classes_alike(seed: int) -> None:
    labels = np.repeat([0, 1, 2], [10, 30, 60])
    order = stratified_order([f"n{i}" for i in range(100)], labels, seed)
    assert sorted(order.tolist()) == list(range(100))
    for start in range(0, 100, 20):
        counts = np.bincount(labels[order[start : start + 20]], minlength=3)
        np.testing.assert_allclose(counts, [2, 6, 12], atol=1)


def test_the_order_is_of_names_and_seed_and_not_of_places() -> None:
    names, labels = [f"n{i}" for i in range(20)], np.arange(20) % 2
    order = [names[i] for i in stratified_order(names, labels, 0)]
    shuffled = np.random.default_rng(0).permutation(20)
    again = stratified_order([names[i] for i in shuffled], labels[shuffled], 0)
    assert [names[shuffled[i]] for i in again] == order
    assert [names[i] for i in stratified_order(names, labels, 1)] != order


@pytest.mark.parametrize("evaluation", [5, 0.25])
def test_parts_have_their_sizes_and_share_no_pixels(evaluation: float) -> None:
    parts = split(source(list(range(20))), 0, calibration=8, search=3, evaluation=evaluation)
    sizes = [len(images) for images in (parts.calibration, parts.search, parts.evaluation)]
    assert sizes == [8, 3, 5]
    together = [pixels(images) for images in (parts.calibration, parts.search, parts.evaluation)]
    assert sum(map(len, together)) == len(set.union(*together)) == 16
    assert set(parts.hashes) == {"calibration", "search", "evaluation"}
    assert len(set(parts.hashes.values())) == 3


def test_the_evaluation_part_is_the_same_whatever_the_others_take() -> None:
    images = source(list(range(30)), [i % 3 for i in range(30)])
    evaluations = {
        split(images, 0, calibration=calibration, search=search, evaluation=6).evaluation.names
        for calibration, search in ((4, 2), (20, 4), (0, 0))
    }
    assert len(evaluations) == 1
    assert split(images, 1, calibration=4, search=2, evaluation=6).evaluation.names not in evaluations


def test_repeated_pixels_are_dealt_once_and_named() -> None:
    images = source([*range(10), *range(5)])
    parts = split(images, 0, calibration=6, search=0, evaluation=4)
    dealt = [pixels(part) for part in (parts.calibration, parts.evaluation)]
    assert dealt[0].isdisjoint(dealt[1])
    assert sum(map(len, dealt)) == 10
    assert set(parts.left_out).isdisjoint(parts.calibration.names + parts.evaluation.names)


def test_too_few_different_images_are_counted() -> None:
    with pytest.raises(DataError, match=r"made holds 5 different images, but 9 are asked for .evaluation 2, calibr"):
        split(source([0, 1, 2, 3, 4, 4, 4, 4, 4]), 0, calibration=6, search=1, evaluation=2)


@pytest.mark.parametrize("evaluation", [1.0, 1.5, -0.1])
def test_a_share_of_all_or_none_is_refused(evaluation: float) -> None:
    with pytest.raises(DataError, match=f"evaluation = {evaluation} is neither"):
        split(source(list(range(9))), 0, calibration=2, search=0, evaluation=evaluation)


def test_no_part_has_a_negative_number_of_images() -> None:
    with pytest.raises(DataError, match="can't have a negative number"):
        split(source(list(range(9))), 0, calibration=-2, search=0, evaluation=3)


def test_images_given_apart_are_all_for_evaluation() -> None:
    held_out = source([100, 101, 102], name="held")
    parts = split_apart(source(list(range(9))), held_out, 0, calibration=5, search=2)
    assert parts.evaluation is held_out
    assert (len(parts.calibration), len(parts.search)) == (5, 2)


def test_a_held_out_image_among_the_others_is_refused_by_both_names() -> None:
    images, held_out = source([1, 2, 3]), source([9, 2], name="held")
    with pytest.raises(DataError, match=r"1 of 3 images of made are also among .* held \('made001' = 'held001'\)"):
        require_disjoint(images, held_out)
    with pytest.raises(DataError, match="are also among the evaluation images"):
        split_apart(images, held_out, 0, calibration=3, search=0)
