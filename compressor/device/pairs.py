"""A folder of images and of pictures that belong to them in, pairs of files out: of masks, or of images.

Masks: `images/` + `masks/`, or `x.mask.png` and `x_mask.png` beside `x.png`. Images: `lr/` + `hr/`, or `input/` +
`target/`. What belongs together has the same name but for its ending.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ..errors import DataError
from .listings import image_files, names_below

PairKind = Literal["mask", "image"]

_FOLDERS: tuple[tuple[str, str, PairKind], ...] = (
    ("images", "masks", "mask"),
    ("lr", "hr", "image"),
    ("input", "target", "image"),
)
_MASK_ENDINGS = (".mask", "_mask")  # of a mask's name beside its image, before the suffix


@dataclass(frozen=True, slots=True)
class Pairs:
    """Image files of a folder by name, and the names of the masks or images that belong to each."""

    kind: PairKind
    files: tuple[str, ...]
    targets: tuple[str, ...]


def read_pairs(folder: Path) -> Pairs | None:
    """The folder's images with what belongs to them; None where it is no such folder.

    Raises DataError for an image without its other half, the other way about, and for one with two.
    """
    for inputs, targets, kind in _FOLDERS:
        if (folder / inputs).is_dir() and (folder / targets).is_dir():
            images = _by_key(folder / inputs, image_files(folder / inputs))
            others = _by_key(folder / targets, image_files(folder / targets))
            return _paired(folder, images, others, targets, kind)
    return _beside(folder)


def _beside(folder: Path) -> Pairs | None:
    """Images whose masks lie beside them; None where nothing is a mask of anything."""
    files = list(filter(Path.is_file, image_files(folder, deep=False)))
    keys = {_key(path, folder) for path in files}
    masks: dict[str, Path] = {}
    for path in files:
        for base in keys.intersection(_bases(path, folder)):
            masks[base] = path
    if not masks:
        return None
    is_mask = set(masks.values())
    images = _by_key(folder, [path for path in files if path not in is_mask])
    return _paired(folder, images, masks, "masks", "mask")


def _key(path: Path, folder: Path) -> str:
    """`a/b` of `folder/a/b.png`."""
    return path.relative_to(folder).with_suffix("").as_posix()


def _bases(path: Path, folder: Path) -> Iterable[str]:
    """`a/b` of `folder/a/b_mask.png`: what it would be the mask of."""
    key = _key(path, folder)
    return (key.removesuffix(ending) for ending in _MASK_ENDINGS if key.endswith(ending))


def _by_key(folder: Path, files: Sequence[Path]) -> Mapping[str, Path]:
    """Raises DataError for two files with one name but for the ending, of which one would be passed over."""
    by_key: dict[str, Path] = {}
    for path in files:
        other = by_key.setdefault(_key(path, folder), path)
        if other != path:
            raise DataError(
                f"{other.name!r} and {path.name!r} of {str(folder)!r} have one name but for the ending, and what "
                "belongs to which can't be told; rename one"
            )
    return by_key


def _paired(
    folder: Path, images: Mapping[str, Path], others: Mapping[str, Path], targets: str, kind: PairKind
) -> Pairs:
    """Every image with its other half."""
    if not images:
        raise DataError(f"folder {str(folder)!r} holds no images beside its {targets}")
    alone = _names_without(others, images)
    if alone:
        raise DataError(
            f"{len(alone)} of {len(images)} images of {str(folder)!r} have no file of the same name among the "
            f"{targets} (first: {alone[0]!r}); put it there, or remove them"
        )
    left = _names_without(images, others)
    if left:
        raise DataError(f"{len(left)} of the {targets} of {str(folder)!r} belong to no image (first: {left[0]!r})")
    targets_of_images = [others[key] for key in images]
    return Pairs(kind, names_below(folder, images.values()), names_below(folder, targets_of_images))


def _names_without(partners: Mapping[str, Path], paths: Mapping[str, Path]) -> list[str]:
    """Names of the files that have no partner of the same key."""
    return [path.name for key, path in paths.items() if key not in partners]
