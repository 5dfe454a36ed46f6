"""Damaged images: an error each, or counted, named and left out up to a share; the same ones always."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from compressor.errors import DataError
from compressor.inputs.damage import without_damaged
from compressor.inputs.data import given_data
from compressor.inputs.images import Images, Preprocessing, require_decodable
from compressor.inputs.models import Model, load_model
from compressor.inputs.sources import load_images
from compressor.inputs.splits import split
from compressor.recipe import read_recipe
from compressor.run.reading import read_data

HOW = Preprocessing((4, 4), (4,), "bilinear", (0.5,) * 3, (0.5,) * 3)
DAMAGED = ("03.png", "11.png", "17.png")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 grey images of the embedded network's size, three of them damaged in different ways."""
    folder = tmp_path_factory.mktemp("damaged")
    for index, pixels in enumerate(np.random.default_rng(0).integers(0, 256, (40, 8, 8), np.uint8)):
        Image.fromarray(pixels).save(folder / f"{index:02d}.png")
    (folder / "03.png").write_bytes((folder / "03.png").read_bytes()[:70])
    (folder / "11.png").write_bytes(b"")
    Image.fromarray(np.zeros((8, 8), np.uint16)).save(folder / "17.png")
    return folder


@pytest.fixture
def images(folder: Path) -> Images:
    return load_images(str(folder)).prepared(HOW)


def test_without_a_share_every_damaged_image_is_an_error(images: Images) -> None:
    same, notes = without_damaged(images, 0)
    assert (same, notes) == (images, ())
    assert not images.seen, "nothing is decoded where nothing may be damaged"
    with pytest.raises(DataError, match=r"image '03\.png' of .* can't be decoded"):
        require_decodable(same)


def test_damaged_images_are_left_out_counted_and_named(images: Images) -> None:
    intact, notes = without_damaged(images, 0.1)
    assert [name for name in images.names if name not in intact.names] == list(DAMAGED)
    (note,) = notes
    assert "3 of 40 images of" in note
    assert "(7.50%) can't be used and are left out: '03.png', '11.png', '17.png'" in note
    require_decodable(intact)
    parts = [
        split(without_damaged(images, share)[0], 5, calibration=9, search=2, evaluation=0.2) for share in (0.1, 0.5)
    ]
    assert parts[0].hashes == parts[1].hashes


def test_a_share_is_of_all_images_and_includes_itself(images: Images) -> None:
    assert len(without_damaged(images, 3 / 40)[0]) == 37
    with pytest.raises(DataError) as caught:
        without_damaged(images, 0.07)
    said = str(caught.value)
    assert "3 of 40 images" in said
    assert "more than --damaged-images 0.07 lets pass: '03.png', '11.png', '17.png'" in said
    assert "\n" not in said


def test_five_are_named_at_most(tmp_path: Path) -> None:
    for index in range(8):
        (tmp_path / f"{index}.png").write_bytes(b"x")
    with pytest.raises(DataError) as caught:
        without_damaged(load_images(str(tmp_path)), 0.5)
    assert "'4.png'" in str(caught.value)
    assert "'5.png'" not in str(caught.value)


def test_a_damaged_mask_is_damage_too(tmp_path: Path) -> None:
    for index in range(4):
        Image.new("RGB", (4, 4), (index, 0, 0)).save(tmp_path / f"{index}.png")
        Image.new("L", (4, 4)).save(tmp_path / f"{index}_mask.png")
    (tmp_path / "2_mask.png").write_bytes(b"x")
    intact, notes = without_damaged(load_images(str(tmp_path)).prepared(HOW), 0.5)
    assert intact.names == ("0.png", "1.png", "3.png")
    assert "1 of 4" in notes[0]


def test_a_data_set_whose_entry_raises_has_a_damaged_image() -> None:
    class Photos:
        targets = (0, 1, 0)

        def __len__(self) -> int:
            return 3

        def __getitem__(self, index: int) -> tuple[Image.Image, int]:
            if index == 1:
                raise OSError("the disk has a scratch")
            return Image.new("RGB", (4, 4), (index, 0, 0)), self.targets[index]

    images = given_data(Photos())
    assert isinstance(images, Images)
    intact, notes = without_damaged(images.prepared(HOW), 0.5)
    assert (intact.names, intact.labels.tolist()) == (("0", "2"), [0, 0])
    assert "'1'" in notes[0]


def test_tensors_have_nothing_to_decode() -> None:
    examples = given_data([np.zeros((2, 5), np.float32)])
    assert examples is not None
    assert not isinstance(examples, (str, Images))
    assert without_damaged(examples, 0.5) == (examples, ())


@pytest.fixture(scope="module")
def model() -> Model:
    """The embedded one, for 8 x 8 pixels."""
    return load_model("digits-resnet", "none")


def test_a_run_is_told_what_was_left_out(folder: Path, model: Model) -> None:
    asked = {"data": str(folder), "evaluation_data": "", "evaluation": 0.3, "calibration": 16}
    read = read_data(read_recipe(**asked, damaged_images=0.1), model, None)
    assert len(read.notes) == 1
    assert "3 of 40 images" in read.notes[0]
    assert not set(DAMAGED) & {*read.splits.calibration.names, *read.splits.evaluation.names}
    assert len(read.splits.evaluation) == round(0.3 * 37)
    with pytest.raises(DataError, match=r"3 of 40 images .* more than --damaged-images 0\.01"):
        read_data(read_recipe(**asked, damaged_images=0.01), model, None)


def test_evaluation_images_given_apart_are_looked_at_too(folder: Path, model: Model) -> None:
    recipe = read_recipe(evaluation_data=str(folder), calibration=16, damaged_images=0.1)
    pixels = np.random.default_rng(1).integers(0, 256, (30, 8, 8), np.uint8)
    read = read_data(recipe, model, (pixels, np.arange(30) % 10))
    assert len(read.splits.evaluation) == 37
    assert "3 of 40 images" in read.notes[0]
