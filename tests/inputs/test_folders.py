"""Folders and archives with targets: masks, COCO's boxes, pairs of images, arrays; what is wrong with one is named."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from compressor.errors import DataError
from compressor.inputs.entries import Signature
from compressor.inputs.examples import Examples
from compressor.inputs.images import Images, Preprocessing, batches, require_decodable
from compressor.inputs.sources import load_images, load_source

HOW = Preprocessing((4, 4), (4,), "bilinear", (0.5,) * 3, (0.5,) * 3)
MASK = np.arange(24, dtype=np.uint8).reshape(4, 6) % 5


def picture(path: Path, shade: int = 10, size: tuple[int, int] = (6, 4)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (shade, shade, 0)).save(path)


def mask(path: Path, values: Any = MASK) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(values).save(path)


def masks_apart(folder: Path) -> None:
    for index, name in enumerate(("a", "b", "deep/c")):
        picture(folder / "images" / f"{name}.jpg", 20 * index)
        mask(folder / "masks" / f"{name}.png", MASK + index)


def masks_beside(folder: Path) -> None:
    for index, ending in enumerate((".mask", "_mask", "_mask")):
        picture(folder / f"{index}.png", 20 * index)
        mask(folder / f"{index}{ending}.png", MASK + index)


@pytest.mark.parametrize("make", [masks_apart, masks_beside])
def test_masks_belong_to_images_of_their_name(make: Callable[[Path], None], tmp_path: Path) -> None:
    make(tmp_path)
    images = load_images(str(tmp_path)).prepared(HOW)
    assert (len(images), images.target_kind) == (3, "mask")
    require_decodable(images)
    ((pixels, targets),) = batches(images, 8)
    assert (tuple(pixels.shape), tuple(targets.shape), targets.dtype) == ((3, 3, 4, 4), (3, 4, 4), torch.int64)
    for index in range(3):  # 4 x 6 px: rows 0 to 3, columns 1 to 4
        assert torch.equal(targets[index], torch.from_numpy(MASK[:, 1:5] + index).long())
    assert len({images.digest(name) for name in images.names}) == 3


def test_another_mask_is_another_content(tmp_path: Path) -> None:
    masks_apart(tmp_path)
    before = load_images(str(tmp_path)).content_hash()
    mask(tmp_path / "masks" / "a.png", MASK + 7)
    assert load_images(str(tmp_path)).content_hash() != before


@pytest.mark.parametrize(("inputs", "targets"), [("lr", "hr"), ("input", "target")])
def test_pairs_of_images(tmp_path: Path, inputs: str, targets: str) -> None:
    for index in range(3):
        picture(tmp_path / inputs / f"{index}.png", 50 * index)
        picture(tmp_path / targets / f"{index}.png", 50 * index, (12, 8))
    images = load_images(str(tmp_path)).prepared(HOW)
    assert images.target_kind == "image"
    ((pixels, hopes),) = batches(images, 8)
    assert tuple(hopes.shape) == (3, 3, 8, 8)
    assert torch.allclose(hopes[:, :, ::2, ::2], pixels)


COCO: dict[str, Any] = {
    "images": [{"id": 7, "file_name": "a.png"}, {"id": 9, "file_name": "b.png"}],
    "categories": [{"id": 18, "name": "dog"}, {"id": 3, "name": "car"}],
    "annotations": [
        {"image_id": 7, "category_id": 18, "bbox": [1, 0, 2, 4]},
        {"image_id": 7, "category_id": 3, "bbox": [2.5, 1, 10, 1], "iscrowd": 0},
        {"image_id": 7, "category_id": 3, "bbox": [0, 0, 6, 4], "iscrowd": 1},
        {"image_id": 7, "category_id": 3, "bbox": [1, 1, 0, 0]},
    ],
}


def coco(folder: Path, file: str = "annotations.json", place: str = "", **changed: Any) -> Path:
    for name in ("a", "b"):
        picture(folder / place / f"{name}.png", ord(name))
    (folder / file).parent.mkdir(exist_ok=True)
    (folder / file).write_text(json.dumps({**COCO, **changed}))
    return folder


@pytest.mark.parametrize(
    ("file", "images"),
    [
        ("annotations.json", ""),
        ("annotations.json", "images"),
        ("_annotations.coco.json", ""),
        ("instances_val.json", "val"),
        ("annotations/instances_val2017.json", "val2017"),
        ("annotations/instances_val2017.json", "images/val2017"),
    ],
)
@pytest.mark.parametrize("by_file", [False, True])
def test_cocos_boxes(tmp_path: Path, file: str, images: str, by_file: bool) -> None:
    coco(tmp_path, file, images)
    made = load_images(str(tmp_path / file if by_file else tmp_path)).prepared(HOW)
    assert (made.names, made.class_names, made.target_kind) == (("a.png", "b.png"), ("car", "dog"), "boxes")
    require_decodable(made)
    first, second = made.targets([0, 1])
    assert first["boxes"].tolist() == [[0, 0, 2, 4], [1.5, 1, 4, 2]]  # type: ignore[call-overload]
    assert first["labels"].tolist() == [1, 0]  # type: ignore[call-overload]
    assert len(second["boxes"]) == 0  # type: ignore[call-overload]


def test_cocos_categories_are_the_models_by_name(tmp_path: Path) -> None:
    made = load_images(str(coco(tmp_path)), classes=["background", "dog", "car"]).prepared(HOW)
    assert made.targets([0])[0]["labels"].tolist() == [1, 2]  # type: ignore[call-overload]
    with pytest.raises(DataError, match=r"category 'dog' .* is not among the 1 classes"):
        load_images(str(tmp_path), classes=["car"])


def npz(path: Path, **arrays: Any) -> str:
    np.savez(path / "x.npz", **arrays)
    return str(path / "x.npz")


PIXELS = np.random.default_rng(0).integers(0, 256, (3, 4, 6, 3), np.uint8)
FLOATS = np.random.default_rng(0).standard_normal((3, 2, 5))


@pytest.mark.parametrize(
    ("arrays", "kind", "shape"),
    [
        ({"masks": np.stack([MASK] * 3).astype(np.int64)}, "mask", (4, 4)),
        ({"targets": np.ones((3, 5), np.float32)}, "values", (5,)),
        ({"targets": np.repeat(np.repeat(PIXELS, 2, 1), 2, 2)}, "image", (3, 8, 8)),
        ({"targets": np.arange(3)}, "class", ()),
    ],
)
def test_an_npz_of_images_and_targets(tmp_path: Path, arrays: dict[str, Any], kind: str, shape: tuple[int]) -> None:
    images = load_images(npz(tmp_path, images=PIXELS, **arrays)).prepared(HOW)
    assert images.target_kind == kind
    require_decodable(images)
    assert tuple(images.targets([0, 2]).shape) == (2, *shape)  # type: ignore[union-attr]
    assert images.labels.tolist() == ([0, 1, 2] if kind == "class" else [-1] * 3)


def test_an_npz_of_tensors(tmp_path: Path) -> None:
    made = load_source(npz(tmp_path, inputs=FLOATS, targets=FLOATS[:, 0]))
    assert isinstance(made, Examples)
    assert made.target_kind == "values"
    assert torch.equal(made.inputs([1]), torch.from_numpy(FLOATS[1:2]).float())  # type: ignore[arg-type]
    labelled = load_source(npz(tmp_path, inputs=FLOATS, labels=np.arange(3), class_names=["a", "b", "c"]))
    assert (labelled.labels.tolist(), labelled.class_names) == ([0, 1, 2], ("a", "b", "c"))
    with pytest.raises(DataError, match="holds tensors as a network takes them, expected images"):
        load_images(npz(tmp_path, inputs=FLOATS))


def test_an_npz_of_several_inputs(tmp_path: Path) -> None:
    path = npz(tmp_path, **{"input.depth": FLOATS[:, :1], "input.image": FLOATS, "targets": np.arange(3)})
    made = load_source(path, Signature(2, ("image", "depth")))
    assert isinstance(made, Examples)
    assert made.input_names == ("image", "depth")
    assert [tuple(tensor.shape) for tensor in made.inputs([0, 1])] == [(2, 2, 5), (2, 1, 5)]
    assert made.labels.tolist() == [0, 1, 2]


# a loader on the command line

LOADER = """
import torch
from torch.utils.data import DataLoader, TensorDataset
from beside_my import COUNT

X = torch.arange(COUNT * 4.0).reshape(COUNT, 4) - 9
ready = DataLoader(TensorDataset(X, torch.arange(COUNT) % 2), batch_size=2)
nothing = None

def loader(count=COUNT):
    return ready if count == COUNT else DataLoader(TensorDataset(X[:count]))

def batches():
    yield X[:3]
    yield X[3:]

def folder():
    return "FOLDER"

def again():
    return __file__ + ":again"

def fails():
    raise OSError("the disk is gone")
"""


@pytest.fixture
def code(tmp_path: Path) -> Path:
    (tmp_path / "beside_my.py").write_text("COUNT = 6\n")
    (tmp_path / "photos").mkdir()
    picture(tmp_path / "photos" / "a.png")
    (tmp_path / "my.py").write_text(LOADER.replace("FOLDER", str(tmp_path / "photos")))
    return tmp_path / "my.py"


@pytest.mark.parametrize(
    ("name", "count"), [("loader", 6), ("ready", 6), ("batches", 6), ("loader(count=3)", 3), ("X", 6)]
)
def test_a_loader_is_named_like_a_model(code: Path, name: str, count: int) -> None:
    made = load_source(f"{code}:{name}")
    assert isinstance(made, Examples)
    assert len(made) == count


def test_a_loader_may_name_a_folder(code: Path) -> None:
    assert isinstance(load_source(f"{code}:folder"), Images)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("loadr", "has no loader 'loadr'. Did you mean 'loader'"),
        ("nothing", "has no loader 'nothing'"),
        ("again", "expected a loader, a Dataset, arrays or the name of a folder"),
        ("fails", r"raised OSError: the disk is gone, at .*my\.py:\d+"),
        ("loader(number=3)", "raised TypeError"),
    ],
)
def test_a_loader_that_is_none_is_named(code: Path, name: str, words: str) -> None:
    with pytest.raises(DataError, match=words):
        load_source(f"{code}:{name}")


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"there is no file .*gone\.py'; give the Python file that holds the loader"):
        load_source(f"{tmp_path / 'gone.py'}:loader")
    with pytest.raises(DataError, match="module 'no_such_module' is not here"):
        load_source("no_such_module:loader")


# what is wrong with a folder


def _without_mask(folder: Path) -> None:
    masks_apart(folder)
    (folder / "masks" / "a.png").unlink()


def _without_image(folder: Path) -> None:
    masks_apart(folder)
    (folder / "images" / "a.jpg").unlink()


def _two_of_a_name(folder: Path) -> None:
    masks_apart(folder)
    picture(folder / "images" / "a.png")


def _some_beside(folder: Path) -> None:
    masks_beside(folder)
    picture(folder / "alone.png")


def _other_size(folder: Path) -> None:
    masks_apart(folder)
    mask(folder / "masks" / "a.png", MASK[:3])


def _colours(folder: Path) -> None:
    masks_apart(folder)
    picture(folder / "masks" / "a.png")


def _damaged(folder: Path) -> None:
    masks_apart(folder)
    (folder / "masks" / "a.png").write_bytes(b"no picture")


def _no_multiple(folder: Path) -> None:
    picture(folder / "lr" / "a.png")
    picture(folder / "hr" / "a.png", 10, (12, 9))


def _two_files(folder: Path) -> None:
    coco(folder)
    coco(folder, "instances_val.json")


def _coco(**changed: Any) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        coco(folder, **changed)

    make.__name__ = f"{next(iter(changed))}"
    return make


def _annotation(**changed: Any) -> Callable[[Path], None]:
    return _coco(annotations=[{**COCO["annotations"][0], **changed}])


def _npz(**arrays: Any) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        npz(folder, **arrays)

    return make


WRONG: list[tuple[Callable[[Path], None], str]] = [
    (_without_mask, r"1 of 3 images .* no file of the same name among the masks \(first: 'a\.jpg'\)"),
    (_without_image, r"1 of the masks of .* belong to no image \(first: 'a\.png'\)"),
    (_two_of_a_name, r"'a\.jpg' and 'a\.png' of .* one name but for the ending"),
    (_some_beside, r"1 of 4 images .* among the masks \(first: 'alone\.png'\)"),
    (_other_size, r"image 'images/a\.jpg' .* mask has 6 x 3 pixels, the image 6 x 4"),
    (_colours, r"image 'images/a\.jpg' .* pixel format 'RGB', expected class indices"),
    (_damaged, r"image 'images/a\.jpg' .* has no usable target"),
    (_no_multiple, "12 x 9 pixels, expected a whole multiple"),
    (_two_files, r"several files of annotations \(annotations\.json, instances_val\.json\); give one"),
    (_coco(images=[]), "names no images"),
    (_coco(images=[{"id": 1}]), "whose file_name is 'None', expected a path"),
    (_coco(images=[{"id": 1, "file_name": "gone.png"}]), "1 of 1 files named in .*annotations.json' don't exist"),
    (_coco(images=[{"id": 1, "file_name": "../a.png"}]), "lies outside its folder"),
    (_coco(images=[{"id": "x", "file_name": "a.png"}]), "whose id is 'x'"),
    (_coco(images={"a": 1}), "has no list of images"),
    (_coco(categories=[1]), "has no list of categories"),
    (_annotation(image_id=[8]), r"annotation whose image_id is '\[8\]', which is not in it"),
    (_annotation(category_id=8), "annotation whose category_id is '8'"),
    (_annotation(bbox=[1, 2, 3]), r"has the bbox '\[1, 2, 3\]', expected"),
    (_annotation(bbox=[1, 2, 3, float("nan")]), "has the bbox"),
    (_annotation(bbox=[1, 2, 3, 10**400]), "has the bbox"),
    (_npz(images=PIXELS, masks=np.zeros((2, 4, 6), np.uint8)), "has 3 images and 2 masks"),
    (_npz(images=PIXELS, masks=np.zeros((3, 4, 5), np.uint8)), "mask has 5 x 4 pixels, the image 6 x 4"),
    (_npz(images=PIXELS, masks=np.zeros((3, 4, 6), np.uint8), labels=np.zeros(3, int)), "holds labels and masks; keep"),
    (_npz(inputs=FLOATS, targets=FLOATS[:2]), "holds 3 of the input, 2 of targets"),
    (_npz(inputs=FLOATS * np.nan), "holds NaN"),
    (_npz(inputs=np.array(3.0)), "'inputs' in .* is no array of samples"),
    (_npz(inputs=np.array(["a", "b"])), "is an array of <U1"),
    (_npz(**{"inputs": FLOATS, "input.a": FLOATS}), "holds 'inputs' and 'input.a'; keep one"),
    (_npz(**{"input.a": FLOATS, "input.b": FLOATS[:2]}), "holds 3 of a, 2 of b"),
]


@pytest.mark.parametrize(("make", "words"), WRONG, ids=[f"{i} {make.__name__}" for i, (make, _) in enumerate(WRONG)])
def test_what_is_wrong_is_named(tmp_path: Path, make: Callable[[Path], None], words: str) -> None:
    make(tmp_path)
    source = tmp_path / "x.npz" if (tmp_path / "x.npz").exists() else tmp_path
    with pytest.raises(DataError, match=words) as caught:
        require_decodable(load_source(str(source)).prepared(HOW))
    assert "\n" not in str(caught.value)


def test_a_file_that_is_no_annotation(tmp_path: Path) -> None:
    for text, words in (
        ("[1]", "holds a list, expected an object"),
        ("{", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
    ):
        coco(tmp_path)
        (tmp_path / "annotations.json").write_text(text)
        with pytest.raises(DataError, match=words):
            load_images(str(tmp_path))
