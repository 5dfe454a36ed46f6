"""Targets stay on their image: masks, boxes and images as targets go through the same resize and crop."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from compressor.errors import DataError
from compressor.inputs.images import Images, Preprocessing, batches, require_decodable
from compressor.inputs.samples import TargetKind

NEAREST = Preprocessing((6, 6), (8,), "nearest", (0.0,), (1.0,))
INDICES = np.random.default_rng(0).integers(0, 20, (12, 16)).astype(np.uint8)


def one(target: object, kind: TargetKind, how: Preprocessing = NEAREST, pixels: Any = INDICES) -> Images:
    """One grey picture with that target."""

    def read(name: str) -> Image.Image:
        return Image.fromarray(pixels)

    target_of: Callable[[str], object] = lambda name: target  # noqa: E731
    return Images("made", ("0",), np.full(1, -1), (), how, read, str, target_of=target_of, target_kind=kind)


@pytest.mark.parametrize(("size", "resize"), [((6, 6), (8,)), ((8, 8), (8,)), ((12, 12), (8,)), ((5, 9), (7, 10))])
@pytest.mark.parametrize("form", [Image.fromarray, torch.from_numpy, lambda array: array[None].astype(np.int64)])
def test_a_mask_is_moved_as_its_image(size: tuple[int, int], resize: tuple[int, ...], form: Callable[..., Any]) -> None:
    """Oracle: the image itself, whose values are the mask's, and zero where the mask is ignored."""
    images = one(form(INDICES + 1), "mask", Preprocessing(size, resize, "nearest", (0.0,), (1.0,)), INDICES + 1)
    ((pixels, masks),) = batches(images, 1)
    assert masks.dtype == torch.int64
    assert tuple(masks.shape) == (1, *size)
    expected = torch.round(pixels[:, 0] * 255).long()
    assert torch.equal(torch.where(masks == 255, 0, masks), expected)
    assert bool((masks == 255).any()) == (min(size) > 8)


def test_a_palette_holds_indices() -> None:
    picture = Image.fromarray(INDICES)
    picture.putpalette([7] * 60)
    assert torch.equal(one(picture, "mask").targets([0]), one(INDICES, "mask").targets([0]))


def test_a_box_is_moved_as_its_pixels() -> None:
    """12 x 16 px with the shorter side at 8 is 8 x 10, from which 6 x 6 are cut at row 1, column 2."""
    boxes = np.array([[4.8, 3.0, 8.0, 6.0], [0.0, 0.0, 16.0, 12.0], [0.0, 0.0, 1.0, 1.0]], np.float32)
    (target,) = one({"boxes": boxes, "labels": [3, 1, 2]}, "boxes").targets([0])
    assert isinstance(target, dict)
    expected = torch.tensor([[4.8 * 10 / 16 - 2, 3 * 8 / 12 - 1, 8 * 10 / 16 - 2, 6 * 8 / 12 - 1], [0, 0, 6, 6]])
    assert torch.allclose(target["boxes"], expected)
    assert target["labels"].tolist() == [3, 1]  # the last lies outside of the crop


def test_an_image_without_boxes_is_one_of_nothing() -> None:
    (target,) = one({"boxes": [], "labels": []}, "boxes").targets([0])
    assert isinstance(target, dict)
    assert tuple(target["boxes"].shape) == (0, 4)


def test_an_image_as_target_is_the_same_part_enlarged() -> None:
    large = Image.fromarray(np.kron(INDICES, np.ones((2, 2), np.uint8)))
    ((pixels, targets),) = batches(one(large, "image", Preprocessing((6, 6), (12, 16), "bicubic", (0.5,), (0.5,))), 1)
    assert tuple(targets.shape) == (1, 1, 12, 12)
    assert torch.equal(targets[:, :, ::2, ::2], pixels)


def test_values_are_of_any_shape() -> None:
    assert one([0.5, 2.0], "values").targets([0]).tolist() == [[0.5, 2.0]]  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("target", "kind", "words"),
    [
        (INDICES[:5], "mask", r"its mask has 16 x 5 pixels, the image 16 x 12"),
        (Image.fromarray(INDICES).convert("RGB"), "mask", "pixel format 'RGB', expected class indices"),
        (INDICES.astype(np.float32), "mask", r"its mask is float32 \[12, 16\], expected whole numbers"),
        (INDICES.astype(np.int64) - 1, "mask", "from -1 to .* 255 for what is ignored"),
        ({"boxes": [[0, 0, 1, 1]], "labels": []}, "boxes", "1 boxes and 0 labels"),
        ({"boxes": [[0, 0, 1, np.nan]], "labels": [1]}, "boxes", "NaN"),
        ([1, 2], "boxes", "is a list, expected a dict of 'boxes' and 'labels'"),
        (Image.fromarray(INDICES[:7]), "image", "16 x 7 pixels, expected a whole multiple"),
        ("x", "values", "no usable target"),
    ],
)
def test_what_is_no_target_is_named_with_its_image(target: object, kind: TargetKind, words: str) -> None:
    with pytest.raises(DataError, match=f"image '0' of made has no usable target: .*{words}|{words}"):
        require_decodable(one(target, kind))


def test_samples_are_read_once_where_they_fit() -> None:
    reads: list[str] = []

    def target_of(name: str) -> object:
        reads.append(name)
        return INDICES

    images = Images(
        *("made", ("0",), np.full(1, -1), (), NEAREST, lambda _: Image.fromarray(INDICES), str),
        target_of=target_of,
        target_kind="mask",
    )
    for cache_bytes, expected in ((1 << 20, 1), (10, 3)):
        reads.clear()
        passes = batches(images, 1, cache_bytes=cache_bytes)
        assert len({batch[1].sum().item() for _ in range(3) for batch in passes}) == 1
        assert len(reads) == expected
