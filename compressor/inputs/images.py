"""Named images, their targets and a pre-processing in, float32 batches [N, C, H, W] out, decoded when asked for.

`sources` says where images come from, `examples` holds what needs no pre-processing, `splits` says who may see which.
Knows neither models nor recipes. Pre-processing is the one image classifiers are trained with: resize, centre crop,
scale to [0, 1], normalise.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from itertools import chain, islice
from typing import Any, Literal, Protocol, TypeAlias, TypeVar, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..device.cropping import Crop, crop_of, cropped
from ..distributed import in_turns, own_share
from ..errors import DataError, RecipeError, first_line
from ..files import content_hash
from ..records import FloatArray, IntArray
from ..tensors import Inputs
from .lookahead import in_order, usable_workers
from .samples import Sample, Target, TargetKind, Targets, stacked_targets
from .targets import pixels_of, placed_target

Interpolation = Literal["nearest", "bilinear", "bicubic", "lanczos", "box", "hamming"]

_FILTERS: dict[Interpolation, Image.Resampling] = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
    "box": Image.Resampling.BOX,
    "hamming": Image.Resampling.HAMMING,
}
_EIGHT_BIT = {"1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "LAB", "HSV"}
CACHE_BYTES = 1 << 30
"""Of samples that are kept between passes: 7,000 images at 224 px, as their pixels."""
HASHED_AHEAD = 64
"""Images that are decoded for their pixels' hash while one's hash is in use."""


@dataclass(frozen=True, slots=True)
class Preprocessing:
    """How an image becomes a tensor.

    `size` is (height, width) of the crop in pixels. `resize` of one entry is the length the shorter side
    gets before the crop, of two the exact (height, width). `mean` and `std` are of values in [0, 1];
    one entry means grey images, three mean RGB.
    """

    size: tuple[int, int]
    resize: tuple[int, ...]
    interpolation: Interpolation
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __post_init__(self) -> None:
        if len(self.size) != 2 or min(self.size) < 1:
            raise RecipeError(f"size {self.size} is not a height and a width of at least 1 pixel")
        if len(self.resize) not in (1, 2) or min(self.resize) < 1:
            raise RecipeError(f"resize {self.resize} is neither a shorter side nor a height and a width")
        if self.interpolation not in _FILTERS:
            raise RecipeError(f"interpolation {self.interpolation!r} is unknown; use one of {', '.join(_FILTERS)}")
        if len(self.mean) not in (1, 3) or len(self.std) != len(self.mean):
            raise RecipeError(
                f"mean {self.mean} and std {self.std} need one entry each (grey) or three (RGB): "
                "images have one channel or three"
            )
        if min(self.std) <= 0:
            raise RecipeError(f"std {self.std} must be above zero")

    @property
    def shape(self) -> tuple[int, int, int]:
        """[C, H, W] of one prepared image."""
        return (len(self.mean), *self.size)


def _sides(value: int | Sequence[int]) -> tuple[int, ...]:
    """224 is (224, 224)."""
    if isinstance(value, int):
        return (value, value)
    return _whole_numbers(value)


def _lengths(value: int | Sequence[int]) -> tuple[int, ...]:
    """256 is (256,), the length of the shorter side alone."""
    if isinstance(value, int):
        return (value,)
    return _whole_numbers(value)


def _whole_numbers(numbers: Sequence[int]) -> tuple[int, ...]:
    return tuple(map(int, numbers))


def _channel_values(value: float | Sequence[float]) -> tuple[float, ...]:
    """0.5 is (0.5,), of grey images."""
    if isinstance(value, Sequence):
        return tuple(map(float, value))
    return (float(value),)


# how each field of a pre-processing is read
_READERS: Mapping[str, Callable[[Any], object]] = {
    "size": _sides,
    "resize": _lengths,
    "interpolation": str,
    "mean": _channel_values,
    "std": _channel_values,
}


def overridden(preset: Preprocessing | None, **overrides: object) -> Preprocessing:
    """`preset` with the fields that are given (not None) put in their place.

    Numbers stand for `(n, n)` in `size`, `(n,)` elsewhere. A new `size` without a `resize` keeps their ratio.
    Without a preset, size, mean and std must be given; resize is then the size, bilinear. Raises RecipeError for a
    field that there is not, or one that is missing.
    """
    unknown = sorted(set(overrides) - set(_READERS))
    if unknown:
        raise RecipeError(f"pre-processing has no field {unknown[0]!r}; it has {', '.join(_READERS)}")
    fields: dict[str, Any] = {}
    for name, value in overrides.items():
        if value is not None:
            fields[name] = _READERS[name](value)

    if preset is None:
        _require_fields(fields)
        return Preprocessing(**{"resize": fields["size"], "interpolation": "bilinear", **fields})
    if "size" in fields and "resize" not in fields:
        fields["resize"] = _scaled(preset, fields["size"])
    return replace(preset, **fields)


def _require_fields(fields: Mapping[str, object]) -> None:
    """Raises RecipeError unless the fields are enough without a preset."""
    missing = [f"--{name}" for name in ("size", "mean", "std") if name not in fields]
    if missing:
        raise RecipeError(
            f"the model says nothing about its pre-processing; give {', '.join(missing)} "
            "(for example --size 224 --mean 0.485,0.456,0.406 --std 0.229,0.224,0.225; in Python size=224, mean=..., "
            "std=...)"
        )


def _scaled(preset: Preprocessing, size: tuple[int, int]) -> tuple[int, ...]:
    """224 of 256 asked for at 112 is 112 of 128."""
    if len(preset.resize) == 2:  # height and width, each by its own ratio
        sides = zip(preset.resize, size, preset.size, strict=True)
        return tuple(round(resized * new / old) for resized, new, old in sides)
    return (round(preset.resize[0] * min(size) / min(preset.size)),)


Storage = Literal["files", "shards", "npz", "arrays", "data set"]

# what to do about an image that can't be decoded
_CORRECTED: Mapping[Storage, str] = {
    "files": "replace or remove the file",
    "shards": "write the shard without it",
    "npz": "correct 'images' in the .npz",
    "arrays": "correct the array of images",
    "data set": "correct what the data set gives there",
}


@dataclass(frozen=True, slots=True)
class Images:
    """Images of one source in a fixed order; nothing is decoded before it is asked for.

    `labels` holds -1 where none is known. `read` and `digest` take a name; a digest is the sha256 of
    what the source stores (a file's bytes, an array's values), so equal digests mean equal images. Unequal ones
    don't mean unequal images, as one picture can be stored in many ways: `pixel_hash` tells that. `storage` is what
    the user gave them as, in whose words messages say what to do.

    Where targets are no class indices, `target_of` takes a name and gives what the source stores (`targets` says how
    each `target_kind` is read), and a digest is of the image and its target.
    """

    source: str
    names: tuple[str, ...]
    labels: IntArray
    class_names: tuple[str, ...]
    preprocessing: Preprocessing | None
    read: Callable[[str], Image.Image]
    digest: Callable[[str], str]
    storage: Storage = "files"
    seen: dict[str, str] = field(default_factory=dict, repr=False, compare=False)  # shared by all parts of a source
    target_of: Callable[[str], object] | None = None
    target_kind: TargetKind = "class"

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> Tensor:
        """One prepared image, float32 [C, H, W]."""
        return normalised(self.pixels(index)[None], _preprocessing_of(self))[0]

    def pixels(self, index: int) -> Tensor:
        """One resized and cropped image, uint8 [C, H, W]."""
        return _cropped(_decoded(self, self.names[index]), _preprocessing_of(self))

    def sample(self, index: int) -> Sample:
        """One image's pixels, uint8 [C, H, W], and its target on the same crop.

        Raises DataError where either can't be decoded.
        """
        if self.target_of is None:
            return Sample(self.pixels(index), torch.from_numpy(np.asarray(self.labels[index])))
        picture = _decoded(self, self.names[index])
        return Sample(_cropped(picture, _preprocessing_of(self)), _target(self, index, picture))

    def batch(self, samples: Sequence[Sample]) -> tuple[Tensor, Targets]:
        """Samples as the network takes them: float32 [N, C, H, W], and their targets.

        Images as targets become float32 as the inputs do, masks int64.
        """
        preprocessing = _preprocessing_of(self)
        pixels = torch.stack([cast(Tensor, sample.inputs) for sample in samples])
        targets = stacked_targets(samples, self.source)
        if self.target_kind == "image":
            targets = normalised(cast(Tensor, targets), preprocessing)
        elif self.target_kind == "mask":
            targets = cast(Tensor, targets).long()
        return normalised(pixels, preprocessing), targets

    def inputs(self, indices: Sequence[int] | IntArray) -> Tensor:
        """The images at those positions, float32 [N, C, H, W]."""
        pixels = torch.stack([self.pixels(int(index)) for index in indices])
        return normalised(pixels, _preprocessing_of(self))

    def targets(self, indices: Sequence[int] | IntArray) -> Targets:
        """The targets at those positions; of classes int64 [N], without decoding an image."""
        if self.target_of is None:
            return torch.from_numpy(self.labels[np.asarray(indices, dtype=np.int64)])
        return self.batch([self.sample(int(index)) for index in indices])[1]

    def pixel_hash(self, name: str) -> str:
        """Hash of the decoded image as 8-bit RGB, before it is resized; each image is decoded for it once.

        Raises DataError for an image that can't be decoded.
        """
        if name not in self.seen:
            image = _decoded(self, name).convert("RGB")
            self.seen[name] = hashlib.sha256(repr(image.size).encode() + image.tobytes()).hexdigest()
        return self.seen[name]

    def subset(self, indices: Sequence[int] | IntArray) -> Images:
        """The images at those positions, in that order."""
        chosen = np.asarray(indices, dtype=np.int64)
        return replace(self, names=tuple(self.names[i] for i in chosen), labels=self.labels[chosen])

    def joined(self, other: Images) -> Images:
        """These images and those of another part of the same source behind them."""
        return replace(self, names=self.names + other.names, labels=np.concatenate([self.labels, other.labels]))

    def labelled(self, labels: IntArray) -> Images:
        """The same images with other class indices [N], in their order."""
        return replace(self, labels=labels, target_of=None, target_kind="class")

    def prepared(self, preprocessing: Preprocessing) -> Images:
        """The same images, which become tensors that way."""
        return replace(self, preprocessing=preprocessing)

    def content_hash(self) -> str:
        """sha256 over every image's content and label, in order; reads all images."""
        return content_hash(*(self.digest(name) for name in self.names), self.labels)


def numbered(count: int) -> tuple[str, ...]:
    """Names of images that have none, all equally long, so that they sort as they count: 00 to 10 of eleven."""
    digits = len(str(count - 1))
    return tuple(f"{i:0{digits}d}" for i in range(count))


def _preprocessing_of(images: Images) -> Preprocessing:
    if images.preprocessing is None:
        raise DataError(f"images of {images.source} have no pre-processing yet; call images.prepared(...) first")
    return images.preprocessing


def _decoded(images: Images, name: str) -> Image.Image:
    try:
        image = images.read(name)
        image.load()
    except Exception as error:  # a decoder's errors are of every kind
        raise DataError(
            f"image {name!r} of {images.source} can't be decoded ({error}); {_CORRECTED[images.storage]}"
        ) from error
    if image.mode not in _EIGHT_BIT:
        raise DataError(
            f"image {name!r} of {images.source} has pixel format {image.mode!r}, expected 8 bits a channel; convert it"
        )
    if image.mode == "LAB":  # turns into grey by way of RGB only
        return image.convert("RGB")
    return image


def _target(images: Images, index: int, picture: Image.Image) -> Target:
    """The target of a picture on its crop. Raises DataError where it can't be read, or is none of its kind."""
    assert images.target_of is not None
    name, preprocessing = images.names[index], _preprocessing_of(images)
    try:
        return placed_target(
            images.target_of(name),
            picture,
            kind=images.target_kind,
            crop=_crop_of(picture, preprocessing),
            channels=len(preprocessing.mean),
            resampling=_FILTERS[preprocessing.interpolation],
        )
    except DataError:
        raise
    except Exception as error:  # a decoder's errors are of every kind
        reason = first_line(error)
        raise DataError(f"image {name!r} of {images.source} has no usable target: {reason}; correct it") from error


def _crop_of(picture: Image.Image, preprocessing: Preprocessing) -> Crop:
    return crop_of(picture, preprocessing.size, preprocessing.resize)


def _cropped(picture: Image.Image, preprocessing: Preprocessing) -> Tensor:
    """Resized and cropped, uint8 [C, H, W]."""
    mode = "L" if len(preprocessing.mean) == 1 else "RGB"
    if picture.mode != mode:  # else a copy would be made
        picture = picture.convert(mode)
    return pixels_of(cropped(picture, _crop_of(picture, preprocessing), _FILTERS[preprocessing.interpolation]))


def normalised(pixels: Tensor, preprocessing: Preprocessing) -> Tensor:
    """uint8 [N, C, H, W] to float32, (x / 255 - mean) / std."""
    mean = torch.tensor(preprocessing.mean, dtype=torch.float32).view(1, -1, 1, 1)
    std = torch.tensor(preprocessing.std, dtype=torch.float32).view(1, -1, 1, 1)
    return pixels.float().div_(255).sub_(mean).div_(std)  # in place: a batch's memory is taken once


def visible(image: FloatArray, preprocessing: Preprocessing) -> FloatArray:
    """[C, H, W] as the network takes it, back to [H, W, 3] in 0-1."""
    mean = np.array(preprocessing.mean).reshape(-1, 1, 1)
    std = np.array(preprocessing.std).reshape(-1, 1, 1)
    shown: FloatArray = np.clip(image * std + mean, 0, 1)
    if len(shown) == 1:
        shown = np.repeat(shown, 3, axis=0)
    return shown.transpose(1, 2, 0)


Kind = TypeVar("Kind", bound="Source")
Batch: TypeAlias = "tuple[Any, Any]"  # Inputs and Targets; a reader's own signature says which of them it takes


class Source(Protocol):
    """What batches are made of and parts are dealt from: `Images`, or `Examples` that need no pre-processing.

    `labels` are int64, -1 where a target is no class index, or not known. `batch` puts together what `sample` gave.
    """

    @property
    def source(self) -> str: ...
    @property
    def names(self) -> tuple[str, ...]: ...
    @property
    def labels(self) -> IntArray: ...
    @property
    def class_names(self) -> tuple[str, ...]: ...
    @property
    def preprocessing(self) -> Preprocessing | None: ...
    @property
    def target_kind(self) -> TargetKind: ...
    @property
    def storage(self) -> Storage: ...
    @property
    def digest(self) -> Callable[[str], str]: ...

    def __len__(self) -> int: ...
    def sample(self, index: int) -> Sample: ...
    def batch(self, samples: Sequence[Sample]) -> tuple[Inputs, Targets]: ...
    def inputs(self, indices: Sequence[int] | IntArray) -> Inputs: ...
    def targets(self, indices: Sequence[int] | IntArray) -> Targets: ...
    def subset(self: Kind, indices: Sequence[int] | IntArray) -> Kind: ...
    def joined(self: Kind, other: Kind) -> Kind: ...
    def prepared(self: Kind, preprocessing: Preprocessing) -> Kind: ...
    def labelled(self: Kind, labels: IntArray) -> Kind: ...
    def pixel_hash(self, name: str) -> str: ...
    def content_hash(self) -> str: ...


def require_decodable(images: Source) -> None:
    """Reads every sample that was not yet; raises DataError at the first that can't be."""
    pixel_hashes(images, images.names)
    if isinstance(images, Images) and images.target_of is not None:
        indices, workers = range(len(images)), decoding_workers(images)
        for _ in in_order(images.sample, indices, workers=workers, ahead=HASHED_AHEAD):
            pass


def pixel_hashes(images: Source, names: Sequence[str]) -> list[str]:
    """The `pixel_hash` of each, decoded in threads where that is safe; of several processes each decodes its share."""
    if isinstance(images, Images):
        new = [name for name in names if name not in images.seen]
        workers = decoding_workers(images)
        hashes = list(in_order(images.pixel_hash, own_share(new), workers=workers, ahead=HASHED_AHEAD))
        images.seen.update(zip(new, in_turns(hashes), strict=True))
    return [images.pixel_hash(name) for name in names]


def decoding_workers(images: Source) -> int:
    """How many threads may decode: none where reading runs a user's code, or there is nothing to decode."""
    if images.storage in ("files", "shards"):
        return usable_workers()
    return 0


class Batches:
    """Batches of (inputs, targets), as often as they are iterated: of images float32 [N, C, H, W] and int64 [N].

    Samples stay in memory (images as uint8 pixels) as long as all of them take at most `cache_bytes`. While a batch is
    in use `workers` threads decode the next one; batches are the same whatever their number. Of the batches those whose
    number over `turns[1]` leaves `turns[0]` are made: one process's share, each whole.
    """

    def __init__(
        self,
        images: Source,
        batch_size: int,
        *,
        cache_bytes: int = CACHE_BYTES,
        turns: tuple[int, int] = (0, 1),
        workers: int | None = None,
    ) -> None:
        if batch_size < 1:
            raise RecipeError(f"batch size {batch_size} must be at least 1")
        if isinstance(images, Images):
            _preprocessing_of(images)
        self.images = images
        self.batch_size = batch_size
        self.turns = turns
        self._cache_bytes = cache_bytes
        self._workers = decoding_workers(images) if workers is None else workers
        self._samples: dict[int, Sample] = {}
        self._fits: bool | None = None  # all samples into the cache, by the first one that was read

    def __len__(self) -> int:
        first, apart = self.turns
        return len(range(first, math.ceil(len(self.images) / self.batch_size), apart))

    @property
    def image_count(self) -> int:
        """How many images the batches hold, without decoding any."""
        first, apart = self.turns
        starts = range(first * self.batch_size, len(self.images), apart * self.batch_size)
        return sum(min(self.batch_size, len(self.images) - start) for start in starts)

    def share(self, rank: int, world: int) -> Batches:
        """Every `world`-th batch from `rank` on, the same as among all; what was decoded already is not again."""
        turns, workers = (rank, world), self._workers
        shared = Batches(self.images, self.batch_size, cache_bytes=self._cache_bytes, turns=turns, workers=workers)
        shared._samples = self._samples
        return shared

    def __iter__(self) -> Iterator[Batch]:
        return self._in_order(np.arange(len(self.images)))

    def shuffled(self, seed: int) -> Iterator[Batch]:
        """One pass in an order that depends on the seed alone."""
        return self._in_order(cast(IntArray, self.order(seed).numpy()))

    def order(self, seed: int) -> Tensor:
        """Which image comes when in the pass that `shuffled` makes: int64 [images]."""
        return torch.randperm(len(self.images), generator=torch.Generator().manual_seed(seed))

    def _in_order(self, order: IntArray) -> Iterator[Batch]:
        first, apart = self.turns
        starts = range(first * self.batch_size, len(order), apart * self.batch_size)
        parts = [order[start : start + self.batch_size].tolist() for start in starts]
        with closing(self._read(list(chain(*parts)))) as samples:
            for chosen in parts:
                yield self.images.batch(list(islice(samples, len(chosen))))

    def _read(self, indices: Sequence[int]) -> Generator[Sample, None, None]:
        """Samples in that order, the next batch's ahead of being asked for."""
        is_cached = all(index in self._samples for index in indices)
        return in_order(self._sample, indices, workers=0 if is_cached else self._workers, ahead=self.batch_size)

    def _sample(self, index: int) -> Sample:
        kept = self._samples.get(index)
        if kept is not None:
            return kept
        sample = self.images.sample(index)
        if self._fits is None:
            self._fits = len(self.images) * sample.nbytes <= self._cache_bytes
        if self._fits:
            self._samples[index] = sample
        return sample


def batches(images: Source, batch_size: int, *, cache_bytes: int = CACHE_BYTES) -> Batches:
    """Re-iterable batches in the images' order; the last one may be smaller."""
    return Batches(images, batch_size, cache_bytes=cache_bytes)
