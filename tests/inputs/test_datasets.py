"""Data sets of pairs as images: pictures in every usual form, labels without decoding, and what is none refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from compressor.errors import DataError
from compressor.inputs.datasets import as_picture, dataset_images

PIXELS = np.random.default_rng(0).integers(0, 256, (4, 5, 3)).astype(np.uint8)
FIRST = PIXELS.transpose(2, 0, 1)

FORMS: dict[str, tuple[Any, Any]] = {
    "a picture": (Image.fromarray(PIXELS), PIXELS),
    "channels last": (PIXELS, PIXELS),
    "channels first": (FIRST, PIXELS),
    "a tensor": (torch.from_numpy(FIRST.copy()), PIXELS),
    "floats": (FIRST.astype(np.float32) / 255, PIXELS),
    "a tensor with a gradient": (torch.from_numpy(FIRST / 255).requires_grad_(), PIXELS),
    "grey": (PIXELS[:, :, 0], PIXELS[:, :, 0]),
    "grey, one channel first": (PIXELS[None, :, :, 0], PIXELS[:, :, 0]),
    "grey, one channel last": (PIXELS[:, :, :1], PIXELS[:, :, 0]),
}


@pytest.mark.parametrize("form", FORMS)
def test_a_picture_of_any_form_keeps_its_pixels(form: str) -> None:
    given, expected = FORMS[form]
    np.testing.assert_array_equal(np.asarray(as_picture(given)), expected)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (np.zeros((5, 5, 2), np.uint8), r"ndarray \[5, 5, 2\] is no image"),
        (np.zeros((2, 3, 5, 5), np.uint8), "is no image"),
        (torch.zeros(5), r"Tensor \[1, 5\] is no image|is no image"),
        (FIRST.astype(np.float32), "are no pixels in"),
        (np.full((3, 4, 4), -0.1), "before normalisation"),
        (np.full((3, 4, 4), np.nan), "before normalisation"),
        (FIRST.astype(np.int32), "pixels are int32, expected uint8 or floats"),
    ],
)
def test_what_is_no_picture_is_refused(given: Any, words: str) -> None:
    with pytest.raises(TypeError, match=words):
        as_picture(given)


class Pairs:
    """Pictures of one grey each with labels; counts how many were decoded."""

    def __init__(self, labels: list[int]) -> None:
        self.own, self.decoded = labels, 0

    def __len__(self) -> int:
        return len(self.own)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        self.decoded += 1
        return Image.new("L", (2, 2), 10 * index), self.own[index]


@pytest.mark.parametrize("attribute", ["targets", "labels", "_labels", "y"])
def test_labels_that_a_data_set_keeps_are_taken_without_decoding(attribute: str) -> None:
    pairs = Pairs([2, 0, 1])
    setattr(pairs, attribute, [2, 0, 1])
    images = dataset_images("mine", pairs)
    assert images.labels.tolist() == [2, 0, 1]
    assert images.labels.dtype == np.int64
    assert pairs.decoded == 0


def test_labels_of_another_number_are_not_the_images() -> None:
    pairs = Pairs([2, 0, 1])
    pairs.targets = [5, 5]  # type: ignore[attr-defined]
    assert dataset_images("mine", pairs).labels.tolist() == [2, 0, 1]


def test_images_alone_have_no_label() -> None:
    assert dataset_images("mine", [Image.new("L", (2, 2))] * 3).labels.tolist() == [-1] * 3


def test_names_sort_as_they_count_and_lead_to_their_picture() -> None:
    images = dataset_images("mine", Pairs([0] * 11))
    assert list(images.names) == sorted(images.names) == [f"{i:02d}" for i in range(11)]
    assert np.asarray(images.read("03"))[0, 0] == 30
    assert len({images.digest(name) for name in images.names}) == 11


@pytest.mark.parametrize(
    ("classes", "names"),
    [(None, ("0", "1", "2")), (["a", "b", "c"], ("a", "b", "c")), ([("a", "A"), "b", "c"], ("a, A", "b", "c"))],
)
def test_classes_are_the_data_sets_or_counted(classes: Any, names: tuple[str, ...]) -> None:
    pairs = Pairs([2, 0, 1])
    pairs.classes = classes  # type: ignore[attr-defined]
    assert dataset_images("mine", pairs).class_names == names


def test_a_data_set_without_images_is_refused() -> None:
    with pytest.raises(DataError, match="'mine' holds no images"):
        dataset_images("mine", Pairs([]))
