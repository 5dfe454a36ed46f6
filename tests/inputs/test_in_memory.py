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
from compressor.errors import DataError, ModelError
from compressor.inputs.data import given_data
from compressor.inputs.entries import Signature
from compressor.inputs.examples import Examples
from compressor.inputs.images import Images
from compressor.inputs.sources import require_labels
from compressor.pipeline import api
from compressor.recipe import Recipe

PIXELS = np.random.default_rng(0).integers(0, 256, (6, 8, 8, 3), dtype=np.uint8)
LABELS = np.arange(6) % 3


class Entries(Dataset[Any]):
    def __init__(self, entries: list[Any]) -> None:
        self.entries = entries

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, index: int) -> Any:
        return self.entries[index]


class Pictures(Dataset[Any]):
    def __len__(self) -> int:
        return len(PIXELS)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return Image.fromarray(PIXELS[index]), int(LABELS[index])


def first(given: Any) -> Images:
    images = given_data(given)
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
    assert given_data(Path("photos")) == "photos"
    assert given_data("digits") == "digits"
    assert given_data(None) is None


def test_a_dict_of_images_alone_are_images_whatever_they_are_called() -> None:
    images = first({"images": PIXELS})
    assert images.labels.tolist() == [-1] * 6
    assert np.array_equal(np.asarray(images.read(images.names[4])), PIXELS[4])


def test_of_several_inputs_none_is_dropped_for_the_image() -> None:
    two = Signature(1, ("image", "depth"))  # depth is one that forward can do without
    made = given_data({"image": PIXELS, "depth": PIXELS}, two)
    assert isinstance(made, Examples)
    assert made.input_names == ("image", "depth")
    entry = {"depth": np.zeros((8, 8)), "image": Image.fromarray(PIXELS[0]), "label": 1}
    with pytest.raises(DataError, match="expected a tensor or a numpy array"):
        given_data(Entries([entry]), two)


@pytest.mark.parametrize("target", ["label", "mask"])
def test_the_image_of_a_dict_is_not_its_target(target: str) -> None:
    picture, mask = Image.fromarray(PIXELS[0]), Image.fromarray(PIXELS[0, :, :, 0])
    images = first(Entries([{target: mask if target == "mask" else 1, "image": picture}]))
    assert np.array_equal(np.asarray(images.read(images.names[0])), PIXELS[0])
    assert images.target_kind == ("mask" if target == "mask" else "class")


def test_labels_that_are_no_whole_numbers_are_targets_and_no_classes() -> None:
    images = first((PIXELS, LABELS + 0.5))
    assert images.target_kind == "values"
    assert images.labels.tolist() == [-1] * 6
    assert images.target_of is not None
    assert float(images.target_of(images.names[4])) == LABELS[4] + 0.5  # type: ignore[arg-type]


class Empty(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        yield from ()


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ([1, 2], "given as a list"),
        ({}, "dict holds no samples"),
        (3, "given as an int"),
        (Empty(), "Empty yields nothing"),
        (DataLoader(Empty()), "DataLoader yields nothing"),
        ((PIXELS, LABELS[:3]), "6 of the input, 3 of targets"),
        ((PIXELS, LABELS.astype(str)), "expected a tensor, numbers"),
    ],
)
def test_what_holds_no_images_is_refused_by_name(given: Any, words: str) -> None:
    with pytest.raises(DataError, match=words):
        given_data(given)


def test_normalised_floats_are_taken_as_the_network_takes_them_and_that_is_said() -> None:
    normalised = torch.randn(4, 3, 8, 8)
    examples = given_data((normalised, np.zeros(4, dtype=np.int64)))
    assert isinstance(examples, Examples)
    assert torch.equal(examples.inputs(range(4)), normalised)  # type: ignore[arg-type]
    (note,) = examples.notes
    assert "which are no pixels: they are taken as the network takes them, without pre-processing" in note


def test_normalised_floats_behind_pixels_are_refused_when_they_are_read() -> None:
    pixels = torch.from_numpy(PIXELS).permute(0, 3, 1, 2) / 255
    images = first([(pixels[0], 0), (pixels[1] - 1, 1)])
    with pytest.raises(TypeError, match="before normalisation"):
        images.read(images.names[1])
    with pytest.raises(DataError, match=r"before normalisation, which is done here\); correct what the data set gives"):
        images.pixel_hash(images.names[1])


class Net(nn.Module):
    pass


class Begun(Exception):
    """What ends a run where it begins."""


Beginnings = list[tuple[Recipe, object]]


@pytest.fixture
def begun(monkeypatch: pytest.MonkeyPatch) -> Beginnings:
    """Recipe and data that each run would begin with; none goes further."""
    beginnings: Beginnings = []

    def begin(recipe: Recipe, *, data: object, **others: object) -> None:
        beginnings.append((recipe, data))
        raise Begun

    monkeypatch.setattr(api, "run", begin)
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
    ((_, data),) = begun
    assert data is given
    assert first(data).labels.tolist() == LABELS.tolist()


@pytest.mark.parametrize("model", ["digits-resnet", Net()], ids=["name", "module"])
def test_a_path_is_the_source_of_a_runs_images(begun: Beginnings, model: Any) -> None:
    with pytest.raises(Begun):
        compressor.compress(model, Path("train.npz"), size=8, mean=0.5, std=0.5)
    ((recipe, data),) = begun
    assert (recipe.data, data) == ("train.npz", None)


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


def test_what_holds_no_images_begins_no_run(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="given as a list"):
        compressor.compress("digits-resnet", [1, 2], out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_images_that_are_none_never_become_the_embedded_ones(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="/nowhere/photos"):
        compressor.compress("digits-resnet", Path("/nowhere/photos"), out=str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()
