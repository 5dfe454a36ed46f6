"""Data sets of Hugging Face's package: most by a stand-in with its columns and features, some by the package itself."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image as Pictures

from compressor.errors import DataError, MissingPackageError
from compressor.inputs.calls import names_code
from compressor.inputs.damage import without_damaged
from compressor.inputs.data import given_data
from compressor.inputs.entries import Signature
from compressor.inputs.examples import Examples
from compressor.inputs.images import Images, Preprocessing, batches, require_decodable
from compressor.inputs.sources import load_images, load_source

HOW = Preprocessing((8, 8), (8,), "bilinear", (0.5,) * 3, (0.5,) * 3)
PIXELS = np.random.default_rng(0).integers(0, 256, (6, 10, 12, 3), np.uint8)
LABELS = [0, 1, 0, 2, 1, -1]


def picture(index: int) -> Pictures.Image:
    return Pictures.fromarray(PIXELS[index])


def encoded(index: int, orientation: int = 1) -> dict[str, Any]:
    file, exif = io.BytesIO(), Pictures.Exif()
    exif[0x0112] = orientation
    picture(index).save(file, "PNG", exif=exif)
    return {"bytes": file.getvalue(), "path": f"{index}.png"}


# the package's own names: what a feature is, is told by its class


@dataclass
class Image:
    mode: str | None = None
    decode: bool = True


@dataclass
class ClassLabel:
    names: list[str] = field(default_factory=list)


@dataclass
class Value:
    dtype: str


class Table:
    """Columns by name, rows by number."""

    def __init__(self, features: Mapping[str, Any], **columns: Any) -> None:
        self.features, self.columns = dict(features), columns
        self.decoded: list[int] = []

    @property
    def column_names(self) -> list[str]:
        return list(self.columns)

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))

    def __getitem__(self, key: int | str) -> Any:
        if isinstance(key, str):
            assert not isinstance(self.features[key], Image), "a whole column of images would be decoded"
            return self.columns[key]
        self.decoded.append(key)
        return {name: values[key] for name, values in self.columns.items()}


CLASSES = ClassLabel(["ant", "bee", "cat"])
PICTURES = [picture(index) for index in range(6)]


def table(**features: Any) -> Table:
    """Images and labels, under other names or of other kinds where they are given."""
    columns = {"image": PICTURES, "label": LABELS}
    return Table({"image": Image(), "label": CLASSES, **features}, **columns)


def test_images_labels_and_names_come_out_of_columns() -> None:
    data = table()
    images = given_data(data)
    assert isinstance(images, Images)
    assert (images.source, images.names[5]) == ("Table", "5")
    assert (images.labels.tolist(), images.class_names) == (LABELS, ("ant", "bee", "cat"))
    assert data.decoded == [], "labels are no reason to decode images"
    ((pixels, targets),) = batches(images.prepared(HOW).subset([4, 1]), 8)
    assert (tuple(pixels.shape), targets.tolist()) == ((2, 3, 8, 8), [1, 1])
    assert data.decoded == [4, 1]
    plain = given_data([(picture(index), LABELS[index]) for index in range(6)])
    assert isinstance(plain, Images)
    assert images.content_hash() == plain.content_hash()


@pytest.mark.parametrize(
    ("features", "columns", "labels", "classes"),
    [
        ({"img": Image(), "fine": CLASSES}, {"img": PICTURES, "fine": LABELS}, LABELS, ("ant", "bee", "cat")),
        ({"img": Image(), "target": Value("int64")}, {"img": PICTURES, "target": LABELS}, LABELS, ("0", "1", "2")),
        ({"img": Image(), "label": CLASSES}, {"img": PICTURES, "label": [None] * 6}, [-1] * 6, ("ant", "bee", "cat")),
        ({"img": Image(), "note": Value("string")}, {"img": PICTURES, "note": ["x"] * 6}, [-1] * 6, ()),
    ],
)
def test_columns_of_other_names(
    features: Mapping[str, Any], columns: Mapping[str, Any], labels: list[int], classes: tuple[str, ...]
) -> None:
    images = given_data(Table(features, **columns))
    assert isinstance(images, Images)
    assert (images.labels.tolist(), images.class_names) == (labels, classes)


def test_what_is_not_decoded_yet_is_turned_upright_as_the_package_does() -> None:
    data = Table({"image": Image(mode="L", decode=False)}, image=[encoded(0), encoded(0, 6)])
    images = given_data(data)
    assert isinstance(images, Images)
    plain, turned = (images.read(name) for name in images.names)
    assert (plain.size, turned.size, turned.mode) == ((12, 10), (10, 12), "L")
    assert np.array_equal(np.asarray(turned), np.rot90(np.asarray(plain), -1))


def test_damaged_entries_are_named_and_can_be_left_out() -> None:
    entries = [encoded(0), {"bytes": b"x", "path": None}, {"bytes": None, "path": "http://example.org/a.png"}]
    images = given_data(Table({"image": Image(decode=False)}, image=[*entries, encoded(1)]))
    assert isinstance(images, Images)
    with pytest.raises(DataError, match=r"image '1' of Table can't be decoded"):
        require_decodable(images)
    with pytest.raises(DataError, match=r"image '2' of .* is the path 'http://example.org/a.png' alone"):
        images.pixel_hash("2")
    intact, notes = without_damaged(images, 0.5)
    assert intact.names == ("0", "3")
    assert notes[0].endswith("are left out: '1', '2'")


def test_splits_streams_and_several_classes_are_asked_about() -> None:
    with pytest.raises(DataError, match=r"has the splits train, test; give one of them: data\['train'\]"):
        given_data({"train": table(), "test": table()})

    class Streamed:
        features, column_names = {"image": Image()}, ["image"]

        def __iter__(self) -> Any:
            return iter([{"image": picture(0)}])

    with pytest.raises(DataError, match=r"Streamed is streamed.*without streaming=True"):
        given_data(Streamed())
    two = Table({"image": Image(), "fine": CLASSES, "coarse": CLASSES}, image=PICTURES, fine=LABELS, coarse=LABELS)
    with pytest.raises(
        DataError, match=r"has the classes fine, coarse; rename .* data.rename_column\('fine', 'label'\)"
    ):
        given_data(two)


def test_other_columns_are_read_as_any_data_sets() -> None:
    rows = Table(
        {"inputs": Value("float32"), "label": Value("int64")}, inputs=np.zeros((6, 5), np.float32), label=LABELS
    )
    assert isinstance(given_data(rows, Signature(1, ("inputs",))), Examples)
    masks = [Pictures.fromarray(PIXELS[index, ..., 0]) for index in range(6)]
    segmented = given_data(Table({"image": Image(), "mask": Image()}, image=PICTURES, mask=masks))
    assert isinstance(segmented, Images)
    assert segmented.target_kind == "mask"


# folders


def saved(folder: Path, files: tuple[str, ...] = ("data-0.arrow",)) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "data-0.arrow").write_bytes(b"")
    (folder / "dataset_info.json").write_text("{}")
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": name} for name in files]}))
    return folder


def test_a_saved_folder_needs_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(MissingPackageError, match=r"pip install 'compressor\[datasets\]'"):
        load_source(str(saved(tmp_path)))


@pytest.mark.parametrize("name", ["../secret.arrow", "/etc/passwd", "missing.arrow", 3])
def test_a_saved_folder_names_its_own_files_alone(name: Any, tmp_path: Path) -> None:
    (tmp_path / "secret.arrow").write_bytes(b"")
    with pytest.raises(DataError, match=r"state\.json' names .*, which is no file beside it"):
        load_source(str(saved(tmp_path / "set", (name,))))


def test_a_folder_of_splits_asks_for_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "beans").mkdir()
    (tmp_path / "beans" / "dataset_dict.json").write_text('{"splits": ["train", "../test"]}')
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=r"'beans/' holds the splits train, \.\./test; name one: beans:train"):
        load_source("beans/")
    with pytest.raises(DataError, match=r"'beans' has no split 'tran', it has .*Did you mean 'train'"):
        load_source("beans:tran")
    with pytest.raises(DataError, match=r"has no split '\.\./test'"):
        load_source("beans:../test")
    assert not names_code("beans:train"), "it is a folder's split here"
    assert names_code("peas:train")


@pytest.fixture(scope="module")
def library() -> Any:
    return pytest.importorskip("datasets", reason="the package datasets is optional, and not installed here")


def real_table(library: Any) -> Any:
    features = library.Features({"image": library.Image(), "label": library.ClassLabel(names=CLASSES.names)})
    columns = {"image": [*PICTURES[:5], encoded(5, 6)], "label": LABELS}
    return library.Dataset.from_dict(columns, features=features)


def test_the_package_itself_in_hand_and_saved(library: Any, tmp_path: Path) -> None:
    data = real_table(library)
    data.save_to_disk(str(tmp_path / "one"))
    library.DatasetDict({"train": data}).save_to_disk(str(tmp_path / "several"))
    in_hand = given_data(data)
    assert isinstance(in_hand, Images)
    for name in ("one", "several:train", "several/train"):
        images = load_images(str(tmp_path / name))
        assert (images.labels.tolist(), images.class_names) == (LABELS, ("ant", "bee", "cat"))
        assert images.content_hash() == in_hand.content_hash()
        assert torch.equal(images.prepared(HOW)[5], in_hand.prepared(HOW)[5])


def test_the_packages_own_splits_streams_and_damage(library: Any, tmp_path: Path) -> None:
    data = real_table(library)
    with pytest.raises(DataError, match="has the splits train"):
        given_data(library.DatasetDict({"train": data}))
    with pytest.raises(DataError, match="is streamed"):
        given_data(data.to_iterable_dataset())
    data.remove_columns("image").save_to_disk(str(tmp_path / "labels"))
    with pytest.raises(DataError, match="has the columns label, expected one of images"):
        load_source(str(tmp_path / "labels"))
    data.save_to_disk(str(tmp_path / "cut"))
    for file in (tmp_path / "cut").glob("*.arrow"):
        file.write_bytes(file.read_bytes()[:300])
    with pytest.raises(DataError, match="can't be read as a saved data set"):
        load_source(str(tmp_path / "cut"))
