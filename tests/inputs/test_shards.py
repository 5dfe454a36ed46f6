"""Tars as WebDataset writes them: the images, labels and pixels of a folder; what is wrong with one is named."""

from __future__ import annotations

import io
import random
import tarfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from compressor.errors import DataError
from compressor.inputs.images import Images, Preprocessing, batches, require_decodable
from compressor.inputs.sources import load_images, require_labels
from compressor.inputs.splits import require_disjoint, split

HOW = Preprocessing((8, 8), (8,), "bilinear", (0.5,) * 3, (0.5,) * 3)
PIXELS = np.random.default_rng(0).integers(0, 256, (12, 10, 12, 3), np.uint8)


def encoded(picture: Image.Image, form: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    picture.save(file, form, **options)
    return file.getvalue()


def png(index: int) -> bytes:
    return encoded(Image.fromarray(PIXELS[index]))


def write(path: Path, members: Mapping[str, bytes], form: int = tarfile.PAX_FORMAT, **fields: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=form) as archive:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            for field, value in fields.items():
                setattr(member, field, value)
            archive.addfile(member, io.BytesIO(content))
    return path


def labelled(start: int, count: int) -> dict[str, bytes]:
    members = {}
    for index in range(start, start + count):
        members[f"{index:06d}.png"] = png(index)
        members[f"{index:06d}.cls"] = f"{index % 3}\n".encode()
    return members


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three shards of four labelled images."""
    folder = tmp_path_factory.mktemp("shards")
    for number in range(3):
        write(folder / f"train-{number:06d}.tar", labelled(4 * number, 4))
    return folder


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same images as files, with a table of their labels."""
    folder = tmp_path_factory.mktemp("files")
    for index in range(12):
        (folder / f"{index:06d}.png").write_bytes(png(index))
    rows = [f"{index:06d}.png,{index % 3}" for index in range(12)]
    (folder / "labels.csv").write_text("\n".join(["filename,label", *rows]))
    return folder


def test_shards_are_the_folder_that_they_were_made_of(shards: Path, files: Path) -> None:
    of_shards, of_files = (load_images(str(folder)).prepared(HOW) for folder in (shards, files))
    assert of_shards.names[5] == "train-000001.tar/000005.png"
    assert of_shards.labels.tolist() == of_files.labels.tolist()
    assert of_shards.class_names == of_files.class_names == ("0", "1", "2")
    assert of_shards.content_hash() == of_files.content_hash()
    require_labels(of_shards, 3)
    require_decodable(of_shards)
    for ours, theirs in zip(batches(of_shards, 5), batches(of_files, 5), strict=True):
        assert all(torch.equal(*pair) for pair in zip(ours, theirs, strict=True))


def test_shards_are_named_by_folder_file_or_range(shards: Path) -> None:
    assert len(load_images(str(shards / "train-000001.tar"))) == 4
    some = load_images(str(shards / "train-{000001..000002}.tar"))
    assert some.names == tuple(name for name in load_images(str(shards)).names if "000000.tar" not in name)
    part = some.prepared(HOW).subset([6, 1])
    assert torch.equal(part.inputs([0])[0], load_images(str(shards)).prepared(HOW)[10])


def test_several_ranges_and_folders(tmp_path: Path) -> None:
    for place in (1, 2):
        for number in (9, 10):
            write(tmp_path / f"part{place}" / f"x-{number}.tar", {f"{place}{number}.png": png(place)})
    images = load_images(str(tmp_path / "part{1..2}" / "x-{9..10}.tar"))
    assert images.names[:2] == ("part1/x-9.tar/19.png", "part1/x-10.tar/110.png")
    assert len(set(images.names)) == 4


def test_parts_of_shards_share_no_pixels_with_files(shards: Path, files: Path) -> None:
    images = load_images(str(shards)).prepared(HOW)
    parts = split(images, 0, calibration=5, search=2, evaluation=4)
    assert len({parts.hashes[name] for name in parts.hashes}) == 3
    with pytest.raises(DataError, match=r"5 of 5 images .* are also among the evaluation images"):
        require_disjoint(parts.calibration, load_images(str(files)))


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_formats_long_names_and_folders(form: int, tmp_path: Path) -> None:
    long = "dogs/" + "n" * 90 + "/" + "d" * 60
    members = {f"./{long}/a.b.png": png(0), "cats/a.png": png(1), "README": b"not a sample", "cats/._a.png": b"a Mac's"}
    with tarfile.open(
        write(tmp_path / "x.tar", members, form, mtime=1.5 if form == tarfile.PAX_FORMAT else 1)
    ) as archive:
        assert archive.getnames()[0].endswith(f"{long}/a.b.png")
    images = load_images(str(tmp_path / "x.tar"))
    assert images.names == (f"x.tar/{long}/a.b.png", "x.tar/cats/a.png")
    assert images.labels.tolist() == [-1, -1]
    require_decodable(images)


def test_a_folder_in_a_tar_is_passed_over(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.png").write_bytes(png(0))
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        archive.add(tmp_path / "in", arcname="in")
    assert load_images(str(tmp_path / "x.tar")).names == ("x.tar/in/a.png",)


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        ({"cls": b" 2\n"}, 2),
        ({"json": b'{"label": 1, "caption": "a dog"}'}, 1),
        ({"json": b'{"cls": 0}'}, 0),
        ({"json": b'{"caption": "a dog"}', "txt": b"a dog"}, -1),
        ({"cls": b"-1"}, -1),
        ({"cls": b"4", "json": b'{"label": 4}'}, 4),
        ({}, -1),
    ],
)
def test_labels(labels: Mapping[str, bytes], expected: int, tmp_path: Path) -> None:
    members = {f"a.{ending}": content for ending, content in labels.items()}  # also in front of their image
    images = load_images(str(write(tmp_path / "x.tar", {**members, "a.png": png(0)})))
    assert images.labels.tolist() == [expected]


def test_the_image_is_the_plain_one_of_several_names(tmp_path: Path) -> None:
    path = write(tmp_path / "x.tar", {"a.seg.png": png(0), "a.JPG": encoded(Image.fromarray(PIXELS[1]), "JPEG")})
    assert load_images(str(path)).names == ("x.tar/a.JPG",)


def test_the_models_classes_name_the_labels(shards: Path) -> None:
    assert load_images(str(shards), classes=["a", "b", "c", "d"]).class_names == ("a", "b", "c", "d")
    with pytest.raises(DataError, match="label 2, outside 0 to 1"):
        load_images(str(shards), classes=["a", "b"])


FORMS: dict[str, tuple[str, Callable[[], bytes]]] = {
    "truncated": ("jpg", lambda: encoded(Image.fromarray(PIXELS[0]), "JPEG")[:-60]),
    "empty": ("jpg", lambda: b""),
    "CMYK": ("jpg", lambda: encoded(Image.fromarray(PIXELS[0]).convert("CMYK"), "JPEG")),
    "16 bit": ("png", lambda: encoded(Image.fromarray(PIXELS[0, ..., 0].astype(np.uint16) * 257))),
    "palette": ("png", lambda: encoded(Image.fromarray(PIXELS[0]).convert("P"), transparency=b"\x00\x80\xff")),
    "grey, with transparency": ("png", lambda: encoded(Image.fromarray(PIXELS[0]).convert("LA"))),
    "one bit": ("png", lambda: encoded(Image.fromarray(PIXELS[0]).convert("1"))),
    "EXIF rotation": ("jpg", lambda: rotated(6)),
}
REFUSED = {"truncated": "truncated", "empty": "cannot identify", "16 bit": r"pixel format 'I;16'"}


def rotated(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encoded(Image.fromarray(PIXELS[0]), "JPEG", exif=exif)


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_image_is_read_or_refused_alike_from_a_folder_and_a_shard(form: str, tmp_path: Path) -> None:
    ending, make = FORMS[form]
    content = make()
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / f"a.{ending}").write_bytes(content)
    write(tmp_path / "shards" / "x.tar", {f"a.{ending}": content})
    sources = [load_images(str(tmp_path / name)).prepared(HOW) for name in ("files", "shards")]
    if form in REFUSED:
        for images in sources:
            with pytest.raises(DataError, match=rf"image '(x\.tar/)?a\.{ending}' of .*{REFUSED[form]}"):
                require_decodable(images)
        return
    first, second = sources
    assert first.pixel_hash("a." + ending) == second.pixel_hash(f"x.tar/a.{ending}")
    assert torch.equal(first.inputs([0]), second.inputs([0]))


def test_exif_rotation_is_left_as_it_lies_like_torchvisions_folders(tmp_path: Path) -> None:
    write(tmp_path / "x.tar", {"a.jpg": rotated(6)})
    images = load_images(str(tmp_path / "x.tar"))
    assert images.read(images.names[0]).size == (12, 10)


def changed(path: Path, offset: int, content: bytes) -> Path:
    data = bytearray(path.read_bytes())
    data[offset : offset + len(content)] = content
    path.write_bytes(data)
    return path


def cut(path: Path, length: int) -> Path:
    path.write_bytes(path.read_bytes()[:length])
    return path


def one(path: Path, **members: bytes) -> Path:
    return write(path, {name.replace("__", "."): content for name, content in members.items()})


# what is made at a path, and what is said of it
BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "cut in an image": (lambda p: cut(one(p, a__png=png(0)), 600), r"x.tar' is cut off: 'a.png' declares \d+ bytes"),
    "cut in a header": (lambda p: cut(one(p, a__png=png(0)), 300), "ends after 300 bytes without a tar's end mark"),
    "cut at a member's end": (lambda p: cut(one(p, a__cls=b"1"), 1024), "ends after 1024 bytes without"),
    "a changed header": (lambda p: changed(one(p, a__png=png(0)), 3, b"!"), "has no tar header at byte 0"),
    "no tar": (lambda p: p.write_bytes(b"x" * 2048), "has no tar header at byte 0: it is damaged or no tar"),
    "nothing": (lambda p: p.write_bytes(b""), "ends after 0 bytes"),
    "gzip under a tar's name": (lambda p: p.write_bytes(b"\x1f\x8b" + bytes(1022)), "is compressed"),
    "no members": (lambda p: write(p, {}), "holds no samples"),
    "two tars in one": (
        lambda p: p.write_bytes(one(p, a__png=png(0)).read_bytes() * 2),
        "goes on behind its end mark",
    ),
    "a link": (
        lambda p: write(p, {"a.png": b""}, type=tarfile.SYMTYPE, linkname="/etc/passwd"),
        "'a.png', which is a link",
    ),
    "a hard link": (lambda p: write(p, {"a.png": b""}, type=tarfile.LNKTYPE, linkname="b.png"), "which is a link"),
    "a device": (lambda p: write(p, {"a.png": b""}, type=tarfile.CHRTYPE), "which is a device"),
    "outside": (lambda p: write(p, {"../a.png": png(0)}), r"'\.\./a.png', which leads outside"),
    "absolute": (lambda p: write(p, {"/a.png": png(0)}), "'/a.png', which leads outside"),
    "no image": (lambda p: one(p, a__png=png(0), b__cls=b"1", b__txt=b"x"), r"sample 'b' has no image \(cls, txt\)"),
    "two images": (lambda p: one(p, a__png=png(0), a__jpg=png(0)), r"sample 'a' has several images \(png, jpg\)"),
    "twice": (lambda p: write(p, {"a.png": png(0), "./a.png": png(1)}), r"'a.png' twice"),
    "no number": (lambda p: one(p, a__png=png(0), a__cls=b"dog"), r"'a.cls' has the label 'dog', expected a class"),
    "below": (lambda p: one(p, a__png=png(0), a__cls=b"-2"), "has the label '-2'"),
    "an id": (lambda p: one(p, a__png=png(0), a__cls=b"1000000"), "has the label 1000000, expected one below"),
    "a long label": (lambda p: one(p, a__png=png(0), a__cls=b"1" * 100), "'a.cls' has 100 bytes, too many for a label"),
    "no JSON": (lambda p: one(p, a__png=png(0), a__json=b"{"), "'a.json' is not JSON"),
    "a name as label": (lambda p: one(p, a__png=png(0), a__json=b'{"label": "dog"}'), "has the label '\"dog\"'"),
    "a switch as label": (lambda p: one(p, a__png=png(0), a__json=b'{"label": true}'), "has the label 'true'"),
    "two labels": (
        lambda p: one(p, a__png=png(0), a__cls=b"1", a__json=b'{"cls": 2}'),
        "label 1 in .cls and 2 in .json",
    ),
    "some labels": (
        lambda p: one(p, a__png=png(0), a__cls=b"1", b__png=png(1)),
        "'b.png' has no label, 'a.png' before",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_wrong_with_a_shard_is_one_line_that_names_it(name: str, tmp_path: Path) -> None:
    make, said = BROKEN[name]
    make(tmp_path / "x.tar")
    with pytest.raises(DataError, match=said) as caught:
        load_images(str(tmp_path))
    assert "x.tar" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("ending", ["tar.gz", "tgz", "tar.zst"])
@pytest.mark.parametrize("by_file", [False, True])
def test_compressed_shards_are_refused(ending: str, by_file: bool, tmp_path: Path) -> None:
    (tmp_path / f"x.{ending}").write_bytes(b"any")
    with pytest.raises(DataError, match=rf"x\.{ending}' is compressed.*unpack it to a plain \.tar"):
        load_images(str(tmp_path / f"x.{ending}" if by_file else tmp_path))


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("x-{000000..000002}.tar", r"2 of 3 shards of .* are not there \(first: .*x-000001.tar"),
        ("x-{3..1}.tar", "has the range '{3..1}', expected one that counts up"),
        ("x-{0..999999999}.tar", "of at most 100,000 shards"),
        ("y.tar", "1 of 1 shards"),
    ],
)
def test_ranges_that_can_not_be(name: str, said: str, tmp_path: Path) -> None:
    write(tmp_path / "x-000000.tar", {"a.png": png(0)})
    with pytest.raises(DataError, match=said):
        load_images(str(tmp_path / name))


def test_images_beside_shards_are_not_passed_over(tmp_path: Path) -> None:
    write(tmp_path / "x.tar", {"a.png": png(0)})
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "b.png").write_bytes(png(1))
    with pytest.raises(DataError, match=r"holds the shard 'x\.tar' and images \('b\.png'\)"):
        load_images(str(tmp_path))


def test_a_declared_size_beyond_the_file_takes_no_memory(tmp_path: Path) -> None:
    path = write(tmp_path / "x.tar", {"a.png": png(0)})
    header = tarfile.TarInfo("a.png")
    header.size = 1 << 50
    changed(path, 0, header.tobuf(tarfile.GNU_FORMAT))
    with pytest.raises(DataError, match=f"'a.png' declares {1 << 50} bytes, and the file ends"):
        load_images(str(path))


def test_a_shard_that_was_cut_since_is_noticed(tmp_path: Path) -> None:
    images: Images = load_images(str(write(tmp_path / "x.tar", {"a.png": png(0)})))
    cut(tmp_path / "x.tar", 700)
    with pytest.raises(DataError, match=r"'x.tar/a.png' of .*ends \d+ bytes too early"):
        images.pixel_hash(images.names[0])
    with pytest.raises(DataError, match=r"can't be read .* too early"):
        images.digest(images.names[0])


def test_json_deeper_than_python_reads_is_refused(tmp_path: Path) -> None:
    path = one(tmp_path / "x.tar", a__png=png(0), a__json=b"[" * 200_000)
    with pytest.raises(DataError, match=r"'a\.json' is not JSON"):
        load_images(str(path))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_changed_headers_whose_checksum_holds_give_a_result_or_one_line(form: int, tmp_path: Path) -> None:
    long = "d/" + "n" * 120
    members = {f"{long}.png": png(0), f"{long}.cls": b"1", "b.png": png(1), "b.cls": b"0"}
    path = write(tmp_path / "x.tar", members, form)
    whole, dice = path.read_bytes(), random.Random(0)
    starts = [start for start in range(0, len(whole), 512) if whole[start + 257 : start + 262] == b"ustar"]
    assert len(starts) >= 6
    for number in range(120):
        data = bytearray(whole)
        start = dice.choice(starts)
        for _ in range(dice.randint(1, 3)):
            field = dice.choice([(0, 100), (124, 136), (124, 136), (156, 157), (257, 265), (345, 500), (512, 1024)])
            data[start + dice.randrange(*field)] = dice.choice([0, 32, 48, 55, 0x80, 0xFF, dice.randrange(256)])
        header = data[start : start + 512]
        header[148:156] = b" " * 8
        data[start + 148 : start + 156] = f"{sum(header):06o}\0 ".encode()
        path.write_bytes(data)
        try:
            require_decodable(load_images(str(path)))
        except DataError as error:
            said = str(error)
        else:
            said = ""
        assert "\n" not in said, f"mutation {number}: {said}"
