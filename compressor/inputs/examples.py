"""Samples that are tensors as the network takes them: no pre-processing, any shape, any number of inputs.

The other kind of `images.Source` beside `Images`. Knows neither where samples come from nor what targets mean.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from ..errors import DataError
from ..files import content_hash
from ..records import IntArray
from ..tensors import Inputs, as_tuple
from .images import Preprocessing, Storage
from .samples import (
    MOST_CLASSES,
    UNKNOWN,
    Sample,
    TargetKind,
    Targets,
    class_index,
    kind_of,
    stacked_inputs,
    stacked_targets,
    tensors_of,
)


@dataclass(frozen=True, slots=True)
class Examples:
    """Samples of one source in a fixed order, all of `first`'s shapes; nothing is read before it is asked for.

    `read` takes a name and raises DataError. `input_names` are the parameters of forward that the inputs are given by,
    empty where they are given by position. `notes` say what was decided when the source was read.
    """

    source: str
    names: tuple[str, ...]
    labels: IntArray
    class_names: tuple[str, ...]
    read: Callable[[str], Sample]
    first: Sample
    input_names: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    seen: dict[str, tuple[str, str]] = field(default_factory=dict, repr=False, compare=False)  # shared by all parts

    @property
    def preprocessing(self) -> Preprocessing | None:
        """None: the tensors are what the network takes."""
        return None

    @property
    def storage(self) -> Storage:
        """What the user gave them as."""
        return "arrays"

    @property
    def target_kind(self) -> TargetKind:
        """Of the first sample's target."""
        return kind_of(self.first.target)

    def __len__(self) -> int:
        return len(self.names)

    def sample(self, index: int) -> Sample:
        """One sample. Raises DataError where it can't be read, has other shapes than the first, or holds NaN."""
        name = self.names[index]
        sample = self.read(name)
        require_alike(sample, self.first, f"sample {name!r} of {self.source}")
        return sample

    def batch(self, samples: Sequence[Sample]) -> tuple[Inputs, Targets]:
        """Samples with the batch's axis in front."""
        return stacked_inputs(samples), stacked_targets(samples, self.source)

    def inputs(self, indices: Sequence[int] | IntArray) -> Inputs:
        """The inputs at those positions, [N, ...] each."""
        return stacked_inputs([self.sample(int(index)) for index in indices])

    def targets(self, indices: Sequence[int] | IntArray) -> Targets:
        """The targets at those positions; of classes int64 [N], without reading a sample."""
        if self.target_kind == "class":
            return torch.from_numpy(self.labels[np.asarray(indices, dtype=np.int64)])
        return stacked_targets([self.sample(int(index)) for index in indices], self.source)

    def subset(self, indices: Sequence[int] | IntArray) -> Examples:
        """The samples at those positions, in that order."""
        chosen = np.asarray(indices, dtype=np.int64)
        return replace(self, names=tuple(self.names[i] for i in chosen), labels=self.labels[chosen])

    def joined(self, other: Examples) -> Examples:
        """These samples and those of another part of the same source behind them."""
        own = frozenset(self.names)

        def read(name: str) -> Sample:
            return self.read(name) if name in own else other.read(name)

        labels = np.concatenate([self.labels, other.labels])
        return replace(self, names=self.names + other.names, labels=labels, read=read, seen={})

    def labelled(self, labels: IntArray) -> Examples:
        """The same samples with class indices [N] for targets, in their order."""
        index_of = dict(zip(self.names, labels.tolist(), strict=True))

        def read(name: str) -> Sample:
            return replace(self.read(name), target=torch.tensor(index_of[name]))

        first = replace(self.first, target=torch.tensor(0))
        return replace(self, labels=labels, read=read, first=first, seen={})

    def prepared(self, preprocessing: Preprocessing) -> Examples:
        """The same: what is a tensor already is not pre-processed again."""
        return self

    def pixel_hash(self, name: str) -> str:
        """sha256 of the inputs, without the target; each sample is read for it once."""
        return self._hashes(name)[0]

    def digest(self, name: str) -> str:
        """sha256 of the inputs and the target."""
        return content_hash(*self._hashes(name))

    def content_hash(self) -> str:
        """sha256 over every sample's inputs and target, in order; reads all samples."""
        return content_hash(*(self.digest(name) for name in self.names), self.labels, list(self.input_names))

    def _hashes(self, name: str) -> tuple[str, str]:
        if name not in self.seen:
            sample = self.read(name)
            require_alike(sample, self.first, f"sample {name!r} of {self.source}")
            self.seen[name] = hashes_of(sample)
        return self.seen[name]


def examples_in_memory(
    source: str,
    samples: Sequence[Sample],
    names: Sequence[str],
    *,
    class_names: Sequence[str] = (),
    input_names: Sequence[str] = (),
    notes: Sequence[str] = (),
) -> Examples:
    """Examples of samples that are in memory; classes without names are numbered.

    Raises DataError without a sample, and for one that differs from the first in its shapes or holds NaN.
    """
    if not samples:
        raise DataError(f"{source} holds no samples; give batches of inputs, or of (inputs, targets)")
    by_name = dict(zip(names, samples, strict=True))
    for name, sample in by_name.items():
        require_alike(sample, samples[0], f"sample {name!r} of {source}")
    labels = np.array([class_index(sample.target) for sample in samples], dtype=np.int64)
    return Examples(
        source,
        tuple(names),
        labels,
        tuple(class_names or numbered_classes(labels)),
        by_name.__getitem__,
        samples[0],
        tuple(input_names),
        tuple(notes),
    )


def numbered_classes(labels: IntArray) -> tuple[str, ...]:
    """Names of classes that have none: 0 to the largest label. None where labels are no class indices."""
    counted = int(labels.max(initial=UNKNOWN)) + 1
    return tuple(map(str, range(counted))) if counted <= MOST_CLASSES else ()


def require_alike(sample: Sample, first: Sample, where: str) -> None:
    """Raises DataError for inputs or a target of other shapes or types than the first sample's, and for NaN."""
    inputs, expected = as_tuple(sample.inputs), as_tuple(first.inputs)
    if [_form(tensor) for tensor in inputs] != [_form(tensor) for tensor in expected]:
        raise DataError(
            f"{where} is {_listed(inputs)}, the first {_listed(expected)}; give all samples one shape and one type"
        )
    if kind_of(sample.target) != kind_of(first.target):
        raise DataError(
            f"{where} has a target of the kind {kind_of(sample.target)!r}, the first {kind_of(first.target)!r}; give "
            "one kind"
        )
    if any(tensor.is_floating_point() and bool(tensor.isnan().any()) for tensor in inputs):
        raise DataError(f"{where} holds NaN; remove it, or look at what computed it")


def _form(tensor: Tensor) -> tuple[object, ...]:
    return (tensor.dtype, *tensor.shape)


def _listed(tensors: Sequence[Tensor]) -> str:
    """`float32 [3, 8, 8]`, one behind the other."""
    return " and ".join(f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}" for tensor in tensors)


def hashes_of(sample: Sample) -> tuple[str, str]:
    """sha256 of a sample's inputs and of its target."""
    return _sha256(as_tuple(sample.inputs)), _sha256(tensors_of(sample.target))


def _sha256(tensors: Sequence[Tensor]) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(repr(_form(tensor)).encode())
        digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()
