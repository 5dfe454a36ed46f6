"""Shifts and flips: every image its own, by seed and step alone, and nothing of what is no image."""

from __future__ import annotations

import torch

from compressor.steering.augmentation import Augmentation, varied

IMAGES = torch.arange(6 * 16 * 16, dtype=torch.float32).reshape(6, 1, 16, 16)


def offsets(moved: torch.Tensor) -> list[tuple[int, int]]:
    """By how many rows and columns each image was moved, read in its middle."""
    found = []
    for image, before in zip(moved, IMAGES, strict=True):
        difference = int(image[0, 8, 8] - before[0, 8, 8])
        column = (difference + 8) % 16 - 8
        found.append(((difference - column) // 16, column))
    return found


def test_images_move_apart_by_as_much_as_is_asked_and_repeat_their_border() -> None:
    moved = varied(IMAGES, Augmentation(shift=1 / 8), 0, 0)
    assert moved.shape == IMAGES.shape
    found = offsets(moved)
    assert len(set(found)) > 2
    assert max(max(abs(row), abs(column)) for row, column in found) <= 2
    for image, before, (row, column) in zip(moved, IMAGES, found, strict=True):
        rows = torch.arange(16).add(row).clamp(0, 15)
        columns = torch.arange(16).add(column).clamp(0, 15)
        assert torch.equal(image, before[:, rows][:, :, columns])


def test_every_shift_comes_as_often() -> None:
    many = IMAGES[:1].repeat(900, 1, 1, 1)
    corners = varied(many, Augmentation(shift=1 / 16), 0, 0)[:, 0, 8, 8]
    counts = torch.unique(corners, return_counts=True)[1]
    assert len(counts) == 9
    assert counts.min() > 60  # 100 expected, 10 a standard deviation


def test_a_mirror_is_half_of_the_images_and_only_where_it_is_asked_for() -> None:
    many = IMAGES[:1].repeat(400, 1, 1, 1)
    flipped = (varied(many, Augmentation(shift=0, flip=True), 0, 0) == many.flip(3)).flatten(1).all(1)
    assert 150 < int(flipped.sum()) < 250
    assert torch.equal(varied(IMAGES, Augmentation(shift=0), 0, 0), IMAGES)


def test_the_same_step_gives_the_same_and_another_one_something_else() -> None:
    one = varied(IMAGES, Augmentation(), 0, 5)
    assert torch.equal(one, varied(IMAGES, Augmentation(), 0, 5))
    assert not torch.equal(one, varied(IMAGES, Augmentation(), 0, 6))
    assert not torch.equal(one, varied(IMAGES, Augmentation(), 1, 5))


def test_what_is_no_image_stays() -> None:
    rows, tokens = torch.rand(4, 7), torch.zeros(4, 1, 8, 8, dtype=torch.int64)
    assert varied(rows, Augmentation(), 0, 0) is rows
    assert varied(tokens, Augmentation(), 0, 0) is tokens
    assert varied((rows, rows), Augmentation(), 0, 0) == (rows, rows)
