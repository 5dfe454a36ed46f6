"""An .npz in, `Images` or `Examples` out.

Of `images` (uint8) with `labels`, `masks` or `targets`, or of tensors as the network takes them: `inputs`, or several
named `input.NAME`, with `targets`, `labels` or `masks`.
"""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ..device.labels import MOST_CLASSES, UNKNOWN, too_large_label
from ..errors import DataError, first_line
from ..records import IntArray
from .entries import ANY_SIGNATURE, Signature, notes_on, read_batch
from .examples import Examples, examples_in_memory
from .folders import with_targets
from .images import Images, numbered
from .samples import TargetKind
from .targets import picture_of

_INPUT_ARRAYS = ("images", "inputs")
_INPUT_PREFIX = "input."  # before the name of one input of several
_TARGETS = ("labels", "masks", "targets")


def npz_data(path: Path, signature: Signature = ANY_SIGNATURE) -> Images | Examples:
    """Raises DataError for what is no archive of one of these, or whose arrays don't fit together."""
    arrays, class_names = _npz_arrays(path)
    if "images" not in arrays:
        return _examples(path, arrays, class_names, signature)
    pixels = _pixels(path, arrays["images"])
    unlabelled = images_of_array(str(path), pixels, np.full(len(pixels), UNKNOWN), class_names)
    name = _target_name(path, arrays)
    if not name:
        return unlabelled
    targets = arrays[name]
    if len(targets) != len(pixels):
        raise DataError(f"{str(path)!r} has {len(pixels)} images and {len(targets)} {name}; expected as many of each")
    if name == "labels" or (name == "targets" and _are_indices(targets)):
        return images_of_array(str(path), pixels, _labels(path, targets, class_names), class_names)
    return _with_targets(unlabelled, targets)


def _target_name(path: Path, arrays: Mapping[str, NDArray[Any]]) -> str:
    """Which array holds the targets; empty where none does."""
    names = [name for name in _TARGETS if name in arrays]
    if len(names) > 1:
        raise DataError(f"{str(path)!r} holds {' and '.join(names)}; keep the one that is meant")
    return next(iter(names), "")


def _are_indices(targets: NDArray[Any]) -> bool:
    return targets.ndim == 1 and targets.dtype.kind in "iu"


def _pixels(path: Path, images: NDArray[Any]) -> NDArray[np.uint8]:
    if images.ndim == 3:
        images = images[..., None]  # grey, [N, H, W] to [N, H, W, 1]
    if not _are_pictures(images):
        raise DataError(
            f"'images' in {str(path)!r} is {images.dtype} {list(images.shape)}; expected uint8 [N, H, W, 3] (or 1), or "
            "'inputs' for tensors as the network takes them"
        )
    if not images.size:
        raise DataError(f"{str(path)!r} holds no images")
    return images


def _are_pictures(pixels: NDArray[Any]) -> bool:
    """Whether these are uint8 [N, H, W, C] with C 1 or 3."""
    if pixels.ndim != 4 or pixels.dtype != np.uint8:
        return False
    return pixels.shape[-1] in (1, 3)


def _labels(path: Path, labels: NDArray[Any], class_names: Sequence[str]) -> IntArray:
    if labels.dtype.kind not in "iu":
        raise DataError(f"'labels' in {str(path)!r} are {labels.dtype}, expected whole numbers")
    if labels.max() > np.iinfo(np.int64).max:  # would turn negative
        raise DataError(too_large_label(str(labels.max()), str(path)))
    indices = labels.astype(np.int64)
    _require_indices(indices, class_names, path)
    return indices


def _with_targets(images: Images, targets: NDArray[Any]) -> Images:
    """Masks where they are whole numbers [N, H, W], images where they are uint8 [N, H, W, C], else values."""
    kind = _kind_of(targets)

    def target_of(name: str) -> object:
        target = targets[int(name)]
        if kind == "image":
            return picture_of(target)
        return target

    def stored(name: str) -> bytes:
        target = np.ascontiguousarray(targets[int(name)])
        return repr((target.dtype, target.shape)).encode() + target.tobytes()

    return with_targets(images, kind, target_of, stored)


def _kind_of(targets: NDArray[Any]) -> TargetKind:
    if _are_pictures(targets):
        return "image"
    if targets.ndim == 3 and targets.dtype.kind in "iu":
        return "mask"
    return "values"


def _examples(
    path: Path, arrays: Mapping[str, NDArray[Any]], class_names: Sequence[str], signature: Signature
) -> Examples:
    by_name = {
        name.removeprefix(_INPUT_PREFIX): array for name, array in arrays.items() if name.startswith(_INPUT_PREFIX)
    }
    if by_name and "inputs" in arrays:
        raise DataError(f"{str(path)!r} holds 'inputs' and '{_INPUT_PREFIX}{next(iter(by_name))}'; keep one of the two")
    inputs = by_name or (arrays["inputs"],)
    targets = arrays.get(_target_name(path, arrays))
    batch = read_batch((inputs, targets), signature, str(path))
    if not len(batch):
        raise DataError(f"{str(path)!r} holds no samples")
    return examples_in_memory(
        str(path),
        batch.samples(),
        numbered(len(batch)),
        class_names=class_names,
        input_names=batch.names,
        notes=notes_on(batch.left_out),
    )


def _require_indices(labels: IntArray, names: Sequence[str], path: Path) -> None:
    least, largest = int(labels.min()), int(labels.max())
    if largest >= MOST_CLASSES:
        raise DataError(too_large_label(str(largest), str(path)))
    most, beyond = "the number of classes", MOST_CLASSES
    if names:
        most, beyond = f"{len(names) - 1}, the last of 'class_names'", len(names)
    extreme = least if least < UNKNOWN else largest
    if not UNKNOWN <= extreme < beyond:
        raise DataError(f"{str(path)!r} has label {extreme}, outside 0 to {most} (-1: unknown); correct 'labels'")


def _npz_arrays(path: Path) -> tuple[Mapping[str, NDArray[Any]], tuple[str, ...]]:
    """The arrays that have a meaning here, and names of classes. Raises DataError for what is no archive of these."""
    if not zipfile.is_zipfile(path):
        raise DataError(f"{str(path)!r} is not an .npz file; give one, or the folder that holds the images")
    try:
        return _stored_arrays(path)
    except DataError:
        raise
    except ValueError as error:
        raise DataError(
            f"{str(path)!r} holds an array of objects ({error}): images of mixed sizes? Resize them to one size "
            "or give a folder of files"
        ) from error
    except Exception as error:  # a damaged archive's errors are of every kind, among them that it declares terabytes
        reason = first_line(error)
        raise DataError(
            f"{str(path)!r} is not an .npz of images and labels ({reason}); write it with np.savez"
        ) from error


def _stored_arrays(path: Path) -> tuple[Mapping[str, NDArray[Any]], tuple[str, ...]]:
    with np.load(path, allow_pickle=False) as archive:
        inputs = [name for name in archive if name in _INPUT_ARRAYS or name.startswith(_INPUT_PREFIX)]
        if not inputs:
            raise DataError(
                f"{str(path)!r} holds {', '.join(archive)}; expected 'images' and 'labels', or 'inputs' and 'targets'"
            )
        arrays = {name: archive[name] for name in (*inputs, *_TARGETS) if name in archive}
        class_names = tuple(map(str, archive.get("class_names", ())))
    for name, array in arrays.items():
        if not isinstance(array, np.ndarray) or not array.ndim:
            raise DataError(f"{name!r} in {str(path)!r} is no array of samples; write it with np.savez")
    if "labels" in arrays:
        arrays["labels"] = arrays["labels"].reshape(-1)
    return arrays, class_names


def images_of_array(source: str, images: NDArray[np.uint8], labels: IntArray, classes: Sequence[str]) -> Images:
    """Of pixels [N, H, W, C] with C 1 or 3; classes without names are numbered."""

    def read(name: str) -> Image.Image:
        return picture_of(images[int(name)])

    def digest(name: str) -> str:
        image = np.ascontiguousarray(images[int(name)])
        return hashlib.sha256(repr(image.shape).encode() + image.tobytes()).hexdigest()

    class_names = tuple(classes or map(str, range(int(labels.max()) + 1)))
    return Images(source, numbered(len(images)), labels, class_names, None, read, digest, "npz")
