from __future__ import annotations

import csv
import json
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

from compressor.errors import DataError, RecipeError
from compressor.inputs import splits
from compressor.inputs.images import Images, Preprocessing, batches, overridden, require_decodable
from compressor.inputs.sources import load_images, require_labels

GREY = Preprocessing((8, 8), (8,), "bilinear", (0.0,), (1.0,))
RGB = Preprocessing((4, 4), (4,), "bilinear", (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))


def _picture(path: Path, colour: tuple[int, int, int] = (10, 20, 30), size: tuple[int, int] = (6, 4)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)


def _classes(folder: Path, each: int = 3) -> Path:
    for c, name in enumerate(("ants", "bees")):
        for i in range(each):
            _picture(folder / name / f"{i}.png", (c * 100, i, 0))
    return folder


def _table(folder: Path, header: list[str], rows: list[list[object]]) -> Path:
    with (folder / "labels.csv").open("w", newline="") as file:
        csv.writer(file).writerows([header, *rows])
    return folder


def _npz(path: Path, **arrays: object) -> Path:
    np.savez(path, **arrays)  # type: ignore[arg-type]
    return path


# sources


def test_a_folder_per_class_counts_classes_alphabetically(tmp_path: Path) -> None:
    images = load_images(str(_classes(tmp_path)))
    assert images.class_names == ("ants", "bees")
    assert images.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert images.names[3] == "bees/0.png"


def test_given_classes_fix_the_indices(tmp_path: Path) -> None:
    images = load_images(str(_classes(tmp_path)), classes=["wasps", "bees", "ants"])
    assert images.labels.tolist() == [2, 2, 2, 1, 1, 1]
    with pytest.raises(DataError, match=r"class 'ants' .*Did you mean 'ant'"):
        load_images(str(tmp_path), classes=["ant", "bee"])


def test_an_archive_without_labels_is_asked_for_them_in_its_own_words(tmp_path: Path) -> None:
    np.savez(tmp_path / "some.npz", images=np.zeros((2, 4, 4, 3), dtype=np.uint8))
    with pytest.raises(DataError, match=r"2 of 2 images .* have no label .*store 'labels' in the \.npz") as caught:
        require_labels(load_images(str(tmp_path / "some.npz")), 10)
    assert "folder" not in str(caught.value)


def test_a_folder_of_loose_images_has_no_labels(tmp_path: Path) -> None:
    _picture(tmp_path / "a.png")
    images = load_images(str(tmp_path))
    assert images.labels.tolist() == [-1]
    with pytest.raises(DataError, match=r"1 of 1 images .* have no label"):
        require_labels(images, 10)


@pytest.mark.parametrize("header", [["filename", "label"], ["extra", "path", "class"], ["File", "Index", "note"]])
def test_labels_csv_under_any_usual_header(tmp_path: Path, header: list[str]) -> None:
    _picture(tmp_path / "deep" / "a.png")
    _picture(tmp_path / "b.png")
    values = {"filename": "b.png", "path": "b.png", "File": "b.png"}
    row = [values.get(column, "1") for column in header]
    images = load_images(str(_table(tmp_path, header, [[v.replace("b.", "deep/a.") for v in row], list(row)])))
    assert images.names == ("deep/a.png", "b.png")
    assert images.labels.tolist() == [1, 1]


def test_labels_csv_with_names_and_gaps(tmp_path: Path) -> None:
    for name in "abc":
        _picture(tmp_path / f"{name}.png")
    rows: list[list[object]] = [["a.png", "dog"], ["b.png", "cat"], ["c.png", ""]]
    images = load_images(str(_table(tmp_path, ["filename", "label"], rows)))
    assert images.class_names == ("cat", "dog")
    assert images.labels.tolist() == [1, 0, -1]


def test_an_npz_holds_pixels_as_they_are(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (5, 4, 4, 3), np.uint8)
    images = load_images(str(_npz(tmp_path / "x.npz", images=pixels, labels=np.arange(5) % 2))).prepared(RGB)
    assert images.labels.tolist() == [0, 1, 0, 1, 0]
    expected = torch.from_numpy(pixels[3]).permute(2, 0, 1).float() / 255
    assert torch.equal(images[3], expected)


def test_a_torchvision_data_set_by_name() -> None:
    images = load_images("torchvision:FakeData(size=6, image_size=(3, 4, 4), num_classes=3)").prepared(RGB)
    assert len(images) == 6
    assert set(images.labels.tolist()) <= {0, 1, 2}
    assert images[5].shape == (3, 4, 4)


def test_a_torchvision_data_set_on_disk(tmp_path: Path) -> None:
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    pixels, labels = np.arange(2 * 784, dtype=np.uint8).reshape(2, 28, 28), np.array([7, 3], np.uint8)
    for part in ("train", "t10k"):  # the idx format: magic number, sizes, bytes
        shape = np.array([2051, 2, 28, 28], ">i4").tobytes()
        (raw / f"{part}-images-idx3-ubyte").write_bytes(shape + pixels.tobytes())
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(np.array([2049, 2], ">i4").tobytes() + labels.tobytes())
    images = load_images("torchvision:MNIST(train=False)", root=str(tmp_path))
    assert images.labels.tolist() == [7, 3]
    assert images.class_names[7].startswith("7")
    assert np.array_equal(np.asarray(images.read("1")), pixels[1])


def test_digits_parts_are_fixed_and_disjoint() -> None:
    whole, training, held_out = (load_images(f"digits{part}") for part in ("", ":training", ":evaluation"))
    assert (len(whole), len(training), len(held_out)) == (1797, 1078, 719)
    splits.require_disjoint(training, held_out)
    assert sorted(training.names + held_out.names) == list(whole.names)
    shares = np.bincount(held_out.labels) / np.bincount(whole.labels)
    assert np.abs(shares - 0.4).max() < 0.01  # classes hold 174 to 183 images


def test_digits_parts_are_those_the_embedded_models_were_trained_on() -> None:
    index = json.loads((Path(__file__).parents[2] / "models" / "index.json").read_text())
    for entry in index["models"].values():
        for part in ("training", "evaluation"):
            assert load_images(f"digits:{part}").content_hash() == entry["training"][f"{part}_hash"]


def test_real_label_files(shared_data: Path) -> None:
    calibration = load_images(str(shared_data / "imagenet" / "calibration"))
    assert sorted(calibration.labels.tolist()) == list(range(1000))
    evaluation = load_images(str(shared_data / "imagenet" / "evaluation"))
    assert len(evaluation) == 600
    insects = load_images(str(shared_data / "hymenoptera"))
    by_folder = load_images(str(shared_data / "hymenoptera" / "val"))
    assert (len(insects), len(by_folder)) == (398, 153)
    assert by_folder.class_names == ("ants", "bees")


# bad input


def _empty(folder: Path) -> str:
    return str(folder)


def _nothing(folder: Path) -> str:
    return str(folder / "nothing")


def _missing_file(folder: Path) -> str:
    _picture(folder / "a.png")
    return str(_table(folder, ["filename", "label"], [["a.png", 0], ["gone.png", 1]]))


def _no_label_column(folder: Path) -> str:
    return str(_table(folder, ["filename", "colour"], [["a.png", "red"]]))


def _no_rows(folder: Path) -> str:
    return str(_table(folder, ["filename", "label"], []))


def _not_text(folder: Path) -> str:
    (folder / "labels.csv").write_bytes(b"filename,label\n\xff\xfe.png,1\n")
    return str(folder)


def _negative_label(folder: Path) -> str:
    _picture(folder / "a.png")
    return str(_table(folder, ["filename", "label"], [["a.png", -2]]))


def _train_and_val(folder: Path) -> str:
    _classes(folder / "train")
    _classes(folder / "val")
    return str(folder)


def _beside_classes(folder: Path) -> str:
    _picture(_classes(folder) / "loose.jpg")
    return str(folder)


def _mixed_sizes(folder: Path) -> str:
    mixed = np.empty(2, object)
    mixed[:] = [np.zeros((2, 2, 3), np.uint8), np.zeros((3, 3, 3), np.uint8)]
    return str(_npz(folder / "x.npz", images=mixed, labels=np.zeros(2, int)))


def _float_pixels(folder: Path) -> str:
    return str(_npz(folder / "x.npz", images=np.zeros((2, 4, 4, 3)), labels=np.zeros(2, int)))


def _channels_first(folder: Path) -> str:
    return str(_npz(folder / "x.npz", images=np.zeros((2, 3, 4, 4), np.uint8), labels=np.zeros(2, int)))


def _fewer_labels(folder: Path) -> str:
    return str(_npz(folder / "x.npz", images=np.zeros((2, 4, 4, 3), np.uint8), labels=np.zeros(1, int)))


def _other_keys(folder: Path) -> str:
    return str(_npz(folder / "x.npz", x=np.zeros(2)))


def _not_npz(folder: Path) -> str:
    (folder / "x.npz").write_text("hello")
    return str(folder / "x.npz")


def _cut_npz(folder: Path) -> str:
    path = _npz(folder / "x.npz", images=np.zeros((2, 4, 4, 3), np.uint8), labels=np.zeros(2, int))
    data = bytearray(path.read_bytes())
    data[150:170] = bytes(range(20))
    path.write_bytes(bytes(data))
    return str(path)


def _labelled(*labels: object) -> Callable[[Path], str]:
    """A table with those labels, one image each."""

    def make(folder: Path) -> str:
        rows = [[f"{i}.png", label] for i, label in enumerate(labels)]
        for name, _ in rows:
            _picture(folder / str(name))
        return str(_table(folder, ["filename", "label"], rows))

    make.__name__ = f"label {str(labels[-1])[:20]}"
    return make


def _naming(name: str) -> Callable[[Path], str]:
    """A table in a folder of its own that names that file; `outside.png` lies beside the folder."""

    def make(folder: Path) -> str:
        _picture(folder / "outside.png")
        (folder / "set" / "deep").mkdir(parents=True)
        # by hand: until Python 3.11 its csv module writes no NUL
        (folder / "set" / "labels.csv").write_text(f"filename,label\n{name.format(folder=folder)},0\n")
        return str(folder / "set")

    make.__name__ = f"file {name[:20]}"
    return make


def _two_labels(folder: Path) -> str:
    _picture(folder / "a.png")
    return str(_table(folder, ["filename", "label"], [["a.png", 0], ["./a.png", 1]]))


def _empty_class(folder: Path) -> str:
    (_classes(folder) / "asps").mkdir()
    return str(folder)


def _npz_labels(*labels: int, dtype: str = "int64", **more: object) -> Callable[[Path], str]:
    def make(folder: Path) -> str:
        images = np.zeros((len(labels), 4, 4, 3), np.uint8)
        return str(_npz(folder / "x.npz", images=images, labels=np.array(labels, dtype), **more))

    make.__name__ = f"npz label {labels[-1]}"
    return make


def _terabytes(folder: Path) -> str:
    """A header that declares 4 TB, as a corrupt file may."""
    with zipfile.ZipFile(folder / "x.npz", "w") as archive:
        header = b"{'descr': '|u1', 'fortran_order': False, 'shape': (4, 10**6, 10**6, 3), }".replace(
            b"10**6", b"1000000"
        )
        header += b" " * (118 - len(header) - 1) + b"\n"
        archive.writestr("images.npy", b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header)
    return str(folder / "x.npz")


BAD: list[tuple[Callable[[Path], str], str]] = [
    (_labelled(0, 10**9), "has label '1000000000', expected class indices .* column of ids"),
    (_labelled(0, 20_000_000), "has label '20000000'"),
    (_labelled(10**20), "has label '1{1}0{19}"),
    (_labelled("9" * 5000), "has label '99999"),
    (_labelled(0, "--1"), "has label '--1', which is neither a class index"),
    (_labelled("²"), "has label '²', which is neither a class index"),
    (_labelled("0.0", "1.0"), "has label '0.0', which is neither"),
    (_labelled("cat", "1e9"), "has label '1e9', which is neither"),
    (_labelled("cat", "d" * 5000), "class name of 5000 characters"),
    (_two_labels, r"gives './a\.png' the labels 0 and 1; keep one row"),
    (_empty_class, r"1 of 3 class folders .* hold no images \('asps'\); .*remove"),
    (_naming("../outside.png"), "names '../outside.png', which lies outside its folder"),
    (_naming("deep/../../outside.png"), "which lies outside its folder"),
    (_naming("{folder}/outside.png"), "which lies outside its folder"),
    (_naming("a" * 5000), r"don't exist \(first: 'aaa.*\.\.\.'\)"),
    (_naming("a\0b.png"), "don't exist|is not a table"),
    (_npz_labels(0, 10**9), "has label 1000000000, expected class indices"),
    (_npz_labels(0, 2**64 - 1, dtype="uint64"), "has label 18446744073709551615"),
    (_npz_labels(0, -2), "has label -2, outside 0"),
    (_npz_labels(0, 2, class_names=np.array(["a", "b"])), "has label 2, outside 0 to 1, the last of 'class_names'"),
    (_npz_labels(0, 1, class_names=np.array("a")), "is not an .npz of images"),
    (_terabytes, "is not an .npz of images and labels|mixed sizes"),
    (_empty, "holds no images; expected one folder per class"),
    (_nothing, "neither a folder nor a file"),
    (_missing_file, r"1 of 2 files named in .*first: 'gone\.png'"),
    (_no_label_column, "has columns filename, colour; expected one named label"),
    (_no_rows, "no rows below its header"),
    (_not_text, "not a table in UTF-8"),
    (_negative_label, "label -2, outside 0 to"),
    (_train_and_val, "holds the parts train, val, not classes"),
    (_beside_classes, r"1 images \(first: 'loose\.jpg'\) lie beside the class folders"),
    (_mixed_sizes, "mixed sizes"),
    (_float_pixels, "'images' .* is float64"),
    (_channels_first, r"uint8 \[2, 3, 4, 4\]; expected uint8 \[N, H, W, 3\]"),
    (_fewer_labels, "2 images and 1 labels"),
    (_other_keys, "holds x; expected 'images' and 'labels'"),
    (_not_npz, "is not an .npz"),
    (_cut_npz, "is not an .npz"),
    (lambda _: "torchvision:CIFAR11", "no data set 'CIFAR11'. Did you mean 'CIFAR10'"),
    (lambda _: "digits:test", "digits has no part 'test'"),
]


@pytest.mark.parametrize(("make", "message"), BAD, ids=[m.__name__ for m, _ in BAD])
def test_bad_sources_are_named(tmp_path: Path, make: Callable[[Path], str], message: str) -> None:
    source = make(tmp_path)
    with pytest.raises(DataError, match=message):
        load_images(source)


def test_a_data_set_that_is_not_there_leaves_no_folder(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"can't be read under .*put the files there"):
        load_images("torchvision:CIFAR10(download=False)", root=str(tmp_path / "new"))
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    "spec", ["torchvision:FakeData(3)", "torchvision:FakeData(size=", "torchvision:FakeData(size=f())"]
)
def test_only_named_literals_are_arguments(spec: str) -> None:
    with pytest.raises((RecipeError, DataError)):
        load_images(spec)


def test_a_corrupt_image_is_named_when_it_is_needed(tmp_path: Path) -> None:
    _classes(tmp_path)
    whole = (tmp_path / "bees" / "1.png").read_bytes()
    (tmp_path / "bees" / "1.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "bees" / "2.png").write_text("not an image")
    images = load_images(str(tmp_path)).prepared(RGB)
    assert images[0].shape == (3, 4, 4)
    for index, name in ((4, "bees/1.png"), (5, "bees/2.png")):
        with pytest.raises(DataError, match=f"image '{name}' of .* can't be decoded"):
            images[index]
    with pytest.raises(DataError, match=r"bees/1\.png"):
        require_decodable(images)


def test_sixteen_bit_images_are_refused_not_clipped(tmp_path: Path) -> None:
    Image.fromarray(np.full((4, 4), 40_000, np.uint16)).save(tmp_path / "x.png")
    with pytest.raises(DataError, match="pixel format 'I;16'"):
        load_images(str(tmp_path)).prepared(GREY)[0]


def test_a_label_outside_the_model_is_named(tmp_path: Path) -> None:
    images = load_images(str(_classes(tmp_path)))
    require_labels(images, 2)
    with pytest.raises(DataError, match=r"'bees/0\.png' .* label 1, but the model tells 1 classes apart"):
        require_labels(images, 1)


def test_an_image_that_vanishes_is_named(tmp_path: Path) -> None:
    images = load_images(str(_classes(tmp_path)))
    (tmp_path / "bees" / "1.png").unlink()
    with pytest.raises(DataError, match=r"image 'bees/1\.png' of .* can't be read"):
        images.content_hash()


def test_numbers_among_names_and_signs_are_still_understood(tmp_path: Path) -> None:
    for folder, labels, expected in (("a", ["+1", "0", "-1", ""], [1, 0, -1, -1]), ("b", ["7", "7up"], [0, 1])):
        (tmp_path / folder).mkdir()
        assert load_images(_labelled(*labels)(tmp_path / folder)).labels.tolist() == expected


def test_the_same_row_twice_is_one_image_twice(tmp_path: Path) -> None:
    _picture(tmp_path / "a.png")
    images = load_images(str(_table(tmp_path, ["filename", "label"], [["a.png", 1], ["a.png", 1]])))
    assert len(images) == 2
    assert images.pixel_hash(images.names[0]) == images.pixel_hash(images.names[1])


# pre-processing


@pytest.mark.parametrize("size", [(40, 30), (30, 40), (33, 33), (31, 57)])
@pytest.mark.parametrize(("resize", "crop"), [(16, 12), (20, 20), (8, 11)])
def test_preprocessing_is_torchvisions(size: tuple[int, int], resize: int, crop: int) -> None:
    """Oracle: the transforms torchvision's own weights were evaluated with."""
    from torchvision.transforms import functional as F

    pixels = np.random.default_rng(1).integers(0, 256, (*size, 3), np.uint8)
    how = Preprocessing((crop, crop), (resize,), "bilinear", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    picture = Image.fromarray(pixels)
    images = Images("x", ("0",), np.zeros(1, np.int64), (), how, lambda _: picture, lambda _: "")
    expected = F.center_crop(F.resize(picture, [resize], F.InterpolationMode.BILINEAR), [crop])
    assert torch.equal(images[0], F.normalize(F.to_tensor(expected), list(how.mean), list(how.std)))


def test_two_entries_resize_to_exactly_that(tmp_path: Path) -> None:
    _picture(tmp_path / "a.png", size=(60, 20))
    how = overridden(RGB, size=(10, 14), resize=(12, 16))
    assert load_images(str(tmp_path)).prepared(how)[0].shape == (3, 10, 14)


def test_one_mean_makes_grey_and_three_make_colour(tmp_path: Path) -> None:
    Image.new("L", (8, 8), 51).save(tmp_path / "a.png")
    images = load_images(str(tmp_path))
    assert torch.equal(images.prepared(GREY)[0], torch.full((1, 8, 8), 0.2))
    assert torch.equal(images.prepared(RGB)[0], torch.full((3, 4, 4), 0.2))


def test_fields_are_overridden_one_by_one() -> None:
    known = Preprocessing((224, 224), (256,), "bicubic", (0.5,) * 3, (0.5,) * 3)
    assert overridden(known) == known
    assert overridden(known, mean=None, interpolation="box").interpolation == "box"
    small = overridden(known, size=112)
    assert (small.size, small.resize) == ((112, 112), (128,))
    assert overridden(known, size=112, resize=112).resize == (112,)
    assert overridden(None, size=32, mean=[0.1], std=0.2) == Preprocessing(
        (32, 32), (32, 32), "bilinear", (0.1,), (0.2,)
    )


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"size": 32}, "give --mean, --std"),
        ({"size": 0, "mean": 0.0, "std": 1.0}, "at least 1 pixel"),
        ({"size": 8, "mean": 0.0, "std": 0.0}, "above zero"),
        ({"size": 8, "mean": (0.0, 0.0), "std": (1.0, 1.0)}, "one entry each"),
        ({"size": 8, "mean": 0.0, "std": 1.0, "interpolation": "cubic"}, "'cubic' is unknown"),
        ({"sise": 8}, "no field 'sise'"),
    ],
)
def test_wrong_preprocessing_is_refused(given: dict[str, object], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        overridden(None, **given)


# batches


def test_batches_can_be_iterated_again_and_decode_once(tmp_path: Path) -> None:
    images = load_images(str(_classes(tmp_path))).prepared(RGB)
    data = batches(images, 4)
    first = list(data)
    for path in tmp_path.rglob("*.png"):
        path.unlink()
    second = list(data)
    assert [len(y) for _, y in first] == [4, 2]
    assert len(data) == 2
    assert all(torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) for a, b in zip(first, second, strict=True))
    assert first[0][0].dtype == torch.float32
    assert first[0][1].dtype == torch.int64


def test_above_the_memory_limit_nothing_is_kept(tmp_path: Path) -> None:
    images = load_images(str(_classes(tmp_path))).prepared(RGB)
    data = batches(images, 4, cache_bytes=6 * 48 - 1)  # six images of 3 x 4 x 4 bytes
    list(data)
    (tmp_path / "ants" / "0.png").unlink()
    with pytest.raises(DataError, match=r"ants/0\.png"):
        list(data)


def test_a_shuffle_depends_on_its_seed_alone(tmp_path: Path) -> None:
    data = batches(load_images(str(_classes(tmp_path, each=20))).prepared(RGB), 40)

    def order(seed: int) -> torch.Tensor:
        return next(iter(data.shuffled(seed)))[0].mean((2, 3))

    assert torch.equal(order(1), order(1))
    assert not torch.equal(order(1), order(2))
    assert torch.equal(order(1).sort(0).values, next(iter(data))[0].mean((2, 3)).sort(0).values)


# splits


def _numbered(count: int, classes: int, repeats: int = 1) -> Images:
    pixels = (np.arange(count) // repeats).astype(np.uint8).repeat(48).reshape(count, 4, 4, 3)
    labels = np.arange(count) % classes
    return Images(
        "numbered",
        tuple(f"{i:04d}" for i in range(count)),
        labels.astype(np.int64),
        tuple(map(str, range(classes))),
        RGB,
        lambda name: Image.fromarray(pixels[int(name)]),
        lambda name: pixels[int(name)].tobytes().hex(),
    )


@pytest.mark.parametrize("seed", range(4))
def test_parts_share_no_image_and_keep_the_classes_shares(seed: int) -> None:
    images = _numbered(200, classes=4)
    parts = splits.split(images, seed, calibration=40, search=20, evaluation=0.5)
    names = [set(part.names) for part in (parts.calibration, parts.search, parts.evaluation)]
    assert [len(n) for n in names] == [40, 20, 100]
    assert len(set.union(*names)) == 160
    for part in (parts.calibration, parts.search, parts.evaluation):
        counts = np.bincount(part.labels, minlength=4)
        assert counts.max() - counts.min() <= 1


def test_the_evaluation_part_does_not_depend_on_the_others() -> None:
    images = _numbered(100, classes=3)
    few = splits.split(images, 5, calibration=1, search=0, evaluation=30)
    many = splits.split(images, 5, calibration=40, search=20, evaluation=30)
    assert few.hashes["evaluation"] == many.hashes["evaluation"]
    assert few.hashes["calibration"] != many.hashes["calibration"]
    assert (
        splits.split(images, 6, calibration=1, search=0, evaluation=30).hashes["evaluation"] != few.hashes["evaluation"]
    )


def test_repeated_images_never_stand_in_two_parts() -> None:
    images = _numbered(120, classes=1, repeats=2)
    parts = splits.split(images, 0, calibration=20, search=10, evaluation=30)
    chosen = (*parts.calibration.names, *parts.search.names, *parts.evaluation.names)
    assert len({images.digest(name) for name in chosen}) == len(chosen) == 60
    assert not set(chosen) & set(parts.left_out)
    assert parts.left_out


def test_a_hash_sees_content_labels_and_order() -> None:
    images = _numbered(4, classes=2)
    hashes = {images.subset(order).content_hash() for order in ([0, 1], [1, 0], [0, 2], [0])}
    assert len(hashes) == 4


def test_too_few_images_are_counted() -> None:
    with pytest.raises(
        DataError, match=r"holds 10 different images, but 12 are asked for \(evaluation 5, calibration 4"
    ):
        splits.split(_numbered(10, classes=2), 0, calibration=4, search=3, evaluation=5)
    with pytest.raises(DataError, match="neither a number of images nor a share"):
        splits.split(_numbered(10, classes=2), 0, calibration=4, search=3, evaluation=1.5)


def test_parts_given_apart_must_not_share_an_image(tmp_path: Path) -> None:
    calibration, held_out = _classes(tmp_path / "a"), tmp_path / "b"
    _picture(held_out / "ants" / "new.png", (1, 2, 3))
    a, b = load_images(str(calibration)), load_images(str(held_out))
    parts = splits.split_apart(a, b, 0, calibration=3, search=3)
    assert parts.evaluation.names == ("ants/new.png",)
    (held_out / "ants" / "copy.png").write_bytes((calibration / "bees" / "2.png").read_bytes())
    with pytest.raises(DataError, match=r"1 of 3 images .*'bees/2\.png' = 'ants/copy\.png'"):
        splits.split_apart(a, load_images(str(held_out)), 0, calibration=3, search=3)


def _copied(folder: Path, suffix: str, **how: object) -> None:
    """Beside every PNG the same picture in another format."""
    for path in sorted(folder.rglob("*.png")):
        Image.open(path).save(path.with_suffix(suffix), **how)


COPIES: list[tuple[str, dict[str, object]]] = [
    (".bmp", {}),
    (".tiff", {}),
    (".webp", {"lossless": True}),
    (".ppm", {}),
    (".PNG", {"format": "png", "compress_level": 0}),
]


@pytest.mark.parametrize(("suffix", "how"), COPIES, ids=[suffix for suffix, _ in COPIES])
def test_an_image_stored_another_way_never_stands_in_two_parts(
    tmp_path: Path, suffix: str, how: dict[str, object]
) -> None:
    _copied(_classes(tmp_path, each=8), suffix, **how)
    images = load_images(str(tmp_path))
    assert len(images) == 32
    parts = splits.split(images, 0, calibration=6, search=4, evaluation=6)
    pictures = [
        part.read(name).convert("RGB").tobytes()
        for part in (parts.calibration, parts.search, parts.evaluation)
        for name in part.names
    ]
    assert len(set(pictures)) == len(pictures) == 16
    with pytest.raises(DataError, match="holds 16 different images, but 17 are asked for"):
        splits.split(images, 0, calibration=7, search=4, evaluation=6)


def test_grey_and_palette_copies_are_the_same_pixels(tmp_path: Path) -> None:
    grey = Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8))
    for name, mode in (("a", "L"), ("b", "RGB"), ("c", "P"), ("d", "LA"), ("e", "RGBA")):
        grey.convert(mode).save(tmp_path / f"{name}.png")
    images = load_images(str(tmp_path))
    assert len({images.digest(name) for name in images.names}) == 5
    assert len({images.pixel_hash(name) for name in images.names}) == 1


def test_copies_among_the_evaluation_images_are_refused(tmp_path: Path) -> None:
    calibration = _classes(tmp_path / "a", each=5)
    for path in calibration.rglob("*.png"):
        held_out = tmp_path / "b" / path.relative_to(calibration).with_suffix(".bmp")
        held_out.parent.mkdir(parents=True, exist_ok=True)
        Image.open(path).save(held_out)
    a, b = load_images(str(calibration)), load_images(str(tmp_path / "b"))
    with pytest.raises(DataError, match=r"6 of 6 images .* are also among the evaluation images .*\.bmp"):
        splits.split_apart(a, b, 0, calibration=6, search=0)


def test_parts_decode_each_image_once(tmp_path: Path) -> None:
    images = load_images(str(_classes(tmp_path, each=10)))
    decoded: list[str] = []

    def read(name: str) -> Image.Image:
        decoded.append(name)
        return images.read(name)

    counted = replace(images, read=read).prepared(RGB)
    parts = splits.split(counted, 0, calibration=8, search=4, evaluation=6)
    for part in (parts.calibration, parts.search, parts.evaluation):
        require_decodable(part)
    assert len(decoded) == len(set(decoded)) == 18


def test_the_order_is_fixed_for_all_time() -> None:
    """By hand from sha256 of 7:a = 82..., 7:b = ec, 7:c = 18, 7:d = d3, 7:e = 3d, 7:f = 9f; index.json relies on it.

    Class 0 is a b at 1/4 3/4, class 1 is c e f d at 1/8 3/8 5/8 7/8.
    """
    order = splits.stratified_order(["a", "b", "c", "d", "e", "f"], np.array([0, 0, 1, 1, 1, 1]), 7)
    assert order.tolist() == [2, 0, 4, 5, 1, 3]


def test_digits_are_what_scikit_learn_gives() -> None:
    scans = load_digits()
    images = load_images("digits")
    pixels = np.stack([np.asarray(images.read(name)) for name in images.names])
    np.testing.assert_array_equal(pixels, np.round(scans.images * (255 / 16)))
    np.testing.assert_array_equal(images.labels, scans.target)


def test_the_order_of_a_shuffled_pass_can_be_asked_for() -> None:
    data = batches(load_images("digits:evaluation").prepared(GREY), 32)
    whole, mixed = (torch.cat([images for images, _ in passed]) for passed in (data, data.shuffled(3)))
    assert torch.equal(whole[data.order(3)], mixed)
