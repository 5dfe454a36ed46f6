"""The pre-processing of a bundle: each step against its definition, geometry pixel by pixel, refusals by name."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from compressor.device.images import (
    INTERPOLATIONS,
    MOST_PIXELS,
    Preprocessing,
    checked_outputs,
    checked_preprocessing,
    input_files,
    load_inputs,
    normalised,
    top_classes,
)
from compressor.errors import DataError, GateError

PLAIN = Preprocessing(size=(4, 6), resize=(4,), interpolation="nearest", mean=(0.0,) * 3, std=(1.0,) * 3)
STATED: dict[str, Any] = {
    "interpolation": "bilinear",
    "size": [4, 6],
    "resize": [5],
    "mean": [0.5, 0.4, 0.3],
    "std": [0.2, 0.25, 0.5],
}

# One rounding of float32 for each of three operations on values of at most 10.
FLOAT32_ABS = 1e-5


def test_pixels_are_scaled_shifted_and_turned_channels_first() -> None:
    preprocessing = Preprocessing((2, 3), (2,), "bilinear", (0.5, 0.4, 0.3), (0.2, 0.25, 0.5))
    pixels = np.random.default_rng(0).integers(0, 256, (4, 2, 3, 3)).astype(np.uint8)
    prepared = normalised(pixels, preprocessing, "pixels")
    assert prepared.dtype == np.float32
    assert prepared.flags.c_contiguous
    for image, row, column, channel in np.ndindex(4, 2, 3, 3):
        exact = (int(pixels[image, row, column, channel]) / 255 - preprocessing.mean[channel]) / preprocessing.std[
            channel
        ]
        assert prepared[image, channel, row, column] == pytest.approx(exact, abs=FLOAT32_ABS)


def test_floats_are_taken_as_they_are() -> None:
    ready = np.random.default_rng(0).standard_normal((2, 5, 7, 9)).astype(np.float32)
    assert normalised(ready, PLAIN, "ready") is ready


def test_the_callers_pixels_are_not_changed() -> None:
    pixels = np.full((1, 4, 6, 3), 7, np.uint8)
    normalised(pixels, PLAIN, "pixels")
    assert (pixels == 7).all()


@pytest.mark.parametrize(
    ("array", "words"),
    [
        (np.zeros((1, 4, 6, 1), np.uint8), r"pixels of shape \[4, 6, 1\], the model takes \[4, 6, 3\]"),
        (np.zeros((1, 6, 4, 3), np.uint8), r"pixels of shape \[6, 4, 3\]"),
        (np.zeros((4, 6, 3), np.uint8), "holds uint8 of shape"),
        (np.zeros((1, 3, 4, 6), np.float64), "holds float64 of shape"),
        (np.zeros((0, 4, 6, 3), np.uint8), r"holds no image: its shape is \[0, 4, 6, 3\]"),
        (np.full((1, 3, 4, 6), np.nan, np.float32), "holds NaN or infinity"),
        (np.full((1, 3, 4, 6), -np.inf, np.float32), "holds NaN or infinity"),
    ],
)
def test_an_array_that_is_no_input_is_named(array: np.ndarray[Any, Any], words: str) -> None:
    with pytest.raises(DataError, match=f"^the file.*{words}"):
        normalised(array, PLAIN, "the file")


def test_a_stated_pre_processing_becomes_tuples_of_its_numbers() -> None:
    assert checked_preprocessing(**STATED) == Preprocessing((4, 6), (5,), "bilinear", (0.5, 0.4, 0.3), (0.2, 0.25, 0.5))
    assert checked_preprocessing(**{**STATED, "resize": [8, 9]}).resize == (8, 9)


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("size", [4], "a size of two entries"),
        ("resize", [], "a resize of one or two"),
        ("resize", [1, 2, 3], "a resize of one or two"),
        ("mean", [0.5, 0.5], "mean and std alike"),
        ("mean", [], "mean and std alike"),
        ("size", [4, 0], "a side of the images is 0"),
        ("size", [4, True], "a side of the images is true"),
        ("resize", [1 << 15], "a side of the images is 32768"),
        ("std", [0.2, 0.0, 0.5], "a std is 0.0"),
        ("std", [0.2, -0.2, 0.5], "a std is -0.2"),
        ("mean", [0.5, float("inf"), 0.5], "a mean is inf"),
        ("interpolation", "fancy", "interpolation 'fancy' is none of nearest, bilinear"),
        ("size", [1 << 13, 1 << 13], f"more than {MOST_PIXELS} pixels"),
        ("resize", [1 << 13, 1 << 13], f"more than {MOST_PIXELS} pixels"),
    ],
)
def test_a_pre_processing_that_could_not_be_computed_is_refused(field: str, value: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        checked_preprocessing(**{**STATED, field: value})


def loaded(folder: Path, pixels: np.ndarray[Any, Any], preprocessing: Preprocessing) -> np.ndarray[Any, Any]:
    """The image's pixels as the model gets them, [H, W, C] of whole numbers; `preprocessing` must not shift them."""
    Image.fromarray(pixels).save(folder / "image.png")
    (channels_first,) = load_inputs(folder / "image.png", preprocessing) * 255
    return np.rint(channels_first).astype(int).transpose(1, 2, 0)


def coordinates(height: int, width: int) -> np.ndarray[Any, Any]:
    """Each pixel holds its row, its column and 255."""
    rows, columns = np.mgrid[:height, :width]
    return np.stack([rows, columns, np.full_like(rows, 255)], axis=2).astype(np.uint8)


@pytest.mark.parametrize(("width", "first_column"), [(6, 0), (8, 1), (9, 2), (7, 0), (11, 2)])
def test_the_crop_is_the_middle_with_halves_to_the_even_side(tmp_path: Path, width: int, first_column: int) -> None:
    cropped = loaded(tmp_path, coordinates(4, width), PLAIN)
    assert cropped.shape == (4, 6, 3)
    assert cropped[0, :, 1].tolist() == list(range(first_column, first_column + 6))
    assert cropped[:, 0, 0].tolist() == [0, 1, 2, 3]


def test_a_crop_larger_than_the_image_gets_a_black_rim(tmp_path: Path) -> None:
    wide = Preprocessing((4, 8), (4,), "nearest", (0.0,) * 3, (1.0,) * 3)
    cropped = loaded(tmp_path, coordinates(4, 5), wide)
    assert (cropped[:, :, 2] == 255).all(axis=0).tolist() == [False] + [True] * 5 + [False] * 2
    assert cropped[0, 1:6, 1].tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(("height", "width"), [(8, 12), (12, 8), (8, 15), (15, 8), (9, 9)])
def test_the_shorter_side_gets_the_length_and_the_longer_is_cut_off(tmp_path: Path, height: int, width: int) -> None:
    """Without a crop that hides it: the size asked for is the size that comes out of the resize."""
    shorter = 4
    longer = int(shorter * max(height, width) / min(height, width))
    size = (shorter, longer) if height <= width else (longer, shorter)
    preprocessing = Preprocessing(size, (shorter,), "nearest", (0.0,) * 3, (1.0,) * 3)
    resized = loaded(tmp_path, coordinates(height, width), preprocessing)
    exact = np.asarray(Image.fromarray(coordinates(height, width)).resize(size[::-1], Image.Resampling.NEAREST))
    np.testing.assert_array_equal(resized, exact)


def test_a_resize_of_two_entries_is_height_and_width(tmp_path: Path) -> None:
    preprocessing = Preprocessing((4, 6), (4, 6), "nearest", (0.0,) * 3, (1.0,) * 3)
    squeezed = loaded(tmp_path, coordinates(12, 18), preprocessing)
    assert squeezed[:, 0, 0].tolist() == [1, 4, 7, 10]  # the middle one of each three rows, and of each three columns
    assert squeezed[0, :, 1].tolist() == [1, 4, 7, 10, 13, 16]


@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
def test_every_interpolation_is_pillows_of_that_name(tmp_path: Path, interpolation: str) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (9, 13, 3)).astype(np.uint8)
    preprocessing = Preprocessing((4, 6), (4, 6), interpolation, (0.0,) * 3, (1.0,) * 3)
    exact = Image.fromarray(pixels).resize((6, 4), Image.Resampling[interpolation.upper()])
    np.testing.assert_array_equal(loaded(tmp_path, pixels, preprocessing), np.asarray(exact))


def test_grey_and_colour_are_made_of_each_other(tmp_path: Path) -> None:
    grey = Preprocessing((2, 2), (2,), "nearest", (0.0,), (1.0,))
    colour = Preprocessing((2, 2), (2,), "nearest", (0.0,) * 3, (1.0,) * 3)
    flat = np.array([[0, 50], [100, 200]], np.uint8)
    assert loaded(tmp_path, flat, grey)[:, :, 0].tolist() == flat.tolist()
    assert loaded(tmp_path, flat, colour)[:, :, 2].tolist() == flat.tolist()
    assert loaded(tmp_path, np.full((2, 2, 3), 90, np.uint8), grey)[0, 0].tolist() == [90]


def test_wide_pixels_are_refused_instead_of_cut_to_white(tmp_path: Path) -> None:
    Image.fromarray(np.full((4, 6), 40_000, np.uint16)).save(tmp_path / "wide.png")
    with pytest.raises(DataError, match=r"has pixel format 'I;16', expected 8 bits a channel"):
        load_inputs(tmp_path / "wide.png", PLAIN)


def test_a_strip_whose_resize_would_be_huge_is_refused(tmp_path: Path) -> None:
    Image.fromarray(np.zeros((1, 2000), np.uint8)).save(tmp_path / "strip.png")
    with pytest.raises(DataError, match="crop the image first"):
        load_inputs(tmp_path / "strip.png", Preprocessing((224, 224), (256,), "nearest", (0.0,), (1.0,)))


def test_a_model_of_other_channels_takes_arrays_alone(tmp_path: Path) -> None:
    Image.fromarray(np.zeros((4, 6), np.uint8)).save(tmp_path / "image.png")
    with pytest.raises(DataError, match=r"takes 2 channels; pass its input as \.npy"):
        load_inputs(tmp_path / "image.png", Preprocessing((4, 6), (4,), "nearest", (0.0,) * 2, (1.0,) * 2))


def test_an_archive_gives_its_images_or_its_only_array(tmp_path: Path) -> None:
    ready = np.random.default_rng(0).standard_normal((2, 3, 4, 6)).astype(np.float32)
    np.savez(tmp_path / "one.npz", anything=ready)
    np.savez(tmp_path / "named.npz", labels=np.arange(2), images=ready)
    np.savez(tmp_path / "two.npz", a=ready, b=ready)
    np.testing.assert_array_equal(load_inputs(tmp_path / "one.npz", PLAIN), ready)
    np.testing.assert_array_equal(load_inputs(tmp_path / "named.npz", PLAIN), ready)
    with pytest.raises(DataError, match=r"holds 'a, b'; expected one array, or one named 'images'"):
        load_inputs(tmp_path / "two.npz", PLAIN)


def test_a_folder_gives_its_images_and_arrays_by_name(tmp_path: Path) -> None:
    for name in ("b.PNG", "a.npy", "c.jpeg", "notes.txt"):
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "d.png").mkdir()
    assert [path.name for path in input_files(tmp_path)] == ["a.npy", "b.PNG", "c.jpeg"]
    assert input_files(tmp_path / "notes.txt") == (tmp_path / "notes.txt",)
    with pytest.raises(DataError, match="holds no image and no array"):
        input_files(tmp_path / "d.png")
    with pytest.raises(DataError, match="is a folder; files are wanted"):
        load_inputs(tmp_path, PLAIN)


def test_the_largest_classes_come_first_with_their_softmax() -> None:
    logits = np.array([0.0, 2.0, 1.0, 2.0], np.float32)
    entries = top_classes(logits, ("ant", "bee"), count=3)
    total = 2 * math.exp(2) + math.exp(1) + 1
    assert [entry["index"] for entry in entries] == [1, 3, 2]  # of equals the first
    assert [entry["label"] for entry in entries] == ["bee", "3", "2"]  # a class without a label is its number
    assert [entry["share"] for entry in entries] == pytest.approx([math.exp(2) / total] * 2 + [math.exp(1) / total])


def test_logits_that_would_overflow_have_shares_too() -> None:
    entries = top_classes(np.array([10_000.0, 9_000.0]), ())
    assert [entry["share"] for entry in entries] == [1.0, 0.0]


@pytest.mark.parametrize(
    ("outputs", "words"),
    [
        (np.zeros(2), "expected a row of numbers"),
        (np.zeros((3, 5)), "for each of 2 images"),
        (np.zeros((2, 0)), "expected a row of numbers"),
        (np.array([["a"], ["b"]]), "expected a row of numbers"),
        (np.array([[0.0, 1.0], [np.nan, 1.0]]), "with NaN or infinity"),
    ],
)
def test_answers_that_are_none_are_refused(outputs: np.ndarray[Any, Any], words: str) -> None:
    images = np.zeros((2, 3, 4, 6), np.float32)
    with pytest.raises(GateError, match=words):
        checked_outputs(outputs, images, "image.png")
    assert checked_outputs(np.ones((2, 5)), images, "image.png").shape == (2, 5)
