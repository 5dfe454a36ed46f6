"""The name of a source in, `Images` or `Examples` out.

Sources: a folder per class, a folder with labels.csv, images with masks, boxes or other images (`paired`, `coco`), tars
(`shards`), a saved data set (`huggingface_datasets`), an .npz (`archives`), `torchvision:NAME(key=value)`,
`file.py:loader`, and `digits[:training|:evaluation]`, scikit-learn's scans. Knows neither models nor recipes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from ..device.annotations import annotations_of
from ..device.labels import TABLE, ClassLabels, class_folders, labelled_files
from ..device.listings import image_files
from ..errors import DataError
from .archives import npz_data
from .calls import names_code
from .coco import coco_images
from .data import given_data
from .datasets import library_images
from .digits import digits_images, names_digits
from .entries import ANY_SIGNATURE, Signature
from .examples import Examples
from .folders import images_of_files
from .huggingface_datasets import saved_images
from .images import Images, Source, Storage
from .loaders import called_loader
from .paired import paired_images
from .shards import named_shards, names_shards, shard_files, shard_images

# how images of each kind are given their labels
_LABELLED: Mapping[Storage, str] = {
    "files": "sort them into one folder per class or add labels.csv",
    "shards": "write a .cls with the class index beside each image",
    "npz": "store 'labels' in the .npz, the class index of each image",
    "arrays": "give a pair of arrays (images, labels)",
    "data set": "let the data set give pairs (image, label)",
}


def load_images(source: str, *, classes: Sequence[str] | None = None, root: str = "data") -> Images:
    """The images of a source, none decoded yet (an .npz is read whole).

    `classes` fixes which class name has which index; without it class folders and names count in
    alphabetical order, as in torchvision's ImageFolder. `root` is where torchvision keeps its data sets.
    Raises DataError for a source that is not there, holds no images or labels them wrongly.
    """
    images = load_source(source, classes=classes, root=root)
    if isinstance(images, Examples):
        raise DataError(f"{source!r} holds tensors as a network takes them, expected images")
    return images


def load_source(
    source: str,
    signature: Signature = ANY_SIGNATURE,
    *,
    classes: Sequence[str] | None = None,
    root: str = "data",
) -> Images | Examples:
    """As `load_images`, and sources of tensors, of which `signature` says how a network takes them.

    Runs the user's code where the source names it (`file.py:loader`); `trust` says when that may be.
    """
    if names_digits(source):
        return digits_images(source)
    if source.startswith("torchvision:"):
        return library_images(source, root)
    path = Path(source).expanduser()
    if names_shards(source) and not path.is_dir():
        return shard_images(source, named_shards(source), classes)
    saved = saved_images(source)
    if saved is not None:
        return saved
    if not path.exists():
        return _of_code(source, signature, classes, root)
    if not path.is_file():
        return _folder_images(path, classes)
    if path.suffix.lower() == ".json":
        return coco_images(path, classes)
    return npz_data(path, signature)


def _folder_images(folder: Path, classes: Sequence[str] | None) -> Images:
    """By what lies in it: shards, a table of labels, boxes, masks or other images, else a folder for each class."""
    shards = shard_files(folder)
    if shards:
        _require_shards_alone(folder, shards[0])
        return shard_images(str(folder), shards, classes)
    if (folder / TABLE).is_file():
        return _of_classes(folder, labelled_files(folder, classes))
    annotations = annotations_of(folder)
    if annotations is not None:
        return coco_images(annotations, classes)
    return paired_images(folder) or _of_classes(folder, class_folders(folder, classes))


def _require_shards_alone(folder: Path, shard: Path) -> None:
    """Raises DataError for images beside shards: one of the two would be passed over."""
    images = next(iter(image_files(folder)), None)
    if images is not None:
        raise DataError(
            f"folder {str(folder)!r} holds the shard {shard.name!r} and images ({images.name!r}); give each a folder "
            f"of its own, or name the shards: {str(shard)!r}"
        )


def _of_code(source: str, signature: Signature, classes: Sequence[str] | None, root: str) -> Images | Examples:
    if not names_code(source):
        raise DataError(
            f"{source!r} is neither a folder nor a file here; give a folder of images, an .npz, 'digits', "
            "'torchvision:NAME' or file.py:loader"
        )
    data = given_data(called_loader(source), signature)
    if isinstance(data, str) and not names_code(data):  # a loader may name a folder; one that names a loader has no end
        return load_source(data, signature, classes=classes, root=root)
    if data is None or isinstance(data, str):
        raise DataError(f"{source!r} gave {data!r}, expected a loader, a Dataset, arrays or the name of a folder")
    return data


def require_labels(images: Source, outputs: int) -> None:
    """Raises DataError unless every image has a label that a model of that many outputs can give."""
    unknown = np.flatnonzero(images.labels < 0)
    if unknown.size:
        raise DataError(
            f"{unknown.size} of {len(images)} images of {images.source} have no label "
            f"(first: {images.names[unknown[0]]!r}); {_LABELLED[images.storage]}"
        )
    beyond = np.flatnonzero(images.labels >= outputs)
    if beyond.size:
        first = beyond[0]
        raise DataError(
            f"image {images.names[first]!r} of {images.source} has label {images.labels[first]}, but the model tells "
            f"{outputs} classes apart (0 to {outputs - 1}); check the labels or the model's number of classes"
        )


def _of_classes(folder: Path, labels: ClassLabels) -> Images:
    return images_of_files(folder, labels.files, labels.labels, labels.class_names)
