"""Data as a Python caller has them in; `Images`, `Examples` or a source's name out, anything else refused by name.

Takes names and paths, arrays, a `Dataset` of torch's or Hugging Face's, a `DataLoader`, batches in whatever can be gone
through again, and a function that returns one of these. Pixels become `Images`, which are pre-processed here; tensors
that are as the network takes them become `Examples`. Knows of a model how its forward is called, and no more.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain
from typing import Any, TypeGuard

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import (
    DataLoader,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    default_collate,
)

from ..errors import DataError, with_article
from ..records import IntArray
from ..tensors import Inputs
from .blame import raised
from .datasets import Dataset, as_picture, dataset_images, dataset_labels
from .entries import ANY_SIGNATURE, Batch, Signature, is_array, notes_on, read_batch, read_entry
from .examples import Examples, examples_in_memory, hashes_of, numbered_classes
from .huggingface_datasets import table_images
from .images import Images, numbered
from .samples import BOXES, UNKNOWN, Sample, Targets, class_index, kind_of
from .streams import Streamed, streamed

_KINDS = (
    "a folder, an .npz or another source's name (text or Path), arrays, a Dataset, a DataLoader, a list of batches, or "
    "a function that returns one of these"
)


def given_data(data: object, signature: Signature = ANY_SIGNATURE) -> str | Images | Examples | None:
    """The name of a source, or what the data are made into; None stays None.

    Raises DataError for what is no data, and for data that don't fit together.
    """
    name = type(data).__name__
    if signature.wanted == 1:
        images = table_images(name, data)
        if images is not None:
            return images
    match data:
        case None | str() | Images() | Examples():
            return data
        case os.PathLike():
            return str(os.fspath(data))
        case type():
            raise DataError(f"the data are the class {data.__name__}, expected one made of it: {data.__name__}(...)")
        case Iterator():
            raise DataError(
                f"{with_article(name)} can be gone through once, and the data are needed often; give a function that "
                "returns one"
            )
        case DataLoader():
            return _of_loader(name, data, signature)
        case IterableDataset():
            return _of_stream(streamed(name, lambda: data, signature, by_sample=True), name, signature)
        case tuple() | list() if _is_columns(data):
            return _of_columns(f"{name} of arrays", data, signature)
        case tuple() | list():
            return _of_list(f"data given as a {name}", data, signature)
        case _ if _is_columns(data):
            return _of_columns(name, data, signature)
        case _ if _is_dataset(data):
            return _of_dataset(name, data, signature)
        case Iterable():
            return _of_stream(streamed(name, lambda: data, signature), name, signature)
        case _ if callable(data):
            return _of_function(data, signature)
    raise DataError(f"data are given as {with_article(name)}, expected {_KINDS}")


def _is_columns(data: object) -> bool:
    """Arrays that hold all samples: one, a tuple or dict of several, or a list of images and of their class indices."""
    match data:
        case Tensor() | np.ndarray():
            return True
        case Mapping():
            return bool(data)
        case tuple():
            return isinstance(next(iter(data), None), (Tensor, np.ndarray, tuple, Mapping))
        case list():
            return _are_images_and_labels(data)
        case _:
            return False


def _are_images_and_labels(columns: list[Any]) -> bool:
    """Whether there are two arrays, one of images and one with the class index of each."""
    match columns:
        case [Tensor() | np.ndarray() as images, Tensor() | np.ndarray() as labels]:
            return labels.ndim == 1 and images.ndim > 1 and len(images) == len(labels)
        case _:
            return False


def _is_dataset(data: object) -> TypeGuard[Dataset]:
    return hasattr(data, "__getitem__") and hasattr(data, "__len__")


class _Rows:
    """A batch of all samples as a data set of (pixels, target); `targets` where they are class indices."""

    def __init__(self, batch: Batch) -> None:
        self._pixels = batch.inputs[0]
        unlabelled = torch.full((len(batch),), UNKNOWN)
        self._targets: Targets = unlabelled if batch.targets is None else batch.targets
        if kind_of(self._targets[0]) == "class":
            self.targets = self._targets

    def __len__(self) -> int:
        return len(self._pixels)

    def __getitem__(self, index: int) -> tuple[Tensor, object]:
        return self._pixels[index], self._targets[index]


def _of_columns(source: str, data: object, signature: Signature) -> Images | Examples:
    batch = read_batch(data, signature, source)
    if not len(batch):
        raise DataError(f"{source} holds no samples")
    pixels = batch.inputs[0]
    if len(batch.inputs) == 1 and _is_picture(pixels[0], signature) and _in_range(pixels):
        return dataset_images(source, _Rows(batch), storage="arrays")
    samples = batch.samples()
    notes = _notes(samples[0], signature, batch.left_out)
    return examples_in_memory(source, samples, numbered(len(batch)), input_names=batch.names, notes=notes)


def _is_picture(value: object, signature: Signature) -> bool:
    """Whether pre-processing has to make a tensor of it: PIL's images, and pixels where a pre-processing is known."""
    if signature.wanted != 1:
        return False
    if not signature.preprocessed or not is_array(value):
        return isinstance(value, Image.Image)
    try:
        as_picture(value)
    except TypeError:
        return False
    return True


def _in_range(pixels: Tensor) -> bool:
    """Floats are pixels in [0, 1]; whole numbers are what their type says."""
    return not pixels.is_floating_point() or 0 <= float(pixels.min()) <= float(pixels.max()) <= 1


def _notes(first: Sample, signature: Signature, left_out: Sequence[str]) -> tuple[str, ...]:
    """What was decided about data that become examples."""
    inputs = first.inputs
    if not signature.preprocessed or not _has_form_of_image(inputs):
        return notes_on(left_out)
    taken = (
        f"the images are tensors {list(inputs.shape)} of values from {float(inputs.min()):.3g} to "
        f"{float(inputs.max()):.3g}, which are no pixels: they are taken as the network takes them, without "
        "pre-processing"
    )
    return (taken, *notes_on(left_out))


def _has_form_of_image(inputs: Inputs) -> TypeGuard[Tensor]:
    """Whether there is one tensor, [1, H, W] or [3, H, W]."""
    if not isinstance(inputs, Tensor) or inputs.ndim != 3:
        return False
    return inputs.shape[0] in (1, 3)


def _of_stream(stream: Streamed, source: str, signature: Signature) -> Images | Examples:
    if all(_is_picture(sample.inputs, signature) for sample in stream.samples):
        return dataset_images(source, [(sample.inputs, sample.target) for sample in stream.samples])
    notes = _notes(stream.samples[0], signature, stream.left_out)
    return examples_in_memory(source, stream.samples, stream.names, input_names=stream.input_names, notes=notes)


def _of_list(source: str, entries: Sequence[Any], signature: Signature) -> Images | Examples:
    """A list of batches, or of samples where the first shows it: a picture, or a pair with the target of one sample."""
    if entries and _is_sample(entries[0]):
        return _of_dataset(source, entries, signature)
    return _of_stream(streamed(source, lambda: entries, signature), source, signature)


def _is_sample(entry: object) -> bool:
    match entry:
        case Image.Image():
            return True
        case tuple() | list():
            return _is_pair(entry)
        case _:
            return False


def _is_pair(entry: Sequence[object]) -> bool:
    """Whether these are an image and the target of this one image."""
    match entry:
        case (_, Mapping() as target) if BOXES in target:
            return is_array(target[BOXES]) and target[BOXES].ndim == 2  # [k, 4]; of a batch they have one axis more
        case (Image.Image(), _):
            return True
        case (Tensor() | np.ndarray(), target):
            return isinstance(target, (int, float, np.generic)) or (is_array(target) and target.ndim == 0)
        case _:
            return False


def _of_function(function: Callable[..., object], signature: Signature) -> str | Images | Examples:
    """What a function without arguments returns; an iterator is asked for anew for each pass."""
    name = getattr(getattr(function, "func", function), "__name__", type(function).__name__)
    try:
        returned = function()
    except Exception as error:
        raise DataError(f"calling {name} raised {raised(error)}; give a function that needs no arguments") from error
    if isinstance(returned, Iterator):
        passes: Callable[[], Any] = function
        return _of_stream(streamed(name, passes, signature), name, signature)
    data = given_data(returned, signature)
    if data is None:
        raise DataError(f"{name} returned None, expected {_KINDS}")
    return data


def _of_loader(name: str, loader: DataLoader[Any], signature: Signature) -> Images | Examples:
    """By index where the loader does nothing but choose and collate entries; a shuffled order does not matter then."""
    indices = _indices(loader)
    if indices is None:
        return _of_stream(streamed(name, lambda: loader, signature), name, signature)
    collate = None if loader.collate_fn is default_collate else loader.collate_fn
    return _of_dataset(name, loader.dataset, signature, indices=indices, collate=collate)  # type: ignore[arg-type]


def _indices(loader: DataLoader[Any]) -> list[int] | None:
    """The entries that a loader's sampler chooses, in the order of the data set; None where entries have no index."""
    if isinstance(loader.dataset, IterableDataset) or not _is_dataset(loader.dataset):
        return None
    if loader.batch_size is not None and isinstance(loader.sampler, (SequentialSampler, RandomSampler)):
        return list(range(len(loader.dataset)))
    if loader.batch_size is not None:
        chosen = list(loader.sampler)
    elif loader.batch_sampler is not None:
        chosen = list(chain.from_iterable(loader.batch_sampler))
    else:  # an entry is a batch
        return None
    if not all(isinstance(index, (int, np.integer)) for index in chosen):
        return None
    return sorted(set(map(int, chosen)))


class _Entries:
    """A data set's entries as samples by their number; code of the user's that raises is told with its line."""

    def __init__(
        self, source: str, dataset: Dataset, signature: Signature, collate: Callable[[list[Any]], object] | None
    ) -> None:
        self.source, self.dataset, self.signature, self.collate = source, dataset, signature, collate

    def raw(self, index: int) -> Any:
        try:
            return self.dataset[index]
        except Exception as error:
            raise DataError(
                f"reading entry {index} of {self.source} raised {raised(error)}; correct it there"
            ) from error

    def batch(self, index: int) -> Batch:
        entry, where = self.raw(index), f"entry {index} of {self.source}"
        if self.collate is None:
            return read_entry(entry, self.signature, where)
        try:
            collated = self.collate([entry])
        except Exception as error:
            raise DataError(f"collating {where} raised {raised(error)}; correct it there") from error
        return read_batch(collated, self.signature, where)

    def sample(self, index: int) -> Sample:
        samples = self.batch(index).samples()
        if len(samples) != 1:
            raise DataError(
                f"entry {index} of {self.source} is collated to {len(samples)} samples, expected one; give batches"
            )
        return samples[0]


def _of_dataset(
    source: str,
    dataset: Dataset,
    signature: Signature,
    *,
    indices: Sequence[int] | None = None,
    collate: Callable[[list[Any]], object] | None = None,
) -> Images | Examples:
    """Entries at `indices` (all where None), read when they are asked for."""
    chosen = range(len(dataset)) if indices is None else indices
    if not len(chosen):
        raise DataError(f"{source} holds no samples")
    entries = _Entries(source, dataset, signature, collate)
    entry = entries.raw(chosen[0])
    makes_tensors = collate is not None and not signature.preprocessed
    if not makes_tensors and _is_picture(_image_of(entry, signature), signature):
        if isinstance(entry, Mapping):
            dataset = _Pairs(dataset, signature)
        return dataset_images(source, dataset).subset(chosen)

    batch, first = entries.batch(chosen[0]), entries.sample(chosen[0])
    if hashes_of(first) != hashes_of(entries.sample(chosen[0])):
        raise DataError(
            f"{source} gives other tensors at every reading (random augmentation?), and no two networks would see the "
            "same; give it with the transforms of evaluation"
        )
    names = numbered(len(dataset))
    labels = _labels(entries, chosen, first)
    return Examples(
        source,
        tuple(names[index] for index in chosen),
        labels,
        _class_names(dataset, labels),
        lambda name: entries.sample(int(name)),
        first,
        batch.names,
        _notes(first, signature, batch.left_out),
    )


def _labels(entries: _Entries, indices: Sequence[int], first: Sample) -> IntArray:
    """Class indices, where targets are any: as the data set keeps them, else out of every entry."""
    if kind_of(first.target) != "class":
        return np.full(len(indices), -1)
    stored = dataset_labels(entries.dataset)
    if stored is not None and int(stored[indices[0]]) == class_index(first.target):
        return np.asarray(stored[np.asarray(indices)], dtype=np.int64)
    return np.array([class_index(entries.sample(index).target) for index in indices], dtype=np.int64)


def _class_names(dataset: Dataset, labels: IntArray) -> tuple[str, ...]:
    """The data set's, else numbers; none where labels are no class indices."""
    has_classes = labels.max(initial=UNKNOWN) >= 0
    classes = getattr(dataset, "classes", None)
    if has_classes and classes:
        return tuple(map(str, classes))
    return numbered_classes(labels)


def _image_of(entry: object, signature: Signature) -> object:
    """The image of an entry: alone, the first of a pair, or PIL's in a dict where forward takes nothing else of it."""
    match entry:
        case Mapping():
            return _image_by_name(entry, signature)
        case tuple() | list() if entry:
            return entry[0]
        case _:
            return entry


def _image_by_name(entry: Mapping[Any, object], signature: Signature) -> object:
    others = {str(key): value for key, value in entry.items() if not signature.is_target(str(key))}
    inputs = [name for name in signature.parameters if name in others]
    if len(inputs) > 1:
        return None
    candidates = (others[name] for name in inputs or others)
    return next((value for value in candidates if isinstance(value, Image.Image)), None)


class _Pairs:
    """A data set of dicts as one of (image, target)."""

    def __init__(self, dataset: Dataset, signature: Signature) -> None:
        self.dataset, self.signature = dataset, signature

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[object, object]:
        entry = self.dataset[index]
        assert isinstance(entry, Mapping)
        targets = (value for key, value in entry.items() if self.signature.is_target(str(key)))
        return _image_of(entry, self.signature), next(targets, UNKNOWN)
