"""Tars of images as WebDataset writes them in; `Images`, read by number without unpacking anything, out.

A sample is the members of one tar that share a key, which is what stands before the first dot of their base names:
`dogs/000012.jpg`, `dogs/000012.cls`. Its label is the whole number in `.cls`, or `label` or `cls` of `.json`.
https://github.com/webdataset/webdataset has the format.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image

from ..device.labels import MOST_CLASSES, UNKNOWN
from ..device.listings import SUFFIXES, shown
from ..errors import DataError, first_line
from ..records import IntArray
from .images import Images
from .tars import COMPRESSED, Member, OpenFile, compressed_error, members

_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")
_MOST_SHARDS = 100_000
_MOST_OPEN = 64  # shards whose files stay open
_MOST_IMAGE_BYTES = 1 << 29
_MOST_LABEL_BYTES = {"cls": 64, "json": 1 << 20}
_WHOLE = re.compile(r"[+-]?[0-9]{1,20}")
_JSON_LABELS = ("label", "cls")


def names_shards(source: str) -> bool:
    """Whether a source's name is one of tars: `x.tar`, `x-{000..009}.tar`, or a compressed one, to be refused."""
    return source.lower().endswith((".tar", *COMPRESSED))


def shard_files(folder: Path) -> tuple[Path, ...]:
    """The tars that lie in a folder, by name. Raises DataError for compressed ones among them."""
    files = sorted(path for path in folder.iterdir() if names_shards(path.name) and not path.name.startswith("."))
    return tuple(path for path in files if path.is_file())


def named_shards(source: str) -> tuple[Path, ...]:
    """The tars of a name with ranges: `x-{008..011}.tar` is four. Raises DataError where one of them is not there."""
    path = Path(source).expanduser()
    if path.is_file():  # whatever braces are in its name
        return (path,)
    files = tuple(Path(name) for name in _expanded(str(path), source))
    missing = [file for file in files if not file.is_file()]
    if missing:
        raise DataError(
            f"{len(missing)} of {len(files)} shards of {source!r} are not there (first: {str(missing[0])!r}); "
            "correct the path or the range"
        )
    return files


def _expanded(text: str, source: str) -> Sequence[str]:
    """Every name that a text with ranges stands for; numbers have as many digits as the first one has."""
    names = [text]
    while braces := _RANGE.search(names[0]):
        first, last = (int(digits[:20]) for digits in braces.groups())
        count = len(names) * (last - first + 1)
        if not 0 < count <= _MOST_SHARDS:
            raise DataError(
                f"{source!r} has the range {shown(braces[0])}, expected one that counts up, of at most "
                f"{_MOST_SHARDS:,} shards; correct it"
            )
        width = len(braces[1])
        numbers = [f"{number:0{width}d}" for number in range(first, last + 1)]
        names = [name.replace(braces[0], number, 1) for name in names for number in numbers]
    return names


@dataclass(frozen=True, slots=True)
class _Index:
    """Where each image lies: `length` bytes from `offset` of file number `shard`, [images] each; labels -1: unknown.

    Arrays of Python's own: 8 bytes a number, as numpy's, and a single one is read without being wrapped.
    """

    shard: array[int]
    offset: array[int]
    length: array[int]
    labels: IntArray


def shard_images(source: str, files: Sequence[Path], classes: Sequence[str] | None = None) -> Images:
    """The images of several tars, named by tar and member; `classes` are names of the labels where they are known.

    Raises DataError, naming tar and member, for a tar that is damaged or compressed, for samples without an image or
    with several, labels that are none, and where only some samples have one.
    """
    for file in files:
        if not file.name.lower().endswith(".tar"):
            raise compressed_error(str(file))
    names, index = _indexed(files)
    return _images(source, files, names, index, _class_names(index.labels, classes, source))


def _images(
    source: str, files: Sequence[Path], names: tuple[str, ...], index: _Index, class_names: tuple[str, ...]
) -> Images:
    number_of = {name: number for number, name in enumerate(names)}
    opened: Callable[[Path], OpenFile] = lru_cache(_MOST_OPEN)(OpenFile)

    def content(name: str) -> bytes:
        number = number_of[name]
        file = opened(files[index.shard[number]])
        return file.content(index.offset[number], index.length[number])

    def read(name: str) -> Image.Image:
        return Image.open(io.BytesIO(content(name)))

    @lru_cache(None)
    def digest(name: str) -> str:
        try:
            return hashlib.sha256(content(name)).hexdigest()
        except OSError as error:
            raise DataError(
                f"image {name!r} of {source!r} can't be read ({error}); give the shard that it was"
            ) from error

    return Images(source, names, index.labels, class_names, None, read, digest, "shards")


def _class_names(labels: IntArray, classes: Sequence[str] | None, source: str) -> tuple[str, ...]:
    """The model's classes, else the numbers themselves; every label must have one."""
    largest = int(labels.max(initial=UNKNOWN))
    names = tuple(classes or map(str, range(largest + 1)))
    if largest >= len(names):
        raise DataError(f"{source!r} has label {largest}, outside 0 to {len(names) - 1}; correct it in its shard")
    return names


def _indexed(files: Sequence[Path]) -> tuple[tuple[str, ...], _Index]:
    """Names and places of all images, from the headers; what else is read of a tar are its labels."""
    parent = Path(os.path.commonpath([file.parent.absolute() for file in files]))
    names: list[str] = []
    shards, offsets, lengths, labels = (array("q") for _ in range(4))
    first: _Sample | None = None
    for number, file in enumerate(files):
        shard = file.absolute().relative_to(parent).as_posix()
        for sample in _samples_of(file):
            first = first or sample
            _require_alike(sample, first, file)
            names.append(f"{shard}/{sample.image.name}")
            shards.append(number)
            offsets.append(sample.image.offset)
            lengths.append(sample.image.length)
            labels.append(sample.index)
    return tuple(names), _Index(shards, offsets, lengths, np.array(labels, np.int64))


@dataclass(frozen=True, slots=True)
class _Sample:
    """An image and its label; None: it has none."""

    image: Member
    label: int | None

    @property
    def index(self) -> int:
        """The label as it is stored, -1 for none."""
        if self.label is None:
            return UNKNOWN
        return self.label


def _require_alike(sample: _Sample, first: _Sample, file: Path) -> None:
    if (sample.label is None) == (first.label is None):
        return
    has, had = ("no label", "one") if sample.label is None else ("a label", "none")
    raise DataError(
        f"{str(file)!r}: {shown(sample.image.name)} has {has}, {shown(first.image.name)} before it has {had}; give all "
        "samples a label or none (-1 where one is not known)"
    )


def _samples_of(file: Path) -> Iterator[_Sample]:
    """One tar's, in the order of their first members."""
    members_of: dict[str, dict[str, Member]] = {}  # by key, then by what stands behind its dot
    for member in members(file):
        folder, slash, base = member.name.rpartition("/")
        stem, dot, ending = base.partition(".")
        if not dot or not stem:  # without an ending, or hidden: some system's own
            continue
        sample = members_of.setdefault(folder + slash + stem, {})
        if ending.lower() in sample:
            raise DataError(f"{str(file)!r} holds {shown(member.name)} twice; write each sample once")
        sample[ending.lower()] = member
    if not members_of:
        raise DataError(f"{str(file)!r} holds no samples; expected members such as 000000.jpg and 000000.cls")

    opened = OpenFile(file)
    for key, sample in members_of.items():
        yield _Sample(_image_of(key, sample, file), _label_of(key, sample, file, opened))


def _image_of(key: str, sample: Mapping[str, Member], file: Path) -> Member:
    """The image of a sample: `.jpg` and the like, else the only one of `.left.jpg` and the like."""
    images = {ending: member for ending, member in sample.items() if _suffix(ending) in SUFFIXES}
    plain = {ending: member for ending, member in images.items() if "." not in ending}
    candidates = plain or images
    if len(candidates) != 1:
        count = "several images" if candidates else "no image"
        raise DataError(
            f"{str(file)!r}: the sample {shown(key)} has {count} ({', '.join(candidates or sample)}); a sample is what "
            "shares a name up to its first dot, and holds one"
        )
    (image,) = candidates.values()
    if image.length > _MOST_IMAGE_BYTES:
        raise DataError(f"{str(file)!r}: {shown(image.name)} has {image.length} bytes; make the image smaller first")
    return image


def _suffix(ending: str) -> str:
    """`left.jpg` is a `.jpg`."""
    return f".{ending.rpartition('.')[2]}"


def _label_of(key: str, sample: Mapping[str, Member], file: Path, opened: OpenFile) -> int | None:
    """What `.cls` or `.json` says, None where neither does."""
    in_cls = _label_in(sample, "cls", file, opened)
    in_json = _label_in(sample, "json", file, opened)
    if in_cls is None:
        return in_json
    if in_json not in (None, in_cls):
        raise DataError(
            f"{str(file)!r}: the sample {shown(key)} has the label {in_cls} in .cls and {in_json} in .json; keep one"
        )
    return in_cls


def _label_in(sample: Mapping[str, Member], ending: str, file: Path, opened: OpenFile) -> int | None:
    """What one of its members says. Raises DataError for a label that is none."""
    member = sample.get(ending)
    if member is None:
        return None
    try:
        if member.length > _MOST_LABEL_BYTES[ending]:
            raise ValueError(f"has {member.length} bytes, too many for a label")
        return _LABEL_READERS[ending](opened.content(member.offset, member.length))
    except (ValueError, OSError) as error:
        raise DataError(f"{str(file)!r}: {shown(member.name)} {first_line(error)}; correct it") from error


def _of_cls(content: bytes) -> int:
    return _class_index(content.decode("utf-8", "replace"))


def _of_json(content: bytes) -> int | None:
    """None where the object has no label: it may hold anything else. Raises ValueError."""
    try:
        fields = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"is not JSON ({first_line(error)})") from error
    if not isinstance(fields, dict):
        return None
    label = next((fields[name] for name in _JSON_LABELS if name in fields), None)
    if label is None:
        return None
    return _class_index(json.dumps(label))


def _class_index(text: str) -> int:
    """-1 where a class is not known. Raises ValueError for what is no class index."""
    stripped = text.strip()
    if not _WHOLE.fullmatch(stripped) or int(stripped) < UNKNOWN:
        raise ValueError(f"has the label {shown(stripped)}, expected a class index (0, 1, ...)")
    label = int(stripped)
    if label >= MOST_CLASSES:
        raise ValueError(f"has the label {label}, expected one below {MOST_CLASSES:,}: is it an id?")
    return label


_LABEL_READERS: Mapping[str, Callable[[bytes], int | None]] = {"cls": _of_cls, "json": _of_json}
