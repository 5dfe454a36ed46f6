"""Images a Python caller holds are used, or refused by name: the embedded data never takes their place."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

import compressor
from compressor import pipeline
from compressor.errors import DataError, ModelError
from compressor.inputs.images import Images
from compressor.inputs.in_memory import given_images
from compressor.inputs.sources import require_labels
from compressor.recipe import Recipe

PIXELS = np.random.default_rng(0).integers(0, 256, (6, 8, 8, 3), dtype=np.uint8)
LABELS = np.arange(6) % 3


class Pictures(Dataset[Any]):
    def __len__(self) -> int:
        return len(PIXELS)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return Image.fromarray(PIXELS[index]), int(LABELS[index])


def first(given: Any) -> Images:
    images = given_images(given)
    assert isinstance(images, Images)
    return images


@pytest.mark.parametrize(
    "given",
    [
        (PIXELS, LABELS),
        (PIXELS.transpose(0, 3, 1, 2), torch.from_numpy(LABELS)),
        (torch.from_numpy(PIXELS).permute(0, 3, 1, 2).float() / 255, LABELS),
        TensorDataset(torch.from_numpy(PIXELS).permute(0, 3, 1, 2), torch.from_numpy(LABELS)),
        Pictures(),
        DataLoader(Pictures(), batch_size=2),
    ],
    ids=["arrays", "channels first", "floats", "tensor data set", "data set", "loader"],
)
def test_pairs_of_images_and_labels_are_read(given: Any) -> None:
    images = first(given)
    assert images.labels.tolist() == LABELS.tolist()
    assert np.array_equal(np.asarray(images.read(images.names[4])), PIXELS[4])
    assert len({images.digest(name) for name in images.names}) == len(PIXELS)


def test_images_alone_have_no_labels() -> None:
    images = first(PIXELS)
    assert images.labels.tolist() == [-1] * 6
    with pytest.raises(DataError, match=r"6 of 6 images of ndarray have no label .*give a pair of arrays"):
        require_labels(images, 10)


def test_a_path_is_a_source_and_none_is_none() -> None:
    assert given_images(Path("photos")) == "photos"
    assert given_images("digits") == "digits"
    assert given_images(None) is None


class Endless(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        yield from ()


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ([1, 2], "given as a list"),
        ({"images": PIXELS}, "given as a dict"),
        (3, "given as an int"),
        (Endless(), "can't be read by index"),
        (DataLoader(Endless()), "can't be read by index"),
        ((PIXELS, LABELS[:3]), "6 images and 3 labels"),
        ((PIXELS, LABELS.astype(float)), "expected whole numbers"),
    ],
)
def test_what_holds_no_images_is_refused_by_name(given: Any, words: str) -> None:
    with pytest.raises(DataError, match=words):
        given_images(given)


def test_normalised_floats_are_refused_when_they_are_read() -> None:
    images = first((torch.randn(4, 3, 8, 8), np.zeros(4, dtype=np.int64)))
    with pytest.raises(TypeError, match="before normalisation"):
        images.read(images.names[0])
    with pytest.raises(DataError, match=r"before normalisation, which is done here\); correct the array of images"):
        images.pixel_hash(images.names[0])


class Net(nn.Module):
    pass


class Begun(Exception):
    """What ends a run where it begins."""


Beginnings = list[tuple[Recipe, Images | None]]


@pytest.fixture
def begun(monkeypatch: pytest.MonkeyPatch) -> Beginnings:
    """Recipe and images that each run would begin with; none goes further."""
    beginnings: Beginnings = []

    def begin(recipe: Recipe, *, images: Images | None, **others: object) -> None:
        beginnings.append((recipe, images))
        raise Begun

    monkeypatch.setattr(pipeline, "run", begin)
    return beginnings


@pytest.mark.parametrize("model", ["digits-resnet", Net()], ids=["name", "module"])
@pytest.mark.parametrize(
    "given",
    [
        (PIXELS, LABELS),
        TensorDataset(torch.from_numpy(PIXELS).permute(0, 3, 1, 2), torch.from_numpy(LABELS)),
        DataLoader(Pictures(), batch_size=2),
    ],
    ids=["arrays", "tensor data set", "loader"],
)
def test_a_run_begins_with_the_images_it_was_given(begun: Beginnings, model: Any, given: Any) -> None:
    with pytest.raises(Begun):
        compressor.compress(model, given, size=8, mean=0.5, std=0.5)
    ((_, images),) = begun
    assert images is not None
    assert images.labels.tolist() == LABELS.tolist()


@pytest.mark.parametrize("model", ["digits-resnet", Net()], ids=["name", "module"])
def test_a_path_is_the_source_of_a_runs_images(begun: Beginnings, model: Any) -> None:
    with pytest.raises(Begun):
        compressor.compress(model, Path("train.npz"), size=8, mean=0.5, std=0.5)
    ((recipe, images),) = begun
    assert (recipe.data, images) == ("train.npz", None)


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (Net, "the class Net, expected a module made of it"),
        (lambda: Net(), "call it and give its result"),
        (3, "the model is an int"),
        (Path("net.py"), "the model is a PosixPath"),
    ],
)
def test_anything_but_a_module_or_a_name_is_refused(begun: Beginnings, model: Any, words: str) -> None:
    with pytest.raises(ModelError, match=words):
        compressor.compress(model)
    assert begun == []


def test_what_holds_no_images_begins_no_run(begun: Beginnings) -> None:
    with pytest.raises(DataError, match="given as a list"):
        compressor.compress("digits-resnet", [1, 2])
    assert begun == []


def test_images_that_are_none_never_become_the_embedded_ones(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="/nowhere/photos"):
        compressor.compress("digits-resnet", Path("/nowhere/photos"), out=str(tmp_path / "run"))
